"""Rotary embedding of queries and keys, and the write of keys and values into their cache rows, in one pass over memory.

    left' = left cos - right sin,  right' = right cos + left sin       of the pairs (i, i + n), i < n; what lies behind 2n stays as it is
    out[b, h, t] = q',   k_store[b, g, row[b, t]] = k',   v_store[b, g, row[b, t]] = v,   pos_store[b, g, row[b, t]] = pos[b, t]

The eager path reads and writes q and k once to turn them, k and v once more to store them; here each number is read once and written once.
Products and sums are float32, each rounded by itself (no fused multiply-add), and the result once: the bits of `turn` in
zoo/models/layers.py. A padded token (pos -1) writes nothing.

Letters: B batch, T new tokens, H query heads, G key/value heads, D head size, n turning pairs, S rows of the store.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from zoo.kernels import launch
from zoo.kernels.launch import TYPES, Options, Shipped, op, rounded


@triton.jit
def rotate_and_store(
    q, k, v, cos, sin, pos, row, out, k_store, v_store, pos_store, a, mass, spikes,
    T, H, pos_heads,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, angle_b, angle_t,
    ks_b, ks_h, vs_b, vs_h, ps_b, ps_h, a_b, a_h, mass_b, mass_h, spikes_b, spikes_h,
    D: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T tokens of one query head (head < H) or of one key/value head."""
    t, head, b = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.program_id(1), tl.program_id(2).to(tl.int64)
    live, t = t < T, t.to(tl.int64)
    pair = tl.arange(0, BLOCK_N)
    if head < H:
        source = q + b * q_b + head.to(tl.int64) * q_h + t * q_t
        target = out + ((b * H + head) * T + t) * D
        keep = live
    else:
        g = (head - H).to(tl.int64)
        at = tl.load(pos + b * T + t, mask=live, other=-1)
        where = tl.load(row + b * T + t, mask=live, other=0)
        keep = live & (at >= 0)
        source = k + b * k_b + g * k_h + t * k_t
        target = k_store + b * ks_b + g * ks_h + where * D
        dim = tl.arange(0, BLOCK_D)
        whole = keep[:, None] & (dim < D)[None, :]
        value = tl.load(v + (b * v_b + g * v_h + t * v_t)[:, None] + dim[None, :], mask=whole)
        tl.store(v_store + (b * vs_b + g * vs_h + where * D)[:, None] + dim[None, :], value, mask=whole)
        if g < pos_heads:
            tl.store(pos_store + b * ps_b + g * ps_h + where, at.to(tl.int32), mask=keep)
        zero = tl.zeros([BLOCK_T], tl.float32)
        if a is not None:
            tl.store(a + b * a_b + g * a_h + where, zero, mask=keep)
        if mass is not None:
            tl.store(mass + b * mass_b + g * mass_h + where, zero, mask=keep)
        if spikes is not None:
            tl.store(spikes + b * spikes_b + g * spikes_h + where, zero, mask=keep)
    both = keep[:, None] & (pair < N)[None, :]
    angle = (b * angle_b + t * angle_t)[:, None] + pair[None, :]
    c, s = tl.load(cos + angle, mask=both), tl.load(sin + angle, mask=both)
    left = tl.load(source[:, None] + pair[None, :], mask=both).to(tl.float32)
    right = tl.load(source[:, None] + pair[None, :] + N, mask=both).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(target[:, None] + pair[None, :], rounded(left * c - right * s, dtype), mask=both)
    tl.store(target[:, None] + pair[None, :] + N, rounded(right * c + left * s, dtype), mask=both)
    if D > 2 * N:
        rest = 2 * N + tl.arange(0, BLOCK_REST)
        some = keep[:, None] & (rest < D)[None, :]
        tl.store(target[:, None] + rest[None, :], tl.load(source[:, None] + rest[None, :], mask=some), mask=some)


def tiling(D: int, n: int, T: int) -> tuple[dict[str, int], Options]:
    """Block sizes for heads of D dimensions of which 2n turn and T new tokens, and options. About 1,024 numbers a program."""
    wide = triton.next_power_of_2
    block = 1 if T == 1 else max(1, 1024 // wide(D))
    sizes = {"D": D, "N": n, "BLOCK_T": block, "BLOCK_N": wide(n), "BLOCK_REST": wide(max(1, D - 2 * n)), "BLOCK_D": wide(D)}
    return sizes, Options(1 if block == 1 else 4, fused=False)


@op("rotary_store_triton", mutates=("k_store", "v_store", "pos_store", "a", "mass", "spikes"))
def rotary_store(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, pos: Tensor, row: Tensor,
    k_store: Tensor, v_store: Tensor, pos_store: Tensor,
    a: Tensor | None = None, mass: Tensor | None = None, spikes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """q (B, H, T, D) rotated, contiguous; k, v (B, G, T, D), k rotated, written into rows (B, T) int64 of the store.

    cos, sin (B or 1, 1, T, n) float32; pos (B, T) int64, -1 = padding, which writes nothing. The store is that of SlotStore: k_store,
    v_store (B, G, S, D) in q's dtype, pos_store (B, G or 1, S) int32; a, mass, spikes (B, G, S) float32 get 0 where they are there. Any
    strides, but the last dimension (of stores: the last two) lies in one piece. Raises RuntimeError for shapes and dtypes that do not fit,
    and where Triton cannot run.
    """
    (B, H, T, D), G, n = q.shape, k.shape[1], cos.shape[-1]
    launch.check(q, k, v, cos, sin, pos, row, k_store, v_store, pos_store, a, mass, spikes)
    beside = [x for x in (a, mass, spikes) if x is not None]
    if not (k.shape == v.shape == (B, G, T, D) and pos.shape == row.shape == (B, T) and 0 < 2 * n <= D):
        raise RuntimeError(f"rotary_store: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} and positions do not fit one another")
    rows = k_store.shape[2]
    if not (k_store.shape == v_store.shape == (B, G, rows, D) and pos_store.shape in ((B, G, rows), (B, 1, rows))) or any(
        x.shape != (B, G, rows) or x.dtype != torch.float32 for x in beside
    ):
        raise RuntimeError(f"rotary_store: a store of {tuple(k_store.shape)} does not fit {G} heads of {D} dimensions, or its own parts")
    if not (q.dtype == k.dtype == v.dtype == k_store.dtype == v_store.dtype):
        raise RuntimeError(f"rotary_store: q, k, v and the store must have one dtype; got {q.dtype}, {k.dtype}, {v.dtype}, {k_store.dtype}")
    if (cos.dtype, sin.dtype, pos.dtype, row.dtype, pos_store.dtype) != (*[torch.float32] * 2, *[torch.int64] * 2, torch.int32):
        raise RuntimeError("rotary_store: cos and sin must be float32, positions and rows int64, the store's positions int32")
    if any(x.stride(2) != D or x.stride(3) != 1 for x in (k_store, v_store)) or any(x.stride(-1) != 1 for x in (pos_store, *beside)):
        raise RuntimeError("rotary_store: the rows of a store must lie one after the other")
    q, k, v, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, cos, sin))
    cos, sin = cos.expand(B, 1, T, n), sin.expand(B, 1, T, n)
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty(B, H, T, D, dtype=q.dtype, device=q.device)
    sizes, options = tiling(D, n, T)
    launch.launch(
        rotate_and_store, (triton.cdiv(T, sizes["BLOCK_T"]), H + G, B), q.device, options,
        q, k, v, cos, sin, pos.contiguous(), row.contiguous(), out, k_store, v_store, pos_store, a, mass, spikes,
        T, H, pos_store.shape[1],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], cos.stride(0), cos.stride(2),
        *k_store.stride()[:2], *v_store.stride()[:2], *pos_store.stride()[:2],
        *(n for x in (a, mass, spikes) for n in ((0, 0) if x is None else x.stride()[:2])),
        **sizes,
    )  # fmt: skip
    return out


@rotary_store.register_fake
def _(q: Tensor, *rest: Tensor | None) -> Tensor:
    return q.new_empty(q.shape)


def shipped() -> Iterator[Shipped]:
    """Heads that turn whole and by a quarter; one new token into a store with masses, many into one without."""
    strides = {name: "i32" for name in rotate_and_store.arg_names if name[-2:] in ("_b", "_h", "_t")}
    beside = ("a", "mass", "spikes")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        pointers = dict.fromkeys(("q", "k", "v", "out", "k_store", "v_store"), f"*{TYPES[dtype]}")
        pointers |= {"cos": "*fp32", "sin": "*fp32", "pos": "*i64", "row": "*i64", "pos_store": "*i32"}
        for D, n in ((64, 32), (80, 40), (80, 10), (96, 48), (128, 64), (256, 128)):
            for T, full in ((1, True), (512, False)):
                sizes, options = tiling(D, n, T)
                extra = dict.fromkeys(beside, "*fp32") if full else {}
                constants = (sizes if full else sizes | dict.fromkeys(beside)) | ({"T": 1} if T == 1 else {})
                name = f"rotary_store D={D} n={n} {TYPES[dtype]} T={'1' if T == 1 else 'many'}"
                of_n = n % 16 == 0  # strides are multiples of D, those of angles of n
                rows = {x for x in strides if x[:2] in ("q_", "k_", "v_", "ks", "vs") or (x[:5] == "angle" and of_n)}
                yield Shipped(
                    rotate_and_store, name, {**pointers, **extra, "T": "i32", "H": "i32", "pos_heads": "i32", **strides},
                    constants, options, frozenset({*pointers, *extra, *rows}),
                )  # fmt: skip
