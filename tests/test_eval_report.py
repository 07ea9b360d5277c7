"""zoo.eval report: joining runs, ranks at equal bytes, what is marked, and the page. Rows are made up; what must come out is known."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from browser import CONTRAST, OUTLINE, open_page
from PIL import Image

from zoo import cli
from zoo.errors import ZooError
from zoo.eval import plots, report, stats

KEY = ("task", "variant", "attn", "protocol", "question", "length", "sample", "seed")


def row(attn: str, sample: int, scores: dict[str, float], final: int, **more: Any) -> dict[str, Any]:
    """One of `kl` at 1,024 tokens, unless `more` says otherwise."""
    out: dict[str, Any] = {"task": "kl", "variant": "", "attn": attn, "protocol": "prefill", "question": "", "length": 1024}
    out |= {"tokens": 1000, "sample": sample, "seed": 0, "prompt": f"prompt{sample}", "scores": scores, "answer": None, "expected": None}
    return out | {"bytes": {"peak": 2_000_000, "final": final, "full": 2_000_000, "tokens": 1250}} | more


def folder(path: Path, rows: list[dict[str, Any]], model: str = "tiny", **arguments: Any) -> Path:
    """A run's folder."""
    path.mkdir(parents=True)
    config = {"command": "python -m zoo.eval --tasks kl", "arguments": {"model": model, "seed": 0, "text_sha256": "t"} | arguments}
    config |= {"versions": {"torch": "2.13"}, "commit": "0123456789abcdef", "seed": 0, "started": "2026-11-29T00:00:00Z"}
    (path / "config.json").write_text(json.dumps(config | {"machine": {"cpu": "A CPU", "cores": 2, "threads": 1}}))
    timings = [{name: r[name] for name in KEY} | {"rate": {"prefill": 1000.0 + r["sample"], "decode": None}} for r in rows]
    for name, some in (("records.jsonl", rows), ("timings.jsonl", timings)):
        (path / name).write_text("".join(json.dumps(r) + "\n" for r in some))
    return path


HARD = [0.1, 0.9, 0.2, 0.7, 0.4, 0.5, 0.3, 0.8]  # prompts differ far more than methods do
NOISE = [0.03, -0.04, 0.02, -0.01, -0.03, 0.04, 0.01, -0.02]


def methods() -> list[dict[str, Any]]:
    """Three at equal bytes, of which b is a little worse than a on every prompt and c as often better as worse; full; and one alone."""
    rows = []
    for i, hard in enumerate(HARD):
        rows.append(row("full", i, {"kl": 0.0, "top1": 1.0}, 2_000_000))
        rows.append(row("a:budget=25%", i, {"kl": hard, "top1": 0.9}, 500_000))
        rows.append(row("b:budget=25%", i, {"kl": hard + 0.02 + 0.001 * i, "top1": 0.9}, 515_000))
        rows.append(row("c:budget=25%", i, {"kl": hard + 0.001 + NOISE[i], "top1": 0.9}, 510_000))
        rows.append(row("lone:budget=12%", i, {"kl": 2 * hard, "top1": 0.8}, 484_000))
    return rows


def cells_of(path: Path, baseline: str | None = None) -> dict[str, Any]:
    parts, _ = report.join([path], baseline)
    return {cell["attn"]: cell for cell in parts[0].cells}


# Ranks and marks


def test_ranks_only_at_equal_bytes(tmp_path: Path) -> None:
    cells = cells_of(folder(tmp_path / "run", methods()))
    standing = {attn: report.standing(cell) for attn, cell in cells.items()}
    assert standing["a:budget=25%"] == "1 of 3"
    assert standing["c:budget=25%"] == "2 of 3 ≈"  # its difference to the first has an interval that contains 0
    assert standing["b:budget=25%"] == "3 of 3"  # a hundredth of what prompts differ by, but on each of them
    assert standing["full"] == "alone: nearest bytes -74.2\xa0%, b:budget=25%"
    assert standing["lone:budget=12%"] == "alone: nearest bytes +3.3\xa0%, a:budget=25%"


@pytest.mark.parametrize(("other", "sizes"), [(1_030_000, [2, 2]), (1_031_000, [1, 1])])
def test_three_per_cent(other: int, sizes: list[int]) -> None:
    cells = [{"protocol": "prefill", "bytes": {"final": n, "peak": 1}} for n in (other, 1_000_000)]
    assert [len(report.equal_bytes(cell, cells)) for cell in cells] == sizes


def test_each_row_has_its_own_neighbours(tmp_path: Path) -> None:
    """In a chain of steps of 2 % each is compared with the one before and the one after, with no other."""
    rows = [row(f"m{n}", i, {"kl": HARD[i] + n / 10}, int(1e6 * 1.02**n)) for n in range(5) for i in range(8)]
    cells = cells_of(folder(tmp_path / "run", rows))
    assert [report.standing(cells[f"m{n}"]) for n in range(5)] == ["1 of 2", "2 of 3", "2 of 3", "2 of 3", "2 of 2"]


def test_a_twin_is_no_competitor(tmp_path: Path) -> None:
    """Two options may come to the same cache, as 12.5 % and 6.25 % of a short prompt: it is ranked once."""
    rows = [row(attn, i, {"kl": HARD[i] + more}, 500_000) for i in range(8) for attn, more in (("a", 0.0), ("b", 0.1), ("c", 0.1))]
    cells = cells_of(folder(tmp_path / "run", rows))
    assert [report.standing(cells[attn]) for attn in "abc"] == ["1 of 2", "2 of 2", "the same cache as b"]
    rows[-1]["scores"]["kl"] += 0.01
    cells = cells_of(folder(tmp_path / "other", rows))
    assert [report.standing(cells[attn]) for attn in "abc"] == ["1 of 3", "2 of 3", "3 of 3"]


def test_allocated_bytes_are_shown_where_they_are_known(tmp_path: Path) -> None:
    rows = methods()
    for r in rows:
        if r["attn"] != "full":
            r["bytes"]["allocated"] = 3 * 2**20
    cells = cells_of(folder(tmp_path / "run", rows))
    table = report.table(tuple(cells["full"][name] for name in report.PLACE), list(cells.values()), None)
    at = table.head.index("allocated")
    assert {line[0]: line[at] for line in table.body} == dict.fromkeys((f"`{attn}`" for attn in cells), "3.0 MiB") | {"`full`": "-"}
    assert "allocated" not in report.table(tuple(cells["full"][name] for name in report.PLACE), [cells["full"]], None).head


def test_stream_counts_the_peak(tmp_path: Path) -> None:
    def one(attn: str, i: int, peak: int) -> dict[str, Any]:
        return row(
            attn, i, {"kl": HARD[i]}, 500_000, protocol="stream", bytes={"peak": peak, "final": 500_000, "full": 2_000_000, "tokens": 1250}
        )

    rows = [one(attn, i, peak) for i in range(8) for attn, peak in (("a", 600_000), ("b", 610_000), ("c", 700_000))]
    cells = cells_of(folder(tmp_path / "run", rows))
    assert [report.standing(cells[attn]).partition(":")[0] for attn in "abc"] == ["1 of 2", "1 of 2 ≈", "alone"]
    table = report.table(tuple(cells["a"][name] for name in report.PLACE), list(cells.values()), None)
    assert dict(zip(table.head, table.body[0], strict=True))["of full"] == "35.0 %"


def test_more_is_better_where_it_is(tmp_path: Path) -> None:
    rows = [row(attn, i, {"right": right}, 500_000) for i in range(8) for attn, right in (("a", 0.0), ("b", 1.0))]
    cells = cells_of(folder(tmp_path / "run", rows))
    assert (report.standing(cells["a"]), report.standing(cells["b"])) == ("2 of 2", "1 of 2")


def test_no_rank_for_what_cannot_be_compared(tmp_path: Path) -> None:
    rows = [row("a", i, {"kl": 0.1}, 500_000) for i in range(8)] + [row("b", i, {"kl": 0.2}, 500_000) for i in range(5)]
    assert {report.standing(cell) for cell in cells_of(folder(tmp_path / "run", rows)).values()} == {
        "samples with a finite score differ: 5, 8"
    }
    nan: dict[str, Any] = {"kl": None}  # most of a method's scores are not finite: the one that is must not win
    rows = [row("a", i, {"kl": 0.1} if i == 0 else nan, 500_000) for i in range(8)]
    rows += [row("b", i, {"kl": 0.2}, 500_000) for i in range(8)]
    assert {report.standing(cell) for cell in cells_of(folder(tmp_path / "nan", rows)).values()} == {
        "samples with a finite score differ: 1, 8"
    }
    rows = [row("a", 0, {"kl": 0.1}, 500_000), row("b", 0, {"other": 0.2}, 500_000)]
    assert {report.standing(cell) for cell in cells_of(folder(tmp_path / "two", rows)).values()} == {"no score in common"}


def test_one_sample_distinguishes_nothing(tmp_path: Path) -> None:
    rows = [row("a", 0, {"kl": 0.1}, 500_000), row("b", 0, {"kl": 0.9}, 500_000)]
    assert report.standing(cells_of(folder(tmp_path / "run", rows))["b"]) == "2 of 2 ≈"


def test_table(tmp_path: Path) -> None:
    report.write(folder(tmp_path / "run", methods()), baseline="a:budget=25%")
    lines = (tmp_path / "run" / "report.md").read_text().splitlines()
    tables = [line for line in lines if line.startswith("|")]
    head = [cell.strip() for cell in tables[0].strip("|").split("|")]
    rows = {(cells := [cell.strip() for cell in line.strip("|").split("|")])[0]: dict(zip(head, cells, strict=True)) for line in tables[2:]}
    assert list(rows) == ["`full`", "`b:budget=25%`", "`c:budget=25%`", "`a:budget=25%`", "`lone:budget=12%`"]
    assert "kl - full's" not in head  # the full cache's KL is 0
    assert rows["`b:budget=25%`"]["kl - a:budget=25%'s"].startswith("+0.0235 [")
    assert rows["`c:budget=25%`"]["kl - a:budget=25%'s"].startswith("+0.001 [-")
    assert [rows[f"`{m}:budget=25%`"]["kl - a:budget=25%'s"].endswith("≈") for m in "abc"] == [False, False, True]
    assert rows["`a:budget=25%`"]["kl - a:budget=25%'s"] == ""
    assert rows["`a:budget=25%`"]["top1 - full's"] == "-0.1 [-0.1, -0.1]"
    row_a = rows["`a:budget=25%`"]
    assert (row_a["of full"], row_a["a token"], row_a["n"], row_a["at the peak"]) == ("25.0 %", "400", "8", "1.9 MiB")
    assert row_a["prefill tokens/s"] == "1004"
    assert "decode tokens/s" not in head
    assert "### kl, prefill, 1,024 tokens" in lines
    assert any("commit 0123456789ab" in line and "A CPU, 1 of 2 cores" in line for line in lines)


# Joining


def test_joins_runs_of_the_same_prompts(tmp_path: Path) -> None:
    rows = methods()
    one = folder(tmp_path / "one", [r for r in rows if r["attn"] != "c:budget=25%"])
    again = [r | {"scores": {"kl": 9.0, "top1": 0.0}} for r in rows if r["attn"] == "a:budget=25%"]  # the first folder's count
    two = folder(tmp_path / "two", [*again, *(r for r in rows if r["attn"] == "c:budget=25%")])
    parts, _ = report.join([one, two], None)
    assert len(parts) == 1
    assert parts[0].twice == len(HARD)
    whole = cells_of(folder(tmp_path / "whole", rows))
    assert {cell["attn"]: (cell["scores"], cell["rank"]) for cell in parts[0].cells} == {
        attn: (cell["scores"], cell["rank"]) for attn, cell in whole.items()
    }


def test_other_models_are_a_part_of_their_own(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", methods())
    two = folder(tmp_path / "two", methods(), model="/somewhere/other", dtype="float32")
    out = tmp_path / "both"
    report.write(out, [one, two])
    text = (out / "report.md").read_text()
    assert "## tiny, as in the file" in text
    assert "## other, float32" in text
    assert {path.name for path in out.glob("*.svg")} == {"frontier-kl-prefill.svg", "frontier2-kl-prefill.svg"}
    summary = json.loads((out / "summary.json").read_text())
    assert [cell["part"] for cell in summary["cells"]] == ["tiny, as in the file"] * 5 + ["other, float32"] * 5


def test_other_prompts_are_refused(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", methods())
    two = folder(tmp_path / "two", [r | {"prompt": "another"} for r in methods()[:1]])
    with pytest.raises(ZooError, match="two: kl 1024 asked other prompts than an earlier folder"):
        report.join([one, two], None)


def test_a_run_keeps_its_summary(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", methods())
    (run / "summary.json").write_text(json.dumps({"baseline": "b:budget=25%", "cells": []}))
    assert report.write(run) == [run / "report.md", run / "report.html", run / "frontier-kl-prefill.svg"]
    assert json.loads((run / "summary.json").read_text())["cells"] == []
    assert "kl - b:budget=25%'s" in (run / "report.md").read_text()  # the run's own baseline


# Plots


@pytest.mark.parametrize(
    ("attn", "family", "budget"),
    [
        ("full", "full", ""),
        ("sliding:window=25%", "sliding", "25%"),
        ("subgen:budget=12.5%", "subgen", "12.5%"),
        ("subgen:scores=expected,budget=25%/256", "subgen:scores=expected", "25%/256"),
        ("subgen:budget=1024,heads=uniform", "subgen:heads=uniform", "1024"),
        ("subgen:delta=6", "subgen", "delta=6"),
        ("subgen:delta=1e+1", "subgen", "delta=1e+1"),
        ("subgen:budget=25%+kivi:bits=4", "subgen+kivi:bits=4", "25%"),
        ("h2o:budget=25%,age=true+kivi:bits=4", "h2o:age=true+kivi:bits=4", "25%"),
    ],
)
def test_lines_and_panels(attn: str, family: str, budget: str) -> None:
    assert (plots.family(attn), plots.budget(attn)) == (family, budget)


def several(lengths: tuple[int, ...] = (1024, 2048), depths: tuple[float, ...] = (0.0, 0.5, 1.0)) -> list[dict[str, Any]]:
    """`kl`, and needles at depths: right unless the needle is deep in a small cache."""
    rows = []
    for n in lengths:
        for attn, share in (("full", 1.0), ("a:budget=25%", 0.25), ("a:budget=50%", 0.5), ("b:window=25%", 0.26)):
            about: dict[str, Any] = {
                "length": n,
                "tokens": n - 3,
                "bytes": {"peak": 2000 * n, "final": int(2000 * n * share), "full": 2000 * n, "tokens": n + 256},
            }
            for i, hard in enumerate(HARD[:3]):
                scores = {"kl": 0.0 if attn == "full" else hard * (1 / share) ** 2, "top1": 1 - 0.1 * hard}
                rows.append(row(attn, i, scores, 0, **about))
                for d in depths:
                    right = float(share > 0.3 or d < 0.7 or (d == 1.0 and i == 0))
                    more = about | {"task": "needle", "variant": f"depth={d}", "question": "unseen", "prompt": f"{d} {i}"}
                    rows.append(row(attn, i, {"right": right, "logprob": -hard}, 0, **more))
    return rows


def test_a_line_is_what_the_cells_say(tmp_path: Path) -> None:
    parts, _ = report.join([folder(tmp_path / "run", several())], None)
    some = [c for c in parts[0].cells if c["task"] == "kl" and plots.family(c["attn"]) == "a" and c["length"] == 1024]
    x, y, around = plots.points(some, "kl", lambda cell: 100 * report.counted(cell) / cell["bytes"]["full"])
    assert x == [25.0, 50.0]
    assert y == pytest.approx([16 * 0.4, 4 * 0.4])
    assert around is not None
    assert all(low < mean < high for (low, high), mean in zip(around, y, strict=True))
    panels = plots.by_budget(parts[0].cells)
    assert {b: sorted({c["attn"] for c in cells}) for b, cells in panels.items()} == {
        "25%": ["a:budget=25%", "b:window=25%", "full"],
        "50%": ["a:budget=50%", "full"],
    }


def test_logarithmic_only_where_it_helps(tmp_path: Path) -> None:
    parts, _ = report.join([folder(tmp_path / "run", several())], None)
    kl = [cell for cell in parts[0].cells if cell["task"] == "kl"]
    right = [cell for cell in parts[0].cells if cell["task"] == "needle"]
    assert not plots.logarithmic(kl, "kl")  # 1.6 to 6.4
    assert plots.logarithmic([*kl, {"scores": {"kl": {"mean": 0.01}}}], "kl")
    assert not plots.logarithmic([*right, {"scores": {"right": {"mean": 0.01}}}], "right")
    assert [cell["attn"] for cell in kl if cell not in plots.with_score(kl, "kl", True)] == ["full", "full"]


@pytest.mark.parametrize(
    ("values", "ticks"),
    [((5, 17, 34, 100), [6.25, 12.5, 25, 50, 100]), ((51.2, 66), [52, 56, 60, 64]), ((99.9, 100.0), [99.9, 99.925, 99.95])],
)
def test_every_axis_has_numbers(values: tuple[float, ...], ticks: list[float]) -> None:
    found = plots.shares(values)
    assert found[: len(ticks)] == pytest.approx(ticks)
    assert all(min(values) <= t <= max(values) for t in found)


def test_heat_map_is_by_depth_and_length(tmp_path: Path) -> None:
    parts, _ = report.join([folder(tmp_path / "run", several())], None)
    cells = [cell for cell in parts[0].cells if cell["task"] == "needle"]
    grid = plots.grids(parts[0], cells, "right")
    assert grid["a:budget=25%"] == {(d, n): pytest.approx(v) for n in (1024, 2048) for d, v in ((0.0, 1.0), (0.5, 1.0), (1.0, 1 / 3))}
    assert set(grid["full"].values()) == {1.0}
    text = plots.heat("right", grid, "right")
    assert text.count(">0.33<") == 4  # a at 25 % and b, two lengths each; coordinates are rounded, words are not
    assert plots.grids(parts[0], [cell for cell in parts[0].cells if cell["task"] == "kl"], "kl") == {}
    (tmp_path / "page").mkdir()
    report.write(tmp_path / "page", [tmp_path / "run"])
    page = (tmp_path / "page/report.html").read_text()
    assert page.count("right by depth and length") == page.count("logprob by depth and length") > 0


def test_errors_of_heads(tmp_path: Path) -> None:
    """The mean over samples at the longest length, layers across and heads down; of nothing that is exact, and of no task without them."""

    def one(attn: str, n: int, i: int, errors: list[list[float]]) -> dict[str, Any]:
        return row(attn, i, {"error": sum(map(sum, errors)) / 6}, 1000, task="attn", length=n, heads=errors)

    rows = [one("full", n, i, [[0.0] * 2] * 3) for n in (512, 1024) for i in (0, 1)]
    rows += [one("a", n, i, [[0.1 + i, 0.2], [0.3, 0.4], [0.5 + n, 0.6]]) for n in (512, 1024) for i in (0, 1)]
    parts, _ = report.join([folder(tmp_path / "run", rows)], None)
    text = plots.heads(parts[0], parts[0].cells, "errors")
    assert re.findall(r">(a: [^<]*)<", text) == ["a: 0.2 to 1e+03"]
    assert "1,024 tokens" in text
    assert ">full" not in text
    (image,) = re.findall(r'xlink:href="data:image/png;base64,([^"]*)"', text)
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB")).astype(int)
    assert "scale(1 -1)" in text  # rows of the image go upwards
    dark = pixels[::-1].sum(2) < 250  # one field of six: the last layer's first head
    assert 0.12 < dark.mean() < 0.22
    assert dark[: len(dark) // 4, -dark.shape[1] // 4 :].all()
    kl, _ = report.join([folder(tmp_path / "kl", methods())], None)
    assert plots.heads(kl[0], kl[0].cells, "errors") == ""


def test_numbers_of_a_heat_map_can_be_read() -> None:
    from matplotlib import colormaps

    for i in range(256):
        light = plots.luminance(colormaps["viridis"](i))
        ratio = (light + 0.05) / 0.05 if light > 0.179 else 1.05 / (light + 0.05)
        assert ratio >= 4.5


def test_colours_are_the_page_s(tmp_path: Path) -> None:
    parts, _ = report.join([folder(tmp_path / "run", several())], None)
    kl = [cell for cell in parts[0].cells if cell["task"] == "kl"]
    names = [f"method{i}" for i in range(9)] + plots.families(kl)
    text = plots.frontier(kl, names, "kl", 'a "title"')
    assert 'aria-label="a &quot;title&quot;"' in text
    assert re.findall(r"#[0-9a-f]{6}\b", text) == []
    assert {"var(--c9)", "var(--c0)", "var(--c1)"} <= set(re.findall(r"var\(--c\d\)", text))
    assert "currentColor" in text
    assert ">1,024 tokens<" in text  # as text
    assert text == plots.frontier(kl, names, "kl", 'a "title"')
    same = plots.frontier([cell | {"scores": {"kl": {"mean": 0.0, "low": 0.0, "high": 1.4e-17}}} for cell in kl], names, "kl", "all alike")
    assert ">1e" not in same
    assert len({tuple(plots.look(i).values()) for i in range(40)}) == 40


# The page


class Elements(HTMLParser):
    """Checks that tags are balanced, and collects ids, references and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)
        self.look(attributes)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.look(attributes)

    def look(self, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href"):
                self.links.append(value or "")
            self.links += [f"#{x}" for x in re.findall(r"url\(#([^)]*)\)", value or "")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_needs_nothing_else(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", [*several(), row("<b>&odd", 0, {"kl": 1.0}, 1)])
    report.write(run)
    text = (run / "report.html").read_text()
    page = Elements(text)
    assert len(set(page.ids)) == len(page.ids)
    assert all(link.startswith("data:") or link[1:] in page.ids for link in page.links)
    assert "<b>" not in text
    assert "&lt;b&gt;&amp;odd" in text
    assert text.count("<figure>") == text.count("<svg role=") == 12
    for title in ("kl against the cache's bytes", "kl against length", "right by depth and length", "bytes at the end against tokens"):
        assert title in unescape(text)
    assert "milliseconds a token against length, prefill" in text
    assert "<script" not in text
    assert text.count('tabindex="0" role="region"') == text.count("<table>") == 4  # some browsers let no other box be scrolled by keys
    first = text
    report.write(run)
    assert (run / "report.html").read_text() == first


def test_picture_stands_alone(tmp_path: Path) -> None:
    """It is well-formed, and says itself what its colours are, in light and dark."""
    report.write(folder(tmp_path / "run", several()))
    text = (tmp_path / "run" / "frontier-kl-prefill.svg").read_text()
    ElementTree.fromstring(text)
    assert "@media (prefers-color-scheme: dark)" in text
    used, known = set(re.findall(r"var\((--\w+)\)", text)), re.findall(r"(--\w+): #", text)
    assert {"--c1", "--ink", "--panel"} <= used
    assert all(known.count(name) == 2 for name in used)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = folder(tmp_path_factory.mktemp("report") / "run", [*several(), *methods()[:0]])
    report.write(run, baseline="a:budget=25%")
    return run / "report.html"


@pytest.fixture(params=["light", "dark"])
def opened(request: pytest.FixtureRequest, chromium: Any, page_file: Path) -> Iterator[Any]:
    with open_page(chromium, page_file, request.param) as page:
        yield page


LINES = """() => {
  const style = getComputedStyle(document.documentElement), light = name => {
    const hex = style.getPropertyValue(name).trim().replace(/^#(.)(.)(.)$/, "#$1$1$2$2$3$3");
    const [r, g, b] = [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16) / 255)
      .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const panel = light("--panel");
  return Array.from({ length: 10 }, (_, i) => light(`--c${i}`)).map(c => (Math.max(c, panel) + 0.05) / (Math.min(c, panel) + 0.05));
}"""


def test_readable_in_both_themes(opened: Any) -> None:
    opened.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true; })")
    assert opened.evaluate(CONTRAST) == []
    assert min(opened.evaluate(LINES)) >= 3  # what WCAG asks of lines
    widths = opened.evaluate("[...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect().width)")
    assert min(widths) > 300
    stroke = "getComputedStyle([...document.querySelectorAll('svg path')].find(e => /--c1/.test(e.getAttribute('style')))).stroke"
    assert opened.evaluate(stroke) in ("rgb(11, 98, 164)", "rgb(109, 179, 242)")


def until(page: Any, what: str) -> None:
    """Wait for it: scrolling is animated."""
    for _ in range(100):
        if page.evaluate(what):
            return
        page.wait_for_timeout(50)
    raise AssertionError(what)


def test_keyboard(opened: Any) -> None:
    """Links, what is folded, and wide tables, by Tab, Enter and arrows."""
    opened.set_viewport_size({"width": 500, "height": 900})
    press, reached = opened.keyboard.press, []
    for _ in range(40):
        press("Tab")
        what = opened.evaluate("document.activeElement.tagName + ' ' + (document.activeElement.getAttribute('role') ?? '')").strip()
        if what == "BODY":
            break
        reached.append(what)
        assert opened.evaluate(OUTLINE) == "solid 3px"
        if what == "SUMMARY":
            press("Enter")
            assert opened.evaluate("document.activeElement.parentElement.open") is True
        if what == "DIV region":
            press("ArrowRight")
            until(opened, "document.activeElement.scrollLeft > 0")
    tables = opened.locator("div.table").count()
    assert tables == 4
    assert [reached.count(x) for x in ("A", "SUMMARY", "DIV region")] == [2 + tables, 2, tables]
    opened.reload()  # nothing scrolls any more
    opened.locator("nav a").last.focus()
    until(opened, "document.activeElement.getBoundingClientRect().top >= 0")
    press("Enter")
    until(opened, "(({ top, bottom }) => bottom > 0 && top < innerHeight)(document.querySelector(':target').getBoundingClientRect())")


# The command


def run(*argv: str) -> int:
    return cli.run(report.main, list(argv))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = folder(tmp_path / "one", methods()), folder(tmp_path / "two", [r for r in several() if r["task"] == "needle"])
    out = tmp_path / "both"
    assert run(str(one), str(two), "--out", str(out), "--baseline", "a:budget=25%") == 0
    pictures = [f"frontier{x}.svg" for x in ("-kl-prefill", "-needle-prefill-unseen")]
    assert capsys.readouterr().out.split() == [str(out / name) for name in ("report.md", "report.html", *pictures, "summary.json")]
    assert json.loads((out / "summary.json").read_text())["baseline"] == "a:budget=25%"
    assert run(str(one)) == 0
    assert (one / "report.html").exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_without_matplotlib(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    one, found = folder(tmp_path / "one", methods()), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    assert run(str(one)) == 0
    assert (one / "report.md").exists()
    assert not (one / "report.html").exists()
    assert "report.html needs matplotlib" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["none"], "holds no run of zoo.eval"),
        (["run", "run"], "several runs: --out FOLDER"),
        (["damaged"], "config.json or summary.json is damaged"),
        (["empty"], "has no rows yet"),
        (["run", "--out", "empty"], "holds a run of its own"),
        (["run", "--out", "file/below"], "cannot write to"),
        (["half"], "damaged: not every line is a row"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "run", methods())
    folder(tmp_path / "empty", [])
    (folder(tmp_path / "damaged", methods()) / "config.json").write_text("[]")
    (folder(tmp_path / "half", methods()) / "records.jsonl").write_text('{"task": "kl"}\n')
    (tmp_path / "file").write_text("")
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_intervals_are_those_of_stats() -> None:
    """What stands in a table is what `zoo.eval.stats` says."""
    e = stats.estimate([0.1, 0.2, 0.4])
    assert report.interval(e) == f"{e['mean']:.3g} [{e['low']:.3g}, {e['high']:.3g}]"
    assert report.apart({"mean": 0.5, "low": 0.1, "high": 0.9, "distinct": True}) == "+0.5 [0.1, 0.9]"
    assert report.apart({"mean": -0.5, "low": -1.0, "high": 0.1, "distinct": False}) == "-0.5 [-1, 0.1] ≈"
    assert report.apart({"mean": -0.5, "low": None, "high": None, "distinct": None}) == "-0.5 ≈"
