"""The cache contract: a method (`Attention`) makes `Caches`, one `Cache` a layer, that hold what a model remembers.

    attend(q, k, v, pos)   writes the new tokens, then answers their queries. The only thing inside the compiled decode step.
    maintain()             where a sequence's length reaches a multiple of its block (64): absorbs what has waited in the pending ring
    begin_prompt(lengths)  a prompt or chat turn of these lengths comes next     end_prompt()  it is over: compress it

A model call is split there, so decoding one by one, in chunks, or in one pass gives the same state by construction.

Letters: B batch, T new tokens, H query heads, G key/value heads, D head size, S slots. Positions are int64 (B, T), -1 = padding: never
cached, never seen. Keys are cached after the rotary embedding, at their true position; nothing is re-indexed when slots move.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.backends import attention, rotates
from zoo.attention.slots import Slots
from zoo.attention.store import SlotStore
from zoo.errors import ZooError

BLOCK = 64  # tokens that may wait in the pending ring; budgets pay for it


def round_up(n: int, step: int = BLOCK) -> int:
    return -(-n // step) * step


def open_dimensions(module: nn.Module) -> Iterator[tuple[str, Tensor, int]]:
    """(name, buffer, dimension) of everything below `module` that may grow: what a compiled step leaves open."""
    for prefix, part in module.named_modules():
        for name, dim in getattr(part, "OPEN", {}).items():
            t = part._buffers.get(name)
            if t is not None:
                yield f"{prefix}.{name}".lstrip("."), t, dim


class Bytes(NamedTuple):
    """used: rows that hold a token or a cluster. allocated: the storages as they are, each counted once."""

    used: int
    allocated: int


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
        return self.respond(q, pos)

    def rotates(self, tokens: int) -> bool:
        """Whether `attend_rotating` takes calls of this many tokens. A method with an `attend` of its own gets them rotated."""
        return rotates(self.backend) and type(self).attend is Cache.attend

    def attend_rotating(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`attend` of q and k before the rotary embedding, whose cos and sin are (B, 1, T, n): one kernel rotates and writes."""
        from zoo.kernels.rotary_store import rotary_store

        s = self.store
        q = rotary_store(q, k, v, cos, sin, pos, self.row(pos), s.k, s.v, s.pos, s.a, s.mass, s.spikes)
        return self.respond(q, pos)

    def respond(self, q: Tensor, pos: Tensor) -> Tensor:
        """What `attend` returns, once the new tokens have been written."""
        return attention(q, pos, self.read(), self.backend)

    def read(self) -> Slots:
        """What queries see."""
        return self.store.read(self.window)

    @abstractmethod
    def reserve(self, ends: Tensor, most: int | None) -> Tensor:
        """Make room for sequences that reach `ends` (B,) tokens, doubling, but for no more than `most`. -> (B,): the tokens that fit."""

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

    def __init__(self, caches: Sequence[Cache], batch: int, device: Any) -> None:
        super().__init__(caches)
        self.about = ""  # method, model and dtype: what a saved state must share with the cache that loads it
        self.table_digest = ""  # of what it was made with of the method's table: the same
        self.max_tokens: int | None = None  # how long sequences are expected to get
        self.room: Tensor | int = 0  # (B,) tokens that fit before a cache must be asked again
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
        ends = self.tokens_seen + torch.tensor(lengths, device=self.tokens_seen.device)
        self.make_room(ends, int(ends.max()))

    def end_prompt(self) -> None:
        """After each prompt or chat turn: compresses what arrived since."""
        for cache in self:
            cache.end_prompt(self.tokens_seen)
        self.prompt_open = False

    def split(self, ids: Tensor, pos: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (ids, pos), both (B, t), in pieces that end where `ends` says so, making room before each and absorbing after each.
        Raises ZooError when ids do not fit the cache's batch."""
        if ids.dim() != 2 or ids.shape[0] != self.batch:
            raise ZooError(f"ids of shape {tuple(ids.shape)} do not fit a cache of batch {self.batch}; expected ({self.batch}, T)")
        pos = self.positions(ids.shape[1]) if pos is None else pos
        ends = self.ends(pos)
        cuts = sorted({t + 1 for t, end in enumerate([] if ends is None else ends.any(0).tolist()) if end} | {ids.shape[1]})
        start = 0
        for cut in cuts:
            piece, where = ids[:, start:cut], pos[:, start:cut]
            self.reserve(where)
            yield piece, where
            self.advance(where)
            start = cut

    def ends(self, pos: Tensor) -> Tensor | None:
        """(B, T) bool: after which of the tokens at pos (B, T) something must be absorbed. None: after none of them."""
        return None

    def reserve(self, pos: Tensor) -> None:
        """Make room for the tokens at pos (B, T)."""
        ends = pos.amax(1) + 1
        if bool((ends > self.room).any()):
            self.make_room(ends, None)

    def make_room(self, ends: Tensor, most: int | None) -> None:
        """For sequences that reach `ends` (B,) tokens, and not for more than `most`."""
        self.room = torch.stack([cache.reserve(ends, most) for cache in self]).amin(0)

    def advance(self, pos: Tensor) -> None:
        """The tokens at pos (B, T) have been attended: count them, and absorb at a block's end."""
        self.tokens_seen.copy_(torch.maximum(self.tokens_seen, pos.amax(1) + 1))
        self.maintain()

    def maintain(self) -> None:
        """Absorb pending tokens where `ends` says so; outside the decode graph, and idempotent."""

    def nbytes(self) -> Bytes:
        """Measured: every storage behind a buffer once, metadata included."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.buffers() if t.numel()}
        own = sum(t.nbytes for t in self.buffers(recurse=False))
        return Bytes(sum(c.used() for c in self) + own, sum(storages.values()))

    def clone(self) -> Caches:
        """An independent copy: several answers from one prompt."""
        shared = {id(rotary): rotary for module in self.modules() for rotary in getattr(module, "rotary", ())}  # the model's, not copied
        return copy.deepcopy(self, shared)

    def expand(self, batch: int) -> Caches:
        """A copy of a single sequence's cache for `batch` sequences. Raises ZooError unless this cache's batch is 1."""
        if self.batch != 1:
            raise ZooError(f"expand needs a cache of batch 1; this one has {self.batch}")
        new = self.clone()
        for module in new.modules():
            if callable(own := getattr(module, "expand_batch", None)):
                own(batch)
            else:
                for name, t in list(module.named_buffers(recurse=False)):
                    setattr(module, name, t.repeat_interleave(batch, 0))
        new.refresh()
        return new

    def refresh(self) -> None:
        """Bring in line what follows from buffers that were just replaced."""

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
        mine, grows = dict(self.named_buffers()), {name: dim for name, _, dim in open_dimensions(self)}
        optional = {f"{prefix}.{name}" for prefix, part in self.named_modules() for name in getattr(part, "OPTIONAL", ())}

        def shape(name: str, t: Tensor) -> list[int]:
            return [n for dim, n in enumerate(t.shape) if dim != grows.get(name)]

        fits = set(mine) ^ set(tensors) <= optional and all(
            t.dtype == mine[n].dtype and t.dim() == mine[n].dim() and shape(n, t) == shape(n, mine[n])
            for n, t in tensors.items()
            if n in mine
        )
        if meta.get("kind") != self.kind() or not fits:
            held = meta.get("kind", "unknown")
            raise ZooError(f"{path} holds another cache ({held}); this one is {self.kind()}: same model, method and batch are needed")
        for name in {*mine, *tensors}:
            module, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(module), leaf, tensors.get(name))
        self.prompt_open = meta["prompt_open"] == "True"
        self.refresh()

    def kind(self) -> str:
        """What a saved state must share with the cache that loads it."""
        table = self.table_digest and f" by table {self.table_digest}"
        return f"{self.about or type(self[0]).__name__}{table}, {len(self)} layers, batch {self.batch}"


@dataclass(frozen=True)
class Attention:
    """A method: its options, and nothing else. `name:option=value,option=value` on the command line is this object."""

    exact_when: ClassVar[str] = "never"
    name: ClassVar[str] = ""  # its spelling; the class's own name in lower case unless given
    main: ClassVar[str] = "budget"  # the option that is always printed

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

    def note(self, config: Any) -> str:
        """What who runs a model of this config by this method must know, in one line; the command lines print it. Mostly nothing."""
        return ""

    def __str__(self) -> str:
        """As it is spelled: options that have their default are left out, but for the one a method is about."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        own = [f for f in dataclasses.fields(self) if not f.kw_only]
        shown = {f.name: values[f.name] for f in own if f.name == self.main or values[f.name] != f.default}
        options = ",".join(f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in shown.items())
        return (self.name or type(self).__name__.lower()) + (f":{options}" if options else "")
