"""python -m zoo.calibrate METHOD MODEL --text FILE: tables that a method can use in place of measuring each prompt.

A table is a small JSON file in zoo's cache folder, made for a model once.
`subgen`    each head's share of the budget, from one global delta, averaged over passages; `--attn subgen:heads=table` uses it. Also
            printed: the delta at that budget, and the median distance between un-rotated keys, in whose terms `delta=...` is chosen
`kvsharer`  which layers can do without keys and values of their own (zoo/layer_pairs.py)
`pod`       which layers can share keys of distant tokens, and what that saves and costs (zoo/layer_groups.py). `--adapt` then trains the
            model's weights for it (zoo/adapt.py), and writes them as a checkpoint folder; `--against FOLDER` says what came of it
"""

from __future__ import annotations

import json
import statistics
import sys
from math import inf
from typing import Any

import torch
from torch import Tensor

from zoo import cli
from zoo.attention.tables import own_table, save_table
from zoo.errors import ZooError

LAST = 64  # pod: the queries of a passage whose attention is compared
HELD_OUT = 4  # pod: passages that say what it costs, the last ones of the text


@torch.no_grad()
def shares(lm: Any, passages: list[list[int]], share: float) -> dict[str, Any]:
    """Head shares (L, G), as multiples of the average, at a budget of `share` percent; delta and the median distance between keys."""
    from zoo.attention.shares import one_delta
    from zoo.attention.subgen import SubGen, SubGenCaches

    found_shares, deltas, distances = list[Tensor](), list[float](), list[float]()
    progress = cli.Progress()
    for number, ids in enumerate(passages):
        lm.attn = SubGen(when="prompt")
        caches = lm.new_cache()
        assert isinstance(caches, SubGenCaches)
        caches.begin_prompt([len(ids)])
        chunk = len(ids) if lm.model.rotary.whole_prompts else 512
        for start in range(0, len(ids), chunk):
            for piece, where in caches.split(torch.tensor([ids[start : start + chunk]])):
                lm.model.hidden(piece, where, caches)
        rows = len(ids) * share / 100
        counts, found = caches.curves(torch.ones(1, dtype=torch.bool), [rows])
        wanted, delta = one_delta(counts[:, 0].flatten(0, 1), found[:, 0].flatten(0, 1), rows)
        found_shares.append((wanted / wanted.mean()).view(counts.shape[0], -1))
        deltas.append(delta)
        for cache in caches:
            pos = cache.store.pos[:, 0].long()
            x = lm.model.rotary.unrotate(cache.store.k.float(), pos.clamp(min=0))[0, :, pos[0] >= 0][:, ::8]
            distances += torch.cdist(x, x).flatten(1).median(1).values.tolist()
        progress(number + 1, len(passages))
    mean = torch.stack(found_shares).mean(0)
    return {"shares": mean.tolist(), "delta": statistics.fmean(deltas), "median_distance": statistics.median(distances)}


Passages = list[list[int]]


def subgen(lm: Any, passages: Passages, text: list[int], args: Any) -> tuple[dict[str, Any], list[str]]:
    table = shares(lm, passages, args.share)
    flat = [x for row in table["shares"] for x in row]
    span = f"head shares from {min(flat):.2f} to {max(flat):.2f} of the average, {len(passages)} passages of {len(passages[0])} tokens"
    return table, [span, f"delta {table['delta']:.3g}; median distance between un-rotated keys {table['median_distance']:.3g}"]


def kvsharer(lm: Any, passages: Passages, text: list[int], args: Any) -> tuple[dict[str, Any], list[str]]:
    from zoo.layer_pairs import calibrate, report

    layers = lm.config.num_hidden_layers
    table = calibrate(lm, passages, args.layers or max(1, layers // 4), args.threshold)
    return table, report(table, layers)


def pod(lm: Any, passages: Passages, text: list[int], args: Any) -> tuple[dict[str, Any], list[str]]:
    from zoo.attention.pod import Pod
    from zoo.layer_groups import calibrate, check, cost, report

    method, size = Pod(args.first, args.recent), len(passages[0])
    check(method, size, lm.config.sliding_window)
    table = calibrate(lm, passages, LAST, args.threshold)
    held_out = [text[i : i + size] for i in range(len(text) - size, len(passages) * size - 1, -size)][:HELD_OUT]
    lines = report(table)
    if held_out:
        save_table("pod", lm.config, table)
        table |= cost(lm, method, held_out)
        saved, kl = table["saved"], table["kl"]
        lines.append(
            f"  {method}: {saved:.1%} of the bytes saved after {size} tokens; KL from full {kl:.3f} nats, {len(held_out)} other passages"
        )
    else:
        lines.append(f"  what it costs is not measured: the text has no other passage of {size} tokens; a longer text, or fewer --passages")
    return table, lines


def compare(lm: Any, passages: Passages, args: Any) -> dict[str, Any]:
    """What adapting lm gained, on these passages."""
    import zoo
    from zoo.attention.pod import Pod
    from zoo.layer_groups import against, check

    method, size = Pod(args.first, args.recent), len(passages[0])
    check(method, size, lm.config.sliding_window)
    adapted = zoo.load(args.against, dtype=args.dtype, compile="off")
    held_out = (own_table("pod", adapted.config) or {}).get("held_out")
    if held_out is not None and size * len(passages) > held_out:
        print(
            f"of these {size * len(passages)} tokens the last {held_out} were held out in training; the others were trained on, if this is "
            f"the same text",
            file=sys.stderr,
        )
    found: dict[str, Any] = against(lm, adapted, method, passages)
    print(
        f"{method}, the last {len(passages)} passages of {size} tokens, KL from the original with full: original {found['kl_before']:.3f}, "
        f"adapted {found['kl_after']:.3f}, adapted with full {found['kl_full']:.3f} nats; {found['saved']:.1%} of the bytes saved",
        file=sys.stderr,
    )
    return found


METHODS: dict[str, tuple[Any, int, int, int]] = {  # what makes the table; tokens a passage, at least and by default; passages
    "subgen": (subgen, 128, 2048, 2),
    "kvsharer": (kvsharer, 16, 64, 30),
    "pod": (pod, 128, 1024, 4),
}


def main(argv: list[str] | None = None) -> None:
    p = cli.Parser(prog="python -m zoo.calibrate", description="Make a table for a method and a model.")
    p.add_argument("method", choices=METHODS)
    p.add_argument("model", help="a name from zoo.generate --list, a hub id, or a folder")
    p.add_argument("--text", required=True, help="a text file such as the model will read, or - for standard input")
    p.add_argument("--tokens", type=int, help="tokens a passage; subgen 2048, kvsharer 64, pod 1024 unless given")
    p.add_argument("--passages", type=int, help="how many passages to average over; 2, 30 and 4 unless given")
    p.add_argument("--share", type=float, default=12.5, help="subgen: the budget in percent at which heads are weighed")
    p.add_argument(
        "--threshold", type=float, help="pod: how alike layers of a group are; kvsharer: the cosine that must be left; 0.5 unless given"
    )
    p.add_argument("--layers", type=int, default=0, help="kvsharer: how many layers keep nothing; a quarter unless given")
    p.add_argument("--first", type=int, default=16, help="pod: first tokens, near ones in all layers")
    p.add_argument("--recent", type=int, default=256, help="pod: most recent tokens, near ones in all layers")
    p.add_argument("--adapt", metavar="FOLDER", help="pod: train the model's weights for the groups, into this folder")
    p.add_argument("--minutes", type=float, default=30, help="--adapt: how long to train")
    p.add_argument("--steps", type=int, default=2**31, help="--adapt: how many steps at most")
    p.add_argument("--against", metavar="FOLDER", help="pod: what --adapt into this folder gained, on the text's last passages")
    p.add_argument("--lr", type=float, default=1e-3, help="--adapt: the highest learning rate")
    p.add_argument("--dtype", choices=["bfloat16", "float16", "float32"])
    p.add_argument("--threads", type=int)
    p.add_argument("--json", action="store_true", help="print what was found as one JSON object")
    args = p.parse_args(argv)
    make, least, tokens, count = METHODS[args.method]
    tokens, count = tokens if args.tokens is None else args.tokens, count if args.passages is None else args.passages
    if tokens < least or count < 1 or not 0 < args.share <= 100:
        raise ZooError(f"--tokens must be at least {least}, --passages at least 1, --share above 0 and at most 100")
    if args.adapt and (args.threshold is not None or args.passages is not None):
        raise ZooError("--adapt trains for groups that are there already: --threshold and --passages are for the call that finds them")
    if args.against and (args.adapt or args.threshold is not None):
        raise ZooError("--against measures what is there: without --adapt and --threshold")
    args.threshold = 0.5 if args.threshold is None else args.threshold
    if not 0 <= args.threshold <= 1 or args.layers < 0 or args.steps < 1 or not (0 < args.minutes < inf and 0 < args.lr < inf):
        raise ZooError("--threshold must be between 0 and 1, --layers at least 0, --steps at least 1, --minutes and --lr above 0")
    if (args.adapt or args.against) and args.method != "pod":
        raise ZooError(f"--adapt and --against are for pod; {args.method} changes no weights")
    import zoo
    from zoo.attention.pod import Pod
    from zoo.generate import read

    Pod(args.first, args.recent)  # raises where they are out of bounds
    text = read(args.text)
    cli.set_threads(args.threads)
    if args.adapt:
        from zoo.adapt import run

        found = run(args, text)
        print(json.dumps(found) if args.json else found["path"])
        return
    lm = zoo.load(args.model, dtype=args.dtype, compile="off")
    if own_table(args.method, lm.config) is not None:
        raise ZooError(f"{lm.config.folder} has a table of its own, which its weights were trained for; calibrate the original")
    tokens = min(tokens, lm.config.max_position_embeddings)
    ids = lm.tokenizer.encode(text)
    starts = range(len(ids) - tokens, -1, -tokens) if args.against else range(0, len(ids) - tokens + 1, tokens)
    passages = [ids[i : i + tokens] for i in starts[:count]]
    if not passages:
        raise ZooError(f"the text is {len(ids)} tokens, shorter than a passage of {tokens}; give a longer one, or fewer --tokens")
    if len(passages) < count:
        print(f"the text has only {len(passages)} passages of {tokens} tokens", file=sys.stderr)
    if args.against:
        found = compare(lm, passages, args)
        print(json.dumps(found) if args.json else f"{found['kl_after']:.3f}")
        return
    table, lines = make(lm, passages, ids, args)
    path = save_table(args.method, lm.config, table)
    print("\n".join(lines), file=sys.stderr)
    print(json.dumps({"path": str(path), **table}) if args.json else path)


if __name__ == "__main__":
    sys.exit(cli.run(main))
