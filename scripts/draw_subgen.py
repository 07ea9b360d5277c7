"""Draws the figures of docs/methods/subgen.md from a real run of a model on a text, and writes the numbers behind them to growth.json.

    pip install -e '.[plots]'
    python scripts/draw_subgen.py --text FILE                                   # the embedded model, 8,191 tokens: about 20 minutes
    python scripts/draw_subgen.py --text FILE --only clusters                   # one figure and its numbers anew; or growth, estimator
    python scripts/draw_subgen.py --text FILE --every 5                         # every fifth layer only
    python scripts/draw_subgen.py --text FILE --quick --model FOLDER --out OUT  # a smoke run of seconds, on a small model

clusters.png   keys of one head before and after the rotary embedding, in two principal components each, coloured by the clusters that
               `subgen` makes of a prompt of 2,048 tokens at 6.25 %. Which head: the one whose clusters hold the median share of its
               un-rotated keys' variance, over all layers and heads.
growth.png     m(n), the clusters of the first n keys at one delta, against n. delta is a fraction of the median distance between keys.
                 rule    leader: online, a key farther than delta from every representative so far opens a cluster (the paper's rule)
                         centres: greedy k-center, centres until no key is farther than delta from one
                 median  all: of all keys, so that delta is fixed while n grows; first: of the first n keys, so that it moves with n
               An exponent is the slope of log m against log n, by least squares, m being the mean over heads; the mean of each head's
               own slope is in growth.json, too. The figure shows leader clusters at the median of all keys.
estimator.png  the error of Algorithm 1 (zoo/attention/subgen_paper.py) after 2,048 keys, for the 32 queries that come next, against t
               and s, in the mean over heads of five layers, queries and seeds. Dotted, with slope -1/2: the root mean square that the
               sums' variances say, in the mean over heads and queries. For the numerator N = A V, with A = exp(K q) and mu = |V|_F^2, it
               is sqrt((mu |A|^2 - |N|^2) / s) / |N|.

Keys are taken as a cache holds them: after the rotary embedding, in the model's dtype. "Before" is what `subgen` computes from them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import zoo
from zoo.attention import Budget, SubGen
from zoo.attention.cache import NoCache
from zoo.attention.clustering import coverage
from zoo.attention.slots import Parts, Slots, finish, slot_parts
from zoo.attention.subgen import SubGenCache
from zoo.attention.subgen_paper import SubGenPaper
from zoo.attention.subgen_slots import Maker
from zoo.attention.tail import Make

FRACTIONS = (0.6, 0.8)  # of the median distance
PARTS = ("clusters", "growth", "estimator")
SIDES = ("before", "after")  # the rotary embedding
BLUE, ORANGE, GREY = "#0b62a4", "#c4570b", "#8a8a8a"


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    tokens: int = 8191
    smallest: int = 256  # n of the first point of m(n); doubled from there
    prompt: int = 2048  # tokens that `subgen` clusters, and that Algorithm 1 absorbs
    queries: int = 32  # of the tokens after those
    share: float = 6.25  # `subgen`'s budget, % of the prompt
    delta: float = 12.0  # Algorithm 1's
    ts: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)  # at the s of `beside`
    ss: tuple[int, ...] = (16, 64, 256, 1024, 4096, 16384, 65536)  # at the t of `beside`
    beside: tuple[int, int] = (16, 256)  # t, s
    seeds: int = 3


QUICK = Plan(tokens=320, smallest=32, prompt=256, queries=8, share=25.0, ts=(1, 4), ss=(4, 64), beside=(4, 64), seeds=2)


# One pass over the text


class Enough(Exception):
    """What comes behind the last layer that is looked at need not be computed."""


class Reader(NoCache):
    """Stands where a layer's cache would, and keeps what passes: keys, values, and the queries at some positions."""

    def __init__(self, window: int | None, asked: slice, last: bool) -> None:
        super().__init__(window)
        self.asked, self.last = asked, last

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
        self.q, self.k, self.v = q[0, :, self.asked].clone(), k[0], v[0]
        if self.last:
            raise Enough
        return super().attend(q, k, v, pos)


@dataclass
class Run:
    """What a model's layers saw, each (heads, tokens, D): keys and queries rotated, in the model's dtype."""

    layers: list[int]
    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]


@torch.no_grad()
def read(lm: Any, ids: Sequence[int], layers: Sequence[int], asked: slice) -> Run:
    """One exact pass over ids; the queries kept are those at positions `asked`."""
    readers = [Reader(lm.config.sliding_window, asked, i == max(layers)) for i in range(lm.config.num_hidden_layers)]
    with contextlib.suppress(Enough):
        lm.model.hidden(torch.tensor([list(ids)]), torch.arange(len(ids))[None], readers)
    kept = [readers[i] for i in layers]
    return Run(list(layers), [r.q for r in kept], [r.k for r in kept], [r.v for r in kept])


def sides(lm: Any, k: Tensor) -> dict[str, Tensor]:
    """Rotated keys k (N, D) of positions 0 .. N - 1 -> {"before": un-rotated, "after": as they are}, float32."""
    return {"before": lm.model.rotary.unrotate(k.float()[None, None], torch.arange(len(k))[None])[0, 0], "after": k.float()}


# How clusters grow


def distances(x: Tensor) -> Tensor:
    """Between all pairs of x (N, F): (N, N) float32."""
    square = x.square().sum(1)
    d = torch.addmm(square[None], x, x.T, alpha=-2)
    return d.add_(square[:, None]).clamp_(min=0).sqrt_().fill_diagonal_(0)


def median_distance(d: Tensor, n: int) -> float:
    """Of pairs of the first n points: of about 1,024 of them, evenly spread, to each other point."""
    rows = torch.arange(0, n, -(-n // 1024))
    others = torch.ones(len(rows), n, dtype=torch.bool)
    others[torch.arange(len(rows)), rows] = False
    return float(d[rows, :n][others].median())


def leader_counts(d: Tensor, delta: float) -> Tensor:
    """Clusters (N,) int64 after each of the points with distances d (N, N), one after the other: one that is farther than delta from every
    representative so far becomes a representative."""
    near = (d <= delta).numpy()
    covered, opens = near[0] & False, torch.zeros(len(d), dtype=torch.int64)
    for i in range(len(d)):
        if not covered[i]:
            opens[i] = 1
            covered |= near[i]
    return opens.cumsum(0)


def centre_counts(d: Tensor, deltas: Sequence[float]) -> list[int]:
    """For each of the deltas, how many centres greedy k-center opens, the first point being one, until no point is farther than that
    from its nearest."""
    gap, found, m = d[0].clone(), {}, 1
    for delta in sorted(deltas, reverse=True):
        while float(gap.max()) > delta:
            gap = torch.minimum(gap, d[int(gap.argmax())])
            m += 1
        found[delta] = m
    return [found[delta] for delta in deltas]


def exponent(n: Sequence[float], m: Sequence[float]) -> float:
    """The slope of log m against log n by least squares."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (n, m))
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def sizes(plan: Plan) -> list[int]:
    """256, 512, ... and the whole; the whole may be a few tokens short of a power of two."""
    return [n for n in (plan.smallest * 2**i for i in range(20)) if n < 0.99 * plan.tokens] + [plan.tokens]


def head_growth(x: Tensor, ns: Sequence[int]) -> dict[str, list[float]]:
    """m(n) of the keys x (N, D) of one head: "rule median fraction" -> counts at ns; and the median distances themselves."""
    d = distances(x)
    medians = [median_distance(d, n) for n in ns]
    out: dict[str, list[float]] = {"distance": medians}
    for which, units in (("all", [medians[-1]] * len(ns)), ("first", medians)):
        centres = [centre_counts(d[:n, :n], [f * unit for f in FRACTIONS]) for n, unit in zip(ns, units, strict=True)]
        for i, f in enumerate(FRACTIONS):
            if which == "all":
                online = leader_counts(d, f * units[0])[torch.tensor(ns) - 1].tolist()
            else:
                online = [int(leader_counts(d[:n, :n], f * unit)[-1]) for n, unit in zip(ns, units, strict=True)]
            out[f"leader {which} {f}"], out[f"centres {which} {f}"] = online, [c[i] for c in centres]
    return out


def growth(lm: Any, run: Run, plan: Plan) -> dict[str, Any]:
    """`head_growth` of every head, and what it comes to: mean counts, and exponents."""
    ns, heads = sizes(plan), []
    for layer, keys in zip(run.layers, run.k, strict=True):
        for head, k in enumerate(keys):
            both = sides(lm, k)
            one = {side: head_growth(x, ns) for side, x in both.items()}
            delta = FRACTIONS[0] * one["before"]["distance"][-1]  # in the same unit on both sides
            one["after"]["before's delta"] = leader_counts(distances(both["after"]), delta)[torch.tensor(ns) - 1].tolist()
            heads.append({"layer": layer, "head": head, **one})
        print(f"growth: layer {layer}", file=sys.stderr, flush=True)
    out: dict[str, Any] = {"n": ns, "heads": len(heads)}
    for side in SIDES:
        out[side] = {}
        for key in heads[0][side]:
            counts = torch.tensor([h[side][key] for h in heads], dtype=torch.float64)
            row: dict[str, Any] = {"mean": [round(m, 2) for m in counts.mean(0).tolist()]}
            if key != "distance":
                row["exponent"] = round(exponent(ns, counts.mean(0).tolist()), 3)
                row["mean of heads' exponents"] = round(sum(exponent(ns, c) for c in counts.tolist()) / len(heads), 3)
            out[side][key] = row
    for side in SIDES:  # of leader clusters at the median of all keys
        rows = {f: {f"{h['layer']}.{h['head']}": round(exponent(ns, h[side][f"leader all {f}"]), 3) for h in heads} for f in FRACTIONS}
        out[side]["each head's exponent"] = {str(f): row for f, row in rows.items()}
    return out


# What `subgen` clusters


class WatchedMaker(Maker):
    """Remembers which slot each token went to."""

    def merged(self, slots: dict[str, Tensor], label: Tensor, *rest: Any) -> dict[str, Tensor]:
        for layer, labels, pos in zip(self.layers, label.chunk(len(self.layers)), slots["pos"].long().chunk(len(self.layers)), strict=True):
            layer.label, layer.at = labels, pos
        return super().merged(slots, label, *rest)


class WatchedCache(SubGenCache):
    @classmethod
    def maker(cls, layers: Sequence[SubGenCache]) -> Make:
        return WatchedMaker(layers).compress


@dataclass(frozen=True)
class Watched(SubGen):
    """`subgen`, watched."""

    name = "subgen"

    def layer(self, *args: Any) -> WatchedCache:
        return WatchedCache(self, *args)


@dataclass
class Clusters:
    """One head: tokens' positions (N,), the cluster of each (N,), -1 where it stayed exact."""

    layer: int
    head: int
    pos: Tensor
    label: Tensor
    within: dict[str, float] = field(default_factory=dict)  # the share of the keys' variance that is within these clusters
    own: dict[str, float] = field(default_factory=dict)  # the same of as many clusters that are made of each side's keys


@torch.no_grad()
def clusters(lm: Any, ids: Sequence[int], run: Run, plan: Plan) -> list[Clusters]:
    """Run `subgen` on the prompt: its clusters in every layer and head of `run`."""
    before, lm.attn = lm.attn, Watched(budget=Budget(plan.share, percent=True), when="prompt")
    cache = lm.new_cache()
    lm.attn = before
    cache.begin_prompt([plan.prompt])
    for start in range(0, plan.prompt, 512):
        for piece, where in cache.split(torch.tensor([list(ids[start : min(start + 512, plan.prompt)])])):
            lm.model.hidden(piece, where, cache)
    cache.end_prompt()
    out = []
    for i, keys in zip(run.layers, run.k, strict=True):
        for head, k in enumerate(keys):
            label, pos = cache[i].label[0, head], cache[i].at[0, head]
            label, pos = label[pos >= 0], pos[pos >= 0]
            alone = label.bincount(minlength=int(label.max()) + 1)[label] == 1  # first and heavy tokens, and outliers
            one = Clusters(i, head, pos, torch.where(alone, -1, label))
            for side, x in sides(lm, k).items():
                one.within[side] = within(x[pos], one.label)
                one.own[side] = within(x[pos[one.label >= 0]], covered(x[pos[one.label >= 0]], len(one.label[one.label >= 0].unique())))
            out.append(one)
    return out


def covered(x: Tensor, count: int) -> Tensor:
    """Labels (N,) of `count` clusters of x (N, D), found as `subgen` does it, but without weights."""
    alive, number = torch.ones(1, 1, len(x), dtype=torch.bool), torch.tensor([[count]])
    return coverage(x[None, None], alive, number, torch.zeros(1, 1, len(x)), number // 4)[0, 0]


def within(x: Tensor, label: Tensor) -> float:
    """Of the variance of the points x (N, D) that are in a cluster, label (N,) >= 0, the share that is within clusters."""
    x, label = x[label >= 0].double(), label[label >= 0]
    n = label.bincount().clamp(min=1)[:, None]
    mean = x.new_zeros(len(n), x.shape[1]).index_add_(0, label, x) / n
    return float((x - mean[label]).square().sum() / (x - x.mean(0)).square().sum())


def median_head(all_: Sequence[Clusters]) -> Clusters:
    """The head of median `within` before the rotary embedding (the lower one of two)."""
    return sorted(all_, key=lambda c: c.within["before"])[(len(all_) - 1) // 2]


def clusters_summary(all_: Sequence[Clusters], plan: Plan) -> dict[str, Any]:
    one = median_head(all_)

    def mean(which: str) -> dict[str, float]:
        return {side: round(sum(getattr(c, which)[side] for c in all_) / len(all_), 3) for side in SIDES}

    return {
        "prompt": plan.prompt,
        "budget, %": plan.share,
        "variance within clusters, mean over heads": mean("within"),
        "the same, each side clustered by itself": mean("own"),
        "drawn": {"layer": one.layer, "head": one.head, "within": {side: round(x, 3) for side, x in one.within.items()}},
    }


# Algorithm 1


def absorbed(k: Tensor, v: Tensor, delta: float, t: int, s: int, seed: int) -> Slots:
    """The slots of Algorithm 1 after keys and values (G, N, D) at positions 0 .. N - 1, N a multiple of its block."""
    G, N, D = k.shape
    config = SimpleNamespace(num_hidden_layers=1, num_attention_heads=G, num_key_value_heads=G, head_dim=D, sliding_window=None)
    caches = SubGenPaper(delta=delta, t=t, s=s, seed=seed).caches(config, None, 1, None, None, torch.float32, "cpu")
    layer = caches[0]
    for _, pos in caches.split(torch.zeros(1, N, dtype=torch.int64)):
        layer.store.append(layer.row(pos), k[None, :, pos[0]], v[None, :, pos[0]], pos)
    return layer.slots()


def leader_labels(d: Tensor, delta: float) -> Tensor:
    """(N,): which cluster each of the points with distances d (N, N) joins, one after the other: that of the nearest representative if it
    is no farther than delta, else one of its own."""
    leads, label = torch.full((len(d),), torch.inf), torch.zeros(len(d), dtype=torch.int64)
    for i in range(len(d)):
        nearest, which = (d[i] + leads).min(0)
        label[i] = which if nearest <= delta else i
        if nearest > delta:
            leads[i] = 0
    return label.unique(return_inverse=True)[1]


def errors(q: Tensor, pos: Tensor, estimate: Slots, exact: Parts) -> dict[str, Tensor]:
    """Relative errors of both sums and of the output, (H, T) each, for queries q (1, H, T, D) at pos (1, T)."""
    parts, out = slot_parts(q, pos, estimate), finish(exact, q.dtype)
    ratio = (parts.max_den - exact.max_den).exp() * parts.den / exact.den
    away = (finish(parts, q.dtype) - out).norm(dim=-1) / out.norm(dim=-1)
    numerator = (finish(parts, q.dtype) * ratio.flatten(1, 2)[..., None] - out).norm(dim=-1) / out.norm(dim=-1)
    return {"denominator": (ratio - 1).abs()[0].flatten(0, 1), "numerator": numerator[0], "output": away[0]}


def spread(q: Tensor, k: Tensor, v: Tensor, delta: float) -> dict[str, Tensor]:
    """By the sums' variances, the root mean square of the relative errors of the denominator, times sqrt(t), and of the numerator, times
    sqrt(s): (H, T) each, for queries q (H, T, D) over all of k, v (G, N, D)."""
    G, D = k.shape[0], k.shape[2]
    score = q.view(G, -1, D) @ k.mT / D**0.5  # (G, R T, N)
    A = (score - score.amax(-1, keepdim=True)).exp().double()
    mu, total = v.double().square().sum((1, 2))[:, None], A @ v.double()
    z = (mu * A.square().sum(-1) - total.square().sum(-1)).clamp(min=0).sqrt() / total.norm(dim=-1)
    tau = torch.zeros_like(z)
    for g in range(G):
        label = leader_labels(distances(k[g]), delta)
        n = label.bincount().double()
        once, twice = (A.new_zeros(A.shape[1], len(n)).index_add_(1, label, x) for x in (A[g], A[g].square()))
        tau[g] = (n * twice - once.square()).clamp(min=0).sum(-1).sqrt() / once.sum(-1)
    return {"denominator": tau.view(q.shape[:2]), "numerator": z.view(q.shape[:2])}


def rounded(x: float) -> float:
    return float(f"{x:.4g}")


def estimator(run: Run, plan: Plan) -> dict[str, Any]:
    """Errors of Algorithm 1 against t and against s: mean, median and root mean square over heads, queries and seeds, with the slopes of
    each in log-log; and `spread`, mean and median over heads and queries."""
    step = max(1, len(run.layers) // 5)
    layers = range(step // 2, len(run.layers), step)
    data = [(run.q[i].float(), run.k[i][:, : plan.prompt].float(), run.v[i][:, : plan.prompt].float()) for i in layers]
    pos = plan.prompt + torch.arange(plan.queries)[None]
    held = torch.arange(plan.prompt, dtype=torch.int32)
    exact = [slot_parts(q[None], pos, Slots(k[None], v[None], held.expand(1, len(k), -1))) for q, k, v in data]
    out: dict[str, Any] = {"keys": plan.prompt, "delta": plan.delta, "layers": [run.layers[i] for i in layers]}
    for name, values in (("t", plan.ts), ("s", plan.ss)):
        rows: dict[str, dict[str, list[float]]] = {}
        for value in values:
            t, s = (value, plan.beside[1]) if name == "t" else (plan.beside[0], value)
            found: dict[str, list[Tensor]] = {}
            for seed in range(plan.seeds):
                for i, (q, k, v) in enumerate(data):
                    slots = absorbed(k, v, plan.delta, t, s, seed * len(data) + i)
                    for what, e in errors(q[None], pos, slots, exact[i]).items():
                        found.setdefault(what, []).append(e.double().flatten())
            for what, each in found.items():
                e, row = torch.cat(each), rows.setdefault(what, {})
                for how, number in (("mean", e.mean()), ("median", e.median()), ("rms", e.square().mean().sqrt())):
                    row.setdefault(how, []).append(rounded(float(number)))
            print(f"estimator: {name}={value}", file=sys.stderr, flush=True)
        slopes = {what: {how: round(exponent(values, e), 3) for how, e in row.items()} for what, row in rows.items()}
        for what, row in rows.items():
            slopes[what] |= {f"{how}, last two": round(exponent(values[-2:], row[how][-2:]), 3) for how in ("mean", "median")}
        beside = {"s": plan.beside[1]} if name == "t" else {"t": plan.beside[0]}
        out[name] = {"values": list(values), "beside": beside, **rows, "slopes": slopes}
    expected = [spread(q, k, v, plan.delta) for q, k, v in data]
    for what, root in (("denominator", "t"), ("numerator", "s")):
        e = torch.cat([x[what].flatten() for x in expected])
        out[f"variance says, {what} sqrt({root})"] = {"mean": rounded(float(e.mean())), "median": rounded(float(e.median()))}
    return out


def theorem(run: Run, grown: dict[str, Any]) -> dict[str, Any]:
    """What the theorem's factor e^(2 delta r) is, r being the norm of a query over sqrt(D): its logarithm to base 10."""
    norms = torch.cat([q.float().norm(dim=-1).flatten() for q in run.q]) / run.q[0].shape[-1] ** 0.5
    r = {name: round(float(norms.quantile(p)), 2) for name, p in (("median", 0.5), ("largest", 1.0))}
    factor = {}
    for f in FRACTIONS:
        delta, kept = f * grown["after"]["distance"]["mean"][-1], grown["after"][f"leader all {f}"]["mean"][-1] / grown["n"][-1]
        logs = {name: round(2 * delta * radius / math.log(10), 1) for name, radius in r.items()}
        factor[str(f)] = {"delta": round(delta, 2), "clusters, of the keys": round(kept, 3), "log10 of e^(2 delta r)": logs}
    return {"r": r, "by delta": factor}


# Figures


def save(figure: Any, path: Path) -> None:
    """With a palette of 128 colours, a third of the bytes."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, facecolor="white", bbox_inches="tight", pad_inches=0.15)
    Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB", file=sys.stderr)


def principal(x: Tensor) -> tuple[Tensor, float]:
    """x (N, D) in its first two principal components (N, 2), and the share of the variance that they hold."""
    x = x - x.mean(0)
    _, size, directions = torch.linalg.svd(x, full_matrices=False)
    return x @ directions[:2].T, float(size[:2].square().sum() / size.square().sum())


def draw_clusters(plt: Any, path: Path, lm: Any, run: Run, one: Clusters, plan: Plan, largest: int = 8) -> None:
    both = sides(lm, run.k[run.layers.index(one.layer)][one.head])
    big = one.label[one.label >= 0].bincount().argsort(descending=True, stable=True)[:largest].tolist()
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 5.2))
    for axis, side in zip(axes, SIDES, strict=True):
        at, share = principal(both[side][one.pos])
        rest = ~torch.isin(one.label, torch.tensor(big))
        axis.scatter(*at[rest].T, s=5, color="#c9c9c9", linewidths=0, label="other tokens")
        for i, c in enumerate(big):
            mine = one.label == c
            axis.scatter(*at[mine].T, s=20, color=plt.get_cmap("tab10")(i + (i > 6)), linewidths=0, label=f"{int(mine.sum())} tokens")
        axis.set_title(f"{side} the rotary embedding: {one.within[side]:.0%} of the variance\nis within clusters", fontsize=11)
        axis.set_xlabel(f"first principal component, in units of a key\n(the two components hold {share:.0%} of the variance)")
        axis.set_ylabel("second principal component, in units of a key")
        axis.set_aspect("equal", adjustable="datalim")
    place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "frameon": False}
    axes[1].legend(fontsize=8.5, title=f"the {len(big)}\nlargest clusters", title_fontsize=8.5, **place)
    count, gone = len(one.label[one.label >= 0].unique()), [1 - one.within[side] for side in SIDES]
    figure.suptitle(
        f"subgen's clusters explain {gone[0]:.0%} of the variance of keys before the rotary embedding, {gone[1]:.0%} after it\n"
        f"(layer {one.layer}, head {one.head}, the median head; {count} clusters, {plan.prompt:,} tokens, budget {plan.share:g} %)",
        fontsize=12.5,
    )
    figure.tight_layout()
    save(figure, path)
    plt.close(figure)


def ticks(axis: Any, values: Sequence[float]) -> None:
    from matplotlib.ticker import NullLocator

    axis.set_xticks(values, [f"{v:,}" for v in values])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(True, which="major", color="#dddddd", linewidth=0.6)


def draw_growth(plt: Any, path: Path, grown: dict[str, Any]) -> None:
    ns = grown["n"]
    figure, axis = plt.subplots(figsize=(8, 5.4))
    for side, colour in zip(SIDES, (BLUE, ORANGE), strict=True):
        for f, mark in zip(FRACTIONS, ("o-", "s--"), strict=True):
            row = grown[side][f"leader all {f}"]
            label = f"{side} the rotary embedding, delta = {f} median: n^{row['exponent']:.2f}"
            axis.loglog(ns, row["mean"], mark, color=colour, label=label, markersize=5)
    row = grown["after"]["before's delta"]
    label = f"after it, delta = {FRACTIONS[0]} median of before it: n^{row['exponent']:.2f}"
    axis.plot(ns, row["mean"], "^-.", color=ORANGE, linewidth=1, markersize=4, label=label)
    axis.plot(ns, ns, color=GREY, linewidth=1, linestyle=":", label="a cluster for every token: n^1")
    ticks(axis, ns)
    axis.set_xlabel("tokens n")
    axis.set_ylabel("clusters m(n), mean over heads")
    axis.set_ylim(top=16 * ns[-1])
    axis.legend(fontsize=9, loc="upper left")
    before, after = ([grown[side][f"leader all {f}"]["exponent"] for f in FRACTIONS] for side in SIDES)
    axis.set_title(
        f"Un-rotated keys need n^{before[0]:.2f} to n^{before[1]:.2f} clusters, rotated ones n^{after[0]:.2f} to n^{after[1]:.2f}\n"
        f"(mean over {grown['heads']} heads; delta fixed, as a fraction of the median distance of {ns[-1]:,} keys)",
        fontsize=11,
    )
    save(figure, path)
    plt.close(figure)


def draw_estimator(plt: Any, path: Path, found: dict[str, Any]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.9))
    for axis, name, sum_ in zip(axes, ("t", "s"), ("denominator", "numerator"), strict=True):
        row, values = found[name], found[name]["values"]
        for what, how, colour, mark in ((sum_, "mean", BLUE, "o-"), (sum_, "median", BLUE, "o--"), ("output", "mean", ORANGE, "s-")):
            label = f"{what}, {how}: slope {row['slopes'][what][how]:.2f}"
            axis.loglog(values, row[what][how], mark, color=colour, label=label, markersize=5)
        scale = found[f"variance says, {sum_} sqrt({name})"]["mean"]
        label = f"slope -1/2: what the {sum_}'s\nvariance says, {scale:.3g} / sqrt({name})"
        axis.plot(values, [scale * x**-0.5 for x in values], color=GREY, linestyle=":", label=label)
        ticks(axis, values)
        beside = ", ".join(f"{k} = {v:,}" for k, v in row["beside"].items())
        axis.set_title(f"against {name}, at {beside}", fontsize=11)
        axis.set_xlabel("samples of a cluster, t" if name == "t" else "samples of values, s")
        axis.set_ylabel("relative error (1 = as large as the true value)")
        low, high = axis.get_ylim()
        axis.set_ylim(low / 12 if name == "t" else low, high)  # room for the legend
        axis.legend(fontsize=8.5, loc="lower left" if name == "t" else "upper right")
    row, keys = found["s"], found["keys"]
    i = next((i for i, s in enumerate(row["values"]) if s >= keys), len(row["values"]) - 1)
    figure.suptitle(
        f"Algorithm 1's output is off by {row['output']['mean'][i]:.0%} with s = {row['values'][i]:,} samples for {keys:,} keys;\n"
        f"the numerator's error falls with slope {row['slopes']['numerator']['mean, last two']:.2f} from s = {row['values'][-2]:,} on",
        fontsize=12,
    )
    figure.tight_layout()
    save(figure, path)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--text", required=True, help="a text file")
    p.add_argument("--model", default="smollm2-135m")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--every", type=int, default=1, help="look at every so many layers")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "methods", help="folder")
    p.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    p.add_argument("--quick", action="store_true", help="a smoke run")
    p.add_argument("--no-figures", action="store_true", help="numbers only, without matplotlib")
    args = p.parse_args(argv)
    if not args.no_figures:
        try:
            import matplotlib
        except ImportError:
            sys.exit("the figures need matplotlib: pip install -e '.[plots]', or --no-figures for the numbers alone")
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    torch.set_num_threads(args.threads)
    plan = QUICK if args.quick else Plan()
    lm = zoo.load(args.model, dtype=args.dtype, compile="off")
    ids = lm.tokenizer.encode(Path(args.text).read_text())[: plan.tokens]
    if len(ids) < plan.tokens:
        sys.exit(f"{args.text} has {len(ids)} tokens; {plan.tokens} are needed")
    layers = range(0, lm.config.num_hidden_layers, args.every)
    run = read(lm, ids, layers, slice(plan.prompt, plan.prompt + plan.queries))
    args.out.mkdir(parents=True, exist_ok=True)
    file, figure = args.out / "growth.json", lambda name: args.out / f"{name}.png"
    about = {
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "text": Path(args.text).name,
        "tokens": plan.tokens,
        "every": args.every,
        "torch": torch.__version__,
    }
    numbers = json.loads(file.read_text()) if file.exists() else {}
    if set(args.only) != set(PARTS) and {k: numbers.get(k) for k in about} != about:
        sys.exit(f"{file} is not of a whole run like this ({about}): leave out --only")
    numbers |= about
    if "clusters" in args.only:
        every = clusters(lm, ids, run, plan)
        one, numbers["clusters"] = median_head(every), clusters_summary(every, plan)
        if not args.no_figures:
            draw_clusters(plt, figure("clusters"), lm, run, one, plan)
    if "estimator" in args.only:
        numbers["estimator"] = estimator(run, plan)
        if not args.no_figures:
            draw_estimator(plt, figure("estimator"), numbers["estimator"])
    if "growth" in args.only:
        numbers["growth"] = growth(lm, run, plan)
        numbers["theorem"] = theorem(run, numbers["growth"])
        if not args.no_figures:
            draw_growth(plt, figure("growth"), numbers["growth"])
    file.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
