"""Rows as a table, as lines of JSON, and as plots."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from zoo.errors import ZooError

Rows = list[dict[str, Any]]


def alike(r: dict[str, Any]) -> tuple[Any, ...]:
    """What rows that may be compared have in common."""
    return tuple(r.get(name) for name in ("task", "model", "dtype", "context", "batch", "threads"))


def compare(rows: Rows, base: str) -> None:
    """`speedup`: tokens per second over those of the row called `base` at the same task, model, dtype, context and batch."""
    found = {alike(r): r for r in rows if r["who"] == base}
    for r in rows:
        if (other := found.get(alike(r))) and "tokens_per_second" in r:
            r["speedup"] = round(r["tokens_per_second"] / other["tokens_per_second"], 2)


def name_of(r: dict[str, Any]) -> str:
    return " ".join(str(r[x]) for x in ("who", "attn", "weights") if r.get(x))


def table(rows: Rows) -> str:
    """For people; times are medians over turns, with quartiles."""
    lines: list[str] = []
    for task in dict.fromkeys(r["task"] for r in rows):
        some = [r for r in rows if r["task"] == task]
        first, unit = some[0], {"decode": "ms/step"}.get(task, "seconds")
        m = first["machine"]
        rates = f"reads {m['bandwidth']:.1f} GB/s (matrix times vector {m['matvec']:.1f}), multiplies {m['gemm']:.0f} GFLOP/s"
        lines += ["", f"{task}: {first['model']}, {first['threads']} threads, torch {first['torch']}; this machine {rates}"]
        bound = {"decode": "of bytes", "prefill": "of GEMM"}.get(task, "")
        lines.append(f"{'':44}{'dtype':>9}{'context':>8}{'batch':>6}{unit:>10}{'quartiles':>18}{'tokens/s':>10}{bound:>9}{'speedup':>8}")
        for r in some:
            middle = r.get("ms_per_step", r.get("seconds"))
            share = r.get("share_of_bandwidth", r.get("share_of_gemm"))
            more = f"  first token {r['first_token_seconds']} s" if "first_token_seconds" in r else ""
            more += f"  {r['gb_per_second']} GB/s" if "gb_per_second" in r else ""
            lines.append(
                f"{name_of(r):44}{r['dtype']:>9}{r.get('context', ''):>8}{r.get('batch', ''):>6}{middle:>10.2f}"
                f"{'{:.2f} - {:.2f}'.format(*r['quartiles']):>18}{r.get('tokens_per_second', ''):>10}"
                f"{'' if share is None else f'{share:.0%}':>9}{r.get('speedup', ''):>8}{more}"
            )
    return "\n".join(lines[1:])


def write(rows: Rows, folder: Path) -> None:
    """rows.jsonl and, where matplotlib is installed, decode.png: milliseconds a step and megabytes of cache against the context. Raises
    ZooError when the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    except OSError as e:
        raise ZooError(f"cannot write to {folder}: {e.strerror}") from e
    some = [r for r in rows if r["task"] == "decode"]
    some = [r for r in some if r["batch"] == min(x["batch"] for x in some)]
    if not some:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"wrote {folder}/rows.jsonl; plots need matplotlib: pip install matplotlib", file=sys.stderr)
        return
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for who in dict.fromkeys(f"{name_of(r)} {r['dtype']}" for r in some):
        line = [r for r in some if f"{name_of(r)} {r['dtype']}" == who]
        contexts = [r["context"] for r in line]
        left.plot(contexts, [r["ms_per_step"] for r in line], "o-", label=who)
        if all("cache_bytes" in r for r in line):
            right.plot(contexts, [r["cache_bytes"] / 1e6 for r in line], "o-", label=who)
    for axes, title in ((left, "ms a decode step"), (right, "MB of cache")):
        axes.set(xscale="log", xlabel="tokens of context", title=title)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)
    figure.savefig(folder / "decode.png", dpi=120)
