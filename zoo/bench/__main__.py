"""python -m zoo.bench: how fast, and how near to what this machine can do.

    python -m zoo.bench                                            # decode behind 256 tokens, full and subgen
    python -m zoo.bench decode prefill --attn full --attn subgen:budget=1024 --contexts 256 1k 4k --peer scripts/peer_transformers.py
    python -m zoo.bench decode --random mistral-7b                 # a model that is only a config: weights are drawn in place
    python -m zoo.bench startup                                    # time to the first token, eager and compiled

What bounds a model. Prefill multiplies matrices by matrices: every weight that is read serves all the prompt's tokens, and the bound is
arithmetic, the FLOP/s of a large matrix product. Decode multiplies every weight with one vector (one for each sequence of a batch): it
waits for memory, and the bound is bytes: the weights once a step, and the keys and values of the cache once more. A longer context adds
bytes to decode; a method that keeps fewer slots takes them away; a batch shares the weights' bytes, not the cache's.

Each row says how many bytes (decode) or FLOPs (prefill) it cannot do without, and what share of this machine's own rate it reached, which
is measured in the same run. Runs are interleaved, so that a busy machine is busy for everyone; figures are medians over turns, with
quartiles. --json prints one JSON object a row, --out FOLDER writes rows.jsonl and plots.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from zoo import cli
from zoo.attention.backends import NAMES
from zoo.cli import count
from zoo.errors import ZooError

TASKS = ("decode", "prefill", "load", "startup")


def arguments(argv: list[str] | None) -> Any:
    from zoo.bench.random_model import CONFIGS

    p = cli.Parser(prog="python -m zoo.bench", description="How fast, and how near to what this machine can do.")
    p.add_argument("tasks", nargs="*", metavar="task", help=f"of {', '.join(TASKS)} (default: decode)")
    p.add_argument("--model", default="smollm2-135m")
    p.add_argument("--random", metavar="NAME", help=f"in place of --model, a model that is only a config: {', '.join(CONFIGS)}")
    p.add_argument("--layers", type=int, help="with --random: this many layers")
    p.add_argument("--attn", action="append", help="attention method; may be given several times (default: full and subgen)")
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    p.add_argument("--weights", action="append", choices=["model", "int8"], help="as they are, or int8; may be given twice")
    p.add_argument("--contexts", nargs="+", default=["256"], metavar="N", help="tokens before what is timed: 256 1k 8k")
    p.add_argument("--batch", nargs="+", type=int, default=[1], metavar="N")
    p.add_argument("--steps", type=int, default=64, help="decode steps a turn")
    p.add_argument("--repeats", type=int, default=5, help="turns")
    p.add_argument("--new-tokens", type=int, default=100, help="for startup")
    p.add_argument("--cold", action="store_true", help="startup: also with nothing cached, which takes most of a minute a turn")
    p.add_argument("--compile", default="on", choices=["on", "off"], help="of zoo's decode step")
    p.add_argument("--backend", default="auto", help=f"how attention is computed: {', '.join(NAMES)}")
    p.add_argument("--threads", type=int)
    p.add_argument("--peer", action="append", metavar="FILE[:NAME,NAME]", help="what to compare with, such as scripts/peer_transformers.py")
    p.add_argument("--out", type=Path, help="a folder for rows.jsonl and plots")
    p.add_argument("--json", action="store_true", help="one JSON object a row on standard output, and no table")
    args = p.parse_args(argv)
    args.tasks = args.tasks or ["decode"]
    if unknown := [t for t in args.tasks if t not in TASKS]:
        raise ZooError(f"unknown task {unknown[0]!r}; choose of {', '.join(TASKS)}")
    if min(args.steps, args.repeats, args.new_tokens, *args.batch, args.layers or 1) < 1:
        raise ZooError("--steps, --repeats, --new-tokens, --layers and --batch must be at least 1")
    args.contexts = [count(text) for text in args.contexts]
    args.attn, args.peer = args.attn or ["full", "subgen"], args.peer or []
    args.weights = [None if w == "model" else w for w in args.weights or ["model"]]
    if args.random and ({"load", "startup"} & set(args.tasks) or args.peer):
        raise ZooError("load, startup and --peer need files: use --model, not --random")
    if args.layers and not args.random:
        raise ZooError("--layers goes with --random")
    return args


def turns(cases: list[Any], repeats: int) -> None:
    """Each case once uncounted (it compiles, and touches every page), then all in turn."""
    from tqdm import tqdm

    with tqdm(total=len(cases) * (repeats + 1), leave=False, unit="run", file=sys.stderr) as bar:
        for turn in range(repeats + 1):
            for case in cases:
                seconds = case.run()
                bar.update()
                if turn:
                    case.seconds.append(seconds)


def row(case: Any, rates: dict[str, float], base: dict[str, Any]) -> dict[str, Any]:
    """What one case's turns say."""
    task, batch = base["task"], case.about.get("batch", 1)
    scale = 1e3 * batch / case.work if task == "decode" else 1.0  # milliseconds a step, or seconds a run
    times = [scale * s for s in case.seconds]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    out = base | {k: v for k, v in case.about.items() if k != "folder"} | {"turns": len(times)} | case.more()
    out |= {"ms_per_step" if task == "decode" else "seconds": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}
    if task == "decode":
        out["tokens_per_second"] = round(1e3 * batch / middle, 2)
        if case.bytes:
            out |= {"bytes_per_step": case.bytes, "share_of_bandwidth": round(case.bytes / (middle / 1e3) / rates["bandwidth"], 3)}
    elif task == "prefill":
        out["tokens_per_second"] = round(case.work / middle, 2)
        if case.flops:
            out |= {"flops": case.flops, "share_of_gemm": round(case.flops / middle / rates["gemm"], 3)}
    elif task == "load":
        out |= {"bytes": case.bytes, "gb_per_second": round(case.bytes / middle / 1e9, 2)}
    out["machine"] = {name: round(rate / 1e9, 1) for name, rate in rates.items()}
    out["peak_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # so far
    return out


def models(args: Any, weights: str | None) -> Any:
    import zoo
    from zoo.attention import parse
    from zoo.bench.random_model import random_model
    from zoo.lm import LM

    if args.random:
        model = random_model(args.random, getattr(torch, args.dtype), args.layers, weights)
        return LM(model, None, parse("full"), frozenset(), args.compile, args.backend)  # type: ignore[arg-type]
    return zoo.load(args.model, dtype=args.dtype, compile=args.compile, backend=args.backend, weights=weights)


def options(args: Any, weights: str | None) -> list[str]:
    """What `zoo.generate` is told of the model."""
    named = ["--model", args.model, "--dtype", args.dtype, "--threads", str(args.threads), "--backend", args.backend]
    return named if weights is None else [*named, "--weights", weights]


def cases_of(task: str, args: Any, lms: dict[str | None, Any], peers: dict[str, Any]) -> list[tuple[dict[str, Any], Any]]:
    """(who and weights, case) of a task. What is compared stands side by side: contexts outside, methods and peers inside."""
    from zoo.bench import ours
    from zoo.bench.peers import case

    if task == "load":
        return [({"who": "zoo", "weights": w}, ours.load(args.model, args.dtype, w, args.backend)) for w in args.weights]
    if task == "startup":
        return [
            ({"who": who, "weights": w}, c)
            for attn in args.attn
            for w in args.weights
            for who, c in ours.startups(attn, args.new_tokens, args.cold, options(args, w))
        ]
    cases: list[tuple[dict[str, Any], Any]] = []
    first = next(iter(lms.values()))
    most = first.config.max_position_embeddings
    if max(args.contexts) + args.steps > most:
        raise ZooError(f"--contexts {max(args.contexts)} and {args.steps} steps: this model's context holds {most} tokens")
    for batch in args.batch:
        for context in args.contexts:
            for attn in args.attn:
                for weights, lm in lms.items():
                    one = ours.prefill(lm, attn, context, batch)
                    if task == "decode":
                        one = ours.decode(lm, attn, context, batch, args.steps)
                    cases.append(({"who": "zoo", "weights": weights, "weight_bytes": ours.weight_bytes(lm.model)}, one))
            for name, peer in peers.items():
                if (theirs := case(peer, task, context, batch, args.steps, first)) is not None:
                    cases.append(({"who": name}, theirs))
    return cases


def main(argv: list[str] | None = None) -> None:
    """Raises ZooError for what the user can mend."""
    from zoo import hub
    from zoo.attention import parse
    from zoo.bench import machine, peers, report

    args = arguments(argv)
    cli.set_threads(args.threads)
    args.threads, dtype = torch.get_num_threads(), getattr(torch, args.dtype)
    before = machine.rates(dtype)
    timed = {"decode", "prefill"} & set(args.tasks)
    lms = {w: models(args, w) for w in args.weights} if timed else {}
    if lms:
        cli.tell([parse(attn) for attn in args.attn], next(iter(lms.values())).config)
    longest = max(args.contexts) + args.steps + 8
    others = [peers.load(what, hub.find(args.model), dtype, args.threads, longest) for what in args.peer] if timed else []
    named = {name: peer for some in others for name, peer in some.items()}
    rows: list[dict[str, Any]] = []
    for task in args.tasks:
        pairs = cases_of(task, args, lms, named)
        turns([case for _, case in pairs], args.repeats)
        rates = {name: (rate + before[name]) / 2 for name, rate in machine.rates(dtype).items()}  # before and after: a busy machine changes
        base = {"task": task, "model": args.random or args.model, "dtype": args.dtype, "threads": args.threads}
        base |= {"torch": torch.__version__, "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        base |= {"capability": torch.backends.cpu.get_cpu_capability(), "compile": args.compile}
        rows += [row(case, rates, base | {k: v for k, v in who.items() if v is not None}) for who, case in pairs]
        if args.out:
            report.compare(rows, next(iter(named), ""))
            report.write(rows, args.out)
    report.compare(rows, next(iter(named), ""))
    if args.json:
        for r in rows:
            print(json.dumps(r))
    else:
        print(report.table(rows))


if __name__ == "__main__":
    sys.exit(cli.run(main))
