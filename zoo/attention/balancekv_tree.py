"""`balancekv:mode=tree`: BalanceKV as its theory has it (arXiv 2502.07861): a streaming tree of balanced walks, one for the denominator and
one for each size of value.

    SoftmaxBalance, of t tokens in the order of their positions
      y_i   = sum_(j<i) eta_j e^(s k_i.k_j) <v_i, v_j>               eta_i = +1 with probability 1/2 - y_i / (2 c R^2), else -1
      R^2   = max_i e^(s |k_i|^2) |v_i|^2                            c = 30 log(t / fails); the paper fails where |y_i| > c R^2: cut here
    MergeAndReduce   where t slots of one level wait, they are walked; those of sign +1 stay, one level up: a slot of level l weighs 2^l
    the denominator  one tree of all keys, every value 1
    the numerator    one tree for each bucket 2^(e-1) < |v| <= 2^e of values; a value of 0 has no part in it
                     z = sum 2^l e^(s q.k) v        tau = sum 2^l e^(s q.k)        out = z / tau
The paper keeps the smaller sign, which is less than half of the tokens: weights 2^l are then biased low, by several percent a level. Either
sign comes out as often as the other, so those of +1 are half in expectation and 2^l is unbiased, with the same bound. Levels are as full as
chance has it, with fewer than t slots each; buckets that the paper drops because they hardly count are kept. c > 0: this number in place of
30 log(t / fails), and keys are centred in each walk: exp(s q.k~) is then a factor of the whole set. With c = 0, the theory, keys of real
models (s |k|^2 of 20 and more) make R^2 so large that signs are as good as random.

a slot: of the denominator a = -inf, b = l log 2 and no value; of a bucket a = l log 2, b = -inf. Up to 64 pending tokens are exact (a = b =
0) and absorbed where a length reaches a multiple of 64, so that chunks change nothing. Each layer and head has its own trees; a draw is a
function of (seed, layer, head, position, level, tree).
exact when: fewer than t tokens (none is walked). cost: about t/2 log2(n / t) slots a tree: memory like log n. A walk takes t D
multiplications a token and level. The storage is dense, as long as the longest head of all layers wants it, and freed where that shrinks.
Useless on text, and kept because it is the theory: nothing but pending tokens is exact, not even the first ones, and z and tau have errors
of their own (docs/methods/balancekv.md).
In a model with a sliding window of its own, slots that have left it go, and what stands for them is then not quite right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo import random
from zoo.attention.backends import parts
from zoo.attention.balance_walk import kernel, walk
from zoo.attention.cache import BLOCK, Cache, Caches, round_up
from zoo.attention.slots import Parts, Slots, finish, merge
from zoo.attention.store import SlotStore, buffers
from zoo.attention.subgen_paper import Fixed

if TYPE_CHECKING:
    from zoo.attention.balancekv import BalanceKV


class Trees(SlotStore):
    """The slots of one layer's trees, S rows a head, those that hold something first, oldest first. `a` is l log 2. The denominator's has
    no values: v is None."""

    def tree(self) -> Tensor:
        """(B, G, S) int64: which tree a slot is of."""
        return torch.zeros_like(self.pos, dtype=torch.int64) if self.v is None else exponent(self.v)

    def read(self, window: int | None = None) -> Slots:
        return Slots(self.k, self.k[..., :0] if self.v is None else self.v, self.pos, self.a, window=window)

    def join(self, k: Tensor, v: Tensor, pos: Tensor) -> None:
        """Append tokens k, v (B, G, N, D) at pos (B, G, N), -1 = none, at level 0."""
        new = {"k": k, "v": v, "pos": pos.to(torch.int32), "a": torch.zeros(pos.shape, device=pos.device)}
        self.lay({name: torch.cat((t, new[name]), 2) for name, t in buffers(self).items()})

    def lay(self, some: dict[str, Tensor], rows: int = 0) -> None:
        """Hold these slots and nothing else, in at least `rows` rows."""
        alive = some["pos"] >= 0
        order = torch.where(alive, some["pos"].long(), 2**62).argsort(-1)
        rows = max(rows, round_up(int(alive.sum(-1).max()) + 1))
        order = order[:, :, :rows]
        for name, t in some.items():
            new = t.gather(2, order[..., None].expand(*order.shape, t.shape[3]) if t.dim() == 4 else order)
            wide = new.new_full((*new.shape[:2], rows, *new.shape[3:]), -1 if name == "pos" else 0)
            wide[:, :, : new.shape[2]] = new
            setattr(self, name, wide)


def exponent(v: Tensor) -> Tensor:
    """e with 2^(e-1) < |v| <= 2^e, (B, G, S) int64, of values (B, G, S, D)."""
    return v.double().norm(dim=-1).log2().ceil().clamp(min=-500).long()


class TreeCache(Cache):
    """One layer: `store`, the ring of pending tokens; `keys`, the denominator's tree, without values; `values`, the numerator's."""

    def __init__(self, method: BalanceKV, index: int, config: Any, batch: int, dtype: torch.dtype, device: Any) -> None:
        super().__init__()
        self.method, self.index, self.window = method, index, config.sliding_window
        heads, size = config.num_key_value_heads, config.head_dim
        self.store = Fixed(batch, heads, 1 + BLOCK, size, dtype, device, shared=True)
        self.keys, self.values = (Trees(batch, heads, BLOCK, size, dtype, device, shared=False) for _ in range(2))
        self.keys.register_buffer("v", None)

    def row(self, pos: Tensor) -> Tensor:
        return 1 + pos % BLOCK  # row 0 is for padding

    def reserve(self, ends: Tensor, most: int | None) -> Tensor:
        return torch.full_like(ends, 2**62)  # trees make their room when tokens are absorbed

    def respond(self, q: Tensor, pos: Tensor) -> Tensor:
        z, tau = (parts(q, pos, tree.read(self.window), self.backend) for tree in (self.values, self.keys))
        z = z._replace(den=torch.zeros_like(z.den), max_den=torch.full_like(z.max_den, -torch.inf))
        tau = Parts(torch.zeros_like(z.num), torch.full_like(tau.max_num, -torch.inf), tau.den, tau.max_den)
        return finish(merge(parts(q, pos, self.store.read(self.window), self.backend), merge(z, tau)), q.dtype)

    def absorb(self, due: Tensor, seen: Tensor) -> None:
        """Take the pending tokens of the sequences that `due` (B,) names into the trees, and empty their ring."""
        k, v = self.store.k[:, :, 1:], self.store.v[:, :, 1:]
        pos = torch.where(due[:, None], self.store.pos[:, 0, 1:], -1)[:, None].expand(k.shape[:3])
        for tree, some in ((self.keys, pos), (self.values, pos.where(v.any(-1), -1))):
            if self.window is not None:
                tree.free(tree.pos <= (seen - self.window)[:, None, None])
            tree.join(k, v, some)
            while self.reduce(tree):
                pass
            tree.lay(buffers(tree))
        self.store.free(due[:, None, None])

    def reduce(self, tree: Trees) -> bool:
        """Walk the oldest t slots of each tree and level that has as many. False: there are none."""
        m, t = self.method, self.method.batch
        assert tree.a is not None
        level = (tree.a / math.log(2)).round().long()
        name = torch.where(tree.pos >= 0, tree.tree() * 64 + level, 2**40)  # of a tree and level
        order = name.argsort(dim=-1, stable=True)  # oldest first, as the rows are
        name = name.gather(2, order)
        # The t slots of one name begin where the name does.
        begins = torch.cat((torch.ones_like(name[..., :1], dtype=torch.bool), name[..., 1:] != name[..., :-1]), 2)
        if name.shape[2] < t:
            return False
        full = (
            begins[..., : name.shape[2] - t + 1] & (name[..., t - 1 :] == name[..., : name.shape[2] - t + 1]) & (name[..., t - 1 :] < 2**40)
        )
        b, g, first = full.nonzero(as_tuple=True)
        if not len(b):
            return False
        at = order[b[:, None], g[:, None], first[:, None] + torch.arange(t, device=b.device)]  # (M, t)
        b, g = b[:, None], g[:, None]
        k, v = tree.k[b, g, at], None if tree.v is None else tree.v[b, g, at]
        G = kernel(k, v, torch.ones_like(at, dtype=torch.bool), centred=m.c > 0)
        c = m.c or 30 * math.log(t / m.fails)
        R2 = G.diagonal(dim1=-2, dim2=-1).amax(-1)
        u = random.uniform(
            m.seed, torch.full_like(b, self.index), g, tree.pos[b, g, at].long(), level[b, g, at], torch.full_like(b, int(v is not None))
        )
        stays = walk(G, u, 1 / (2 * c * R2.clamp(min=1e-30))) > 0
        tree.pos[b, g, at] = torch.where(stays, tree.pos[b, g, at], -1)
        tree.a[b, g, at] += math.log(2)
        return True

    def slots(self) -> Slots:
        x, z, new = self.keys, self.values, super().slots()
        assert x.a is not None
        assert z.a is not None
        assert new.a is not None
        a = torch.cat((torch.full_like(x.a, -torch.inf), z.a, new.a), 2)
        b = torch.cat((x.a, torch.full_like(z.a, -torch.inf), new.a), 2)
        v = torch.cat((torch.zeros_like(x.k), z.v, new.v), 2)
        return Slots(torch.cat((x.k, z.k, new.k), 2), v, torch.cat((x.pos, z.pos, new.pos), 2), a, b, self.window)

    def used(self) -> int:
        key = self.store.k.shape[3] * self.store.k.element_size()
        return super().used() + int((self.keys.pos >= 0).sum()) * (key + 8) + int((self.values.pos >= 0).sum()) * (2 * key + 8)


class TreeCaches(Caches):
    """All layers."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[TreeCache]: ...  # type: ignore[override]
        def __getitem__(self, index: int) -> TreeCache: ...  # type: ignore[override]

    def __init__(self, method: BalanceKV, caches: list[TreeCache], batch: int, device: Any) -> None:
        super().__init__(caches, batch, device)
        self.method = method

    def ends(self, pos: Tensor) -> Tensor | None:
        return (pos >= 0) & ((pos + 1) % BLOCK == 0)

    def maintain(self) -> None:
        due = (self.tokens_seen % BLOCK == 0) & (self[0].store.pos[:, 0] >= 0).any(1)
        if bool(due.any()):
            for layer in self:
                layer.absorb(due, self.tokens_seen)
            for which in ("keys", "values"):  # a compiled step takes all layers to have one shape
                trees = [getattr(layer, which) for layer in self]
                rows = max(tree.rows for tree in trees)
                for tree in trees:
                    if tree.rows < rows:
                        tree.lay(buffers(tree), rows)
