"""The probability that slots received, on GPUs, in Triton: column sums of the matrix of probabilities, which is never written.

    slot_mass(q, q_pos, slots, lse, weight)           of a dense store
    page_mass(q, q_pos, pages, spans, lse, weight)    of pages

    mass_j = sum over queries i of weight_i exp(s q_i.k_j + a_j - lse_i)          and the same of the square of what stands behind weight_i

One program owns a block of slots of a head, holds its keys, and walks over the queries a tile at a time, always in the same order: no
atomic additions, the same sums every time. The statistics lse are those that attention returned, of all of the slots that a query saw,
whatever part of them is looked at here. Query tiles that cannot see the block are left out, and where no query of a sequence counts
(`weight` 0: most decode steps) no key is loaded.
Letters: B batch, H query heads, G key/value heads, T new tokens, S slots, D head size; shapes as in zoo/attention/slots.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from zoo.kernels.launch import TYPES, Blocks, Options, Shipped, check, dot, launch, op, rows_together, strides
from zoo.kernels.slot_attention import HEADS, NONE, PAGE, WIDEST


def blocks(head_dim: int, dtype: torch.dtype, rows: int, paged: bool) -> Blocks:
    """The configuration for T H / G rows. A program of pages owns one page."""
    D = max(64, triton.next_power_of_2(head_dim))
    M = 16 if rows <= 16 or dtype == torch.float32 else 64
    N = PAGE if paged or dtype == torch.float32 or D == 256 else 64
    return Blocks(M, N, D, 4)


def options(size: Blocks) -> Options:
    """Without a limit of registers ptxas spills some of heads of 256, to fit more blocks in."""
    return Options(size.warps, registers=255 if size.D == 256 else None)


@triton.jit
def column_mass_kernel(
    q, q_pos, k, pos, a, pages, owner, lse, weight, mass, squares,
    kb, kg, ks, pb, pg, ab, ag,
    G, T, R, S, window, scale,
    PAGE: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block of N slots. pages None: of a dense store of S rows a head, a None: 0. Otherwise entry program_id(0) of the list of pages."""
    if pages is not None:
        entry = tl.program_id(0)
        head, slots = tl.load(owner + entry), N
        first = tl.load(pages + entry).to(tl.int64) * PAGE
        to = entry.to(tl.int64) * PAGE
        k, pos, a = k + first * ks, pos + first, a + first
    else:
        first = tl.program_id(0) * N
        head, slots = tl.program_id(1), tl.minimum(S - first, N)
        i, g = (head // G).to(tl.int64), head % G
        to = head.to(tl.int64) * S + first
        k, pos = k + i * kb + g.to(tl.int64) * kg + first.to(tl.int64) * ks, pos + i * pb + g * pg + first
        if a is not None:
            a += i * ab + g * ag + first
    m, n, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_D)
    here = tl.load(pos + n, mask=n < slots, other=-1)
    oldest, newest = tl.min(tl.where(here >= 0, here, 0x7FFFFFFF), 0), tl.max(here, 0)
    q_pos += (head // G) * T
    weight += (head // G) * T
    counted = 0.0
    for t in range(0, T, M):
        counted = tl.maximum(counted, tl.max(tl.load(weight + t + m, mask=t + m < T, other=0), 0))

    total, square = tl.zeros((N,), tl.float32), tl.zeros((N,), tl.float32)
    if (counted > 0) & (newest >= 0):
        live = here >= 0
        keys = tl.load(k + n[None] * ks + d[:, None], mask=live[None] & (d < D)[:, None], other=0)
        bias = tl.zeros((N,), tl.float32)
        if a is not None:
            bias = tl.load(a + n, mask=live, other=0)
        for start in range(0, R * T, M):
            r = start + m  # row r T + t of the head is query head r's token t
            at = tl.load(q_pos + r % T, mask=r < R * T, other=-1).to(tl.int32)
            w = tl.load(weight + r % T, mask=r < R * T, other=0)
            at = tl.where(w > 0, at, -1)
            last, earliest = tl.max(at, 0), tl.min(tl.where(at >= 0, at, 0x7FFFFFFF), 0)
            if (last >= oldest) & (earliest - newest < window):
                row = head.to(tl.int64) * R * T + r
                x = tl.load(q + row[:, None] * D + d[None], mask=(at >= 0)[:, None] & (d < D)[None], other=0)
                top = tl.load(lse + row, mask=at >= 0, other=0)
                top = tl.where(top > float("-inf"), top, 0.0)  # it saw nothing at all
                seen = live[None] & (here[None] <= at[:, None]) & (at[:, None] - here[None] < window)
                p = tl.exp(tl.where(seen, dot(x, keys) * scale + bias[None] - top[:, None], float("-inf")))
                total += tl.sum(p * w[:, None], 0)
                square += tl.sum(p * p * w[:, None], 0)
    tl.store(mass + to + n, total, mask=n < slots)
    tl.store(squares + to + n, square, mask=n < slots)


def run(
    q: Tensor,
    q_pos: Tensor,
    k: Tensor,
    pos: Tensor,
    a: Tensor | None,
    pages: Tensor | None,
    owner: Tensor | None,
    heads: int,
    lse: Tensor,
    weight: Tensor,
    window: int,
) -> tuple[Tensor, Tensor]:
    """k (B, G, S, D) and what belongs to it, or, with a list of pages, (P PAGE, D); heads = B G."""
    check(q, q_pos, k, pos, a, pages, owner, lse, weight)
    B, H, T, D = q.shape
    G, R = heads // B, H * B // heads
    if q.dtype not in TYPES or not q.dtype.is_floating_point or k.dtype != q.dtype:
        raise RuntimeError(f"slot_mass: keys must have the queries' dtype, bfloat16, float16 or float32; q is {q.dtype}, k {k.dtype}")
    if D > WIDEST or H % G or q_pos.shape != (B, T) or weight.shape != (B, T) or lse.shape != (B, H, T):
        raise RuntimeError(f"slot_mass: q {tuple(q.shape)}, q_pos {tuple(q_pos.shape)}, lse {tuple(lse.shape)}, {G} key/value heads")
    q, q_pos, lse, weight = (t.contiguous() for t in (q, q_pos, lse, weight))
    k, pos, a = rows_together(k), rows_together(pos), None if a is None else rows_together(a)
    size = blocks(D, q.dtype, R * T, pages is not None)
    shape: tuple[int, ...]
    steps: tuple[int, ...]
    if pages is None:
        S = k.shape[2]
        shape, grid = (B, G, S), (triton.cdiv(S, size.N), heads)
        steps = (*strides(k, shape), *strides(pos, (B, G)), *strides(a, (B, G)))
    else:
        S, shape, grid, steps = 0, (len(pages), PAGE), (len(pages), 1), (0, 0, k.stride(0), 0, 0, 0, 0)
    mass, squares = (torch.empty(shape, dtype=torch.float32, device=q.device) for _ in range(2))
    if mass.numel():
        launch(
            column_mass_kernel, grid, q.device, options(size), q, q_pos, k, pos, a, pages, owner, lse, weight, mass, squares,
            *steps, G, T, R, S, min(window or NONE, NONE), D**-0.5,
            PAGE=PAGE, D=D, M=size.M, N=size.N, BLOCK_D=size.D,
        )  # fmt: skip
    return mass, squares


@op("slot_mass_triton")
def _slot_mass(
    q: Tensor, q_pos: Tensor, k: Tensor, pos: Tensor, a: Tensor | None, lse: Tensor, weight: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    return run(q, q_pos, k, pos, a, None, None, k.shape[0] * k.shape[1], lse, weight, window)


@op("page_mass_triton")
def _page_mass(
    q: Tensor, q_pos: Tensor, k: Tensor, pos: Tensor, a: Tensor, pages: Tensor, owner: Tensor, heads: int, lse: Tensor, weight: Tensor,
    window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    k, pos, a = (t.flatten(0, 1) for t in (k, pos, a))
    return run(q, q_pos, k, pos, a, pages, owner, heads, lse, weight, window)


@_slot_mass.register_fake
def _(q: Tensor, q_pos: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(k.shape[:3], dtype=torch.float32), q.new_empty(k.shape[:3], dtype=torch.float32)


@_page_mass.register_fake
def _(q: Tensor, q_pos: Tensor, k: Tensor, pos: Tensor, a: Tensor, pages: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = (pages.shape[0], k.shape[1])
    return q.new_empty(shape, dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)


def slot_mass(q: Tensor, q_pos: Tensor, slots: Any, lse: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The probability exp(score - lse) that each slot received, summed over queries and the group's query heads, each times its weight
    (B, T) float32 >= 0, and the same of its square: (B, G, S) float32 each. lse (B, H, T) is that of all slots. Probabilities are by
    denominator weight."""
    logweight = slots.a if slots.b is None else slots.b
    return torch.ops.zoo.slot_mass_triton(q, q_pos, slots.k, slots.pos.to(torch.int32), logweight, lse, weight, slots.window or 0)


def page_mass(q: Tensor, q_pos: Tensor, slots: Any, spans: Tensor, lse: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same for `PagedSlots`: (N, PAGE) float32 each, for the N pages that are listed."""
    return torch.ops.zoo.page_mass_triton(
        q, q_pos, slots.k, slots.pos, slots.a, slots.pages, slots.owner, len(spans), lse, weight, slots.window or 0
    )


def shipped() -> Iterator[Shipped]:
    """Every configuration for the head sizes in HEADS; of the tile of 16 rows also a single token's."""
    numbers = ["kb", "kg", "ks", "pb", "pg", "ab", "ag", "G", "T", "R", "S", "window"]
    types = dict.fromkeys(numbers, "i32") | dict.fromkeys(("a", "lse", "weight", "mass", "squares"), "*fp32")
    types |= {"scale": "fp32", "q_pos": "*i64", **dict.fromkeys(("pos", "pages", "owner"), "*i32")}
    absent = {"dense": ("a", "pages", "owner"), "dense, a": ("pages", "owner"), "pages": ()}
    for D, dtype, (name, none) in itertools.product(HEADS, (torch.bfloat16, torch.float16, torch.float32), absent.items()):
        for size in dict.fromkeys(blocks(D, dtype, rows, name == "pages") for rows in (16, 128)):
            given = types | dict.fromkeys(("q", "k"), f"*{TYPES[dtype]}")
            sizes = {"PAGE": PAGE, "D": D, "M": size.M, "N": size.N, "BLOCK_D": size.D, **dict.fromkeys(none)}
            for step in ({}, {"T": 1}) if size.M == 16 else ({},):
                about = f"{TYPES[dtype]}, D {D}, {size.M} rows, {name}{', one token' * len(step)}"
                yield Shipped(column_mass_kernel, about, given, sizes | step, options(size), frozenset(("kb", "kg", "ks")))
