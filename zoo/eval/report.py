"""python -m zoo.eval report FOLDER...: what runs found, joined: report.md, and report.html with the plots.

Rows of several folders are joined where they asked the same model the same prompts; other runs get a part of their own. A table is of one
task, protocol, question and length; its rows are methods, paired by sample.

    ranks   each row's among those whose bytes differ by at most 3 % from its own: those at the end, with `stream` those at the peak. A row
            that has nothing to be compared with gets none, and the reason; so does one that is another's twin in every number
    ≈       not distinguishable: the 95 % bootstrap interval of the paired difference contains 0 (zoo/eval/stats.py). Intervals are of one
            comparison each: of twenty true ties, about one is called distinct, and more where scores are skewed
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo import cli
from zoo.errors import ZooError
from zoo.eval import records, stats
from zoo.eval.metrics import BETTER

EQUAL = 0.03  # bytes that differ by so much still are the same
SAME = "≈"
PLACE = ("task", "group", "protocol", "question", "length")  # of a cell, its method aside
ASKED = ("model", "dtype", "weights", "seed", "text_sha256", "data_sha256")  # what runs that are joined have in common
Cell = dict[str, Any]


@dataclass
class Part:
    """Runs that asked one model the same prompts."""

    configs: list[dict[str, Any]] = field(default_factory=list)
    rows: dict[tuple[Any, ...], dict[str, Any]] = field(default_factory=dict)  # by `records.key_of`
    rates: dict[tuple[Any, ...], dict[str, Any]] = field(default_factory=dict)
    twice: int = 0  # rows that an earlier folder had
    cells: list[Cell] = field(default_factory=list)
    by_cell: dict[tuple[Any, ...], list[dict[str, Any]]] = field(default_factory=dict)

    def name(self) -> str:
        a = self.configs[0]["arguments"]
        return f"{Path(str(a['model'])).name}, {', '.join(str(a[x]) for x in ('dtype', 'weights') if a.get(x)) or 'as in the file'}"

    def of(self, cell: Cell) -> list[dict[str, Any]]:
        return self.by_cell[tuple(cell[name] for name in stats.CELL)]


@dataclass(frozen=True)
class Table:
    caption: str
    head: list[str]
    body: list[list[str]]


# Reading and joining


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]], str | None]:
    """config, rows, timings and the baseline of a run. Raises ZooError where there is none."""
    try:
        config = json.loads((folder / "config.json").read_text())
        rows, timings = (records.rows_of(folder / name) for name in ("records.jsonl", "timings.jsonl"))
        summary = folder / "summary.json"
        baseline = json.loads(summary.read_text()).get("baseline") if summary.exists() else None
        config["arguments"]["model"]
    except OSError as e:
        raise ZooError(f"{folder} holds no run of zoo.eval: {e.strerror}: {e.filename}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ZooError(f"{folder}: config.json or summary.json is damaged") from None
    if not rows:
        raise ZooError(f"{folder} has no rows yet")
    return config, rows, timings, baseline


def join(folders: Sequence[Path], baseline: str | None) -> tuple[list[Part], str | None]:
    """The runs in `folders`, each part with its cells; the first folder's baseline unless one is given. Raises ZooError where rows of one
    name were asked different prompts."""
    parts: dict[tuple[Any, ...], Part] = {}
    prompts: dict[Any, str] = {}
    for folder in folders:
        config, rows, timings, theirs = read(folder)
        baseline = baseline or theirs
        asked = tuple(config["arguments"].get(name) for name in ASKED)
        part = parts.setdefault(asked, Part())
        part.configs.append(config)
        rates = {records.key_of(row): row["rate"] for row in timings}
        for row in rows:
            key = records.key_of(row)
            if prompts.setdefault((asked, stats.prompt_of(row)), row["prompt"]) != row["prompt"]:
                raise ZooError(f"{folder}: {row['task']} {row['length']} asked other prompts than an earlier folder; report them apart")
            part.twice += key in part.rows
            if key not in part.rows:
                part.rows[key] = row
                part.rates[key] = rates.get(key, {})
    for part in parts.values():
        for row in part.rows.values():
            part.by_cell.setdefault(stats.cell_of(row), []).append(row)
        part.cells = stats.summary(list(part.rows.values()), baseline)
        for cell in part.cells:
            cell["rate"] = {name: rate(part, cell, name) for name in ("prefill", "decode")}
        rank(part)
    return list(parts.values()), baseline


def rate(part: Part, cell: Cell, name: str) -> float | None:
    """Tokens per second, the median over samples."""
    found = [r for row in part.of(cell) if (r := part.rates[records.key_of(row)].get(name))]
    return stats.rounded(statistics.median(found)) if found else None


# Ranks


def counted(cell: Cell) -> int:
    """The bytes that rows are compared by."""
    return cell["bytes"]["peak" if cell["protocol"] == "stream" else "final"]


def main_score(cell: Cell) -> str | None:
    """What rows are ranked by: the first score of the task that has a better side."""
    return next((name for name in cell["scores"] if name in BETTER), None)


def equal_bytes(cell: Cell, cells: Sequence[Cell]) -> list[Cell]:
    """Those whose bytes and this one's differ by at most 3 %, itself included."""
    low, high = counted(cell) / (1 + EQUAL), counted(cell) * (1 + EQUAL)
    return [other for other in cells if low <= counted(other) <= high]


def twins(part: Part, cells: Sequence[Cell]) -> dict[str, str]:
    """Methods -> an earlier one with the same bytes and the same scores on each sample: the same cache by another name."""
    found: dict[str, str] = {}
    first: dict[str, str] = {}
    for cell in cells:
        seen = str(sorted(str((stats.prompt_of(row), row["bytes"], row["scores"])) for row in part.of(cell)))
        if first.setdefault(seen, cell["attn"]) != cell["attn"]:
            found[cell["attn"]] = first[seen]
    return found


def places(cells: Sequence[Cell]) -> dict[tuple[Any, ...], list[Cell]]:
    """The cells of each table."""
    found: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        found.setdefault(tuple(cell[name] for name in PLACE), []).append(cell)
    return found


def rank(part: Part) -> None:
    """Each cell's `rank` among those of equal bytes: place and of (how many), tied (not distinguishable from the best of them), or the
    reason why there is none."""
    for cells in places(part.cells).values():
        same = twins(part, cells)
        others = [cell for cell in cells if cell["attn"] not in same]
        for cell in cells:
            group = equal_bytes(cell, others)
            if cell["attn"] in same:
                cell["rank"] = {"reason": f"the same cache as {same[cell['attn']]}"}
            elif len(group) == 1:
                far = sorted((c for c in others if c is not cell), key=lambda c: abs(counted(c) - counted(cell)))
                cell["rank"] = {"reason": "alone" + (nearest(cell, far[0]) if far else "")}
            elif len({main_score(c) for c in group}) > 1 or not main_score(cell):
                cell["rank"] = {"reason": "no score in common"}
            elif len(counts := {c["scores"][main_score(c)]["n"] for c in group}) > 1:
                cell["rank"] = {"reason": f"samples with a finite score differ: {', '.join(map(str, sorted(counts)))}"}
            else:
                cell["rank"] = standing_in(part, cell, group)


def nearest(cell: Cell, other: Cell) -> str:
    return f": nearest bytes {100 * (counted(other) / max(counted(cell), 1) - 1):+.1f}\u00a0%, {other['attn']}"


def standing_in(part: Part, cell: Cell, group: list[Cell]) -> dict[str, Any]:
    score = main_score(cell)
    assert score is not None
    means = sorted((c["scores"][score]["mean"] for c in group), reverse=BETTER[score] == "higher")
    place = 1 + means.index(cell["scores"][score]["mean"])
    best = next(c for c in group if c["scores"][score]["mean"] == means[0])
    apart = None
    if cell is not best:
        apart = stats.difference(part.of(cell), {stats.prompt_of(row): row for row in part.of(best)}, score)
    return {"by": score, "place": place, "of": len(group), "tied": apart is not None and apart["distinct"] is not True}


# The report as blocks: headings, paragraphs, tables and plots, which become Markdown and HTML


def spelled(x: float | None) -> str:
    return "-" if x is None else f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}"


def interval(e: dict[str, Any], sign: bool = False) -> str:
    mean = ("+" if sign and e["mean"] >= 0 else "") + spelled(e["mean"])
    return mean if e["low"] is None else f"{mean} [{spelled(e['low'])}, {spelled(e['high'])}]"


def apart(e: dict[str, Any] | None) -> str:
    """A paired difference, marked where it is not distinguishable."""
    return "" if e is None else interval(e, sign=True) + ("" if e["distinct"] else f" {SAME}")


def standing(cell: Cell) -> str:
    r = cell["rank"]
    return r["reason"] if "reason" in r else f"{r['place']} of {r['of']}" + f" {SAME}" * r["tied"]


def place_name(place: Sequence[Any]) -> str:
    task, group, protocol, question, length = place
    asked = f", question {question}" if question else ""
    return f"{task}{f' {group}' if group else ''}, {protocol}{asked}, {length:,} tokens"


def table(place: Sequence[Any], cells: Sequence[Cell], baseline: str | None) -> Table:
    scores = list(dict.fromkeys(name for cell in cells for name in cell["scores"]))
    get = lambda cell, score: cell["scores"].get(score) or {}  # noqa: E731
    more: list[tuple[str, str, str]] = []  # (score, field, heading)
    for score in scores:
        for name, who in (("to_full", "full"), ("to_baseline", baseline)):
            found = [(get(cell, score).get("mean"), e["mean"]) for cell in cells if (e := get(cell, score).get(name))]
            if any(a != b for a, b in found):  # else full scores 0, and the difference is the score itself
                more.append((score, name, f"{score} - {who}'s"))
    known = any("allocated" in cell["bytes"] for cell in cells)
    head = ["method", "bytes at the end", *(["allocated"] if known else []), "at the peak", "a token", "of full", "rank"]
    for score in scores:
        arrow = {"higher": " (more is better)", "lower": " (less is better)"}.get(BETTER.get(score, ""), "")
        head += [score + arrow] + [title for s, _, title in more if s == score]
    timed = [name for name in ("prefill", "decode") if any(cell["rate"][name] for cell in cells)]
    head += ["n", *(f"{name} tokens/s" for name in timed)]
    body = []
    for cell in sorted(cells, key=lambda c: (-counted(c), c["attn"])):
        size = cell["bytes"]
        share = size["peak_share" if cell["protocol"] == "stream" else "share"]
        line = [f"`{cell['attn']}`", cli.mib(size["final"])]
        line += [cli.mib(size["allocated"]) if "allocated" in size else "-"] if known else []
        line += [cli.mib(size["peak"]), f"{size['per_token']:,.0f}"]
        line += [f"{100 * share:.1f} %", standing(cell)]
        for score in scores:
            e = cell["scores"].get(score)
            line += ["" if e is None else interval(e)] + [apart(get(cell, score).get(name)) for s, name, _ in more if s == score]
        body.append([*line, str(cell["n"]), *(spelled(cell["rate"][name]) for name in timed)])
    return Table(place_name(place), head, body)


LEGEND = (
    "Means over samples with 95 % bootstrap intervals; differences are paired by sample. "
    f"`{SAME}`: not distinguishable, the interval of the paired difference contains 0, or there are too few samples for one; of a rank: "
    "from the best row of equal bytes. Bytes are those of rows and tables that hold something; `allocated`: of the storages as they are. "
    "What counts are those at the end, under `stream` those at the peak: `of full` is their share of the full cache's, and a row's rank is "
    "among those whose bytes differ from its own by at most 3 %. Intervals are of one comparison each: of twenty true ties, about one is "
    "called distinct, and more where scores are skewed or there are fewer than five samples."
)


def about(part: Part) -> list[str]:
    """Where the numbers come from."""
    lines = []
    for c in part.configs:
        m, v = c.get("machine") or {}, c.get("versions") or {}
        versions = ", ".join(f"{name} {number}" for name, number in v.items() if number)
        where = f"{m.get('cpu') or 'unknown CPU'}, {m.get('threads')} of {m.get('cores')} cores"
        lines.append(
            f"`{c.get('command')}` ({versions}, commit {str(c.get('commit'))[:12]}; {where}; seed {c.get('seed')}, {c.get('started')})"
        )
    return lines


def markdown(parts: Sequence[Part], baseline: str | None) -> str:
    lines = ["# What the caches cost", "", LEGEND, ""]
    for part in parts:
        lines += [f"## {part.name()}", "", *(f"- {line}" for line in about(part)), ""]
        if part.twice:
            lines += [f"{part.twice} rows stood in several folders; the first folder's count.", ""]
        for place, cells in places(part.cells).items():
            t = table(place, cells, baseline)
            lines += [f"### {t.caption}", "", row_of(t.head), row_of(["---"] * len(t.head)), *map(row_of, t.body), ""]
    return "\n".join(lines)


def row_of(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


# Writing


def write(folder: Path, folders: Sequence[Path] | None = None, baseline: str | None = None) -> list[Path]:
    """report.md and, where matplotlib is installed, report.html and its main plots as frontier-*.svg, of the runs in `folders` (the folder
    itself unless given) into `folder`; summary.json, too, where that is none of a run. Returns what was written. Raises ZooError."""
    parts, baseline = join([folder] if folders is None else folders, baseline)
    made: dict[str, str] = {"report.md": markdown(parts, baseline)}
    if importlib.util.find_spec("matplotlib") is not None:
        from zoo.eval import html

        made["report.html"], pictures = html.page(parts, baseline)
        made |= pictures
    if not (folder / "config.json").exists():  # a run writes its own, in which nothing is of this machine's speed
        cells = [{"part": part.name(), **{k: v for k, v in cell.items() if k != "rate"}} for part in parts for cell in part.cells]
        made["summary.json"] = json.dumps({"baseline": baseline, "cells": cells}, indent=1, ensure_ascii=False) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in made.items():
            records.replace(folder / name, text.encode())
    except OSError as e:
        raise ZooError(f"cannot write to {folder}: {e.strerror}") from None
    return [folder / name for name in made]


def main(argv: list[str] | None = None) -> None:
    """Raises ZooError for what the user can mend."""
    p = cli.Parser(prog="python -m zoo.eval report", description="Join runs into one report: report.md and report.html.")
    p.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="what --out of a run named")
    p.add_argument("--out", type=Path, metavar="FOLDER", help="where the report goes; of one run, into its folder unless given")
    p.add_argument("--baseline", metavar="METHOD", help="report differences to it; the first run's own unless given")
    args: argparse.Namespace = p.parse_args(argv)
    if args.out is None and len(args.folders) > 1:
        raise ZooError("several runs: --out FOLDER says where their report goes")
    out = args.out or args.folders[0]
    if args.out is not None and (args.out / "config.json").exists() and [f.resolve() for f in args.folders] != [args.out.resolve()]:
        raise ZooError(f"--out {args.out} holds a run of its own; choose another folder")
    for path in write(out, args.folders, args.baseline):
        print(path)
    if importlib.util.find_spec("matplotlib") is None:
        print("report.html needs matplotlib: pip install matplotlib")
