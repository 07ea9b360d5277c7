"""`subgen_kcenter`: what SubGen's experiments ran (arXiv 2402.06082): greedy k-center on the keys, once, after the prompt, and a recent
window.

    centres: the first old key, then again and again the key farthest from all centres so far (as cached, after the rotary embedding)
    kept: each centre's own key and value, and the recent tokens (half of the budget)
A slot is one token, a = b = 0; with weight=true a centre stands for the n tokens nearest to it: a = b = log n. Whether the paper did that
is not known. exact when: budget >= tokens. cost: `budget` slots read a step; the choice is one pass over all keys for each centre.
Measured, it is no better than keeping tokens at random (docs/methods/subgen.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.attention.backends import clustering
from zoo.attention.clustering import gathered, k_center, row
from zoo.attention.selecting import Selecting, SelectingCache
from zoo.attention.store import Pages
from zoo.attention.tail import BudgetedCache


@dataclass(frozen=True)
class SubGenKCenter(Selecting):
    """Greedy k-center's centre tokens, and recent ones. when=prompt unless given."""

    when: str = "prompt"
    weight: bool = False

    name: ClassVar[str] = "subgen_kcenter"

    def recent(self, budget: int) -> int:
        return budget // 2 - (0 if self.when == "prompt" else self.block)

    def layer(self, index: int, pages: Pages, rotary: Any, config: Any, batch: int, dtype: torch.dtype, device: Any) -> BudgetedCache:
        return KCenterCache(self, index, pages, rotary, config, batch, dtype, device)

    def score(self, cache: SelectingCache, slots: dict[str, Tensor], seen: Tensor) -> Tensor:
        raise AssertionError("centres are chosen together")


class KCenterCache(SelectingCache):
    method: SubGenKCenter

    def compress(self, slots: dict[str, Tensor], seen: Tensor, room: Tensor, which: Tensor) -> dict[str, Tensor]:
        alive, k = slots["pos"] >= 0, slots["k"]
        picks, label = k_center(k.float(), alive, room, clustering(self.backend, k.device, k.dtype))
        at = picks.clamp(min=0)
        kept = {name: t.gather(2, at) if t.dim() == 3 else row(t, at) for name, t in slots.items()}
        kept["pos"] = torch.where(picks >= 0, kept["pos"], -1)
        if self.method.weight:
            kept["a"] = gathered(label, slots["a"].exp() * alive, picks.shape[2]).clamp(min=1).log()
        return kept
