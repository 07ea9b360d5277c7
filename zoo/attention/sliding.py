"""`sliding`: the last W tokens, the query's own included, and nothing else (Mistral 7B, arXiv 2310.06825; Longformer, arXiv 2004.05150).

    out(q at p) = softmax over positions p-W+1 .. p         one slot a token, a = b = 0
exact when: window >= tokens.
cost: 2 G D W numbers a layer, in a ring; a decode step reads the ring. Until W tokens have come, it grows like `full`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.attention.backends import attention, rotates
from zoo.attention.cache import Attention, Caches
from zoo.attention.full import FullCache
from zoo.attention.slots import Slots
from zoo.errors import ZooError


class SlidingCache(FullCache):
    window: int  # type: ignore[assignment]

    def __init__(self, window: int, *args: Any) -> None:
        super().__init__(*args)
        self.window = window

    def row(self, pos: Tensor) -> Tensor:
        return 1 + pos % self.window

    def rows(self, tokens: int) -> int:
        return min(super().rows(tokens), self.window + 1)

    def reserve(self, ends: Tensor, most: int | None) -> Tensor:
        room = super().reserve(ends.clamp(max=self.window), most)
        return torch.where(room >= self.window, 2**62, room)

    def rotates(self, tokens: int) -> bool:
        return tokens == 1 and rotates(self.backend) and type(self).attend is SlidingCache.attend

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
        if k.shape[2] == 1:  # the row it takes over is just leaving the window
            return super().attend(q, k, v, pos)
        # A chunk's early queries still need the rows that its late keys overwrite: attend to both first, then write the last W.
        old = self.store.read()
        both = Slots(torch.cat((old.k, k), 2), torch.cat((old.v, v), 2), torch.cat((old.pos, pos[:, None]), 2), window=self.window)
        out = attention(q, pos, both, self.backend)
        keep = pos > pos.amax(1, keepdim=True) - self.window
        self.store.append(self.row(pos), k, v, torch.where(keep, pos, -1))
        return out


@dataclass(frozen=True)
class Sliding(Attention):
    """A window of the most recent tokens."""

    window: int = 1024

    exact_when: ClassVar[str] = "window >= tokens"
    main: ClassVar[str] = "window"

    def __post_init__(self) -> None:
        if not 1 <= self.window <= 2**31:
            raise ZooError(f"sliding: window={self.window} must be between 1 and {2**31}")

    def caches(
        self, config: Any, rotary: Any, batch: int, max_tokens: int | None, prompt_tokens: int | None, dtype: torch.dtype, device: Any
    ) -> Caches:
        window = min(self.window, config.sliding_window or self.window)
        hint = min(max_tokens or 0, window)
        return Caches([SlidingCache(window, config, batch, hint, dtype, device) for _ in range(config.num_hidden_layers)], batch, device)
