"""What a method costs in time, against `full` in the same run, turn by turn: reading a prompt, compressing it, and a decode step.

    python scripts/measure_cost.py --text FILE --tokens 4096 --rounds 3
    python scripts/measure_cost.py --text FILE --tokens 2048 --compile on --rounds 1

Medians. `read`: the prompt's tokens through the model, seconds. `end`: compressing at its end, seconds, and its share of the first
method's read. `step`: milliseconds a decoded token of the text, absorbing included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from measure_quality import read

import zoo
from zoo.attention import parse


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="smollm2-135m")
    p.add_argument("--text", required=True)
    p.add_argument("--tokens", type=int, default=4096)
    p.add_argument("--steps", type=int, default=64, help="decode steps a turn; a multiple of 64 holds as many blocks")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--attn", nargs="+", default=["full", "subgen", "subgen:scores=expected"])
    p.add_argument("--compile", choices=["on", "off"], default="off")
    p.add_argument("--threads", type=int, default=2)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    lm = zoo.load(args.model, dtype="bfloat16", compile=args.compile)
    turns = 3
    ids = lm.tokenizer.encode(Path(args.text).read_text())[: args.tokens + turns * args.steps + 1]
    ids, after = ids[: args.tokens], ids[args.tokens :]
    if len(after) <= turns * args.steps:
        p.error(f"the text has fewer than {args.tokens} tokens and {turns} times {args.steps} more")
    times: dict[str, dict[str, list[float]]] = {attn: {"read": [], "end": [], "step": []} for attn in args.attn}
    caches: dict[str, Any] = {}
    for _ in range(args.rounds):
        for attn in args.attn:
            lm.attn = parse(attn)
            caches[attn] = lm.new_cache(max_tokens=len(ids) + 4 * args.steps)
            start = time.perf_counter()
            read(lm, caches[attn], ids)
            middle = time.perf_counter()
            caches[attn].end_prompt()
            times[attn]["read"].append(middle - start)
            times[attn]["end"].append(time.perf_counter() - middle)
            lm.decode_step(after[:1], caches[attn])  # compiles
        for turn in range(turns):
            for attn in args.attn:
                start = time.perf_counter()
                for t in range(args.steps):
                    i = 1 + turn * args.steps + t
                    lm.decode_step(after[i : i + 1], caches[attn])
                times[attn]["step"].append((time.perf_counter() - start) / args.steps * 1e3)
    base = {name: statistics.median(values) for name, values in times[args.attn[0]].items()}
    for attn, t in times.items():
        row = {name: statistics.median(values) for name, values in t.items()}
        print(
            f"{attn:26} read {row['read']:6.2f} s ({row['read'] / base['read']:.2f})  end {row['end']:6.3f} s "
            f"({row['end'] / base['read']:.1%} of the first read)  step {row['step']:6.2f} ms ({row['step'] / base['step']:.2f})"
        )
        print(json.dumps({"attn": attn, "tokens": len(ids), "compile": args.compile, "threads": args.threads, **row}))


if __name__ == "__main__":
    main()
