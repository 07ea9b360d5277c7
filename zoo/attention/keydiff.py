"""`keydiff`: keys that differ most from the mean key stay (KeyDiff, arXiv 2504.15364).

    score_i = -cos(k_i, mean over tokens of k / |k|)
exact when: budget >= tokens. cost: `budget` slots read a step; needs neither attention mass nor queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from zoo.attention.selecting import Selecting, SelectingCache


@dataclass(frozen=True)
class KeyDiff(Selecting):
    """Tokens whose keys are least similar to the mean direction of all. when=prompt unless given."""

    when: str = "prompt"

    def score(self, cache: SelectingCache, slots: dict[str, Tensor], seen: Tensor) -> Tensor:
        unit = F.normalize(slots["k"].float(), dim=-1)
        mean = (unit * (slots["pos"] >= 0)[..., None]).sum(2, keepdim=True)
        return -F.cosine_similarity(unit, mean, dim=-1)
