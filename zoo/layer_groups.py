"""What `python -m zoo.calibrate pod` finds out: which layers attend alike, what sharing their keys saves, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo import cli
from zoo.attention.cache import BLOCK, Attention, Caches, NoCache
from zoo.attention.full import Full
from zoo.attention.pod import Pod, group
from zoo.attention.slots import Slots, slot_scores
from zoo.attention.tables import own_table
from zoo.errors import ZooError


class Watched(NoCache):
    """A layer of a pass without a cache that keeps what its last `last` queries attended to: prob (B, G, last, T), the mean over each
    group's query heads."""

    def __init__(self, window: int | None, last: int) -> None:
        super().__init__(window, positions=True)
        self.last = last

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
        few, at = q[:, :, -self.last :], pos[:, -self.last :]
        self.prob = slot_scores(few, at, Slots(k, v, pos[:, None], window=self.window)).softmax(-1).mean(2)
        return super().attend(q, k, v, pos)


def entropy(p: Tensor) -> Tensor:
    """In bits, over the last dimension."""
    return -torch.xlogy(p, p).sum(-1) / torch.log(torch.tensor(2.0))


@torch.no_grad()
def similarity(lm: Any, passages: Sequence[Sequence[int]], last: int) -> Tensor:
    """(L, L, G): 1 - the Jensen-Shannon divergence (base 2) of two layers' attention, mean over the last queries of all passages; filled
    where the first layer is above the second."""
    c = lm.config
    total = torch.eye(c.num_hidden_layers)[..., None].repeat(1, 1, c.num_key_value_heads) * len(passages)
    progress = cli.Progress()
    for number, ids in enumerate(passages):
        layers = [Watched(c.sliding_window, last) for _ in range(c.num_hidden_layers)]
        lm.model.hidden(torch.tensor([ids]), None, layers)
        prob = torch.stack([layer.prob[0] for layer in layers])  # (L, G, last, T)
        alone = entropy(prob)
        for i in range(1, len(prob)):
            divergence = entropy((prob[i] + prob[:i]) / 2) - (alone[i] + alone[:i]) / 2
            total[i, :i] += 1 - divergence.mean(-1)
        progress(number + 1, len(passages))
    return total / len(passages)


def pieces(lm: Any, ids: Sequence[int], caches: Any) -> Iterator[Tensor]:
    """Log-probabilities (t, V) after each token of a passage, a few tokens at a time."""
    for start in range(0, len(ids), 256):
        for piece, where in caches.split(torch.tensor([list(ids[start : start + 256])])):
            yield lm.model.logits(lm.model.hidden(piece, where, caches))[0].log_softmax(-1)


@torch.no_grad()
def costs(lm: Any, readers: Sequence[tuple[Any, Any]], method: Pod, passages: Sequence[Sequence[int]]) -> tuple[list[float], float]:
    """KL(lm with the full cache || a reader), in nats, for readers (model, its caches' maker), after the tokens of these passages that
    have something distant; and the share of the full cache's bytes that the first reader's saves at their ends."""
    total, count, saved = [0.0] * len(readers), 0, 0.0
    progress = cli.Progress()
    for number, ids in enumerate(passages):
        exact = new_cache(lm, Full())
        true = torch.cat(list(pieces(lm, ids, exact)))
        counts = method.reaches(torch.arange(len(ids)), lm.config.sliding_window)
        for which, (reader, make) in enumerate(readers):
            at, caches = 0, make()
            for other in pieces(reader, ids, caches):
                here = slice(at, at + len(other))
                kl = (true[here].exp() * (true[here] - other)).sum(-1)
                total[which], at = total[which] + float(kl[counts[here]].sum()), at + len(other)
            if which == 0:
                saved += 1 - caches.nbytes().used / exact.nbytes().used
        count += int(counts.sum())
        progress(number + 1, len(passages))
    return [x / count for x in total], saved / len(passages)


def new_cache(lm: Any, method: Attention) -> Caches:
    """An empty cache by this method, whatever lm.attn is."""
    own, lm.attn = lm.attn, method
    try:
        return lm.new_cache()
    finally:
        lm.attn = own


def cost(lm: Any, method: Pod, passages: Sequence[Sequence[int]]) -> dict[str, float]:
    """What `method` costs and saves on held-out passages: kl and saved, as `costs` has them. ZooError where there is no table."""
    (kl,), saved = costs(lm, [(lm, lambda: new_cache(lm, method))], method, passages)
    return {"kl": kl, "saved": saved}


def against(lm: Any, adapted: Any, method: Pod, passages: Sequence[Sequence[int]]) -> dict[str, float]:
    """KL from lm with the full cache, through real caches, of: lm with `method` (kl_before), the adapted model with it (kl_after), by the
    adapted model's groups both, and the adapted model with the full cache (kl_full)."""
    if adapted.config != lm.config or own_table("pod", adapted.config) is None:
        raise ZooError("--against takes a folder that --adapt made from this model: with the same config, and a pod.json")

    def pod() -> Caches:
        return new_cache(adapted, method)

    readers = [(lm, pod), (adapted, pod), (adapted, lambda: new_cache(lm, Full()))]
    (before, after, full), saved = costs(lm, readers, method, passages)
    return {"kl_before": before, "kl_after": after, "kl_full": full, "saved": saved}


def check(method: Pod, tokens: int, window: int | None) -> None:
    """Raises ZooError where passages of this many tokens have nothing distant: they cannot say what `method` costs."""
    if bool(method.reaches(torch.arange(tokens), window).any()):
        return
    least = method.near // BLOCK * BLOCK + BLOCK + 1
    if tokens >= least:
        raise ZooError(f"nothing is distant for this model, whose own window shows {window} tokens: a smaller --recent is needed")
    raise ZooError(f"nothing is distant in {tokens} tokens: --tokens {least} at least, or a smaller --first or --recent")


def calibrate(lm: Any, passages: Sequence[Sequence[int]], last: int, threshold: float) -> dict[str, Any]:
    """The table: groups (L, G), the lowest layer of each one's group; near (L - 1, G), how like each layer is to the one below it."""
    found = similarity(lm, passages, last)
    groups = group(found, threshold)
    near = torch.stack([found[i, i - 1] for i in range(1, len(found))]) if len(found) > 1 else found[:0, 0]
    return {"groups": groups.tolist(), "near": near.tolist(), "threshold": threshold}


def report(table: dict[str, Any]) -> list[str]:
    """Lines: how similar layers are, which share, and what that saves where most tokens are distant."""
    groups, near = torch.tensor(table["groups"]), torch.tensor(table["near"])
    shared = (groups != torch.arange(len(groups))[:, None]).float().mean()
    lines = [f"pod, training-free: the weights stay as they are; groups of layers at least {table['threshold']:g} alike"]
    for g in range(groups.shape[1]):
        like = (
            f"like the one below it: {near[:, g].mean():.2f} on average, {near[:, g].min():.2f} to {near[:, g].max():.2f}"
            if len(near)
            else ""
        )
        starts = sorted(set(groups[:, g].tolist()))
        spans = [f"{a}-{b - 1}" if b - a > 1 else f"{a}" for a, b in zip(starts, [*starts[1:], len(groups)], strict=True)]
        lines.append(f"  kv head {g}: layers {' '.join(spans)}; a layer is {like}")
    lines.append(f"  {shared:.0%} of (layer, kv head) pairs read a lower layer's distant keys: up to {shared / 2:.0%} of the bytes saved")
    return lines
