"""One layer of a method with a budget: a tail of exact tokens, the same in every head, and settled slots, each head's own.

What happens between steps is done for several layers at once, where a method can: a few large operations in place of many small ones.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.attention.backends import Kernels, attention, flashes, kernels
from zoo.attention.cache import Cache, round_up
from zoo.attention.encoded_slots import EncodedSlots
from zoo.attention.encoding import EncodedPages
from zoo.attention.slots import (
    PAGE,
    PagedSlots,
    Parts,
    Slots,
    blend,
    chunk_mass,
    finish,
    flash_pages,
    flash_slots,
    merge,
    slot_mass,
    slot_parts,
)
from zoo.attention.store import EMPTY, Pages, SlotStore

if TYPE_CHECKING:
    from zoo.attention.budgeted import Budgeted

GROWING = 2**40  # rows of a ring that never wraps
MASSES = ("mass", "spikes")  # what a method may have added up beside tokens and slots
QUERIES = 512  # answered at a time: some methods need their scores as a matrix
Make = Callable[[dict[str, Tensor], Tensor, Tensor, Tensor], dict[str, Tensor]]


class BudgetedCache(Cache):
    """One layer: a tail of its own, and its pages of the arena that all layers share."""

    recent: Tensor  # (B,): the newest tokens that stay in the tail. These three are tensors: a compiled step must not depend on them
    ring: Tensor  # (B,): rows of the tail's ring
    origin: Tensor  # (B,): the position that stands in its first row
    listed: Tensor  # (N,) this layer's pages      owner (N,) whose each is      table (B G, J) where each head's pages are listed
    owner: Tensor
    table: Tensor
    spans: Tensor  # (B G, 3): `Pages.spans`
    mass: Tensor | None  # (N, PAGE): attention that settled slots got since the last `maintain`, and its squares
    spikes: Tensor | None
    OPEN: ClassVar[dict[str, int]] = {"listed": 0, "owner": 0, "table": 1, "mass": 0, "spikes": 0}
    looks: bool = True  # whether any query of this call is looked at (`counted`): found once for all layers, by `BudgetedCaches.reserve`

    def __init__(self, method: Budgeted, index: int, pages: Pages, rotary: Any, config: Any, batch: int, dtype: Any, device: Any) -> None:
        super().__init__()
        self.method, self.index, self.pages = method, index, pages
        self.rotary = [rotary]  # the model's module, in a list so that it is not part of this cache's state
        self.window = config.sliding_window
        self.store = SlotStore(batch, config.num_key_value_heads, 2, config.head_dim, dtype, device, shared=True, beside=method.beside)
        for name, value in (("recent", 0), ("ring", GROWING), ("origin", 0)):
            self.register_buffer(name, torch.full((batch,), value, dtype=torch.int64, device=device))
        for name in ("listed", "owner", "table", "spans", "mass", "spikes"):
            self.register_buffer(name, None)
        self.list_pages()

    def list_pages(self) -> None:
        """Look up this layer's pages, after they were laid out anew."""
        self.listed, self.owner, self.table = self.pages.lists(self.index, avoid=self.store.rows)
        self.spans = self.pages.spans(self.index)
        for name in MASSES:
            if name in self.pages.fields:
                setattr(self, name, torch.zeros(len(self.listed), PAGE, device=self.listed.device))

    # A step

    def row(self, pos: Tensor) -> Tensor:
        return 1 + (pos - self.origin[:, None]) % self.ring[:, None]  # row 0 is for padding

    def respond(self, q: Tensor, pos: Tensor) -> Tensor:
        pieces = zip(q.split(QUERIES, 2), pos.split(QUERIES, 1), strict=True)
        return self.answer(q, pos) if q.shape[2] <= QUERIES else torch.cat([self.answer(*piece) for piece in pieces], 2)

    def answer(self, q: Tensor, pos: Tensor) -> Tensor:
        """The output for queries whose keys have been written."""
        tail = self.store.read(self.window)
        some = torch.compiler.is_compiling() or any(self.pages.count[self.index])  # a compiled step always asks for both
        kernel = self.kernels(q, some)
        fused = kernel is None and flashes(self.backend, q)
        observing = self.method.observes > 0 and self.store.mass is not None
        looks = torch.compiler.is_compiling() or self.looks
        if not some and not observing:
            return attention(q, pos, tail, self.backend)
        settled = self.read_settled(looped=fused) if some else None
        if kernel is not None:
            assert not isinstance(settled, EncodedSlots)
            return self.answer_by(kernel, q, pos, tail, settled, observing and looks)
        whole = flash_slots(q, pos, tail) if fused else slot_parts(q, pos, tail)
        if fused and isinstance(settled, PagedSlots):
            whole = blend(whole, flash_pages(q, pos, settled))
        elif settled is not None:
            whole = merge(whole, settled.parts(q, pos))
        if observing and looks:
            self.observe(q, pos, whole, tail, settled)
        return whole.num.view(q.shape).to(q.dtype) if fused and not isinstance(settled, EncodedSlots) else finish(whole, q.dtype)

    def kernels(self, q: Tensor, settled: bool = True) -> Kernels | None:
        """Those of the backend, for a tail and for what is settled; for codes there are none."""
        return None if settled and isinstance(self.pages, EncodedPages) else kernels(self.backend, q, self.store.k.shape[1])

    def answer_by(self, kernel: Kernels, q: Tensor, pos: Tensor, tail: Slots, settled: PagedSlots | None, observing: bool) -> Tensor:
        """The same by kernels: one softmax over tail and pages, and what both received."""
        if not observing:
            return kernel.attention(q, pos, tail, settled, self.spans)[0]
        counts, every = self.counted(pos)
        out, sums, settled_sums = kernel.attention_and_mass(q, pos, tail, settled, self.spans, (counts * every).float())
        for name, power in self.method.powers.items():
            getattr(self.store, name).add_(sums[power - 1])
            if settled is not None and (mine := getattr(self, name)) is not None:
                mine.add_(settled_sums[power - 1])
        return out

    def counted(self, pos: Tensor) -> tuple[Tensor, int]:
        """Which queries (B, T) are looked at, and how many each stands for: all of a prompt, every `observes`-th one by position later."""
        every = 1 if self.prompt_open else self.method.observes
        return (pos >= 0) & (pos % max(every, 1) == 0), every

    def read_settled(self, looped: bool = False) -> PagedSlots | EncodedSlots:
        """looped: with a view of each head's rows, for what goes through heads one by one."""
        p = self.pages
        if isinstance(p, EncodedPages):
            codes, tables = ([getattr(p, name) for name in names] for names in (p.codes, p.encoding.shared))
            return EncodedSlots(p.spelling, p.stacked, codes, tables, p.pos, p.a, self.listed, self.owner, self.table, self.window)
        views = p.views(self.index) if looped and not torch.compiler.is_compiling() else ()
        return PagedSlots(p.k, p.v, p.pos, p.a, self.listed, self.owner, self.table, (), views, self.window)

    def observe(self, q: Tensor, pos: Tensor, whole: Parts, tail: Slots, settled: PagedSlots | EncodedSlots | None) -> None:
        """Add up the attention that slots get, to the method's `powers`. Never more than the queries of one call x slots."""
        counts, every = self.counted(pos)
        eager = not torch.compiler.is_compiling()
        if every > 1 and eager:
            columns = counts.any(0).nonzero()[:, 0]
            if not len(columns):
                return
            q, pos, counts = q[:, :, columns], pos[:, columns], counts[:, columns]
            whole = Parts(*(x[:, :, :, columns] for x in whole))
        weight, powers = counts * every, self.method.powers
        if every == 1 and pos.shape[1] > 1 and eager:
            sums = chunk_mass(q, pos, tail, whole, tuple(powers.values()))
        else:
            sums = [slot_mass(q, pos, tail, whole, weight, power) for power in powers.values()]
        for (name, power), new in zip(powers.items(), sums, strict=True):
            getattr(self.store, name).add_(new)
            mine = getattr(self, name)
            if settled is not None and mine is not None:
                mine.add_(settled.mass(q, pos, whole, weight, power))

    def reserve(self, ends: Tensor, most: int | None) -> Tensor:
        growing = self.ring == GROWING  # what is a ring has all the rows it needs
        rows, least = 1 + int(torch.where(growing, ends - self.origin, 0).max()), 1 + int(torch.where(growing, 0, self.ring).max())
        if rows > self.store.rows:
            end = 2**62 if most is None else 1 + most - int(torch.where(growing, self.origin, GROWING).min())
            rows = max(least, min(round_up(rows), end))
            self.store.resize(rows, capacity=min(2 * rows, end))
        return torch.where(growing, self.origin + self.store.rows - 1, 2**62)

    # Between steps

    def prepare(self, which: Tensor) -> None:
        """Called before candidates are looked up, of the sequences that `which` (B,) names."""

    def begin_prompt(self, seen: Tensor) -> None:
        """A prompt or chat turn comes next, after seen (B,) tokens."""

    @classmethod
    def fresh(cls, layers: Sequence[Any], tail: dict[str, Tensor]) -> dict[str, Tensor]:
        """The method's own fields of tokens that come out of these layers' tails."""
        return {}

    @classmethod
    @abstractmethod
    def maker(cls, layers: Sequence[Any]) -> Make:
        """What turns candidates of these layers, which are worked on together, into settled slots: make(candidates, seen (A,), room (A, G),
        which (A,)) -> at most `room` slots, those that hold something first. Sequences that `which` does not name have no candidates but
        what they own, and keep it."""

    def settles(self, seen: Tensor) -> Tensor:
        """(B, rows) bool: what is in the tail, and older than the recent tokens at lengths seen (B,)."""
        pos = self.store.pos[:, 0].long()
        return (pos >= 0) & (pos < (seen - self.recent)[:, None])

    def drop(self, seen: Tensor, which: Tensor) -> None:
        """Empty the tail's rows of what was handed to `compress`."""
        self.store.free((self.settles(seen) & which[:, None])[:, None])

    def lay_tail(self, which: Tensor, origin: Tensor, ring: Tensor) -> None:
        """Move the sequences that `which` (B,) names into a ring of this many rows that begins at `origin`; both (B,)."""
        self.origin.copy_(torch.where(which, origin, self.origin))
        self.ring.copy_(torch.where(which, ring, self.ring))
        pos = self.store.pos[:, 0].long()
        row = torch.where(pos >= 0, self.row(pos), 0)
        bounded = torch.where(self.ring == GROWING, 0, self.ring)
        self.store.move(row, max(2, int(row.max()) + 1, int(bounded.max()) + 1))

    def used(self) -> int:
        small = sum(t.nbytes for t in (self.recent, self.ring, self.origin, self.listed, self.owner, self.table, self.spans))
        kept = sum(getattr(self.store, name) is not None for name in MASSES)
        mass = 4 * kept * self.store.k.shape[1] * int((self.store.pos >= 0).sum())
        mass += sum(new.nbytes for name in MASSES if (new := getattr(self, name)) is not None)
        return super().used() + self.pages.used(self.index) + small + mass

    def slots(self) -> Slots:
        s, tail = self.pages.read(self.index), super().slots()
        assert tail.a is not None
        k, v = torch.cat((s["k"], tail.k), 2), torch.cat((s["v"], tail.v), 2)
        a = torch.cat((s["a"], tail.a), 2)
        return Slots(k, v, torch.cat((s["pos"], tail.pos), 2), a, a, tail.window)


# Settled slots of one layer or several: one layer's sequences after the other's, A = len(layers) B of them


def settled(layers: Sequence[BudgetedCache]) -> dict[str, Tensor]:
    """Padded to the longest head (`Pages.read`), their masses up to date."""
    pages, index = layers[0].pages, [layer.index for layer in layers]
    slots = pages.read(index, anew=True)
    if any(any(pages.count[i]) for i in index):
        n = slots["pos"].shape[2]
        for name in MASSES:
            new = [mass[layer.table.long()].flatten(1)[:, :n] for layer in layers if (mass := getattr(layer, name)) is not None]
            if new:
                slots[name] += torch.cat([F.pad(t, (0, n - t.shape[1])) for t in new]).view(slots[name].shape)
    return slots


def put(layers: Sequence[BudgetedCache], slots: dict[str, Tensor]) -> None:
    """Write them."""
    layers[0].pages.replace([layer.index for layer in layers], slots)
    for layer in layers:
        for name in MASSES:
            if (new := getattr(layer, name)) is not None:
                new.zero_()


def candidates(layers: Sequence[BudgetedCache], seen: Tensor, which: Tensor) -> dict[str, Tensor]:
    """The settled slots of all sequences and, behind them, of those that `which` (B,) names, what is older than the recent tokens at
    lengths seen (B,): k, v (A, G, N, D), a, pos (A, G, N) and the method's own fields; pos -1 = nothing. Expired ones are left out."""
    for layer in layers:
        layer.prepare(which)
    one = layers[0]  # tails of all layers hold the same tokens
    pos = one.store.pos[:, 0].long()
    old = one.settles(seen) & which[:, None]
    rows = old.any(0).nonzero()[:, 0]
    first = int(rows[0]) if len(rows) else 0
    where = slice(first, first + len(rows)) if len(rows) and int(rows[-1]) - first == len(rows) - 1 else rows
    slots = settled(layers)
    held = [name for name in ("k", "v", *MASSES) if getattr(one.store, name) is not None]
    tail = {name: torch.cat([getattr(layer.store, name)[:, :, where] for layer in layers]) for name in held}
    shape = tail["k"].shape[:3]
    tail["a"] = torch.zeros(shape, device=pos.device)
    tail["pos"] = torch.where(old, pos, -1)[:, where].repeat(len(layers), 1)[:, None].expand(shape)
    tail |= one.fresh(layers, tail)
    if "row" in slots:  # of encoded pages: these have none yet
        tail["row"] = torch.full(shape, -1, device=pos.device)
    both = {name: torch.cat((t, tail[name].to(t.dtype)), 2) for name, t in slots.items()}
    if one.window is not None:
        oldest = (seen - one.window).repeat(len(layers))[:, None, None]
        both["pos"] = torch.where(both["pos"] > oldest, both["pos"], -1)
    return both


def renewed(layers: Sequence[BudgetedCache], seen: Tensor, which: Tensor, room: Tensor, make: Make) -> dict[str, Tensor]:
    """The settled slots, those of the sequences that `which` (B,) names made anew, by make(candidates, seen (A,), room (A, G), which (A,)),
    together with what leaves their tails. The others' stay as they are, whatever their neighbours do."""
    some = which.repeat(len(layers))
    new = make(candidates(layers, seen, which), seen.repeat(len(layers)), room, some)
    if bool(which.all()):
        return new
    old = settled(layers)
    if "times" in new:
        old["times"] = torch.ones_like(old["a"])
    n = max(old["pos"].shape[2], new["pos"].shape[2])

    def padded(name: str, t: Tensor) -> Tensor:
        return F.pad(t, (0, 0) * (t.dim() - 3) + (0, n - t.shape[2]), value=EMPTY.get(name, 0))

    return {
        name: torch.where(some.view(-1, *[1] * (t.dim() - 1)), padded(name, new[name].to(t.dtype)), padded(name, t))
        for name, t in old.items()
    }
