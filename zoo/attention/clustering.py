"""Clustering as SubGen needs it: many heads at once, each with its own number of clusters, and no loop over points.

Letters: B batch, G heads, N points of a head, F features of a point, M clusters of the head that has most. Points that are not alive take
part in nothing. Numbers of clusters are tensors (B, G). by: where `nearest` is a kernel, distances are its own (backends.py).

    coverage    centres that leave no point far from one: greedy farthest point, many at a time
    cover       as many of them as a given radius takes
    radii       how the farthest point's distance falls with the number of centres: what one global delta is read from
    k_center    greedy farthest point to the letter, one centre at a time
    ward        merging, cheapest pair first, until few enough clusters are left
    sums        what the points of clusters add up to
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import random

if TYPE_CHECKING:
    from zoo.attention.backends import Clustering

ROUNDS = 12  # how often `coverage` looks which points are far
TIE = 1e-4  # of the largest squared norm: points this close to a centre count as being on it, so that rounding decides nothing


def principal(x: Tensor, alive: Tensor, size: int) -> Tensor:
    """The `size` directions (B, G, D, size), float32, in which the points x (B, G, N, D) that are alive (B, G, N) vary most."""
    n = alive.sum(-1)[..., None, None].clamp(min=1)
    x = x * alive[..., None]
    mean = x.sum(2, keepdim=True) / n
    cov = x.mT @ x / n - mean.mT @ mean
    return torch.linalg.eigh(cov).eigenvectors[..., -size:].contiguous()


class Centres:
    """Centres chosen so far; for each point its nearest centre, and the squared distance to it."""

    def __init__(self, x: Tensor, alive: Tensor, by: Clustering | None = None) -> None:
        self.x, self.square, self.alive, self.nearest = x, x.square().sum(-1), alive, by and by.nearest
        self.tie = TIE * (self.square * alive).amax(-1, keepdim=True)
        self.dist = torch.where(alive, torch.inf, -torch.inf)  # -inf also marks a centre: it is never chosen again
        self.label = torch.full(alive.shape, -1, dtype=torch.int64, device=x.device)
        self.used = alive.new_zeros(alive.shape[:2], dtype=torch.int64)

    def level(self) -> Tensor:
        """`dist` in steps of `tie`: what decisions are made by, so that equally far points are equally far, whatever rounding says."""
        return torch.where(self.dist.abs() < torch.inf, (self.dist / self.tie.clamp(min=1e-30)).round() * self.tie, self.dist)

    def far(self, count: int) -> tuple[Tensor, Tensor]:
        """The `count` points farthest from all centres, farthest first: squared distances and indices (B, G, count)."""
        index = torch.arange(self.dist.shape[2], device=self.dist.device)
        # Equally far ones in order, and last, in order, those on a centre: their distances are nothing but rounding.
        value = torch.where(self.dist > self.tie, self.level(), torch.where(self.dist > -torch.inf, -1.0 - index, -torch.inf))
        # A step is worth more than any difference of indices: no two keys are equal, and `topk` has nothing to choose.
        key = (value / self.tie.clamp(min=1e-30)).round().double() * len(index) - index
        picks = torch.where(value > 0, key, value.double()).topk(min(count, len(index)), dim=-1).indices
        return value.gather(2, picks), picks

    def add(self, picks: Tensor, valid: Tensor) -> None:
        """Open centres at points picks (B, G, C) where valid (B, G, C); valid ones come first. Points join the nearest."""
        centres, square = row(self.x, picks), self.square.gather(2, picks)
        B, G, N, F = self.x.shape
        if self.nearest:
            which, best, *_ = self.nearest(self.x.contiguous(), centres, self.alive.contiguous(), valid.contiguous())
        else:
            square = torch.where(valid, square, torch.inf)
            d = torch.baddbmm(square.view(B * G, 1, -1), self.x.reshape(B * G, N, F), centres.view(B * G, -1, F).mT, alpha=-2)
            best, which = d.view(B, G, N, -1).min(-1)
            best = (best + self.square).clamp(min=0)
        best = torch.where(best > self.tie, best, 0.0)
        better = best + self.tie < self.dist
        self.label = torch.where(better, which + self.used[..., None], self.label)
        self.dist = torch.where(better, best, self.dist)
        own = self.used[..., None] + torch.arange(picks.shape[2], device=picks.device)
        self.label.scatter_(2, picks, torch.where(valid, own, self.label.gather(2, picks)))
        self.dist.scatter_(2, picks, torch.where(valid, -torch.inf, self.dist.gather(2, picks)))
        self.used = self.used + valid.sum(-1)

    def spread(self, want: Tensor, radius: float = -1.0) -> None:
        """Open want (B, G) centres at far points that are not near one another: of twice as many candidates, one that a farther one would
        bring closer than the last that is wanted steps back. With a radius, only points that are farther than it from all centres."""
        most = int(want.max())
        if most <= 0:
            return
        top, index = self.far(2 * most)
        C = index.shape[2]
        cut = torch.maximum(top.gather(2, (want - 1).clamp(0, C - 1)[..., None]), self.tie).clamp(min=radius**2 if radius > 0 else 0)
        x = row(self.x, index)
        rank = torch.arange(C, device=index.device)
        looked_at = rank < 2 * want[..., None]  # each head at its own, whatever others want
        near = (torch.cdist(x, x).square() < cut[..., None]) & looked_at[..., None] & looked_at[..., None, :]
        shaded = (near & (rank < rank[:, None])).any(-1) & (top > 0)  # what is on a centre already takes no points from others
        order = (rank + C * shaded).argsort(dim=-1)[..., :most]
        good = (top > (radius**2 if radius >= 0 else -torch.inf)) & ~shaded & looked_at
        self.add(index.gather(2, order), (rank[: order.shape[2]] < want[..., None]) & good.gather(2, order))


def coverage(x: Tensor, alive: Tensor, clusters: Tensor, first: Tensor, starts: Tensor, by: Clustering | None = None) -> Tensor:
    """Labels (B, G, N) int64 from 0, -1 where not alive: each point's nearest of `clusters` (B, G) centres. starts (B, G) of them are the
    points of largest `first` (B, G, N), the others far ones. With no more points than clusters each is its own."""
    c = Centres(x, alive, by)
    if int(clusters.max()) < 1:
        return c.label
    starts = torch.minimum(starts.clamp(min=1), clusters)
    picks = torch.where(alive, first, -torch.inf).topk(min(int(starts.max()), x.shape[2]), dim=-1).indices
    rank, some = torch.arange(picks.shape[2], device=x.device), row(x, picks)
    # Of equal points only the first: rounding would share out its points.
    twice = ((torch.cdist(some, some).square() <= c.tie[..., None]) & (rank < rank[:, None])).any(-1)
    good = (rank < starts[..., None]) & alive.gather(2, picks) & ~twice
    order = (~good).to(torch.uint8).argsort(dim=-1, stable=True)
    c.add(picks.gather(2, order), good.gather(2, order))
    for left in (*range(ROUNDS, 0, -1), 1, 1):  # the last two take what stepped back in the one before
        c.spread((clusters - c.used + left - 1) // left)
    return torch.where(alive, c.label, -1)


def cover(x: Tensor, alive: Tensor, radius: float, most: Tensor, by: Clustering | None = None) -> tuple[Tensor, Tensor]:
    """As many centres as it takes to have no point farther than `radius` from one, but no more than most (B, G): labels (B, G, N) from 0,
    -1 where not alive, and the numbers of centres (B, G)."""
    c = Centres(x, alive, by)
    picks = alive.to(torch.uint8).argmax(-1, keepdim=True)
    c.add(picks, alive.gather(2, picks) & (most > 0)[..., None])
    while True:
        far = ((c.level() > radius**2) & (c.dist > c.tie)).sum(-1)
        want = torch.minimum(torch.minimum(far, most - c.used), c.used.clamp(min=8)) * (c.used > 0)
        if not bool((want > 0).any()):
            return torch.where(alive, c.label, -1), c.used
        c.spread(want, radius)


def radii(x: Tensor, alive: Tensor, most: Tensor, by: Clustering | None = None) -> tuple[Tensor, Tensor]:
    """How far the farthest point is from 1, 9, 17, ... centres, growing by two fifths a time, up to most (B, G): (centres (B, G, K) float,
    radii (B, G, K))."""
    c = Centres(x, alive, by)
    picks = alive.to(torch.uint8).argmax(-1, keepdim=True)
    c.add(picks, alive.gather(2, picks))
    counts, found = [], []
    while True:
        counts.append(c.used.to(torch.float32))
        found.append(c.dist.amax(-1).clamp(min=0).sqrt())
        want = torch.minimum((c.used.clamp(min=2) * 0.4).ceil().long(), most - c.used) * (found[-1] > 0)
        if not bool((want > 0).any()):
            return torch.stack(counts, -1), torch.stack(found, -1)
        c.spread(want)


def k_center(x: Tensor, alive: Tensor, most: Tensor, by: Clustering | None = None) -> tuple[Tensor, Tensor]:
    """Greedy k-center to the letter: open a centre at the point farthest from all centres so far, the first alive one to begin with, until
    there are most (B, G). -> the centres' points (B, G, M), -1 beyond a head's own number, and labels (B, G, N), -1 where not alive."""
    c = Centres(x, alive, by)
    picks = []
    for step in range(min(int(most.max()), x.shape[2])):
        if step == 0:
            top, index = alive.to(torch.float32).max(-1, keepdim=True).values, alive.to(torch.uint8).argmax(-1, keepdim=True)
        else:
            top, index = c.far(1)
        valid = alive.gather(2, index) & (top > -torch.inf) & (step < most[..., None])
        c.add(index, valid)
        picks.append(torch.where(valid, index, -1))
    return torch.cat(picks, 2), torch.where(alive, c.label, -1)


def gathered(label: Tensor, values: Tensor, clusters: int) -> Tensor:
    """Sums of values (B, G, N) or (B, G, N, F) by label (B, G, N); label -1 is left out. -> (B, G, clusters[, F])."""
    bins = torch.where(label < 0, clusters, label)  # a bin past the end takes what is left out
    bins = bins if values.dim() == 3 else bins[..., None].expand(values.shape)
    total = values.new_zeros((*values.shape[:2], clusters + 1, *values.shape[3:]))
    return total.scatter_add_(2, bins, values)[:, :, :clusters]


def sums(label: Tensor, weight: Tensor, chosen: Tensor, size: int, *values: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Of the clusters `chosen` (C,), indices into (B, G, size): the sum of their points' weights (B, G, N), (C, 1), and of weights times
    each of the values (B, G, N, F), (C, F), in float32 at least. label (B, G, N) is below `size`."""
    head = torch.arange(label.shape[0] * label.shape[1], device=label.device).view(*label.shape[:2], 1)
    place = chosen.new_full((head.numel() * size + 1,), -1)  # its last row stands for label -1
    place[chosen] = torch.arange(len(chosen), device=chosen.device)
    into = place[torch.where(label >= 0, label + head * size, -1).flatten()]
    points = (into >= 0).nonzero()[:, 0]
    into, weight = into[points], weight.flatten()[points, None]
    total, out = weight.new_zeros(len(chosen), 1).index_add_(0, into, weight), []
    for t in values:
        t = t.flatten(0, 2)[points]
        wide = torch.promote_types(t.dtype, torch.float32)
        out.append(torch.zeros(len(chosen), t.shape[1], dtype=wide, device=t.device).index_add_(0, into, t.to(wide) * weight))
    return total, out


def latest(label: Tensor, pos: Tensor, clusters: int) -> Tensor:
    """The largest of pos (B, G, N) int64 by label: (B, G, clusters), -1 where a cluster has nothing."""
    bins = torch.where(label < 0, clusters, label)
    return pos.new_full((*label.shape[:2], clusters + 1), -1).scatter_reduce_(2, bins, pos, "amax")[:, :, :clusters]


def ward(x: Tensor, weight: Tensor, alive: Tensor, surplus: Tensor) -> Tensor:
    """Which clusters to merge so that `surplus` (B, G) fewer are left: labels (B, G, N) int64, the index of the cluster that each becomes
    part of, its own where it stays.

    x (B, G, N, F) centres, weight (B, G, N), alive (B, G, N): what may merge. The cost of a pair is Ward's, w_a w_b / (w_a + w_b) |x_a -
    x_b|^2. In each round the lightest clusters, half as many again as must go and three more, look for their cheapest partners: the
    cost grows with the lighter weight, so a cheap pair has a light member. Pairs merge that are cheaper than any other that touches them,
    at most half of what must go, so that what has merged is looked at anew. Of equally cheap ones the CPU kernel takes the first; here
    rounding decides.
    """
    shape, N = alive.shape, max(1, int(alive.sum(-1).max()))
    order = (~alive).to(torch.uint8).argsort(dim=-1, stable=True)[..., :N]  # those that may merge, in front
    x, weight, alive = row(x, order).flatten(0, 1), (weight * alive).gather(2, order).flatten(0, 1), alive.gather(2, order).flatten(0, 1)
    labels, surplus = torch.arange(N, device=x.device).repeat(len(x), 1), surplus.flatten()
    heads = alive.sum(-1).argsort(stable=True)  # by size, so that `cheapest` pads little
    x, weight, alive, surplus = x[heads], weight[heads], alive[heads], surplus[heads]
    places = torch.arange(shape[2], device=x.device).expand(shape)
    while True:
        some = (surplus > 0).nonzero()[:, 0]
        if not len(some):
            return places.scatter(2, order, order.gather(2, labels.view(order.shape)))
        if len(some) < len(heads):  # the others are done
            heads, x, weight, alive, surplus = heads[some], x[some], weight[some], alive[some], surplus[some]
        wide = 3 + surplus * 3 // 2
        light = torch.where(alive, weight, torch.inf).topk(min(int(wide.max()), N), largest=False).indices
        cost, partner = cheapest(x, weight, alive, light)
        rank = torch.arange(light.shape[1], device=x.device).expand(light.shape)
        cost = torch.where(rank < wide[:, None], cost, torch.inf)  # each head its own
        by_cost = cost.argsort(dim=-1, stable=True)
        rank = torch.empty_like(by_cost).scatter_(1, by_cost, rank)
        best = (
            torch.full_like(alive, N, dtype=torch.int64).scatter_reduce_(1, light, rank, "amin").scatter_reduce_(1, partner, rank, "amin")
        )
        good = (cost < torch.inf) & (rank == best.gather(1, light)) & (rank == best.gather(1, partner))
        equal = (cost == 0) & (partner < light)  # any number of equal ones may go into the first
        equal &= ~torch.zeros_like(alive).scatter_(1, light, equal).gather(1, partner)
        several = equal.any(-1, keepdim=True)
        good = torch.where(several, equal, good)
        most = torch.where(several[:, 0], surplus, (surplus + 1) // 2)
        good &= good.gather(1, by_cost).cumsum(-1).gather(1, rank) <= most[:, None]
        n = good.sum(-1)
        low, high = torch.minimum(light, partner), torch.maximum(light, partner)
        target = torch.arange(N, device=x.device).repeat(len(x), 1)
        target.scatter_reduce_(1, torch.where(good, high, 0), torch.where(good, low, 0), "amin")
        labels[heads] = target.gather(1, labels[heads])
        h, a, b = good.nonzero()[:, 0], low[good], high[good]
        moment = x * weight[..., None]
        moment.index_put_((h, a), moment[h, b], accumulate=True)
        weight.index_put_((h, a), weight[h, b], accumulate=True)
        weight[h, b], alive[h, b] = 0.0, False
        x[h, a] = moment[h, a] / weight[h, a].clamp(min=1e-30)[:, None]
        surplus = torch.where(n > 0, surplus - n, 0)  # 0: nothing is left that could merge


def cheapest(x: Tensor, weight: Tensor, alive: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
    """For the clusters some (H, C) of x (H, N, F) the least Ward cost of merging it, and with which: (H, C) each; cost inf where there is
    none. Costs are in a unit of each head's own. A few heads at a time, so that their costs stay in a core's cache."""
    square = x.square().sum(-1)
    unit = (TIE * torch.where(alive, square, 0).amax(-1, keepdim=True)).clamp(min=1e-30)  # squared distances below 1 are ties
    square = (square / unit)[..., None]
    x, one, inverse = x / unit.sqrt()[..., None], torch.ones_like(square), 1 / weight.clamp(min=1e-30)
    left = row(torch.cat((-2 * x, square, one), -1)[None], some[None])[0]
    right = torch.cat((x, one, torch.where(alive[..., None], square, torch.inf)), -1).mT
    least = torch.empty(some.shape, device=x.device)
    partner, step = torch.empty_like(some), max(1, 2**18 // (some.shape[1] * x.shape[1]))
    ends = torch.where(alive, torch.arange(1, x.shape[1] + 1, device=x.device), 1).amax(-1).tolist()  # behind them nothing is alive
    for part in (slice(i, i + step) for i in range(0, len(x), step)):
        end = max(max(ends[part]), int(some[part].max()) + 1)
        d = torch.bmm(left[part], right[part, :, :end])  # |x_a - x_b|^2
        F.threshold(d, 1.0, 0.0, inplace=True)  # among equal points the first is the nearest, whatever rounding says
        d.div_(inverse[part].gather(1, some[part])[..., None] + inverse[part, None, :end])
        torch.min(d.scatter_(2, some[part][..., None], torch.inf), 2, out=(least[part], partner[part]))
    return torch.where(alive.gather(1, some), least, torch.inf), partner


def row(values: Tensor, index: Tensor) -> Tensor:
    """values (B, G, N, F) at index (B, G, C): (B, G, C, F)."""
    return values.gather(2, index[..., None].expand(*index.shape, values.shape[3]))


def rounded(mean: Tensor, dtype: torch.dtype, seed: int, *where: Tensor) -> Tensor:
    """mean (M, D) float32 in a shorter dtype, rounded up or down at random so that the expectation is the mean: the mean of a large cluster
    moves by less than half a step of bfloat16 at a time, and rounded to nearest it would stand still. The draw is a function of the seed,
    of `where` (M,) int64 each (what cluster it is, and its state), and of the dimension."""
    near = mean.to(dtype)
    if dtype in (torch.float32, torch.float64):
        return near
    error = mean - near.float()
    other = torch.nextafter(near, torch.where(error > 0, torch.inf, -torch.inf).to(dtype))
    noise = random.uniform(seed, *(t[:, None] for t in where), torch.arange(mean.shape[1], device=mean.device))
    return torch.where(noise * (other.float() - near.float()).abs() < error.abs(), other, near)
