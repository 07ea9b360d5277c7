"""`full`: every token is kept, exactly ("Attention Is All You Need", arXiv 1706.03762).

    out(q) = softmax(s q K^T) V         one slot a token, a = b = 0
exact when: always, within the model's own sliding window if it has one.
cost: 2 G D numbers a token and layer; a decode step reads all of them. Storage doubles as the sequence grows; a step reads its true length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.attention.cache import Attention, Cache, Caches, SlotStore, round_up


class FullCache(Cache):
    def __init__(self, config: Any, batch: int, hint: int, dtype: torch.dtype, device: Any) -> None:
        super().__init__()
        self.hint = hint
        self.store = SlotStore(batch, config.num_key_value_heads, 2, config.head_dim, dtype, device, shared=True)

    def row(self, pos: Tensor) -> Tensor:
        return pos + 1  # row 0 is for padding

    def rows(self, tokens: int) -> int:
        """Rows that this many tokens take."""
        return round_up(tokens + 1)

    def reserve(self, ends: Tensor, most: int | None) -> Tensor:
        tokens = int(ends.max())
        if tokens >= self.store.rows:
            double = max(tokens, 2 * self.store.rows) if most is None else most
            self.store.resize(self.rows(tokens), capacity=self.rows(max(double, self.hint)) + 1)
        return torch.full_like(ends, self.store.rows - 1)


@dataclass(frozen=True)
class Full(Attention):
    """Exact attention over everything."""

    exact_when: ClassVar[str] = "always"

    def caches(
        self, config: Any, rotary: Any, batch: int, max_tokens: int | None, prompt_tokens: int | None, dtype: torch.dtype, device: Any
    ) -> Caches:
        if config.sliding_window is not None:
            from zoo.attention.sliding import Sliding

            return Sliding(config.sliding_window).caches(config, rotary, batch, max_tokens, prompt_tokens, dtype, device)
        return Caches([FullCache(config, batch, max_tokens or 0, dtype, device) for _ in range(config.num_hidden_layers)], batch, device)
