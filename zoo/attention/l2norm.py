"""`l2norm`: keys of small norm stay (A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, arXiv 2406.11430).

    score_i = -|k_i|        keys of small norm tend to get much attention
The paper compresses the prompt; its authors leave one or two first layers whole, here every layer is compressed, so that bytes are equal.
exact when: budget >= tokens. cost: `budget` slots read a step; needs neither attention mass nor queries.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from zoo.attention.selecting import Selecting, SelectingCache


@dataclass(frozen=True)
class L2Norm(Selecting):
    """Tokens whose keys have the smallest norm. when=prompt unless given."""

    when: str = "prompt"

    def score(self, cache: SelectingCache, slots: dict[str, Tensor], seen: Tensor) -> Tensor:
        """Norms to three digits: tokens that are equal but for rounding tie, and the older one stays."""
        return -(slots["k"].float().norm(dim=-1).clamp(min=1e-20).log2() * 2**10).round()
