"""An encoding alone: every token is kept, the newest exactly, the others as codes.

    tail      the newest `residual` tokens and up to 31 more, exact, and up to 32 pending ones
    settled   everything older, encoded in groups of 32 tokens, in the order of their positions: pages that nothing ever leaves

`when` is that of methods with a budget (budgeted.py): `prompt` encodes at a prompt's end only, `decode` every 64 tokens from there on,
`stream` inside the prompt, too. No code is ever decoded to be encoded again, and none is looked at when new ones come. In a model with a
sliding window the pages are a ring of the window's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.attention.budget import Budget
from zoo.attention.budgeted import Budgeted, BudgetedCaches
from zoo.attention.cache import Caches
from zoo.attention.encoding import EncodedPages
from zoo.attention.slots import PAGE
from zoo.attention.store import Pages
from zoo.attention.tail import GROWING, BudgetedCache, Make

EVERYTHING = Budget(100, percent=True)


@dataclass(frozen=True)
class Whole(Budgeted):
    """Keeps everything: what runs an encoding by itself. It has no budget, and is no method by name."""

    budget: Budget = EVERYTHING

    exact_when: ClassVar[str] = "residual >= tokens"
    moves: ClassVar[bool] = False

    @property
    def residual(self) -> int:
        assert self.encoding is not None
        return self.encoding.residual

    def slots(self, tokens: int) -> int:
        return self.residual  # that many tokens come before any is encoded

    def recent(self, budget: int) -> int:
        return self.residual

    def spare(self, budget: int) -> int:
        return PAGE - 1  # tokens that wait for their group to be full

    def layer(self, index: int, pages: Pages, rotary: Any, config: Any, batch: int, dtype: torch.dtype, device: Any) -> BudgetedCache:
        return WholeCache(self, index, pages, rotary, config, batch, dtype, device)

    def gather(self, caches: Sequence[BudgetedCache], config: Any, batch: int, prompt_tokens: int | None, device: Any) -> Caches:
        return WholeCaches(self, caches, batch, 1, device)


class WholeCache(BudgetedCache):
    method: Whole

    def settles(self, seen: Tensor) -> Tensor:
        pos, end = self.store.pos[:, 0].long(), (seen - self.method.residual).clamp(min=0) // PAGE * PAGE
        return (pos >= 0) & (pos < end[:, None])

    @classmethod
    def maker(cls, layers: Sequence[Any]) -> Make:
        raise AssertionError("nothing is made of tokens")


class WholeCaches(BudgetedCaches):
    """All layers."""

    method: Whole  # type: ignore[assignment]

    def kind(self) -> str:
        return Caches.kind(self)

    def compress(self, which: Tensor) -> None:
        """What has settled moves to pages; the tail becomes a ring, or with when=prompt goes on growing."""
        seen, m = self.tokens_seen, self.method
        growing, rows = m.when == "prompt", m.residual + PAGE - 1
        self.absorb(which)
        recent = torch.full_like(seen, rows)
        for cache in self:
            cache.recent.copy_(torch.where(which, recent, cache.recent))
            origin, ring = ((seen - rows).clamp(min=0), GROWING) if growing else (torch.zeros_like(seen), rows + m.block)
            cache.lay_tail(which, origin, torch.full_like(seen, ring))
        if not growing:
            self.bounded |= which
        self.room = 0

    def absorb(self, due: Tensor) -> None:
        seen, pages, window = self.tokens_seen, self.pages[0], self[0].window
        assert isinstance(pages, EncodedPages)
        pos = self[0].store.pos[:, 0].long()
        old = self[0].settles(seen) & due[:, None]
        if window is not None:  # a group goes when all of it has expired
            old &= pos // PAGE * PAGE + PAGE > (seen - window)[:, None]
        most = 2**40 if window is None else window // PAGE + 2  # pages of a ring, of which one expires while one is written
        self.grow(torch.where(old, (pos + PAGE) // PAGE, 0).amax(1).clamp(max=most), most)
        columns = old.any(0).nonzero()[:, 0]
        place = torch.where(old, pos, -1)[:, columns]
        for cache in self:
            tail = cache.store
            shape = (*tail.k.shape[:2], len(columns))
            where = place[:, None].expand(shape)
            slots = {"k": tail.k[:, :, columns], "v": tail.v[:, :, columns], "pos": where}
            pages.add(cache.index, slots, where.clamp(min=0) % (most * PAGE))
            cache.drop(seen, due)

    def grow(self, need: Tensor, most: int) -> None:
        """Make room for need (B,) pages in every head: at least half as many more than there were, as long as more than that may come."""
        pages = self.pages[0]
        share = pages.share[0, :, 0].long()
        if not bool((need > share).any()):
            return
        end = most if self.max_tokens is None else max(int(need.max()), -(-self.max_tokens // PAGE))
        wanted = torch.maximum(need, (share + share // 2).clamp(max=min(most, end)))
        share = torch.where(need > share, wanted, share)
        old = [pages.held(i) for i in range(len(self))]
        pages.lay_out(share[None, :, None].expand(pages.share.shape).cpu())
        for cache, slots in zip(self, old, strict=True):
            cache.list_pages()
            pages.replace(cache.index, slots)
