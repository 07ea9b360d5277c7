"""kernels/slot_attention.py and kernels/column_mass.py in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import kernel_checks as checks
import pytest
import torch
import triton.runtime.interpreter as interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DTYPES, SHAPES, make, paged
from mutants import is_caught
from torch import Tensor
from zoo.kernels import column_mass, launch, slot_attention

from zoo.attention.backends import kernels
from zoo.attention.slots import PAGE, Slots

pytestmark = pytest.mark.usefixtures("nan_filled")


@pytest.mark.parametrize("big", [2.0, 5.0])  # at 5 scores reach +-100
@pytest.mark.parametrize(("weights", "window"), [(False, None), (True, 50)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(shape: tuple[int, ...], dtype: torch.dtype, weights: bool, window: int | None, big: float) -> None:
    checks.attention_matches(slot_attention, shape, dtype, weights, window, big)


@pytest.mark.parametrize(
    ("dtype", "T", "D", "window"), [(torch.float32, 1, 64, None), (torch.bfloat16, 4, 80, 12), (torch.float16, 20, 128, None)]
)
def test_pages(dtype: torch.dtype, T: int, D: int, window: int | None) -> None:
    checks.pages_match(slot_attention, dtype, T, D, window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 6, 2, 3, 80, 129), (1, 2, 1, 1, 64, 600)])
def test_parts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    checks.parts_match(slot_attention, shape, dtype)


@pytest.mark.parametrize(("weights", "window"), [(False, None), (True, 50)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_mass(shape: tuple[int, ...], dtype: torch.dtype, weights: bool, window: int | None) -> None:
    checks.mass_matches(column_mass, shape, dtype, weights, window)


@pytest.mark.parametrize(("dtype", "T", "window"), [(torch.float32, 1, None), (torch.bfloat16, 4, 12), (torch.float16, 40, None)])
def test_page_mass(dtype: torch.dtype, T: int, window: int | None) -> None:
    checks.page_mass_matches(column_mass, dtype, T, window)


sizes = st.tuples(
    st.integers(1, 2),
    st.sampled_from([1, 3, 4, 8]),
    st.integers(1, 2),
    st.integers(1, 16),
    st.sampled_from([16, 48, 64, 80]),
    st.integers(1, 150),
)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(sizes, st.sampled_from(DTYPES), st.booleans(), st.sampled_from([None, 1, 30]))
def test_any_shape(size: tuple[int, ...], dtype: torch.dtype, weights: bool, window: int | None) -> None:
    B, R, G, T, D, S = size
    checks.attention_matches(slot_attention, (B, G * R, G, T, D, S), dtype, weights, window, 2.0)
    checks.mass_matches(column_mass, (B, G * R, G, T, D, S), dtype, weights, window)


def test_rising_scores() -> None:
    checks.rising_scores_match(slot_attention)


def test_nothing_to_see() -> None:
    """No slot at all, only empty ones, only padded queries: 0 and -inf, and no mass."""
    q, q_pos, s = make((1, 4, 2, 3, 64, 70), torch.float32, 1, True, None)
    nothing = Slots(s.k[:, :, :0], s.v[:, :, :0], s.pos[:, :, :0], None)
    for slots, at in ((replace(s, pos=torch.full_like(s.pos, -1)), q_pos), (s, torch.full_like(q_pos, -1)), (nothing, q_pos)):
        out, lse = slot_attention.slot_attention(q, at, slots)
        assert (out == 0).all()
        assert (lse == -torch.inf).all()
        for mass in column_mass.slot_mass(q, at, slots, lse, torch.ones(1, 3)):
            assert mass.shape == slots.k.shape[:3]
            assert (mass == 0).all()


def test_checks_that_need_a_gpu_run() -> None:
    checks.sums_repeat(slot_attention, column_mass)


@pytest.mark.parametrize("T", [1, 4])
def test_parts_are_merged(T: int) -> None:
    """Tail and pages, each by a kernel of its own, merged by their log-sum-exp."""
    mine = kernels("triton", torch.zeros(2, 6, T, 64), 2)
    assert mine is not None
    checks.kernels_match(mine, T)


# Bytes


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Tensor]]:
    """Counts how often each element of tensors is loaded: what the interpreter's loads address and do not mask off."""
    real, watched = interpreter._interpreter.load, []  # type: ignore[attr-defined]

    def load(pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        where = torch.from_numpy(pointers[mask].astype("int64").reshape(-1))
        for t, counts in watched:
            inside = (where - t.data_ptr()) // t.element_size()
            inside = inside[(inside >= 0) & (inside < t.numel()) & (where >= t.data_ptr())]
            counts.view(-1).index_add_(0, inside, torch.ones_like(inside))
        return real(pointers, mask, other, dtype)

    class Interpreter:
        def __getattr__(self, name: str) -> Any:
            return load if name == "load" else getattr(original, name)

    original = interpreter._interpreter  # type: ignore[attr-defined]

    def counting(run: Callable[[], Any], *tensors: Tensor) -> list[Tensor]:
        watched[:] = [(t, torch.zeros(t.shape, dtype=torch.int64)) for t in tensors]
        monkeypatch.setattr(interpreter, "_interpreter", Interpreter())
        run()
        monkeypatch.setattr(interpreter, "_interpreter", original)
        return [counts for _, counts in watched]

    return counting


@pytest.mark.parametrize("R", [1, 8])
def test_keys_and_values_are_read_once(read: Callable[..., list[Tensor]], R: int) -> None:
    """32,768 slots of one kv head, a decode step: every number exactly once, however many query heads share it."""
    S, D = 2**15, 64
    q, k, v = torch.randn(1, R, 1, D).bfloat16(), torch.randn(1, 1, S, D).bfloat16(), torch.randn(1, 1, S, D).bfloat16()
    s = Slots(k, v, torch.arange(S, dtype=torch.int32).view(1, 1, S))
    launch.launches.clear()
    keys, values = read(lambda: slot_attention.slot_attention(q, torch.tensor([[S - 1]]), s), k, v)
    assert launch.launches == {"slot_attention_kernel": 1, "merge_kernel": 1}
    assert (keys == 1).all()
    assert (values == 1).all()


@pytest.mark.parametrize(("dtype", "D", "tiles"), [(torch.bfloat16, 128, 1), (torch.float16, 64, 1), (torch.float32, 64, 8)])
def test_sixteen_tokens_of_eight_heads(read: Callable[..., list[Tensor]], dtype: torch.dtype, D: int, tiles: int) -> None:
    """One tile reads keys and values once; float32 has tiles of 16 rows."""
    q, _, s = make((1, 8, 1, 16, D, 200), dtype, 1, False, None)
    s = replace(s, k=s.k.contiguous(), v=s.v.contiguous(), pos=torch.arange(200, dtype=torch.int32).view(1, 1, -1))
    keys, values = read(lambda: slot_attention.slot_attention(q, torch.arange(184, 200)[None], s), s.k, s.v)
    assert (keys == tiles).all()
    assert (values == tiles).all()


def test_what_no_query_may_see_is_not_read(read: Callable[..., list[Tensor]]) -> None:
    """Neither keys nor values of empty slots, of those behind the window, or of those ahead of all queries."""
    q, _, s = make((1, 4, 2, 2, 64, 700), torch.float32, 1, True, 100)
    pos = torch.arange(700, dtype=torch.int32).expand(1, 2, 700).clone()
    pos[:, :, 520:540] = -1
    assert s.a is not None
    s = replace(s, k=s.k.contiguous(), v=s.v.contiguous(), a=s.a.contiguous(), pos=pos)
    at = torch.tensor([[598, 599]])
    visible = (pos > 498) & (pos <= 599)
    lse, weight = torch.zeros(1, 4, 2), torch.ones(1, 2)
    for counts in read(lambda: slot_attention.slot_attention(q, at, s), s.k, s.v, s.a):
        assert torch.equal(counts.view(1, 2, 700, -1).amax(-1), visible.long())
    (keys,) = read(lambda: column_mass.slot_mass(q, at, s, lse, torch.zeros(1, 2)), s.k)
    assert (keys == 0).all()  # no query counts
    (keys,) = read(lambda: column_mass.slot_mass(q, at, s, lse, weight), s.k)
    assert torch.equal(keys.amax(-1) == 1, pos >= 0)


# Operators


def test_operators_are_well_behaved() -> None:
    """Schemas, fake tensors and tracing, by PyTorch's own checks; and what they refuse."""
    q, q_pos, s = make((1, 6, 2, 2, 64, 70), torch.bfloat16, 1, True, None)
    one, (pq, pp, p, spans), ops = torch.ones(1, 2), paged(1, torch.bfloat16, 2), torch.ops.zoo
    lse, plse = torch.zeros(1, 6, 2), torch.zeros(2, 6, 2)
    arguments = {
        "slot_attention": (q, q_pos, s.k, s.v, s.pos, s.a, 0),
        "page_attention": (pq, pp, p.k, p.v, p.pos, p.a, spans, p.table.shape[1], 0),
        "slot_parts": (q, q_pos, s.k, s.v, s.pos, s.a, s.a, 5),
        "slot_mass": (q, q_pos, s.k, s.pos, s.a, lse, one, 0),
        "page_mass": (pq, pp, p.k, p.pos, p.a, p.pages, p.owner, len(spans), plse, torch.ones(2, 2), 0),
    }
    for name, args in arguments.items():
        operator = getattr(ops, f"{name}_triton").default
        torch.library.opcheck(operator, args)
        assert torch.Tag.flexible_layout in operator.tags, "a compiled step would copy the cache before each call"
    for wrong, says in (
        ((q, q_pos, s.k.float(), s.v, s.pos, None, 0), "queries' dtype"),
        ((q.double(), q_pos, s.k.double(), s.v.double(), s.pos, None, 0), "bfloat16, float16 or float32"),
        ((q, q_pos[:, :1], s.k, s.v, s.pos, None, 0), "q_pos"),
        ((q[:, :5], q_pos, s.k, s.v, s.pos, None, 0), "2 key/value heads"),
    ):
        with pytest.raises(RuntimeError, match=says):
            ops.slot_attention_triton(*wrong)
    with pytest.raises(RuntimeError, match="slot_parts can"):
        slot_attention.slot_attention(q, q_pos, replace(s, b=s.a))


# Mutants


def attention_check(m: Any) -> None:
    for shape, weights, window in (((1, 4, 2, 3, 64, 130), True, 30), ((1, 3, 1, 1, 80, 600), False, None)):
        checks.attention_matches(m, shape, torch.float32, weights, window, 2.0)
    checks.parts_match(m, (1, 2, 1, 2, 64, 600), torch.float32)
    checks.attention_matches(m, (1, 4, 2, 3, 64, 130), torch.bfloat16, False, None, 2.0)
    checks.pages_match(m, torch.float32, 2, 64, None)
    checks.rising_scores_match(m)


def mass_check(m: Any) -> None:
    for shape, weights, window in (((1, 4, 2, 3, 64, 130), True, 30), ((1, 3, 1, 20, 80, 70), False, None)):
        checks.mass_matches(m, shape, torch.float32, weights, window)
    checks.page_mass_matches(m, torch.float32, 2, None)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(here[None] <= at[:, None])", "(here[None] < at[:, None])"),  # a query does not see its own token
        ("at[:, None] - here[None] < window", "at[:, None] - here[None] <= window"),  # one token too many in the window
        ("oldest - here < window", "newest - here < window"),  # what only the first of several queries may see is left out
        ("dot(x, keys) * scale", "dot(x, keys)"),
        ("score += tl.load(a + s + n", "score += 0 * tl.load(a + s + n"),
        ("product + tl.load(b + s + n", "product + tl.load(a + s + n"),  # a in place of b, wherever both are there
        ("a += i * ab + g * ag", "a += i * ab"),  # the first head's log-weights
        ("acc * shrink[:, None])", "acc)"),  # sums are not rescaled when the maximum grows
        ("total = total * shrink + tl.sum(e, 1)", "total = total + tl.sum(e, 1)"),
        ("tl.sum(x * weight[:, None], 0)", "tl.sum(x, 0)"),  # splits are added without their maxima
        ("acc * shrink + tl.sum(x", "acc + tl.sum(x"),  # the same of sixteen splits and sixteen more
        ("mask=start + n < end", "mask=start + n < end - 1"),  # a split's last slot, where it is shorter than a block
        ("(m[:, None] * D + d[None]), mask=(m < R", "(m[:, None] % T * D + d[None]), mask=(m < R"),  # all query heads are the first
        ("+ m % T, mask=m < R * T, other=-1)", "+ m // R, mask=m < R * T, other=-1)"),  # tokens and heads in the wrong order
        ("dot(rounded(e, values.dtype), values", "dot(rounded(e * 0.99, values.dtype), values"),  # numerator and denominator disagree
        ("slots = tl.load(spans + 3 * head + 1) * PAGE", "slots = tl.load(spans + 3 * head + 1) * PAGE - 1"),
    ],
)
def test_mutants_of_attention_fail(old: str, new: str, tmp_path: Path) -> None:
    is_caught(attention_check, slot_attention, old, new, tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(here[None] <= at[:, None])", "(here[None] < at[:, None])"),
        ("at[:, None] - here[None] < window", "at[:, None] - here[None] <= window"),
        ("dot(x, keys) * scale", "dot(x, keys)"),
        ("+ bias[None] - top", "- top"),
        ("- top[:, None]", ""),  # not a probability
        ("square += tl.sum(p * p * w[:, None], 0)", "square += tl.sum(p * w[:, None], 0)"),
        ("total += tl.sum(p * w[:, None], 0)", "total += tl.sum(p, 0)"),
        ("range(0, R * T, M)", "range(0, T, M)"),  # only the group's first query head
        ("last >= oldest", "last > newest"),  # tiles that see a part of the block are left out
        ("earliest - newest < window", "earliest - oldest < window"),
        ("head, slots = tl.load(owner + entry), N", "head, slots = 0 * tl.load(owner + entry), N"),
    ],
)
def test_mutants_of_mass_fail(old: str, new: str, tmp_path: Path) -> None:
    is_caught(mass_check, column_mass, old, new, tmp_path)


def test_the_checks_pass_what_is_right() -> None:
    attention_check(slot_attention)
    mass_check(column_mass)
    assert PAGE == slot_attention.PAGE
