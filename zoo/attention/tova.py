"""`tova`: at each step the token that the newest query attends to least goes (TOVA, arXiv 2401.06104).

    score_i = attention that the last query gives to token i, averaged over all heads of the layer: all heads keep the same tokens
No first or recent token is protected, but for those that wait. exact when: budget >= tokens. cost: `budget` slots read a step; the last
query is kept, and asked when tokens are evicted. The paper evicts one a step (block=1); by default a block of 64 goes together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zoo.attention.cache import BLOCK
from zoo.attention.selecting import Selecting, SelectingCache


@dataclass(frozen=True)
class Tova(Selecting):
    """Tokens that the last query attends to. block: tokens that wait before some are evicted, 1 to 64."""

    block: int = BLOCK  # type: ignore[assignment]

    queries: ClassVar[int] = 1
    extra: ClassVar[dict[str, torch.dtype]] = {"mass": torch.float32}

    def score(self, cache: SelectingCache, slots: dict[str, Tensor], seen: Tensor) -> Tensor:
        return slots["mass"].mean(1, keepdim=True).expand(slots["mass"].shape)
