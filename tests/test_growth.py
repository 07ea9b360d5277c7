"""scripts/draw_subgen.py: counting clusters, fitting exponents, the error of Algorithm 1; the real model; what docs/methods says."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import CORPUS, write_llama
from torch import Tensor

import zoo
from zoo.attention import ATTENTION, options
from zoo.attention.clustering import k_center

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "methods"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


draw = script("draw_subgen")


# Fits and counts, where the answer is known


@pytest.mark.parametrize("true", [0.0, 0.5, 0.71, 1.0])
def test_exponent_of_a_power(true: float) -> None:
    n = [256, 512, 1024, 2048, 4096, 8191]
    assert draw.exponent(n, [3.7 * x**true for x in n]) == pytest.approx(true, abs=1e-9)


def test_the_exponent_is_the_least_squares_slope() -> None:
    """On points that lie on no line it is numpy's."""
    np = pytest.importorskip("numpy")
    n, m = [100, 200, 500, 900], [7.0, 20.0, 21.0, 80.0]
    assert draw.exponent(n, m) == pytest.approx(np.polyfit(np.log(n), np.log(m), 1)[0])


def planted(ns: list[int], power: float, noise: float) -> Tensor:
    """Points (N, 16): the i-th opens a group where i^power passes a whole number, else repeats one that is there, up to `noise`."""
    g = torch.Generator().manual_seed(1)
    homes, rows = 100.0 * torch.randn(ns[-1], 16, generator=g), []
    opened = 0
    for i in range(1, ns[-1] + 1):
        if math.ceil(i**power) > opened:
            opened += 1
            rows.append(opened - 1)
        else:
            rows.append(int(torch.randint(opened, (1,), generator=g)))
    return homes[rows] + noise * torch.randn(ns[-1], 16, generator=g)


@pytest.mark.parametrize("power", [0.5, 0.75, 1.0])
def test_planted_growth_is_found(power: float) -> None:
    """Points whose groups number n^power: both rules count exactly those, and the fit gives the power back."""
    ns = [64, 128, 256, 512, 1024]
    d = draw.distances(planted(ns, power, 0.1))
    groups = [math.ceil(n**power) for n in ns]
    online = draw.leader_counts(d, 5.0)[torch.tensor(ns) - 1].tolist()
    centres = [draw.centre_counts(d[:n, :n], [5.0])[0] for n in ns]
    assert online == centres == groups
    assert draw.exponent(ns, online) == pytest.approx(power, abs=0.02)
    assert draw.leader_labels(d, 5.0).unique().numel() == groups[-1]


def test_rotating_groups_makes_them_grow() -> None:
    """The claim in small: a fixed number of un-rotated groups, and no end of rotated ones. Both medians are of all points."""
    from zoo.models.layers import Rope, Rotary

    ns = [64, 128, 256, 512]
    g = torch.Generator().manual_seed(2)
    homes = 5 * torch.randn(8, 64, generator=g)
    x = homes[torch.randint(8, (512,), generator=g)] + 0.1 * torch.randn(512, 64, generator=g)
    turned = Rotary(64, Rope()).rotate(x[None, None], torch.arange(512)[None])[0, 0]
    before, after = (draw.head_growth(points, ns) for points in (x, turned))
    assert draw.exponent(ns, before["leader all 0.6"]) < 0.05
    assert draw.exponent(ns, after["leader all 0.6"]) > 0.5


def test_counts_against_plain_loops() -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(90, 3, generator=g)
    d, delta = draw.distances(x), 0.8
    torch.testing.assert_close(d, torch.cdist(x.double(), x.double()).float(), rtol=0, atol=1e-5)
    assert d.shape == (90, 90)
    assert d.max() > 1
    leads, found = [], []
    for i in range(len(x)):
        if all(math.dist(x[i].tolist(), x[j].tolist()) > delta for j in leads):
            leads.append(i)
        found.append(len(leads))
    assert draw.leader_counts(d, delta).tolist() == found
    assert 10 < found[-1] < 80  # neither all nor hardly any

    (count,) = draw.centre_counts(d, [delta])
    for most, enough in ((count, True), (count - 1, False)):  # the library's greedy k-center, with that many centres and with one fewer
        picks, _ = k_center(x[None, None], torch.ones(1, 1, 90, dtype=torch.bool), torch.tensor([[most]]))
        assert (float(d[:, picks[0, 0]].amin(1).max()) <= delta) == enough
    assert draw.centre_counts(d, [0.5, 0.8, 2.0]) == [draw.centre_counts(d, [f])[0] for f in (0.5, 0.8, 2.0)]


def test_median_distance() -> None:
    """Of all pairs, a point with itself left out; of the first n only; and of 2,500 points, where it is a sample of them."""
    x = torch.randn(300, 5, generator=torch.Generator().manual_seed(4))
    d = draw.distances(x)
    for n in (7, 300):
        true = torch.pdist(x[:n]).median()
        assert draw.median_distance(d, n) == pytest.approx(float(true), rel=1e-3)
    x = torch.randn(2500, 5, generator=torch.Generator().manual_seed(5))
    assert draw.median_distance(draw.distances(x), 2500) == pytest.approx(float(torch.pdist(x).median()), rel=0.02)


def test_within() -> None:
    """Two tight groups far apart hold nearly no variance; labels that mix them hold nearly all; -1 takes no part."""
    x = torch.cat((torch.randn(50, 4), 100 + torch.randn(50, 4), torch.full((1, 4), 1e6)))
    label = torch.tensor([0] * 50 + [3] * 50 + [-1])
    assert draw.within(x, label) < 0.01
    assert draw.within(x, torch.tensor([0, 1] * 50 + [-1])) > 0.95


def test_the_estimators_error_is_what_its_variance_says() -> None:
    """On keys and values without heavy tails, where a root mean square can be measured: both sums, at several t and s."""
    g = torch.Generator().manual_seed(6)
    G, N, D, T = 1, 256, 16, 4
    homes = 1.5 * torch.randn(8, D, generator=g)
    k = homes[torch.randint(8, (G, N), generator=g)] + 0.3 * torch.randn(G, N, D, generator=g)
    v, q = torch.randn(G, N, D, generator=g), torch.randn(2, T, D, generator=g)
    delta = 8.0  # wide clusters, so that the denominator has an error to tell from the numerator's
    said = draw.spread(q, k, v, delta)
    pos = N + torch.arange(T)[None]
    held = torch.arange(N, dtype=torch.int32).expand(1, G, -1)
    exact = draw.slot_parts(q[None], pos, draw.Slots(k[None], v[None], held))
    for t, s in ((1, 1024), (8, 64)):
        runs = [draw.errors(q[None], pos, draw.absorbed(k, v, delta, t, s, seed), exact) for seed in range(150)]
        for what, samples in (("denominator", t), ("numerator", s)):
            rms = torch.stack([r[what] for r in runs]).double().square().mean(0).sqrt()
            ratio = float((rms / (said[what] / samples**0.5)).mean())
            assert ratio == pytest.approx(1, abs=0.15), (what, samples)  # the mean over 8 queries of 150 runs scatters by less than 0.05


# The script as a whole


def test_both_sides_of_the_rotary_embedding(tiny: Path) -> None:
    """What is read is what a cache holds, and "before" is what the model rotated."""
    lm = zoo.load(str(tiny), dtype="float32", compile="off")
    ids = list(range(40, 90))
    run = draw.read(lm, ids, [0, 1], slice(10, 14))
    cache = lm.new_cache()
    lm.model(torch.tensor([ids]), cache)
    held = cache[1].slots()
    assert run.k[1].shape[1] == len(ids)
    assert min(run.k[1].std(), run.v[1].std()) > 0.1
    torch.testing.assert_close(run.k[1], held.k[0][:, held.pos[0, 0] >= 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(run.v[1], held.v[0][:, held.pos[0, 0] >= 0], rtol=0, atol=1e-5)
    assert [x.shape[1] for x in run.q] == [4, 4]
    both = draw.sides(lm, run.k[1][0])
    x = torch.randn(50, 16)
    torch.testing.assert_close(
        draw.sides(lm, lm.model.rotary.rotate(x[None, None], torch.arange(50)[None])[0, 0])["before"], x, rtol=0, atol=1e-5
    )
    assert torch.equal(both["after"], run.k[1][0])


QUICK = ["--dtype", "float32", "--quick", "--every", "2"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `--quick` writes on a tiny checkpoint; with figures where matplotlib is installed."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("growth")
    model, text, out = write_llama(folder / "tiny"), folder / "text.txt", folder / "out"
    text.write_text(CORPUS * 3)
    figures = [] if importlib.util.find_spec("matplotlib") else ["--no-figures"]
    draw.main(["--text", str(text), "--model", str(model), *QUICK, "--out", str(out), *figures])
    return out


def test_quick_numbers(quick: Path) -> None:
    numbers = json.loads((quick / "growth.json").read_text())
    grown = numbers["growth"]
    assert grown["n"] == [32, 64, 128, 256, 320]
    assert grown["heads"] == 4  # 2 of 3 layers, 2 heads each
    for side in ("before", "after"):
        assert set(grown[side]["each head's exponent"]["0.6"]) == {"0.0", "0.1", "2.0", "2.1"}
        for rule in ("leader", "centres"):
            for f, g in (("0.6", "0.8"),):
                some, fewer = (grown[side][f"{rule} all {x}"]["mean"] for x in (f, g))
                assert all(1 <= b <= a <= n for a, b, n in zip(some, fewer, grown["n"], strict=True))
                assert grown[side][f"{rule} first {f}"]["mean"][-1] == some[-1]  # there the medians are the same
    assert 0 < numbers["clusters"]["drawn"]["within"]["before"] < 1
    assert len(numbers["estimator"]["t"]["output"]["mean"]) == 2
    assert len((quick / "growth.json").read_bytes()) < 50_000


def test_quick_figures(quick: Path) -> None:
    pytest.importorskip("matplotlib", reason="the figures need matplotlib: pip install -e '.[plots]'")
    for name in ("clusters", "growth", "estimator"):
        data = (quick / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG")
        assert 10_000 < len(data) < 300_000


def test_one_part_anew(quick: Path, tmp_path: Path) -> None:
    """--only replaces that part's numbers, leaves the others, and wants a whole run before."""
    before = json.loads((quick / "growth.json").read_text())
    old = tmp_path / "growth.json"
    old.write_text(json.dumps({**before, "clusters": None, "growth": "kept"}))
    model, text = quick.parent / "tiny", quick.parent / "text.txt"
    args = ["--text", str(text), "--model", str(model), *QUICK, "--no-figures", "--only", "clusters", "--out"]
    draw.main([*args, str(tmp_path)])
    assert json.loads(old.read_text()) == {**before, "growth": "kept"}
    with pytest.raises(SystemExit, match="leave out --only"):
        draw.main([*args, str(tmp_path / "new")])


def test_too_short_a_text(tmp_path: Path) -> None:
    model, text = write_llama(tmp_path / "m"), tmp_path / "t.txt"
    text.write_text("short")
    with pytest.raises(SystemExit, match="tokens; 320 are needed"):
        draw.main(["--text", str(text), "--model", str(model), "--quick", "--no-figures", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# On the real model


@pytest.mark.slow
def test_growth_of_the_embedded_model(smollm2: Path, test_data: Path) -> None:
    """Un-rotated keys need n^0.71 and n^0.53 clusters at 0.6 and 0.8 of the median distance, rotated ones n^1.02 and n^0.94, within 0.1:
    three of the first nine layers, which are read soonest."""
    lm = zoo.load(str(smollm2), dtype="bfloat16", compile="off")
    ids = lm.tokenizer.encode((test_data / "moby-dick-first-half.txt").read_text())[:8191]
    plan, layers = draw.Plan(), [2, 5, 8]
    ns = draw.sizes(plan)
    assert ns == [256, 512, 1024, 2048, 4096, 8191]
    run = draw.read(lm, ids, layers, slice(0, 1))
    total = {(side, f): torch.zeros(len(ns)) for side in draw.SIDES for f in draw.FRACTIONS}
    for keys in run.k:
        for side, x in ((side, x) for k in keys[:2] for side, x in draw.sides(lm, k).items()):
            d = draw.distances(x)
            unit = draw.median_distance(d, len(d))
            for f in draw.FRACTIONS:
                total[side, f] += draw.leader_counts(d, f * unit)[torch.tensor(ns) - 1]
    found = {key: draw.exponent(ns, m.tolist()) for key, m in total.items()}
    claimed = {("before", 0.6): 0.71, ("before", 0.8): 0.53, ("after", 0.6): 1.02, ("after", 0.8): 0.94}
    assert found == {key: pytest.approx(value, abs=0.1) for key, value in claimed.items()}


# What the documents say


def written(side: str, rule: str) -> dict[str, Any]:
    numbers: dict[str, Any] = json.loads((DOCS / "growth.json").read_text())["growth"][side][rule]
    return numbers


def test_the_documents_numbers_are_those_of_the_figures() -> None:
    """growth.json's exponents agree with its own counts, are within 0.1 of the claim, and stand in subgen.md."""
    text = (DOCS / "subgen.md").read_text()
    n = json.loads((DOCS / "growth.json").read_text())["growth"]["n"]
    for side, f, claim in (("before", "0.6", 0.71), ("before", "0.8", 0.53), ("after", "0.6", 1.02), ("after", "0.8", 0.94)):
        for which in ("all", "first"):
            row = written(side, f"leader {which} {f}")
            assert draw.exponent(n, row["mean"]) == pytest.approx(row["exponent"], abs=0.002)
            assert f"n^{row['exponent']:.2f}" in text
        assert written(side, f"leader all {f}")["exponent"] == pytest.approx(claim, abs=0.1)
    numbers = json.loads((DOCS / "growth.json").read_text())
    shares = numbers["clusters"]["variance within clusters, mean over heads"]
    assert f"lies {shares['before']:.0%} of the variance of un-rotated keys, and {shares['after']:.0%} of that".replace("%", " %") in text
    found = numbers["estimator"]["s"]
    assert f"off by {found['output']['mean'][found['values'].index(4096)]:.0%} of its own size".replace("%", " %") in text


def test_every_method_is_in_the_table() -> None:
    """With its default `when` and its paper."""
    rows = dict(re.findall(r"^\| \[?`(\w+)`(?:\]\(\w+\.md\))? \| (.*arxiv.*)$", (DOCS / "README.md").read_text(), re.M))
    assert set(rows) == set(ATTENTION)
    for name, method in ATTENTION.items():
        known = options(method)
        cells = [cell.strip() for cell in rows[name].strip().strip("|").split("|")]
        when = known["when"][1] if "when" in known else "-"
        assert when in cells, name
        (number,) = set(re.findall(r"arxiv\.org/abs/(\d{4}\.\d{5})", rows[name]))
        source = sys.modules[method.__module__].__doc__ or ""
        assert number in source, name


def test_the_documents_figures_exist() -> None:
    text = (DOCS / "subgen.md").read_text()
    shown = re.findall(r"!\[[^\]]+\]\((\w+\.png)\)", text)
    assert sorted(shown) == ["clusters.png", "estimator.png", "growth.png"]
    for name in shown:
        assert (DOCS / name).stat().st_size <= 150_000
