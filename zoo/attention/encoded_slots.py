"""What a query reads of encoded pages (encoding.py): a block of pages decoded at a time, two operators that stay one node of a graph."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.attention.slots import PAGE, Parts, finite, grouped, per_query

ROWS = 1024  # decoded at a time for one query a sequence; a quarter of it for more


@functools.lru_cache(64)
def encoding_of(spelling: str) -> Any:
    from zoo.attention import parse

    return parse(spelling)


@dataclass(frozen=True)
class EncodedSlots:
    """What a query reads of encoded pages: `PagedSlots` with codes in place of keys and values."""

    name: str  # the encoding's spelling
    stacked: bool
    codes: list[Tensor]  # in the order of `Encoding.codes`
    tables: list[Tensor]
    pos: Tensor
    a: Tensor | None  # None: 0
    pages: Tensor
    owner: Tensor
    table: Tensor
    window: int | None = None

    def arguments(self) -> tuple[Any, ...]:
        pages = (self.pos, self.a, self.pages, self.owner, len(self.table), self.window or 0)
        return (*pages, self.name, self.stacked, self.codes, self.tables)

    def parts(self, q: Tensor, q_pos: Tensor) -> Parts:
        """`slot_parts` of q (B, H, T, D) at q_pos (B, T)."""
        num, top, den = encoded_parts(q, q_pos, *self.arguments())
        shape = (q.shape[0], -1, *top.shape[1:])
        top = top.view(shape)
        return Parts(num.view(*top.shape, -1), top, den.view(shape), top)

    def mass(self, q: Tensor, q_pos: Tensor, whole: Parts, queries: Tensor | None = None, power: int = 1) -> Tensor:
        """`paged_mass`: (N, PAGE)."""
        top, scale = finite(whole.max_den).flatten(0, 1), per_query(whole, queries, power).flatten(0, 1)
        return encoded_mass(q, q_pos, top, scale, power, *self.arguments())


class Blocks:
    """Encoded pages, a block at a time: (owners (n,), codes, scores (n, R, T, PAGE))."""

    def __init__(self, q: Tensor, q_pos: Tensor, pos: Tensor, a: Tensor | None, pages: Tensor, owner: Tensor, heads: int, window: int,
                 name: str, stacked: bool, codes: Sequence[Tensor], tables: Sequence[Tensor]) -> None:  # fmt: skip
        self.encoding, self.size = encoding_of(name), q.shape[-1]
        self.tables = dict(zip(self.encoding.shared, tables, strict=True))
        self.codes = dict(zip(self.encoding.codes(self.size, stacked), codes, strict=True))
        B, self.window = q.shape[0], window
        q = grouped(q, heads // B)
        self.shape = (heads, *q.shape[2:4])  # (B G, R, T)
        self.q = self.encoding.ask(q * self.size**-0.5, self.tables).flatten(0, 1)
        self.q_pos = q_pos.repeat_interleave(heads // B, 0)
        self.pos, self.a, self.pages, self.owner = pos, a, pages, owner

    def __iter__(self) -> Any:
        step = ROWS // PAGE // (1 if self.shape[2] == 1 else 4)
        for page, owner in zip(self.pages.long().split(step), self.owner.long().split(step), strict=True):
            codes = {name: t[page] for name, t in self.codes.items()}
            pos, at = self.pos[page][:, None, None], self.q_pos[owner][:, None, :, None]
            seen = (pos >= 0) & (pos <= at)
            seen = seen & (pos > at - self.window) if self.window else seen
            score = self.encoding.scores(self.q[owner].flatten(1, 2), codes, self.tables, self.size).unflatten(1, self.shape[1:])
            score = score if self.a is None else score + self.a[page][:, None, None]
            yield owner, codes, score.masked_fill(~seen, -torch.inf)


@torch.library.custom_op("zoo::encoded_parts", mutates_args=())
def encoded_parts(q: Tensor, q_pos: Tensor, pos: Tensor, a: Tensor | None, pages: Tensor, owner: Tensor, heads: int, window: int,
                  name: str, stacked: bool, codes: list[Tensor], tables: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """num (B G, R, T, D), its maxima and den (B G, R, T), of all pages. One operator, so that a compiled step has no loop."""
    blocks = Blocks(q, q_pos, pos, a, pages, owner, heads, window, name, stacked, codes, tables)
    top = blocks.q.new_full(blocks.shape, -torch.inf)
    num, den = blocks.q.new_zeros(*blocks.shape, blocks.size), blocks.q.new_zeros(blocks.shape)
    for who, block, score in blocks:
        high = score.amax(-1)
        new = top.scatter_reduce(0, who[:, None, None].expand(high.shape), high, "amax")
        scale = (top - finite(new)).exp()
        e = (score - finite(new)[who][..., None]).exp()
        v = blocks.encoding.values(block, blocks.tables, blocks.size, e.dtype)
        num.mul_(scale[..., None]).index_add_(0, who, (e.flatten(1, 2) @ v).unflatten(1, blocks.shape[1:]))
        den.mul_(scale).index_add_(0, who, e.sum(-1))
        top = new
    return blocks.encoding.answer(num, blocks.tables), top, den


@torch.library.custom_op("zoo::encoded_mass", mutates_args=())
def encoded_mass(q: Tensor, q_pos: Tensor, top: Tensor, scale: Tensor, power: int, pos: Tensor, a: Tensor | None, pages: Tensor,
                 owner: Tensor, heads: int, window: int, name: str, stacked: bool, codes: list[Tensor],
                 tables: list[Tensor]) -> Tensor:  # fmt: skip
    """(N, PAGE): exp(power (score - top)) scale, summed over queries; top, scale (B G, R, T)."""
    blocks = Blocks(q, q_pos, pos, a, pages, owner, heads, window, name, stacked, codes, tables)
    return torch.cat([((power * (x - top[who][..., None])).exp() * scale[who][..., None]).sum((1, 2)) for who, _, x in blocks])


@encoded_parts.register_fake
def _(q: Tensor, q_pos: Tensor, pos: Tensor, a: Tensor | None, pages: Tensor, owner: Tensor, heads: int, *_: Any) -> tuple[Tensor, ...]:
    shape = (heads, q.shape[0] * q.shape[1] // heads, q.shape[2])
    num = q.new_empty(*shape, q.shape[3], dtype=torch.promote_types(q.dtype, torch.float32))
    return num, num.new_empty(shape), num.new_empty(shape)


@encoded_mass.register_fake
def _(q: Tensor, q_pos: Tensor, top: Tensor, scale: Tensor, power: int, pos: Tensor, a: Tensor | None, pages: Tensor, *_: Any) -> Tensor:
    return top.new_empty(len(pages), PAGE)
