"""Quality of cache methods at equal bytes: KL divergence from the full cache's next-token distribution, and passkey retrieval.

    python scripts/measure_quality.py kl --text FILE --tokens 2048 --passages 8 --shares 25 12.5 6.25 --out kl.jsonl
    python scripts/measure_quality.py stream --text FILE --passages 4
    python scripts/measure_quality.py passkey --text FILE --seeds 32
    python scripts/measure_quality.py weights --text FILE --passages 8
    python scripts/measure_quality.py report kl.jsonl

`kl` (protocol prefill): exact attention over a prompt, compressed once at its end, the next 256 true tokens fed exactly and kept, mean
KL(full || method) over them, in nats. `stream`: the prompt, then 768 true tokens fed with the cache never above its budget; mean KL
over the 768. `prompt-stream`: never above it inside the prompt either. `passkey`: a number in prose, the question unseen while
compressing, right if the first integer of ten greedy tokens is the number. `right`: the question ends in the blank before the number,
which is a token of its own in some tokenizers; `free`: it ends before, and a small model may go on with something else. A row says the
slots that were left at the prompt's end over the prompt's tokens. `weights`: KL(model || its int8 weights) over
whole passages, without any cache.
Passages follow one another through the text.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import zoo
from zoo.attention import Budget, parse

METHODS = [
    "subgen",
    "subgen:scores=expected",
    "subgen:heads=uniform",
    "h2o:age=true",
    "h2o",
    "snapkv",
    "tova",
    "sinks",
    "uniform",
    "l2norm",
    "keydiff",
    "subgen_kcenter",
]
INTRO = (  # the five parts of the passkey task (Mohtashami and Jaggi, Landmark Attention, arXiv 2305.16300), with prose for filler
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about the important "
    "information there.\n"
)


def with_budget(spelling: str, share: float, when: str) -> Any:
    return dataclasses.replace(parse(spelling), budget=Budget(share, percent=True), when=when)  # type: ignore[type-var]


@torch.no_grad()
def read(lm: Any, cache: Any, ids: list[int]) -> None:
    """A prompt without its end: the cache holds it exactly, or streams it."""
    cache.begin_prompt([len(ids)])
    t = torch.tensor([ids])
    for start in range(0, len(ids), 512):
        for piece, where in cache.split(t[:, start : start + 512]):
            lm.model.hidden(piece, where, cache)


@torch.no_grad()
def follow(lm: Any, cache: Any, ids: list[int], piece: int = 256) -> torch.Tensor:
    """Log-probabilities (T, V) after each of the tokens that follow."""
    out = [lm.model(torch.tensor([ids[i : i + piece]]), cache)[0] for i in range(0, len(ids), piece)]
    return torch.cat(out).log_softmax(-1)


def kl(true: torch.Tensor, other: torch.Tensor) -> float:
    return float((true.exp() * (true - other)).sum(-1).mean())


def size(cache: Any, n: int) -> float:
    """Slots of keys and values held, a layer and head, over n tokens."""
    held = sum(int((layer.slots().pos >= 0).sum()) for layer in cache)
    return held / len(cache) / cache[0].slots().pos.shape[1] / n


def record(lm: Any, prompt: list[int]) -> Any:
    """A prompt read once, exactly, by a cache that keeps what any method here needs: keys and values, attention and its squares, query
    statistics, and the last queries."""
    lm.attn = with_budget("subgen", 25, "prompt")
    cache = lm.new_cache()
    for layer in cache:
        layer.last = []

        def attend(q: Any, k: Any, v: Any, pos: Any, layer: Any = layer, plain: Any = layer.attend) -> Any:
            layer.last = [*layer.last[-1:], (q[:, :, -64:], pos[:, -64:])]
            return plain(q, k, v, pos)

        layer.attend = attend
    read(lm, cache, prompt)
    return cache


def adopt(lm: Any, source: Any, spelling: str, share: float, when: str) -> Any:
    """A cache of this method as it would be after reading the same prompt. (`--check` reads it, and compares.)"""
    lm.attn = with_budget(spelling, share, when)
    cache = lm.new_cache()
    cache.begin_prompt([int(source.tokens_seen)])
    cache.tokens_seen.copy_(source.tokens_seen)
    for mine, layer in zip(cache, source, strict=True):
        for name in ("k", "v", "pos", "mass", "spikes"):
            if getattr(mine.store, name) is not None:
                setattr(mine.store, name, getattr(layer.store, name).clone())
        if hasattr(mine, "queries"):
            for name in ("sum", "square", "count"):
                getattr(mine.queries, name).copy_(getattr(layer.queries, name))
        if hasattr(mine, "asked") and (rows := mine.method.queries):
            q = torch.cat([q for q, _ in layer.last], 2).transpose(1, 2)[:, -rows:]
            pos = torch.cat([pos for _, pos in layer.last], 1)[:, -rows:]
            mine.asked[0, 1 + pos[0] % rows], mine.asked_pos[0, 1 + pos[0] % rows] = q[0], pos[0]
    return cache


def variants(lm: Any, source: Any, spelling: str, shares: list[float], when: str) -> Any:
    """(share, cache at the prompt's end, seconds that compressing took) for each share."""
    for share in shares:
        cache = adopt(lm, source, spelling, share, when)
        start = time.perf_counter()
        cache.end_prompt()
        yield share, cache, time.perf_counter() - start


def passages(lm: Any, text: str, tokens: int, count: int, skip: int) -> list[list[int]]:
    ids = lm.tokenizer.encode(text)
    found = [ids[i : i + tokens] for i in range(skip, len(ids) - tokens, tokens)][:count]
    if len(found) < count:
        sys.exit(f"the text has only {len(found)} passages of {tokens} tokens after {skip}")
    return found


def run_kl(lm: Any, args: argparse.Namespace) -> None:
    n, after, when = args.tokens, args.after, "prompt" if args.task == "kl" else "decode"
    for number, ids in enumerate(passages(lm, args.text, n + after, args.passages, args.skip)):
        source = record(lm, ids[:n])
        (whole,) = (c for _, c, _ in variants(lm, source, "sinks", [200.0], "prompt"))  # a budget of all tokens: the full cache
        true = follow(lm, whole, ids[n:])
        for spelling in args.attn:
            if args.task == "prompt-stream":
                runs = [(share, None, 0.0) for share in args.shares]
            else:
                runs = variants(lm, source, spelling, args.shares, when)
            for share, one, seconds in runs:
                if one is None:
                    lm.attn = with_budget(spelling, share, "stream")
                    one = lm.new_cache()
                    read(lm, one, ids[:n])
                    one.end_prompt()
                held = size(one, n)
                got = follow(lm, one, ids[n:])
                if args.check and args.task != "prompt-stream":
                    lm.attn = with_budget(spelling, share, when)
                    again = lm.new_cache()
                    read(lm, again, ids[:n])
                    again.end_prompt()
                    print("adopted and read differ by", float((follow(lm, again, ids[n:]) - got).abs().max()))
                emit(args, task=args.task, tokens=n, passage=number, attn=spelling, share=share, size=round(held, 4), kl=kl(true, got),
                     top1=float((true.argmax(-1) == got.argmax(-1)).float().mean()), seconds=round(seconds, 3),
                     nbytes=one.nbytes().used)  # fmt: skip


@torch.no_grad()
def reply(lm: Any, cache: Any, ids: list[int], tokens: int = 10) -> str:
    """What is said after ids, greedily."""
    said: list[int] = []
    for _ in range(tokens):
        logits = lm.model(torch.tensor([said[-1:] or ids]), cache)[0, -1]
        said.append(int(logits.argmax()))
    return str(lm.tokenizer.decode(said))


def first_integer(text: str) -> int | None:
    found = re.search(r"\d+", text)
    return int(found[0]) if found else None


def run_passkey(lm: Any, args: argparse.Namespace) -> None:
    ids = lm.tokenizer.encode(args.text)
    for seed in range(args.seeds):
        r = random.Random(seed)
        n, key = r.randrange(1000, 2000), r.randint(1, 50000)
        start = r.randrange(args.skip, len(ids) - n)
        needle = lm.tokenizer.encode(f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n")
        cut = r.randrange(n)
        prompt = lm.tokenizer.encode(INTRO) + ids[start : start + cut] + needle + ids[start + cut : start + n]
        question = lm.tokenizer.encode("\nWhat is the pass key? The pass key is")
        answer = lm.tokenizer.encode(f" {key}")
        blank = int(lm.tokenizer.decode(answer[:1]).isspace())
        source = record(lm, prompt)
        for spelling in ["full", *args.attn]:
            full = spelling == "full"
            for share, one, _ in variants(lm, source, "sinks" if full else spelling, [200.0] if full else args.shares, "prompt"):
                held = size(one, len(prompt))
                said, free = reply(lm, one.clone(), question + answer[:blank]), reply(lm, one.clone(), question)
                got = follow(lm, one, question + answer)[-len(answer) - 1 : -1]
                logprob = float(got.gather(1, torch.tensor(answer)[:, None]).sum())
                emit(args, task="passkey", seed=seed, tokens=len(prompt), attn=spelling, share=share, size=round(held, 4),
                     right=first_integer(said) == key, free=first_integer(free) == key, said=said, said_free=free,
                     logprob=logprob)  # fmt: skip


def run_weights(lm: Any, args: argparse.Namespace) -> None:
    int8 = zoo.load(args.model, dtype=args.dtype, compile="off", weights="int8")
    for i, ids in enumerate(passages(lm, args.text, args.tokens, args.passages, args.skip)):
        true, other = (model.logits(ids)[0].log_softmax(-1) for model in (lm, int8))
        same = float((true.argmax(-1) == other.argmax(-1)).float().mean())
        emit(args, task="weights", attn="int8", share=100.0, tokens=len(ids), passage=i, kl=kl(true, other), top1=same, size=1.0)


def emit(args: argparse.Namespace, **row: Any) -> None:
    line = json.dumps(row)
    print(line, flush=True)
    if args.out:
        with Path(args.out).open("a") as f:
            f.write(line + "\n")


def interval(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """Bootstrap 95 % interval of the mean."""
    r = random.Random(0)
    means = sorted(statistics.fmean(r.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


def report(path: str) -> None:
    """Means, and paired ratios to `subgen` (geometric mean and its 95 % interval), by task, length and share."""
    import math

    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    for task, tokens in sorted({(r["task"], r["tokens"] if r["task"] != "passkey" else 0) for r in rows}):
        some = [r for r in rows if r["task"] == task and (task == "passkey" or r["tokens"] == tokens)]
        for share in sorted({r["share"] for r in some}, reverse=True):
            mine = {r.get("passage"): r["kl"] for r in some if r["attn"] == "subgen" and r["share"] == share and task != "passkey"}
            print(f"\n{task} {tokens or ''} share {share:g} %")
            for attn in dict.fromkeys(r["attn"] for r in some):
                these = [r for r in some if r["attn"] == attn and r["share"] == share]
                if not these:
                    continue
                held = statistics.fmean(r["size"] for r in these)
                if task == "passkey":
                    right = sum(r["right"] for r in these)
                    logprob = statistics.fmean(r["logprob"] for r in these)
                    free = sum(r["free"] for r in these)
                    print(f"  {attn:28} {right:3}/{len(these)}  free {free:3}  log-probability {logprob:7.2f}  size {held:.4f}")
                    continue
                values = [r["kl"] for r in these]
                low, high = interval(values)
                top1 = statistics.fmean(r["top1"] for r in these)
                line = f"  {attn:28} KL {statistics.fmean(values):.4f} [{low:.4f}, {high:.4f}] top1 {top1:.3f} size {held:.4f}"
                if attn != "subgen" and all(r["passage"] in mine for r in these):
                    logs = [math.log(mine[r["passage"]] / r["kl"]) for r in these]
                    lo, hi = interval(logs)
                    line += f"  subgen/this {math.exp(statistics.fmean(logs)):.2f} [{math.exp(lo):.2f}, {math.exp(hi):.2f}]"
                print(line)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("task", choices=["kl", "stream", "prompt-stream", "passkey", "weights", "report"])
    p.add_argument("file", nargs="?", help="for report: what --out wrote")
    p.add_argument("--model", default="smollm2-135m")
    p.add_argument("--text", help="a text file")
    p.add_argument("--tokens", type=int, default=2048)
    p.add_argument("--after", type=int)
    p.add_argument("--passages", type=int, default=8)
    p.add_argument("--skip", type=int, default=0, help="tokens of the text to leave out")
    p.add_argument("--seeds", type=int, default=30)
    p.add_argument("--shares", type=float, nargs="+", default=[25.0, 12.5, 6.25])
    p.add_argument("--attn", nargs="+", default=METHODS)
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--check", action="store_true", help="hold every adopted cache against one that read the prompt itself")
    p.add_argument("--out", help="append rows to this file, too")
    args = p.parse_args()
    if args.task == "report":
        report(args.file)
        return
    torch.set_num_threads(args.threads)
    args.after = args.after or (256 if args.task == "kl" else 768)
    lm = zoo.load(args.model, dtype=args.dtype, compile="off")
    args.text = Path(args.text).read_text()
    {"passkey": run_passkey, "weights": run_weights}.get(args.task, run_kl)(lm, args)


if __name__ == "__main__":
    main()
