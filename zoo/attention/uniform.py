"""`uniform`: a random sample of the tokens, weighted for those that are gone, between first and recent ones (a baseline of BalanceKV, arXiv
2502.07861, where it does nearly as well as published methods).

    out(q) = softmax over [4 first tokens; m sampled tokens; recent tokens] of (s q.k + a)      a = log(N / m) for m samples of N tokens
Without replacement: the m tokens whose random number, a function of (seed, layer, head, position), is largest. So the sample of a longer
sequence is drawn from the sample of a shorter one, and streaming gives what one draw at the end would (while the budget does not grow).
(In a model with a window of its own, a sample that streams past it has up to a sixth more of the newer tokens: what expires makes room.)
exact when: budget >= tokens. cost: `budget` slots read a step; needs no attention mass and no look at the keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo import random
from zoo.attention.budgeted import SINKS
from zoo.attention.selecting import Selecting, SelectingCache
from zoo.attention.store import Pages
from zoo.attention.tail import BudgetedCache


@dataclass(frozen=True)
class Uniform(Selecting):
    """A weighted random sample between the first 4 tokens and an eighth of the budget of recent ones. when=prompt unless given."""

    when: str = "prompt"
    seed: int = 0

    sinks: ClassVar[int] = SINKS

    def recent(self, budget: int) -> int:
        return budget // 8

    def score(self, cache: SelectingCache, slots: dict[str, Tensor], seen: Tensor) -> Tensor:
        heads = torch.arange(slots["pos"].shape[1], device=seen.device)[:, None]
        return random.uniform(self.seed, torch.full_like(heads, cache.index), heads, slots["pos"].long())

    def layer(self, index: int, pages: Pages, rotary: Any, config: Any, batch: int, dtype: torch.dtype, device: Any) -> BudgetedCache:
        return UniformCache(self, index, pages, rotary, config, batch, dtype, device)


class UniformCache(SelectingCache):
    def compress(self, slots: dict[str, Tensor], seen: Tensor, room: Tensor, which: Tensor) -> dict[str, Tensor]:
        kept = super().compress(slots, seen, room, which)
        sampled = kept["pos"] >= SINKS
        old = seen - self.recent  # how many tokens the sample and the first ones stand for
        gone = seen - self.window + 1 if self.window else torch.zeros_like(seen)
        population = (old - gone.clamp(min=SINKS)).clamp(min=1)[:, None, None]
        weight = (population / sampled.sum(-1, keepdim=True).clamp(min=1)).log().clamp(min=0)
        kept["a"] = torch.where(sampled, weight, 0.0)
        return kept
