"""What `python -m zoo.calibrate kvsharer` finds out: which layers can do without keys and values of their own (arXiv 2410.18517)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import cli
from zoo.attention.cache import Caches
from zoo.attention.kvsharer import share


def read(lm: Any, ids: Tensor, pairs: list[tuple[int, int]]) -> tuple[Tensor, Caches]:
    """Final hidden states (N, T, C) of passages ids (N, T), read with caches that share as `pairs` say; and the caches."""
    caches = share(pairs, lm.config, len(ids), ids.shape[1], lm.dtype, lm.device)
    return torch.cat([lm.model.hidden(piece, where, caches) for piece, where in caches.split(ids)], 1), caches


def distances(caches: Caches) -> Tensor:
    """(L, L): Euclidean, between layers' keys and values, averaged over the batch's passages."""
    flat = []
    for cache in caches:
        s = cache.store
        held = s.pos[0, 0] >= 0
        flat.append(torch.cat([x[:, :, held].float().mean(0).flatten() for x in (s.k, s.v)]))
    points = torch.stack(flat)
    return torch.cdist(points[None], points[None], compute_mode="donot_use_mm_for_euclid_dist")[0]


@torch.no_grad()
def calibrate(lm: Any, passages: Sequence[Sequence[int]], wanted: int, threshold: float) -> dict[str, Any]:
    """The table: pairs (deeper, shallower), at most `wanted`, in the order found, the cosine to the original after each, and how many were
    tried. Pairs of layers are tried from the most distant on; a layer that reads is not read, and reads one other."""
    ids = torch.tensor(passages)
    true, caches = read(lm, ids, [])
    apart = distances(caches)
    order = sorted(((d, s) for d in range(len(apart)) for s in range(d)), key=lambda pair: -float(apart[pair]))
    pairs, cosines = list[tuple[int, int]](), list[float]()
    progress, tried = cli.Progress(), 0
    for number, (deeper, shallower) in enumerate(order):
        reading, kept = {d for d, _ in pairs}, {s for _, s in pairs}
        if len(pairs) >= wanted:
            break
        if deeper in reading or shallower in reading or deeper in kept:
            continue
        hidden, _ = read(lm, ids, [*pairs, (deeper, shallower)])
        tried += 1
        if (like := float(F.cosine_similarity(hidden.float(), true.float(), dim=-1).mean())) > threshold:
            pairs.append((deeper, shallower))
            cosines.append(like)
        progress(number + 1, len(order))
    return {"pairs": pairs, "cosines": cosines, "tried": tried}


def report(table: dict[str, Any], layers: int) -> list[str]:
    pairs = table["pairs"]
    lines = [f"kvsharer: {len(pairs)} of {layers} layers keep nothing: {len(pairs) / layers:.1%} of the bytes saved"]
    lines += [f"  layer {d} reads layer {s}: cosine {like:.3f}" for (d, s), like in zip(pairs, table["cosines"], strict=True)]
    return lines
