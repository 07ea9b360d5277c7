"""The CPU kernels: against the formula in float64, against the forms they replace, and against mutants of themselves."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import make, paged, wide
from zoo.kernels import cpu

import zoo
from zoo.attention import parse
from zoo.attention.backends import kernels_ready
from zoo.attention.slots import chunk_mass, paged_mass, paged_parts, slot_attention, slot_mass, slot_parts
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
    out, lse = cpu.slot_attention(q, q_pos, s)
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
        assert (cpu.slot_attention(q, q_pos, s)[0] - slot_attention(q.double(), q_pos, wide(s))).abs().max() < 1e-5


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize(
    ("dtype", "T"), [(torch.float32, 1), (torch.float32, 4), (torch.bfloat16, 1), pytest.param(torch.bfloat16, 70, marks=few_only)]
)
def test_pages_match_float64(dtype: torch.dtype, T: int, window: int | None) -> None:
    """Attention, and the mass of each page in the layer's list; heads without a page say 0 and -inf."""
    q, q_pos, s, spans = paged(5, dtype, T, window=window)
    out, lse = cpu.page_attention(q, q_pos, s, spans)
    true = paged_parts(q.double(), q_pos, replace(s, k=s.k.double(), v=s.v.double()))
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    ratio = torch.where(true.den[..., None] > 0, true.num / true.den[..., None], 0).view(out.shape)
    assert (out.double() - ratio).abs().max() < bound
    assert (lse[0, 3:] == -torch.inf).all()  # its second head owns nothing
    weight = torch.rand(2, T)
    mass, spikes = cpu.page_mass(q, q_pos, s, spans, lse, weight)
    for got, power in ((mass, 1), (spikes, 2)):
        want = paged_mass(q.double(), q_pos, replace(s, k=s.k.double(), v=s.v.double()), true, weight.double(), power)
        assert (got.double() - want).abs().max() < 3e-5 * T
        assert want.max() > 0.01


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
    _, lse = cpu.slot_attention(q, q_pos, s)
    got = cpu.slot_mass(q, q_pos, s, lse, weight)
    parts = slot_parts(q.double(), q_pos, wide(s))
    for mass, power in zip(got, (1, 2), strict=True):
        want = slot_mass(q.double(), q_pos, wide(s), parts, weight.double(), power)
        assert (mass.double() - want).abs().max() < 1e-4 * shape[3]
        assert (mass.transpose(0, 1)[:, (s.pos < 0).all(1)] == 0).all() or weights
    assert all((m == 0).all() for m in cpu.slot_mass(q, q_pos, s, lse, torch.zeros_like(weight)))


@few_only
def test_mass_of_a_chunk_is_better_than_in_bfloat16() -> None:
    """`chunk_mass`, which runs where the kernels do not, sums in bfloat16; the kernel in float32."""
    q, q_pos, s = make((1, 6, 2, 300, 64, 900), torch.bfloat16, 3, False, None)
    q_pos[0, 0] = 600
    parts = slot_parts(q.double(), q_pos, wide(s))
    want = slot_mass(q.double(), q_pos, wide(s), parts)
    _, lse = cpu.slot_attention(q, q_pos, s)
    got = cpu.slot_mass(q, q_pos, s, lse, torch.ones(1, 300))[0]
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


def test_operators_are_well_behaved() -> None:
    """Schemas, fake tensors and tracing, by PyTorch's own checks."""
    q, q_pos, s = make((1, 6, 2, 2, 64, 70), torch.bfloat16, 1, True, None)
    one, (pq, pp, p, spans) = torch.ones(1, 2), paged(1, torch.bfloat16, 2)
    lse, ops = cpu.slot_attention(q, q_pos, s)[1], torch.ops.zoo
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(ops.slot_attention, (q, q_pos, s.k, s.v, s.pos, s.a, 0), test_utils=tests)
    torch.library.opcheck(ops.slot_mass, (q, q_pos, s.k, s.pos, s.a, lse, one, 0), test_utils=tests)
    torch.library.opcheck(ops.page_attention, (pq, pp, p.k, p.v, p.pos, p.a, spans, 0), test_utils=tests)
    plse = cpu.page_attention(pq, pp, p, spans)[1]
    torch.library.opcheck(ops.page_mass, (pq, pp, p.k, p.pos, p.a, p.pages, spans, plse, torch.ones(2, 2), 0), test_utils=tests)
    torch.library.opcheck(ops.linear, (torch.randn(2, 32), torch.randn(5, 32)), test_utils=tests)
    with pytest.raises(RuntimeError, match="multiples of 16"):
        ops.slot_attention(q[..., :8].contiguous(), q_pos, s.k, s.v, s.pos, None, 0)
    for wrong, says in (
        ((q, q_pos, s.k.float(), s.v, s.pos, None, 0), "queries' dtype"),
        ((q, q_pos, s.k, s.v[:, :, 1:], s.pos, None, 0), "as many rows"),
        ((q, q_pos, s.k, s.v, s.pos.long(), None, 0), "int32"),
        ((q, q_pos[:, :1].contiguous(), s.k, s.v, s.pos, None, 0), "int64"),
        ((q[:, :5].contiguous(), q_pos, s.k, s.v, s.pos, None, 0), "multiple of key/value heads"),
        ((q, q_pos, s.k, s.v, s.pos, torch.zeros(1, 2, 3), 0), "log-weights"),
    ):
        with pytest.raises(RuntimeError, match=says):
            ops.slot_attention(*wrong)
    with pytest.raises(RuntimeError, match="leaves the arena"):
        ops.page_attention(pq, pp, p.k, p.v, p.pos, p.a, spans + 100, 0)
    with pytest.raises(RuntimeError, match="same dtype"):
        ops.linear(torch.randn(2, 32), torch.randn(5, 32).bfloat16())
    with pytest.raises(RuntimeError, match="bfloat16 or float32"):
        ops.slot_attention(q.double(), q_pos, s.k, s.v, s.pos, None, 0)


def test_operators_that_read_a_cache_take_it_as_it_lies() -> None:
    """Without this tag a compiled step copies keys and values before each call: right, and twice as slow at 8,000 tokens."""
    for name in ("slot_attention", "page_attention", "slot_mass", "page_mass"):
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
    ("out[m * N + n + j] = y[m * BLOCK + j]", "out[m * N + n + j] = y[j]"),  # all rows are the first
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
"""


def run_check(library: Path) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).parent
    return subprocess.run([sys.executable, "-c", CHECK, str(library), str(here), str(here.parent)], capture_output=True, text=True)


@pytest.mark.slow
def test_mutants_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above catch each of these changes to the source, and pass with the source as it is."""
    source = cpu.SOURCE.read_text()
    good = run_check(cpu.build(cache_folder() / "kernels"))
    assert good.returncode == 0, good.stderr[-2000:]
    for i, (old, new) in enumerate(MUTANTS):
        assert old in source, old
        many = ("part * e", "h.a[s + j] / scale", "den[m] *= shrink, max[m] = new_max;")  # in code that only AVX-512 reaches
        if not MANY and (old in many or "zeros" in old):
            continue
        mutant = tmp_path / f"mutant{i}.cpp"
        mutant.write_text(source.replace(old, new))
        monkeypatch.setattr(cpu, "SOURCE", mutant)
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
    assert not list((tmp_path / "b").iterdir())
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


@pytest.mark.parametrize("attn", ["full", "sliding:window=40", "subgen:budget=128", "h2o:budget=128"])
def test_kernels_run_and_change_nothing(tmp_path: Path, attn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's own caches, prompt and 80 steps: the same logits as by the formula, and the kernels were called."""
    folder = str(write_llama(tmp_path / "m", head_dim=16))
    called: set[str] = set()
    for name in ("slot_attention", "page_attention", "slot_mass", "page_mass"):
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
    assert "slot_attention" in called
    assert ("page_mass" in called) == attn.startswith(("subgen", "h2o"))  # those that ask what was attended to
    assert (logits[0] - logits[1]).abs().max() < 1e-3


def test_linear_goes_back_to_the_library_when_cast(tmp_path: Path) -> None:
    """A model that is cast after loading still runs."""
    lm = zoo.load(str(write_llama(tmp_path / "m")), dtype="float32", compile="off")
    assert all(m.few == cpu.FEW for m in lm.model.modules() if type(m) is Linear and m.in_features % 16 == 0)
    lm.model.double()
    assert lm.logits([[1, 2]]).shape[:2] == (1, 2)
