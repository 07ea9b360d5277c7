"""`kvsharer`: some layers keep nothing, and read the cache of a shallower one (KVSharer, arXiv 2410.18517).

    out(q, layer l) = softmax(s q K_a^T) V_a        a: the layer that l is paired with; l itself where it is in no pair
Pairs are found once for a model by `python -m zoo.calibrate kvsharer MODEL --text FILE`: the layers whose average keys and values are
farthest apart come first, and a pair stays if the model's final hidden states stay similar. Nothing is trained.
slot: a token, a = b = 0, with the key and value of the layer that is read.
exact when: never.
cost: bytes of `full` times the share of layers that keep something. A layer that reads another's still makes keys and values, in vain.
Layers differ, so decoding is not compiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.attention.cache import BLOCK, Attention, Cache, Caches
from zoo.attention.full import FullCache
from zoo.attention.store import SlotStore
from zoo.attention.tables import alien, digest, load_table
from zoo.errors import ZooError


class KeptCache(FullCache):
    """A layer that keeps its tokens; for a model with a window, in a ring that holds the calls of 64 tokens beside it, since a layer that
    reads this one does so after the call's last token was written."""

    def __init__(self, config: Any, batch: int, hint: int, dtype: torch.dtype, device: Any) -> None:
        ring = 2**62 if config.sliding_window is None else config.sliding_window + BLOCK
        super().__init__(config, batch, min(hint, ring), dtype, device)
        self.window, self.ring = config.sliding_window, ring

    def row(self, pos: Tensor) -> Tensor:
        return 1 + pos % self.ring

    def rows(self, tokens: int) -> int:
        return min(super().rows(tokens), self.ring + 1)

    def reserve(self, ends: Tensor, most: int | None) -> Tensor:
        room = super().reserve(ends.clamp(max=self.ring), most)
        return torch.where(room >= self.ring, 2**62, room)


class ReadingCache(Cache):
    """A layer that keeps nothing: it answers out of another's store, which holds the call's tokens already."""

    def __init__(self, other: KeptCache) -> None:
        super().__init__()
        self.other = [other]  # in a list: its state is its own
        self.window = other.window

    @property
    def store(self) -> SlotStore:  # type: ignore[override]
        return self.other[0].store

    def row(self, pos: Tensor) -> Tensor:
        return self.other[0].row(pos)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
        return self.respond(q, pos)

    def reserve(self, ends: Tensor, most: int | None) -> Tensor:
        return torch.full_like(ends, 2**62)

    def used(self) -> int:
        return 0


class SharedCaches(Caches):
    """All layers. For a model with a window, calls are cut so that no token is overwritten that the same call still reads."""

    def ends(self, pos: Tensor) -> Tensor | None:
        return None if self[0].window is None else (pos >= 0) & ((pos + 1) % BLOCK == 0)


@dataclass(frozen=True)
class KVSharer(Attention):
    """layers: how many keep nothing, the first that calibration found; 0 = as many as it found."""

    layers: int = 0

    exact_when: ClassVar[str] = "never"
    main: ClassVar[str] = "layers"

    def __post_init__(self) -> None:
        if self.layers < 0:
            raise ZooError(f"kvsharer: layers={self.layers} must be at least 0; 0 = as many as calibration found")

    def caches(
        self, config: Any, rotary: Any, batch: int, max_tokens: int | None, prompt_tokens: int | None, dtype: torch.dtype, device: Any
    ) -> Caches:
        pairs = load_pairs(config)
        if self.layers > len(pairs):
            raise ZooError(
                f"kvsharer: layers={self.layers}, but calibration found only {len(pairs)}; calibrate with --layers, or ask for less"
            )
        used = pairs[: self.layers or None]
        caches = share(used, config, batch, max_tokens, dtype, device)
        caches.table_digest = digest(sorted(used))
        return caches


def share(pairs: list[tuple[int, int]], config: Any, batch: int, max_tokens: int | None, dtype: torch.dtype, device: Any) -> Caches:
    """Caches in which, for each pair (deeper, shallower) of layers, the deeper one reads what the shallower keeps."""
    reads, caches = dict(pairs), list[Any]()
    for i in range(config.num_hidden_layers):
        kept = i not in reads
        caches.append(KeptCache(config, batch, max_tokens or 0, dtype, device) if kept else ReadingCache(caches[reads[i]]))
    return SharedCaches(caches, batch, device)


def load_pairs(config: Any) -> list[tuple[int, int]]:
    """The table's pairs (deeper, shallower), in the order in which they were found. Raises ZooError without a table that fits."""
    try:
        pairs = [(int(deeper), int(shallower)) for deeper, shallower in load_table("kvsharer", config, "pairs")]
    except (ValueError, TypeError):
        raise alien("kvsharer", config) from None
    reading = {deeper for deeper, _ in pairs}
    if len(reading) != len(pairs) or any(not 0 <= s < d < config.num_hidden_layers or s in reading for d, s in pairs):
        raise alien("kvsharer", config)
    return pairs
