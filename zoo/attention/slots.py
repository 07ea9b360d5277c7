"""The one formula. A cache holds slots; slot j has a key k_j, a value v_j, log-weights a_j (numerator), b_j (denominator) and a position:

    out(q) = sum_j exp(s q.k_j + a_j) v_j  /  sum_j exp(s q.k_j + b_j)          s = 1/sqrt(D)

Exact attention: a = b = 0. A cluster of n tokens shown by one key and one value: a = b = log n. An empty slot has position -1 and
weighs nothing. A query with no slot at all gets out = 0.

Letters: B batch, T new tokens, H query heads, G key/value heads (R = H/G query heads share one), D head size, S slots.

`slot_attention` below is the definition of correct: readable, in float32 (float64 for float64 inputs). `sdpa` is the same function through
PyTorch's fused kernel. A sum over slots can be taken in parts: each part is carried unnormalised with its own maxima, `merge` adds two,
`finish` divides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ZooError


@dataclass(frozen=True)
class Slots:
    """What a query reads.

    k, v (B, G, S, D); pos (B, G, S) or (B, 1, S), int, -1 = empty; a, b (B, G, S) float32, or None: a = 0, b = a. `window` W hides
    positions <= q_pos - W, so that W keys are seen including the query's own.
    """

    k: Tensor
    v: Tensor
    pos: Tensor
    a: Tensor | None = None
    b: Tensor | None = None
    window: int | None = None


class Parts(NamedTuple):
    """An unnormalised sum over slots: num (B, G, R, T, D) is scaled by exp(-max_num), den (B, G, R, T) by exp(-max_den)."""

    num: Tensor
    max_num: Tensor
    den: Tensor
    max_den: Tensor


def visible(q_pos: Tensor, slots: Slots) -> Tensor:
    """(B, G or 1, T, S) bool: which slots a query at q_pos (B, T) may see. Positions are compared, never indices."""
    q, s = q_pos[:, None, :, None], slots.pos[:, :, None, :]
    seen = (s >= 0) & (s <= q)
    return seen if slots.window is None else seen & (s > q - slots.window)


def scores(q: Tensor, q_pos: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
    """s q.k_j of every query head and slot, (B, G, R, T, S), and which are visible, broadcastable to it."""
    B, _, T, D = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    q = q.to(wide).view(B, slots.k.shape[1], -1, T, D)  # query head h reads kv head h // R
    return q @ slots.k.to(wide)[:, :, None].mT * D**-0.5, visible(q_pos, slots)[:, :, None]


def slot_parts(q: Tensor, q_pos: Tensor, slots: Slots) -> Parts:
    """The formula's two sums over `slots` for q (B, H, T, D) at q_pos (B, T)."""
    score, seen = scores(q, q_pos, slots)
    score = score.masked_fill(~seen, -torch.inf)

    def exponentials(logweight: Tensor | None) -> tuple[Tensor, Tensor]:
        x = score if logweight is None else score + logweight[:, :, None, None]
        top = x.amax(-1) if x.shape[-1] else x.new_full(x.shape[:-1], -torch.inf)
        # Where nothing is visible the maximum is -inf; 0 in its place keeps exp(-inf - max) = 0 instead of NaN.
        return (x - top.where(top > -torch.inf, 0)[..., None]).exp(), top

    e, max_num = exponentials(slots.a)
    num = e @ slots.v.to(e.dtype)[:, :, None]
    f, max_den = (e, max_num) if slots.b is None else exponentials(slots.b)
    return Parts(num, max_num, f.sum(-1), max_den)


def merge(x: Parts, y: Parts) -> Parts:
    """The parts of two disjoint sets of slots -> the parts of their union."""

    def scale(top: Tensor, old: Tensor) -> Tensor:
        return (old - top.where(top > -torch.inf, 0)).exp()

    top_num, top_den = torch.maximum(x.max_num, y.max_num), torch.maximum(x.max_den, y.max_den)
    return Parts(
        x.num * scale(top_num, x.max_num)[..., None] + y.num * scale(top_num, y.max_num)[..., None],
        top_num,
        x.den * scale(top_den, x.max_den) + y.den * scale(top_den, y.max_den),
        top_den,
    )


def finish(parts: Parts, dtype: torch.dtype) -> Tensor:
    """Parts -> out (B, H, T, D). Without any denominator the output is 0."""
    ratio = (parts.max_num - parts.max_den).exp()[..., None]  # 1 where a = b
    out = torch.where(parts.den[..., None] > 0, ratio * parts.num / parts.den[..., None], 0)
    B, G, R, T, D = out.shape
    return out.view(B, G * R, T, D).to(dtype)


def slot_attention(q: Tensor, q_pos: Tensor, slots: Slots, mass: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """out (B, H, T, D) in q's dtype for q (B, H, T, D) at q_pos (B, T) int64; a padded query (-1) gets 0.

    mass=True also returns the probability (by denominator weight) that each slot received, summed over queries and over the group's
    query heads: (B, G, S) float32.
    """
    parts = slot_parts(q, q_pos, slots)
    out = finish(parts, q.dtype)
    if not mass:
        return out
    score, seen = scores(q, q_pos, slots)
    logweight = slots.a if slots.b is None else slots.b
    score = score if logweight is None else score + logweight[:, :, None, None]
    top = parts.max_den.where(parts.max_den > -torch.inf, 0)[..., None]
    prob = torch.where(seen, (score - top).exp(), 0) / parts.den.where(parts.den > 0, 1)[..., None]
    return out, prob.sum((2, 3))


def sdpa(q: Tensor, q_pos: Tensor, slots: Slots) -> Tensor:
    """`slot_attention` through F.scaled_dot_product_attention: never a T x S matrix of scores in float32 beside the mask.

    The R query heads of a group are folded into rows, so that keys and values are read once per kv head and never repeated.
    Raises ZooError for slots with separate denominator weights, which one softmax cannot hold.
    """
    if slots.b is not None:
        raise ZooError("backend 'sdpa' cannot weigh numerator and denominator apart; use backend 'eager'")
    B, H, T, D = q.shape
    G, S = slots.k.shape[1:3]
    seen = visible(q_pos, slots)
    bias: Tensor = seen
    if slots.a is not None:
        bias = torch.where(seen, slots.a[:, :, None].to(torch.promote_types(q.dtype, torch.float32)), -torch.inf)
    bias = bias[:, :, None].expand(B, bias.shape[1], H // G, T, S).reshape(B, -1, H // G * T, S)
    out = F.scaled_dot_product_attention(q.reshape(B, G, -1, D), slots.k, slots.v, attn_mask=bias)
    # A query that sees nothing gets 0 by the formula; the kernels disagree among themselves about that case.
    return out.view(B, H, T, D) * (q_pos >= 0)[:, None, :, None]


BACKENDS: dict[str, Any] = {"eager": slot_attention, "sdpa": sdpa}


def attention(q: Tensor, q_pos: Tensor, slots: Slots, backend: str = "auto") -> Tensor:
    """`slot_attention`, computed by the backend of that name. `auto`: the formula itself in a compiled step, which Inductor fuses into two
    passes over the slots, and for separate weights; else SDPA."""
    if backend == "auto":
        one_compiled = q.shape[2] == 1 and torch.compiler.is_compiling()
        backend = "eager" if one_compiled or slots.b is not None else "sdpa"
    return BACKENDS[backend](q, q_pos, slots)
