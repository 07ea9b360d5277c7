"""Settled slots as codes: one more store with the verbs of `Pages`, whatever the encoding (kivi.py, qjl.py, turboquant.py).

An encoding turns keys and values of a page of 32 slots into a few bytes a row, and a few a page that its rows share (a grid, or which
channels stand out). It is used in two ways:

    kivi:bits=4                 alone: every token is kept, the newest exactly, the others as codes (encoded.py)
    h2o:budget=25%+kivi:bits=4  stacked: the slots that a method with a budget has settled; its tail, recent and pending tokens, stays exact

What is encoded, and when:
    - A slot that a method leaves as it is keeps its row, and the very bits of its code, whatever becomes of its neighbours.
    - A slot that a method makes is encoded when it is made: a token that settles, from its exact key and value; a cluster that gains
      members (`subgen` with when=decode or stream), from its decoded mean and theirs, anew each time. For that `again` decodes at the
      length that was kept, so that no length grows or shrinks with the number of times, and encoding the same slot again gives (nearly)
      the same code. However often a cluster has merged, the error stays near that of one encoding, in lengths of a token; a mean that many
      members made short may be off by more of its own: docs/methods/README.md has figures, tests/test_encoded_means.py bounds.
    - What a page's rows share is found when the page is empty, and stays until it is empty again: a slot that comes into a row that
      another left takes it as it is, and keeps beside it what it needs to be right all the same (kivi.py).
    - One exception: where a new prompt is compressed and a head then owns fewer pages, what lay in the others is encoded anew.

Reading (encoded_slots.py) decodes a block of pages at a time, at most `ROWS` rows, and adds the blocks up by log-sum-exp: no step has a
decoded copy of what is held. Alone, nothing ever has. Between steps a stacked method looks at its slots decoded (`Pages.read`), a
layer at a time; where a later prompt is compressed, all of them, beside that prompt's exact tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from zoo.attention.cache import Attention, Caches
from zoo.attention.slots import PAGE
from zoo.attention.store import EMPTY, Pages
from zoo.errors import ZooError

WRITTEN = 64  # pages encoded at a time
WHEN = ("prompt", "decode", "stream")
Codes = dict[str, Tensor]


class Code(NamedTuple):
    """A buffer of codes: numbers of a type a row, or a page."""

    size: int
    dtype: torch.dtype
    shared: bool = False  # by the rows of a page


@dataclass(frozen=True)
class Encoding(Attention):
    """residual: that many of the newest tokens stay exact where it stands alone, a multiple of 32. when: prompt, decode or stream.

    Letters below: P pages, X rows of queries of a page. Keys and values come and go as (P, PAGE, D)."""

    residual: int = 128
    when: str = "decode"

    exact_when: ClassVar[str] = "residual >= tokens"
    main: ClassVar[str] = "bits"
    shared: ClassVar[tuple[str, ...]] = ()  # names of `tables`
    factor: ClassVar[str] = "v_grid"  # the code that decoded values are proportional to

    def __post_init__(self) -> None:
        self.check(PAGE <= self.residual <= 2**31 and self.residual % PAGE == 0, "residual", f"a multiple of {PAGE}, at least {PAGE}")
        self.check(self.when in WHEN, "when", f"one of {', '.join(WHEN)}")

    def check(self, good: bool, option: str, bound: str) -> None:
        """Raises ZooError, naming the bound, unless `good`."""
        if not good:
            raise ZooError(f"{self.name or type(self).__name__.lower()}: {option}={getattr(self, option)} must be {bound}")

    @abstractmethod
    def codes(self, size: int, stacked: bool = True) -> dict[str, Code]:
        """What is kept of keys and values of this head size. stacked: slots may come into rows that others left; what only that needs is
        last."""

    def tables(self, size: int) -> dict[str, Tensor]:
        """What all pages of a cache share: rotations, sketches, centroids; float32, by the names in `shared`."""
        return {}

    @abstractmethod
    def encode(self, k: Tensor, v: Tensor, old: Codes, fixed: Tensor, tables: Codes) -> Codes:
        """The codes of k, v (P, PAGE, D), at least float32. What rows share stays that of `old` for pages that fixed (P,) names."""

    @abstractmethod
    def keys(self, codes: Codes, tables: Codes, size: int, dtype: torch.dtype) -> Tensor:
        """Decoded (P, PAGE, D)."""

    def again(self, codes: Codes, tables: Codes, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values (P, PAGE, D) as they go into what is made anew of them. An unbiased estimate of a vector is longer than it, and
        nearest centroids are shorter: encoded again and again, lengths would grow or shrink without end. So these are of the lengths
        that were kept, and encoding them gives nearly the same codes."""
        return self.keys(codes, tables, size, dtype), self.answer(self.values(codes, tables, size, dtype), tables)

    @abstractmethod
    def values(self, codes: Codes, tables: Codes, size: int, dtype: torch.dtype) -> Tensor:
        """Decoded (P, PAGE, D), or what `answer` makes that of."""

    def ask(self, q: Tensor, tables: Codes) -> Tensor:
        """What queries (..., D) become before they meet codes."""
        return q

    def scores(self, q: Tensor, codes: Codes, tables: Codes, size: int) -> Tensor:
        """q.k of what `ask` made, (P, X, ...) -> (P, X, PAGE)."""
        return q @ self.keys(codes, tables, size, q.dtype).mT

    def answer(self, out: Tensor, tables: Codes) -> Tensor:
        """What weighted sums of `values` (..., D) become in the end."""
        return out

    def caches(
        self, config: Any, rotary: Any, batch: int, max_tokens: int | None, prompt_tokens: int | None, dtype: torch.dtype, device: Any
    ) -> Caches:
        from zoo.attention.encoded import Whole

        return Whole(when=self.when, encoding=self).caches(config, rotary, batch, max_tokens, prompt_tokens, dtype, device)


class EncodedPages(Pages):
    """Pages that hold codes in place of keys and values. A head's slots lie in its rows in any order, with rows free between them.

    Slots as `read` gives them have a field more, `row`: where in its head a slot lies. `replace` leaves the code of a slot that comes back
    with its row as it is; row -1 = a slot that was made since. A method may hand back `times`, too: by which power of 2 the value of a slot
    that stays was multiplied since (balancekv.py). That is said by its code's own factor, without another code."""

    def __init__(
        self,
        encoding: Encoding,
        layers: int,
        batch: int,
        heads: int,
        size: int,
        dtype: torch.dtype,
        device: Any,
        extra: Any,
        stacked: bool = True,
    ) -> None:
        self.encoding, self.size, self.dtype, self.stacked = encoding, size, dtype, stacked
        self.codes, self.spelling = encoding.codes(size, stacked), str(encoding)
        self.first: list[list[int]] = []
        super().__init__(layers, batch, heads, size, dtype, device, extra)
        if not stacked:  # every slot is a token, and weighs as one
            del self.fields["a"]
            self.register_buffer("a", None)
        self.OPEN = dict.fromkeys((*self.fields, *self.codes), 0)
        for name, t in encoding.tables(size).items():
            self.register_buffer(name, t.to(device))

    def rows_of(self, head_dim: int, dtype: torch.dtype) -> dict[str, tuple[int, torch.dtype]]:
        return {}

    @property
    def tables(self) -> Codes:
        return {name: self.get_buffer(name) for name in self.encoding.shared}

    def coded(self, pages: Tensor | slice) -> Codes:
        """The codes of some pages of the arena."""
        return {name: self.get_buffer(name)[pages] for name in self.codes}

    def lay_out(self, share: Tensor) -> None:
        """Empty pages, but what is in their codes stays: a head's first pages hold what its first pages held. Of a batch that grew, every
        sequence's those of the one that there was."""
        pages, source = max(2, 1 + int(share.sum())), torch.zeros(1, dtype=torch.int64)
        if self.first:
            L, B, G = share.shape
            one = self.share.shape[1] != B
            heads = [(layer, g if one else b * G + g) for layer in range(L) for b in range(B) for g in range(G)]
            spans = [torch.arange(n) for n in share.flatten().tolist()]
            held = [(self.first[layer][head], self.count[layer][head]) for layer, head in heads]
            source = torch.cat((source, *(torch.where(j < n, first + j, 0) for j, (first, n) in zip(spans, held, strict=True))))
        source = torch.nn.functional.pad(source, (0, pages - len(source))).to(self.device)
        for name, (size, dtype, shared) in self.codes.items():
            shape = (size,) if shared else (PAGE, size)
            old = self._buffers.get(name)
            self.register_buffer(name, torch.zeros(pages, *shape, dtype=dtype, device=self.device) if old is None else old[source])
        super().lay_out(share)

    def held(self, layers: int | Sequence[int]) -> dict[str, Tensor]:
        rows = self.rows([layers] if isinstance(layers, int) else layers)
        slots = {name: getattr(self, name).flatten(0, 1)[rows] for name in self.fields}
        return slots | {"row": torch.where(slots["pos"] >= 0, torch.arange(rows.shape[2], device=rows.device), -1)}

    def read(self, layers: int | Sequence[int], anew: bool = False) -> dict[str, Tensor]:
        layers = [layers] if isinstance(layers, int) else layers
        slots, page = self.held(layers), self.rows(layers)[:, :, ::PAGE] // PAGE
        codes, shape, wide = self.coded(page.flatten()), (*slots["pos"].shape, self.size), torch.promote_types(self.dtype, torch.float32)
        if anew:
            k, v = self.encoding.again(codes, self.tables, self.size, wide)
        else:
            k = self.encoding.keys(codes, self.tables, self.size, wide)
            v = self.encoding.answer(self.encoding.values(codes, self.tables, self.size, wide), self.tables)
        decoded = {"k": k.to(self.dtype).view(shape), "v": v.to(self.dtype).view(shape)}
        return decoded | ({} if "a" in slots else {"a": torch.zeros_like(k[..., 0]).view(shape[:3])}) | slots

    def replace(self, layers: int | Sequence[int], slots: Mapping[str, Tensor]) -> None:
        layers = [layers] if isinstance(layers, int) else layers
        pos, row, rows = slots["pos"], slots["row"], self.rows(layers)
        R, own = rows.shape[2], (rows >= PAGE).sum(-1, keepdim=True)  # what is beyond a head's pages points to page 0
        there = pos >= 0
        assert not bool((there.sum(-1, keepdim=True) > own).any()), "more slots than a head's pages hold"
        stays = there & (row >= 0) & (row < own)
        taken = torch.zeros(*rows.shape[:2], R + 1, dtype=torch.bool, device=pos.device)
        taken = taken.scatter_(2, torch.where(stays, row, R), True)[:, :, :R]
        free = taken.to(torch.uint8).argsort(dim=-1, stable=True)  # rows that nothing stays in, in their order, come first
        new = there & ~stays
        rank = (new.cumsum(-1) - 1).clamp(0, R - 1)
        self.write(layers, slots, torch.where(stays, row, free.gather(2, rank)), new, taken, clear=True)

    def add(self, layer: int, slots: Mapping[str, Tensor], place: Tensor) -> None:
        """Write new slots (pos -1 = none) into these rows (B, G, N) of their heads: whole pages, which are free."""
        taken = torch.zeros_like(self.rows([layer]), dtype=torch.bool)
        self.write([layer], slots, place, slots["pos"] >= 0, taken, clear=False)

    def write(self, layers: Sequence[int], slots: Mapping[str, Tensor], place: Tensor, new: Tensor, taken: Tensor, clear: bool) -> None:
        """Slots go to place (A, G, N) in their heads; those that are new are encoded. taken (A, G, R): rows whose codes stay. clear: rows
        that no slot goes to become empty."""
        rows, there = self.rows(layers), slots["pos"] >= 0
        at = rows.gather(2, place)[there]
        for name in self.fields:
            flat = getattr(self, name).flatten(0, 1)
            if clear and name in EMPTY:
                flat[rows] = EMPTY[name]
            flat[at] = slots[name][there].to(flat.dtype)
        if "times" in slots:
            stay, factor = there & ~new, self.get_buffer(self.encoding.factor).flatten(0, 1)
            factor[rows.gather(2, place)[stay]] *= slots["times"][stay][:, None].to(factor.dtype)
        if not bool(new.any()):
            return
        A, G, R = rows.shape
        N = new.shape[2]
        source = torch.full((A, G, R + 1), -1, device=rows.device)  # which slot comes into a row
        source.scatter_(2, torch.where(new, place, R), torch.arange(N, device=rows.device).expand(new.shape))
        source = source[:, :, :R]
        # In rows that stay empty for now, what a page shares is found as if others of the head's slots lay there, new ones first: it must
        # suit later ones.
        others = (there.to(torch.uint8) + new).argsort(dim=-1, descending=True, stable=True)
        other = others.gather(2, torch.arange(R, device=rows.device) % there.sum(-1, keepdim=True).clamp(min=1))
        a, g, j = (source.unflatten(2, (-1, PAGE)) >= 0).any(-1).nonzero(as_tuple=True)
        for some in zip(*(t.split(WRITTEN) for t in (a, g, j)), strict=True):
            self.encode(slots, rows, source, other, taken, *some)

    def encode(
        self, slots: Mapping[str, Tensor], rows: Tensor, source: Tensor, other: Tensor, taken: Tensor, a: Tensor, g: Tensor, j: Tensor
    ) -> None:
        """The new slots of a few pages: the j-th of heads (a, g)."""
        come, other, stay, page = (t.unflatten(2, (-1, PAGE))[a, g, j] for t in (source, other, taken, rows // PAGE))
        page, index, wide = page[:, 0], torch.where(come >= 0, come, other), torch.promote_types(self.dtype, torch.float32)
        k, v = (slots[name][a[:, None], g[:, None], index].to(wide) for name in ("k", "v"))
        old, fixed = self.coded(page), stay.any(-1)
        for name, codes in self.encoding.encode(k, v, old, fixed, self.tables).items():
            written = ~fixed[:, None] if self.codes[name].shared else (come >= 0)[..., None]
            self.get_buffer(name)[page] = torch.where(written, codes, old[name])

    def coded_bytes(self, layer: int) -> int:
        """Of a layer's codes."""
        rows, pages = self.held_rows(layer)
        return sum((pages if shared else rows) * size * dtype.itemsize for size, dtype, shared in self.codes.values())

    def read_bytes(self, layer: int) -> int:
        return super().read_bytes(layer) + self.coded_bytes(layer)

    def used(self, layer: int) -> int:
        tables = 0 if layer else sum(t.nbytes for t in self.tables.values())  # one copy for all layers
        return super().used(layer) + self.coded_bytes(layer) + tables
