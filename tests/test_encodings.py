"""The encodings themselves: bits in bytes, grids, centroids, distortion, and estimators that are right on average."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.attention import parse
from zoo.attention.encoding import Codes, Encoding
from zoo.attention.packing import decode_tokens, encode_tokens, grid, group, pack, packed, steps, unpack
from zoo.attention.qjl import directions
from zoo.attention.slots import PAGE
from zoo.attention.turboquant import centroids, rotation, unbiased
from zoo.errors import ZooError

FEW = settings(max_examples=40, deadline=None, derandomize=True)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def encoded(attn: str, k: Tensor, v: Tensor, old: Codes | None = None) -> tuple[Encoding, Codes, Codes]:
    """The encoding, the codes of pages k, v (P, PAGE, D), and its tables. old: what rows of a page share is that of these codes."""
    one, (P, _, D) = parse(attn), k.shape
    assert isinstance(one, Encoding)
    tables = one.tables(D)
    empty = {name: torch.zeros(P, *([] if c.shared else [PAGE]), c.size, dtype=c.dtype) for name, c in one.codes(D).items()}
    codes = one.encode(k, v, old or empty, torch.full((P,), old is not None), tables)
    assert {name: (t.shape, t.dtype) for name, t in codes.items()} == {name: (t.shape, t.dtype) for name, t in empty.items()}
    assert list(tables) == list(one.shared)
    return one, codes, tables


# Bits in bytes


@FEW
@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 10**6))
def test_numbers_lie_bit_by_bit(bits: int, n: int, seed: int) -> None:
    """One long number in base 2**bits, lowest first, cut into bytes; and back."""
    numbers = torch.randint(0, 2**bits, (2, n), generator=torch.Generator().manual_seed(seed))
    data = pack(numbers, bits)
    assert data.dtype == torch.uint8
    assert data.shape == (2, packed(n, bits))
    for row, bytes_ in zip(numbers.tolist(), data.tolist(), strict=True):
        assert bytes(bytes_) == sum(x << bits * i for i, x in enumerate(row)).to_bytes(packed(n, bits), "little")
    assert torch.equal(unpack(data, bits, n).long(), numbers)
    assert packed(64, bits) == 64 * bits // 8


# Grids


@FEW
@given(st.sampled_from([2, 4, 8]), st.floats(-300, 300), st.floats(1e-6, 100), st.integers(0, 10**6))
def test_a_grid_reaches_around(bits: int, middle: float, width: float, seed: int) -> None:
    """Its ends lie outside the numbers, by no more than float16 rounds; every number is at most scale / 2 from its step."""
    x = middle + width * draw(5, 9, seed=seed)
    zero, scale = grid(x.amin(1), x.amax(1), bits)
    assert zero.dtype == scale.dtype == torch.float16
    z, s = zero.double()[:, None], scale.double()[:, None]
    assert (z <= x).all()
    assert (z + s * (2**bits - 1) >= x - 1e-12 * x.abs()).all()
    assert (x.amin(1) - z[:, 0] <= x.amin(1).abs() * 2**-9 + 2**-23).all()
    assert (s[:, 0] * (2**bits - 1) <= (x.amax(1) - z[:, 0]) * (1 + 2**-9) + 2**-22 * 2**bits).all()
    code = steps(x, z, s, bits)
    assert int(code.max()) <= 2**bits - 1
    assert ((z + s * code) - x).abs().le(s / 2 * (1 + 1e-9)).all()


def test_equal_numbers_are_exact_and_others_are_clipped() -> None:
    x = torch.full((1, 4), 3.5)
    zero, scale = grid(x.amin(1), x.amax(1), 4)
    assert (zero.item(), scale.item()) == (3.5, 0)
    assert steps(x, zero[:, None], scale[:, None], 4).tolist() == [[0, 0, 0, 0]]
    zero, scale = torch.tensor([0.0]).half(), torch.tensor([0.5]).half()
    assert steps(torch.tensor([-9.0, 0.24, 0.26, 99.0]), zero, scale, 2).tolist() == [0, 0, 1, 3]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [16, 64, 80])
def test_kivi_by_hand(bits: int, size: int) -> None:
    """Keys: one grid a channel of 32 tokens. Values: one for each 32 channels of a token (the largest number that divides both). Every
    number within scale / 2, where scale is the range / (2**bits - 1), and a key channel that stands out does not make others coarse."""
    k, v = draw(3, PAGE, size), draw(3, PAGE, size, seed=1)
    k[:, :, 3] = 40 + 10 * k[:, :, 3]
    one, codes, tables = encoded(f"kivi:bits={bits}", k, v)
    K, V = one.keys(codes, tables, size, torch.float64), one.values(codes, tables, size, torch.float64)
    n = 2**bits - 1
    for p in range(3):
        for c in range(size):
            column = k[p, :, c].tolist()
            scale = (max(column) - min(column)) / n
            assert (K[p, :, c] - k[p, :, c]).abs().max() <= scale / 2 * (1 + 2e-3) + abs(min(column)) / n * 2**-9
    wide = math.gcd(size, 32)
    assert group(size) == wide
    parts, got = v.unflatten(-1, (-1, wide)), V.unflatten(-1, (-1, wide))
    scale = (parts.amax(-1) - parts.amin(-1)) / n
    assert ((got - parts).abs().amax(-1) <= scale / 2 * (1 + 2e-3) + parts.amin(-1).abs() / n * 2**-9).all()
    assert (K - k).square().mean() > scale.mean() ** 2 / 50  # and it is no better than so many bits can be
    assert (K - k)[:, :, 4:].abs().max() < 4 / n
    data, grids = encode_tokens(v, bits)
    assert torch.equal(decode_tokens(data, grids, bits, size, torch.float64), V)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_later_key_on_a_grid_that_is_made(bits: int) -> None:
    """A page's grid stays; keys that lie elsewhere have a grid of their own in its steps, none of which counts as less than the median:
    within half such a step, however far away, and what is large in one channel leaves others exact to their own scale. The first keys have
    none: 0 and 1."""
    k, v = draw(3, PAGE, 64), draw(3, PAGE, 64, seed=1)
    k[:, :, 3] *= 100
    k[:, :, 9] = 7.0  # one number: no grid to be on
    one, codes, tables = encoded(f"kivi:bits={bits}", k, v)
    assert torch.equal(codes["k_own"], torch.tensor([0.0, 0.0, 1.0, 1.0]).half().expand(3, PAGE, 4))
    width, scale = (k.amax(1) - k.amin(1))[:, None], codes["k_grid"].double()[:, None, 64:]
    steps_ = torch.maximum(scale, scale.median(-1, keepdim=True).values)
    for ranges, bound in ((1.0, 3.2), (100.0, 230.0)):
        later = k.roll(5, 0) + ranges * width * torch.tensor([1.0, -0.5])[torch.arange(64) % 2]
        later[:, :, 9] = 7.0
        _, new, _ = encoded(f"kivi:bits={bits}", later, v, codes)
        assert torch.equal(new["k_grid"], codes["k_grid"])
        got, own = one.keys(new, tables, 64, torch.float64), -new["k_own"].double()[..., 2:].repeat_interleave(32, -1)
        assert ((got - later).abs() <= steps_ * (own / 2 * (1 + 1e-3) + 2e-3)).all()
        assert 1 < float(own.max()) < bound
        assert ranges > 1 or (got - later)[:, :, 10:].abs().max() < 0.02 * (got - later)[:, :, 3].abs().max()


@pytest.mark.parametrize(("bits", "most"), [(2, 0.75), (4, 0.15), (8, 0.01)])
@pytest.mark.parametrize("first", [1, 2, 4])
def test_a_page_made_of_few_keys(bits: int, most: float, first: int) -> None:
    """Its grid knows little, or nothing, of keys that come later: these are still as near as a grid of their own over 32 channels is."""
    k, later = draw(4, first, 64)[:, torch.arange(PAGE) % first], draw(4, PAGE, 64, seed=1)
    one, codes, tables = encoded(f"kivi:bits={bits}", k, k)
    _, new, _ = encoded(f"kivi:bits={bits}", later, later, codes)
    assert off(one.keys(new, tables, 64, torch.float64), later) < most
    assert off(one.keys(codes, tables, 64, torch.float64), k) < (1e-3 if first < 3 else most / 3)
    data, grids = encode_tokens(later, bits)  # as values are
    assert off(one.keys(new, tables, 64, torch.float64), later) < 2 * off(decode_tokens(data, grids, bits, 64, torch.float64), later)


def off(x: Tensor, of: Tensor) -> float:
    return float((x - of).norm() / of.norm())


@pytest.mark.parametrize(
    ("mean", "start", "all_", "others"), [(20, 100, 0.05, 0.1), (20, 2000, 0.07, 0.2), (100, 2000, 0.06, 0.7), (100, 8000, 0.2, 3.0)]
)
def test_a_key_that_turns_away(mean: float, start: int, all_: float, others: float) -> None:
    """One slow channel has a mean of 20 or 100 times the spread; keys come into a page that was made `start` tokens before. Nothing is cut
    off: the error is a small part of the key, though by then a large one of the channels that share its late grid."""
    base, pos = draw(4, 2 * PAGE, 64), torch.arange(PAGE, dtype=torch.float64)
    base[:, :, 30] += mean

    def turned(x: Tensor, pos: Tensor) -> Tensor:
        angle = pos[:, None] * 10_000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
        a, b = x.chunk(2, -1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    k, later = turned(base[:, :PAGE], pos), turned(base[:, PAGE:], start + pos)
    one, codes, tables = encoded("kivi:bits=4", k, k)
    _, new, _ = encoded("kivi:bits=4", later, later, codes)
    got, plain = one.keys(new, tables, 64, torch.float64), torch.arange(64) % 32 != 30
    assert all_ / 3 < off(got, later) < all_
    assert others / 3 < off(got[..., plain], later[..., plain]) < others


# Centroids and rotations


def test_centroids_are_the_known_ones() -> None:
    """Lloyd-Max quantisers of N(0, 1) (Max, 1960): numbers and mean square errors; each is the mean of what is nearest to it."""
    known = {
        1: ([0.7979], 0.3634), 2: ([0.4528, 1.510], 0.1175), 3: ([0.2451, 0.7560, 1.344, 2.152], 0.03454),
        4: ([0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009497),
    }  # fmt: skip
    x = torch.linspace(-12, 12, 2_000_001, dtype=torch.float64)
    p = (-x.square() / 2).exp()
    p /= p.sum()
    for bits in range(1, 9):
        c = centroids(bits)
        assert len(c) == 2**bits
        assert torch.equal(c, c.sort().values)
        assert torch.allclose(c, -c.flip(0))
        near = torch.bucketize(x, (c[1:] + c[:-1]) / 2)
        error = float((p * (x - c[near]).square()).sum())
        mass = torch.zeros(len(c), dtype=torch.float64).index_add_(0, near, p)
        means = torch.zeros(len(c), dtype=torch.float64).index_add_(0, near, p * x) / mass
        assert (means - c).abs().max() < (1e-4 if bits < 5 else 2e-2)
        assert error < math.sqrt(3) * math.pi / 2 * 4.0**-bits
        if bits in known:
            assert c[len(c) // 2 :].tolist() == pytest.approx(known[bits][0], abs=6e-4)
            assert error == pytest.approx(known[bits][1], rel=1e-3)
        else:
            assert error == pytest.approx(math.sqrt(3) * math.pi / 2 * 4.0**-bits, rel=0.08)


def test_rotations_are_rotations() -> None:
    """Orthogonal, of any seed another, the same each time; a column's entries have mean 0 and variance 1 / D, so it is no fixed one."""
    seen = [rotation(seed, 16, which) for seed in range(200) for which in (0, 1)]
    assert all((r @ r.mT - torch.eye(16)).abs().max() < 1e-12 for r in seen)
    assert torch.equal(rotation(3, 16, 0), rotation(3, 16, 0))
    entries = torch.stack(seen)
    assert entries.mean(0).abs().max() < 5 * (1 / 16 / 400) ** 0.5
    assert (entries.square().mean(0) * 16 - 1).abs().max() < 5 * (2 / 400) ** 0.5
    S = directions(0, 40, 16, 0).double()
    assert S.shape == (40, 16)
    assert (S[:16] @ S[:16].mT / 16 - torch.eye(16)).abs().max() < 1e-5
    assert (S[16:32] @ S[:16].mT / 16).abs().max() > 0.2  # another block, of its own


# Distortion


def distortion(bits: int, size: int) -> float:
    """E (y - c)^2 for y a coordinate of a random vector of length sqrt(size), by its density (1 - y^2 / D)^((D - 3) / 2)."""
    y = torch.linspace(-(size**0.5), size**0.5, 400_001, dtype=torch.float64)
    p = (1 - y.square() / size).clamp(min=0) ** ((size - 3) / 2)
    c = centroids(bits)
    return float((p * (y - c[torch.bucketize(y, (c[1:] + c[:-1]) / 2)]).square()).sum() / p.sum())


@pytest.mark.parametrize("size", [64, 128, 512])
@pytest.mark.parametrize(("bits", "known"), [(1, 0.363), (2, 0.117), (3, 0.0346), (4, 0.0095), (3.5, (0.0346 + 0.0095) / 2)])
def test_turboquants_distortion(bits: float, known: float, size: int) -> None:
    """E |x - x~|^2 / |x|^2 of vectors of any kind, here one with few large numbers: that of the centroids for a coordinate of a random
    rotation in this many dimensions, which is a little less than the Gaussian's. 128 vectors by 8 rotations."""
    x, each = draw(4, PAGE, size) ** 5, {"k": list[Tensor](), "v": list[Tensor]()}
    for seed in range(8):
        one, codes, tables = encoded(f"turboquant:bits={bits},seed={seed}", x, 3 * x)
        decoded = (one.keys(codes, tables, size, torch.float64), one.answer(one.values(codes, tables, size, torch.float64), tables))
        for name, y, of in zip(each, decoded, (x, 3 * x), strict=True):
            each[name].append((y - of).square().sum(-1) / of.square().sum(-1))
        assert codes["k_code"].shape[-1] == size * bits / 8
    true = (distortion(math.floor(bits), size) + distortion(math.ceil(bits), size)) / 2
    assert true == pytest.approx(known, rel=3 / size + 0.004)
    for parts in each.values():
        e = torch.stack(parts)
        assert e.mean() == pytest.approx(true, abs=4 * float(e.std()) / e.numel() ** 0.5 + 0.001 * true)


@pytest.mark.parametrize(
    ("bits", "size", "near"), [(2.1, 16, "2 or 2.5"), (3.3, 64, "3.25 or 3.375"), (7.99, 64, "7.875 or 8"), (2.5, 20, "2.4 or 2.8")]
)
@pytest.mark.parametrize("mode", ["mse", "prod"])
def test_bits_that_a_head_cannot_have(bits: float, size: int, near: str, mode: str) -> None:
    """Whole eights of coordinates have one bit more; other bits would silently be others."""
    one = parse(f"turboquant:bits={bits},mode={mode}")
    assert isinstance(one, Encoding)
    with pytest.raises(ZooError, match=f"bits={bits} must .* {size} coordinates .* take {near}"):
        one.codes(size)
    with pytest.raises(ZooError):
        one.tables(size)


# Again


@pytest.mark.parametrize(
    ("attn", "more"),
    [("kivi:bits=2", 1.2), ("kivi:bits=4", 1.4), ("kivi:bits=8", 1.4), ("qjl", 1.02), ("qjl:sketch=1", 1.02), ("qjl:sketch=5", 1.1),
     ("turboquant:bits=1", 1), ("turboquant:bits=2", 1), ("turboquant:bits=3.5", 1), ("turboquant:bits=8", 1),
     ("turboquant:bits=2,mode=prod", 1.35), ("turboquant:bits=3.5,mode=prod", 1.35)],
)  # fmt: skip
@pytest.mark.parametrize("size", [64, 128])
def test_encoding_again_and_again(attn: str, more: float, size: int) -> None:
    """What `again` says, encoded 32 times: lengths stay, and the error is at most `more` times that of one encoding. Nearest centroids and
    grids stay to the bit (keys come late to kivi's grid once), and of qjl's signs nearly all."""
    k, v = draw(4, PAGE, size), draw(4, PAGE, size, seed=1)
    one, first, tables = encoded(attn, k, v)

    def errors(codes: Codes) -> tuple[float, float]:
        values = one.answer(one.values(codes, tables, size, torch.float64), tables)
        return off(one.keys(codes, tables, size, torch.float64), k), off(values, v)

    codes = after_one = encoded(attn, *one.again(first, tables, size, torch.float64), first)[1]
    for _ in range(31):
        codes = encoded(attn, *one.again(codes, tables, size, torch.float64), codes)[1]
    for (once, often), factor in zip(zip(errors(first), errors(codes), strict=True), (more, 1), strict=True):
        assert often <= factor * once + 1e-6
    for x, of in zip(one.again(codes, tables, size, torch.float64), (k, v), strict=True):
        assert 0.95 < float(x.norm() / of.norm()) < 1.2
    for name, t in codes.items():
        if "prod" not in attn and name not in ("k_sign", "k_outlier"):
            assert torch.equal(t, after_one[name])
        if name == "k_sign" and "prod" not in attn:
            assert (t == first[name]).double().mean() > 0.95


# Scores


@pytest.mark.parametrize(
    "attn", ["kivi:bits=2", "turboquant:bits=3", "turboquant:bits=2.5,mode=prod", "turboquant:bits=1,mode=prod", "qjl"]
)
@pytest.mark.parametrize("size", [16, 64, 80])
def test_scores_are_those_of_decoded_keys(attn: str, size: int) -> None:
    """However an encoding computes them: so it may compute them faster, and slots may merge by what keys decode to."""
    k, v, q = draw(3, PAGE, size), draw(3, PAGE, size, seed=1), draw(3, 5, size, seed=2)
    one, codes, tables = encoded(attn, k, v)
    scores = one.scores(one.ask(q, tables), codes, tables, size)
    wanted = q @ one.keys(codes, tables, size, torch.float64).mT
    assert (scores - wanted).abs().max() < 1e-5 * wanted.abs().max()  # tables are float32
    assert (wanted - q @ k.mT).abs().max() > 0.1


@pytest.mark.parametrize(
    ("attn", "biased"),
    [("qjl:sketch=1", False), ("qjl:sketch=2", False), ("turboquant:bits=2,mode=prod", False), ("turboquant:bits=1,mode=prod", False),
     ("turboquant:bits=1.5,mode=prod", False), ("turboquant:bits=1", True), ("turboquant:bits=2", True)],
)  # fmt: skip
def test_inner_products_are_right_on_average(attn: str, biased: bool) -> None:
    """Over 300 sketches: the mean of q.k and of each of many others within 4.5 standard errors (of 480 means, about one in 300 such tests
    fails by chance); the slope of all against the truth within 4 of its own. With mode=mse it is too low, which this test sees. In 16
    dimensions the constant sqrt(pi / 2) would be 1.6 % too low, which it sees, too."""
    size, sketches = 16, 300
    k, q = draw(1, PAGE, size), draw(1, 15, size, seed=2)
    k[:, :, 2] *= 6  # one channel stands out
    true, got = q @ k.mT, []
    for seed in range(sketches):
        one, codes, tables = encoded(f"{attn},seed={seed}", k, k)
        got.append(one.scores(one.ask(q, tables), codes, tables, size))
    x = torch.stack(got)
    t = (x.mean(0) - true) / (x.std(0) / sketches**0.5 + 1e-3)  # norms are float16
    slopes = (x * true).sum((1, 2, 3)) / true.square().sum()
    slope = float((slopes.mean() - 1) / (slopes.std() / sketches**0.5 + 1e-4))
    assert (float(t.abs().max()) > 4.5) == biased
    assert (abs(slope) > 4) == biased
    assert x.std(0).mean() > 0.05 * true.std()


def test_the_factor_of_signs() -> None:
    """unbiased(D): 1 / E |u_1| of a vector of length sqrt(D) in a random direction; sqrt(pi / 2) for large D."""
    assert unbiased(1) == pytest.approx(1)
    assert unbiased(2) == pytest.approx(math.pi / (2 * math.sqrt(2)))
    assert unbiased(10_000) == pytest.approx(math.sqrt(math.pi / 2), rel=1e-4)
    u = torch.nn.functional.normalize(draw(200_000, 8), dim=-1)[:, 0].abs() * 8**0.5
    assert 1 / unbiased(8) == pytest.approx(float(u.mean()), abs=4 * float(u.std()) / 200_000**0.5)


@pytest.mark.parametrize(("attn", "power"), [("qjl", 0.5), ("turboquant", 1.0)])
def test_more_bits_are_closer(attn: str, power: float) -> None:
    """QJL's error falls like one over the root of the sketch; TurboQuant's by half a bit."""
    k, v, q = draw(8, PAGE, 64), draw(8, PAGE, 64, seed=1), draw(8, 7, 64, seed=2)
    sizes, errors = ([1, 4, 16], []) if attn == "qjl" else ([2, 4, 6], [])
    for n in sizes:
        one, codes, tables = encoded(f"{attn}:{one_option(attn)}={n}", k, v)
        errors.append(float((one.scores(one.ask(q, tables), codes, tables, 64) - q @ k.mT).std()))
    for a, b in itertools.pairwise(errors):
        assert a / b == pytest.approx(2.0 if attn == "qjl" else 4.0**power, rel=0.15)


def one_option(attn: str) -> str:
    return parse(attn).main


def test_outliers_have_a_sketch_of_their_own() -> None:
    """Eight channels a group, found in it; a channel that is twenty times as large leaves the others' scores as right as they were."""
    k, q = draw(2, PAGE, 64), draw(2, 5, 64, seed=2)
    k[0, :, 11] += 20
    k[1, :, 40] -= 20
    one, codes, tables = encoded("qjl", k, k)
    assert 11 in codes["k_channels"][0].tolist()
    assert 40 in codes["k_channels"][1].tolist()
    assert 40 not in codes["k_channels"][0].tolist() or 11 not in codes["k_channels"][1].tolist()
    q[0, :, 11] = q[1, :, 40] = 0
    error = float((one.scores(q, codes, tables, 64) - q @ k.mT).std())
    plain = draw(2, PAGE, 64)
    one, codes, tables = encoded("qjl", plain, plain)
    assert error < 3.5 * float((one.scores(q, codes, tables, 64) - q @ plain.mT).std())
