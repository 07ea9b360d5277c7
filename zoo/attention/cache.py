"""The cache contract: a method (`Attention`) makes `Caches`, one `Cache` a layer, that hold what a model remembers in a `SlotStore`.

    attend(q, k, v, pos)   writes the new tokens, then answers their queries. The only thing inside the compiled decode step.
    maintain()             where a sequence's length reaches a multiple of BLOCK = 64: absorbs what has waited in the pending ring
    begin_prompt(lengths)  a prompt or chat turn of these lengths comes next     end_prompt()  it is over: compress it

A model call is split at the multiples of 64, so decoding one by one, in chunks, or in one pass gives the same state by construction.

Letters: B batch, T new tokens, H query heads, G key/value heads, D head size, S slots. Positions are int64 (B, T), -1 = padding: never
cached, never seen. Keys are cached after the rotary embedding, at their true position; nothing is re-indexed when slots move.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.slots import Slots, attention
from zoo.errors import ZooError

BLOCK = 64  # tokens that may wait in the pending ring; budgets pay for it


def round_up(n: int, step: int = BLOCK) -> int:
    return -(-n // step) * step


class Bytes(NamedTuple):
    """used: rows that hold a token or a cluster. allocated: the storages as they are, each counted once."""

    used: int
    allocated: int


class SlotStore(nn.Module):
    """Slots of one layer, every head owning the same number of rows: k, v (B, G, S, D), pos int32 and a float32 beside them.

    Row 0 swallows what padding writes: its position stays -1, so it is never seen, and a write needs no branch.
    `shared=True`: all heads hold the same tokens, so that one row of positions (B, 1, S) serves them and there are no log-weights.
    The buffers are views of the first S rows of storages that may be longer: a step reads what is there, not what is allocated.
    """

    k: Tensor
    v: Tensor
    pos: Tensor
    a: Tensor | None

    def __init__(self, batch: int, heads: int, rows: int, head_dim: int, dtype: torch.dtype, device: Any, shared: bool) -> None:
        super().__init__()
        self.register_buffer("k", torch.zeros(batch, heads, rows, head_dim, dtype=dtype, device=device))
        self.register_buffer("v", torch.zeros(batch, heads, rows, head_dim, dtype=dtype, device=device))
        self.register_buffer("pos", torch.full((batch, 1 if shared else heads, rows), -1, dtype=torch.int32, device=device))
        self.register_buffer("a", None if shared else torch.zeros(batch, heads, rows, device=device))

    @property
    def rows(self) -> int:
        return self.k.shape[2]

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.named_buffers(recurse=False))

    def resize(self, rows: int, capacity: int) -> None:
        """Show the first `rows` rows, reallocating to `capacity` rows where the storage is too short; new rows are empty."""
        for name, old in self.tensors().items():
            per_head = math.prod(old.shape[3:])
            if old.stride(1) <= rows * per_head:
                new = old.new_empty((*old.shape[:2], max(rows + 1, capacity), *old.shape[3:])).fill_(-1 if name == "pos" else 0)
                new[:, :, : old.shape[2]] = old
                old = new
            setattr(self, name, old.as_strided((*old.shape[:2], rows, *old.shape[3:]), old.stride()))

    def append(self, row: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> None:
        """Write new tokens k, v (B, G, T, D) into rows (B, T) of every head, with log-weight 0. Padding (pos -1) goes to row 0."""
        row = torch.where(pos >= 0, row, 0)
        b = torch.arange(k.shape[0], device=k.device)[:, None, None]
        g = torch.arange(k.shape[1], device=k.device)[None, :, None]
        where = (b, g, row[:, None])
        self.k.index_put_(where, k)
        self.v.index_put_(where, v)
        self.pos.index_put_((b, g[:, : self.pos.shape[1]], row[:, None]), pos[:, None].to(torch.int32).expand(-1, self.pos.shape[1], -1))
        if self.a is not None:
            self.a.index_put_(where, torch.zeros((), device=k.device))

    def replace(self, start: int, k: Tensor, v: Tensor, a: Tensor, pos: Tensor) -> None:
        """Overwrite rows start, start + 1, ... of every head: k, v (B, G, N, D), a, pos (B, G, N); pos -1 = nothing there."""
        end = start + k.shape[2]
        assert self.a is not None
        self.k[:, :, start:end], self.v[:, :, start:end] = k.to(self.k.dtype), v.to(self.v.dtype)
        self.a[:, :, start:end], self.pos[:, :, start:end] = a, pos.to(torch.int32)

    def free(self, gone: Tensor) -> None:
        """Empty the rows where gone (B, G or 1, S) is true."""
        self.pos.masked_fill_(gone, -1)

    def read(self, window: int | None = None) -> Slots:
        """The slots as the formula reads them; views, nothing is copied."""
        return Slots(self.k, self.v, self.pos, self.a, window=window)

    def move(self, row: Tensor, rows: int) -> None:
        """Reallocate to `rows` rows; old row i (of S) goes to row[b, i] (B, S), and to row 0, empty, where that is 0."""
        for name, old in self.tensors().items():
            new = old.new_full((*old.shape[:2], rows, *old.shape[3:]), -1 if name == "pos" else 0)
            index = row[:, None].expand(old.shape[:3])
            index = index[..., None].expand(old.shape) if old.dim() == 4 else index
            new.scatter_(2, index, old)
            setattr(self, name, new)
        self.pos[:, :, 0] = -1


class Cache(nn.Module):
    """One layer's state, all of it in registered buffers. A method overrides what it needs."""

    store: SlotStore
    window: int | None = None  # the oldest position a query may see is q_pos - window + 1
    backend: str = "auto"
    prompt_open: bool = True  # between begin_prompt (or the start) and end_prompt

    @abstractmethod
    def row(self, pos: Tensor) -> Tensor:
        """Positions (B, T) -> the rows where new tokens are written."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
        """q (B, H, T, D), k, v (B, G, T, D), rotated, at pos (B, T) -> out (B, H, T, D). New tokens see the cache, and each other
        causally."""
        self.store.append(self.row(pos), k, v, pos)
        return attention(q, pos, self.read(), self.backend)

    def read(self) -> Slots:
        """What queries see."""
        return self.store.read(self.window)

    @abstractmethod
    def reserve(self, tokens: int, exactly: bool) -> int:
        """Make room for a sequence of `tokens` tokens, doubling unless `exactly`. -> the tokens that now fit."""

    def maintain(self, seen: Tensor) -> None:
        """seen (B,): true lengths. Absorb what has waited long enough; a second call changes nothing."""

    def end_prompt(self, seen: Tensor) -> None:
        """The prompt or chat turn is over, at lengths seen (B,)."""

    def slots(self) -> Slots:
        """A copy of all slots, empty ones included (pos -1), for reading, tests and pictures."""
        s = self.store.read(self.window)
        shape = s.k.shape[:3]
        a = torch.zeros(shape, device=s.k.device) if s.a is None else s.a.clone()
        return Slots(s.k.clone(), s.v.clone(), s.pos.expand(shape).clone(), a, a, s.window)

    def used(self) -> int:
        """Bytes of the rows that hold something, positions and log-weights included."""
        s = self.store
        per_row = 2 * s.k.shape[3] * s.k.element_size() + (4 if s.a is not None else 0)
        heads = s.k.shape[1] // s.pos.shape[1]
        return int((s.pos >= 0).sum()) * (heads * per_row + 4)


class NoCache:
    """What a model call without a cache attends with: one exact causal pass that remembers nothing. `positions`: compare positions, for
    calls that brought their own (padding, gaps)."""

    def __init__(self, window: int | None = None, positions: bool = False) -> None:
        self.window, self.positions = window, positions

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
        if self.window is not None or self.positions:
            return attention(q, pos, Slots(k, v, pos[:, None], window=self.window))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class Caches(nn.ModuleList):
    """One Cache a layer, and what they have in common: how many tokens each sequence has seen, and where blocks end."""

    tokens_seen: Tensor  # (B,) int64: true lengths, whatever the number of slots

    def __init__(self, caches: Sequence[Cache], batch: int, device: Any, blocks: bool = False) -> None:
        super().__init__(caches)
        self.blocks = blocks  # whether anything happens at the multiples of BLOCK; if not, calls are not split
        self.about = ""  # method, model and dtype: what a saved state must share with the cache that loads it
        self.max_tokens: int | None = None  # how long sequences are expected to get
        self.room = 0  # tokens that fit before a cache must be asked again
        self.register_buffer("tokens_seen", torch.zeros(batch, dtype=torch.int64, device=device))

    if TYPE_CHECKING:  # what a ModuleList of caches yields

        def __iter__(self) -> Iterator[Cache]: ...
        def __getitem__(self, index: int) -> Cache: ...  # type: ignore[override]

    @property
    def batch(self) -> int:
        return len(self.tokens_seen)

    @property
    def prompt_open(self) -> bool:
        """Between begin_prompt (or the start) and end_prompt."""
        return self[0].prompt_open

    @prompt_open.setter
    def prompt_open(self, value: bool) -> None:
        self.room = 0
        for cache in self:
            cache.prompt_open = value

    def positions(self, tokens: int) -> Tensor:
        """(B, T) int64: where the next `tokens` tokens of each sequence stand."""
        return self.tokens_seen[:, None] + torch.arange(tokens, device=self.tokens_seen.device)

    def begin_prompt(self, lengths: Sequence[int]) -> None:
        """A prompt or chat turn of these lengths comes: room is made at once, and it is held exactly until `end_prompt`."""
        self.prompt_open = True
        self.room = max(int(n) + m for n, m in zip(self.tokens_seen.tolist(), lengths, strict=True))
        self.room = min(cache.reserve(self.room, exactly=True) for cache in self)

    def end_prompt(self) -> None:
        """After each prompt or chat turn: compresses what arrived since."""
        for cache in self:
            cache.end_prompt(self.tokens_seen)
        self.prompt_open = False

    def split(self, ids: Tensor, pos: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (ids, pos), both (B, t), in pieces that end where a sequence reaches a multiple of BLOCK, making room before each and
        absorbing after each. Raises ZooError when ids do not fit the cache's batch."""
        if ids.dim() != 2 or ids.shape[0] != self.batch:
            raise ZooError(f"ids of shape {tuple(ids.shape)} do not fit a cache of batch {self.batch}; expected ({self.batch}, T)")
        pos = self.positions(ids.shape[1]) if pos is None else pos
        ends = ((pos + 1) % BLOCK == 0).any(0).tolist() if self.blocks and not self.prompt_open else []
        cuts = sorted({t + 1 for t, end in enumerate(ends) if end} | {ids.shape[1]})
        start = 0
        for cut in cuts:
            piece, where = ids[:, start:cut], pos[:, start:cut]
            self.reserve(where)
            yield piece, where
            self.advance(where)
            start = cut

    def reserve(self, pos: Tensor) -> None:
        """Make room for the tokens at pos (B, T)."""
        tokens = int(pos.max()) + 1
        if tokens > self.room:
            self.room = min(cache.reserve(tokens, exactly=False) for cache in self)

    def advance(self, pos: Tensor) -> None:
        """The tokens at pos (B, T) have been attended: count them, and absorb at a block's end."""
        self.tokens_seen.copy_(torch.maximum(self.tokens_seen, pos.amax(1) + 1))
        self.maintain()

    def maintain(self) -> None:
        """Absorb pending tokens where a sequence's length is a multiple of BLOCK; outside the decode graph, and idempotent."""
        if self.blocks and not self.prompt_open and bool((self.tokens_seen % BLOCK == 0).any()):
            for cache in self:
                cache.maintain(self.tokens_seen)

    def nbytes(self) -> Bytes:
        """Measured: every storage behind a buffer once, metadata included."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.buffers() if t.numel()}
        return Bytes(sum(c.used() for c in self) + self.tokens_seen.nbytes, sum(storages.values()))

    def clone(self) -> Caches:
        """An independent copy: several answers from one prompt."""
        return copy.deepcopy(self)

    def expand(self, batch: int) -> Caches:
        """A copy of a single sequence's cache for `batch` sequences. Raises ZooError unless this cache's batch is 1."""
        if self.batch != 1:
            raise ZooError(f"expand needs a cache of batch 1; this one has {self.batch}")
        new = self.clone()
        for module in new.modules():
            for name, t in list(module.named_buffers(recurse=False)):
                setattr(module, name, t.repeat_interleave(batch, 0))
        return new

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state as safetensors; the file appears whole or not at all."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tmp = Path(f"{path}.{os.getpid()}.tmp")
        tensors = {name: t.contiguous() for name, t in self.named_buffers()}
        try:
            save_file(tensors, tmp, metadata={"prompt_open": str(self.prompt_open), "kind": self.kind()})
            os.replace(tmp, path)
        except (OSError, SafetensorError) as e:
            raise ZooError(f"cannot write the cache to {path}: {getattr(e, 'strerror', None) or e}") from e
        finally:
            tmp.unlink(missing_ok=True)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continue from a saved state. Raises ZooError when the file is not of this method, model and batch."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt", device=str(self.tokens_seen.device)) as f:
                meta, tensors = f.metadata() or {}, {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as e:
            raise ZooError(f"cannot read a cache from {path}: {e}") from e
        mine = dict(self.named_buffers())
        fits = set(mine) == set(tensors) and all(
            t.dtype == mine[n].dtype and t.dim() == mine[n].dim() and t.shape[:2] == mine[n].shape[:2] and t.shape[3:] == mine[n].shape[3:]
            for n, t in tensors.items()
        )
        if meta.get("kind") != self.kind() or not fits:
            held = meta.get("kind", "unknown")
            raise ZooError(f"{path} holds another cache ({held}); this one is {self.kind()}: same model, method and batch are needed")
        for name, t in tensors.items():
            module, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(module), leaf, t)
        self.prompt_open = meta["prompt_open"] == "True"

    def kind(self) -> str:
        """What a saved state must share with the cache that loads it."""
        return f"{self.about or type(self[0]).__name__}, {len(self)} layers, batch {self.batch}"


@dataclass(frozen=True)
class Attention:
    """A method: its options, and nothing else. `name:option=value,option=value` on the command line is this object."""

    exact_when: ClassVar[str] = "never"

    @abstractmethod
    def caches(
        self,
        config: Any,
        rotary: Any,
        batch: int,
        max_tokens: int | None,
        prompt_tokens: int | None,
        dtype: torch.dtype,
        device: Any,
    ) -> Caches:
        """A fresh cache for `batch` sequences of a model with this config and rotary embedding. max_tokens is a hint of how long they
        will get, prompt_tokens what `%` budgets are a share of (None: what `begin_prompt` announces)."""

    def __str__(self) -> str:
        options = ",".join(f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self))
        return type(self).__name__.lower() + (f":{options}" if options else "")
