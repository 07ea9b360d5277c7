"""`balancekv`: halve the middle of a prompt again and again, each time keeping the tokens that a self-balancing walk picks to stand for the
others (BalanceKV, arXiv 2502.07861, NeurIPS 2025; its published practical form).

    one halving, in blocks of n = 128 tokens in the order of their positions; v holds the weights of earlier halvings already
      G_ij  = exp(temp s <k_i - k~, k_j - k~> - beta) (<v_i, v_j> + 0.025)        k~ = the block's mean key        s = 1/sqrt(D)
      eta_i = +1 with probability 1/2 - gamma sum_(j<i) G_ij eta_j, cut to [0, 1], else -1
      c: the first token at which one sign has n/2 tokens. Up to c those of the other sign stay, with w = 2; behind c all, with w = 1
    after t halvings   out(q) = sum w e^(s q.k) v / sum 2^t e^(s q.k)        w: the product of a token's weights
a slot: a token between the first 32 and the last 32, at its true position, with a = b = t log 2 and its value times w / 2^t: the same sums
with one log-weight, and exact in bfloat16 and float32, where a power of 2 rounds nothing. First and recent tokens (`sinks`, `window`; no
more than half of the settled slots and a quarter of the budget; what whole pages leave over goes to recent ones) have a = b = 0.

The paper halves everything T times. A budget is seldom a power of 2: here everything is halved while too many are left, and in the last
round as many of the oldest as must go. Of N tokens in `room` slots, some then stand for 2^t and the others for 2^(t-1), with
t = ceil(log2(N / room)); where N = 2^T room, that is the paper's form. With when=decode and stream, what stands for least is halved first:
64 new tokens come down to the level of the old ones, and go on from there with the oldest of those. A token alone at its level takes one of
the next; such a pair keeps its weight on average only.
weights=both (ours): w e^(s q.k) in the denominator, too, so a = b = log w and values stay. The published form divides by more than it adds
up: up to c the w do not quite make up for what goes, behind c each token counts once above and twice below. A byte a slot for t.
mode=tree: the theory's form instead (zoo/attention/balancekv_tree.py), which has no budget and always streams.

exact when: budget >= tokens. cost: `budget` slots read a step; no attention mass. A halving takes n D multiplications a token, all layers,
heads and blocks side by side; only the n steps of a walk are one after the other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo import random
from zoo.attention.balance_walk import halve, kernel, walk
from zoo.attention.balancekv_tree import TreeCache, TreeCaches
from zoo.attention.budgeted import Budgeted, BudgetedCaches, names
from zoo.attention.cache import Caches
from zoo.attention.clustering import row
from zoo.attention.slots import PAGE
from zoo.attention.store import Pages
from zoo.attention.tail import BudgetedCache, Make
from zoo.errors import ZooError

AT_ONCE = 2**14  # tokens and slots of all heads that are worked on together
MODES = ("halve", "tree")
WEIGHTS = ("values", "both")
HALVING = ("budget", "sinks", "window", "walk", "gamma", "temp", "beta", "weights")  # options of one mode only
TREE = ("batch", "c", "fails")
PLUS = 0.025 + 1e-8  # keys alone count a little, for the denominator


@dataclass(frozen=True)
class BalanceKV(Budgeted):
    """Halving by balanced walks between first and recent tokens. when=prompt unless given. sinks, window: first and last tokens that stay.
    walk: tokens of a block. gamma: how firmly a walk is balanced; 0 = random signs. temp, beta: of the kernel. weights: values or both.
    mode: halve or tree. In trees: batch, tokens of a walk; c, the smaller the firmer it is balanced, 0 = by the theorem, which fails with
    probability `fails`."""

    when: str = "prompt"
    sinks: int = 32
    window: int = 32
    walk: int = 128
    gamma: float = 4.0
    temp: float = 1.0
    beta: float = 0.0
    weights: str = "values"
    seed: int = 0
    mode: str = "halve"
    batch: int = 128
    c: float = 0.001
    fails: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.mode in MODES, "mode", names(MODES))
        self.check(self.weights in WEIGHTS, "weights", names(WEIGHTS))
        self.check(0 <= self.sinks <= 2**31, "sinks", f"between 0 and {2**31}")
        self.check(0 <= self.window <= 2**31, "window", f"between 0 and {2**31}")
        self.check(2 <= self.walk <= 1024 and self.walk % 2 == 0, "walk", "even, between 2 and 1024")
        self.check(0 <= self.gamma <= 1e6, "gamma", "between 0 and 1e6")
        self.check(0 <= self.temp <= 1e3, "temp", "between 0 and 1000")
        self.check(-1e3 <= self.beta <= 1e3, "beta", "between -1000 and 1000")
        self.check(-(2**63) <= self.seed < 2**63, "seed", "between -2**63 and 2**63 - 1")
        self.check(2 <= self.batch <= 4096, "batch", "between 2 and 4096")
        self.check(0 <= self.c <= 1e6, "c", "between 0 and 1e6; 0 = by the theorem")
        self.check(0 < self.fails < 1, "fails", "between 0 and 1")
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        other = HALVING if self.mode == "tree" else TREE
        for name in other:
            self.check(getattr(self, name) == defaults[name], name, f"left out where mode={self.mode}")
        if self.mode == "tree":
            self.check(self.when in (defaults["when"], "stream"), "when", "left out, or stream, where mode=tree")
            if self.encoding is not None:
                raise ZooError(f"balancekv: mode=tree keeps keys and values apart, in no pages; {self.encoding} stacks under mode=halve")
            object.__setattr__(self, "when", "stream")  # there is no other
            object.__setattr__(self, "exact_when", "tokens < batch")

    def __str__(self) -> str:
        return super().__str__().replace(f"budget={self.budget},", "") if self.mode == "tree" else super().__str__()

    def recent(self, budget: int) -> int:
        return min(self.window, (budget - (0 if self.when == "prompt" else self.block)) // 4)

    def fields(self, config: Any, dtype: torch.dtype) -> dict[str, tuple[int, torch.dtype]]:
        level = {"level": (0, torch.uint8)} if self.weights == "both" else {}  # else a says it
        return super().fields(config, dtype) | level

    def layer(self, index: int, pages: Pages, rotary: Any, config: Any, batch: int, dtype: torch.dtype, device: Any) -> BudgetedCache:
        return BalanceKVCache(self, index, pages, rotary, config, batch, dtype, device)

    def caches(
        self, config: Any, rotary: Any, batch: int, max_tokens: int | None, prompt_tokens: int | None, dtype: torch.dtype, device: Any
    ) -> Caches:
        if self.mode == "halve":
            return super().caches(config, rotary, batch, max_tokens, prompt_tokens, dtype, device)
        layers = [TreeCache(self, i, config, batch, dtype, device) for i in range(config.num_hidden_layers)]
        return TreeCaches(self, layers, batch, device)

    def gather(self, caches: Sequence[BudgetedCache], config: Any, batch: int, prompt_tokens: int | None, device: Any) -> Caches:
        return BalanceKVCaches(self, caches, batch, prompt_tokens, device)


class BalanceKVCache(BudgetedCache):
    method: BalanceKV

    @classmethod
    def fresh(cls, layers: Sequence[BalanceKVCache], tail: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"level": torch.zeros_like(tail["a"])} if "level" in layers[0].pages.fields else {}

    @classmethod
    def maker(cls, layers: Sequence[BalanceKVCache]) -> Make:
        return Halving(layers).compress


class Halving:
    """What makes the settled slots of these layers. Letters as in `tail.candidates`: A layers times sequences, N candidates."""

    def __init__(self, layers: Sequence[BalanceKVCache]) -> None:
        self.method = layers[0].method
        self.index = [layer.index for layer in layers]

    def compress(self, slots: dict[str, Tensor], seen: Tensor, room: Tensor, which: Tensor) -> dict[str, Tensor]:
        """Halve until each head has at most room (A, G) slots."""
        pos = slots["pos"].long()
        if "row" in slots and self.method.weights == "values":  # of encoded pages: what is halved there keeps its code
            slots["times"] = torch.ones_like(slots["a"])
        sinks = torch.minimum(room // 2, torch.full_like(room, self.method.sinks))[..., None]
        while bool((excess := (slots["pos"] >= 0).sum(-1) - room).gt(0).any()):
            free = (slots["pos"] >= 0) & (pos >= sinks)
            level = slots["level"] if "level" in slots else slots["a"] / math.log(2)
            level = torch.where(free, level.round().long(), 64)
            least = (level == level.amin(-1, keepdim=True)) & free
            pairs = torch.minimum((least.sum(-1) // 2).clamp(min=1), excess.clamp(min=0))  # a single one at its level takes one of the next
            order = torch.where(free, level << 40 | pos, 2**62).argsort(-1)
            self.halve(slots, order, 2 * pairs, level)
        first = torch.where(slots["pos"] >= 0, pos, 2**62).argsort(-1)[:, :, : int(room.max())]
        return {name: t.gather(2, first) if t.dim() == 3 else row(t, first) for name, t in slots.items()}

    def halve(self, slots: dict[str, Tensor], order: Tensor, tokens: Tensor, level: Tensor) -> None:
        """Keep one of two of the first `tokens` (A, G), even, of `order` (A, G, N), in place. level (A, G, N): halvings so far."""
        m, (A, G, _) = self.method, order.shape
        n = min(m.walk, int(tokens.max()))
        at = order[:, :, : -(-int(tokens.max()) // n) * n]
        at = torch.nn.functional.pad(at, (0, -at.shape[2] % n))
        valid = torch.arange(at.shape[2], device=at.device) < tokens[..., None]
        in_blocks = (A, G, at.shape[2] // n, n)
        layer = torch.tensor(self.index, device=at.device).repeat_interleave(A // len(self.index))[:, None, None]
        was = level.gather(2, at)
        u = random.uniform(m.seed, layer, torch.arange(G, device=at.device)[:, None], slots["pos"].gather(2, at).long(), was)
        k, v, a = row(slots["k"], at), row(slots["v"], at), slots["a"].gather(2, at)
        weighted = v.float() * torch.where(valid, a, 0).exp()[..., None]
        inside = valid.view(in_blocks)
        K = kernel(k.view(*in_blocks, -1), weighted.view(*in_blocks, -1), inside, m.temp, m.beta, PLUS)
        stays, w = (x.flatten(2) for x in halve(walk(K, u.view(in_blocks), m.gamma), inside))
        index, where = at.masked_fill(~valid, slots["pos"].shape[2]), slots["pos"].gather(2, at)
        new = {"pos": torch.where(stays, where, -1)}
        if m.weights == "both":
            new |= {"a": a + w.log(), "level": was + 1}
        else:
            new |= {"a": a + math.log(2), "v": v * (w / 2).to(v.dtype)[..., None]}
            if "times" in slots:
                new["times"] = slots["times"].gather(2, at) * w / 2
        for name, t in new.items():
            # One row more, for what is not valid to be written to.
            wide = torch.nn.functional.pad(slots[name], (0, 0) * (t.dim() - 3) + (0, 1))
            wide.scatter_(2, index[..., None].expand(t.shape) if t.dim() == 4 else index, t.to(wide.dtype))
            slots[name] = wide[:, :, :-1]


class BalanceKVCaches(BudgetedCaches):
    """All layers, as many at once as have few enough tokens."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[BalanceKVCache]: ...  # type: ignore[override]
        def __getitem__(self, index: int) -> BalanceKVCache: ...  # type: ignore[override]

    def groups(self) -> Iterator[Sequence[BalanceKVCache]]:
        pages, tail = self.pages[0], int((self[0].store.pos >= 0).sum(-1).max())
        rows = tail + PAGE * max(max(count) for count in pages.count)
        most, layers = self.together(rows, AT_ONCE), list(self)
        yield from (layers[i : i + most] for i in range(0, len(layers), most))
