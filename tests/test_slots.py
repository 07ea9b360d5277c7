"""The slot formula: against a literal float64 sum, its algebra, and each faster form against it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.attention.slots import BACKENDS, Slots, attention, finish, merge, sdpa, slot_attention, slot_parts
from zoo.errors import ZooError

FEW = settings(max_examples=40, deadline=None, derandomize=True)


def make(
    seed: int, S: int, T: int = 3, B: int = 2, G: int = 2, R: int = 3, D: int = 16, weights: str = "ab", big: float = 1.0
) -> tuple[Tensor, Tensor, Slots]:
    """Random q, q_pos, slots in float64; about a fifth of the slots are empty."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    q, k, v = rand(B, G * R, T, D) * big, rand(B, G, S, D), rand(B, G, S, D)
    pos = torch.randint(0, 40, (B, G, S), generator=g)
    pos[torch.rand(B, G, S, generator=g) < 0.2] = -1
    q_pos = torch.arange(20, 20 + T).expand(B, T).clone()
    a = rand(B, G, S).float() if "a" in weights else None
    b = rand(B, G, S).float() if "b" in weights else None
    return q, q_pos, Slots(k, v, pos, a, b)


def literal(q: Tensor, q_pos: Tensor, s: Slots) -> Tensor:
    """The formula as a sum over slots, in Python loops and float64."""
    B, H, T, D = q.shape
    G, S = s.k.shape[1:3]
    out = torch.zeros(B, H, T, D, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            g = h * G // H
            for t in range(T):
                num, den = torch.zeros(D, dtype=torch.float64), 0.0
                for j in range(S):
                    p, now = int(s.pos[b, min(g, s.pos.shape[1] - 1), j]), int(q_pos[b, t])
                    if p < 0 or p > now or (s.window is not None and p <= now - s.window):
                        continue
                    score = float(q[b, h, t] @ s.k[b, g, j]) / math.sqrt(D)
                    a = 0.0 if s.a is None else float(s.a[b, g, j])
                    c = a if s.b is None else float(s.b[b, g, j])
                    num += math.exp(score + a) * s.v[b, g, j]
                    den += math.exp(score + c)
                if den > 0:
                    out[b, h, t] = num / den
    return out


@pytest.mark.parametrize("weights", ["", "a", "b", "ab"])
@pytest.mark.parametrize("window", [None, 5])
def test_formula_is_the_literal_sum(weights: str, window: int | None) -> None:
    """Grouped heads, empty slots, windows, and separate log-weights, to float64 rounding."""
    q, q_pos, s = make(1, 17, weights=weights)
    s = replace(s, window=window)
    assert (slot_attention(q, q_pos, s) - literal(q, q_pos, s)).abs().max() < 1e-6  # log-weights are float32


def test_heads_are_grouped_not_tiled() -> None:
    """Query head h reads kv head h // R: the other order gives another answer."""
    q, q_pos, s = make(2, 9, weights="")
    tiled = q.view(2, 3, 2, 3, 16).transpose(1, 2).reshape(q.shape)
    assert (slot_attention(tiled, q_pos, s) - literal(q, q_pos, s)).abs().max() > 0.1


@FEW
@given(st.integers(0, 10**6), st.integers(1, 30), st.sampled_from(["", "a", "ab"]))
def test_permuting_slots_changes_nothing(seed: int, S: int, weights: str) -> None:
    """Order is no information."""
    q, q_pos, s = make(seed, S, weights=weights)
    p = torch.randperm(S)
    t = Slots(s.k[:, :, p], s.v[:, :, p], s.pos[:, :, p], None if s.a is None else s.a[:, :, p], None if s.b is None else s.b[:, :, p])
    assert (slot_attention(q, q_pos, s) - slot_attention(q, q_pos, t)).abs().max() < 1e-12


@FEW
@given(st.integers(0, 10**6), st.integers(0, 20), st.integers(0, 20), st.sampled_from(["", "a", "ab"]), st.sampled_from([1.0, 60.0]))
def test_merged_parts_equal_the_whole(seed: int, S1: int, S2: int, weights: str, big: float) -> None:
    """Parts add after rescaling, also where one is empty and where scores are large."""
    q, q_pos, s = make(seed, S1 + S2, weights=weights, big=big)

    def cut(lo: int, hi: int) -> Slots:
        return Slots(*(None if x is None else x[:, :, lo:hi] for x in (s.k, s.v, s.pos, s.a, s.b)))  # type: ignore[arg-type]

    whole = slot_attention(q, q_pos, s)
    parts = merge(slot_parts(q, q_pos, cut(0, S1)), slot_parts(q, q_pos, cut(S1, S1 + S2)))
    assert torch.isfinite(whole).all()
    assert (finish(parts, q.dtype) - whole).abs().max() < 1e-9


@FEW
@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(-30, 30))
def test_shifts_and_duplicates(seed: int, S: int, shift: float) -> None:
    """Adding a constant to all log-weights changes nothing; a slot twice equals one with weight log 2."""
    q, q_pos, s = make(seed, S, weights="a")
    assert s.a is not None
    out = slot_attention(q, q_pos, s)
    assert (slot_attention(q, q_pos, replace(s, a=s.a + shift)) - out).abs().max() < 1e-5
    twice = Slots(*(torch.cat((x, x), 2) for x in (s.k, s.v, s.pos, s.a)))  # type: ignore[misc]
    heavier = replace(s, a=s.a + math.log(2))
    assert (slot_attention(q, q_pos, twice) - slot_attention(q, q_pos, heavier)).abs().max() < 1e-5


def test_nothing_visible_gives_zero() -> None:
    """No slot at all, only empty slots, a padded query, only slots from the future."""
    q, q_pos, s = make(3, 6, weights="a")
    empty = Slots(s.k[:, :, :0], s.v[:, :, :0], s.pos[:, :, :0], s.a[:, :, :0])  # type: ignore[index]
    for slots, where in (
        (empty, q_pos),
        (replace(s, pos=torch.full_like(s.pos, -1)), q_pos),
        (s, torch.full_like(q_pos, -1)),
        (replace(s, pos=torch.full_like(s.pos, 90)), q_pos),
    ):
        for form in BACKENDS.values():
            if slots.k.shape[2] or form is slot_attention:
                assert torch.equal(form(q, where, slots), torch.zeros_like(q))  # type: ignore[arg-type]


def test_mass_is_the_probability_each_slot_received() -> None:
    """It sums to the number of queries of the group that saw anything, and is zero for empty slots."""
    q, q_pos, s = make(4, 15, weights="ab")
    out, mass = slot_attention(q, q_pos, s, mass=True)
    assert torch.equal(out, slot_attention(q, q_pos, s))
    assert torch.allclose(mass.sum(-1), torch.full((2, 2), 3.0 * 3, dtype=mass.dtype))
    assert (mass[s.pos < 0] == 0).all()
    one = slot_attention(q[:, :, :1], q_pos[:, :1], replace(s, b=None, v=torch.eye(15, dtype=q.dtype).expand(2, 2, 15, 15)))
    # with values that are unit vectors, the output is the probabilities themselves
    _, m = slot_attention(q[:, :, :1], q_pos[:, :1], replace(s, b=None), mass=True)
    assert torch.allclose(one.view(2, 2, 3, 15).sum(2), m)


@pytest.mark.parametrize("name", sorted(BACKENDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("R", "D"), [(1, 64), (3, 64), (4, 80), (8, 16)])
def test_backends_match_float64(name: str, dtype: torch.dtype, R: int, D: int) -> None:
    """Every faster form, with log-weights, a window and empty slots, is within 1.5 times the error of the eager form at the same dtype."""
    for seed in range(4):
        q, q_pos, s = make(seed, 77, T=5, R=R, D=D, weights="a" if seed % 2 else "")
        s = replace(s, window=30)
        low = Slots(s.k.to(dtype), s.v.to(dtype), s.pos, s.a, None, s.window)
        true = slot_attention(q.to(dtype).double(), q_pos, Slots(low.k.double(), low.v.double(), s.pos, s.a, None, s.window))
        allowed = 1.5 * (slot_attention(q.to(dtype), q_pos, low).double() - true).abs().max() + (1e-6 if dtype == torch.float32 else 4e-3)
        assert (attention(q.to(dtype), q_pos, low, name).double() - true).abs().max() <= allowed


def test_sdpa_refuses_separate_weights() -> None:
    """One softmax cannot hold a != b; `auto` takes the formula there."""
    q, q_pos, s = make(5, 8, weights="ab")
    with pytest.raises(ZooError, match="eager"):
        sdpa(q, q_pos, s)
    assert torch.equal(attention(q, q_pos, s), slot_attention(q, q_pos, s))
