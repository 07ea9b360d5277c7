"""`snapkv`: what the last queries of the prompt attend to, and its last tokens (SnapKV, arXiv 2404.14469).

    score_i = sum over the last W = 64 queries of the attention that token i got, averaged with its neighbours (5 tokens)
The best budget - W scores stay, and the last W tokens. Scores of a group's query heads are added up. The paper compresses once, at the end
of the prompt, and keeps decoded tokens: when=prompt, the default here. In `decode` and `stream` the same look is taken at every block.
exact when: budget >= tokens. cost: `budget` slots read a step and, while a prompt is read (later, too, unless when=prompt), the last W
queries: W H D numbers a layer. No attention mass is added up in a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.attention.selecting import Selecting, SelectingCache

POOL = 5


@dataclass(frozen=True)
class SnapKV(Selecting):
    """Tokens that the last 64 queries attend to. when=prompt unless given."""

    when: str = "prompt"

    queries: ClassVar[int] = 64
    extra: ClassVar[dict[str, torch.dtype]] = {"mass": torch.float32}

    def recent(self, budget: int) -> int:
        return min(64, budget // 2) if self.when == "prompt" else min(64, budget // 8)

    def score(self, cache: SelectingCache, slots: dict[str, Tensor], seen: Tensor) -> Tensor:
        """Pooled over neighbours in the sequence, among those that are still here."""
        order = torch.where(slots["pos"] >= 0, slots["pos"].long(), 2**40).argsort(dim=-1, stable=True)
        mass = torch.where(slots["pos"] >= 0, slots["mass"], 0).gather(2, order)
        pooled = F.avg_pool1d(mass, POOL, stride=1, padding=POOL // 2, count_include_pad=True)
        return torch.zeros_like(pooled).scatter(2, order, pooled)
