"""Where slots live. Two stores, with the same verbs: `append` (new tokens), `replace` (what a method made of old ones), `free`, `read`.

    SlotStore   every head owns the same number of rows: dense (B, G, S, D). New tokens always arrive here.
    Pages       every layer and head owns as many pages of 32 rows as it needs, out of one arena that all layers share: (P, 32, D).
                No head is padded to the longest, and the shapes that a compiled step sees do not depend on one prompt's head lengths.

Letters: B batch, G key/value heads, S rows, D head size, L layers, P pages, J pages of the longest head.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.attention.slots import PAGE, Slots, show

EMPTY = {"pos": -1, "a": -math.inf}  # what a page's row without a slot says


def buffers(module: nn.Module) -> dict[str, Tensor]:
    """Name -> buffer of this module alone."""
    return dict(module.named_buffers(recurse=False))


def resized(old: Tensor, rows: int, capacity: int, empty: int) -> Tensor:
    """The first `rows` rows of old (B, G, S, ...), a view; of a new storage of `capacity` rows where its own is too short, filled up with
    `empty`."""
    if old.stride(1) <= rows * math.prod(old.shape[3:]):
        new = old.new_full((*old.shape[:2], max(rows + 1, capacity), *old.shape[3:]), empty)
        new[:, :, : old.shape[2]] = old
        old = new
    return old.as_strided((*old.shape[:2], rows, *old.shape[3:]), old.stride())


class SlotStore(nn.Module):
    """Slots of one layer, every head owning the same number of rows: k, v (B, G, S, D), pos int32 and a float32 beside them.

    Row 0 swallows what padding writes: its position stays -1, so it is never seen, and a write needs no branch.
    `shared=True`: all heads hold the same tokens, so that one row of positions (B, 1, S) serves them and there are no log-weights.
    `beside` names what is kept beside each row, one float32 each: the attention that its token got, `mass` and `spikes`.
    The buffers are views of the first S rows of storages that may be longer: a step reads what is there, not what is allocated.
    """

    k: Tensor
    v: Tensor
    pos: Tensor
    a: Tensor | None
    mass: Tensor | None
    spikes: Tensor | None
    OPEN: ClassVar[Mapping[str, int]] = dict.fromkeys(("k", "v", "pos", "a", "mass", "spikes"), 2)  # the dimension of each that may grow
    OPTIONAL: ClassVar[frozenset[str]] = frozenset(["mass", "spikes"])  # buffers that come and go with a method's needs

    def __init__(
        self,
        batch: int,
        heads: int,
        rows: int,
        head_dim: int,
        dtype: torch.dtype,
        device: Any,
        shared: bool,
        beside: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.register_buffer("k", torch.zeros(batch, heads, rows, head_dim, dtype=dtype, device=device))
        self.register_buffer("v", torch.zeros(batch, heads, rows, head_dim, dtype=dtype, device=device))
        self.register_buffer("pos", torch.full((batch, 1 if shared else heads, rows), -1, dtype=torch.int32, device=device))
        self.register_buffer("a", None if shared else torch.zeros(batch, heads, rows, device=device))
        for name in ("mass", "spikes"):
            self.register_buffer(name, torch.zeros(batch, heads, rows, device=device) if name in beside else None)

    @property
    def rows(self) -> int:
        return self.k.shape[2]

    def resize(self, rows: int, capacity: int) -> None:
        """Show the first `rows` rows, reallocating to `capacity` rows where the storage is too short; new rows are empty."""
        for name, old in buffers(self).items():
            setattr(self, name, resized(old, rows, capacity, -1 if name == "pos" else 0))

    def append(self, row: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> None:
        """Write new tokens k, v (B, G, T, D) into rows (B, T) of every head, with log-weight 0. Padding (pos -1) goes to row 0."""
        row = torch.where(pos >= 0, row, 0)
        b = torch.arange(k.shape[0], device=k.device)[:, None, None]
        g = torch.arange(k.shape[1], device=k.device)[None, :, None]
        where = (b, g, row[:, None])
        self.k.index_put_(where, k)
        self.v.index_put_(where, v)
        self.pos.index_put_((b, g[:, : self.pos.shape[1]], row[:, None]), pos[:, None].to(torch.int32).expand(-1, self.pos.shape[1], -1))
        for beside in (self.a, self.mass, self.spikes):
            if beside is not None:
                beside.index_put_(where, torch.zeros((), device=k.device))

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
        for name, old in buffers(self).items():
            # One row more than is shown, as in `resize`: a compiled step tells views of a longer storage from whole ones.
            new = old.new_full((*old.shape[:2], rows + 1, *old.shape[3:]), -1 if name == "pos" else 0)[:, :, :rows]
            index = row[:, None].expand(old.shape[:3])
            index = index[..., None].expand(old.shape) if old.dim() == 4 else index
            new.scatter_(2, index, old)
            setattr(self, name, new)
        self.pos[:, :, 0] = -1


class Pages(nn.Module):
    """An arena of pages, shared by the caches of all layers. Page 0 is empty and stays so: padding of lists points to it.

    Heads are contiguous: layer l, sequence b, head g owns `share[l, b, g]` pages, one after the other in that order. Rows that hold
    nothing have position -1. `extra` names what a method keeps beside a slot: name -> (numbers a row, dtype).
    """

    k: Tensor
    v: Tensor
    pos: Tensor
    a: Tensor
    share: Tensor  # (L, B, G) int32: pages of each head
    OPEN: Mapping[str, int]  # buffer -> the dimension that may grow

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: Any,
        extra: Mapping[str, tuple[int, torch.dtype]] | None = None,
    ) -> None:
        super().__init__()
        self.fields: dict[str, tuple[int, torch.dtype]] = {
            **self.rows_of(head_dim, dtype),
            "a": (0, torch.float32),
            "pos": (0, torch.int32),
            **(extra or {}),
        }
        self.OPEN = dict.fromkeys(self.fields, 0)
        self.device = device
        self.lay_out(torch.zeros(layers, batch, heads, dtype=torch.int32))

    def rows_of(self, head_dim: int, dtype: torch.dtype) -> dict[str, tuple[int, torch.dtype]]:
        return {"k": (head_dim, dtype), "v": (head_dim, dtype)}

    def lay_out(self, share: Tensor) -> None:
        """Give every head this many empty pages (L, B, G), in place of what it owned."""
        self.register_buffer("share", share.to(torch.int32).to(self.device))
        pages = max(2, 1 + int(share.sum()))  # a compiled step takes a size of 1 for a constant
        for name, (size, dtype) in self.fields.items():
            shape = (pages, PAGE, size) if size else (pages, PAGE)
            self.register_buffer(name, torch.full(shape, EMPTY.get(name, 0), dtype=dtype, device=self.device))
        self.index()

    def index(self) -> None:
        """What follows from `share`: the first page of each head, for reading without a look at the tensor."""
        flat = self.share.flatten().long().cpu()
        first = (1 + flat.cumsum(0) - flat).view(self.share.shape)
        self.first: list[list[int]] = first.flatten(1).tolist()
        self.count: list[list[int]] = self.share.flatten(1).tolist()
        self.shown: list[list[tuple[int, Tensor, Tensor, Tensor, Tensor]] | None] = [None] * len(self.share)

    def lists(self, layer: int, avoid: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """For a layer: its pages (N,), the head b G + g that owns each (N,), and for each head where its pages stand in that list
        (B G, J): int32. N and J are those of the layer that needs most, padded with page 0, so that all layers have one shape. N is not
        `avoid`, nor another size here: a compiled step would take sizes that agree by chance for the same."""
        _, B, G = self.share.shape
        longest = max(2, *(sum(c) for c in self.count)) + 1
        wide = max(2, *(max(c) for c in self.count))
        while longest in (avoid, wide, len(self.pos)):
            longest += 1
        pages, owner = torch.zeros(longest, dtype=torch.int32), torch.zeros(longest, dtype=torch.int32)
        table = torch.zeros(B * G, wide, dtype=torch.int32)
        at = 1  # entry 0 is page 0, for the table's padding
        for head, (first, n) in enumerate(zip(self.first[layer], self.count[layer], strict=True)):
            pages[at : at + n] = torch.arange(first, first + n)
            owner[at : at + n] = head
            table[head, :n] = torch.arange(at, at + n)
            at += n
        return pages.to(self.device), owner.to(self.device), table.to(self.device)

    def spans(self, layer: int) -> Tensor:
        """(B G, 3) int32: each head's first page, how many it owns, and where they begin in the layer's list (`lists`)."""
        count = torch.tensor(self.count[layer])
        return torch.stack((torch.tensor(self.first[layer]), count, 1 + count.cumsum(0) - count), 1).to(self.device, torch.int32)

    def head(self, name: str, layer: int, head: int) -> Tensor:
        """The rows of one head (b G + g): a view (rows, ...) of buffer `name`."""
        first, n = self.first[layer][head], self.count[layer][head]
        return getattr(self, name)[first : first + n].flatten(0, 1)

    def views(self, layer: int) -> list[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
        """What `show` makes of a layer's pages; kept until they change."""
        shown = self.shown[layer]
        if shown is None:
            spans = list(zip(self.first[layer], self.count[layer], strict=True))
            shown = self.shown[layer] = show(self.k, self.v, self.a, self.pos, spans)
        return shown

    def rows(self, layers: Sequence[int]) -> Tensor:
        """(len(layers) B, G, J PAGE) int64: the arena's rows that each head owns; a row of page 0 where it is shorter than the longest."""
        shape = (len(layers) * self.share.shape[1], self.share.shape[2])
        counts, first = (torch.tensor([x[i] for i in layers], device=self.device).view(shape) for x in (self.count, self.first))
        j = torch.arange(max(1, *(max(self.count[i]) for i in layers)), device=self.device)
        page = torch.where(j < counts[..., None], first[..., None] + j, 0)
        return (page[..., None] * PAGE + torch.arange(PAGE, device=self.device)).flatten(2)

    def read(self, layers: int | Sequence[int], anew: bool = False) -> dict[str, Tensor]:
        """A copy of a layer's slots, padded to its longest head: k, v (B, G, S, D), a, pos (B, G, S) and the extras; pos -1 = nothing. Of
        several layers, one's sequences after the other's. anew: to make other slots of them (it matters for codes: `Encoding.again`)."""
        rows = self.rows([layers] if isinstance(layers, int) else layers)
        return {name: getattr(self, name).flatten(0, 1)[rows] for name in self.fields}

    def held(self, layers: int | Sequence[int]) -> dict[str, Tensor]:
        """What `replace` needs to write the same slots again, after pages were laid out anew."""
        return self.read(layers)

    def replace(self, layers: int | Sequence[int], slots: Mapping[str, Tensor]) -> None:
        """Write slots, given as `read` gives them; those with pos -1 and what is beyond a head's pages are left out. Slots must come
        first: a head's n-th slot goes to its n-th row."""
        layers = [layers] if isinstance(layers, int) else layers
        for layer in layers:
            self.shown[layer] = None
        rows = self.rows(layers)
        n = min(rows.shape[2], slots["pos"].shape[2])
        assert not bool((slots["pos"][:, :, n:] >= 0).any()), "more slots than a head's pages hold"
        for name in self.fields:
            flat = getattr(self, name).flatten(0, 1)
            new = slots[name][:, :, :n]
            if name in EMPTY:
                flat[rows] = EMPTY[name]
                new = torch.where(slots["pos"][:, :, :n] >= 0, new, EMPTY[name])
            flat[rows[:, :, :n]] = new.to(flat.dtype)
        for name, value in EMPTY.items():
            getattr(self, name)[0] = value

    def expand_batch(self, batch: int) -> None:
        """The one sequence's pages, `batch` times."""
        share = self.share.repeat_interleave(batch, 1)
        old = [self.held(layer) for layer in range(len(share))]
        self.lay_out(share.cpu())
        for layer, slots in enumerate(old):
            self.replace(layer, {name: t.repeat_interleave(batch, 0) for name, t in slots.items()})

    def held_rows(self, layer: int) -> tuple[int, int]:
        """Rows of a layer that hold something, and pages with such rows."""
        held = [self.head("pos", layer, head).view(-1, PAGE) >= 0 for head in range(len(self.count[layer]))]
        return sum(int(t.sum()) for t in held), sum(int(t.any(-1).sum()) for t in held)

    def bytes_of(self, layer: int, names: Collection[str]) -> int:
        """Of these fields, in a layer's rows that hold something."""
        fields = (self.fields[name] for name in names if name in self.fields)
        return self.held_rows(layer)[0] * sum(max(size, 1) * dtype.itemsize for size, dtype in fields)

    def read_bytes(self, layer: int) -> int:
        """What a query reads of a layer."""
        return self.bytes_of(layer, ("k", "v", "a", "pos"))

    def used(self, layer: int) -> int:
        """Bytes of a layer's rows that hold something, all that is kept beside them included."""
        return self.bytes_of(layer, self.fields) + self.share[layer].nbytes
