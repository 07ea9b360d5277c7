"""The slot formula: against a literal float64 sum, its algebra, and each faster form against it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_checks import wide
from torch import Tensor

from zoo.attention.backends import BACKENDS, attention
from zoo.attention.slots import (
    PAGE,
    PagedSlots,
    Parts,
    Slots,
    finish,
    flash_pages,
    flash_slots,
    merge,
    paged_mass,
    paged_parts,
    sdpa,
    slot_attention,
    slot_mass,
    slot_parts,
)
from zoo.errors import ZooError

FEW = settings(max_examples=40, deadline=None, derandomize=True)

HERE = {name: form for name, form in BACKENDS.items() if name != "triton"}  # which tests/interpreter asks


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
    return literal_sums(q, q_pos, s)[0]


def literal_sums(q: Tensor, q_pos: Tensor, s: Slots, queries: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The same; also the logarithm of the denominator (B, H, T), and the probability that each slot got (B, G, S), a query counting as
    much as `queries` (B, T) says."""
    B, H, T, D = q.shape
    G, S = s.k.shape[1:3]
    out, mass = torch.zeros(B, H, T, D, dtype=torch.float64), torch.zeros(B, G, S, dtype=torch.float64)
    total = torch.full((B, H, T), -math.inf, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            g = h * G // H
            for t in range(T):
                num, den, shares = torch.zeros(D, dtype=torch.float64), 0.0, [0.0] * S
                for j in range(S):
                    p, now = int(s.pos[b, min(g, s.pos.shape[1] - 1), j]), int(q_pos[b, t])
                    if p < 0 or p > now or (s.window is not None and p <= now - s.window):
                        continue
                    score = float(q[b, h, t] @ s.k[b, g, j]) / math.sqrt(D)
                    a = 0.0 if s.a is None else float(s.a[b, g, j])
                    c = a if s.b is None else float(s.b[b, g, j])
                    num += math.exp(score + a) * s.v[b, g, j]
                    shares[j] = math.exp(score + c)
                    den += shares[j]
                if den > 0:
                    out[b, h, t], total[b, h, t] = num / den, math.log(den)
                    mass[b, g] += torch.tensor(shares, dtype=torch.float64) / den * (1 if queries is None else float(queries[b, t]))
    return out, total, mass


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
    q, s = q.float(), replace(s, k=s.k.float(), v=s.v.float())
    empty = Slots(s.k[:, :, :0], s.v[:, :, :0], s.pos[:, :, :0], s.a[:, :, :0])  # type: ignore[index]
    for slots, where in (
        (empty, q_pos),
        (replace(s, pos=torch.full_like(s.pos, -1)), q_pos),
        (s, torch.full_like(q_pos, -1)),
        (replace(s, pos=torch.full_like(s.pos, 90)), q_pos),
    ):
        for form in HERE.values():
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


SHAPES = [(1, 64), (3, 64), (4, 80), (8, 16)]
# flex is compiled for each shape: tests/test_flex.py has more of them
CASES = [(name, *shape) for name in sorted(HERE) for shape in (SHAPES if name != "flex" else SHAPES[1:3])]


@pytest.mark.parametrize(("name", "R", "D"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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


# Pages


def paged(seed: int, counts: list[int], T: int, R: int = 2, D: int = 16, older: bool = False) -> tuple[Tensor, Tensor, PagedSlots, Slots]:
    """Random q, q_pos and slots of 2 sequences x 2 heads that own counts[b 2 + g] of them, in float64: in pages, and dense.

    The arena also holds the pages of another layer, before and after: visible slots that any query would prefer. Among a head's rows are
    empty ones, and now and then a whole empty page. older=True: no slot is younger than a query.
    """
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    odd = lambda n: int(torch.randint(0, n, (), generator=g))  # noqa: E731
    q, q_pos = rand(2, 2 * R, T, D), torch.arange(50, 50 + T).expand(2, T).clone() + torch.tensor([[0], [7]])
    S = max(1, *counts)
    dense = Slots(
        rand(2, 2, S, D),
        rand(2, 2, S, D),
        torch.randint(0, 50 if older else 60, (2, 2, S), generator=g),
        rand(2, 2, S).float(),
        window=None,
    )
    share = [-(-n // PAGE) + (odd(3) == 0) for n in counts]
    before, after = 1 + odd(3), 1 + odd(3)
    P = 1 + before + sum(share) + after
    k, v = torch.ones(P, PAGE, D, dtype=torch.float64), torch.full((P, PAGE, D), 9.0, dtype=torch.float64)
    pos, a = torch.full((P, PAGE), 45), torch.full((P, PAGE), 5.0)  # the other layer's
    pos[0], a[0] = -1, -math.inf
    first, spans, pages, owner, table = 1 + before, [], [0], [0], []
    for head, (n, own) in enumerate(zip(counts, share, strict=True)):
        b, h = divmod(head, 2)
        spans.append((first, own))
        pos[first : first + own], a[first : first + own] = -1, -math.inf
        where = torch.randperm(own * PAGE, generator=g)[:n]  # anywhere in the head's pages
        for flat, mine in ((k, dense.k), (v, dense.v), (pos, dense.pos), (a, dense.a)):
            assert mine is not None
            flat[first : first + own].flatten(0, 1)[where] = mine[b, h, :n]
        dense.pos[b, h, n:] = -1
        table.append(list(range(len(pages), len(pages) + own)))
        pages += range(first, first + own)
        owner += [head] * own
        first += own
    for unused in range(odd(3)):  # lists are padded, at the end too
        pages.append(0)
        owner.append(unused)
    J = max(1, *map(len, table)) + odd(2)
    table = [row + [0] * (J - len(row)) for row in table]
    lists = (torch.tensor(x, dtype=torch.int32) for x in (pages, owner, table))
    return q, q_pos, PagedSlots(k, v, pos.int(), a, *lists, spans), dense


def as_type(s: PagedSlots, dtype: torch.dtype) -> PagedSlots:
    return replace(s, k=s.k.to(dtype), v=s.v.to(dtype))


def log_sum(parts: Parts) -> Tensor:
    """The logarithm of a denominator, (B, H, T)."""
    return (parts.max_den + parts.den.log()).flatten(1, 2)


def near(got: Tensor, want: Tensor, atol: float, some: bool) -> None:
    """Equal within atol, and -inf where `want` is; with `some`, what is compared is not nothing, and far larger than atol."""
    torch.testing.assert_close(got, want, rtol=0, atol=atol)
    if some:
        assert want[want.isfinite()].abs().max() > 100 * atol


ragged = st.lists(st.one_of(st.just(0), st.integers(0, 70)), min_size=4, max_size=4)


@FEW
@example(1, [70, 40, 33, 64], 3, None, False, 9)  # every head sees something
@given(st.integers(0, 10**6), ragged, st.integers(1, 5), st.sampled_from([None, 1, 5, 30]), st.booleans(), st.integers(0, 9))
def test_pages_are_the_literal_sum(seed: int, counts: list[int], T: int, window: int | None, pad: bool, more: int) -> None:
    """Heads of different lengths, empty heads and pages, slots of the future, windows, padded queries: output, denominator and mass, alone
    and merged with a dense part."""
    q, q_pos, pages, dense = paged(seed, counts, T)
    pages, dense = replace(pages, window=window), replace(dense, window=window)
    if pad:
        q_pos[1, T // 2 :] = -1
    some = window is None and min(counts) > 30 and more > 5
    parts = paged_parts(q, q_pos, pages)
    out, total, _ = literal_sums(q, q_pos, dense)
    assert (finish(parts, torch.float64) - out).abs().max() < 1e-6
    near(log_sum(parts), total, 1e-6, some)

    _, _, tail = make(seed + 1, more, B=2, G=2, weights="", T=T)
    tail = replace(tail, pos=torch.where(tail.pos >= 0, tail.pos + 15, -1), window=window)
    whole = merge(slot_parts(q, q_pos, tail), parts)
    counted = torch.rand(2, T, generator=torch.Generator().manual_seed(seed)).double()
    both = Slots(*(torch.cat((x, y), 2) for x, y in ((dense.k, tail.k), (dense.v, tail.v), (dense.pos, tail.pos))), window=window)
    both = replace(both, a=torch.cat((dense.a, torch.zeros(2, 2, more)), 2))  # type: ignore[arg-type]
    for queries in (None, counted):
        out, total, mass = literal_sums(q, q_pos, both, queries)
        assert (finish(whole, torch.float64) - out).abs().max() < 1e-6
        near(log_sum(whole), total, 1e-6, some)
        near(slot_mass(q, q_pos, tail, whole, queries), mass[:, :, dense.k.shape[2] :], 1e-6, some)
        got = paged_mass(q, q_pos, pages, whole, queries)
        assert got.shape == (len(pages.pages), PAGE)
        assert (got[pages.pos[pages.pages.long()] < 0] == 0).all()
        for head in range(4):
            b, g = divmod(head, 2)
            mine = got[pages.table[head].long()].flatten()
            where = pages.pos[pages.pages[pages.table[head].long()].long()].flatten() >= 0
            near(mine[where].sort().values, mass[b, g, : counts[head]].sort().values, 1e-6, some)
            near(mine.sum(), mass[b, g, : dense.k.shape[2]].sum(), 1e-6, some)


def wrong_owner(s: PagedSlots) -> PagedSlots:
    return replace(s, owner=(s.owner + 1) % 4)


def wrong_table(s: PagedSlots) -> PagedSlots:
    return replace(s, table=s.table.roll(1, 0), spans=[*s.spans[1:], s.spans[0]])


def no_weight(s: PagedSlots) -> PagedSlots:
    return replace(s, a=torch.where(s.pos >= 0, 0, s.a))


def no_page_table(s: PagedSlots) -> PagedSlots:
    """Places in the list taken for pages."""
    return replace(s, pages=torch.arange(len(s.pages), dtype=torch.int32), spans=[(max(first - 1, 0), n) for first, n in s.spans])


def wider(s: PagedSlots) -> PagedSlots:
    assert s.window is not None
    return replace(s, window=s.window + 1)


@pytest.mark.parametrize("mutant", [wrong_owner, wrong_table, no_weight, no_page_table, wider])
def test_wrong_pages_are_noticed(mutant: Callable[[PagedSlots], PagedSlots]) -> None:
    """Each mistake that the tests of pages are there to find moves an output by far more than they allow."""
    for T in (1, 4):
        q, q_pos, pages, dense = paged(3, [40, 0, 70, 33], T, older=True)
        pages, dense = replace(pages, window=20), replace(dense, window=20)
        expected = literal(q, q_pos, dense)
        forms = [paged_parts] if mutant is wrong_owner else [paged_parts, flash_pages]
        for form in forms:
            assert (finish(form(q, q_pos, pages), torch.float64) - expected).abs().max() < 1e-5
            assert (finish(form(q, q_pos, mutant(pages)), torch.float64) - expected).abs().max() > 1e-2


def low_precision(q: Tensor, q_pos: Tensor, s: Slots) -> Tensor:
    """The formula as written with tensors of q's dtype: products rounded to it, softmax in float32, probabilities rounded to it."""
    R = q.shape[1] // s.k.shape[1]
    k, v = s.k.repeat_interleave(R, 1), s.v.repeat_interleave(R, 1)
    seen = (s.pos[:, :, None] >= 0) & (s.pos[:, :, None] <= q_pos[:, None, :, None])
    seen &= s.pos[:, :, None] > (q_pos[:, None, :, None] - (s.window or 10**9))
    score = (q @ k.mT).float() * q.shape[-1] ** -0.5
    if s.a is not None:
        score = score + s.a.repeat_interleave(R, 1)[:, :, None]
    prob = score.masked_fill(~seen.repeat_interleave(R, 1), -torch.inf).softmax(-1).nan_to_num(0)
    return prob.to(q.dtype) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(FEW, max_examples=25)
@example(1, 600, 3, None, True, False)
@given(
    st.integers(0, 10**6),
    st.sampled_from([1, 5, 77, 600, 1100]),
    st.integers(1, 5),
    st.sampled_from([None, 5, 30]),
    st.booleans(),
    st.booleans(),
)
def test_fused_slots_match_float64(dtype: torch.dtype, seed: int, S: int, T: int, window: int | None, weights: bool, late: bool) -> None:
    """Within 1.5 times the error of the low-precision formula, and so is the log-sum-exp. late=True: what is seen lies behind hundreds of
    slots that are not, in a later block of the kernel."""
    q, q_pos, s = make(seed, S, T=T, R=3, D=80 if seed % 2 else 16, weights="a" if weights else "")
    if late:
        s.pos[:, :, : S - 3] = -1
    if seed % 3 == 0:
        q_pos[0, T // 2 :] = -1
    s = Slots(s.k.to(dtype), s.v.to(dtype), s.pos[:, :1] if seed % 5 == 0 else s.pos, s.a, None, window)
    exact = wide(s)
    check_fused(
        flash_slots(q.to(dtype), q_pos, s),
        q.to(dtype),
        q_pos,
        replace(s, pos=s.pos.expand(2, 2, S)),
        slot_parts(q.to(dtype).double(), q_pos, exact),
        some=S > 70 and window is None and not late,
    )


def check_fused(got: Parts, q: Tensor, q_pos: Tensor, low: Slots, exact: Parts, some: bool = True) -> None:
    """`got` is `exact`, up to 1.5 times the error that low precision has anyway, and an ulp of the largest value. `some`: as in near."""
    true, largest = finish(exact, torch.float64), float(low.v.abs().max())
    error = (finish(got, torch.float64) - true).abs()
    allowed = 1.5 * (low_precision(q, q_pos, low).double() - true).abs().max() + torch.finfo(q.dtype).eps * largest
    assert error.max() <= allowed
    nothing = true.abs().amax(-1) == 0
    assert (finish(got, torch.float64)[nothing] == 0).all()
    near(log_sum(got).double(), log_sum(exact), 1e-4 if q.dtype == torch.float32 else 2e-3, some)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(FEW, max_examples=25)
@example(1, [70, 40, 33, 64], 3, None, False)
@given(st.integers(0, 10**6), ragged, st.integers(1, 5), st.sampled_from([None, 5, 30]), st.booleans())
def test_fused_pages_match_float64(dtype: torch.dtype, seed: int, counts: list[int], T: int, window: int | None, pad: bool) -> None:
    """The same of pages, whatever is in them being older than the queries."""
    q, q_pos, pages, dense = paged(seed, counts, T, R=1 + seed % 3, D=80 if seed % 2 else 16, older=True)
    if pad:
        q_pos[1, T // 2 :] = -1
    pages, q = replace(as_type(pages, dtype), window=window), q.to(dtype)
    dense = replace(dense, k=dense.k.to(dtype), v=dense.v.to(dtype), window=window)
    some = window is None and min(counts) > 30
    check_fused(flash_pages(q, q_pos, pages), q, q_pos, dense, paged_parts(q.double(), q_pos, as_type(pages, torch.float64)), some)


def test_a_wrong_fused_form_is_noticed() -> None:
    """The tolerance of low precision hides neither a missing log-weight nor a window off by one, nor queries in another order."""
    for dtype in (torch.float32, torch.bfloat16):
        q, q_pos, s = make(8, 77, T=4, R=3, weights="a")
        low = Slots(s.k.to(dtype), s.v.to(dtype), s.pos, s.a, None, 9)
        exact = slot_parts(q.to(dtype).double(), q_pos, wide(low))
        check_fused(flash_slots(q.to(dtype), q_pos, low), q.to(dtype), q_pos, low, exact)
        turned = flash_slots(q.to(dtype).view(2, 2, 3, 4, 16).transpose(2, 3).reshape(q.shape), q_pos, low)
        turned = Parts(*(x.flatten(2, 3).unflatten(2, (4, 3)).transpose(2, 3) for x in turned))
        for wrong in (
            flash_slots(q.to(dtype), q_pos, replace(low, a=None)),
            flash_slots(q.to(dtype), q_pos, replace(low, window=8)),
            flash_slots(q.to(dtype), q_pos, replace(low, window=10)),
            flash_slots(q.to(dtype), q_pos + 1, low),
            turned,
        ):
            with pytest.raises(AssertionError):
                check_fused(wrong, q.to(dtype), q_pos, low, exact)
