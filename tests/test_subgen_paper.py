"""SubGen's Algorithm 1: the cache contract, the algorithm against literal loops, and its estimators as estimators. Each check is a
function, and fails for a wrong weight or probability."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import feed, write_checkpoint, write_llama
from torch import Tensor

import zoo
from zoo import random
from zoo.attention import ATTENTION, parse
from zoo.attention import subgen_paper as module
from zoo.attention.cache import Caches, open_dimensions
from zoo.attention.slots import slot_attention
from zoo.attention.subgen_paper import MOST, ROWS, SubGenPaper, SubGenPaperCaches
from zoo.errors import ZooError
from zoo.lm import LM

METHODS = [SubGenPaper(delta=6, t=3, s=32), SubGenPaper(delta=6, t=3, s=32, block=5)]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    """In float64: where a key is as far from its representative as delta, rounding decides, and the two sides differ much."""
    folder = write_llama(tmp_path_factory.mktemp("paper") / "m", num_hidden_layers=2, hidden_size=32, head_dim=16)
    lm = zoo.load(str(folder), compile="off")
    lm.model.double()
    return lm


@pytest.fixture(scope="module")
def ids(lm: LM) -> Tensor:
    return torch.randint(0, lm.config.vocab_size, (3, 520), generator=torch.Generator().manual_seed(7))


def new(lm: LM, attn: SubGenPaper, batch: int = 1, **hints: int) -> SubGenPaperCaches:
    lm.attn = attn
    caches = lm.new_cache(batch, **hints)
    assert isinstance(caches, SubGenPaperCaches)
    return caches


def state(cache: Caches) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in cache.named_buffers()}


def same(x: Caches, y: Caches) -> bool:
    """All buffers: whole numbers exactly, the others to rounding."""
    a, b = state(x), state(y)
    compared = {n: t for n, t in a.items() if ".store." not in n}  # rows of the ring that nothing stands in may hold what was there
    assert max(float(t.abs().max()) for t in compared.values() if t.is_floating_point() and t.numel()) > 0.1
    return a.keys() == b.keys() and all(
        t.shape == b[n].shape and (torch.allclose(t, b[n], rtol=0, atol=1e-5) if t.is_floating_point() else torch.equal(t, b[n]))
        for n, t in compared.items()
    )


# The contract


@pytest.mark.parametrize("attn", METHODS, ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_chunks_change_nothing(lm: LM, ids: Tensor, attn: SubGenPaper, chunk: int) -> None:
    """One by one == in chunks == in one pass, in the answers and in the state, past many blocks, from an odd prompt length."""
    n = 520 if attn.block == 64 else 200
    whole, parts = new(lm, attn), new(lm, attn)
    expected = feed(lm, whole, ids[:1, :n], 133, 1000)
    assert (feed(lm, parts, ids[:1, :n], 133, chunk) - expected).abs().max() < 1e-4
    assert same(whole, parts)
    assert whole.tokens_seen.tolist() == parts.tokens_seen.tolist() == [n]
    some = next(t for name, t in parts.named_buffers() if t.is_floating_point() and ".store." not in name and t.numel())
    some[some.isfinite()] += 1e-2
    assert not same(whole, parts)  # and `same` looks at numbers
    counts = whole[0].count  # the tests mean something: there are clusters of several tokens, and more than storage began with
    assert counts.max() > 2
    assert (counts > 0).sum(-1).max() > ROWS


def test_what_is_absorbed_is_not_exact(lm: LM, ids: Tensor) -> None:
    """Before the first block ends nothing is absorbed and answers are exact; afterwards they are not, inside the prompt neither."""
    got, true = feed(lm, new(lm, METHODS[0]), ids[:1, :200], 150, 1000), lm.logits(ids[:1, :200])
    assert (got[:, :64] - true[:, :64]).abs().max() < 1e-4
    assert (got[:, 64:150] - true[:, 64:150]).abs().max() > 1e-2


@pytest.mark.parametrize("attn", METHODS, ids=str)
def test_batch_equals_single(lm: LM, ids: Tensor, attn: SubGenPaper) -> None:
    """Sequences of different lengths in one batch, padded, decoded together, one of them finished early, equal batches of one."""
    lengths, new_tokens, early = [200, 61, 150], 80, 2
    together = new(lm, attn, 3)
    logits = [lm.prefill(ids[:, :200], together, lengths)]
    for t in range(new_tokens):
        pos = together.tokens_seen[:, None].clone()
        if t >= 40:
            pos[early] = -1
        logits.append(lm.decode_step(torch.stack([ids[b, lengths[b] + t] for b in range(3)]), together, pos))
    for b in range(3):
        alone, steps = new(lm, attn), 40 if b == early else new_tokens
        expected = [lm.prefill(ids[b : b + 1, : lengths[b]], alone)]
        expected += [lm.decode_step(ids[b, lengths[b] + t], alone) for t in range(steps)]
        for x, y in zip(expected, logits[: len(expected)], strict=True):
            assert (x[0] - y[b]).abs().max() < 1e-4
        assert together.tokens_seen[b] == alone.tokens_seen[0] == lengths[b] + steps


def test_clone_save_load_expand_continue_identically(lm: LM, ids: Tensor, tmp_path: Path) -> None:
    """Copies are independent and go on as the original does; a save holds the whole state."""
    cache = new(lm, METHODS[0])
    lm.prefill(ids[:1, :150], cache)
    for t in range(150, 180):
        lm.decode_step(ids[:1, t], cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded = new(lm, METHODS[0])
    loaded.load(tmp_path / "cache.safetensors")
    before = state(cache)
    copies = [cache.clone(), loaded, cache.expand(3)]
    for t in range(180, 270):
        expected = lm.decode_step(ids[:1, t], cache)
        for copy in copies:
            assert (lm.decode_step(ids[:1, t].expand(copy.batch), copy) - expected).abs().max() < 1e-4
    assert same(copies[0], cache)
    assert same(copies[1], cache)
    assert not all(torch.equal(t, before[n]) for n, t in state(cache).items() if t.shape == before[n].shape)
    with pytest.raises(ZooError, match="t=5"):
        new(lm, SubGenPaper(delta=6, t=5, s=32)).load(tmp_path / "cache.safetensors")


def test_two_runs_are_identical_and_another_seed_is_not(lm: LM, ids: Tensor) -> None:
    """The seed decides, and each layer and head draws its own numbers."""
    one, two, other = (new(lm, SubGenPaper(delta=6, t=3, s=32, seed=seed)) for seed in (5, 5, 6))
    out = [feed(lm, c, ids[:1, :200], 100, 64) for c in (one, two, other)]
    assert torch.equal(out[0], out[1])
    assert all(torch.equal(t, state(two)[n]) for n, t in state(one).items())
    assert (out[2] - out[0]).abs().max() > 1e-3
    k = torch.randn(1, 1, 64, 4, generator=torch.Generator().manual_seed(0)).expand(1, 2, 64, 4)
    layers = stream(SubGenPaper(delta=0, t=1, s=64), k, k, layers=2)
    a, b = (layers[i].values.pos[0] for i in range(2))
    assert not torch.equal(a[0], a[1])
    assert not torch.equal(a, b)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox"])
def test_all_families_run(tmp_path: Path, family: str) -> None:
    """Prompt and decoding past block ends and past Mistral's window of 16."""
    lm = zoo.load(str(write_checkpoint(tmp_path / "m", family)), compile="off")
    cache = new(lm, SubGenPaper(delta=6, t=2, s=32))
    ids = torch.randint(0, lm.config.vocab_size, (1, 150), generator=torch.Generator().manual_seed(1))
    logits = [lm.prefill(ids[:, :100], cache)] + [lm.decode_step(ids[:, t], cache) for t in range(100, 150)]
    assert torch.isfinite(torch.cat(logits)).all()
    assert cache.tokens_seen.tolist() == [150]
    assert (cache[0].count.sum(-1) == 128).all()


def test_nbytes_are_the_storages(lm: LM, ids: Tensor) -> None:
    """`allocated` is the sum of the storages behind the buffers; `used` counts what is held, by hand."""
    cache = new(lm, METHODS[0])
    before = cache.nbytes()
    lm.prefill(ids[:1, :300], cache)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in cache.buffers() if t.numel()}
    after = cache.nbytes()
    assert after.allocated == sum(storages.values())
    assert before.used < after.used <= after.allocated
    key, G, pending = 16 * 8, 2, 300 % 64
    clusters = sum(int((layer.count > 0).sum()) for layer in cache)
    by_hand = clusters * (key + 4 + 3 * (key + 4)) + 2 * (G * 32 * (2 * key + 8) + pending * (G * 2 * key + 4) + G * 8) + 8
    assert after.used == by_hand


def test_storage_doubles_for_all_layers_at_once(lm: LM, ids: Tensor) -> None:
    """While tokens come, rows suffice for the longest head, are fewer than twice that, at least double when they grow, and are the same in
    all layers."""
    cache, sizes = new(lm, METHODS[1]), [ROWS]
    for t in range(0, 520, 40):
        lm.model(ids[:1, t : t + 40], cache)
        longest = max(int((layer.count > 0).sum(-1).max()) for layer in cache)
        rows = {layer.count.shape[2] for layer in cache}
        assert len(rows) == 1
        sizes += rows
        assert longest <= sizes[-1] < 2 * max(longest, ROWS)
        assert sizes[-1] == sizes[-2] or sizes[-1] >= 2 * sizes[-2]
    assert sizes[-1] > 64
    assert all((layer.count.sum(-1) == 520).all() for layer in cache)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("delta=-1", "delta=-1.0 must be between 0 and 1e6"),
        ("delta=inf", "is not a number"),
        ("t=0", f"between 1 and {MOST}"),
        ("t=65537", f"between 1 and {MOST}"),
        ("s=0", f"between 1 and {MOST}"),
        ("s=65537", f"between 1 and {MOST}"),
        ("seed=9223372036854775808", "between -2"),
        ("block=0", "between 1 and 64"),
        ("block=65", "between 1 and 64"),
        ("epsilon=1.5,r=1", "between 0.001 and 1"),
        ("epsilon=-0.5,r=1", "between 0.001 and 1"),
        ("epsilon=1e-200,r=1", "between 0.001 and 1"),
        ("epsilon=0.5", "r=0.0 must be above 0 where epsilon"),
        ("r=0.5", "only there"),
        ("r=-0.5,epsilon=1", "at most 1e6"),
        ("budget=4", "delta="),
    ],
)
def test_bad_options_name_the_bound(monkeypatch: pytest.MonkeyPatch, options: str, says: str) -> None:
    """One line that says what is allowed."""
    monkeypatch.setitem(ATTENTION, "subgen_paper", SubGenPaper)
    with pytest.raises(ZooError, match=says) as e:
        parse(f"subgen_paper:{options}")
    assert "\n" not in str(e.value)


def test_spelling_and_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """The spelling round-trips; a not-a-number is refused in Python too."""
    monkeypatch.setitem(ATTENTION, "subgen_paper", SubGenPaper)
    assert parse("subgen_paper:delta=1,t=4,s=64") == SubGenPaper(delta=1.0, t=4, s=64)
    for spelling in ("subgen_paper:delta=1.5", "subgen_paper:delta=1.0,epsilon=0.5,r=0.25"):
        assert str(parse(spelling)) == spelling
    assert SubGenPaper.exact_when == "never"
    with pytest.raises(ZooError, match="between 0 and"):
        SubGenPaper(delta=math.nan)


def test_the_theorem_sets_the_samples(lm: LM) -> None:
    """t and s by the docstring's formulas, from the hints or the context's length; what is too much names the bound and the factor."""
    method = SubGenPaper(delta=0.5, epsilon=0.8, r=1.0)
    assert method.samples(16, 1000) == (math.ceil(32 / 3 * math.e * math.log(1000) / 0.64), 12500)
    assert SubGenPaper(t=7, s=9).samples(16, 1000) == (7, 9)
    for hints, n in (
        ({"max_tokens": 500, "prompt_tokens": 9}, 500),
        ({"prompt_tokens": 300}, 300),
        ({}, lm.config.max_position_embeddings),
    ):
        layer = new(lm, method, **hints)[0]
        assert (layer.t, layer.s) == method.samples(16, n)
    for wild in (SubGenPaper(delta=8, epsilon=0.5, r=15), SubGenPaper(delta=1e6, epsilon=1, r=1e6), SubGenPaper(epsilon=0.01, r=1e-9)):
        with pytest.raises(ZooError, match=r"e\^\(2 delta r\) = .* at most 65536") as e:
            new(lm, wild)
        assert "\n" not in str(e.value)


def test_sdpa_is_refused(lm: LM, ids: Tensor) -> None:
    """One softmax cannot hold two weights: said, not ignored."""
    cache = new(lm, METHODS[0])
    cache[0].backend = "sdpa"
    with pytest.raises(ZooError, match="eager"):
        lm.prefill(ids[:1, :10], cache)


# A cache without a model


def stream(method: SubGenPaper, k: Tensor, v: Tensor, window: int | None = None, layers: int = 1) -> SubGenPaperCaches:
    """Caches that took in k, v (B, G, n, D), queries aside."""
    B, G, n, D = k.shape
    config = SimpleNamespace(num_key_value_heads=G, head_dim=D, num_hidden_layers=layers, sliding_window=window, max_position_embeddings=n)
    caches, size = method.caches(config, None, B, n, None, k.dtype, "cpu"), method.block
    assert isinstance(caches, SubGenPaperCaches)
    for start in range(0, n, size):
        pos = torch.arange(start, min(start + size, n)).expand(B, -1)
        for layer in caches:
            layer.store.append(layer.row(pos), k[:, :, start : start + size], v[:, :, start : start + size], pos)
        caches.advance(pos)
    return caches


def estimates(caches: SubGenPaperCaches, q: Tensor) -> tuple[Tensor, Tensor]:
    """What layer 0 makes of queries q (Q, D), as the paper has them (divided by sqrt(D)): z (G, Q, D), tau (G, Q)."""
    s = caches[0].slots()
    assert s.a is not None
    assert s.b is not None
    score = (q @ s.k[0].mT).masked_fill(s.pos[0, :, None] < 0, -torch.inf)
    return (score + s.a[0, :, None]).exp() @ s.v[0], (score + s.b[0, :, None]).exp().sum(-1)


def planted(n: int, m: int, D: int, delta: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys (n, D) in m clusters of diameter delta, far apart, in a random order; in each, keys drift along the last axis as time goes by,
    so that a sample which favours old or new tokens shows. Values (n, D) that begin large. The cluster of each token (n,)."""
    g = torch.Generator().manual_seed(seed)
    home = torch.randint(0, m, (n,), generator=g)
    home[:m] = torch.randperm(m, generator=g)
    k = torch.eye(D, dtype=torch.float64)[home] * max(3 * delta, 1)
    for c in range(m):
        members = (home == c).nonzero()[:, 0]
        k[members, D - 1] += delta * torch.linspace(-0.49, 0.49, len(members), dtype=torch.float64)
    v = 1 + 0.5 * torch.randn(n, D, generator=g, dtype=torch.float64)
    return k, v * torch.linspace(2, 0.5, n, dtype=torch.float64)[:, None], home


def queries(Q: int, D: int, r: float, seed: int = 1) -> Tensor:
    """(Q, D), of norm r, that look along the drift, one way or the other."""
    q = 0.2 * torch.randn(Q, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q[:, D - 1] = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(Q)[:Q]
    return q * r / q.norm(dim=-1, keepdim=True)


def repeated(x: Tensor, heads: int) -> Tensor:
    """(n, D) -> (1, heads, n, D): every head draws its own samples of the same tokens."""
    return x.expand(1, heads, *x.shape)


# The algorithm


def literal(method: SubGenPaper, k: Tensor, v: Tensor, head: int) -> tuple[list[Any], list[int], float]:
    """Algorithm 1 in loops, over k, v (n, D): clusters [representative's position, n', positions of the t samples], the s slots' positions
    (-1 = null), mu."""
    clusters, slots, mu = list[Any](), [-1] * method.s, 0.0
    for n in range(len(k)):
        where = [torch.tensor(x) for x in (0, head, n)]
        u = random.uniform(method.seed, *where, torch.arange(method.t + method.s)).tolist()
        near = [float((k[n] - k[c[0]]).norm()) for c in clusters]
        if near and min(near) <= method.delta:
            cluster = clusters[near.index(min(near))]
            cluster[1] += 1
            cluster[2] = [n if u[j] < 1 / cluster[1] else old for j, old in enumerate(cluster[2])]
        else:
            clusters.append([n, 1, [n] * method.t])
        norm = float(v[n] @ v[n])
        if norm > 0:
            slots = [n if u[method.t + j] < norm / (mu + norm) else old for j, old in enumerate(slots)]
        mu += norm
    return clusters, slots, mu


@pytest.mark.parametrize("block", [1, 6, 64])
def test_it_is_algorithm_1(block: int) -> None:
    """After n tokens, for any block: representatives, counts, samples and weights are those of literal loops, values of zero included."""
    method, g = SubGenPaper(delta=2.2, t=3, s=10, seed=3, block=block), torch.Generator().manual_seed(2)
    k, v = torch.randn(1, 2, 150, 4, generator=g, dtype=torch.float64), torch.randn(1, 2, 150, 4, generator=g, dtype=torch.float64)
    v[:, :, :5] = 0
    v[:, 0, 70] = 0
    caches = stream(method, k, v)
    layer, done = caches[0], 150 // block * block
    s = layer.slots()
    assert s.a is not None
    assert s.b is not None
    assert s.pos[0, 0, s.pos[0, 0] >= done].tolist() == list(range(done, 150))  # pending, exact
    for head in range(2):
        clusters, slots, mu = literal(method, k[0, head, :done], v[0, head, :done], head)
        m = len(clusters)
        assert 5 < m < done / 2
        assert layer.count[0, head, : m + 1].tolist() == [c[1] for c in clusters] + [0]
        assert torch.equal(layer.leader[0, head, :m], k[0, head, [c[0] for c in clusters]])
        assert layer.sample_pos[0, head, :m].tolist() == [c[2] for c in clusters]
        assert layer.values.pos[0, head].tolist() == slots
        rows = layer.count.shape[2] * 3
        for c, (_, count, samples) in enumerate(clusters):
            assert torch.equal(s.k[0, head, 3 * c : 3 * c + 3], k[0, head, samples])
            assert torch.allclose(s.b[0, head, 3 * c : 3 * c + 3], torch.tensor(count / 3).log())
        assert torch.equal(s.v[0, head, rows : rows + 10], v[0, head, slots])
        expected = (mu / (10 * v[0, head, slots].square().sum(-1))).log().float()
        assert torch.allclose(s.a[0, head, rows : rows + 10], expected)
        assert (s.a[0, head, :rows] == -torch.inf).all()
        assert (s.b[0, head, rows : rows + 10] == -torch.inf).all()


def test_attend_is_the_formula() -> None:
    """What `slots()` shows, put through the formula, is what `attend` computes, and it is z / tau; changing the copy changes nothing."""
    k, v, _ = planted(200, 6, 8, 1.0)
    layer = (caches := stream(SubGenPaper(delta=1, t=3, s=40), repeated(k, 2), repeated(v, 2)))[0]
    q, pos, one = queries(4, 8, 1.5), torch.tensor([[200]]), torch.ones(1, 2, 1, 8, dtype=torch.float64)
    scaled = q.view(1, 4, 1, 8) * 8**0.5
    out = layer.attend(scaled, one, one, pos)
    s = layer.slots()
    expected = slot_attention(scaled, pos, s)
    assert isinstance(expected, Tensor)
    assert (expected - out).abs().max() < 1e-6
    z, tau = estimates(caches, q)
    assert (out[0, :, 0] - torch.stack([z[h // 2, h] / tau[h // 2, h] for h in range(4)])).abs().max() < 1e-6
    s.k.zero_()
    assert layer.slots().k.abs().max() > 0


def test_only_values_of_zero_answer_zero() -> None:
    """The numerator's slots stay null, and nothing is NaN."""
    k = repeated(planted(64, 3, 4, 1.0)[0], 1)
    layer = stream(SubGenPaper(delta=1, t=2, s=8), k, torch.zeros_like(k))[0]
    assert (layer.values.pos == -1).all()
    out = layer.attend(k[:, :, :1], k[:, :, :1], torch.zeros_like(k[:, :, :1]), torch.tensor([[64]]))
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("block", [16, 64])
def test_an_expired_sample_is_not_seen(block: int) -> None:
    """With a window of 40, what is older, pending or absorbed, changes neither sum; without one it does."""
    k, v, _ = planted(110, 4, 8, 1.0)
    v[:64] = 1e6
    q, pos, one = queries(1, 8, 1.0).view(1, 1, 1, 8), torch.tensor([[110]]), torch.ones(1, 1, 1, 8, dtype=torch.float64)
    for window in (40, None):
        layer = stream(SubGenPaper(delta=1, t=3, s=500, block=block), repeated(k, 1), repeated(v, 1), window=window)[0]
        out = layer.attend(q, one, one, pos)
        s = layer.slots()
        assert ((s.pos >= 0) & (s.pos <= 70)).any()  # still held
        seen = replace(s, window=None, pos=s.pos.where(s.pos > 70, -1)) if window else s
        expected = slot_attention(q, pos, seen)
        assert isinstance(expected, Tensor)
        assert (out / expected - 1).abs().max() < 1e-6
        assert (out.abs().max() > 1e4) == (window is None)


def test_bfloat16_and_other_dtypes() -> None:
    """Keys and values stay in their dtype; sums and weights do not."""
    k, v, _ = planted(256, 5, 8, 1.0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        caches = stream(SubGenPaper(delta=1.1, t=4, s=64), repeated(k, 2).to(dtype), repeated(v, 2).to(dtype))
        layer = caches[0]
        assert layer.sample.dtype == layer.values.v.dtype == dtype
        assert (layer.count.sum(-1) == 256).all()
        q = torch.ones(1, 2, 1, 8, dtype=dtype)
        out = layer.attend(q, q, q, torch.tensor([[256]]))
        assert out.dtype == dtype
        assert torch.isfinite(out).all()


def test_planted_clusters_are_recovered() -> None:
    """Their number and counts in every head; half the distance finds more, and far more than it fewer."""
    k, v, home = planted(320, 7, 8, 1.0)
    counts = sorted(home.bincount().tolist())

    def found(delta: float) -> bool:
        count = stream(SubGenPaper(delta=delta, t=2, s=4), repeated(k, 3), repeated(v, 3))[0].count[0]
        return all(sorted(row[row > 0].tolist()) == counts for row in count)

    assert found(1.0)
    assert not found(0.5)
    assert not found(4.5)


def test_delta_is_a_distance_that_still_belongs() -> None:
    """A key at exactly delta joins; at delta=0 equal keys share a cluster, no others do, and the denominator is exact."""
    k = torch.tensor([[0.0, 0], [3, 4], [0, 0], [3, 4.25], [6, 8.25]], dtype=torch.float64)
    for delta, counts in ((5.0, [3, 2]), (4.9, [2, 2, 1]), (0.0, [2, 1, 1, 1])):
        caches = stream(SubGenPaper(delta=delta, t=2, s=1, block=5), repeated(k, 1), repeated(k + 1, 1))
        assert caches[0].count[0, 0, : len(counts) + 1].tolist() == [*counts, 0]
    q = 0.5 * torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(estimates(caches, q)[1][0], (q @ k.T).exp().sum(-1))


@pytest.fixture
def no_recompiling() -> Iterator[None]:
    static = ("force_parameter_static_shapes", "force_nn_module_property_static_shapes", "automatic_dynamic_shapes")
    with torch._dynamo.config.patch({**dict.fromkeys(static, False), "error_on_recompile": True}):
        yield


def test_attend_is_one_graph(no_recompiling: None) -> None:
    """fullgraph, compiled once while clusters grow past 16, 32 and 64 rows, with the numbers of the eager form."""
    g = torch.Generator().manual_seed(5)
    nothing = torch.zeros(1, 2, 0, 8)
    caches, twin = (stream(SubGenPaper(delta=1.5, t=3, s=20, block=16), nothing, nothing) for _ in range(2))
    step = torch.compile(lambda layer, *x: layer.attend(*x), fullgraph=True, backend="aot_eager")
    for _, t, dim in open_dimensions(caches):
        torch._dynamo.maybe_mark_dynamic(t, dim)
    for n in range(240):
        q, k, v = (torch.randn(1, heads, 1, 8, generator=g) for heads in (4, 2, 2))
        pos = torch.tensor([[n]])
        assert (step(caches[0], q, k, v, pos) - twin[0].attend(q, k, v, pos)).abs().max() < 1e-5
        caches.advance(pos)
        twin.advance(pos)
    assert caches[0].count.shape[2] >= 128


# The estimators

Mutant = tuple[str, str, Callable[..., Any]]
WEIGHTS: list[Mutant] = [
    ("n'/t -> 1/t", "key_weight", lambda count, t: (count.clamp(max=1) / t).log()),
    ("mu/(s|v|^2) -> mu/s", "value_weight", lambda mu, norm, s: (mu / s).log().expand(norm.shape)),
]
PROBABILITIES: list[Mutant] = [
    ("1/n' -> 1/(n'+1)", "replace_key", lambda count: torch.where(count == 1, 1.0, 1 / (count + 1))),
    ("mu before |v|^2 is drawn", "replace_value", lambda norm, mu: norm / (mu + norm + norm)),
]


def p_values(t: Tensor, df: int) -> Tensor:
    """Two-sided, of Student's t with df degrees of freedom, by integrating its density's tail."""
    x = t.abs().double()[..., None] + torch.linspace(0, 60, 20001, dtype=torch.float64)
    log_c = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(df * math.pi) / 2
    return 2 * torch.trapezoid((log_c - (df + 1) / 2 * (x * x / df).log1p()).exp(), x)


def bias(seeds: int = 2000) -> dict[str, Tensor]:
    """Over `seeds` independent draws: the t statistic of each query's tau (Q,) and of each coordinate of its z (Q D,). Of the 36 tokens 4
    are pending."""
    k, v, _ = planted(36, 4, 6, 1.0)
    q = queries(4, 6, 2.0)
    z, tau = estimates(stream(SubGenPaper(delta=1, t=2, s=16, block=8), repeated(k, seeds), repeated(v, seeds)), q)
    A = (q @ k.T).exp()

    def statistic(x: Tensor, mean: Tensor) -> Tensor:
        return ((x.mean(0) - mean) / (x.std(0) / seeds**0.5)).flatten()

    return {"tau": statistic(tau, A.sum(-1)), "z": statistic(z, A @ v)}


def unbiased() -> bool:
    """No mean is off: the smallest p-value, times the number of tests (Bonferroni), above 1 %."""
    t = torch.cat(list(bias().values()))
    return float(p_values(t, 1999).min()) * len(t) > 0.01


def test_the_t_distribution() -> None:
    """Against tabulated quantiles: 12.706 for one degree, cut at 60 from there; 2.0860 for 20, 1.9623 for 1000, 3.3002 at 0.1 %."""
    got = [float(p_values(torch.tensor(t), df)) for t, df in ((2.0860, 20), (1.9623, 1000), (3.3002, 1000))]
    assert got == pytest.approx([0.05, 0.05, 0.001], rel=1e-3)


def test_both_sums_are_unbiased() -> None:
    """The mean of tau is Z and that of z is N, for several queries, over 2,000 draws."""
    assert unbiased()


@pytest.mark.parametrize("mutant", WEIGHTS + PROBABILITIES, ids=lambda m: m[0])
def test_a_wrong_weight_or_probability_is_biased(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above fails for it."""
    monkeypatch.setattr(module, mutant[1], mutant[2])
    assert not unbiased()


def slope(samples: Sequence[int], which: str, seeds: int = 300) -> float:
    """Of the root mean square error of tau (against t) or z (against s), in log-log."""
    k, v, _ = planted(96, 5, 8, 1.0)
    q = queries(6, 8, 1.5)
    A, errors = (q @ k.T).exp(), []
    for count in samples:
        method = SubGenPaper(delta=1, t=count if which == "t" else 1, s=count if which == "s" else 1)
        z, tau = estimates(stream(method, repeated(k, seeds), repeated(v, seeds)), q)
        errors.append(float(((tau / A.sum(-1) - 1) if which == "t" else (z - A @ v)).square().mean().sqrt()))
    x, y = torch.tensor(samples).log().double(), torch.tensor(errors).log().double()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


SAMPLES = {"t": (1, 2, 4, 8, 16, 32), "s": (4, 16, 64, 256)}


def falls_like_a_root(which: str) -> bool:
    return abs(slope(SAMPLES[which], which) + 0.5) < 0.1


@pytest.mark.parametrize("which", ["t", "s"])
def test_errors_fall_like_one_over_the_root_of_the_samples(which: str) -> None:
    """On clusterable keys, for the denominator against t and for the numerator against s."""
    assert falls_like_a_root(which)


@pytest.mark.parametrize("which", ["t", "s"])
def test_samples_that_share_a_draw_do_not_help(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above fails where the slots are not drawn independently."""
    uniform = random.uniform
    monkeypatch.setattr(module.random, "uniform", lambda seed, *c: uniform(seed, *c[:-1], torch.zeros_like(c[-1])))
    assert not falls_like_a_root(which)


def share_within(epsilon: float, method: SubGenPaper | None = None) -> float:
    """The share of draws in which the theorem's bound holds, over 50 heads and 10 queries; `method` in place of what epsilon asks for."""
    n, m, D, delta, r, heads = 256, 3, 4, 0.5, 1.0, 50
    k, _, _ = planted(n, m, D, delta)
    v = torch.randn(n, D, generator=torch.Generator().manual_seed(8), dtype=torch.float64)  # |V|_F^2 is nearly D |V|_op^2
    q = queries(10, D, r)
    method = method or SubGenPaper(delta=delta, epsilon=epsilon, r=r, block=4)
    caches = stream(method, repeated(k, heads), repeated(v, heads))
    z, tau = estimates(caches, q)
    assert ((caches[0].count > 0).sum(-1) <= m).all()
    P = (q @ k.T).softmax(-1)
    error = (z / tau[..., None] - P @ v).norm(dim=-1)
    return float((error <= epsilon * P.norm(dim=-1) * torch.linalg.matrix_norm(v, 2)).double().mean())


def bound_holds() -> bool:
    return share_within(0.5) >= 0.99


def test_the_papers_bound() -> None:
    """|z/tau - Attn| <= epsilon |softmax(K q)| |V|_op in 99 % of draws, with t and s from epsilon and r; not with two samples of each."""
    assert bound_holds()
    assert share_within(0.5, SubGenPaper(delta=0.5, t=2, s=2)) < 0.9


@pytest.mark.parametrize("mutant", WEIGHTS, ids=lambda m: m[0])
def test_a_wrong_weight_breaks_the_bound(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above fails for it."""
    monkeypatch.setattr(module, mutant[1], mutant[2])
    assert not bound_holds()
