"""python -m zoo.eval show --attn subgen:budget=25% --file TEXT --out page.html: what a cache made of a text, as one HTML page.

The text but for its last tokens, the queries, is read as a prompt; then the cache is looked at. For each layer and key/value head:

    kept      the token has a slot of its own          weighted  the same, but the slot stands for more tokens than this one
    merged    it shares a slot: a cluster              dropped   nothing of it is left
The queries and the exact attention are those of a full cache that reads the same text. A query sees the method's slots, as they were at the
prompt's end, and the query tokens up to itself exactly. What a slot gets is its probability by denominator weight; an output's error is
|given - exact| / |exact|, of one query head, before the output projection.

Which tokens a cluster of `subgen` holds is recorded while it is made. All other methods here keep tokens, so that a slot is its position.
(Of `subgen_paper` and trees these are samples: a token that is not among them is called dropped, though it is counted in another's weight.)
The page needs nothing but itself: arrays are deflated inside it. Rounded there: probabilities to 3 %, those below 4e-7 are 0; weights of
slots to 1/8; errors to 1e-4.
"""

from __future__ import annotations

import argparse
import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo import cli
from zoo.attention.backends import NAMES
from zoo.attention.full import Full
from zoo.attention.slots import Slots, slot_attention, slot_scores
from zoo.attention.subgen import SubGenCache
from zoo.errors import ZooError
from zoo.eval import pages, records

if TYPE_CHECKING:
    from zoo.attention.cache import Cache, Caches
    from zoo.lm import LM

GONE = 2**16 - 1  # of a dropped token, in place of its slot's position
OCTAVE = 12  # steps of a probability's code from one power of two to the next
UNIT = 8  # steps from one token that a slot stands for to the next
MOST = 2**15  # tokens: positions are 16 bits


@dataclass(frozen=True)
class Picture:
    """What the page shows. Letters: L layers, G key/value heads, H query heads, T prompt tokens, N queries, A = T + N."""

    pieces: list[str]  # (A,): the text, token by token
    home: Tensor  # (L, G, T) int64: the position of the slot that a token is in, or GONE
    weight: Tensor  # (L, G, T) float32: how many tokens the slot at a position stands for; 0 = there is none
    exact: Tensor  # (L, H, N, A) float32: exact attention of each query
    given: Tensor  # (L, H, N, A): what it gives to the slot at each position
    error: Tensor  # (L, H, N): relative error of the output
    used: int  # bytes of the cache at the prompt's end, and of the full one
    full: int


class Members:
    """Which slot each prompt token is in: home (L, G, T + 1) int64 positions, kept up to date by `SubGenCache.watch`."""

    def __init__(self, caches: Caches, heads: int, tokens: int) -> None:
        self.home = torch.arange(tokens + 1).expand(len(caches), heads, tokens + 1).clone()
        for cache in caches:
            if isinstance(cache, SubGenCache):
                cache.watch = self.moved

    def moved(self, layers: list[int], pos: Tensor, label: Tensor, newest: Tensor) -> None:
        """Slots at pos (A, G, N) became those of their labels, at positions newest (A, G, M): in one head no two slots share one."""
        nowhere = self.home.shape[2] - 1
        pos, label, newest = pos.cpu().long(), label.cpu(), newest.cpu().long()
        held = (pos >= 0) & (label >= 0)
        new = torch.arange(nowhere + 1).repeat(*pos.shape[:2], 1)
        new.scatter_(2, pos.where(held, nowhere), newest.gather(2, label.clamp(min=0)).where(held, nowhere))
        self.home[layers] = new.gather(2, self.home[layers])


def by_position(value: Tensor, pos: Tensor, size: int) -> Tensor:
    """Sums (..., size) of value (..., S) over slots of one position pos (..., S); -1 counts nowhere."""
    out = value.new_zeros(*value.shape[:-1], size + 1)
    return out.scatter_add_(-1, pos.long().where(pos >= 0, size).expand(value.shape), value)[..., :size]


def attention(q: Tensor, pos: Tensor, slots: Slots, size: int) -> Tensor:
    """(H, N, size): the probability that queries q (1, H, N, D) at pos (1, N) give to the slots of each position."""
    score = slot_scores(q, pos, slots)  # (1, G, R, N, S)
    logweight = slots.a if slots.b is None else slots.b
    prob = (score if logweight is None else score + logweight[:, :, None, None]).softmax(-1).nan_to_num(0.0)
    return by_position(prob, slots.pos[:, :, None, None], size)[0].flatten(0, 1)


def joined(slots: Slots, more: Slots, start: int) -> Slots:
    """`slots`, and of the exact `more` those at positions from `start` on."""
    rows = (more.pos[0, 0] >= start).nonzero()[:, 0]
    zero = torch.zeros(more.pos[:, :, rows].shape, device=rows.device)
    assert slots.a is not None
    a = torch.cat((slots.a, zero), 2)
    b = None if slots.b is None else torch.cat((slots.b, zero), 2)
    k, v, pos = (torch.cat((x, y[:, :, rows]), 2) for x, y in ((slots.k, more.k), (slots.v, more.v), (slots.pos, more.pos)))
    return Slots(k, v, pos, a, b, slots.window)


@torch.no_grad()
def follow(lm: LM, ids: Sequence[int], caches: Caches) -> list[Tensor]:
    """Feed ids one by one; of each layer the queries (1, H, N, D), rotated."""
    asked: list[list[Tensor]] = [[] for _ in caches]
    for layer, mine in zip(caches, asked, strict=True):

        def respond(q: Tensor, pos: Tensor, plain: Any = layer.respond, mine: list[Tensor] = mine) -> Tensor:
            mine.append(q)
            return plain(q, pos)

        layer.respond = respond  # type: ignore[method-assign]
    for i in ids:
        lm.model(torch.tensor([[i]], device=lm.device), caches)
    return [torch.cat(mine, 2).float() for mine in asked]


def look(lm: LM, ids: Sequence[int], queries: int, progress: Any = None) -> Picture:
    """Read all of ids but the last `queries` with lm's attention method, and with a full cache. Raises ZooError where they do not fit."""
    A, T = len(ids), len(ids) - queries
    if queries < 1 or T < 2:
        raise ZooError(f"a text of {A} tokens is too short for {queries} queries behind a prompt; give at least {queries + 2} tokens")
    most = min(MOST, lm.config.max_position_embeddings)
    if most < A:
        raise ZooError(f"{A} tokens are too many: at most {most}, what this model's context and the page hold")
    L, G = lm.config.num_hidden_layers, lm.config.num_key_value_heads
    caches = lm.new_cache(max_tokens=T)
    members = Members(caches, G, T)
    lm.prefill(ids[:T], caches, progress=progress)
    whole = Full().caches(lm.config, lm.model.rotary, 1, A, None, lm.dtype, lm.device)
    lm.prefill(ids[:T], whole, progress=progress)
    sizes = caches.nbytes().used, whole.nbytes().used
    asked = follow(lm, ids[T:], whole)
    pos = torch.arange(T, A, device=lm.device)[None]
    found: list[tuple[Tensor, ...]] = []
    for q, mine, exact in zip(asked, caches, whole, strict=True):
        found.append(compare(q, pos, mine, exact.slots(), A))
    weight, shares, given, error = (torch.stack(part).cpu() for part in zip(*found, strict=True))
    weight = weight[..., :T]
    home = members.home[..., :T]
    home = torch.where(weight.gather(2, home.clamp(max=T - 1)) > 0, home, GONE)
    assert home.shape == (L, G, T)
    stream = lm.tokenizer.stream(skip_special=False)
    pieces = [stream.push(i) for i in ids]
    pieces[-1] += stream.finish()
    return Picture(pieces, home, weight, shares, given, error, *sizes)


def compare(q: Tensor, pos: Tensor, cache: Cache, exact: Slots, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one layer: weights of slots (G, size), exact and given attention (H, N, size), errors (H, N)."""
    mine = cache.slots()
    assert mine.a is not None
    held = (mine.pos >= 0) & ((mine.a > -torch.inf) if mine.b is None else (torch.maximum(mine.a, mine.b) > -torch.inf))
    count = (mine.a if mine.b is None else mine.b).exp().clamp(min=1e-3)  # a slot that weighs nothing below still is one
    weight = by_position(torch.where(held, count, 0.0), mine.pos, size)[0]
    both = joined(mine, exact, int(pos[0, 0]))
    given, right = slot_attention(q, pos, both), slot_attention(q, pos, exact)
    assert isinstance(given, Tensor)
    assert isinstance(right, Tensor)
    error = (given - right).norm(dim=-1) / right.norm(dim=-1).clamp(min=1e-30)
    return weight, attention(q, pos, exact, size), attention(q, pos, both, size), error[0]


# The page


def codes(p: Tensor) -> Tensor:
    """Probabilities as bytes: 0 is 0, c is 2^((c - 255) / OCTAVE)."""
    return (255 + OCTAVE * p.clamp(min=1e-30).log2()).round().clamp(0, 255).to(torch.uint8)


def packed(t: Tensor) -> str:
    """Little-endian bytes, deflated, in base64."""
    return base64.b64encode(zlib.compress(t.contiguous().numpy().tobytes(), 9)).decode()


def page(picture: Picture, about: dict[str, Any]) -> str:
    """The whole page; about: what its head says (title, attn, model)."""
    p = picture
    (L, G, T), (_, H, N, _) = p.home.shape, p.exact.shape
    data = {
        **about,
        **dict(zip("LGRTN", (L, G, H // G, T, N), strict=True)),
        "octave": OCTAVE,
        "unit": UNIT,
        "used": p.used,
        "full": p.full,
        "pieces": p.pieces,
        "home": packed(p.home.to(torch.uint16)),
        "weight": packed((UNIT * p.weight).round().clamp(1, GONE).where(p.weight > 0, 0).to(torch.uint16)),
        "exact": packed(codes(p.exact)),
        "given": packed(codes(p.given)),
        "error": packed((1e4 * p.error).round().clamp(max=65535).to(torch.uint16)),
    }
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # no text may end the script that holds it
    return pages.page("show.html", scripts=True).replace("{{data}}", text)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    p = cli.Parser(prog="python -m zoo.eval show", description="What a cache kept, merged and dropped of a text, as one HTML page.")
    p.add_argument("--file", required=True, help="the text; - reads standard input")
    p.add_argument("--out", default="cache.html", type=Path, metavar="PAGE.html", help="(cache.html)")
    p.add_argument("--attn", default="subgen", help="attention method, such as subgen:budget=25%%")
    p.add_argument("--model", default="smollm2-135m", help="a name, a hub id, or a folder")
    p.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="the file's own unless given")
    p.add_argument("--backend", default="auto", help=f"how attention is computed: {', '.join(NAMES)}")
    p.add_argument("--device", default="cpu")
    p.add_argument("--threads", type=int)
    p.add_argument("--tokens", type=int, default=512, help="so many of the text's first tokens, queries included (512)")
    p.add_argument("--queries", type=int, default=4, help="so many of them, the last ones, ask (4)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Raises ZooError for what the user can mend."""
    import zoo
    from zoo.generate import read

    args = arguments(argv)
    text = read(args.file)
    cli.set_threads(args.threads)
    lm = zoo.load(args.model, attn=args.attn, dtype=args.dtype, device=args.device, compile="off", backend=args.backend)
    picture = look(lm, lm.tokenizer.encode(text)[: max(args.tokens, 0)], args.queries, cli.Progress())
    about = {"attn": str(lm.attn), "model": Path(args.model).name, "source": Path(args.file).name}
    try:
        records.replace(args.out, page(picture, about).encode())
    except OSError as e:
        raise ZooError(f"cannot write {args.out}: {e.strerror}") from None
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.2f} MiB")
