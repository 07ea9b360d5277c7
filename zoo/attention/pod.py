"""`pod`, training-free: layers that attend alike share the keys of distant tokens (PoD, arXiv 2412.02252, which trains the model for it).

    near(p)  the first n tokens, and the last r to r + 63 before p        distant(p)  what is between them
    out(q at p, layer l) = softmax of [s q.k_l over near ; s q.k_a over distant] times v_l        a = the lowest layer of l's group

Here the weights are as they are, and a layer's queries were never made for another layer's keys: text does not survive it
(docs/methods/pod.md). `python -m zoo.calibrate pod MODEL --text FILE` finds the groups, consecutive layers per kv head, and says what
they cost; `--adapt` trains the model for them, which mends most of it. Each layer keeps its own values.
slot: a token, a = b = 0. A near token has its layer's own key; a distant one, out of the lowest layer of its group, has none of its own.
exact when: first + recent >= tokens, or where every group is a single layer.
cost: bytes of `full` but for the distant keys of layers that are not the lowest: of 2 G D numbers a token and layer, half times their
share. Tokens become distant where a sequence's length reaches a multiple of 64. A step copies a layer's distant keys before it reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.backends import as_parts, attention, flashes, kernels
from zoo.attention.cache import BLOCK, Attention, Caches, round_up
from zoo.attention.full import FullCache
from zoo.attention.slots import Slots, blend, finish, flash_slots, merge, slot_parts
from zoo.attention.store import resized
from zoo.attention.tables import alien, digest, load_table, own_table
from zoo.errors import ZooError


class DistantKeys(nn.Module):
    """Keys of distant tokens, one object for all layers: k (B, N, S, D) of the N pairs (layer, kv head) that are lowest in their group, and
    the tokens' positions, pos (B, 1, S). Row 0 is for padding."""

    k: Tensor
    pos: Tensor
    OPEN: ClassVar[dict[str, int]] = {"k": 2, "pos": 2}

    def __init__(self, batch: int, pairs: int, head_dim: int, dtype: torch.dtype, device: Any) -> None:
        super().__init__()
        self.register_buffer("k", torch.zeros(batch, pairs, 2, head_dim, dtype=dtype, device=device))
        self.register_buffer("pos", torch.full((batch, 1, 2), -1, dtype=torch.int32, device=device))

    @property
    def rows(self) -> int:
        return self.k.shape[2]


class PodCache(FullCache):
    """One layer: near tokens in a ring behind the first ones, values of distant tokens, and which of the shared keys each head reads."""

    v: Tensor  # (B, G, S, D): the rows of `DistantKeys`
    source: Tensor  # (B, G) int64: head -> its group's keys
    OPEN: ClassVar[dict[str, int]] = {"v": 2}

    def __init__(
        self, method: Pod, index: int, groups: Tensor, distant: DistantKeys, config: Any, batch: int, hint: int, dtype: Any, device: Any
    ) -> None:
        super().__init__(config, batch, min(hint, method.near + BLOCK), dtype, device)
        self.method, self.index, self.distant, self.tokens = method, index, distant, hint
        self.window = config.sliding_window
        lowest = groups == torch.arange(len(groups))[:, None]  # (L, G); the shared keys are in this order
        number = (lowest.flatten().cumsum(0) - 1).view(lowest.shape)
        self.lowest: list[int] = lowest[index].nonzero()[:, 0].tolist()  # heads whose keys are shared
        self.register_buffer("v", torch.zeros(batch, groups.shape[1], 2, config.head_dim, dtype=dtype, device=device))
        self.register_buffer("source", number.gather(0, groups[index, None]).to(device).repeat(batch, 1))

    # A step

    def row(self, pos: Tensor) -> Tensor:
        m = self.method
        return 1 + torch.where(pos < m.first, pos, m.first + (pos - m.first) % (m.recent + BLOCK))

    def respond(self, q: Tensor, pos: Tensor) -> Tensor:
        near, heads = self.read(), self.store.k.shape[1]
        if self.distant.rows == 2 and not torch.compiler.is_compiling():  # nothing is distant yet
            return attention(q, pos, near, self.backend)
        far, kernel = self.far(), kernels(self.backend, q, heads)
        if kernel is not None:
            parts = [as_parts(kernel.attention(q, pos, slots, None, None), heads) for slots in (near, far)]
        elif flashes(self.backend, q):
            parts = [flash_slots(q, pos, slots) for slots in (near, far)]
        else:
            return finish(merge(slot_parts(q, pos, near), slot_parts(q, pos, far)), q.dtype)
        return blend(*parts).num.view(q.shape).to(q.dtype)

    def far(self) -> Slots:
        """Distant tokens as this layer's queries see them: the group's keys, gathered, and its own values."""
        d, b = self.distant, torch.arange(len(self.source), device=self.source.device)[:, None]
        return Slots(d.k[b, self.source], self.v, d.pos, window=self.window)

    # Between steps

    def rows(self, tokens: int) -> int:
        return min(super().rows(tokens), self.method.near + BLOCK + 1)

    @property
    def ring(self) -> int:
        """Distant tokens that a model's own window still shows, and those that are just leaving it."""
        return 2**62 if self.window is None else self.window + BLOCK

    def far_rows(self, tokens: int) -> int:
        """Rows that the distant ones of this many tokens take."""
        count = tokens // BLOCK * BLOCK - self.method.near
        return round_up(1 + min(count, self.ring)) if count > 0 else 2

    def reserve(self, ends: Tensor, most: int | None) -> Tensor:
        limit = self.method.near + BLOCK
        room = super().reserve(ends.clamp(max=limit), None if most is None else min(most, limit))
        tokens, d = int(ends.max()), self.distant
        if (rows := self.far_rows(tokens)) > self.v.shape[2]:
            capacity = self.far_rows(max(2 * tokens if most is None else most, self.tokens)) + 1
            self.v = resized(self.v, rows, capacity, 0)
            if rows > d.rows:  # the first layer that asks makes room for all
                d.k, d.pos = resized(d.k, rows, capacity, 0), resized(d.pos, rows, capacity, -1)
        rows = self.v.shape[2]
        far = 0 if rows == 2 else rows - 1
        fits = (far + self.method.near) // BLOCK * BLOCK + BLOCK - 1 if far < self.ring else 2**62
        return torch.where(room >= limit, fits, room)

    def settle(self, rows: Tensor, pos: Tensor) -> None:
        """The tokens in these rows (M,) of the ring become distant: pos (B, M), -1 = not in that sequence. Their values move, the keys of
        the lowest heads too, and all else that was their own is free again."""
        s, d, device = self.store, self.distant, pos.device
        row = torch.where(pos >= 0, 1 + (pos - self.method.first) % self.ring, 0)[:, None]
        b = torch.arange(len(pos), device=device)[:, None, None]
        self.v.index_put_((b, torch.arange(s.v.shape[1], device=device)[:, None], row), s.v[:, :, rows])
        if self.lowest:
            heads = torch.tensor(self.lowest, device=device)
            d.k.index_put_((b, self.source[0, heads][:, None], row), s.k[:, heads[:, None], rows])
        s.pos[:, :, rows] = torch.where(pos >= 0, -1, s.pos[:, 0, rows].long()).to(torch.int32)[:, None]

    def slots(self) -> Slots:
        near, far = super().slots(), self.far()
        assert near.a is not None
        k, v = torch.cat((far.k, near.k), 2), torch.cat((far.v, near.v), 2)
        pos = torch.cat((far.pos.expand(far.k.shape[:3]), near.pos), 2)
        a = torch.zeros(pos.shape, device=pos.device)
        return Slots(k, v, pos, a, a, self.window)

    def used(self) -> int:
        """Near tokens, values of distant ones, and of their keys those that no lower layer holds."""
        held, size = int((self.distant.pos >= 0).sum()), self.v.shape[3] * self.v.element_size()
        positions = 4 if self.index == 0 else 0  # of distant tokens, once
        return super().used() + held * (size * (self.v.shape[1] + len(self.lowest)) + positions) + self.source.nbytes


class PodCaches(Caches):
    """All layers: what becomes distant does so in all of them at once."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[PodCache]: ...  # type: ignore[override]
        def __getitem__(self, index: int) -> PodCache: ...  # type: ignore[override]

    def ends(self, pos: Tensor) -> Tensor | None:
        return (pos >= 0) & ((pos + 1) % BLOCK == 0)

    def maintain(self) -> None:
        if not bool((self.tokens_seen % BLOCK == 0).any()):
            return
        m, near = self[0].method, self[0].store.pos[:, 0].long()
        old = (near >= m.first) & (near < m.end(self.tokens_seen)[:, None])
        rows = old.any(0).nonzero()[:, 0]
        if not len(rows):
            return
        pos, d = torch.where(old, near, -1)[:, rows], self[0].distant
        for cache in self:
            cache.settle(rows, pos)
        row = torch.where(pos >= 0, 1 + (pos - m.first) % self[0].ring, 0)
        d.pos[:, 0].scatter_(1, row, pos.to(torch.int32))


class DensePod:
    """One layer of `pod` as a differentiable pass without a cache, for training: a call is whole sequences, from position 0 on, and the
    layers that are called one after the other share `made`, their keys."""

    def __init__(self, method: Pod, groups: list[int], made: list[Tensor], window: int | None) -> None:
        self.method, self.groups, self.made, self.window = method, groups, made, window

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
        """As `Cache.attend`; pos (B, T) without padding. One softmax over every token twice, with its own key and with the group's; a mask
        leaves one of the two."""
        self.made.append(k)
        shared = torch.stack([self.made[a][:, g] for g, a in enumerate(self.groups)], 1)
        at, key = pos[:, None, :, None], pos[:, None, None, :]
        seen = key <= at if self.window is None else (key <= at) & (key > at - self.window)  # (B, 1, T, T)
        distant = (key >= self.method.first) & (key < self.method.end(at))
        mask = torch.cat((seen & ~distant, seen & distant), -1)
        return F.scaled_dot_product_attention(q, torch.cat((k, shared), 2), torch.cat((v, v), 2), attn_mask=mask, enable_gqa=True)


@dataclass(frozen=True)
class Pod(Attention):
    """first, recent: near tokens, which have keys of their own in every layer."""

    first: int = 16
    recent: int = 256

    exact_when: ClassVar[str] = "first + recent >= tokens"
    main: ClassVar[str] = "recent"

    def __post_init__(self) -> None:
        for name, least in (("first", 0), ("recent", 1)):
            if not least <= (value := getattr(self, name)) <= 2**31:
                raise ZooError(f"pod: {name}={value} must be between {least} and {2**31}")

    @property
    def near(self) -> int:
        return self.first + self.recent

    def end(self, at: Tensor) -> Tensor:
        """Where distant tokens end for queries at these positions: `recent` before the block began."""
        return at // BLOCK * BLOCK - self.recent

    def reaches(self, at: Tensor, window: int | None = None) -> Tensor:
        """Whether queries at these positions see anything distant, in a model with this window."""
        begin = at * 0 + self.first if window is None else (at + 1 - window).clamp(min=self.first)
        return self.end(at) > begin

    def note(self, config: Any) -> str:
        own = own_table("pod", config)
        if own is None:
            return "pod is training-free here: these weights were not made for it, and text suffers; zoo.calibrate pod --adapt trains them"
        return "" if own.get("attn") == str(self) else f"these weights were trained for {own.get('attn')}, not for {self}"

    def caches(
        self, config: Any, rotary: Any, batch: int, max_tokens: int | None, prompt_tokens: int | None, dtype: torch.dtype, device: Any
    ) -> Caches:
        groups = load_groups(config)
        pairs = int((groups == torch.arange(len(groups))[:, None]).sum())
        distant = DistantKeys(batch, pairs, config.head_dim, dtype, device)
        layers = range(config.num_hidden_layers)
        caches = [PodCache(self, i, groups, distant, config, batch, max_tokens or 0, dtype, device) for i in layers]
        made = PodCaches(caches, batch, device)
        made.table_digest = digest(groups.tolist())
        return made

    def dense(self, groups: Tensor, window: int | None) -> list[DensePod]:
        """What `model.hidden(ids, None, cache)` takes for one call in training; `window` is the model's own."""
        made: list[Tensor] = []
        return [DensePod(self, row, made, window) for row in groups.tolist()]


def load_groups(config: Any) -> Tensor:
    """(L, G) int64: the layer whose keys each layer's head reads, its own where it is lowest. Raises ZooError without a table that fits."""
    try:
        groups = torch.tensor(load_table("pod", config, "groups"))
    except (ValueError, TypeError, RuntimeError):
        raise alien("pod", config) from None
    if groups.shape != (config.num_hidden_layers, config.num_key_value_heads) or groups.dtype != torch.int64:
        raise alien("pod", config)
    below = (groups >= 0) & (groups <= torch.arange(len(groups))[:, None])
    if not bool(below.all()) or not torch.equal(groups.gather(0, groups), groups):
        raise alien("pod", config)
    return groups


def group(similarity: Tensor, threshold: float) -> Tensor:
    """similarity (L, L, G) of layers' attention -> (L, G) int64, the lowest layer of each one's group: greedily from the bottom, a layer
    joins the group below it while it is at least `threshold` like the lowest one, whose keys it will read."""
    layers, heads = similarity.shape[1:]
    lowest = torch.zeros(layers, heads, dtype=torch.int64)
    for g in range(heads):
        for i in range(1, layers):
            below = int(lowest[i - 1, g])
            lowest[i, g] = below if similarity[i, below, g] >= threshold else i
    return lowest
