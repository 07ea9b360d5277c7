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

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ZooError

PAGE = 32  # rows of a page


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


@dataclass(frozen=True)
class PagedSlots:
    """Slots of heads that own different numbers of them, in pages of PAGE rows (zoo/attention/store.py).

    k, v (P, PAGE, D), pos, a (P, PAGE): an arena of pages. `pages` (N,) are those read here, `owner` (N,) the head b G + g of each, and
    `table` (B G, J) where in that list each head's pages stand; lists are padded with a page whose positions are all -1. `spans` says the
    same as ranges: head -> (first page, pages), contiguous; `views`, where given, what `show` makes of them.
    """

    k: Tensor
    v: Tensor
    pos: Tensor
    a: Tensor
    pages: Tensor
    owner: Tensor
    table: Tensor
    spans: Sequence[tuple[int, int]] = ()
    views: Sequence[tuple[int, Tensor, Tensor, Tensor, Tensor]] | None = None
    window: int | None = None

    def parts(self, q: Tensor, q_pos: Tensor) -> Parts:
        return paged_parts(q, q_pos, self)

    def mass(self, q: Tensor, q_pos: Tensor, whole: Parts, queries: Tensor | None = None, power: int = 1) -> Tensor:
        return paged_mass(q, q_pos, self, whole, queries, power)


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


def finite(top: Tensor) -> Tensor:
    """A maximum to subtract: 0 in place of -inf, so that exp(-inf - max) is 0 and not NaN where nothing is visible."""
    return top.where(top > -torch.inf, 0)


def grouped(q: Tensor, heads: int) -> Tensor:
    """q (B, H, T, D) -> (B, G, R, T, D), at least float32: query head h reads kv head h // R."""
    B, _, T, D = q.shape
    return q.to(torch.promote_types(q.dtype, torch.float32)).view(B, heads, -1, T, D)


def slot_scores(q: Tensor, q_pos: Tensor, slots: Slots) -> Tensor:
    """s q.k_j of every query head and slot, (B, G, R, T, S), -inf where a query may not see."""
    q = grouped(q, slots.k.shape[1])
    score = q @ slots.k.to(q.dtype)[:, :, None].mT * q.shape[-1] ** -0.5
    return score.masked_fill(~visible(q_pos, slots)[:, :, None], -torch.inf)


def slot_parts(q: Tensor, q_pos: Tensor, slots: Slots) -> Parts:
    """The formula's two sums over `slots` for q (B, H, T, D) at q_pos (B, T)."""
    score = slot_scores(q, q_pos, slots)

    def exponentials(logweight: Tensor | None) -> tuple[Tensor, Tensor]:
        x = score if logweight is None else score + logweight[:, :, None, None]
        top = x.amax(-1) if x.shape[-1] else x.new_full(x.shape[:-1], -torch.inf)
        return (x - finite(top)[..., None]).exp(), top

    e, max_num = exponentials(slots.a)
    num = e @ slots.v.to(e.dtype)[:, :, None]
    f, max_den = (e, max_num) if slots.b is None else exponentials(slots.b)
    return Parts(num, max_num, f.sum(-1), max_den)


def paged_scores(q: Tensor, q_pos: Tensor, slots: PagedSlots) -> Tensor:
    """s q.k_j + a_j of every page read, (N, R, T, PAGE), -inf where a query may not see."""
    B, heads = q.shape[0], slots.table.shape[0]
    q = grouped(q, heads // B).flatten(0, 1)
    page, owner = slots.pages.long(), slots.owner.long()
    pos, at = slots.pos[page][:, None, None], q_pos[owner // (heads // B)][:, None, :, None]  # (N, 1, 1, PAGE), (N, 1, T, 1)
    seen = (pos >= 0) & (pos <= at)
    seen = seen if slots.window is None else seen & (pos > at - slots.window)
    score = q[owner] @ slots.k[page].to(q.dtype)[:, None].mT * q.shape[-1] ** -0.5
    return (score + slots.a[page][:, None, None]).masked_fill(~seen, -torch.inf)


def paged_parts(q: Tensor, q_pos: Tensor, slots: PagedSlots) -> Parts:
    """`slot_parts` over pages: each page is a sum of its own, and a head adds up its pages."""
    (B, _, _, D), heads, table = q.shape, slots.table.shape[0], slots.table.long()
    score = paged_scores(q, q_pos, slots)
    top = score.amax(-1)[table].amax(1)  # (B G, R, T)
    e = (score - finite(top)[slots.owner.long()][..., None]).exp()
    num, den = e @ slots.v[slots.pages.long()].to(e.dtype)[:, None], e.sum(-1)
    shape = (B, heads // B, *top.shape[1:])
    top = top.view(shape)
    return Parts(num[table].sum(1).view(*shape, D), top, den[table].sum(1).view(shape), top)


def merge(x: Parts, y: Parts) -> Parts:
    """The parts of two disjoint sets of slots -> the parts of their union."""

    def scale(top: Tensor, old: Tensor) -> Tensor:
        return (old - finite(top)).exp()

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
    return out.reshape(B, G * R, T, D).to(dtype)


def slot_mass(q: Tensor, q_pos: Tensor, slots: Slots, whole: Parts, queries: Tensor | None = None, power: int = 1) -> Tensor:
    """The probability (by denominator weight) that each of `slots` received out of `whole`, its own part or one it was merged into,
    raised to `power` and summed over queries and over the group's query heads: (B, G, S) float32. `queries` (B, T): how much each query
    counts."""
    score, logweight = slot_scores(q, q_pos, slots), slots.a if slots.b is None else slots.b
    score = score if logweight is None else score + logweight[:, :, None, None]
    prob = (power * (score - finite(whole.max_den)[..., None])).exp() * per_query(whole, queries, power)[..., None]
    return prob.sum((2, 3))


def paged_mass(q: Tensor, q_pos: Tensor, slots: PagedSlots, whole: Parts, queries: Tensor | None = None, power: int = 1) -> Tensor:
    """`slot_mass` of pages: (N, PAGE)."""
    owner = slots.owner.long()
    top, scale = finite(whole.max_den).flatten(0, 1)[owner], per_query(whole, queries, power).flatten(0, 1)[owner]
    return ((power * (paged_scores(q, q_pos, slots) - top[..., None])).exp() * scale[..., None]).sum((1, 2))


def chunk_mass(q: Tensor, q_pos: Tensor, slots: Slots, whole: Parts, powers: Sequence[int] = (1,)) -> list[Tensor]:
    """`slot_mass` of a long chunk over slots without log-weights, for powers 1 or 1 and 2: matrix products in the model's own dtype, and
    only the columns that some query may not see are masked. In bfloat16 a sum is right to about a percent."""
    (B, _, T, D), (G, S) = q.shape, slots.k.shape[1:3]
    lse = (whole.max_den + whole.den.log()).where(whole.den > 0, torch.inf)
    high = lse.clamp(max=1e4).to(q.dtype)
    rest = (lse.clamp(max=1e4) - high.to(lse.dtype)).to(q.dtype)  # two columns say -lse better than one
    left = torch.cat((q.view(B, G, -1, T, D) * D**-0.5, -high[..., None], -rest[..., None]), -1).flatten(2, 3)
    right = torch.cat((slots.k, slots.k.new_ones(B, G, S, 2)), -1)
    held = (slots.pos >= 0).any(1)  # (B, S)
    low = q_pos.where(q_pos >= 0, 2**40).amin(1)[:, None, None]
    hidden = slots.pos > low
    if slots.window is not None:
        hidden |= slots.pos <= q_pos.amax(1)[:, None, None] - slots.window
    columns = (hidden & (slots.pos >= 0)).flatten(0, 1).any(0).nonzero()
    first = int(columns[0]) if len(columns) else S
    unseen = ~visible(q_pos, Slots(slots.k, slots.v, slots.pos[:, :, first:], window=slots.window))
    weight = (q_pos >= 0).to(q.dtype)[:, None].expand(B, left.shape[2] // T, T).reshape(B, -1)
    sums = [q.new_empty(B, G, S) for _ in powers]
    # A head and 1,024 slots at a time: large enough for several threads, small enough for their caches.
    for b, g, start in itertools.product(range(B), range(G), range(0, S, 1024)):
        block = slice(start, start + 1024)
        prob = left[b, g] @ right[b, g, block].mT  # (R T, 1024): logarithms, for now
        if (end := start + prob.shape[1]) > first:
            begin = max(start, first)
            prob.unflatten(0, (-1, T))[..., begin - start :].masked_fill_(
                unseen[b, g % unseen.shape[1], :, begin - first : end - first], -torch.inf
            )
        prob.exp_()
        for i, total in enumerate(sums):
            torch.mm(weight[b, None], prob.square_() if i else prob, out=total[b, g, None, block])
    return [x.to(torch.float32).where(held[:, None], 0) for x in sums]


def per_query(whole: Parts, queries: Tensor | None, power: int) -> Tensor:
    """1 / den ** power, times how much a query counts: (B, G, R, T)."""
    scale = 1 / whole.den.where(whole.den > 0, torch.inf) ** power
    return scale if queries is None else scale * queries[:, None, None]


def slot_attention(q: Tensor, q_pos: Tensor, slots: Slots, mass: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """out (B, H, T, D) in q's dtype for q (B, H, T, D) at q_pos (B, T) int64; a padded query (-1) gets 0.

    mass=True also returns the probability (by denominator weight) that each slot received, summed over queries and over the group's
    query heads: (B, G, S) float32.
    """
    parts = slot_parts(q, q_pos, slots)
    out = finish(parts, q.dtype)
    return (out, slot_mass(q, q_pos, slots, parts)) if mass else out


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


def flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, queries: int) -> Parts:
    """One fused pass on a CPU for q (B, G, R T, D), k, v (B, G, S, D), with what is added to scores, bias (B or 1, G or 1, R T or 1, S):
    `divided` Parts. Keys and values stay in their own dtype; sums are float32."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)
    some = bias.amax(-1) > -torch.inf
    lse = lse.masked_fill(~some, -torch.inf).unflatten(2, (-1, queries))  # the kernel says 0 where nothing is seen
    return divided(out.unflatten(2, (-1, queries)), lse)


def divided(out: Tensor, lse: Tensor) -> Parts:
    """An output (B, G, R, T, D) and its log-sum-exp (B, G, R, T), as Parts whose num is the output and whose maxima are the log-sum-exp."""
    return Parts(out.to(lse.dtype), lse, (lse > -torch.inf).to(lse.dtype), lse)


def flash_slots(q: Tensor, q_pos: Tensor, slots: Slots) -> Parts:
    """`slot_parts` by `flash`. The R query heads of a group are rows, so that keys are read once."""
    B, H, T, D = q.shape
    G = slots.k.shape[1]
    seen = visible(q_pos, slots)
    bias = torch.where(seen, 0.0 if slots.a is None else slots.a[:, :, None], -torch.inf).to(torch.promote_types(q.dtype, torch.float32))
    if T > 1:
        bias = bias[:, :, None].expand(B, bias.shape[1], H // G, T, -1).reshape(B, -1, H // G * T, seen.shape[-1])
    return flash(q.reshape(B, G, -1, D), slots.k, slots.v, bias, T)


def show(
    k: Tensor, v: Tensor, a: Tensor, pos: Tensor, spans: Sequence[tuple[int, int]]
) -> list[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """The heads that hold something, out of an arena of pages: (head, k, v (1, 1, S, D), a, pos (1, 1, 1, S)), views."""
    found = []
    for head, (first, n) in enumerate(spans):
        rows = slice(first, first + n)
        if n and bool((pos[rows] >= 0).any()):
            keys, values = k[rows].flatten(0, 1)[None, None], v[rows].flatten(0, 1)[None, None]
            found.append((head, keys, values, a[rows].view(1, 1, 1, -1), pos[rows].view(1, 1, 1, -1)))
    return found


def flash_pages(q: Tensor, q_pos: Tensor, slots: PagedSlots) -> Parts:
    """`paged_parts` by `flash`, one head after the other: each reads its own contiguous pages, and nothing is padded."""
    B, H, T, D = q.shape
    heads = slots.table.shape[0]
    q = q.reshape(heads, 1, 1, -1, D)
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(heads, q.shape[3], D, dtype=q.dtype, device=q.device)
    lse = torch.full((heads, q.shape[3]), -torch.inf, dtype=wide, device=q.device)
    views = show(slots.k, slots.v, slots.a, slots.pos, slots.spans) if slots.views is None else slots.views
    for head, k, v, bias, pos in views:
        if slots.window is not None:
            at = q_pos[head * B // heads].view(1, 1, T, 1)
            bias = torch.where(pos > at - slots.window, bias, -torch.inf).repeat(1, 1, H // (heads // B), 1)
        o, top = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q[head], k, v, attn_mask=bias.to(wide))
        if slots.window is not None:
            top = top.masked_fill(~(bias > -torch.inf).any(-1), -torch.inf)  # the kernel says 0 where nothing is seen
        out[head], lse[head] = o[0, 0], top[0, 0]
    num, lse = out.to(wide).view(B, heads // B, -1, T, D), lse.view(B, heads // B, -1, T)
    lse = lse.masked_fill((q_pos < 0)[:, None, None], -torch.inf)  # a padded query sees nothing, whatever lies in the pages
    num = num * (q_pos >= 0)[:, None, None, :, None]
    return divided(num, lse)


def blend(x: Parts, y: Parts) -> Parts:
    """`merge` of two `divided` parts."""
    share = (y.max_den - x.max_den).sigmoid().nan_to_num(0.0)  # NaN where neither saw anything
    lse = torch.logaddexp(x.max_den, y.max_den)
    return Parts(torch.lerp(x.num, y.num, share[..., None]), lse, torch.maximum(x.den, y.den), lse)
