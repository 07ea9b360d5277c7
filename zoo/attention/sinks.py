"""`sinks`: the first 4 tokens and the most recent ones (StreamingLLM, arXiv 2309.17453).

    out(q) = softmax over [4 first tokens; the newest budget - 4 tokens]          one slot a token, a = b = 0
positions=true keeps every key at its true position, as all methods here do. positions=cache is the paper's: positions count inside the
    cache, so that the first tokens stand right before the recent ones. Rotary scores depend on differences of positions only, so it is
    enough to turn the first tokens' keys, whenever the oldest recent token has changed.
exact when: budget >= tokens. cost: `budget` slots read a step; needs no attention mass. Pending tokens are part of the recent ones:
between budget - 64 and budget of them are held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.attention.budgeted import SINKS, names
from zoo.attention.selecting import Selecting, SelectingCache
from zoo.attention.store import Pages
from zoo.attention.tail import BudgetedCache

POSITIONS = ("true", "cache")


@dataclass(frozen=True)
class Sinks(Selecting):
    """The first tokens and the most recent ones."""

    positions: str = "true"

    sinks: ClassVar[int] = SINKS

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.positions in POSITIONS, "positions", names(POSITIONS))

    def score(self, cache: SelectingCache, slots: dict[str, Tensor], seen: Tensor) -> Tensor:
        return slots["pos"]  # the newest stay

    def layer(self, index: int, pages: Pages, rotary: Any, config: Any, batch: int, dtype: torch.dtype, device: Any) -> BudgetedCache:
        kind = SelectingCache if self.positions == "true" else CountedCache
        return kind(self, index, pages, rotary, config, batch, dtype, device)


class CountedCache(SelectingCache):
    """Keys of the first tokens stand where they would if positions were counted in the cache."""

    first: Tensor  # (B, G, SINKS, D): their keys without a position, so that turning them again and again does not add up rounding

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        B, G, _, D = self.store.k.shape
        self.register_buffer("first", self.store.k.new_zeros(B, G, SINKS, D))

    @classmethod
    def fresh(cls, layers: Sequence[CountedCache], tail: dict[str, Tensor]) -> dict[str, Tensor]:
        (self,) = layers
        pos = tail["pos"].long()
        sink = (pos >= 0) & (pos < SINKS)
        if bool(sink.any()):
            x = self.rotary[0].unrotate(tail["k"], pos[:, 0].clamp(min=0))
            spare = torch.cat((self.first, self.first[:, :, :1]), 2)  # one more row takes what is no first token
            index = torch.where(sink, pos, SINKS)[..., None].expand(x.shape)
            self.first = spare.scatter(2, index, x)[:, :, :SINKS].contiguous()
        return {}

    def compress(self, slots: dict[str, Tensor], seen: Tensor, room: Tensor, which: Tensor) -> dict[str, Tensor]:
        kept = super().compress(slots, seen, room, which)
        pos = kept["pos"].long()
        oldest = torch.where(pos >= SINKS, pos, seen[:, None, None]).amin((1, 2))
        turned = self.rotary[0].rotate(self.first, torch.arange(SINKS, device=pos.device) + (oldest - SINKS).clamp(min=0)[:, None])
        sink = ((pos >= 0) & (pos < SINKS))[..., None]
        if "row" in kept:  # what is turned is another key, encoded from the exact one
            kept["row"] = torch.where(sink[..., 0], -1, kept["row"])
        kept["k"] = torch.where(sink, turned.gather(2, pos.clamp(0, SINKS - 1)[..., None].expand(kept["k"].shape)), kept["k"])
        return kept

    def used(self) -> int:
        return super().used() + self.first.nbytes
