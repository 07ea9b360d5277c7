"""Each selecting method against a plain one: a loop over tokens in float64 that holds a list of positions a head, and the paper's rule.

The plain form shares nothing with zoo but the sizes that the method states (recent tokens, room for settled ones, block). It runs on random
queries, keys and values of two layers, and must agree in every output and in which tokens each head still holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.attention import parse
from zoo.attention.budgeted import Budgeted, BudgetedCaches
from zoo.attention.cache import Caches
from zoo.attention.slots import PAGE
from zoo.attention.uniform import Uniform
from zoo.models.layers import LinearScaling, Rope, Rotary, YarnScaling

L, H, G, D = 2, 4, 2, 16  # layers, query heads, key/value heads, head size
R = H // G
ROPE = Rope()


def draw(T: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q (L, H, T, D), k, v (L, G, T, D), before the rotary embedding. Scores are of size 2, so that attention has favourites."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(L, heads, T, D, generator=g) for heads in (H, G, G))
    return q * 1.5, k * (0.6 + torch.rand(L, G, T, 1, generator=g)), v


def turned(x: Tensor, pos: Tensor, rope: Rope = ROPE) -> Tensor:
    """x (..., T, D) rotated at positions (T,): pairs (i, i + n) as complex numbers, in float64; what is behind 2n stays."""
    n = int(D * rope.partial) // 2
    freq = Rotary(D, rope).inv_freq.double()
    grow = 1.0 if rope.scaling is None else rope.scaling.attention_factor  # type: ignore[attr-defined]
    z = torch.complex(x[..., :n].double(), x[..., n : 2 * n].double())
    z = z * torch.polar(torch.full((), grow, dtype=torch.float64), pos[:, None].double() * freq)
    return torch.cat((z.real, z.imag, x[..., 2 * n :].double()), -1)


def at_their_positions(x: Tensor, rope: Rope = ROPE) -> Tensor:
    return turned(x, torch.arange(x.shape[-2]), rope).float()


def run(
    attn: str, q: Tensor, k: Tensor, v: Tensor, prompt: int, rope: Rope = ROPE, window: int | None = None, chunk: int = 37
) -> tuple[Tensor, Caches]:
    """zoo's method on rotated q, k, v -> outputs (L, H, T, D), and the cache."""
    config = SimpleNamespace(num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=G, head_dim=D, sliding_window=window)
    cache = parse(attn).caches(config, Rotary(D, rope), 1, None, None, torch.float32, "cpu")
    out, T = torch.empty_like(q), q.shape[2]
    cache.begin_prompt([prompt])
    for start, end in ((0, prompt), (prompt, T)):
        for t in range(start, end, chunk):
            for _, pos in cache.split(torch.zeros(1, min(t + chunk, end) - t, dtype=torch.int64)):
                for i, layer in enumerate(cache):
                    now = pos[0]
                    out[i, :, now] = layer.attend(q[i][None, :, now], k[i][None, :, now], v[i][None, :, now], pos)[0]
        if start == 0:
            cache.end_prompt()
    return out, cache


def kept(cache: Caches) -> list[list[list[int]]]:
    """[layer][head] -> sorted positions that are still visible to the next query."""
    s = [layer.slots() for layer in cache]
    oldest = [-1 if x.window is None else int(cache.tokens_seen) - x.window for x in s]
    return [[sorted(p for p in x.pos[0, g].tolist() if p > old) for g in range(G)] for x, old in zip(s, oldest, strict=True)]


# The plain form


@dataclass
class Layer:
    """What a plain method may look at: all queries and keys so far, which tokens each head still holds, and the attention they got."""

    q: Tensor  # (H, T, D) float64, rotated
    k: Tensor  # (G, T, D)
    v: Tensor
    held: list[list[int]] = field(default_factory=lambda: [[] for _ in range(G)])
    got: list[dict[int, float]] = field(default_factory=lambda: [{} for _ in range(G)])
    seen: int = 0
    window: int | None = None

    def visible(self, g: int, t: int) -> list[int]:
        return [p for p in self.held[g] if p <= t and (self.window is None or p > t - self.window)]

    def attention(self, g: int, t: int) -> tuple[list[int], Tensor]:
        """Positions that head g holds and query t sees, and what each of the group's query heads gives them: (R, n)."""
        pos = self.visible(g, t)
        score = self.q[g * R : (g + 1) * R, t] @ self.k[g, pos].T / math.sqrt(D)
        return pos, score.softmax(-1)


Rule = Callable[[Layer, int, list[int]], Sequence[float]]  # layer, head, candidates (by age) -> score of each


def plain(
    rule: Rule,
    method: Budgeted,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt: int,
    sinks: int = 0,
    window: int | None = None,
    block: int | None = None,
    recent: int | None = None,
) -> tuple[Tensor, list[list[list[int]]]]:
    """Token by token: attend, add up attention, and where it is time, keep of each head's old tokens those with the highest score."""
    budget = method.budget.tokens(0)
    block = method.block if block is None else block
    recent = method.recent(budget) + method.spare(budget) if recent is None else recent
    room = (budget - recent - (0 if method.when == "prompt" else block)) // PAGE * PAGE
    out, T = torch.empty_like(q), q.shape[2]
    layers = [Layer(q[i].double(), k[i].double(), v[i].double(), window=window) for i in range(L)]
    bounded = False
    for t in range(T):
        for i, layer in enumerate(layers):
            layer.seen = t + 1
            for g in range(G):
                layer.held[g].append(t)
                layer.got[g][t] = 0.0
                pos, prob = layer.attention(g, t)
                out[i, g * R : (g + 1) * R, t] = (prob @ layer.v[g, pos]).to(out.dtype)
                for p, x in zip(pos, prob.sum(0).tolist(), strict=True):
                    layer.got[g][p] += x
        n = t + 1
        if method.when == "prompt":
            now = n == prompt and n > budget
        else:
            waits = method.when == "decode" and n < prompt
            begins = not bounded and not waits and n >= budget
            now = begins or (bounded and n % block == 0)
            bounded = bounded or begins
        for layer in layers if now else ():
            choose(rule, layer, n - recent, room, sinks)
    return out, [[[p for p in layer.held[g] if window is None or p > T - window] for g in range(G)] for layer in layers]


def choose(rule: Rule, layer: Layer, boundary: int, room: int, sinks: int) -> None:
    alive = [[p for p in held if layer.window is None or p > layer.seen - layer.window] for held in layer.held]
    old = [[p for p in pos if p < boundary] for pos in alive]
    scores = [rule(layer, g, old[g]) for g in range(G)]
    for g in range(G):
        value = {p: math.inf if p < sinks else s for p, s in zip(old[g], scores[g], strict=True)}
        stay = sorted(old[g], key=lambda p: -value[p])[:room]
        layer.held[g] = sorted(stay) + [p for p in alive[g] if p >= boundary]


def compare(
    attn: str,
    rule: Rule,
    prompt: int = 231,
    T: int = 400,
    seed: int = 0,
    plain_as: str | None = None,
    window: int | None = None,
    **how: Any,
) -> None:
    """Raises AssertionError unless zoo's method and the plain one agree. `plain_as`: another method's sizes for the plain one."""
    q, k, v = draw(T, seed)
    q, k = at_their_positions(q), at_their_positions(k)
    out, cache = run(attn, q, k, v, prompt, window=window)
    method = parse(plain_as or attn)
    assert isinstance(method, Budgeted)
    expected, positions = plain(rule, method, q, k, v, prompt, window=window, **how)
    assert kept(cache) == positions
    assert (out - expected).abs().max() < 1e-4


# The rules


def heavy(layer: Layer, g: int, pos: list[int]) -> list[float]:
    """H2O: attention that it got from all queries so far."""
    return [layer.got[g][p] for p in pos]


def heavy_for_its_age(layer: Layer, g: int, pos: list[int]) -> list[float]:
    """... divided by the number of queries that could see it."""
    return [layer.got[g][p] / (layer.seen - p) for p in pos]


def looked_at(layer: Layer, g: int, queries: int, of: int | None = None) -> dict[int, float]:
    """Attention that the last queries give to what head g holds now."""
    total = dict.fromkeys(layer.held[g], 0.0)
    for t in range(max(0, layer.seen - queries), layer.seen):
        pos, prob = layer.attention(g, t)
        for p, x in zip(pos, prob.sum(0).tolist(), strict=True):
            total[p] += x
    return total


def pooled_look(layer: Layer, g: int, pos: list[int], queries: int = 64, pool: int = 5) -> list[float]:
    """SnapKV: from the last 64 queries, averaged over five neighbours among the candidates."""
    total, half = looked_at(layer, g, queries), pool // 2
    return [sum(total[p] for p in pos[max(0, i - half) : i + half + 1]) / pool for i in range(len(pos))]


def last_look(layer: Layer, g: int, pos: list[int]) -> list[float]:
    """TOVA: from the last query, averaged over all heads of the layer."""
    looks = [looked_at(layer, head, 1) for head in range(G)]
    return [sum(look[p] for look in looks) / H for p in pos]


def own_last_look(layer: Layer, g: int, pos: list[int]) -> list[float]:
    look = looked_at(layer, g, 1)
    return [look[p] for p in pos]


def small_norm(layer: Layer, g: int, pos: list[int]) -> list[float]:
    """L2-norm; norms that agree to 1/1500 tie, so that rounding decides nothing, and the older token stays."""
    return [-round(1024 * math.log2(float((layer.k[g, p] ** 2).sum()) ** 0.5)) for p in pos]


def large_norm(layer: Layer, g: int, pos: list[int]) -> list[float]:
    return [-x for x in small_norm(layer, g, pos)]


def unlike_the_mean(layer: Layer, g: int, pos: list[int], unit: bool = True) -> list[float]:
    """KeyDiff: minus the cosine with the mean of the unit keys."""
    keys = [layer.k[g, p] / (layer.k[g, p].norm() if unit else 1) for p in pos]
    mean = torch.stack(keys).mean(0)
    return [-float(key @ mean / key.norm() / mean.norm()) for key in keys]


def like_the_mean(layer: Layer, g: int, pos: list[int]) -> list[float]:
    return [-x for x in unlike_the_mean(layer, g, pos)]


def unlike_the_plain_mean(layer: Layer, g: int, pos: list[int]) -> list[float]:
    return unlike_the_mean(layer, g, pos, unit=False)


def newest(layer: Layer, g: int, pos: list[int]) -> list[float]:
    return [float(p) for p in pos]


def one_look(layer: Layer, g: int, pos: list[int]) -> list[float]:
    return pooled_look(layer, g, pos, queries=32)


def sharp_look(layer: Layer, g: int, pos: list[int]) -> list[float]:
    return pooled_look(layer, g, pos, pool=1)


def wider_look(layer: Layer, g: int, pos: list[int]) -> list[float]:
    return pooled_look(layer, g, pos, pool=7)


WHEN = ["prompt", "decode", "stream"]
RULES: list[tuple[str, Rule, dict[str, int]]] = [
    ("h2o:budget=160", heavy, {}),
    ("h2o:budget=160,age=true", heavy_for_its_age, {}),
    ("h2o:budget=160,block=16", heavy, {}),
    ("snapkv:budget=160", pooled_look, {}),
    ("tova:budget=160", last_look, {}),
    ("l2norm:budget=160", small_norm, {}),
    ("keydiff:budget=160", unlike_the_mean, {}),
    ("sinks:budget=160", newest, {"sinks": 4}),
]


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize(("attn", "rule", "how"), RULES)
def test_every_token_as_the_plain_form(attn: str, rule: Rule, how: dict[str, int], when: str) -> None:
    """The same tokens stay, and every output is the same, after the prompt and while streaming past the ring's wrap."""
    compare(f"{attn},when={when}", rule, **how)


@pytest.mark.parametrize(("attn", "rule", "how"), RULES)
def test_within_the_models_window(attn: str, rule: Rule, how: dict[str, int]) -> None:
    """What leaves the model's own window is no candidate any more, and takes no room."""
    compare(f"{attn},when=stream", rule, window=190, **how)


@pytest.mark.parametrize(
    ("attn", "rule"),
    [("h2o:budget=128,block=1", heavy), ("h2o:budget=128,block=1,age=true", heavy_for_its_age), ("tova:budget=129,block=1", last_look)],
)
def test_one_token_a_step_as_in_the_papers(attn: str, rule: Rule) -> None:
    """block=1: each step evicts one token, as soon as there are more than the budget."""
    compare(f"{attn},when=decode", rule, prompt=201, T=260)
    compare(f"{attn},when=stream", rule, prompt=20, T=200, seed=1)


def test_heads_of_tova_agree_and_others_differ() -> None:
    """TOVA keeps one set of tokens for a layer; H2O, SnapKV, L2-norm and KeyDiff one for each key/value head."""
    q, k, v = draw(300)
    q, k = at_their_positions(q), at_their_positions(k)
    for attn, same in (("tova", True), ("h2o", False), ("snapkv", False), ("l2norm", False), ("keydiff", False), ("uniform", False)):
        _, cache = run(f"{attn}:budget=128,when=stream", q, k, v, 200)
        first, second = kept(cache)[0]
        assert (first == second) == same
        assert kept(cache)[1][0] != first


WRONG: list[tuple[str, Rule, dict[str, Any]]] = [
    ("h2o:budget=160", heavy_for_its_age, {}),
    ("h2o:budget=160", own_last_look, {}),
    ("h2o:budget=160", heavy, {"recent": 17}),
    ("h2o:budget=160", heavy, {"block": 63, "recent": 17}),
    ("h2o:budget=160,age=true", heavy, {}),
    ("snapkv:budget=160", sharp_look, {}),
    ("snapkv:budget=160", wider_look, {}),
    ("snapkv:budget=160", one_look, {}),
    ("tova:budget=160", own_last_look, {}),
    ("tova:budget=160", last_look, {"sinks": 4}),
    ("l2norm:budget=160", large_norm, {}),
    ("keydiff:budget=160", like_the_mean, {}),
    ("keydiff:budget=160", unlike_the_plain_mean, {}),
    ("sinks:budget=160", newest, {"sinks": 3}),
    ("sinks:budget=160", newest, {"sinks": 5}),
]


@pytest.mark.parametrize(("attn", "rule", "how"), WRONG)
def test_another_rule_is_noticed(attn: str, rule: Rule, how: dict[str, Any]) -> None:
    """Each is a mistake that such code has: without pooling, a window of another length, heads that do not agree, no age, ..."""
    with pytest.raises(AssertionError):
        compare(f"{attn},when=stream", rule, T=330, **how)


# StreamingLLM: positions that count in the cache


def streaming_llm(method: Budgeted, q: Tensor, k: Tensor, v: Tensor, prompt: int, rope: Rope, sinks: int = 4) -> Tensor:
    """q, k before the rotary embedding. All tokens that are held get new positions 0, 1, 2, ... at every step, and the query the last."""
    alive: list[int] = []
    budget, bounded = method.budget.tokens(0), False
    room = (budget - (0 if method.when == "prompt" else method.block)) // PAGE * PAGE
    out = torch.empty_like(q)
    for t in range(q.shape[2]):
        alive.append(t)
        place = torch.arange(len(alive))
        for i in range(L):
            keys = turned(k[i][:, alive], place, rope).repeat_interleave(R, 0)
            query = turned(q[i][:, t : t + 1], place[-1:], rope)
            prob = (query @ keys.mT / math.sqrt(D)).softmax(-1)
            out[i, :, t] = (prob @ v[i][:, alive].double().repeat_interleave(R, 0))[:, 0].to(out.dtype)
        n = t + 1
        waits = method.when == "decode" and n < prompt
        begins = not bounded and not waits and (n == prompt and n > budget if method.when == "prompt" else n >= budget)
        if begins or (bounded and method.when != "prompt" and n % method.block == 0):
            alive = alive[:sinks] + alive[sinks:][-(room - sinks) :]
        bounded = bounded or begins
    return out


ROPES = {
    "plain": Rope(),
    "partial": Rope(partial=0.25),
    "yarn": Rope(scaling=YarnScaling(4.0, 64, 1.2)),
    "linear": Rope(scaling=LinearScaling(2.0)),
}


@pytest.mark.parametrize(("when", "kind"), [*((when, "plain") for when in WHEN), *(("stream", kind) for kind in ROPES if kind != "plain")])
def test_positions_in_the_cache_are_streaming_llm(when: str, kind: str) -> None:
    """positions=cache equals turning every key anew at each step; with true positions, or other sinks, it does not."""
    rope = ROPES[kind]
    q, k, v = draw(400, seed=3)
    attn = f"sinks:budget=160,when={when}"
    method = parse(attn)
    assert isinstance(method, Budgeted)
    expected = streaming_llm(method, q, k, v, 231, rope)
    rotated = at_their_positions(q, rope), at_their_positions(k, rope), v
    out, _ = run(attn + ",positions=cache", *rotated, 231, rope)
    assert (out - expected).abs().max() < 1e-4
    true, _ = run(attn, *rotated, 231, rope)
    assert (true - expected)[:, :, 250:].abs().max() > 1e-2
    assert (true - expected)[:, :, :160].abs().max() < 1e-4
    assert (streaming_llm(method, q, k, v, 231, rope, sinks=3) - out).abs().max() > 1e-2


# Uniform: a sample


def sample(seed: int, q: Tensor, k: Tensor, v: Tensor, options: str, prompt: int, window: int | None = None) -> list[dict[int, float]]:
    """Position -> log-weight, for each layer and head, after all tokens: what the method holds, first and recent tokens included."""
    _, cache = run(f"uniform:budget=128,seed={seed},{options}", q, k, v, prompt, window=window, chunk=1000)
    found = []
    for layer in cache:
        s = layer.slots()
        assert s.a is not None
        for g in range(G):
            alive = s.pos[0, g] > (-1 if window is None else int(cache.tokens_seen) - window)
            found.append(dict(zip(s.pos[0, g, alive].tolist(), s.a[0, g, alive].tolist(), strict=True)))
    return found


UNIFORM = [
    ("when=prompt", 300, 300, None),
    ("when=decode", 200, 320, None),
    ("when=stream", 384, 384, None),
    ("when=stream", 704, 704, 350),
]


@pytest.mark.parametrize(("options", "prompt", "T", "window"), UNIFORM)
def test_uniform_is_a_uniform_sample(options: str, prompt: int, T: int, window: int | None) -> None:
    """Every token between the first and the recent ones is kept equally often over seeds, layers and heads (chi-square), m of N of them,
    with weight N / m; first and recent ones always, with weight 1. So the denominator is estimated without bias (t-test)."""
    q, k, v = draw(T, seed=5)
    q, k = at_their_positions(q), at_their_positions(k)
    method = parse(f"uniform:budget=128,{options}")
    assert isinstance(method, Uniform)
    first = 4 if window is None else T - window + 1
    recent = method.recent(128) + method.spare(128)
    middle = range(first, T - recent)
    seeds = 150
    count = torch.zeros(T)
    miss: dict[str, list[float]] = {"as it is": [], "without weights": []}
    sizes = set()
    for seed in range(seeds):
        found = sample(seed, q, k, v, options, prompt, window)
        for i, slots in enumerate(found):
            layer, g = divmod(i, G)
            mine = [p for p in slots if p in middle]
            sizes.add(len(mine))
            always = set(range(T - recent, T)) | (set(range(4)) if window is None else set())
            assert always <= set(slots)
            assert all(slots[p] == 0 for p in always)
            assert all(abs(slots[p] - math.log(len(middle) / len(mine))) < 1e-5 for p in mine)
            count[mine] += 1
            weight = (q[layer, g * R, -1].double() @ k[layer, g].double().T / math.sqrt(D)).exp()
            true = float(weight[first:].sum() + (weight[:4].sum() if window is None else 0))
            for name, scale in (("as it is", 1.0), ("without weights", 0.0)):
                miss[name].append(sum(float(weight[p]) * math.exp(a * scale) for p, a in slots.items()) / true - 1)
    runs, N = seeds * L * G, len(middle)
    t = {name: sum(x) / runs / (torch.tensor(x).std().item() / math.sqrt(runs)) for name, x in miss.items()}
    assert abs(t["as it is"]) < 4
    assert abs(t["without weights"]) > 10
    if window is None:
        (m,) = sizes
        assert m == (92 if "prompt" in options else 28)
        expected = runs * m / N
        chi = float(((count[list(middle)] - expected) ** 2 / (expected * (1 - m / N))).sum()) * (N - 1) / N
        assert abs(chi - (N - 1)) < 5 * math.sqrt(2 * (N - 1))
        halves = [float(count[list(part)].mean()) for part in (middle[: N // 2], middle[N // 2 :])]
        assert abs(halves[0] - halves[1]) < 5 * math.sqrt(4 * expected * (1 - m / N) / N)


def test_uniform_draws_anew_for_every_head_layer_and_seed() -> None:
    """Samples have in common what chance has: m^2 / N."""
    q, k, v = draw(304)
    sets = [set(slots) & set(range(4, 272)) for seed in (0, 1, -7) for slots in sample(seed, q, k, v, "when=prompt", 304)]
    for i, x in enumerate(sets):
        assert len(x) == 92
        for y in sets[:i]:
            assert 16 <= len(x & y) <= 47  # 31.6 expected, standard deviation 3.7
    assert sample(3, q, k, v, "when=prompt", 304) == sample(3, q, k, v, "when=prompt", 304)


def test_a_longer_sequences_sample_comes_from_a_shorter_ones() -> None:
    """Streaming gives the tokens that one draw at the end would: those of the largest random numbers."""
    q, k, v = draw(512)
    streamed = sample(4, q, k, v, "when=stream", 20)
    at_once = sample(4, q, k, v, "when=decode", 512)
    for x, y in zip(streamed, at_once, strict=True):
        assert x.keys() == y.keys()
        assert all(abs(x[p] - y[p]) < 1e-6 for p in x)


def test_sizes_that_methods_state() -> None:
    """Recent tokens, with what whole pages leave over, ring and room for settled ones add up to the budget, in every mode; the plain form
    above relies on these numbers."""
    for name in ("sinks", "uniform", "h2o", "snapkv", "tova", "l2norm", "keydiff"):
        for when in WHEN:
            for budget in (64, 128, 160, 1000, 4096):
                if budget < 128 and when != "prompt":
                    continue
                method = parse(f"{name}:budget={budget},when={when}")
                assert isinstance(method, Budgeted)
                recent, settled = method.recent(budget) + method.spare(budget), method.settled(budget)
                assert recent + settled + (0 if when == "prompt" else method.block) == budget
                assert recent >= 0
                assert settled >= PAGE
                assert settled % PAGE == 0
    half = parse("h2o:budget=1000,when=stream")
    assert isinstance(half, Budgeted)
    assert half.settled(1000) + half.spare(1000) == 500  # half for heavy hitters, half for recent ones
    snap = parse("snapkv:budget=1000")
    assert isinstance(snap, Budgeted)
    assert (snap.when, snap.recent(1000)) == ("prompt", 64)
    assert isinstance(snap.caches(SimpleNamespace(**CONFIG), Rotary(D, ROPE), 1, None, None, torch.float32, "cpu"), BudgetedCaches)


CONFIG = {"num_hidden_layers": L, "num_attention_heads": H, "num_key_value_heads": G, "head_dim": D, "sliding_window": None}
