"""python -m zoo.eval: what does this cache cost in quality, bytes and time?

    python -m zoo.eval --tasks kl,lines,niah --attn full "sliding:window=1024" "subgen:budget=25%" --lengths 1k,2k --out results/first
    python -m zoo.eval report FOLDER...      # join runs into one report
    python -m zoo.eval show --attn subgen --file text.txt

A run writes a folder: config.json, records.jsonl (a row for each sample), timings.jsonl, summary.json and a report. The same command
continues it after an interruption. docs/evaluation.md says what the tasks ask, and what the numbers mean.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from zoo import cli
from zoo.errors import ZooError


def arguments(argv: list[str] | None) -> Any:
    p = cli.Parser(
        prog="python -m zoo.eval",
        description="What does a cache cost in quality, bytes and time? (Also: python -m zoo.eval report FOLDER..., and show.)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    cli.loading(p)
    p.set_defaults(compile="off")  # `auto` depends on what was compiled before: two runs would not be alike to the last bit
    p.add_argument("--tasks", default="kl", metavar="A,B", help="of kl, ppl, attn, passkey, lines, niah, needle, vt, cwe, fwe")
    p.add_argument("--attn", nargs="+", action="extend", metavar="METHOD", help="full sliding:window=25%% subgen:budget=25%%")
    p.add_argument("--lengths", default="1k,2k", metavar="N,N", help="tokens of the prompt, at most: 512,2k,7.5k")
    p.add_argument("--protocols", default="prefill", metavar="A,B", help="prefill: compressed at its end; stream: never over budget")
    p.add_argument("--question", default="unseen", metavar="A,B", help="unseen or seen: whether a cache knows it while it compresses")
    p.add_argument("--samples", type=int, default=8, help="prompts of each task, variant and length")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--text", type=Path, metavar="FILE", help="a long text; without it, the reference that comes with Python")
    p.add_argument("--data", type=Path, metavar="FILE.jsonl", help="your own questions, a line each: context, input, answers")
    p.add_argument("--niah", default="single,multikey,multivalue,multiquery", metavar="A,B", help="variants of the task niah")
    p.add_argument(
        "--depths",
        metavar="A,B",
        help="where a needle stands (passkey, lines, needle, niah's single), in %% of the context; anywhere unless given",
    )
    p.add_argument("--baseline", metavar="METHOD", help="one of --attn: report differences to it, too")
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where results go; an interrupted run is continued")
    p.add_argument("--json", action="store_true", help="print the cells of summary.json as one last line, in place of a line each")
    args = p.parse_args(argv)
    args.attn = args.attn or ["full", "subgen"]
    args.tasks, args.protocols, args.question = (split(getattr(args, name), name) for name in ("tasks", "protocols", "question"))
    args.niah, args.lengths = split(args.niah, "niah"), [cli.count(text) for text in split(args.lengths, "lengths")]
    args.depths = [depth(text) for text in split(args.depths, "depths")] if args.depths else []
    for name in ("lengths", "depths"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):  # 1k is 1024
            raise ZooError(f"--{name}: write each once; two of these are the same number")
    if args.data and "data" not in args.tasks:
        args.tasks = [*([] if args.tasks == [p.get_default("tasks")] else args.tasks), "data"]
    validate(args)
    return args


def split(text: str, name: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts) or len(set(parts)) < len(parts):
        raise ZooError(f"--{name} {text!r}: write each once, with commas between them")
    return parts


def depth(text: str) -> float:
    try:
        number = float(text) / 100
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise ZooError(f"--depths {text!r} is no share of the context; write 0 to 100, in percent")
    return number


def validate(args: Any) -> None:
    """Raises ZooError for what is wrong whatever the model."""
    from zoo.eval.protocols import PROTOCOLS, method_of
    from zoo.eval.tasks import TASKS

    choices: list[tuple[str, list[str], Collection[str]]] = [
        ("tasks", args.tasks, TASKS),
        ("protocols", args.protocols, PROTOCOLS),
        ("question", args.question, ("unseen", "seen")),
    ]
    for name, given, known in choices:
        if unknown := [x for x in given if x not in known]:
            raise ZooError(f"--{name} {unknown[0]!r} is unknown; choose of {', '.join(known)}")
    if args.samples < 1:
        raise ZooError(f"--samples {args.samples} must be at least 1")
    if len(set(args.attn)) < len(args.attn):
        raise ZooError("--attn: a method is given twice")
    placed = {"passkey", "lines", "needle"} | ({"niah"} if "single" in args.niah else set())
    if args.depths and not placed & set(args.tasks):
        raise ZooError("--depths is for the tasks passkey, lines and needle, and niah's variant single; add one of them, or leave it out")
    if "data" in args.tasks and not args.data:
        raise ZooError("--tasks data needs --data FILE.jsonl")
    for attn in args.attn:
        for protocol in args.protocols:
            method_of(attn, protocol, min(args.lengths))
    if args.baseline is not None and args.baseline not in args.attn:
        raise ZooError(f"--baseline {args.baseline}: not one of --attn {' '.join(args.attn)}")


def reference() -> str:
    """A long text that every Python has: its own language reference, which is prose with examples."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


def material(args: Any, tokenizer: Any) -> Any:
    """Reads --text and --data."""
    from zoo.eval.tasks import Material
    from zoo.eval.tasks.data import parse
    from zoo.generate import read

    text = read(str(args.text)) if args.text else reference()
    if not text.strip():
        raise ZooError(f"--text {args.text} is empty")
    data = parse(read(str(args.data)), str(args.data)) if args.data else ()
    return Material(tokenizer, text, args.seed, bool(args.text), tuple(args.depths), {"niah": tuple(args.niah)}, data)


def config(args: Any, argv: list[str], lm: Any, files: dict[str, str]) -> dict[str, Any]:
    import torch

    import zoo

    given = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    given |= {f"{name}_sha256": hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
    versions: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"zoo": version("subgen-zoo"), "wonderwords": version("wonderwords")}
    machine = {
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    return {
        "command": "python -m zoo.eval " + shlex.join(argv),
        "arguments": given,
        "model": {"dtype": str(lm.dtype).removeprefix("torch."), "backend": lm.backend, **dataclasses.asdict(lm.config)},
        "versions": versions,
        "commit": commit(Path(zoo.__file__).parent),
        "sources": sources(),
        "seed": args.seed,
        "machine": machine,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def sources() -> str:
    """A hash of the code that runs: two changes to one commit, or to none, are two codes."""
    import zoo
    from zoo.kernels import cpu

    found = hashlib.sha256()
    for folder in (Path(zoo.__file__).parent, Path(cpu.__file__).parent):
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".cpp", ".h")):
            found.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def commit(folder: Path) -> str | None:
    """Of the checkout that runs, with `+` where files have been changed; None where there is none."""
    try:
        git = ["git", "-C", str(folder)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + "+" * bool(changed.stdout.strip()) if head.returncode == 0 else None


class Progress:
    """A bar on standard error: what is run, how much is done, how long is left."""

    def __init__(self) -> None:
        self.bar: Any = None

    def __call__(self, done: float, total: float, what: str) -> None:
        from tqdm import tqdm

        if self.bar is None:
            form = "{desc}: {percentage:3.0f}%|{bar:20}| {elapsed}, {remaining} left"
            self.bar = tqdm(total=total, bar_format=form, smoothing=0, delay=1, leave=False, file=sys.stderr)
        self.bar.set_description_str(what, refresh=False)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def main(argv: list[str] | None = None) -> None:
    """Raises ZooError for what the user can mend."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["report"], ["show"]):
        importlib.import_module(f"zoo.eval.{argv[0]}").main(argv[1:])
        return
    import torch

    from zoo.eval import run
    from zoo.eval.protocols import method_of
    from zoo.eval.records import Records
    from zoo.eval.tasks import TASKS

    args = arguments(argv)
    lm = cli.load(argparse.Namespace(**{**vars(args), "attn": "full"}))
    args.threads = torch.get_num_threads()  # another number rounds otherwise: such a run is not continued
    cli.tell([method_of(attn, protocol, min(args.lengths)) for attn in args.attn for protocol in args.protocols], lm.config)
    given = material(args, lm.tokenizer)
    tasks = {name if name != "data" else f"data:{args.data.stem}": TASKS[name]() for name in args.tasks}
    plan = run.Plan(tasks, args.attn, args.protocols, args.question, args.lengths, args.samples, args.seed)
    run.check(lm, plan, given)
    records = Records(args.out, config(args, argv, lm, {"text": given.text, "data": json.dumps(given.data)}))
    progress = Progress()
    try:
        run.run(lm, plan, given, records, progress)
    except BaseException as e:
        progress.close()
        if isinstance(e, KeyboardInterrupt):
            print(f"{len(records.rows)} rows are kept in {args.out}; the same command goes on from there", file=sys.stderr)
        try:
            finish(args.out, records.rows, args.baseline)
        except Exception as second:  # which must not hide why the run ended
            print(f"no report of them could be made: {second}", file=sys.stderr)
        raise
    else:
        finish(args.out, records.rows, args.baseline, args.json)
    finally:
        progress.close()
        records.close()


def finish(folder: Path, rows: Sequence[dict[str, Any]], baseline: str | None, as_json: bool = False) -> None:
    """summary.json, the report where it can be made, and the means on standard output."""
    from zoo.eval import records, stats

    if not rows:
        return
    cells = stats.summary(rows, baseline)
    records.write(folder / "summary.json", {"baseline": baseline, "cells": cells})
    try:
        report = importlib.import_module("zoo.eval.report")
    except ModuleNotFoundError:
        report = None
    if report is not None:
        report.write(folder)
    if as_json:
        print(json.dumps({"out": str(folder), "cells": cells}))
        return
    for cell in cells:
        where = " ".join(str(cell[name]) for name in ("task", "group", "protocol", "question", "length") if cell[name])
        means = ", ".join(f"{name} {score['mean']:.4g}" for name, score in cell["scores"].items())
        share = "peak_share" if cell["protocol"] == "stream" else "share"
        print(f"{where}  {cell['attn']:28} {means}, {cell['bytes'][share]:.1%} of the bytes, n = {cell['n']}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
