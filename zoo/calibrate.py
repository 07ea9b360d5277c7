"""python -m zoo.calibrate METHOD MODEL --text FILE: tables that a method can use in place of measuring each prompt.

`subgen`: each head's share of the budget, from one global delta, averaged over passages of the text; `--attn subgen:heads=table` then
uses it with this model. A table is a small JSON file in zoo's cache folder. Also printed: the delta at that budget, and the median distance
between un-rotated keys, in whose terms `subgen:delta=...` is chosen.
"""

from __future__ import annotations

import json
import statistics
import sys
from typing import Any

import torch
from torch import Tensor

from zoo import cli
from zoo.errors import ZooError

METHODS = ("subgen",)


@torch.no_grad()
def subgen(lm: Any, passages: list[list[int]], share: float) -> dict[str, Any]:
    """Head shares (L, G), as multiples of the average, at a budget of `share` percent; delta and the median distance between keys."""
    from zoo.attention.shares import one_delta
    from zoo.attention.subgen import SubGen, SubGenCaches

    shares, deltas, distances = list[Tensor](), list[float](), list[float]()
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
        shares.append((wanted / wanted.mean()).view(counts.shape[0], -1))
        deltas.append(delta)
        for cache in caches:
            pos = cache.store.pos[:, 0].long()
            x = lm.model.rotary.unrotate(cache.store.k.float(), pos.clamp(min=0))[0, :, pos[0] >= 0][:, ::8]
            distances += torch.cdist(x, x).flatten(1).median(1).values.tolist()
        progress(number + 1, len(passages))
    mean = torch.stack(shares).mean(0)
    return {"shares": mean.tolist(), "delta": statistics.fmean(deltas), "median_distance": statistics.median(distances)}


DEFAULTS = {"subgen": (2048, 2), "pod": (1024, 4)}  # tokens a passage, passages
LAST = 64  # pod: queries whose attention is compared


def groups(lm: Any, passages: list[list[int]], held_out: list[list[int]], args: Any) -> tuple[dict[str, Any], list[str]]:
    """The table for `pod`, saved, and its report; with --adapt, an adapted checkpoint, too."""
    from zoo.attention.pod import Pod
    from zoo.attention.tables import save_table
    from zoo.layer_groups import calibrate, cost, report

    method = Pod(args.first, args.recent)
    table = calibrate(lm, passages, LAST, args.threshold)
    save_table("pod", lm.config, table)
    lines = report(lm.config, table)
    table |= cost(lm, method, held_out)
    save_table("pod", lm.config, table)
    lines.append(
        f"  {method}: {table['saved']:.1%} of the bytes saved after {len(held_out[0])} tokens, KL from full {table['kl']:.3f} nats "
        f"on {len(held_out)} other passages"
    )
    return table, lines


def main(argv: list[str] | None = None) -> None:
    p = cli.Parser(prog="python -m zoo.calibrate", description="Make a table for a method and a model.")
    p.add_argument("method", choices=METHODS)
    p.add_argument("model", help="a name from zoo.generate --list, a hub id, or a folder")
    p.add_argument("--text", required=True, help="a text file such as the model will read, or - for standard input")
    p.add_argument("--tokens", type=int, default=2048, help="tokens a passage")
    p.add_argument("--passages", type=int, default=2, help="how many passages to average over")
    p.add_argument("--share", type=float, default=12.5, help="the budget in percent at which heads are weighed")
    p.add_argument("--dtype", choices=["bfloat16", "float16", "float32"])
    p.add_argument("--threads", type=int)
    p.add_argument("--json", action="store_true", help="print what was found as one JSON object")
    args = p.parse_args(argv)
    if args.tokens < 128 or args.passages < 1 or not 0 < args.share <= 100:
        raise ZooError("--tokens must be at least 128, --passages at least 1, --share above 0 and at most 100")
    import zoo
    from zoo.attention.tables import save_table
    from zoo.generate import read

    text = read(args.text)
    cli.set_threads(args.threads)
    lm = zoo.load(args.model, dtype=args.dtype, compile="off")
    tokens = min(args.tokens, lm.config.max_position_embeddings)
    ids = lm.tokenizer.encode(text)
    passages = [ids[i : i + tokens] for i in range(0, len(ids) - tokens + 1, tokens)][: args.passages]
    if not passages:
        raise ZooError(f"the text is {len(ids)} tokens, shorter than a passage of {tokens}; give a longer one, or fewer --tokens")
    if len(passages) < args.passages:
        print(f"the text has only {len(passages)} passages of {tokens} tokens", file=sys.stderr)
    table = subgen(lm, passages, args.share)
    path = save_table(args.method, lm.config, table)
    flat = [x for row in table["shares"] for x in row]
    print(
        f"head shares from {min(flat):.2f} to {max(flat):.2f} of the average, {len(passages)} passages of {tokens} tokens", file=sys.stderr
    )
    print(f"delta {table['delta']:.3g}; median distance between un-rotated keys {table['median_distance']:.3g}", file=sys.stderr)
    print(json.dumps({"path": str(path), **table}) if args.json else path)


if __name__ == "__main__":
    sys.exit(cli.run(main))
