"""python -m zoo.bench: milliseconds per generated token, against `transformers` on the same weights where it is installed.

Runs are interleaved, so that a busy machine is busy for everyone; medians and quartiles are over whole generations. What bounds the two
phases: prefill multiplies matrices by matrices and is bound by arithmetic; decode multiplies each weight with one vector, so it is bound by
reading the weights once a token, and the keys and values of the cache once more. `GB/s` counts the weights alone: at short contexts they
are nearly all. The last line is one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
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


def theirs(folder: Any, dtype: torch.dtype, ids: list[int], new: int) -> Callable[[], tuple[list[int], float, float]] | None:
    """The same run by transformers' generate (dynamic cache, eager), or None where it is not installed."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.generation.streamers import BaseStreamer
    except ImportError:
        return None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())  # called for the prompt, then for each token

        def end(self) -> None:
            pass

    def run() -> tuple[list[int], float, float]:
        clock, start = Clock(), time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                streamer=clock,
            )
        return out[0, len(ids) :].tolist(), clock.times[1] - start, clock.times[-1] - clock.times[1]

    return run


def main(argv: list[str] | None = None) -> None:
    p = cli.Parser(prog="python -m zoo.bench", description="Decode speed, against transformers on the same weights.")
    p.add_argument("--model", default="smollm2-135m")
    p.add_argument("--attn", action="append", help="attention method; may be given several times (default: full and subgen)")
    p.add_argument("--dtype", action="append", choices=["bfloat16", "float32"], help="may be given several times (default: both)")
    p.add_argument("--prompt-tokens", type=int, default=32)
    p.add_argument("--new-tokens", type=int, default=128)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--compile", default="on", choices=["on", "off"])
    p.add_argument("--threads", type=int)
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
        peer = theirs(folder, getattr(torch, dtype), ids, args.new_tokens)
        if peer:
            runs["transformers"] = peer
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
        base = next((r for r in rows if r["who"] == "transformers" and r["dtype"] == dtype), None)
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
