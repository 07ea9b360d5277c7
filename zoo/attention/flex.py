"""The formula through FlexAttention (`torch.nn.attention.flex_attention`): a kernel that PyTorch writes for this mask and this weighting.

    mask_mod    compares positions: empty slots, causality, a window, padding       score_mod    adds a slot's log-weight
Both read positions and log-weights as tensors, so that one compiled kernel serves every step and every length. Blocks of 128 slots that no
query of a block of 128 may see are left out; where there is one block of queries, as in a decode step, all are read, and the block mask
depends on shapes alone. Settled slots are read where they lie: the list of a head's pages is its list of blocks.

On GPUs the kernel also returns its log-sum-exp, and parts are merged by it. On CPUs PyTorch does not implement that: there `flex` is for a
single part, and the two parts of a method with a budget run as with `sdpa` (zoo/attention/tail.py).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from zoo.attention.slots import PAGE, PagedSlots, Parts, Slots, divided, paged_mass, slot_mass
from zoo.errors import ZooError

BLOCK = 128  # rows and columns of a block of the mask


def flex(q: Tensor, q_pos: Tensor, slots: Slots) -> Tensor:
    """`slot_attention` through FlexAttention. Raises ZooError for separate denominator weights, which one softmax cannot hold."""
    if slots.b is not None:
        raise ZooError("backend 'flex' cannot weigh numerator and denominator apart; use backend 'eager'")
    return dense(q, q_pos, slots, False)


def flex_slots(q: Tensor, q_pos: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
    """The same on a GPU, with the log-sum-exp (B, H, T) float32, -inf where nothing is seen."""
    return dense(q, q_pos, slots, True)


def dense(q: Tensor, q_pos: Tensor, slots: Slots, lse: bool) -> Any:
    k, v, pos, a, T = slots.k, slots.v, slots.pos, slots.a, q.shape[2]
    q, q_pos = whole_blocks(q, q_pos)
    blocks = visible_blocks(q_pos, pos, slots.window)
    out = run(attend_slots, [*((t, 2) for t in (k, v, pos, a)), (blocks[1], 3)], q, q_pos, k, v, pos, a, slots.window, *blocks, lse)
    return (out[0][:, :, :T], out[1][:, :, :T]) if lse else out[:, :, :T]


def whole_blocks(q: Tensor, q_pos: Tensor) -> tuple[Tensor, Tensor]:
    """Chunks padded to whole blocks of queries, so that few lengths are compiled (PyTorch 2.13's CPU code for an open one is wrong C++)."""
    short = -q.shape[2] % BLOCK if q.shape[2] > 1 else 0
    return (F.pad(q, (0, 0, 0, short)), F.pad(q_pos, (0, short), value=-1)) if short else (q, q_pos)


def flex_pages(q: Tensor, q_pos: Tensor, slots: PagedSlots, spans: Tensor, lse: bool = True) -> Any:
    """`flex_slots` of `PagedSlots`; spans (B G, 3) int32, of which each head's number of pages is read."""
    pages, T = slots.pages[slots.table.long()], q.shape[2]  # (B G, J): each head's own, padded with page 0
    q, q_pos = whole_blocks(q, q_pos)
    opened = [(t, 0) for t in (slots.k, slots.v, slots.pos, slots.a)] + [(pages, 1)]
    out = run(attend_pages, opened, q, q_pos, slots.k, slots.v, slots.pos, slots.a, slots.window, pages, spans[:, 1], lse)
    return (out[0][:, :, :T], out[1][:, :, :T]) if lse else out[:, :, :T]


def run(function: Any, opened: Sequence[tuple[Tensor | None, int]], *args: Any) -> Any:
    """`function`, compiled by itself unless a step is being traced. `opened`: dimensions that may grow without recompiling."""
    if torch.compiler.is_compiling():
        return function(*args)
    for t, dim in opened:
        if t is not None:
            torch._dynamo.maybe_mark_dynamic(t, dim)
    return compiled(function)(*args)


@functools.cache
def compiled(function: Any) -> Any:
    return torch.compile(function, fullgraph=True, dynamic=False, recompile_limit=64)  # type: ignore[call-overload]


def attend_slots(
    q: Tensor, q_pos: Tensor, k: Tensor, v: Tensor, pos: Tensor, a: Tensor | None, window: int | None,
    count: Tensor, which: Tensor, lse: bool,
) -> Any:  # fmt: skip
    R, shared = q.shape[1] // k.shape[1], pos.shape[1] == 1

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return seen(pos[b, 0 if shared else h // R, j], q_pos[b, i], window)

    def weigh(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score if a is None else score + a[b, h // R, j]

    return call(q, k, v, weigh, mask, count, which, (BLOCK, BLOCK), lse)


def attend_pages(
    q: Tensor, q_pos: Tensor, k: Tensor, v: Tensor, pos: Tensor, a: Tensor, window: int | None, pages: Tensor, owned: Tensor, lse: bool
) -> Any:
    """Heads are a batch, whose R query heads are its heads; all read one arena, each the blocks that its list of pages names."""
    (B, _, T, D), (heads, J), Q = q.shape, pages.shape, -(-q.shape[2] // BLOCK)
    G = heads // B

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return seen(pos[j // PAGE, j % PAGE], q_pos[b // G, i], window)

    def weigh(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + a[j // PAGE, j % PAGE]

    # Lists of blocks must be as long as there are blocks; what stands behind a head's own number is not read.
    which = F.pad(pages, (0, len(k) - J))[:, None, None].expand(heads, 1, Q, len(k)).contiguous()
    count = owned[:, None, None].expand(heads, 1, Q).contiguous()
    rows = q.reshape(heads, -1, T, D)
    out = call(rows, k.view(1, 1, -1, D), v.view(1, 1, -1, D), weigh, mask, count, which, (BLOCK, PAGE), lse)
    return (out[0].view(q.shape), out[1].view(q.shape[:3])) if lse else out.view(q.shape)


def call(q: Tensor, k: Tensor, v: Tensor, weigh: Any, mask: Any, count: Tensor, which: Tensor, size: tuple[int, int], lse: bool) -> Any:
    lengths = (q.shape[2], k.shape[2])
    blocks = BlockMask.from_kv_blocks(count, which, BLOCK_SIZE=size, mask_mod=mask, seq_lengths=lengths, compute_q_blocks=False)
    options: Any = {"BLOCK_N": size[1]} if size[1] < 64 else None  # a kernel's tile may not be wider than a block
    gqa = q.shape[1] > k.shape[1]
    if not lse:
        return flex_attention(q, k, v, weigh, blocks, enable_gqa=gqa, kernel_options=options)
    out, aux = flex_attention(q, k, v, weigh, blocks, enable_gqa=gqa, kernel_options=options, return_aux=AuxRequest(lse=True))
    return out, aux.lse


def seen(s: Tensor, at: Tensor, window: int | None) -> Tensor:
    """Whether a query at position `at` sees a slot at position s: `visible` of slots.py."""
    past = (s >= 0) & (s <= at)
    return past if window is None else past & (s > at - window)


def visible_blocks(q_pos: Tensor, pos: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """How many blocks of slots (B or 1, 1, Q) each block of queries looks at, and which, those first (B or 1, 1, Q, J): int32."""
    J = -(-pos.shape[2] // BLOCK)
    if q_pos.shape[1] <= BLOCK:
        every = torch.arange(J, dtype=torch.int32, device=pos.device)
        return torch.full((1, 1, 1), J, dtype=torch.int32, device=pos.device), every.view(1, 1, 1, J)

    def blocks(t: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest position of each block, of what is there."""
        t = F.pad(t, (0, -t.shape[-1] % BLOCK), value=-1).unflatten(-1, (-1, BLOCK))
        return torch.where(t >= 0, t, 2**31 - 1).amin(-1), t.amax(-1)

    (first_q, last_q), (first, last) = blocks(q_pos[:, None].int()), blocks(pos)
    looks = (first[:, :, None] <= last_q[..., None]) & (last[:, :, None] >= 0)  # (B, G or 1, Q, J)
    if window is not None:
        looks &= last[:, :, None] > first_q[..., None] - window
    looks = looks.any(1, keepdim=True)
    return looks.sum(-1, dtype=torch.int32), looks.int().argsort(dim=-1, descending=True, stable=True).int()


def whole(lse: Tensor, heads: int) -> Parts:
    """Parts that say as much as a log-sum-exp (B, H, T) does."""
    lse = lse.unflatten(1, (heads, -1))
    return divided(lse, lse)


def flex_mass(q: Tensor, q_pos: Tensor, slots: Slots, lse: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """FlexAttention adds up no columns: by the formula, as `slot_mass` of kernels/cpu.py gives it."""
    first, second = (slot_mass(q, q_pos, slots, whole(lse, slots.k.shape[1]), weight, power) for power in (1, 2))
    return first, second


def flex_page_mass(q: Tensor, q_pos: Tensor, slots: PagedSlots, spans: Tensor, lse: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same of pages."""
    first, second = (paged_mass(q, q_pos, slots, whole(lse, len(spans) // len(q)), weight, power) for power in (1, 2))
    return first, second
