"""The CPU kernels: against the formula in float64, against the forms they replace, and against mutants of themselves."""

from __future__ import annotations

import logging
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import write_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import make, paged, wide
from torch import Tensor
from zoo.kernels import cpu

import zoo
from zoo.attention import parse
from zoo.attention.backends import kernels_ready
from zoo.attention.clustering import TIE, rounded, ward
from zoo.attention.slots import PagedSlots, Slots, chunk_mass, finish, merge, paged_mass, paged_parts, slot_attention, slot_mass, slot_parts
from zoo.errors import ZooError
from zoo.folders import cache_folder
from zoo.models.layers import Linear

if not kernels_ready():
    pytest.skip("no C++ compiler: the CPU kernels cannot be built", allow_module_level=True)

MANY = cpu.covers(torch.device("cpu"), torch.bfloat16, 64, 1000)
few_only = pytest.mark.skipif(not MANY, reason="many rows at once need AVX-512")
SHAPES = [  # B, H, G, T, D, S
    (1, 9, 3, 1, 64, 300),
    (2, 8, 1, 1, 128, 1100),  # two chunks, eight rows
    (2, 4, 4, 3, 16, 70),
    (1, 6, 2, 5, 80, 129),
    (1, 4, 2, 1, 256, 3),  # fewer slots than are scored at a time
    (1, 4, 2, 2, 64, 1),
]
LONG = [(1, 9, 3, 100, 64, 700), (2, 8, 1, 40, 80, 513), (1, 6, 3, 300, 64, 900), (2, 2, 2, 129, 128, 256)]


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, *(pytest.param(s, marks=few_only) for s in LONG)])
@pytest.mark.parametrize("big", [2.0, 7.0])  # at 7 scores reach +-400: one slot takes all, and sums must not overflow
def test_attention_matches_float64(shape: tuple[int, ...], dtype: torch.dtype, weights: bool, window: int | None, big: float) -> None:
    """Output within 1.5 times the error of the formula in the model's own dtype, log-sum-exp to 1e-4 of scores."""
    q, q_pos, s = make(shape, dtype, sum(shape), weights, window, big)
    out, lse = cpu.attention(q, q_pos, s)
    true = slot_attention(q.double(), q_pos, wide(s))
    parts = slot_parts(q.double(), q_pos, wide(s))
    seen = parts.den > 0
    true_lse = torch.where(seen, parts.max_den + parts.den.log(), -torch.inf).view(lse.shape)
    assert torch.isfinite(out).all()
    eager = slot_attention(q, q_pos, s)  # float32 sums, rounded at the end: only the output's rounding is left in bfloat16
    rounding = 1e-5 if dtype == torch.float32 else 4e-3 * float(true.abs().max() + 1)  # probabilities are rounded before the last product
    assert (out.double() - true).abs().max() <= 1.5 * (eager.double() - true).abs().max() + rounding
    assert torch.equal(lse == -torch.inf, true_lse == -torch.inf)
    assert torch.where(seen.view(lse.shape), lse - true_lse, 0).abs().max() <= 1e-4 * big * big
    assert (out.view(*parts.den.shape, -1)[~seen] == 0).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 8),
    st.integers(1, 5),
    st.sampled_from([16, 48, 64, 112]),
    st.integers(1, 600),
    st.booleans(),
)
def test_attention_of_any_shape(B: int, G: int, R: int, T: int, D: int, S: int, weights: bool) -> None:
    q, q_pos, s = make((B, G * R, G, T, D, S), torch.float32, S, weights, None)
    if cpu.covers(q.device, q.dtype, D, R * T):
        assert (cpu.attention(q, q_pos, s)[0] - slot_attention(q.double(), q_pos, wide(s))).abs().max() < 1e-5


def nothing(s: PagedSlots, heads: int) -> Slots:
    """A dense store without a token, for two sequences."""
    k = torch.zeros(2, heads // 2, 1, s.k.shape[2], dtype=s.k.dtype)
    return Slots(k, k, torch.full((2, 1, 1), -1, dtype=torch.int32), window=s.window)


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize(
    ("dtype", "T"), [(torch.float32, 1), (torch.float32, 4), (torch.bfloat16, 1), pytest.param(torch.bfloat16, 70, marks=few_only)]
)
def test_pages_match_float64(dtype: torch.dtype, T: int, window: int | None) -> None:
    """Attention, and the mass of each page in the layer's list; heads without a page say 0 and -inf."""
    q, q_pos, s, spans = paged(5, dtype, T, window=window)
    out, lse = cpu.attention(q, q_pos, nothing(s, 4), s, spans)
    true = paged_parts(q.double(), q_pos, wide(s))
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    ratio = torch.where(true.den[..., None] > 0, true.num / true.den[..., None], 0).view(out.shape)
    assert (out.double() - ratio).abs().max() < bound
    assert (lse[0, 3:] == -torch.inf).all()  # its second head owns nothing
    weight = torch.rand(2, T)
    again, none, masses = cpu.attention_and_mass(q, q_pos, nothing(s, 4), s, spans, weight)
    assert torch.equal(again, out)
    assert all((t == 0).all() for t in none)
    for got, power in zip(masses, (1, 2), strict=True):
        want = paged_mass(q.double(), q_pos, wide(s), true, weight.double(), power)
        assert (got.double() - want).abs().max() < 3e-5 * T
        assert want.max() > 0.01


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize(
    ("dtype", "T"), [(torch.float32, 1), (torch.float32, 4), (torch.bfloat16, 2), pytest.param(torch.bfloat16, 70, marks=few_only)]
)
def test_a_store_and_pages_share_one_softmax(dtype: torch.dtype, T: int, window: int | None) -> None:
    """What queries see of both, and what both receive, as by merging their parts."""
    q, q_pos, s, spans = paged(6, dtype, T, window=window)
    _, _, dense = make((2, 6, 4 // 2, T, 64, 90), dtype, 7, False, window)
    weight = torch.rand(2, T)
    out, masses, page_masses = cpu.attention_and_mass(q, q_pos, dense, s, spans, weight)
    assert torch.equal(cpu.attention(q, q_pos, dense, s, spans)[0], out)
    d, p = wide(dense), wide(s)
    whole = merge(slot_parts(q.double(), q_pos, d), paged_parts(q.double(), q_pos, p))
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert (out.double() - finish(whole, torch.float64).view(out.shape)).abs().max() < bound
    for power in (1, 2):
        want = slot_mass(q.double(), q_pos, d, whole, weight.double(), power)
        assert (masses[power - 1].double() - want).abs().max() < 3e-5 * T
        wanted = paged_mass(q.double(), q_pos, p, whole, weight.double(), power)
        assert (page_masses[power - 1].double() - wanted).abs().max() < 3e-5 * T
        assert min(want.max(), wanted.max()) > 1e-3 * T


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((s, d) for s in SHAPES for d in (torch.float32, torch.bfloat16)), *(pytest.param(s, torch.bfloat16, marks=few_only) for s in LONG)],
)
def test_mass_matches_float64(shape: tuple[int, ...], dtype: torch.dtype, weights: bool, window: int | None) -> None:
    """What each slot received, to the powers 1 and 2, weighted by query; nothing for empty slots, and nothing at all for weights of 0."""
    q, q_pos, s = make(shape, dtype, sum(shape) + 1, weights, window)
    weight = torch.rand(shape[0], shape[3])
    out, got, none = cpu.attention_and_mass(q, q_pos, s, None, None, weight)
    assert torch.equal(out, cpu.attention(q, q_pos, s)[0])
    assert all(t.numel() == 0 for t in none)
    parts = slot_parts(q.double(), q_pos, wide(s))
    for mass, power in zip(got, (1, 2), strict=True):
        want = slot_mass(q.double(), q_pos, wide(s), parts, weight.double(), power)
        assert (mass.double() - want).abs().max() < 1e-4 * shape[3]
        assert (mass[s.pos.expand(mass.shape) < 0] == 0).all()
    assert all((m == 0).all() for m in cpu.attention_and_mass(q, q_pos, s, None, None, torch.zeros_like(weight))[1])


@few_only
def test_mass_of_a_chunk_is_better_than_in_bfloat16() -> None:
    """`chunk_mass`, which runs where the kernels do not, sums in bfloat16; the kernel in float32."""
    q, q_pos, s = make((1, 6, 2, 300, 64, 900), torch.bfloat16, 3, False, None)
    q_pos[0, 0] = 600
    parts = slot_parts(q.double(), q_pos, wide(s))
    want = slot_mass(q.double(), q_pos, wide(s), parts)
    got = cpu.attention_and_mass(q, q_pos, s, None, None, torch.ones(1, 300))[1][0]
    old = chunk_mass(q, q_pos, s, slot_parts(q, q_pos, s))[0]
    assert (got.double() - want).abs().max() < 0.1 * (old.double() - want).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 64, 16), (1, 49, 576), (3, 1000, 48), (16, 65, 128), (7, 3, 64)])
def test_linear_matches_float64(M: int, N: int, K: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(M * N)
    x, w = torch.randn(M, K, generator=g).to(dtype), torch.randn(N, K, generator=g).to(dtype)
    true = x.double() @ w.double().T
    got, library = torch.ops.zoo.linear(x, w), torch.nn.functional.linear(x, w)
    assert (got.double() - true).abs().max() <= 1.5 * (library.double() - true).abs().max() + 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 64, 16), (1, 49, 576), (3, 1000, 48), (16, 65, 320), (7, 3, 64), (2, 130, 14336)])
def test_int8_linear_matches_float64(M: int, N: int, K: int, dtype: torch.dtype) -> None:
    """Also with columns whose numbers are a thousand times larger than the others', and rows that are 0."""
    g = torch.Generator().manual_seed(M * N)
    x = torch.randn(M, K, generator=g)
    x[:, 5] = 1000.0
    x[M - 1 :] *= M == 1
    x = x.to(dtype)
    w, scale = torch.randint(-128, 128, (N, K), generator=g, dtype=torch.int8), torch.rand(N, generator=g) / 100 + 1e-3
    got, true = torch.ops.zoo.linear_int8(x, w, scale), x.double() @ (w.double() * scale.double()[:, None]).T
    bound = 1e-6 * (x.double().abs() @ w.double().abs().T * scale)  # float32 sums
    if dtype == torch.bfloat16:
        # A unit of 1000 / 32639 beside the large number: five standard deviations of its rounding, summed with weights of rms 74.
        bound = 5 * 1000 / 32639 / 12**0.5 * 74 * min(K, 256) ** 0.5 * scale.double() + bound + true.abs() * 2**-8
    assert ((got.double() - true).abs() <= bound).all()
    if M > 1:
        assert (got[M - 1] == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_int8_rows_that_are_not_finite_stay_so(bad: float) -> None:
    x, w = torch.ones(2, 128, dtype=torch.bfloat16), torch.ones(5, 128, dtype=torch.int8)
    x[0, 70] = bad
    got = torch.ops.zoo.linear_int8(x, w, torch.ones(5))
    assert not torch.isfinite(got[0]).any()
    assert (got[1] == 128).all()
    tiny = torch.full((1, 128), 1e-37, dtype=torch.bfloat16)
    assert (torch.ops.zoo.linear_int8(tiny, w, torch.ones(5)) - 128 * float(tiny[0, 0])).abs().max() < 2e-36


def clusters(B: int, G: int, N: int, F: int, step: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points, weights, what may merge, and how many must go; step > 0 puts points on a grid, so that many distances are equal."""
    g = torch.Generator().manual_seed(B * N + F)
    x = torch.randn(B, G, N, F, generator=g)
    x = (x / step).round() * step if step else x
    weight = torch.rand(B, G, N, generator=g) * 10 + 0.01
    alive = torch.rand(B, G, N, generator=g) < 0.8
    return x, weight, alive, torch.randint(0, N // 2, (B, G), generator=g)


@pytest.mark.parametrize("shape", [(1, 1, 2, 3), (1, 1, 17, 1), (2, 3, 90, 16), (3, 3, 400, 16), (1, 2, 130, 64)])
def test_ward_is_the_one_of_clustering(shape: tuple[int, int, int, int]) -> None:
    """The same labels, but where rounding decides: never where points differ clearly, as random ones do."""
    x, weight, alive, surplus = clusters(*shape)
    assert torch.equal(cpu.ward(x, weight, alive, surplus, TIE), ward(x, weight, alive, surplus))
    many = torch.full_like(surplus, shape[2])  # more than can go: one is left
    got = cpu.ward(x, weight, alive, many, TIE)
    assert all(len(got[b, h][alive[b, h]].unique()) == 1 for b in range(shape[0]) for h in range(shape[1]) if alive[b, h].any())


def test_ward_takes_near_points_for_equal() -> None:
    """Within a hundredth of the largest norm the first is the nearest, as in clustering, whatever rounding says."""
    x, weight = torch.tensor([0.0, 0.05, 0.06, 10.0]).view(1, 1, 4, 1), torch.tensor([[[1.0, 1.01, 1.02, 5.0]]])
    alive = torch.ones(1, 1, 4, dtype=torch.bool)
    for merge_by in (ward, partial(cpu.ward, tie=TIE)):
        assert merge_by(x, weight, alive, torch.ones(1, 1, dtype=torch.int64)).tolist() == [[[0, 0, 2, 3]]]


def test_rounding_is_the_one_of_clustering() -> None:
    """Bit for bit: halves, zeros, tiny and negative numbers, numbers that bfloat16 has, and seeds beyond int64."""
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(400, 48, generator=g) * 10.0 ** torch.randint(-42, 30, (400, 1), generator=g)
    mean[:5] = torch.tensor([0.0, -0.0, 1e-41, -1e-41, 1.0])[:, None]
    mean[5:50] = mean[5:50].bfloat16().float()
    where = tuple(torch.randint(-5, 2**40, (400,), generator=g) for _ in range(4))
    for seed in (0, 3, 2**63 + 1):
        got, want = cpu.rounded(mean, torch.bfloat16, seed, *where), rounded(mean, torch.bfloat16, seed, *where)
        assert torch.equal(got, want)
        assert 0.2 < (got != mean.bfloat16())[50:].float().mean() < 0.3  # a quarter goes the other way


@pytest.mark.parametrize("step", [0.7, 1.5])
def test_ward_with_equal_points(step: float) -> None:
    """Points on a grid: equal ones go first, into the first of them; the cost of what merges is that of clustering's."""
    x, weight, alive, surplus = clusters(2, 2, 150, 2, step)
    weight = weight.round().clamp(min=1)
    got, want = cpu.ward(x, weight, alive, surplus, TIE), ward(x, weight, alive, surplus)
    for labels in (got, want):
        assert torch.equal((labels != torch.arange(150)).sum(-1), surplus)
        assert (labels[~alive] == torch.arange(150).expand(labels.shape)[~alive]).all()

    def spread(labels: Tensor) -> Tensor:
        w = torch.zeros_like(weight).scatter_add_(2, labels, weight)
        mean = torch.zeros_like(x).scatter_add_(2, labels[..., None].expand(x.shape), x * weight[..., None]) / w.clamp(min=1e-9)[..., None]
        return ((x - mean.gather(2, labels[..., None].expand(x.shape))).square().sum(-1) * weight).sum(-1)

    assert (spread(got) <= 1.2 * spread(want) + 1e-3).all()
    assert (spread(want) <= 1.2 * spread(got) + 1e-3).all()


def test_operators_are_well_behaved() -> None:
    """Schemas, fake tensors and tracing, by PyTorch's own checks."""
    q, q_pos, s = make((1, 6, 2, 2, 64, 70), torch.bfloat16, 1, True, None)
    one, (pq, pp, p, spans) = torch.ones(1, 2), paged(1, torch.bfloat16, 2)
    ops, beside = torch.ops.zoo, (None,) * 5
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    dense, pages = nothing(p, 4), (p.k, p.v, p.pos, p.a, spans)
    store, empty = (s.k, s.v, s.pos, s.a), (dense.k, dense.v, dense.pos, None)
    torch.library.opcheck(ops.attention, (q, q_pos, *store, *beside, 0), test_utils=tests)
    torch.library.opcheck(ops.attention, (pq, pp, *empty, *pages, 0), test_utils=tests)
    torch.library.opcheck(ops.attention_and_mass, (q, q_pos, *store, *beside, None, one, 0), test_utils=tests)
    torch.library.opcheck(ops.attention_and_mass, (pq, pp, *empty, *pages, p.pages, torch.ones(2, 2), 0), test_utils=tests)
    torch.library.opcheck(ops.linear, (torch.randn(2, 32), torch.randn(5, 32)), test_utils=tests)
    int8 = torch.randint(-127, 128, (5, 32), dtype=torch.int8)
    torch.library.opcheck(ops.linear_int8, (torch.randn(2, 32), int8, torch.rand(5)), test_utils=tests)
    torch.library.opcheck(ops.ward, (*clusters(1, 2, 30, 4), 1e-4), test_utils=tests)
    torch.library.opcheck(ops.rounded, (torch.randn(3, 8), 5, torch.ones(3, 2, dtype=torch.int64)), test_utils=tests)
    with pytest.raises(RuntimeError, match="multiples of 16"):
        ops.attention(q[..., :8].contiguous(), q_pos, *store[:3], None, *beside, 0)
    for wrong, says in (
        ((q, q_pos, s.k.float(), s.v, s.pos, None), "queries' dtype"),
        ((q, q_pos, s.k, s.v[:, :, 1:], s.pos, None), "as many rows"),
        ((q, q_pos, s.k, s.v, s.pos.long(), None), "int32"),
        ((q, q_pos[:, :1].contiguous(), s.k, s.v, s.pos, None), "int64"),
        ((q[:, :5].contiguous(), q_pos, s.k, s.v, s.pos, None), "multiple of key/value heads"),
        ((q, q_pos, s.k, s.v, s.pos, torch.zeros(1, 2, 3)), "log-weights"),
        ((q.double(), q_pos, s.k, s.v, s.pos, None), "bfloat16 or float32"),
    ):
        with pytest.raises(RuntimeError, match=says):
            ops.attention(*wrong, *beside, 0)
    with pytest.raises(RuntimeError, match="leaves the arena"):
        ops.attention(pq, pp, *empty, p.k, p.v, p.pos, p.a, spans + 100, 0)
    with pytest.raises(RuntimeError, match="pages must be"):
        ops.attention(pq, pp, *empty, p.k, p.v[:1], p.pos, p.a, spans, 0)
    with pytest.raises(RuntimeError, match="given whole"):
        ops.attention(pq, pp, *empty, p.k, p.v, p.pos, p.a, None, 0)
    with pytest.raises(RuntimeError, match="list of pages"):
        ops.attention_and_mass(pq, pp, *empty, *pages, p.pages[:9], torch.ones(2, 2), 0)
    with pytest.raises(RuntimeError, match=r"float32 \(B, T\)"):
        ops.attention_and_mass(q, q_pos, *store, *beside, None, one.double(), 0)
    with pytest.raises(RuntimeError, match="int8, its scales"):
        ops.linear_int8(torch.randn(2, 32), int8, torch.rand(4))
    with pytest.raises(RuntimeError, match="multiple of 16"):
        ops.linear(torch.randn(2, 20), torch.randn(5, 20))
    x, w, alive, surplus = clusters(1, 2, 30, 4)
    with pytest.raises(RuntimeError, match="weights must be contiguous float32"):
        ops.ward(x, w[..., 1:].contiguous(), alive, surplus, 1e-4)
    with pytest.raises(RuntimeError, match="same dtype"):
        ops.linear(torch.randn(2, 32), torch.randn(5, 32).bfloat16())


def test_operators_that_read_a_cache_take_it_as_it_lies() -> None:
    """Without this tag a compiled step copies keys and values before each call: right, and twice as slow at 8,000 tokens."""
    for name in ("attention", "attention_and_mass"):
        assert torch.Tag.flexible_layout in getattr(torch.ops.zoo, name).default.tags


MUTANTS = [
    ("pos <= at &&", "pos < at &&"),  # a query does not see its own token
    ("pos > at - window)", "pos >= at - window)"),  # one token too many in the window
    ("load(out + i) * scale", "load(out + i)"),  # scores are not scaled
    ("if (h.a)\n            for (int64_t j = 0; j < count; j++) x[j] += h.a[s + j];", ""),  # log-weights are forgotten
    ("weight = std::exp(part[D] - max);", "weight = 1;"),  # chunks are added without their maxima
    ("*den *= shrink, *max = new_max;", "*max = new_max;"),  # the sum is not rescaled when the maximum grows
    ("den[m] *= shrink, max[m] = new_max;", "max[m] = new_max;"),  # the same for many rows
    ("h.a[s + j] / scale", "h.a[s + j]"),  # log-weights in the wrong unit
    ("j < count ? v + j * row : zeros, *y = j + 1", "j + 1 < count ? v + (j + 1) * row : zeros, *y = j + 1"),  # values of the neighbour
    ("+= weight * x[j] * x[j]", "+= weight * x[j]"),  # squares are no squares
    ("part * e", "part"),  # the same for many rows
    ("span[3 * head + 2]", "span[2]"),  # every head writes its mass where the first does
    ("spans[3 * head + 1] * page", "spans[3 * head + 1] * page - 1"),  # a page's last row is left out
    ("out[m * N + n + j] = y[m * BLOCK + j] * scale(n + j)", "out[m * N + n + j] = y[j] * scale(n + j)"),  # all rows are the first
    ("y[m * BLOCK + j] * scale(n + j)", "y[m * BLOCK + j] * scale(n)"),  # a scale serves a block
    ("whole - 256 * digit", "0 * digit"),  # half the digits are lost
    ("* x.unit[at]", "* x.unit[0]"),  # one unit for all columns
    ("-128 * x.highs[at]", "-127 * x.highs[at]"),  # the shift is not taken off in full
    ("(c.inverse[pairs[p].one] + inverse) * unit", "(c.inverse[pairs[p].one] + 0 * inverse) * unit"),  # the partner's weight is forgotten
    ("*x * c.weight[a] + y * c.weight[b]", "(*x + y) / 2 * both"),  # means are not weighted
    ("const float unit = unit_of(c, tie)", "const float unit = 1e-30f"),  # nothing is a tie
    ("most = (surplus + 1) / 2", "most = surplus"),  # what merged is not looked at anew
    ("up == negative ? -1 : 1", "up ? 1 : -1"),  # negative numbers are rounded the wrong way
]

CHECK = """
import sys, torch
sys.path[:0] = sys.argv[2:]
from zoo.kernels import cpu
torch.ops.load_library(sys.argv[1])
cpu.declare()
import zoo.attention.backends as backends
backends.kernels_ready = lambda: True
import test_cpu_kernels as t
for weights in (False, True):
    for window in (None, 50):
        for shape in t.SHAPES:
            t.test_attention_matches_float64(shape, torch.float32, weights, window, 2.0)
            t.test_mass_matches_float64(shape, torch.float32, weights, window)
        for shape in t.LONG if t.MANY else ():
            t.test_attention_matches_float64(shape, torch.bfloat16, weights, window, 2.0)
            t.test_mass_matches_float64(shape, torch.bfloat16, weights, window)
t.test_pages_match_float64(torch.float32, 1, None)
for shape in ((3, 1000, 48), (16, 65, 128)):
    t.test_linear_matches_float64(*shape, torch.float32)
for shape in ((3, 1000, 48), (16, 65, 320), (2, 130, 14336)):
    t.test_int8_linear_matches_float64(*shape, torch.bfloat16)
t.test_ward_is_the_one_of_clustering((3, 3, 400, 16))
t.test_ward_takes_near_points_for_equal()
t.test_rounding_is_the_one_of_clustering()
for step in (0.7, 1.5):
    t.test_ward_with_equal_points(step)
"""


def run_check(library: Path) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).parent
    return subprocess.run([sys.executable, "-c", CHECK, str(library), str(here), str(here.parent)], capture_output=True, text=True)


@pytest.mark.slow
def test_mutants_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above catch each of these changes to the source, and pass with the source as it is."""
    good_sources = cpu.SOURCES
    good = run_check(cpu.build(cache_folder() / "kernels"))
    assert good.returncode == 0, good.stderr[-2000:]
    texts = {path: path.read_text() for path in cpu.sources()}
    for i, (old, new) in enumerate(MUTANTS):
        assert sum(old in text for text in texts.values()) == 1, old
        many = ("part * e", "h.a[s + j] / scale", "den[m] *= shrink, max[m] = new_max;")  # in code that only AVX-512 reaches
        if not MANY and (old in many or "zeros" in old):
            continue
        if "avx512_vnni" not in cpu.processor() and ("digit" in old or "unit[at]" in old or "highs[at]" in old):
            continue
        folder = tmp_path / str(i)
        folder.mkdir()
        for path, text in texts.items():
            (folder / path.name).write_text(text.replace(old, new))
        monkeypatch.setattr(cpu, "SOURCES", [folder / path.name for path in good_sources])
        done = run_check(cpu.build(tmp_path))
        assert "AssertionError" in done.stderr, f"{old} -> {new}: not caught\n{done.stderr[-500:]}"


# Building, and choosing


def test_without_a_compiler_attention_runs_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line says why; a compiler that fails says its own first line; nothing is left in the folder."""
    monkeypatch.setattr(torch.ops, "zoo", object())  # as in a process that has not loaded them
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING, "zoo"):
        assert not cpu.ready.__wrapped__(tmp_path / "a")
    assert "install g++" in caplog.text
    assert caplog.text.count("\n") == 1
    caplog.clear()
    fake = tmp_path / "cc"
    fake.write_text("#!/bin/sh\necho 'this compiler is broken' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    with caplog.at_level(logging.WARNING, "zoo"):
        assert not cpu.ready.__wrapped__(tmp_path / "b")
    assert "this compiler is broken" in caplog.text
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["lock"]
    monkeypatch.delenv("CXX")
    (tmp_path / "c").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, "zoo"):
        assert not cpu.ready.__wrapped__(tmp_path / "c")


def test_backend_by_name(tmp_path: Path) -> None:
    """`cpp` is what auto takes here; where it is not made for the numbers, it says so, and auto does without. Both give one answer."""
    folder = str(write_llama(tmp_path / "m"))
    lms = [zoo.load(folder, dtype="float32", backend=b, compile="off") for b in ("auto", "cpp", "sdpa", "eager")]
    assert [lm.backend for lm in lms] == ["cpp", "cpp", "sdpa", "eager"]
    assert len({lm.generate("Call me", 20) for lm in lms}) == 1
    with pytest.raises(ZooError, match="float32 or bfloat16"):
        zoo.load(folder, dtype="float16", backend="cpp")
    assert zoo.load(folder, dtype="float16").backend == "auto"


@pytest.mark.parametrize("attn", ["full", "sliding:window=40", *(f"{name}:budget=128" for name in ("subgen", "h2o", "tova"))])
def test_kernels_run_and_change_nothing(tmp_path: Path, attn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's own caches, prompt and 80 steps: the same logits as by the formula, and the kernels were called."""
    folder = str(write_llama(tmp_path / "m", head_dim=16))
    called: set[str] = set()
    for name in ("attention", "attention_and_mass"):
        real = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *a, real=real, name=name: called.add(name) or real(*a))
    logits = []
    for backend in ("eager", "cpp"):
        lm = zoo.load(folder, dtype="float32", backend=backend, compile="off")
        lm.attn = parse(attn)
        ids = torch.randint(0, lm.config.vocab_size, (2, 280), generator=torch.Generator().manual_seed(2))
        cache = lm.new_cache(2)
        lm.prefill(ids[:, :200], cache, [200, 171])
        logits.append(torch.stack([lm.decode_step(ids[:, t], cache) for t in range(200, 280)]))
    assert called
    assert ("attention_and_mass" in called) == attn.startswith(("subgen", "h2o", "tova"))  # those that ask what was attended to
    assert (logits[0] - logits[1]).abs().max() < 1e-3


def test_linear_goes_back_to_the_library_when_cast(tmp_path: Path) -> None:
    """A model that is cast after loading still runs."""
    lm = zoo.load(str(write_llama(tmp_path / "m")), dtype="float32", compile="off")
    assert all(m.few == cpu.FEW for m in lm.model.modules() if type(m) is Linear and m.in_features % 16 == 0)
    lm.model.double()
    assert lm.logits([[1, 2]]).shape[:2] == (1, 2)
