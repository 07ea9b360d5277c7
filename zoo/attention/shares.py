"""How a budget is shared out among heads."""

from __future__ import annotations

import torch
from torch import Tensor

LOW, HIGH = 0.3, 2.5  # what a head may own, of the average


def one_delta(counts: Tensor, found: Tensor, rows: float) -> tuple[Tensor, float]:
    """counts, found (heads, K) as `radii` gives them, and the slots that a head owns on average -> slots (heads,) float64, and delta. A
    head owns as many as it needs centres to have no point farther than delta from one, but LOW to HIGH times the average."""

    counts = counts.clamp(min=1)  # a head may have no points at all, where everything has left a model's window

    def needed(delta: float) -> Tensor:
        above = (found > delta).sum(-1)
        low, high = (above - 1).clamp(min=0)[:, None], above.clamp(max=found.shape[1] - 1)[:, None]
        r0, r1 = found.gather(1, low), found.gather(1, high)
        part = ((r0 - delta) / (r0 - r1).clamp(min=1e-9)).clamp(0, 1)
        count = torch.lerp(counts.gather(1, low).log(), counts.gather(1, high).log(), part).exp()
        return count[:, 0].double().clamp(LOW * rows, HIGH * rows)

    low, high = 0.0, float(found.max())
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if float(needed(middle).mean()) > rows else (low, middle)
    return needed(high), high


def fill(wanted: Tensor, total: int) -> Tensor:
    """Whole pages (heads,) that add up to `total` >= heads, at least one each, in proportion to `wanted`: largest remainders first."""
    wanted = wanted * total / wanted.sum()
    pages = wanted.floor().clamp(min=1)
    while (rest := total - int(pages.sum())) != 0:
        gap = torch.where((rest > 0) | (pages > 1), wanted - pages, -torch.inf if rest > 0 else torch.inf)
        some = gap.topk(min(abs(rest), int((gap.abs() < torch.inf).sum())), largest=rest > 0).indices
        pages[some] += 1 if rest > 0 else -1
    return pages.long()
