"""`subgen`: old tokens live on as clusters of similar keys (SubGen, arXiv 2402.06082).

    a cluster C of n tokens is one slot:  k = mean of k_i,  v = mean of v_i,  a = b = log n
    out(q) = softmax over [sinks; clusters; recent tokens] of (s q.k + a), times v
The paper clusters keys online because similar keys get similar scores. After the rotary embedding keys of one meaning lie apart, so
that clusters grow in step with the tokens; keys rotated *back* by their position do cluster. So distances are between un-rotated keys,
while the slot shows the mean of the rotated ones: to first order, the score it gets is the mean score of its tokens.

slots: the first 4 tokens, exact; the last `recent` tokens, exact; everything between in clusters, nothing dropped.
rule: at the end of a prompt, greedy k-center (farthest point first) on what is older than the recent window, old clusters included as
    weighted points; afterwards, each block of 64 tokens that leaves the window opens clusters while there is room, then joins the nearest.
exact when: budget >= 2 x tokens (one token a cluster; what is left pays for the features, below).
cost: a decode step reads at most `budget` slots, whatever the length. Each cluster also keeps its mean un-rotated key, charged as half
    a slot. The prompt is attended exactly and held until its end: the peak is that of `full`. k-center is O(clusters x tokens x D).
A cluster carries the position of its newest token, and leaves a model's sliding window with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.attention.budget import Budget
from zoo.attention.cache import BLOCK, Attention, Cache, Caches, SlotStore, round_up
from zoo.attention.slots import Slots
from zoo.errors import ZooError
from zoo.random import uniform

SINKS = 4
LEAST = 256  # slots; fewer leave no room for clusters beside sinks, recent window and pending ring
TIE = 1e-4  # of a key's squared norm: distances this close are equal and the first wins, so that rounding does not decide
SHARE = Budget(25, percent=True)
ROOM = 2**62  # "any number of tokens fits"


def layout(budget: int) -> tuple[int, int]:
    """Slots -> (recent tokens, clusters). A cluster costs 1.5 slots: key, value, feature. Row 0, sinks and pending ring are paid first."""
    recent = round_up(budget // 8)
    return recent, (budget - 1 - SINKS - BLOCK - recent) * 2 // 3


def k_center(x: Tensor, alive: Tensor, most: Tensor) -> Tensor:
    """Greedy k-center: open a centre at the point farthest from all centres so far, until there are `most`; each point joins the nearest.

    x (B, G, P, D) float, alive (B, G, P) bool, most (B,) -> labels (B, G, P) int64 from 0, -1 where not alive. With no more points
    than centres each point is its own cluster, duplicates too.
    """
    B, G, P, D = x.shape
    if not bool(alive.any()):
        return torch.full((B, G, P), -1, dtype=torch.int64, device=x.device)
    dist = torch.where(alive, torch.inf, -torch.inf)  # to the nearest centre so far, squared; -1 for a centre
    square = x.square().sum(-1)
    tie = TIE * (square * alive).amax(-1, keepdim=True)
    picks, opened = [], []
    for _ in range(min(int(most.max()), int(alive.sum(-1).max()))):
        top = dist.amax(-1, keepdim=True)
        far = (dist >= top - tie).to(torch.uint8).argmax(-1, keepdim=True)  # (B, G, 1)
        picks.append(far)
        opened.append(top >= 0)  # false where every point is a centre already
        centre = x.gather(2, far[..., None].expand(B, G, 1, D))
        d = square.gather(2, far) + torch.baddbmm(square.view(B * G, P, 1), x.view(B * G, P, D), centre.view(B * G, D, 1), alpha=-2).view(
            B, G, P
        )
        dist = torch.minimum(dist, d.clamp_(min=0)).scatter_(2, far, -1.0)
    far, valid = torch.cat(picks, 2), torch.cat(opened, 2) & (torch.arange(len(picks), device=x.device) < most[:, None, None])
    centres = x.gather(2, far[..., None].expand(B, G, -1, D))
    label = torch.cat([nearest(some, centres, valid) for some in x.split(1024, 2)], 2)  # a bounded piece of the distances at a time
    own = torch.arange(far.shape[2], device=x.device).expand_as(far)
    label = torch.cat((label, label[:, :, :1]), 2)  # one more place takes what does not count
    label.scatter_(2, torch.where(valid, far, P), own)
    return torch.where(alive, label[:, :, :P], -1)


def nearest(x: Tensor, centres: Tensor, alive: Tensor) -> Tensor:
    """For points x (B, G, N, D), the nearest of centres (B, G, M, D) that is alive (B, G, M): labels (B, G, N)."""
    d = centres.square().sum(-1)[:, :, None] - 2 * x @ centres.mT
    d = d.masked_fill(~alive[:, :, None], torch.inf)
    tie = TIE * x.square().sum(-1, keepdim=True)
    return (d <= d.amin(-1, keepdim=True) + tie).to(torch.uint8).argmax(-1)


def sums(label: Tensor, values: Tensor, clusters: int) -> Tensor:
    """Add values (B, G, P) or (B, G, P, D) up by label (B, G, P); label -1 is left out. -> (B, G, clusters[, D])."""
    bins = torch.where(label < 0, clusters, label)  # a bin past the end takes what is left out
    bins = bins if values.dim() == 3 else bins[..., None].expand(values.shape)
    total = values.new_zeros((*values.shape[:2], clusters + 1, *values.shape[3:]))
    return total.scatter_add_(2, bins, values)[:, :, :clusters]


def rounded(mean: Tensor, dtype: torch.dtype, pos: Tensor, which: int) -> Tensor:
    """mean (B, G, M, D) float32 in a shorter dtype, rounded up or down at random so that the expectation is the mean: the mean of a large
    cluster moves by less than half a step of bfloat16 a block, and rounded to nearest it would stand still. The draw is a function of the
    cluster's newest position (B, G, M), row, head and dimension."""
    near = mean.to(dtype)
    if dtype in (torch.float32, torch.float64):
        return near
    error = mean - near.float()
    other = torch.nextafter(near, torch.where(error > 0, torch.inf, -torch.inf).to(dtype))
    _, G, M, D = mean.shape
    index = [torch.arange(n, device=mean.device) for n in (G, M, D)]
    noise = uniform(which, pos[..., None].long(), index[0][:, None, None], index[1][:, None], index[2])
    return torch.where(noise * (other.float() - near.float()).abs() < error.abs(), other, near)


class SubGenCache(Cache):
    """Rows of the store: 0 padding | 1..4 sinks | clusters | tail: recent and pending tokens, exact, at `tail + position % ring`."""

    x: Tensor  # (B, G, M, D): each cluster's mean un-rotated key
    tail: Tensor  # (B,): first row of the tail. These two are tensors so that a compiled step does not depend on their values
    ring: Tensor  # (B,): rows of the tail
    most: Tensor  # (B,): clusters this sequence may own
    recent: Tensor  # (B,): tokens behind the newest that stay exact

    def __init__(self, budget: Budget, share_of: int | None, rotary: Any, config: Any, batch: int, dtype: torch.dtype, device: Any) -> None:
        super().__init__()
        self.budget, self.share_of, self.window = budget, share_of, config.sliding_window
        self.rotary = [rotary]  # the model's module, in a list so that it is not part of this cache's state
        heads, size = config.num_key_value_heads, config.head_dim
        self.store = SlotStore(batch, heads, 1 + SINKS + BLOCK, size, dtype, device, shared=False)
        self.register_buffer("x", torch.zeros(batch, heads, 0, size, dtype=dtype, device=device))
        for name, value in (("tail", 1 + SINKS), ("ring", BLOCK), ("most", 0), ("recent", 0)):
            self.register_buffer(name, torch.full((batch,), value, dtype=torch.int64, device=device))

    def row(self, pos: Tensor) -> Tensor:
        return torch.where(pos < SINKS, 1 + pos, self.tail[:, None] + pos % self.ring[:, None])

    def read(self) -> Slots:
        if self.x.shape[2]:
            return super().read()
        s = self.store  # no clusters yet: all heads hold the same tokens, with no weights, as `full` does
        return Slots(s.k, s.v, s.pos[:, :1], window=self.window)

    def tail_pos(self) -> Tensor:
        """(B, ring) positions in the tail, -1 = empty; the same in every head."""
        return self.store.pos[:, 0, int(self.tail[0]) :]

    def reserve(self, tokens: int, exactly: bool) -> int:
        if not self.prompt_open:
            return ROOM  # the ring holds the recent window and one block
        held = self.tail_pos()
        oldest = int(held.masked_fill(held < 0, 2**31 - 1).min()) if bool((held >= 0).any()) else SINKS
        ring = int(self.ring[0])
        if tokens - oldest > ring:
            self.lay_out(self.x.shape[2], round_up(max(tokens - oldest, 0 if exactly else 2 * ring)))
        return oldest + int(self.ring[0])

    def lay_out(self, clusters: int, ring: int) -> None:
        """Move the rows to where they belong with this many clusters and tail rows; clusters beyond the number are not kept."""
        tail, held = 1 + SINKS + clusters, self.tail_pos()
        head = torch.arange(int(self.tail[0]), device=held.device).expand(len(held), -1)
        row = torch.cat((torch.where(head < tail, head, 0), torch.where(held >= 0, tail + held.long() % ring, 0)), 1)
        self.store.move(row, tail + ring)
        self.tail.fill_(tail)
        self.ring.fill_(ring)

    def clusters(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Key, value and feature sums (B, G, M, D), counts (B, G, M) and newest positions of the clusters, in float32."""
        s, rows = self.store, slice(1 + SINKS, int(self.tail[0]))
        assert s.a is not None
        pos = s.pos[:, :, rows]
        n = torch.where(pos >= 0, s.a[:, :, rows].exp().round(), 0)
        wide = n[..., None]
        return s.k[:, :, rows].float() * wide, s.v[:, :, rows].float() * wide, self.x.float() * wide, n, pos

    def put(self, k: Tensor, v: Tensor, x: Tensor, n: Tensor, pos: Tensor) -> None:
        """Write clusters given as sums, counts and newest positions; one without tokens is an empty row."""
        count = n.clamp(min=1)[..., None]
        dtype = self.store.k.dtype
        k, v, self.x = (rounded(total / count, dtype, pos, which) for which, total in enumerate((k, v, x)))
        self.store.replace(1 + SINKS, k, v, n.clamp(min=1).log(), torch.where(n > 0, pos, -1))

    def end_prompt(self, seen: Tensor) -> None:
        """k-center over the old clusters and every exact token that is older than the recent window."""
        plan = [layout(max(self.budget.tokens(self.share_of or n), LEAST)) for n in seen.tolist()]
        self.recent.copy_(torch.tensor([r for r, _ in plan]))
        self.most.copy_(torch.tensor([m for _, m in plan]))
        M, ring = int(self.most.max()), int(self.recent.max()) + BLOCK

        held = self.tail_pos().long()
        old = (held >= 0) & (held < (seen - self.recent)[:, None])
        start = int(self.tail[0])
        k, v = self.store.k[:, :, start:].float(), self.store.v[:, :, start:].float()
        out = (seen - self.window if self.window else -torch.ones_like(seen))[:, None]  # no query will see this position or one before it
        weight = (old & (held > out))[:, None].expand(k.shape[:3]).float()
        x = self.rotary[0].unrotate(k, held.clamp(min=0)) * weight[..., None]
        ck, cv, cx, cn, cpos = self.clusters()
        cn = torch.where(cpos > out[:, None], cn, 0)
        points, counts = torch.cat((cx / cn.clamp(min=1)[..., None], x), 2), torch.cat((cn, weight), 2)
        label = k_center(points, counts > 0, self.most)
        newest = torch.cat((cpos.long(), held[:, None].expand(weight.shape)), 2)
        bins = torch.where(label < 0, M, label)
        merged = (
            sums(label, torch.cat((ck, k * weight[..., None]), 2), M),
            sums(label, torch.cat((cv, v * weight[..., None]), 2), M),
            sums(label, torch.cat((cx, x), 2), M),
            sums(label, counts, M),
            newest.new_full((*label.shape[:2], M + 1), -1).scatter_reduce_(2, bins, newest, "amax")[:, :, :M],
        )
        self.store.pos[:, :, start:].masked_fill_(old[:, None], -1)
        self.lay_out(M, ring)
        self.put(*merged)

    def maintain(self, seen: Tensor) -> None:
        """The block of tokens that has left the recent window opens clusters while there is room, then joins the nearest."""
        first = seen - self.recent - BLOCK
        pos = first[:, None] + torch.arange(BLOCK, device=seen.device)
        row = torch.where(pos >= SINKS, self.row(pos.clamp(min=SINKS)), 0)
        gone = (pos >= SINKS) & (self.store.pos[:, 0].gather(1, row) == pos) & (seen % BLOCK == 0)[:, None]
        if not bool(gone.any()):
            return
        ck, cv, cx, n, cpos = self.clusters()
        B, G, M, D = cx.shape
        take = row[:, None, :, None].expand(B, G, BLOCK, D)
        k, v = self.store.k.gather(2, take).float(), self.store.v.gather(2, take).float()
        x = self.rotary[0].unrotate(k, pos)
        weight = gone[:, None].expand(B, G, BLOCK).float()

        used = (n > 0).sum(-1, keepdim=True)  # (B, G, 1); clusters fill the rows from the first
        turn = used + gone.cumsum(1)[:, None] - 1
        opens = gone[:, None] & (turn < self.most[:, None, None])
        label = torch.where(opens, turn, -1)
        centres, alive = cx + sums(label, x, M), n + sums(label, weight, M)
        joins = nearest(x, centres / alive.clamp(min=1)[..., None], alive > 0)
        label = torch.where(opens, label, torch.where(gone[:, None], joins, -1))

        bins = torch.where(label < 0, M, label)
        newest = torch.cat((cpos.long(), cpos.new_full((B, G, 1), -1).long()), 2)
        newest = newest.scatter_reduce(2, bins, pos[:, None].expand(B, G, BLOCK), "amax")[:, :, :M]
        self.put(
            ck + sums(label, k, M),
            cv + sums(label, v, M),
            cx + sums(label, x, M),
            n + sums(label, weight, M),
            newest,
        )
        empty = torch.zeros_like(self.store.pos[:, 0], dtype=torch.bool).scatter_(1, row, gone)
        self.store.free(empty[:, None])

    def used(self) -> int:
        features = int((self.store.pos[:, :, 1 + SINKS : int(self.tail[0])] >= 0).sum()) * self.x.shape[3] * self.x.element_size()
        return super().used() + features + sum(t.nbytes for t in (self.tail, self.ring, self.most, self.recent))


@dataclass(frozen=True)
class SubGen(Attention):
    """Clusters of un-rotated keys between sinks and a recent window. `budget`: slots a layer and head, at least 256; a share such as
    `25%` is of the tokens seen when a prompt ends."""

    budget: Budget = SHARE

    exact_when: ClassVar[str] = "budget >= 2 x tokens"

    def __post_init__(self) -> None:
        if self.budget.percent and not 0 < self.budget.number <= 200:
            raise ZooError(f"subgen: budget={self.budget} must be above 0% and at most 200%")
        if not self.budget.percent and not LEAST <= self.budget.number <= 2**31:
            raise ZooError(
                f"subgen: budget={self.budget} must be at least {LEAST} slots (4 sinks, 64 recent, 64 pending, clusters), at most {2**31}"
            )

    def caches(
        self, config: Any, rotary: Any, batch: int, max_tokens: int | None, prompt_tokens: int | None, dtype: torch.dtype, device: Any
    ) -> Caches:
        layers = [SubGenCache(self.budget, prompt_tokens, rotary, config, batch, dtype, device) for _ in range(config.num_hidden_layers)]
        return Caches(layers, batch, device, blocks=True)
