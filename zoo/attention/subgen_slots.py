"""How `subgen` makes slots of tokens, for several layers at once: all at a prompt's end (`compress`), or a block at a time, by merging
(`stream`) or by joining what is near (`join`).

Letters: A layers times sequences, G key/value heads, N tokens and slots of a head, D head size, F features of a point. seen (A,) are
lengths, room (A, G) how many slots a head may own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo import random
from zoo.attention.backends import clustering
from zoo.attention.budgeted import SINKS
from zoo.attention.clustering import TIE, cover, coverage, gathered, latest, principal
from zoo.attention.queries import Statistics
from zoo.attention.slots import PAGE

if TYPE_CHECKING:
    from zoo.attention.subgen import SubGenCache

FEATURES = 16  # principal coordinates of an un-rotated key that are kept beside a cluster
HEAVY = 0.5  # of a head's slots: tokens that got most attention


def unrotated(layer: SubGenCache, k: Tensor, pos: Tensor) -> Tensor:
    """Keys k (A, G, N, D) without their positions pos (A, G, N), a cluster's mean position: (A, G, N, D) float32."""
    A, G, N, D = k.shape
    flat = layer.rotary[0].unrotate(k.float().view(A * G, 1, N, D), pos.reshape(A * G, N).clamp(min=0))
    return flat.view(A, G, N, D)


class Maker:
    """Makes the slots of a few layers."""

    def __init__(self, layers: Sequence[SubGenCache]) -> None:
        one = layers[0]
        self.layers, self.method, self.by = layers, one.method, clustering(one.backend, one.store.k.device, one.store.k.dtype)
        self.queries = Statistics.of([layer.queries for layer in layers])
        self.group = self.queries.mean.shape[1] // one.store.k.shape[1]

    def points(self, slots: dict[str, Tensor], alive: Tensor) -> Tensor:
        """What distances are taken between, (A, G, N, F) float32."""
        if "x" in slots:
            return slots["x"].float()
        x = unrotated(self.layers[0], slots["k"], slots["middle"].round().long())
        return x if self.method.delta else x @ principal(x, alive, self.method.features(x.shape[3]))

    def compress(self, slots: dict[str, Tensor], seen: Tensor, room: Tensor, which: Tensor) -> dict[str, Tensor]:
        """All at once: first and heavy tokens stay, everything else joins the nearest of centres that cover it."""
        pos = slots["pos"].long()
        alive = (pos >= 0) & which[:, None, None]
        count = torch.where(alive, slots["a"].exp().round(), 0)
        u, attention = self.weights(slots, seen, count)
        exact = self.exact(pos, count, attention, room)
        rest = alive & ~exact
        clusters = torch.minimum(room - exact.sum(-1), rest.sum(-1))
        if self.method.delta:
            label, clusters = cover(self.points(slots, rest), rest, self.method.delta, clusters, self.by)
        else:
            heads = torch.arange(pos.shape[1], device=pos.device)[:, None]
            layer = torch.tensor([layer.index for layer in self.layers], device=pos.device)
            layer = layer.repeat_interleave(len(pos) // len(layer))[:, None, None]
            noise = random.gumbel(self.method.seed, layer, heads, pos)
            label = coverage(self.points(slots, rest), rest, clusters, u.clamp(min=1e-20).log() + noise, clusters // 4, self.by)
        label = torch.where(exact, clusters[..., None] + exact.cumsum(-1) - 1, label)
        return self.merged(slots | {"weight": u}, label, torch.where(exact, 1.0, u), count, int(room.max()))

    def weights(self, slots: dict[str, Tensor], seen: Tensor, count: Tensor) -> tuple[Tensor, list[Tensor]]:
        """u, and by what tokens are heavy: (A, G, N) each, for slots of count tokens. Half of the heavy ones are those that got most
        attention from the queries that could see them, half those of the greatest squares: that a single query needed, as a name or number
        is."""
        expected = self.queries.attention(slots["k"], seen, count)
        w = (expected / self.group + 0.01 * count / count.sum(-1, keepdim=True).clamp(min=1)) * slots["v"].float().norm(dim=-1)
        u = w / (w.sum(-1, keepdim=True) / count.sum(-1, keepdim=True).clamp(min=1)).clamp(min=1e-30) + 0.01 * count
        could_see = (seen[:, None, None] - slots["pos"]).clamp(min=1)
        return torch.where(count > 0, u, 0.0), [slots["mass"] / could_see, slots["spikes"]] if self.method.measures else [expected]

    def exact(self, pos: Tensor, count: Tensor, scores: list[Tensor], room: Tensor) -> Tensor:
        """Which slots stay as they are (A, G, N): the first tokens, and the single ones of the highest scores, each score's in its turn."""
        single = count == 1
        sink = single & (pos < SINKS)
        free, own = single & ~sink, torch.arange(pos.shape[2], device=pos.device).expand(pos.shape)
        rank = torch.full_like(pos, pos.shape[2])
        for score in scores:
            order = torch.where(free, score, -torch.inf).argsort(dim=-1, descending=True, stable=True)
            rank = torch.minimum(rank, torch.empty_like(order).scatter_(2, order, own))
        order = torch.where(free, rank, pos.shape[2]).argsort(dim=-1, stable=True)
        rank = torch.empty_like(order).scatter_(2, order, own)
        return sink | (free & (rank < ((room - SINKS) * HEAVY).long()[..., None]))

    def merged(self, slots: dict[str, Tensor], label: Tensor, u: Tensor, count: Tensor, size: int) -> dict[str, Tensor]:
        """One slot for each label (A, G, N) below `size`: weighted means of keys, values and coordinates, sums of the rest. What is alone
        stays as it is."""
        G, N = label.shape[1:]
        n = gathered(label, count, size)
        new = {
            "a": n.clamp(min=1).log(),
            "pos": latest(label, slots["pos"].long(), size),
            "middle": gathered(label, slots["middle"] * count, size) / n.clamp(min=1),
            "weight": gathered(label, slots["weight"], size),
        }
        if self.layers[0].watch is not None:
            self.layers[0].watch([layer.index for layer in self.layers], slots["pos"], label, new["pos"])
        own = torch.arange(N, device=label.device).expand(label.shape)
        head = torch.arange(label.shape[0] * G, device=label.device).view(-1, G, 1)
        member = (head * N + latest(label, own, size).clamp(min=0)).flatten()  # one of each cluster
        clusters = (gathered(label, torch.ones_like(u), size) > 1).flatten().nonzero()[:, 0]  # of several
        means = [name for name in ("k", "v", "x") if name in slots]
        total, sums = self.by.sums(label, u, clusters, size, *(slots[name] for name in means))
        layer = torch.tensor([one.index for one in self.layers], device=label.device)
        state = (new["pos"].flatten()[clusters], n.flatten()[clusters].long())
        place = (layer[clusters // (size * G * (len(label) // len(layer)))], clusters // size % G, *state)
        for which, (name, total_of) in enumerate(zip(means, sums, strict=True)):
            values, mean = slots[name].flatten(0, 2), total_of / total.clamp(min=1e-30)
            mean = self.by.rounded(mean, values.dtype, self.method.seed, *place, torch.full_like(clusters, which))
            new[name] = values.index_select(0, member).index_copy_(0, clusters, mean).view(*label.shape[:2], size, -1)
        if "row" in slots:  # of encoded pages: what is alone keeps its code
            own_row = slots["row"].flatten()[member].view(label.shape[0], G, size)
            new["row"] = torch.where(gathered(label, torch.ones_like(u), size) == 1, own_row, -1)
        return new | {name: gathered(label, slots[name], size) for name in self.method.beside}

    def stream(self, slots: dict[str, Tensor], seen: Tensor, room: Tensor, due: Tensor) -> dict[str, Tensor]:
        """Tokens that leave the recent ones are clusters of one; as many pairs merge as there are too many slots."""
        pos = slots["pos"].long()
        alive = pos >= 0
        count = torch.where(alive, slots["a"].exp().round(), 0)
        weight, attention = self.weights(slots, seen, count)
        free = alive & ~self.exact(pos, count, attention, room)
        surplus = (alive.sum(-1) - room).clamp(min=0) * due[:, None]
        return self.gather(slots, self.by.ward(self.points(slots, free), weight, free, surplus), weight, count, alive)

    def join(self, slots: dict[str, Tensor], seen: Tensor, room: Tensor, due: Tensor) -> dict[str, Tensor]:
        """By delta: a token that leaves the recent ones joins the nearest slot, the first tokens' aside, if that is no farther than delta,
        and opens one otherwise. Distances are to means, which move."""
        pos = slots["pos"].long()
        alive, size = pos >= 0, pos.shape[2]
        count, own = torch.where(alive, slots["a"].exp().round(), 0), torch.arange(size, device=pos.device)
        pages = self.layers[0].pages
        old = PAGE * max(1, *(n for layer in self.layers for n in pages.count[layer.index]))  # the first so many are settled
        weight, _ = self.weights(slots, seen, count)
        x = self.points(slots, alive)
        tie = TIE * (x.square().sum(-1) * alive).amax(-1)[..., None]
        near = tie.clamp(min=self.method.delta**2)
        open_ones = (alive & ((pos >= SINKS) | (count > 1)))[:, :, :old]  # the first tokens stay exact
        waiting = alive[:, :, old:].clone()
        if self.by.nearest:
            parts = (x[:, :, old:].contiguous(), x[:, :, :old].contiguous(), waiting, open_ones.contiguous(), None)
            into, *_ = self.by.nearest(*parts, tie[..., 0].contiguous(), near[..., 0].contiguous())
            joins = into >= 0
        else:
            apart = torch.cdist(x[:, :, old:], x[:, :, :old]).square_().masked_fill_(~open_ones[:, :, None], torch.inf)
            least = apart.amin(-1)
            into = (apart <= (least + tie)[..., None]).to(torch.uint8).argmax(-1)  # of those equally near the first, whatever rounding says
            joins = waiting & (least <= near)
        into = torch.where(joins, into, own[old:])
        waiting &= ~joins
        among = torch.cdist(x[:, :, old:], x[:, :, old:]).square_()
        while bool(waiting.any()):  # the first that waits opens a cluster and takes what is near: as many rounds as a block has tokens
            first = waiting.to(torch.uint8).argmax(-1, keepdim=True)
            joins = waiting & (among.gather(2, first[..., None].expand(*first.shape, size - old))[:, :, 0] <= near)
            joins |= waiting & (own[: size - old] == first)
            into = torch.where(joins, old + first, into)
            waiting &= ~joins
        return self.gather(slots, torch.cat((own[:old].expand(*pos.shape[:2], old), into), 2), weight, count, alive)

    def gather(self, slots: dict[str, Tensor], into: Tensor, weight: Tensor, count: Tensor, alive: Tensor) -> dict[str, Tensor]:
        """`merged` by indices: into (A, G, N) says which slot each becomes part of."""
        stay = alive & (into == torch.arange(into.shape[2], device=into.device))
        label = torch.where(alive, (stay.cumsum(-1) - 1).gather(2, into), -1)
        return self.merged(slots | {"weight": weight}, label, weight.clamp(min=1e-20), count, max(int(stay.sum(-1).max()), 1))
