"""The nearest of a head's centres for each of its points, and what clusters add up to: counts, weights, sums of keys and of values.

    label_i = the lowest j with |x_i - c_j|^2 <= min_j |x_i - c_j|^2 + tie, or -1 where the minimum is above `limit`
    count_j = sum n_i,  weight_j = sum w_i,  keys_j = sum w_i k_i,  values_j = sum w_i v_i        over the i with label j

Squared distances are sums of squared differences in float32, times a scale per dimension where one is given: not |x|^2 + |c|^2 - 2 x.c,
whose rounding tells equal points apart. Two passes behind one operator. `assign`: a program holds a block of points and goes through the
head's centres, skipping blocks of which none is alive. `add_up`: a program owns a block of centres and goes through the points in order:
it reads labels, and keys and values only of blocks where one of its own occurs; a product with the matrix of (label_i = j) w_i adds them
up. No atomics: the same bits every time.

Letters: A layers times sequences, G heads, N points of a head, F features of a point, M centres of the head that has most, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from zoo.kernels import launch
from zoo.kernels.launch import TYPES, Options, Shipped


class Sums(NamedTuple):
    """What each centre's points add up to, float32: counts, weights (A, G, M), keys, values (A, G, M, D)."""

    counts: Tensor
    weights: Tensor
    keys: Tensor
    values: Tensor


@triton.jit
def distances(x, centres, scale, valid, head, i, j, N, M, F: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """Squared distances (BLOCK_I, BLOCK_J) float32 from points i to centres j of a head; inf where a centre is not alive."""
    d = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    for f in range(F):
        point = tl.load(x + (head * N + i) * F + f, mask=i < N, other=0).to(tl.float32)
        centre = tl.load(centres + (head * M + j) * F + f, mask=j < M, other=0).to(tl.float32)
        apart = point[:, None] - centre[None, :]
        d += apart * apart if scale is None else tl.load(scale + head * F + f) * apart * apart
    return tl.where((tl.load(valid + head * M + j, mask=j < M, other=0) != 0)[None, :], d, float("inf"))


@triton.jit
def assign(
    x, centres, alive, valid, scale, tie, limit, label, dist, N, M,
    F: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_I points of one head, all of its centres."""
    head = tl.program_id(1).to(tl.int64)
    i, offset = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_J)
    least, which = tl.full([BLOCK_I], float("inf"), tl.float32), tl.full([BLOCK_I], -1, tl.int32)
    here = tl.load(alive + head * N + i, mask=i < N, other=0) != 0
    for start in range(0, M, BLOCK_J):
        j = start + offset
        if tl.max(tl.load(valid + head * M + j, mask=j < M, other=0).to(tl.int32), 0) > 0:
            d = distances(x, centres, scale, valid, head, i, j, N, M, F, BLOCK_I, BLOCK_J)
            low = tl.min(d, 1)
            if tie is None:
                first = tl.min(tl.where(d == low[:, None], j[None, :], M), 1)
                which = tl.where(low < least, first, which)
            least = tl.minimum(least, low)
    if tie is not None:  # again, now that the minimum is known: the lowest that is as near but for rounding
        bound = least + tl.load(tie + head)
        which = tl.full([BLOCK_I], 2147483647, tl.int32)
        for start in range(0, M, BLOCK_J):
            j = start + offset
            if tl.max(tl.load(valid + head * M + j, mask=j < M, other=0).to(tl.int32), 0) > 0:
                d = distances(x, centres, scale, valid, head, i, j, N, M, F, BLOCK_I, BLOCK_J)
                which = tl.minimum(which, tl.min(tl.where(d <= bound[:, None], j[None, :], 2147483647), 1))
    near = here & (least < float("inf"))
    if limit is not None:
        near = near & (least <= tl.load(limit + head))
    tl.store(label + head * N + i, tl.where(near, which, -1), mask=i < N)
    tl.store(dist + head * N + i, tl.where(here, least, float("inf")), mask=i < N)


@triton.jit
def add_up(
    label, number, weight, k, v, count_sum, weight_sum, key_sum, value_sum, N, M,
    K: tl.constexpr, V: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_J centres of one head, BLOCK_D dimensions of keys and values, all points in order."""
    head, part = tl.program_id(1).to(tl.int64), tl.program_id(2)
    j, d = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J), part * BLOCK_D + tl.arange(0, BLOCK_D)
    counts, weights = tl.zeros([BLOCK_J], tl.float32), tl.zeros([BLOCK_J], tl.float32)
    keys, values = tl.zeros([BLOCK_J, BLOCK_D], tl.float32), tl.zeros([BLOCK_J, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        own = tl.load(label + head * N + i, mask=i < N, other=-1)[None, :] == j[:, None]  # (BLOCK_J, BLOCK_I)
        if tl.max(tl.max(own.to(tl.int32), 1), 0) > 0:
            w = tl.where(own, tl.load(weight + head * N + i, mask=i < N, other=0)[None, :], 0.0)
            weights += tl.sum(w, 1)
            counts += tl.sum(tl.where(own, tl.load(number + head * N + i, mask=i < N, other=0)[None, :], 0.0), 1)
            rows = head * N + i
            if K > 0:
                key = tl.load(k + (rows * K)[:, None] + d[None, :], mask=(i < N)[:, None] & (d < K)[None, :], other=0).to(tl.float32)
                keys = tl.dot(w, key, keys, input_precision="ieee")
            if V > 0:
                value = tl.load(v + (rows * V)[:, None] + d[None, :], mask=(i < N)[:, None] & (d < V)[None, :], other=0).to(tl.float32)
                values = tl.dot(w, value, values, input_precision="ieee")
    own_rows = head * M + j
    if part == 0:
        tl.store(count_sum + own_rows, counts, mask=j < M)
        tl.store(weight_sum + own_rows, weights, mask=j < M)
    if K > 0:
        tl.store(key_sum + (own_rows * K)[:, None] + d[None, :], keys, mask=(j < M)[:, None] & (d < K)[None, :])
    if V > 0:
        tl.store(value_sum + (own_rows * V)[:, None] + d[None, :], values, mask=(j < M)[:, None] & (d < V)[None, :])


OPTIONS = Options(4)  # of both


def tiling(size: int) -> dict[str, int]:
    """Block sizes of `assign`, whose accumulator is a tile of distances."""
    return {"F": size, "BLOCK_I": 32, "BLOCK_J": 32}


def adding(K: int, V: int) -> dict[str, int]:
    """Block sizes of `add_up`, whose accumulators are two tiles of sums."""
    return {"K": K, "V": V, "BLOCK_I": 16, "BLOCK_J": 32, "BLOCK_D": 32}


def labels(
    x: Tensor, centres: Tensor, alive: Tensor, valid: Tensor, scale: Tensor | None, tie: Tensor | None, limit: Tensor | None
) -> tuple[Tensor, Tensor]:
    A, G, N, F = x.shape
    label = torch.empty(A, G, N, dtype=torch.int32, device=x.device)
    dist = torch.empty(A, G, N, dtype=torch.float32, device=x.device)
    if label.numel():
        sizes = tiling(F)
        launch.launch(
            assign, (triton.cdiv(N, sizes["BLOCK_I"]), A * G), x.device, OPTIONS,
            x, centres, alive, valid, scale, tie, limit, label, dist, N, centres.shape[2], **sizes,
        )  # fmt: skip
    return label, dist


def like_sums(label: Tensor, clusters: int, k: Tensor | None, v: Tensor | None) -> Sums:
    """Unwritten."""
    shapes = ((), (), *((0 if t is None else t.shape[3],) for t in (k, v)))
    return Sums(*(torch.empty(*label.shape[:2], clusters, *s, dtype=torch.float32, device=label.device) for s in shapes))


def sums(label: Tensor, clusters: int, number: Tensor, weight: Tensor, k: Tensor | None, v: Tensor | None) -> Sums:
    (A, G, N), device, out = label.shape, label.device, like_sums(label, clusters, k, v)
    if out.counts.numel():
        K, V = out.keys.shape[3], out.values.shape[3]
        sizes = adding(K, V)
        grid = (triton.cdiv(clusters, sizes["BLOCK_J"]), A * G, max(1, triton.cdiv(max(K, V), sizes["BLOCK_D"])))
        launch.launch(add_up, grid, device, OPTIONS, label, number, weight, k, v, *out, N, clusters, **sizes)
    return out


def fits(op: str, x: Tensor, shapes: dict[str, tuple[Tensor | None, tuple[int, ...], tuple[torch.dtype, ...]]]) -> None:
    """Raises RuntimeError naming the first tensor whose shape or dtype is not the one wanted, or that does not lie in one piece."""
    launch.check(x, *(t for t, _, _ in shapes.values()))
    for name, (t, shape, dtypes) in shapes.items():
        if t is not None and (t.shape != shape or t.dtype not in dtypes or not t.is_contiguous()):
            kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise RuntimeError(f"{op}: {name} must be a contiguous {kinds} of shape {shape}; got {t.dtype} {tuple(t.shape)}")


REAL = (torch.float32, torch.bfloat16, torch.float16)

# Not by `op`: these want tensors in one piece, so that a compiled step must hand them over as they were traced.


@torch.library.custom_op("zoo::nearest_triton", mutates_args=())
def nearest(
    x: Tensor, centres: Tensor, alive: Tensor, valid: Tensor,
    scale: Tensor | None = None, tie: Tensor | None = None, limit: Tensor | None = None,
    number: Tensor | None = None, weight: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x (A, G, N, F), centres (A, G, M, F) of one dtype; alive (A, G, N), valid (A, G, M) bool, all contiguous -> label (A, G, N) int32, -1
    where a point is not alive or no centre near enough; dist (A, G, N) float32, the least squared distance, inf where there is none; and
    what each centre's points add up to (`Sums`), float32, empty unless number and weight (A, G, N) float32 are given.

    scale (A, G, F), tie and limit (A, G) float32, all in units of squared distances; k and v (A, G, N, K or V), what is added up. Raises
    RuntimeError for shapes and dtypes that do not fit, and where Triton cannot run.
    """
    (A, G, N, F), M, f32, mask = x.shape, centres.shape[2], (torch.float32,), (torch.bool,)
    fits("nearest", x, {
        "x": (x, x.shape, REAL), "centres": (centres, (A, G, M, F), (x.dtype,)), "alive": (alive, (A, G, N), mask),
        "valid": (valid, (A, G, M), mask), "scale": (scale, (A, G, F), f32), "tie": (tie, (A, G), f32), "limit": (limit, (A, G), f32),
    })  # fmt: skip
    label, dist = labels(x, centres, alive, valid, scale, tie, limit)
    if number is None or weight is None:
        none = [x.new_empty(0, dtype=torch.float32) for _ in range(4)]
        return label, dist, none[0], none[1], none[2], none[3]
    found = sums(label, M, number, weight, k, v)
    return label, dist, found.counts, found.weights, found.keys, found.values


@torch.library.custom_op("zoo::cluster_sums_triton", mutates_args=())
def cluster_sums(
    label: Tensor, clusters: int, number: Tensor, weight: Tensor, k: Tensor | None = None, v: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Sums` of points by label (A, G, N) int32 below `clusters`, those of -1 left out: count and weight are sums of number and of weight
    (A, G, N) float32, keys and values sums of weight times k (A, G, N, K) and v (A, G, N, V). Raises RuntimeError as `nearest` does."""
    shape, f32 = tuple(label.shape), (torch.float32,)
    fits("cluster_sums", label, {
        "label": (label, shape, (torch.int32,)), "number": (number, shape, f32), "weight": (weight, shape, f32),
        "k": (k, (*shape, 0 if k is None else k.shape[-1]), REAL), "v": (v, (*shape, 0 if v is None else v.shape[-1]), REAL),
    })  # fmt: skip
    return sums(label, clusters, number, weight, k, v)


@nearest.register_fake
def _(
    x: Tensor, centres: Tensor, alive: Tensor, valid: Tensor,
    scale: Tensor | None = None, tie: Tensor | None = None, limit: Tensor | None = None,
    number: Tensor | None = None, weight: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    label, dist = x.new_empty(x.shape[:3], dtype=torch.int32), x.new_empty(x.shape[:3], dtype=torch.float32)
    if number is None or weight is None:
        return label, dist, *(x.new_empty(0, dtype=torch.float32) for _ in range(4))
    return label, dist, *like_sums(label, centres.shape[2], k, v)


@cluster_sums.register_fake
def _(label: Tensor, clusters: int, number: Tensor, weight: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> tuple[Tensor, ...]:
    return like_sums(label, clusters, k, v)


def shipped() -> Iterator[Shipped]:
    """Points of 16 (principal coordinates), 64 and 128 features: with ties and a limit, as `subgen:delta` asks, without, and scaled;
    sums of keys and values of 64 and 128, and of coordinates alone."""
    ints = {"N": "i32", "M": "i32"}
    for kind, optional in (("", ()), (" tie limit", ("tie", "limit")), (" scale", ("scale",))):
        for F in (16, 64, 128):
            sizes = tiling(F)
            pointers = {"x": "*fp32", "centres": "*fp32", "alive": "*i1", "valid": "*i1", "label": "*i32", "dist": "*fp32"}
            pointers |= dict.fromkeys(optional, "*fp32")
            absent = dict.fromkeys({"scale", "tie", "limit"} - set(optional))
            yield Shipped(assign, f"nearest F={F}{kind}", {**pointers, **ints}, {**sizes, **absent}, OPTIONS, aligned=frozenset(pointers))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for K, V in ((64, 64), (128, 128), (16, 0)):
            sizes = adding(K, V)
            results = ("count_sum", "weight_sum", "key_sum", "value_sum")
            pointers = {"label": "*i32", "k": f"*{TYPES[dtype]}", **dict.fromkeys(("number", "weight", *results), "*fp32")}
            pointers |= {"v": f"*{TYPES[dtype]}"} if V else {}
            name = f"nearest sums K={K} V={V} {TYPES[dtype]}"
            yield Shipped(add_up, name, {**pointers, **ints}, sizes if V else {**sizes, "v": None}, OPTIONS, aligned=frozenset(pointers))
