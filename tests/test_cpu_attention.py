"""Attention by the CPU kernels: against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import make, paged, require_cpu_kernels, well_behaved, wide
from zoo.kernels import cpu

from zoo.attention.slots import PagedSlots, Slots, chunk_mass, finish, merge, paged_mass, paged_parts, slot_attention, slot_mass, slot_parts

require_cpu_kernels()

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


def test_operators_are_well_behaved() -> None:
    """Schemas, fake tensors and tracing, by PyTorch's own checks; and what is wrong says so."""
    q, q_pos, s = make((1, 6, 2, 2, 64, 70), torch.bfloat16, 1, True, None)
    one, (pq, pp, p, spans) = torch.ones(1, 2), paged(1, torch.bfloat16, 2)
    ops, beside, dense = torch.ops.zoo, (None,) * 5, nothing(p, 4)
    pages, store, empty = (p.k, p.v, p.pos, p.a, spans), (s.k, s.v, s.pos, s.a), (dense.k, dense.v, dense.pos, None)
    well_behaved(ops.attention, q, q_pos, *store, *beside, 0)
    well_behaved(ops.attention, pq, pp, *empty, *pages, 0)
    well_behaved(ops.attention_and_mass, q, q_pos, *store, *beside, None, one, 0)
    well_behaved(ops.attention_and_mass, pq, pp, *empty, *pages, p.pages, torch.ones(2, 2), 0)
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


def test_operators_that_read_a_cache_take_it_as_it_lies() -> None:
    """Without this tag a compiled step copies keys and values before each call: right, and twice as slow at 8,000 tokens."""
    for name in ("attention", "attention_and_mass"):
        assert torch.Tag.flexible_layout in getattr(torch.ops.zoo, name).default.tags
