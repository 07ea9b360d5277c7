"""BalanceKV: the walk and the halving against plain loops, both forms as estimators, and the contract of the tree, which has no budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import feed, write_llama
from torch import Tensor

import zoo
from zoo import random
from zoo.attention import balancekv as halving
from zoo.attention import balancekv_tree as trees
from zoo.attention import parse
from zoo.attention.balance_walk import halve, kernel, walk
from zoo.attention.balancekv import BalanceKV
from zoo.attention.cache import Caches, open_dimensions
from zoo.attention.slots import Slots, slot_attention
from zoo.errors import ZooError
from zoo.eval.protocols import method_of
from zoo.lm import LM

TREE = "balancekv:mode=tree,batch=96"


# A cache without a model


def stream(attn: str, k: Tensor, v: Tensor, window: int | None = None, layers: int = 1) -> Caches:
    """Caches that read k, v (B, G, n, D) as a prompt, queries aside."""
    B, G, n, D = k.shape
    config = SimpleNamespace(num_key_value_heads=G, num_attention_heads=G, head_dim=D, num_hidden_layers=layers, sliding_window=window)
    caches = parse(attn).caches(config, None, B, n, None, k.dtype, "cpu")
    caches.begin_prompt([n] * B)
    for start in range(0, n, 64):
        pos = torch.arange(start, min(start + 64, n)).expand(B, -1)
        caches.reserve(pos)
        for layer in caches:
            layer.store.append(layer.row(pos), k[:, :, start : start + 64], v[:, :, start : start + 64], pos)
        caches.advance(pos)
    caches.end_prompt()
    return caches


def clustered(n: int, D: int = 16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (n, D) around 20 centres, as real ones are, with an offset that all keys share; queries (32, D)."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)  # noqa: E731
    home = torch.randint(0, 20, (n,), generator=g)
    return 2 * draw(20, D)[home] + 0.5 * draw(n, D) + draw(D), draw(20, D)[home] + 0.5 * draw(n, D), 1.5 * draw(32, D)


def heads(x: Tensor, G: int) -> Tensor:
    """(n, D) -> (1, G, n, D): every head draws its own signs for the same tokens."""
    return x.expand(1, G, *x.shape)


def sets(n: int, G: int) -> tuple[Tensor, Tensor, Tensor]:
    """k, v (1, G, n, D) and q (1, G, 32, D): other keys, values and queries in each head."""
    k, v, q = (torch.stack(x)[None] for x in zip(*(clustered(n, seed=seed) for seed in range(G)), strict=True))
    return k, v, q


def errors(attn: str, n: int, G: int) -> Tensor:
    """(G,): the relative error of attention's outputs in each of G sets of tokens and queries."""
    k, v, q = sets(n, G)
    out = slot_attention(q, torch.full((1, 32), n), stream(attn, k, v)[0].slots())
    assert isinstance(out, Tensor)
    true = (q @ k.mT / k.shape[3] ** 0.5).softmax(-1) @ v
    return ((out - true).norm(dim=-1) / true.norm(dim=-1))[0].mean(-1)


# The walk


def plain_walk(k: Tensor, v: Tensor, u: list[float], gamma: float) -> list[int]:
    """The formula, token by token, over k, v (n, D)."""
    mean, signs = k.mean(0), list[int]()
    for i in range(len(k)):
        y = 0.0
        for j, sign in enumerate(signs):
            score = math.exp(float((k[i] - mean) @ (k[j] - mean)) / math.sqrt(k.shape[1]))
            y += sign * score * (float(v[i] @ v[j]) + 0.025 + 1e-8)
        signs.append(1 if u[i] < min(max(0.5 - gamma * y, 0.0), 1.0) else -1)
    return signs


def plain_halving(signs: list[int]) -> dict[int, int]:
    """Which of n tokens stay, and their weights."""
    n, count = len(signs), {1: 0, -1: 0}
    for c, sign in enumerate(signs):
        count[sign] += 1
        if count[sign] == n // 2:
            return {i: 2 if i <= c else 1 for i in range(n) if i > c or signs[i] == -sign}
    raise AssertionError("unreachable")


@pytest.mark.parametrize("gamma", [0.05, 4.0])
def test_the_walk_is_the_formula(gamma: float) -> None:
    """Signs of several sets side by side, one of them short, as the plain form has them; a little less balance gives other signs."""
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(3, 40, 8, generator=g, dtype=torch.float64) for _ in range(2))
    u = torch.rand(3, 40, generator=g, dtype=torch.float64)
    valid = torch.arange(40) < torch.tensor([40, 40, 26])[:, None]
    G = kernel(k, v, valid, plus=0.025 + 1e-8)
    expected = [plain_walk(k[i, :n], v[i, :n], u[i, :n].tolist(), gamma) for i, n in enumerate((40, 40, 26))]
    got = [row[:n].int().tolist() for row, n in zip(walk(G, u, gamma), (40, 40, 26), strict=True)]
    assert got == expected
    assert walk(G, u, 0.0)[0].int().tolist() != expected[0]
    assert walk(kernel(k, v, valid, plus=0.025, centred=False), u, gamma)[0].int().tolist() != expected[0]


def test_halving_by_hand() -> None:
    """+ + - + - - + -: the fourth + is token 6, so that the - up to there stay and weigh 2, and what is behind weighs 1."""
    signs = torch.tensor([[1, 1, -1, 1, -1, -1, 1, -1], [-1, -1, -1, -1, 1, 1, 1, -1], [1, -1, 1, -1, 1, 1, 1, 1.0]])
    valid = torch.tensor([[True] * 8, [True] * 8, [True] * 4 + [False] * 4])
    stays, w = halve(signs, valid)
    assert stays[0].nonzero()[:, 0].tolist() == [2, 4, 5, 7]
    assert w[0, [2, 4, 5, 7]].tolist() == [2, 2, 2, 1]
    assert stays[1].nonzero()[:, 0].tolist() == [4, 5, 6, 7]  # the first four have one sign
    assert w[1, 4:].tolist() == [1, 1, 1, 1]
    assert stays[2].nonzero()[:, 0].tolist() == [1, 3]  # four tokens: the second + is token 2
    assert w[2, [1, 3]].tolist() == [2, 1]


def test_exactly_half_stays() -> None:
    """Whatever the signs, of sets of any even length; and as the plain form has it."""
    g = torch.Generator().manual_seed(1)
    signs = torch.where(torch.rand(300, 20, generator=g) < torch.rand(300, 1, generator=g), 1.0, -1.0)
    length = 2 * torch.randint(1, 11, (300, 1), generator=g)
    stays, w = halve(signs, torch.arange(20) < length)
    assert torch.equal(stays.sum(-1), length[:, 0] // 2)
    for i in range(300):
        expected = plain_halving(signs[i, : length[i]].int().tolist())
        assert {int(j): int(w[i, j]) for j in stays[i].nonzero()[:, 0]} == expected


# The practical form


def plain_form(k: Tensor, v: Tensor, first: int, rounds: int, gamma: float, head: int) -> dict[int, int]:
    """The published form of one head: the tokens k, v (n, D), which begin at position `first`, halved so often, in blocks of 128. Position
    -> w, the numerator's weight."""
    weight = dict.fromkeys(range(len(k)), 1)
    for t in range(rounds):
        left = {}
        pos = list(weight)
        for start in range(0, len(pos), 128):
            block = pos[start : start + 128]
            where = [torch.tensor(x) for x in (0, head)]
            u = [float(random.uniform(0, *where, torch.tensor(first + p), torch.tensor(t))) for p in block]
            factor = torch.tensor([weight[p] for p in block])[:, None]
            signs = plain_walk(k[block].float(), v[block].float() * factor, u, gamma)
            left |= {block[i]: weight[block[i]] * w for i, w in plain_halving(signs).items()}
        weight = left
    return {first + p: w for p, w in weight.items()}


def test_a_prompt_is_compressed_as_published() -> None:
    """Of 704 tokens the first and last 32 stay, the others are halved twice: which, with which weights; log 4 on the logits, values times
    w / 4. (Keys of moderate size: where a sum of 128 terms is near 0, float32 may decide otherwise than the plain form.)"""
    g = torch.Generator().manual_seed(3)
    k, v = torch.randn(1, 2, 704, 8, generator=g), torch.randn(1, 2, 704, 8, generator=g)
    s = stream("balancekv:budget=224,when=prompt", k, v)[0].slots()
    assert s.a is not None
    for head in range(2):
        expected = plain_form(k[0, head, 32:672], v[0, head, 32:672], 32, 2, 4.0, head)
        assert set(expected.values()) == {1, 2, 4}
        alive = s.pos[0, head] >= 0
        pos = s.pos[0, head, alive].tolist()
        assert sorted(pos) == [*range(32), *sorted(expected), *range(672, 704)]
        for p, a, value in zip(pos, s.a[0, head, alive].tolist(), s.v[0, head, alive], strict=True):
            w = expected.get(p, 4)
            assert a == pytest.approx(math.log(4) if p in expected else 0.0)
            assert torch.equal(value, v[0, head, p] * (w / 4))


@pytest.mark.parametrize(("budget", "n"), [(300, 1000), (200, 331), (128, 2000), (64, 700), (1000, 1013)])
def test_a_budget_between_powers_of_two_is_filled(budget: int, n: int) -> None:
    """The room is used to the last slot; in the last round the oldest are halved once more; weights add up to the tokens."""
    k, v, _ = clustered(n)
    method = BalanceKV(budget=zoo.attention.Budget(budget))
    s = stream(str(method), heads(k, 3), heads(v, 3))[0].slots()
    assert s.a is not None
    for head in range(3):
        alive = s.pos[0, head] >= 0
        pos, order = s.pos[0, head, alive].sort()
        weight = s.a[0, head, alive][order].exp().round()
        assert len(pos) == budget
        assert abs(float(weight.sum()) - n) <= weight.max()  # a pair of two levels keeps its weight on average only
        middle = weight[weight > 1]
        recent, room = method.recent(budget) + method.spare(budget), method.settled(budget)
        first = min(32, room // 2)
        t = math.ceil(math.log2((n - recent - first) / (room - first)))
        assert set(middle.tolist()) == {2.0**t, 2.0 ** (t - 1)} - {1.0}
        between = weight[(pos >= first) & (pos < n - recent)]
        assert torch.equal(between, between.sort(descending=True).values)  # the oldest stand for more


@pytest.mark.parametrize("when", ["decode", "stream"])
def test_streaming_keeps_levels_together(when: str) -> None:
    """After 3,000 tokens through 256 slots, levels of what is not recent differ by a factor of 4 at most, but for the newest few."""
    k, v, _ = clustered(3000)
    s = stream(f"balancekv:budget=256,when={when}", heads(k, 2), heads(v, 2))[0].slots()
    assert s.a is not None
    for head in range(2):
        alive = s.pos[0, head] >= 32
        old = s.a[0, head, alive & (s.pos[0, head] < 2800)].exp().round()
        assert old.max() / old.min() <= 4
        assert abs(float(s.a[0, head, s.pos[0, head] >= 0].exp().sum()) / 3000 - 1) < 0.02


def random_half(signs: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """In place of `halve`: exactly half at random, all with weight 2. It is the paper's `uniform`: the same pipeline without balance."""
    g = torch.Generator().manual_seed(int(valid.sum()))
    rank = torch.where(valid, torch.rand(valid.shape, generator=g), 2.0).argsort(-1).argsort(-1)
    return rank < valid.sum(-1, keepdim=True) // 2, torch.full(signs.shape, 2.0)


def better(x: Tensor, y: Tensor) -> bool:
    """Whether the mean of x is below that of y by more than four standard errors."""
    return float((y - x).mean() / ((y - x).std() / len(x) ** 0.5)) > 4


@pytest.mark.parametrize("rate", [2, 4, 8, 16])
def test_the_walks_discrepancy_is_below_random_signs(rate: int) -> None:
    """|sum eta_i w_i e^(s q.k_i) v_i| over a block of 128, at the halving that leads to rates 1/2 to 1/16, in 60 sets: below that of random
    signs by more than four standard errors. Random signs are not below others."""
    k, v, q = sets(2048, 60)
    where = torch.arange(2048).expand(1, 60, -1)
    weight = torch.ones(1, 60, 2048, dtype=torch.float64)
    g = torch.Generator().manual_seed(rate)
    while True:
        at = where[..., None].expand(*where.shape, k.shape[3])
        keys, values, w = (x.unflatten(2, (-1, 128)) for x in (k.gather(2, at), v.gather(2, at), weight))
        valid = torch.ones(w.shape, dtype=torch.bool)
        signs = walk(kernel(keys, values * w[..., None], valid, plus=0.025), torch.rand(w.shape, generator=g), 4.0)
        if 2048 // where.shape[2] == rate // 2:
            break
        stays, times = halve(signs, valid)
        where = where[stays.flatten(2)].view(1, 60, -1)
        weight = (weight * times.flatten(2))[stays.flatten(2)].view(1, 60, -1)
    A = (q[:, :, None] @ keys.mT / 4).exp() * w[:, :, :, None]  # (1, 60, blocks, 32, 128)
    size = (A @ values).norm(dim=-1)

    def discrepancy(eta: Tensor) -> Tensor:
        return ((A * eta[..., None, :]) @ values).norm(dim=-1).div(size).mean((2, 3))[0]

    coins = [torch.where(torch.rand(w.shape, generator=g) < 0.5, 1.0, -1.0) for _ in range(2)]
    assert better(discrepancy(signs), discrepancy(coins[0]))
    assert not better(discrepancy(coins[0]), discrepancy(coins[1]))
    assert not better(discrepancy(torch.ones_like(signs)), discrepancy(coins[0]))


@pytest.mark.parametrize("rate", [4, 8, 16])
def test_balance_beats_random_signs(rate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of attention's outputs at rates 1/4 to 1/16, in 100 sets: below that of random signs in the same code, with both kinds of
    weights. With weights=both also below the published weights', and below exactly half of the tokens at random, the paper's `uniform`,
    which the published weights do not beat here (docs/methods/balancekv.md)."""
    attn = f"balancekv:when=prompt,budget={64 + 2048 // rate}"
    values, both = (errors(f"{attn},weights={weights}", 2112, 100) for weights in ("values", "both"))
    signs = errors(attn + ",weights=both,gamma=0", 2112, 100)
    assert better(values, errors(attn + ",gamma=0", 2112, 100))
    assert better(both, signs)
    assert better(both, values)
    assert not better(signs, errors(f"{attn},weights=both,gamma=0,seed=1", 2112, 100))
    monkeypatch.setattr(halving, "halve", random_half)
    assert better(both, errors(attn, 2112, 100))


def test_low_precision_values_are_exact() -> None:
    """bfloat16: a value is the token's, times a power of 2."""
    k, v, _ = clustered(700)
    k, v = k.to(torch.bfloat16), v.to(torch.bfloat16)
    s = stream("balancekv:budget=160", heads(k, 2), heads(v, 2))[0].slots()
    assert s.v.dtype == torch.bfloat16
    for head in range(2):
        alive = s.pos[0, head] >= 0
        ratio = (s.v[0, head, alive].double() / v[s.pos[0, head, alive].long()].double()).log2()
        assert torch.equal(ratio, ratio[:, :1].expand(ratio.shape).round())
        assert ratio.min() < 0


def test_seeds_layers_and_heads_draw_their_own() -> None:
    """The same seed twice is the same; nothing else is."""
    k, v, _ = clustered(700)
    found = []
    for seed in (0, 0, 1):
        caches = stream(f"balancekv:budget=160,gamma=0,seed={seed}", heads(k, 2), heads(v, 2), layers=2)
        found.append([layer.slots().pos[0, head].sort().values.tolist() for layer in caches for head in range(2)])
    assert found[0] == found[1]
    assert len({str(x) for x in found[0] + found[2]}) == 8


# The tree as an estimator


def sums(caches: Caches, q: Tensor) -> tuple[Tensor, Tensor]:
    """What layer 0 makes of queries q (Q, D): z (G, Q, D), tau (G, Q)."""
    s = caches[0].slots()
    assert s.a is not None
    assert s.b is not None
    score = (q @ s.k[0].mT * q.shape[1] ** -0.5).masked_fill(s.pos[0, :, None] < 0, -torch.inf)
    return (score + s.a[0, :, None]).exp() @ s.v[0], (score + s.b[0, :, None]).exp().sum(-1)


def spread(n: int, D: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values with norms from 1/2 to 8, and queries (4, D)."""
    g = torch.Generator().manual_seed(2)
    k, v, q = (torch.randn(x, D, generator=g, dtype=torch.float64) for x in (n, n, 4))
    return k, (1 + v) * torch.linspace(-1, 1.5, n, dtype=torch.float64).exp()[:, None], q


def statistics(attn: str, draws: int = 1500) -> Tensor:
    """The t statistic of each query's tau and of each coordinate of its z, over draws."""
    k, v, q = spread(320)
    z, tau = sums(stream(attn, heads(k, draws), heads(v, draws)), q)
    A = (q @ k.T * q.shape[1] ** -0.5).exp()
    off = torch.cat(((tau - A.sum(-1)), (z - A @ v).flatten(1)), 1)
    return (off.mean(0) / (off.std(0) / draws**0.5)).abs()


@pytest.mark.parametrize("c", [0, 0.001])
def test_level_weights_are_unbiased(c: float) -> None:
    """The means of z and tau are those of all tokens, by the theorem's walk and by a firm one: 28 statistics below 4, levels 1 to 3."""
    attn = f"balancekv:mode=tree,batch=32,c={c}"
    assert statistics(attn).max() < 4
    k, v, _ = spread(320)
    level = stream(attn, heads(k, 2), heads(v, 2))[0].keys.a.exp()  # type: ignore[union-attr]
    assert level.round().max() >= 8


def test_the_smaller_sign_is_biased(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the check above sees it, as it sees a wrong weight."""
    right = trees.walk

    def smaller(G: Tensor, u: Tensor, c: Tensor | float) -> Tensor:
        signs = right(G, u, c)
        return torch.where(signs.sum(-1, keepdim=True) > 0, -signs, signs)

    monkeypatch.setattr(trees, "walk", smaller)
    assert statistics("balancekv:mode=tree,batch=32,c=0", 300).max() > 10
    monkeypatch.setattr(trees, "walk", lambda G, u, c: torch.where(u < 0.45, 1.0, -1.0))
    assert statistics("balancekv:mode=tree,batch=32,c=0", 300).max() > 6


def plain_tree(k: Tensor, v: Tensor | None, pos: list[int], method: BalanceKV, head: int) -> dict[int, int]:
    """MergeAndReduce in loops: position -> level, of k, v (n, D) of one tree whose tokens stand at `pos`."""
    t, waiting, c = method.batch, {0: list[int]()}, method.c or 30 * math.log(method.batch / method.fails)
    for end in range(0, max(pos) + 64, 64):
        waiting[0] += [p for p in pos if end <= p < end + 64]
        level = 0
        while level in waiting:
            while len(waiting[level]) >= t:
                some, waiting[level] = waiting[level][:t], waiting[level][t:]
                x = k[some] - (k[some].mean(0) if method.c else 0)
                G = (x @ x.T / math.sqrt(k.shape[1])).exp() * (1 if v is None else v[some] @ v[some].T)
                R2, signs = float(G.diagonal().max()), list[int]()
                for i, p in enumerate(some):
                    y = sum(float(G[i, j]) * sign for j, sign in enumerate(signs))
                    where = [torch.tensor(w) for w in (0, head, p, level, int(v is not None))]
                    signs.append(1 if float(random.uniform(method.seed, *where)) < 0.5 - y / (2 * c * R2) else -1)
                waiting[level + 1] = sorted(waiting.get(level + 1, []) + [p for p, s in zip(some, signs, strict=True) if s > 0])
            level += 1
    return {p: level for level, some in waiting.items() for p in some}


@pytest.mark.parametrize("c", [0, 0.001])
def test_the_tree_is_the_algorithm(c: float) -> None:
    """Both trees of two heads against literal loops: which tokens stay, at which level, in which bucket of values; zeros are no values."""
    method = BalanceKV(mode="tree", batch=24, c=c)
    g = torch.Generator().manual_seed(5)
    k = torch.randn(2, 320, 6, generator=g, dtype=torch.float64)
    v = torch.randn(2, 320, 6, generator=g, dtype=torch.float64) * torch.rand(2, 320, 1, generator=g, dtype=torch.float64)
    v[0, 40:50] = 0
    layer = stream(str(method), k[None], v[None])[0]

    def found(tree: trees.Trees, head: int) -> dict[int, int]:
        assert tree.a is not None
        alive = tree.pos[0, head] >= 0
        assert torch.equal(tree.k[0, head, alive], k[head, tree.pos[0, head, alive].long()])
        level = (tree.a[0, head, alive] / math.log(2)).round().int().tolist()
        return dict(zip(tree.pos[0, head, alive].tolist(), level, strict=True))

    for head in range(2):
        every = plain_tree(k[head], None, list(range(320)), method, head)
        assert max(every.values()) >= 4
        assert found(layer.keys, head) == every  # type: ignore[arg-type]
        buckets: dict[int, list[int]] = {}
        for p in range(320):
            if norm := float(v[head, p].norm()):
                buckets.setdefault(math.ceil(math.log2(norm)), []).append(p)
        assert len(buckets) >= 3
        expected = {p: level for some in buckets.values() for p, level in plain_tree(k[head], v[head], some, method, head).items()}
        assert found(layer.values, head) == expected  # type: ignore[arg-type]


def test_the_trees_error_falls_as_the_batch_grows() -> None:
    """16, 64 and 256 tokens a walk. A firm walk beats the theorem's, which is as good as random signs here."""
    error = {t: errors(f"balancekv:mode=tree,batch={t}", 2048, 60) for t in (16, 64, 256)}
    assert better(error[64], error[16])
    assert better(error[256], error[64])
    assert not better(error[64], error[64].flip(0))
    firm, theorem = (errors(f"balancekv:mode=tree,batch=64,c={c}", 512, 400) for c in (0.001, 0))
    assert better(firm.log(), theorem.log())  # a small denominator makes some errors large


def test_the_trees_memory_grows_like_log_n() -> None:
    """At 1,024 to 16,384 tokens, four times as many add the same number of slots, about 2 levels of half a batch; storage follows."""
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(1, 8, 16384, 8, generator=g), torch.randn(1, 8, 16384, 8, generator=g)
    v = v / v.norm(dim=-1, keepdim=True)  # one bucket
    held, allocated = [], []
    for n in (1024, 4096, 16384):
        caches = stream("balancekv:mode=tree,batch=64", k[:, :, :n], v[:, :, :n])
        held.append(float((caches[0].keys.pos >= 0).sum(-1).float().mean()))  # type: ignore[union-attr]
        allocated.append(caches.nbytes().allocated)
    steps = [y - x for x, y in itertools.pairwise(held)]
    assert all(20 < step < 140 for step in steps)
    assert held[-1] < 64 * math.log2(16384 / 64) + 64
    assert allocated[-1] < 3 * allocated[0]
    assert allocated[-1] < 16384 * 8 * 2 * 8 * 4 / 10


# The tree's contract


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    """In float64: rounding must not choose signs."""
    lm = zoo.load(str(write_llama(tmp_path_factory.mktemp("tree") / "m", num_hidden_layers=2, hidden_size=32, head_dim=16)), compile="off")
    lm.model.double()
    return lm


@pytest.fixture(scope="module")
def ids(lm: LM) -> Tensor:
    return torch.randint(0, lm.config.vocab_size, (3, 520), generator=torch.Generator().manual_seed(7))


def new(lm: LM, attn: str, batch: int = 1) -> Caches:
    lm.attn = parse(attn)
    return lm.new_cache(batch)


def same(x: Caches, y: Caches) -> bool:
    """What slots hold: positions and log-weights exactly, keys and values to rounding."""
    for one, other in zip(x, y, strict=True):
        a, b = one.slots(), other.slots()
        there = a.pos >= 0
        if not torch.equal(a.pos, b.pos):
            return False
        for name in ("k", "v", "a", "b"):
            held, too = getattr(a, name)[there], getattr(b, name)[there]
            assert held.abs().max() > 0.1, name
            if not torch.allclose(held, too, rtol=0, atol=1e-9 if name in "kv" else 0):
                return False
    return True


def test_tree_exact_until_the_first_walk_and_not_behind(lm: LM, ids: Tensor) -> None:
    assert parse(TREE).exact_when == "tokens < batch"
    got, true = feed(lm, new(lm, TREE), ids[:1, :300], 90, 64), lm.logits(ids[:1, :300])
    assert (got - true)[:, :96].abs().max() < 1e-4
    assert (got - true)[:, 200:].abs().max() > 1e-2


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_tree_chunks_change_nothing(lm: LM, ids: Tensor, chunk: int) -> None:
    whole, pieces = new(lm, TREE), new(lm, TREE)
    expected = feed(lm, whole, ids[:1], 133, 1000)
    assert (feed(lm, pieces, ids[:1], 133, chunk) - expected).abs().max() < 1e-4
    assert same(whole, pieces)
    for name in ("k", "v", "a"):  # and `same` looks at each of them
        other = whole.clone()
        tree = other[1].values  # type: ignore[union-attr]
        getattr(tree, name)[0, 1, 0] += 1e-6  # type: ignore[index]
        assert not same(whole, other), name


def test_tree_batch_equals_single(lm: LM, ids: Tensor) -> None:
    """Sequences of different lengths, decoded together, one finished early."""
    lengths, steps, early = [300, 61, 250], 80, 2
    together = new(lm, TREE, 3)
    logits = [lm.prefill(ids[:, :300], together, lengths)]
    for t in range(steps):
        pos = together.tokens_seen[:, None].clone()
        if t >= 40:
            pos[early] = -1
        logits.append(lm.decode_step(torch.stack([ids[b, lengths[b] + t] for b in range(3)]), together, pos))
    for b in range(3):
        alone = new(lm, TREE)
        expected = [lm.prefill(ids[b : b + 1, : lengths[b]], alone)]
        expected += [lm.decode_step(ids[b, lengths[b] + t], alone) for t in range(40 if b == early else steps)]
        for x, y in zip(expected, logits[: len(expected)], strict=True):
            assert (x[0] - y[b]).abs().max() < 1e-4


def test_tree_copies_continue_identically(lm: LM, ids: Tensor, tmp_path: Path) -> None:
    cache = new(lm, TREE)
    lm.prefill(ids[:1, :200], cache)
    cache.save(tmp_path / "c")
    loaded = new(lm, TREE)
    loaded.load(tmp_path / "c")
    copies = [cache.clone(), loaded, cache.expand(3)]
    for t in range(200, 400):
        expected = lm.decode_step(ids[:1, t], cache)
        for copy in copies:
            assert (lm.decode_step(ids[:1, t].expand(copy.batch), copy) - expected).abs().max() < 1e-4
    assert same(copies[0], cache)
    assert same(copies[1], cache)
    with pytest.raises(ZooError, match="batch=64"):
        new(lm, "balancekv:mode=tree,batch=64").load(tmp_path / "c")


def test_tree_bytes_are_the_storages(lm: LM, ids: Tensor) -> None:
    """`allocated` is the storages; `used` is what is held, by hand."""
    cache = new(lm, TREE)
    lm.prefill(ids[:1, :500], cache)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in cache.buffers() if t.numel()}
    bytes_ = cache.nbytes()
    assert bytes_.allocated == sum(storages.values())
    key, pending = 16 * 8, 500 % 64
    by_hand = 8
    for layer in cache:
        keys, values = (int((tree.pos >= 0).sum()) for tree in (layer.keys, layer.values))  # type: ignore[union-attr]
        by_hand += keys * (key + 8) + values * (2 * key + 8) + pending * (2 * 2 * key + 4)
    assert bytes_.used == by_hand <= bytes_.allocated


def test_tree_attend_is_the_formula(lm: LM, ids: Tensor) -> None:
    """What `slots()` shows, put through the formula, is what `attend` computes; one sum by the other's weights is not."""
    cache = new(lm, TREE)
    feed(lm, cache, ids[:1, :400], 231, 64)
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, h, 1, 16, generator=g, dtype=torch.float64) for h in (4, 2, 2))
    pos = torch.tensor([[400]])
    out = cache[1].attend(q, k, v, pos)
    s = cache[1].slots()
    expected, wrong = slot_attention(q, pos, s), slot_attention(q, pos, Slots(s.k, s.v, s.pos, s.a))
    assert isinstance(expected, Tensor)
    assert isinstance(wrong, Tensor)
    assert (expected - out).abs().max() < 1e-6
    assert (wrong - out).abs().max() > 1e-3


def test_tree_forgets_what_leaves_the_models_window() -> None:
    """Slots older than the window are freed where tokens are absorbed, and not seen before."""
    k, v, _ = clustered(1000)
    layer = stream(TREE, heads(k, 2), heads(v, 2), window=200)[0]
    for tree in (layer.keys, layer.values):  # type: ignore[union-attr]
        assert tree.pos[tree.pos >= 0].min() > 1000 - 64 - 200  # type: ignore[index, union-attr]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tree_low_precision(dtype: torch.dtype) -> None:
    """Keys and values stay in their dtype; outputs are those of the formula on what is held."""
    k, v, q = clustered(500)
    layer = stream(TREE, heads(k, 2).to(dtype), heads(v, 2).to(dtype))[0]
    assert layer.keys.k.dtype == layer.values.v.dtype == dtype  # type: ignore[union-attr]
    x = q[None, :2, None].to(dtype)
    out = layer.attend(x, x, x, torch.tensor([[500]]))
    s = layer.slots()
    expected = slot_attention(x.double(), torch.tensor([[500]]), Slots(s.k.double(), s.v.double(), s.pos, s.a, s.b))
    assert isinstance(expected, Tensor)
    assert out.dtype == dtype
    assert (out.double() - expected).abs().max() < 8 * torch.finfo(dtype).eps * float(s.v.abs().max())


@pytest.fixture
def no_recompiling() -> Iterator[None]:
    static = ("force_parameter_static_shapes", "force_nn_module_property_static_shapes", "automatic_dynamic_shapes")
    with torch._dynamo.config.patch({**dict.fromkeys(static, False), "error_on_recompile": True}):
        yield


def test_tree_attend_is_one_graph(no_recompiling: None) -> None:
    """fullgraph, compiled once while trees grow and shrink, with the numbers of the eager form."""
    g, nothing = torch.Generator().manual_seed(5), torch.zeros(1, 2, 0, 8)
    caches, twin = (stream("balancekv:mode=tree,batch=64", nothing, nothing) for _ in range(2))
    step = torch.compile(lambda layer, *x: layer.attend(*x), fullgraph=True, backend="aot_eager")
    for _, t, dim in open_dimensions(caches):
        torch._dynamo.maybe_mark_dynamic(t, dim)
    sizes = set()
    for n in range(450):
        q, k, v = (torch.randn(1, h, 1, 8, generator=g) for h in (4, 2, 2))
        pos = torch.tensor([[n]])
        assert (step(caches[0], q, k, v, pos) - twin[0].attend(q, k, v, pos)).abs().max() < 1e-5
        caches.advance(pos)
        twin.advance(pos)
        sizes.add(caches[0].values.rows)  # type: ignore[union-attr]
    assert len(sizes) > 1


# Options


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("walk=3", "even, between 2 and 1024"),
        ("walk=0", "even, between 2 and 1024"),
        ("gamma=-1", "between 0 and 1e6"),
        ("sinks=-1", "sinks=-1 must be between 0"),
        ("window=-1", "window=-1 must be between 0"),
        ("temp=-1", "between 0 and 1000"),
        ("beta=2000", "between -1000 and 1000"),
        ("seed=9223372036854775808", "between -2"),
        ("mode=merge", "one of halve, tree"),
        ("mode=tree,when=decode", "left out, or stream"),
        ("mode=tree,budget=200", "budget=200 must be left out where mode=tree"),
        ("mode=tree,gamma=1", "gamma=1.0 must be left out where mode=tree"),
        ("mode=tree,batch=1", "between 2 and 4096"),
        ("mode=tree,c=-1", "between 0 and 1e6"),
        ("mode=tree,fails=0", "between 0 and 1"),
        ("batch=64", "batch=64 must be left out where mode=halve"),
    ],
)
def test_bad_options_name_the_bound(options: str, says: str) -> None:
    with pytest.raises(ZooError, match=says) as e:
        parse(f"balancekv:{options}")
    assert "\n" not in str(e.value)


def test_spelling() -> None:
    """It round-trips; a tree always streams, and says so where the protocol is another."""
    for spelling in ("balancekv:budget=300,walk=64,gamma=1.0", "balancekv:when=stream,mode=tree,batch=64"):
        assert str(parse(spelling)) == spelling
        assert parse(str(parse(spelling))) == parse(spelling)
    assert parse("balancekv:mode=tree") == method_of("balancekv:mode=tree", "stream", 100)
    with pytest.raises(ZooError, match="--protocols stream"):
        method_of("balancekv:mode=tree", "prefill", 100)
