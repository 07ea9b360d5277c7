"""`subgen`: old tokens live on as clusters of similar keys (after SubGen, arXiv 2402.06082; what differs and why: docs/methods/subgen.md).

    a cluster C of n tokens is one slot:  k = sum u_i k_i / sum u_i,  v = sum u_i v_i / sum u_i,  a = b = log n
    u_i = expected attention to token i, times |v_i|, over its mean, + 0.01         out(q) = softmax over all slots of (s q.k + a), times v
The paper clusters keys online, because similar keys get similar scores. After the rotary embedding keys of one meaning lie apart and
clusters grow in step with the tokens; rotated *back* by their position they do cluster. So distances are between un-rotated keys, and a
slot shows the mean of the rotated ones.

slots, in each layer and head:  the first 4 tokens and the recent ones (an eighth of the budget), exact
                                the tokens that got most attention (half of what is left), exact
                                everything else in clusters, nothing dropped: outliers have a cluster of their own (`coverage`)
Heads own different numbers of slots: one global delta asks how many centres each needs, so that no un-rotated key is farther than that from
one (heads=prompt; table: the same from another text, `python -m zoo.calibrate subgen`; uniform: all alike).
At a prompt's end all of this is found at once. Afterwards (and inside the prompt with when=stream) tokens that leave the recent ones come
in as clusters of one, and the cheapest pairs by Ward's criterion merge until the budget is kept.
delta=D, in the unit of keys, instead of a budget: as many clusters as it takes to have no un-rotated key farther than D from its centre.
Their number then grows as the text asks, sublinearly where keys cluster: the paper's promise. (Later tokens join what is near: a heavy
token, too, then becomes a cluster, and as means move, a token may come to be farther than D from its own.)

scores=attention: which tokens are heavy is measured, from all queries of a prompt and every 8th one later: half of them by the attention
that they got on average, half by its squares. scores=expected: estimated from the queries' mean and covariance, as u is; no mass at all.
exact when: budget >= tokens (by delta: up to 512 tokens). cost: `budget` slots read a step. Beside a slot: its count, position, mean
position, weight and the attention that it got, and, unless when=prompt, 16 principal coordinates of its un-rotated key, which the budget
pays for.
Query statistics (H D^2 numbers a layer, from every 8th query) are kept while a prompt is read; their means and main directions later.
A cluster carries the position of its newest token, and leaves a model's sliding window with it; it is not decremented before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from zoo.attention.backends import clustering
from zoo.attention.budgeted import QUARTER, SINKS, Budgeted, BudgetedCaches, names
from zoo.attention.cache import Caches
from zoo.attention.clustering import cover, principal, radii
from zoo.attention.queries import RANK, Queries
from zoo.attention.shares import HIGH, fill, one_delta
from zoo.attention.slots import PAGE, Slots
from zoo.attention.store import Pages
from zoo.attention.subgen_slots import FEATURES, HEAVY, Maker, unrotated
from zoo.attention.tables import load_shares
from zoo.attention.tail import BudgetedCache, Make, candidates, put, renewed, settled

AT_ONCE = 2**14  # tokens and slots of all heads that are worked on together
SCORES, HEADS = ("attention", "expected"), ("prompt", "table", "uniform")


@dataclass(frozen=True)
class SubGen(Budgeted):
    """Clusters of un-rotated keys between first, heavy and recent tokens. scores: attention or expected. heads: prompt, table or uniform.
    delta: clusters as many as it takes, in place of a budget; 0 = by budget."""

    scores: str = "attention"
    heads: str = "prompt"
    delta: float = 0.0
    seed: int = 0

    observes: ClassVar[int] = 8
    powers: ClassVar[dict[str, int]] = {"mass": 1, "spikes": 2}
    extra: ClassVar[dict[str, torch.dtype]] = dict.fromkeys(("weight", "middle"), torch.float32)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.scores in SCORES, "scores", names(SCORES))
        self.check(self.heads in HEADS, "heads", names(HEADS))
        self.check(0 <= self.delta < 1e6, "delta", "0, or a distance between keys below 1000000")
        if self.delta:
            self.check(self.budget == QUARTER, "budget", "left out where delta is given")
            self.check(self.heads == "prompt", "heads", "left out where delta is given")

    def __str__(self) -> str:
        return super().__str__().replace(f"budget={self.budget},", "", 1) if self.delta else super().__str__()

    @property
    def bounded(self) -> bool:
        return self.when != "prompt"

    @property
    def measures(self) -> bool:
        """Whether attention is added up at all."""
        return self.scores == "attention"

    @property
    def beside(self) -> list[str]:
        return list(self.powers) if self.measures else []

    def features(self, head_dim: int) -> int:
        return min(FEATURES, head_dim) if not self.delta else head_dim

    def slots(self, tokens: int) -> int:
        return 512 if self.delta else super().slots(tokens)  # by delta, this only says how many tokens come before clustering begins

    def recent(self, budget: int) -> int:
        return budget // 8

    def spare(self, budget: int) -> int:
        return 0  # pages are shared out among all heads

    def fields(self, config: Any, dtype: torch.dtype) -> dict[str, tuple[int, torch.dtype]]:
        fields = super().fields(config, dtype)
        if self.bounded:
            fields["x"] = (self.features(config.head_dim), dtype)
        return fields | dict.fromkeys(self.beside, (0, torch.float32))

    def layer(self, index: int, pages: Pages, rotary: Any, config: Any, batch: int, dtype: torch.dtype, device: Any) -> BudgetedCache:
        return SubGenCache(self, index, pages, rotary, config, batch, dtype, device)

    def gather(self, caches: Sequence[BudgetedCache], config: Any, batch: int, prompt_tokens: int | None, device: Any) -> Caches:
        table = load_shares("subgen", config) if self.heads == "table" else None
        return SubGenCaches(self, caches, batch, prompt_tokens, device, table)


class SubGenCache(BudgetedCache):
    method: SubGen
    # Told whenever slots are made: the layers' indices, positions of tokens and slots (A, G, N), the label of each, and the new slots'
    # positions (A, G, M). What is in a cluster is not kept otherwise.
    watch: Callable[[list[int], Tensor, Tensor, Tensor], None] | None = None
    basis: Tensor  # (B, G, D, F): the principal directions of un-rotated keys; nothing with when=prompt

    def __init__(self, method: SubGen, index: int, pages: Pages, rotary: Any, config: Any, batch: int, dtype: Any, device: Any) -> None:
        super().__init__(method, index, pages, rotary, config, batch, dtype, device)
        G, D = config.num_key_value_heads, config.head_dim
        F = method.features(D) if method.bounded and not method.delta else 0
        self.register_buffer("basis", torch.zeros(batch, G, D, F, dtype=dtype, device=device))
        self.queries = Queries(config, rotary, batch, dtype, device)
        self.measure(method.measures)

    # What is watched while tokens come in

    def measure(self, on: bool) -> None:
        """Begin to add up the attention that tail tokens get, or stop and free it."""
        k = self.store.k
        if on != (self.store.mass is not None):
            for name in self.method.powers:
                setattr(self.store, name, torch.zeros(k.shape[:3], device=k.device) if on else None)

    def respond(self, q: Tensor, pos: Tensor) -> Tensor:
        if self.prompt_open and not torch.compiler.is_compiling() and self.queries.learning:
            self.queries.learn(q, pos)
        return super().respond(q, pos)

    def begin_prompt(self, seen: Tensor) -> None:
        self.queries.forget(False)
        self.queries.count.clamp_(min=0)
        self.queries.start.copy_(seen)
        self.measure(self.method.measures)

    def end_prompt(self, seen: Tensor) -> None:
        self.queries.summarize(torch.ones_like(self.queries.count, dtype=torch.bool))
        if not self.method.bounded:  # nothing more is compressed before the next prompt, which is measured anew
            self.measure(False)
        self.queries.forget(True)

    # Between steps

    def prepare(self, which: Tensor) -> None:
        """Find the principal directions, once for each sequence, from the tokens that are here when it is first compressed."""
        new = which & ~self.basis.flatten(1).any(1) if self.basis.numel() else torch.zeros_like(which)
        if bool(new.any()):
            pos = self.store.pos[:, 0].long()
            x = self.rotary[0].unrotate(self.store.k.float(), pos.clamp(min=0))
            found = principal(x, (pos >= 0)[:, None].expand(x.shape[:3]), self.basis.shape[3])
            self.basis.copy_(torch.where(new[:, None, None, None], found.to(self.basis.dtype), self.basis))

    @classmethod
    def maker(cls, layers: Sequence[SubGenCache]) -> Make:
        return Maker(layers).compress

    @classmethod
    def fresh(cls, layers: Sequence[SubGenCache], tail: dict[str, Tensor]) -> dict[str, Tensor]:
        one, pos = layers[0], tail["pos"].long()
        out = {"middle": pos.float(), "weight": torch.ones_like(tail["a"])}
        out |= {name: torch.zeros_like(tail["a"]) for name in one.method.beside if name not in tail}  # of a time when nothing was measured
        if "x" in one.pages.fields:
            x = unrotated(one, tail["k"], pos)
            out["x"] = x if one.method.delta else x @ torch.cat([layer.basis for layer in layers]).float()
        return out

    def slots(self) -> ClusterSlots:
        s, plain = self.pages.read(self.index), super().slots()
        tail = plain.pos.shape[2] - s["pos"].shape[2]
        pad = lambda t, value: torch.cat((t, torch.full((*t.shape[:2], tail), value, device=t.device)), 2)  # noqa: E731
        middle = torch.where(pad(s["pos"], -1) >= 0, pad(s["middle"], 0.0), plain.pos.float())
        return ClusterSlots(plain.k, plain.v, plain.pos, plain.a, plain.b, plain.window, pad(s["weight"], 1.0), middle)

    def used(self) -> int:
        return super().used() + self.basis.nbytes + sum(t.nbytes for t in self.queries.buffers())


@dataclass(frozen=True)
class ClusterSlots(Slots):
    """Slots, and what a cluster knows beside its count exp(a): its weight, and the mean position of its tokens (B, G, S)."""

    weight: Tensor | None = None
    middle: Tensor | None = None


class SubGenCaches(BudgetedCaches):
    """All layers: one delta decides what each head of each layer owns."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[SubGenCache]: ...  # type: ignore[override]
        def __getitem__(self, index: int) -> SubGenCache: ...  # type: ignore[override]

    method: SubGen

    def __init__(
        self, method: SubGen, caches: Sequence[BudgetedCache], batch: int, prompt_tokens: int | None, device: Any, table: Any
    ) -> None:
        super().__init__(method, caches, batch, prompt_tokens, device)
        self.table: Tensor | None = table  # (L, G): each head's share of the average

    def kind(self) -> str:
        return super().kind() + ("" if self.table is None else f", table {hashlib.sha256(self.table.numpy().tobytes()).hexdigest()[:12]}")

    def capacity(self) -> list[int]:
        """Rows of settled slots that each sequence's budget pays for, a head on average."""
        m, D = self.method, self[0].store.k.shape[3]
        rows = [m.settled(n) for n in self.held.tolist()]
        if not m.bounded:
            return rows
        F = m.features(D)  # beside a slot of 2 D numbers stand F; the basis is D F numbers a head, what is kept of queries (R + RANK) D
        fixed = (0 if m.delta else F / 2) + (self[0].queries.mean.shape[1] // self[0].store.k.shape[1] + RANK) / 2
        return [int((n - fixed) / (1 + F / (2 * D))) for n in rows]

    def shares(self, which: Tensor) -> Tensor:
        share = self.pages[0].share.clone()
        L, _, G = share.shape
        if self.method.delta:
            return self.by_delta(which)
        if self.method.heads == "prompt":
            counts, found = self.curves(which, [float(n) for n in self.capacity()])
        for b, rows in enumerate(self.capacity()):
            if not which[b]:
                continue
            total = max(rows * L * G // PAGE, L * G)
            if self.method.heads == "prompt":
                wanted, _ = one_delta(counts[:, b].flatten(0, 1), found[:, b].flatten(0, 1), rows)
                pages = fill(wanted / PAGE, total)
            else:
                relative = torch.ones(L, G) if self.table is None else self.table
                pages = fill(relative.flatten().double() * rows / PAGE, total)
            share[:, b] = pages.view(L, G).to(share)
        return share

    def curves(self, which: Tensor, rows: list[float]) -> tuple[Tensor, Tensor]:
        """For each head, how the radius falls with the number of centres (`radii`): (L, B, G, K) each; rows: what a head of each sequence
        owns on average. In a sequence of 1,024 and more every fourth token or slot stands for all: centres are then a fourth, too."""
        out: dict[int, tuple[Tensor, Tensor]] = {}
        step = torch.where(self.tokens_seen >= 1024, 4, 1)
        most = (torch.tensor(rows, device=step.device) * HIGH / step).long() + 1
        pos = self[0].store.pos[:, 0].long()  # tails of all layers hold the same tokens
        keep = (pos >= SINKS) & (pos < (self.tokens_seen - self[0].recent)[:, None]) & (pos % step[:, None] == 0) & which[:, None]
        oldest = (
            self.tokens_seen - self[0].window if self[0].window else torch.full_like(self.tokens_seen, -1)
        )  # and older ones have expired
        keep &= pos > oldest[:, None]
        index = keep.any(0).nonzero()[:, 0]
        for layers in self.groups(len(index)):
            A, old = len(layers), self.pages[0].read([cache.index for cache in layers], anew=True)
            settled = torch.arange(old["pos"].shape[2], device=pos.device) % step.repeat(A)[:, None, None] == 0
            held = (old["pos"] > oldest.clamp(min=-1).repeat(A)[:, None, None]) & settled & which.repeat(A)[:, None, None]
            k = torch.cat((old["k"], torch.cat([cache.store.k[:, :, index] for cache in layers])), 2)
            shape = (*k.shape[:2], len(index))
            alive = torch.cat((held, keep[:, index].repeat(A, 1)[:, None].expand(shape)), 2)
            middle = torch.cat((old["middle"].round().long(), pos[:, index].repeat(A, 1)[:, None].expand(shape)), 2)
            x = unrotated(layers[0], k, middle)
            x = x @ principal(x, alive, min(FEATURES, x.shape[3]))
            by = clustering(layers[0].backend, k.device, k.dtype)
            counts, found = radii(x, alive, most.repeat(A)[:, None].expand(k.shape[:2]), by)
            counts = counts * step.repeat(A)[:, None, None]
            each = zip(counts.unflatten(0, (A, -1)), found.unflatten(0, (A, -1)), strict=True)
            out |= {cache.index: pair for cache, pair in zip(layers, each, strict=True)}
        K = max(c.shape[-1] for c, _ in out.values())
        stretch = lambda t: torch.cat((t, t[..., -1:].expand(*t.shape[:-1], K - t.shape[-1])), -1)  # noqa: E731
        pairs = [out[i] for i in range(len(self))]
        return torch.stack([stretch(c) for c, _ in pairs]), torch.stack([stretch(r) for _, r in pairs])

    def by_delta(self, which: Tensor) -> Tensor:
        """Pages for as many clusters as delta asks for, and heavy tokens in proportion."""
        share = self.pages[0].share.clone()
        for cache in self:
            slots = candidates([cache], self.tokens_seen, which)
            alive = (slots["pos"] >= 0) & which[:, None, None]
            tokens, maker = alive.sum(-1), Maker([cache])
            _, clusters = cover(maker.points(slots, alive), alive, self.method.delta, tokens, maker.by)
            rows = torch.minimum(SINKS + (clusters / (1 - HEAVY)).long(), tokens).clamp(min=1)
            share[cache.index] = torch.where(which[:, None], ((rows + PAGE - 1) // PAGE).to(share.dtype), share[cache.index])
        return share

    def groups(self, waiting: int | None = None) -> Iterator[Sequence[SubGenCache]]:
        """Layers that are worked on at once, if so many rows of each tail are (None: all that hold something)."""
        pages = self.pages[0]
        rows = int((self[0].store.pos >= 0).sum(-1).max()) if waiting is None else waiting
        layers = sorted(self, key=lambda cache: max(pages.count[cache.index]))  # all are padded to the longest head of a group
        while layers:
            longest = rows + PAGE * max(pages.count[layers[-1].index])
            most = self.together(longest, AT_ONCE)
            yield layers[-most:]
            del layers[-most:]

    def compress(self, which: Tensor) -> None:
        for cache in self:
            cache.queries.summarize(which & (cache.queries.known > 0))
        super().compress(which)
        for cache in self:
            cache.queries.summarize(which)
        if bool(self.bounded.all()):  # no sequence needs its queries any more
            for cache in self:
                cache.queries.forget(True)

    def absorb(self, due: Tensor) -> None:
        seen, pages = self.tokens_seen, self.pages[0]
        for layers in self.groups():
            index = [cache.index for cache in layers]
            room = pages.share[index].flatten(0, 1) * PAGE
            maker = Maker(layers)
            new = renewed(layers, seen, due, room, maker.join if self.method.delta else maker.stream)
            need = (new["pos"] >= 0).sum(-1)
            if bool((need > room).any()):
                self.grow(index, need.view(len(index), *pages.share.shape[1:]))
            put(layers, new)
            for cache in layers:
                cache.drop(seen, due)

    def grow(self, layers: list[int], need: Tensor) -> None:
        """Make room for need (len(layers), B, G) settled slots in these layers: heads that have too little get twice as much."""
        pages = self.pages[0]
        for cache in self:
            put([cache], settled([cache]))
        old, share = [pages.held(i) for i in range(len(self))], pages.share.clone()
        wanted = torch.maximum((need + PAGE - 1) // PAGE, 2 * share[layers])
        share[layers] = torch.where(need > share[layers] * PAGE, wanted.to(share.dtype), share[layers])
        pages.lay_out(share.cpu())
        for cache, slots in zip(self, old, strict=True):
            cache.list_pages()
            put([cache], slots)
