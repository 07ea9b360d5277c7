"""What the methods share that keep some tokens and drop the others: a score for each, the best ones stay.

A slot is one token, exact, at its true position; every head keeps as many, each its own ones. Settled slots come in pages of 32; what they
leave of the budget goes to recent tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.attention.budgeted import Budgeted
from zoo.attention.cache import BLOCK
from zoo.attention.slots import PagedSlots, merge, slot_mass, slot_parts
from zoo.attention.store import Pages
from zoo.attention.tail import BudgetedCache, Make


@dataclass(frozen=True)
class Selecting(Budgeted):
    """A method that keeps the tokens of highest score."""

    sinks: ClassVar[int] = 0  # first tokens that always stay
    queries: ClassVar[int] = 0  # how many of the last queries are kept, to ask what they attend to

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(1 <= self.block <= BLOCK, "block", f"between 1 and {BLOCK}")

    @abstractmethod
    def score(self, cache: SelectingCache, slots: dict[str, Tensor], seen: Tensor) -> Tensor:
        """(B, G, N): how much each candidate deserves to stay; k, v (B, G, N, D), a, pos (B, G, N) and more are in `slots`."""

    def layer(self, index: int, pages: Pages, rotary: Any, config: Any, batch: int, dtype: torch.dtype, device: Any) -> BudgetedCache:
        return SelectingCache(self, index, pages, rotary, config, batch, dtype, device)


class SelectingCache(BudgetedCache):
    method: Selecting
    asked: Tensor  # (B, 1 + W, H, D): the last W queries, rotated, at positions asked_pos (B, 1 + W); row 0 swallows padding
    asked_pos: Tensor
    OPEN: ClassVar[dict[str, int]] = {**BudgetedCache.OPEN, "asked": 1, "asked_pos": 1}

    def __init__(self, method: Selecting, index: int, pages: Pages, rotary: Any, config: Any, batch: int, dtype: Any, device: Any) -> None:
        super().__init__(method, index, pages, rotary, config, batch, dtype, device)
        self.asks = (method.queries + 1, config.num_attention_heads, config.head_dim)
        self.keep_queries(method.queries > 0)

    def keep_queries(self, keep: bool) -> None:
        """Make room for the last queries, or free it."""
        rows, heads, size = self.asks
        k = self.store.k
        self.register_buffer("asked", k.new_zeros(len(k), rows * keep, heads, size))
        self.register_buffer("asked_pos", torch.full((len(k), rows * keep), -1, dtype=torch.int64, device=k.device))

    def respond(self, q: Tensor, pos: Tensor) -> Tensor:
        if self.asked.shape[1]:
            W = self.method.queries
            pos_kept = torch.where(pos > pos.amax(1, keepdim=True) - W, pos, -1)
            row = torch.where(pos_kept >= 0, 1 + pos % W, 0)
            b = torch.arange(len(pos), device=pos.device)[:, None]
            self.asked.index_put_((b, row), q.transpose(1, 2))
            self.asked_pos.index_put_((b, row), pos_kept)
        return super().respond(q, pos)

    def prepare(self, which: Tensor) -> None:
        """`mass`: the attention that the last queries give to each slot, tail and settled."""
        if not self.asked.shape[1]:
            return
        q, pos = self.asked[:, 1:].transpose(1, 2), self.asked_pos[:, 1:]
        tail, settled = self.store.read(self.window), self.read_settled()
        if (kernel := self.kernels(q)) is not None:
            assert isinstance(settled, PagedSlots)
            _, (mass, _), (settled_mass, _) = kernel.attention_and_mass(q, pos, tail, settled, self.spans, (pos >= 0).float())
        else:
            whole = merge(slot_parts(q, pos, tail), settled.parts(q, pos))
            mass, settled_mass = slot_mass(q, pos, tail, whole), settled.mass(q, pos, whole)
        assert self.store.mass is not None
        assert self.mass is not None
        self.store.mass.copy_(mass)  # in place: a compiled step knows how these tensors lie
        self.mass.copy_(settled_mass)
        self.pages.get_buffer("mass").zero_()

    @classmethod
    def maker(cls, layers: Sequence[SelectingCache]) -> Make:
        return layers[0].compress

    def compress(self, slots: dict[str, Tensor], seen: Tensor, room: Tensor, which: Tensor) -> dict[str, Tensor]:
        """The best of the candidates, at most room (B, G)."""
        pos = slots["pos"]
        score = self.method.score(self, slots, seen).to(torch.float32)
        score = torch.where(pos < self.method.sinks, torch.inf, score).masked_fill(pos < 0, -torch.inf)
        best = score.sort(dim=2, descending=True, stable=True).indices[:, :, : int(room.max())]
        kept = {name: t.gather(2, best if t.dim() == 3 else best[..., None].expand(*best.shape, t.shape[3])) for name, t in slots.items()}
        rank = torch.arange(best.shape[2], device=best.device)
        kept["pos"] = torch.where(rank < room[..., None], kept["pos"], -1)
        return kept

    def begin_prompt(self, seen: Tensor) -> None:
        if self.method.queries and not self.asked.shape[1]:
            self.keep_queries(True)

    def end_prompt(self, seen: Tensor) -> None:
        if self.method.when == "prompt":  # nothing will be asked before the next prompt
            self.keep_queries(False)

    def used(self) -> int:
        return super().used() + self.asked.nbytes + self.asked_pos.nbytes
