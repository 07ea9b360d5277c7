"""Attention over slots on GPUs, in Triton: the formula of zoo/attention/slots.py in float32 sums, for bfloat16, float16 or float32.

    slot_attention(q, q_pos, slots)          what queries see of a dense store: output and log-sum-exp
    page_attention(q, q_pos, pages, spans)   the same of heads that own different numbers of slots, in pages
    slot_parts(q, q_pos, slots)              unnormalised sums, for denominator weights of their own, or for keys without values

The H/G query heads and T new tokens of a kv head are rows of tiles, each of which reads keys and values once: one tile for up to 128 rows,
but for 16 in float32 or with heads above 128. A head's slots are shared out among `splits`, whose number follows from shapes alone; each
writes a sum of its own, and a second kernel adds them up:

    slot_attention_kernel   (row tiles, splits, B G)     num, max, den of a share of the slots
    merge_kernel            (B G rows,)                  added with weights exp(max - largest max), divided

A block of slots that no query of the tile may see costs its positions, 4 bytes a slot: neither its keys nor its values are loaded.
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
from zoo.kernels.launch import TYPES, Blocks, Options, Shipped, check, dot, launch, op, rounded, rows_together, strides

PAGE = 32  # rows of a page, as in zoo/attention/slots.py
HEADS = (64, 80, 96, 128, 256)  # head sizes that are compiled for four chips to see what they take; others run as well
WIDEST = 256
PROGRAMS = 512  # that fill a chip: 132 multiprocessors of an H100, four each
NONE = 2**31 - 1  # a window that hides nothing
SPLITS = 16  # that are added up at a time
SHARE = 256  # slots of a split, at least: what it writes for 8 rows is then 6 percent of what it reads


def blocks(head_dim: int, dtype: torch.dtype, rows: int) -> Blocks:
    """The configuration for T H / G rows."""
    D, wide = max(64, triton.next_power_of_2(head_dim)), dtype == torch.float32
    M = 16 if rows <= 16 or D == 256 or wide else 32 if rows <= 32 else 128
    N = 16 if wide or (M > 16 and D == 128) else 64 if M * D == 16 * 64 else 32  # as many as spill no register
    return Blocks(M, N, D, 4 if 4096 // (1 + wide) > M * D else 8)


def splits(heads: int, tiles: int, slots: int) -> int:
    """Into how many shares the slots of each head go."""
    return max(1, min(triton.cdiv(PROGRAMS, heads * tiles), slots // SHARE))


@triton.jit
def slot_attention_kernel(
    q, q_pos, k, v, pos, a, b, spans, num, top, den, top_b, out, lse,
    kb, kg, ks, vb, vg, vs, pb, pg, ab, ag, bb, bg,
    G, T, R, S, window, scale,
    PAGE: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One split of one row tile of a kv head. v None: no values are summed. a None: 0. b None: a. spans None: a dense store of S rows. out
    None: the sums are what is wanted; otherwise a single split divides at once."""
    tile, split, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if spans is not None:
        first = tl.load(spans + 3 * head).to(tl.int64) * PAGE
        slots = tl.load(spans + 3 * head + 1) * PAGE
        k, pos, a = k + first * ks, pos + first, a + first
        v += first * vs
    else:
        i, g, slots = (head // G).to(tl.int64), head % G, S
        k, pos = k + i * kb + g.to(tl.int64) * kg, pos + i * pb + g * pg
        if v is not None:
            v += i * vb + g.to(tl.int64) * vg
        if a is not None:
            a += i * ab + g * ag
        if b is not None:
            b += i * bb + g * bg
    share = tl.cdiv(tl.cdiv(slots, tl.num_programs(1)), N) * N
    start = split * share
    end = tl.minimum(start + share, slots)

    m, n, d = tile * M + tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_D)
    row = head.to(tl.int64) * R * T  # where the head's begin in q (B G, R T, D): row r T + t is query head r's token t
    at = tl.load(q_pos + (head // G) * T + m % T, mask=m < R * T, other=-1).to(tl.int32)
    x = tl.load(q + row * D + (m[:, None] * D + d[None]), mask=(m < R * T)[:, None] & (d < D)[None], other=0)
    newest, oldest = tl.max(at, 0), tl.min(tl.where(at >= 0, at, 0x7FFFFFFF), 0)

    acc = tl.zeros((M, BLOCK_D), tl.float32)
    best = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    best_b = best
    coming = tl.load(pos + start + n, mask=start + n < end, other=-1)
    for s in range(start, end, N):
        here = coming  # positions are loaded a block ahead, so that the branch does not wait for them
        coming = tl.load(pos + s + N + n, mask=s + N + n < end, other=-1)
        live = (here >= 0) & (here <= newest) & (oldest - here < window)  # some query of the tile may see it
        if tl.max(live.to(tl.int32), 0) > 0:
            keys = tl.load(k + (s + n)[None] * ks + d[:, None], mask=live[None] & (d < D)[:, None], other=0)
            if v is not None:
                values = tl.load(v + (s + n)[:, None] * vs + d[None], mask=live[:, None] & (d < D)[None], other=0)
            seen = (here >= 0)[None] & (here[None] <= at[:, None]) & (at[:, None] - here[None] < window)
            product = dot(x, keys) * scale
            score = product
            if a is not None:
                score += tl.load(a + s + n, mask=live, other=0)[None]
            e, best, shrink = exponentials(score, seen, best)
            if v is not None:
                acc = dot(rounded(e, values.dtype), values, acc * shrink[:, None])
            if b is not None:
                e, best_b, shrink = exponentials(product + tl.load(b + s + n, mask=live, other=0)[None], seen, best_b)
            total = total * shrink + tl.sum(e, 1)

    here, inside = (m < R * T), (m < R * T)[:, None] & (d < D)[None]
    if out is not None and tl.num_programs(1) == 1:
        some = total > 0
        divisor = tl.where(some, total, 1.0)
        tl.store(lse + row + m, tl.where(some, best + tl.log(divisor), float("-inf")), mask=here)
        tl.store(out + row * D + (m[:, None] * D + d[None]), rounded(acc / divisor[:, None], out.dtype.element_ty), mask=inside)
    else:
        part = (head * tl.num_programs(1) + split).to(tl.int64) * R * T
        tl.store(top + part + m, best, mask=here)
        tl.store(den + part + m, total, mask=here)
        if b is not None:
            tl.store(top_b + part + m, best_b, mask=here)
        if v is not None:
            if out is not None:  # what saw nothing is not read again: its maximum says so
                inside = inside & (best > float("-inf"))[:, None]
            tl.store(num + part * D + (m[:, None] * D + d[None]), acc, mask=inside)


@triton.jit
def exponentials(score, seen, best):
    """exp(score - the new maximum) (M, N), 0 where not seen; the new maxima (M,); what sums so far must be multiplied with."""
    score = tl.where(seen, score, float("-inf"))
    new = tl.maximum(best, tl.max(score, 1))
    base = tl.where(new > float("-inf"), new, 0.0)  # exp(-inf - base) is then 0 and not NaN
    return tl.exp(score - base[:, None]), new, tl.exp(best - base)


@triton.jit
def merge_kernel(
    num, top, den, top_b, all_num, all_top, all_den, all_top_b, out, lse, count, rows,
    SPLITS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds up the `count` splits of one row: into out and its log-sum-exp, or, where out is None, into sums and their maxima again."""
    row = tl.program_id(0).to(tl.int64)
    first, d, one = row // rows * count * rows + row % rows, tl.arange(0, BLOCK_D), tl.arange(0, 1)
    best = tl.full((1,), float("-inf"), tl.float32)
    best_b, total, acc = best, tl.zeros((1,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    for s in range(0, count, SPLITS):
        i = s + tl.arange(0, SPLITS)
        part = first + i * rows
        tops = tl.load(top + part, mask=i < count, other=float("-inf"))
        weight, best, shrink = weights(tops, best)
        if num is not None:
            x = tl.load(num + part[:, None] * D + d[None], mask=(tops > float("-inf"))[:, None] & (d < D)[None], other=0)
            acc = acc * shrink + tl.sum(x * weight[:, None], 0)
        if top_b is not None:
            weight, best_b, shrink = weights(tl.load(top_b + part, mask=i < count, other=float("-inf")), best_b)
        total = total * shrink + tl.sum(tl.load(den + part, mask=i < count, other=0) * weight, 0)
    if out is not None:
        some = total > 0
        divisor = tl.where(some, total, 1.0)
        tl.store(lse + row + one, tl.where(some, best + tl.log(divisor), float("-inf")))
        tl.store(out + row * D + d, rounded(acc / divisor, out.dtype.element_ty), mask=d < D)
    else:
        tl.store(all_top + row + one, best)
        tl.store(all_den + row + one, total)
        if top_b is not None:
            tl.store(all_top_b + row + one, best_b)
        if num is not None:
            tl.store(all_num + row * D + d, acc, mask=d < D)


@triton.jit
def weights(tops, best):
    """exp(tops - the new maximum), the new maximum (1,), and what sums so far must be multiplied with."""
    new = tl.maximum(best, tl.max(tops, 0))
    base = tl.where(new > float("-inf"), new, 0.0)
    return tl.exp(tops - base), new, tl.exp(best - base)


# Launching


MERGING = Options(2)


def options(size: Blocks, dtype: torch.dtype, apart: bool) -> Options:
    """Without a limit of registers ptxas spills a few bytes to fit more blocks in: of float32, of a and b apart, of 32 rows of heads that
    are padded to 128."""
    many = dtype == torch.float32 or apart or (size.M == 32 and size.D == 128)
    return Options(size.warps, registers=255 if many else None)


def run(
    q: Tensor,
    q_pos: Tensor,
    k: Tensor,
    v: Tensor | None,
    pos: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    spans: Tensor | None,
    slots: int,
    window: int,
    divide: bool,
) -> Any:
    """Both stages. k (B, G, S, D) and what belongs to it, or with spans (P PAGE, D); `slots` are those of the longest head. divide: out and
    its log-sum-exp, else num (B G, 1, R T, D), max_num, den, max_den (B G, 1, R T); None where there is no such thing."""
    check(q, q_pos, k, v, pos, a, b, spans)
    B, H, T, D = q.shape
    heads = B * k.shape[1] if spans is None else len(spans)
    G, R = heads // B, H * B // heads
    if q.dtype not in TYPES or not q.dtype.is_floating_point or any(t is not None and t.dtype != q.dtype for t in (k, v)):
        raise RuntimeError(f"slot_attention: keys and values must have the queries' dtype, bfloat16, float16 or float32; q is {q.dtype}")
    if D > WIDEST or H % G or q_pos.shape != (B, T):
        raise RuntimeError(f"slot_attention: q {tuple(q.shape)}, q_pos {tuple(q_pos.shape)}, {G} key/value heads, size at most {WIDEST}")
    q, q_pos = q.contiguous(), q_pos.contiguous()
    k, pos = rows_together(k), rows_together(pos)
    v, a, b = (None if t is None else rows_together(t) for t in (v, a, b))
    size = blocks(D, q.dtype, R * T)
    count = splits(heads, tiles := triton.cdiv(R * T, size.M), slots)

    def new(*shape: int, needed: bool = True, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device=q.device) if needed else None

    def sums(count: int, needed: bool) -> list[Tensor | None]:
        part = (heads, count, R * T)
        return [new(*part, D, needed=needed and v is not None), *(new(*part, needed=x) for x in (needed, needed, needed and b is not None))]

    parts = sums(count, count > 1 or not divide)
    out, lse = new(*q.shape, needed=divide, dtype=q.dtype), new(*q.shape[:3], needed=divide)
    if spans is None:
        rows = (B, G, slots)
        steps = (*strides(k, rows), *strides(v, rows), *strides(pos, (B, G)), *strides(a, (B, G)), *strides(b, (B, G)))
    else:
        assert v is not None
        steps = (0, 0, k.stride(0), 0, 0, v.stride(0), *[0] * 6)
    launch(
        slot_attention_kernel, (tiles, count, heads), q.device, options(size, q.dtype, b is not None),
        q, q_pos, k, v, pos, a, b, spans, *parts, out, lse,
        *steps, G, T, R, slots, min(window or NONE, NONE), D**-0.5,
        PAGE=PAGE, D=D, M=size.M, N=size.N, BLOCK_D=size.D,
    )  # fmt: skip
    if count > 1:
        whole = sums(1, not divide)
        launch(
            merge_kernel, (heads * R * T,), q.device, MERGING, *parts, *whole, out, lse, count, R * T,
            SPLITS=SPLITS, D=D, BLOCK_D=size.D,
        )  # fmt: skip
        parts = whole
    return (out, lse) if divide else parts


@op("slot_attention_triton")
def _slot_attention(q: Tensor, q_pos: Tensor, k: Tensor, v: Tensor, pos: Tensor, a: Tensor | None, window: int) -> tuple[Tensor, Tensor]:
    return run(q, q_pos, k, v, pos, a, None, None, k.shape[2], window, divide=True)


@op("page_attention_triton")
def _page_attention(
    q: Tensor, q_pos: Tensor, k: Tensor, v: Tensor, pos: Tensor, a: Tensor, spans: Tensor, longest: int, window: int
) -> tuple[Tensor, Tensor]:
    k, v, pos, a = (t.flatten(0, 1) for t in (k, v, pos, a))
    return run(q, q_pos, k, v, pos, a, None, spans, longest * PAGE, window, divide=True)


@op("slot_parts_triton")
def _slot_parts(
    q: Tensor, q_pos: Tensor, k: Tensor, v: Tensor | None, pos: Tensor, a: Tensor | None, b: Tensor | None, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num, top, den, top_b = run(q, q_pos, k, v, pos, a, b, None, k.shape[2], window, divide=False)
    num = q.new_empty(*q.shape[:3], 0, dtype=torch.float32) if num is None else num.view(q.shape)
    top, den = top.view(q.shape[:3]), den.view(q.shape[:3])
    return num, top, den, top.clone() if top_b is None else top_b.view(q.shape[:3])  # an operator's outputs share no memory


@_slot_attention.register_fake
@_page_attention.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@_slot_parts.register_fake
def _(q: Tensor, q_pos: Tensor, k: Tensor, v: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    num = q.new_empty(*q.shape[:3], 0 if v is None else q.shape[3], dtype=torch.float32)
    return num, *(q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(3))


def slot_attention(q: Tensor, q_pos: Tensor, slots: Any) -> tuple[Tensor, Tensor]:
    """q (B, H, T, D) at q_pos (B, T), `Slots` -> out (B, H, T, D) in q's dtype, 0 where nothing is seen, and the log-sum-exp (B, H, T)
    float32, -inf there. Raises RuntimeError for separate denominator weights, which one softmax cannot hold."""
    if slots.b is not None:
        raise RuntimeError("slot_attention cannot weigh numerator and denominator apart; slot_parts can")
    return torch.ops.zoo.slot_attention_triton(q, q_pos, slots.k, slots.v, slots.pos.to(torch.int32), slots.a, slots.window or 0)


def page_attention(q: Tensor, q_pos: Tensor, slots: Any, spans: Tensor) -> tuple[Tensor, Tensor]:
    """The same for `PagedSlots`. spans (B G, 3) int32: a head's first page, how many it owns, where they begin in the list of pages."""
    return torch.ops.zoo.page_attention_triton(
        q, q_pos, slots.k, slots.v, slots.pos, slots.a, spans, slots.table.shape[1], slots.window or 0
    )


def slot_parts(q: Tensor, q_pos: Tensor, slots: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`slots.slot_parts` -> num (B, H, T, D), max_num, den, max_den (B, H, T), all float32. Values without a dimension are not read."""
    v = slots.v if slots.v.shape[3] else None
    return torch.ops.zoo.slot_parts_triton(q, q_pos, slots.k, v, slots.pos.to(torch.int32), slots.a, slots.b, slots.window or 0)


# What ships


def shipped() -> Iterator[Shipped]:
    """Every configuration for the head sizes in HEADS: dtypes, tiles, and what is given beside keys; a single token's, where there is an
    output, in the tile that it mostly has."""
    floats = ("a", "b", "num", "top", "den", "top_b", "lse", "all_num", "all_top", "all_den", "all_top_b")
    numbers = ["kb", "kg", "ks", "vb", "vg", "vs", "pb", "pg", "ab", "ag", "bb", "bg", "G", "T", "R", "S", "window", "count", "rows"]
    types = dict.fromkeys(numbers, "i32") | dict.fromkeys(floats, "*fp32")
    types |= {"scale": "fp32", "q_pos": "*i64", "pos": "*i32", "spans": "*i32"}
    absent = {  # what is None; parts have no output
        "dense": ("a", "b", "spans", "top_b"),
        "dense, a": ("b", "spans", "top_b"),
        "pages": ("b", "top_b"),
        "parts": ("a", "b", "spans", "top_b", "out", "lse"),
        "parts, a": ("b", "spans", "top_b", "out", "lse"),
        "parts, a and b": ("spans", "out", "lse"),
        "parts, a, keys only": ("v", "b", "spans", "num", "top_b", "out", "lse"),
    }
    sums = ("all_num", "all_top", "all_den", "all_top_b")
    merged = {"out": ("top_b", *sums), "sums": ("top_b", "all_top_b", "out", "lse"), "sums, a and b": ("out", "lse")}
    merged["sums, keys only"] = ("num", "all_num", *merged["sums"])
    for D, dtype in itertools.product(HEADS, (torch.bfloat16, torch.float16, torch.float32)):
        given = types | dict.fromkeys(("q", "k", "v", "out"), f"*{TYPES[dtype]}")
        for size in dict.fromkeys(blocks(D, dtype, rows) for rows in (16, 32, 128)):
            sizes = {"PAGE": PAGE, "D": D, "M": size.M, "N": size.N, "BLOCK_D": size.D}
            for name, none in absent.items():
                aligned, constants = frozenset(("kb", "kg", "ks", "vb", "vg", "vs")), sizes | dict.fromkeys(none)
                for step in ({}, {"T": 1}) if size.M == 16 and "out" not in none else ({},):
                    about = f"{TYPES[dtype]}, D {D}, {size.M} rows, {name}{', one token' * len(step)}"
                    yield Shipped(slot_attention_kernel, about, given, constants | step, options(size, dtype, "b" not in none), aligned)
        for name, none in merged.items():
            if name == "out" or dtype == torch.float32:  # sums are always float32
                sizes = {"SPLITS": SPLITS, "D": D, "BLOCK_D": size.D}
                yield Shipped(merge_kernel, f"{TYPES[dtype]}, D {D}, {name}", given, sizes | dict.fromkeys(none), MERGING)
