"""python -m zoo.bench: milliseconds per generated token, with --peer against another program on the same weights.

Runs are interleaved, so that a busy machine is busy for everyone; medians and quartiles are over whole generations. What bounds the two
phases: prefill multiplies matrices by matrices and is bound by arithmetic; decode multiplies each weight with one vector, so it is bound by
reading the weights once a token, and the keys and values of the cache once more. `GB/s` counts the weights alone: at short contexts they
are nearly all. The last line is one JSON object.
"""

from __future__ import annotations

import json
import runpy
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

from zoo import cli
from zoo.errors import ZooError

TEXT = "It is a truth universally acknowledged, that a long context must be in want of a small cache. "


def ours(lm: Any, ids: list[int], new: int) -> Callable[[], tuple[list[int], float, float]]:
    """A run: -> token ids, seconds to the first token, seconds for the rest."""
    from zoo.sampling import Sampler

    lm.end_ids = frozenset()  # both sides generate the same number of tokens

    def run() -> tuple[list[int], float, float]:
        tokens = [token for (token,) in lm.tokens([ids], new, Sampler())]
        return tokens, lm.stats.first_token_seconds, lm.stats.decode_seconds - (lm.stats.first_token_seconds - lm.stats.prefill_seconds)

    return run


def theirs(
    path: str, folder: Any, dtype: torch.dtype, ids: list[int], new: int
) -> tuple[str, Callable[[], tuple[list[int], float, float]]]:
    """Another program's name and run, from a Python file that has `NAME` and `runner`. Raises ZooError where it has not."""
    try:
        peer = runpy.run_path(path)
        return peer["NAME"], peer["runner"](folder, dtype, ids, new)
    except (OSError, SyntaxError, ImportError, KeyError) as e:
        raise ZooError(
            f"--peer {path} cannot be used: {e}; it must be a Python file with NAME and runner, and what it imports installed"
        ) from e


def main(argv: list[str] | None = None) -> None:
    p = cli.Parser(prog="python -m zoo.bench", description="Decode speed, with --peer against another program on the same weights.")
    p.add_argument("--model", default="smollm2-135m")
    p.add_argument("--attn", action="append", help="attention method; may be given several times (default: full and subgen)")
    p.add_argument("--dtype", action="append", choices=["bfloat16", "float32"], help="may be given several times (default: both)")
    p.add_argument("--prompt-tokens", type=int, default=32)
    p.add_argument("--new-tokens", type=int, default=128)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--compile", default="on", choices=["on", "off"])
    p.add_argument("--threads", type=int)
    p.add_argument("--peer", metavar="FILE", help="what to compare with, such as scripts/peer_transformers.py")
    args = p.parse_args(argv)
    if min(args.prompt_tokens, args.new_tokens - 1, args.repeats) < 1:
        raise ZooError("--prompt-tokens and --repeats must be at least 1, --new-tokens at least 2")
    cli.set_threads(args.threads)
    import zoo
    from zoo import hub

    folder = hub.find(args.model)
    rows: list[dict[str, Any]] = []
    for dtype in args.dtype or ["bfloat16", "float32"]:
        runs: dict[str, Callable[[], tuple[list[int], float, float]]] = {}
        weights = 0
        for attn in args.attn or ["full", "subgen"]:
            lm = zoo.load(args.model, attn=attn, dtype=dtype, compile=args.compile)
            ids = (lm.tokenizer.encode(TEXT) * args.prompt_tokens)[: args.prompt_tokens]
            runs[f"zoo {lm.attn}"] = ours(lm, ids, args.new_tokens)
            weights = sum(w.nbytes for w in lm.model.parameters())
        if args.peer:
            peer, runs_of = theirs(args.peer, folder, getattr(torch, dtype), ids, args.new_tokens)
            runs[peer] = runs_of
        for run in runs.values():  # compile, and touch every page
            run()
        times: dict[str, list[tuple[list[int], float, float]]] = {name: [] for name in runs}
        for _ in range(args.repeats):
            for name, run in runs.items():
                times[name].append(run())
        for name, measured in times.items():
            per_token = [1e3 * rest / (args.new_tokens - 1) for _, _, rest in measured]
            q1, median, q3 = statistics.quantiles(per_token, n=4) if len(per_token) > 1 else per_token * 3
            rows.append(
                {
                    "who": name,
                    "dtype": dtype,
                    "prompt_tokens": args.prompt_tokens,
                    "new_tokens": args.new_tokens,
                    "ms_per_token": round(median, 2),
                    "quartiles": [round(q1, 2), round(q3, 2)],
                    "first_token_ms": round(1e3 * statistics.median(first for _, first, _ in measured), 1),
                    "weight_bytes_a_token": weights,
                    "gb_per_s": round(weights / median / 1e6, 1),
                    "tokens": measured[0][0],
                }
            )
        base = next((r for r in rows if args.peer and r["who"] == peer and r["dtype"] == dtype), None)
        for r in rows:
            if base and r["dtype"] == dtype:
                r["speedup"] = round(base["ms_per_token"] / r["ms_per_token"], 2)
                r["same_tokens"] = r["tokens"] == base["tokens"]
    print(f"{args.model}, {torch.get_num_threads()} threads, torch {torch.__version__}, prompt {args.prompt_tokens}, new {args.new_tokens}")
    print(f"{'':34} {'dtype':9} {'ms/token':>9} {'quartiles':>16} {'first ms':>9} {'GB/s':>6} {'speedup':>8}")
    for r in rows:
        low, high = r["quartiles"]
        print(
            f"{r['who']:34} {r['dtype']:9} {r['ms_per_token']:9.2f} {low:7.2f} -{high:7.2f} {r['first_token_ms']:9.1f} {r['gb_per_s']:6.1f}"
            f" {r.get('speedup', ''):>8}"
        )
        r.pop("tokens", None)
    print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    sys.exit(cli.run(main))
