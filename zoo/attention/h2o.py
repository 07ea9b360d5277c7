"""`h2o`: heavy hitters, the tokens that got most attention, and recent ones (H2O, arXiv 2306.14048).

    score_i = sum over all queries so far of the attention that token i got; half the budget goes to the highest scores, half to the newest
age=true divides the score by the number of queries that could see the token: without, a token is ahead because it is old.
The scores of a group's query heads are added up: keys are kept per key/value head. What is gone stays gone.
exact when: budget >= tokens. cost: `budget` slots read a step, and the attention mass of every query, added up in the step itself: one
float32 a slot more. The paper evicts one token a step (block=1); by default a block of 64 is looked at together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zoo.attention.cache import BLOCK
from zoo.attention.selecting import Selecting, SelectingCache


@dataclass(frozen=True)
class H2O(Selecting):
    """Tokens that got most attention, and recent ones. block: tokens that wait before some are evicted, 1 to 64."""

    age: bool = False
    block: int = BLOCK  # type: ignore[assignment]

    observes: ClassVar[int] = 1
    extra: ClassVar[dict[str, torch.dtype]] = {"mass": torch.float32}

    def recent(self, budget: int) -> int:
        return budget // 2 - (0 if self.when == "prompt" else self.block)  # pending tokens are recent ones, too

    def score(self, cache: SelectingCache, slots: dict[str, Tensor], seen: Tensor) -> Tensor:
        could_see = (seen[:, None, None] - slots["pos"]).clamp(min=1)
        return slots["mass"] / could_see if self.age else slots["mass"]
