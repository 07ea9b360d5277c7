"""What all methods with a budget share: new tokens wait, exact, in a tail; a method turns what is older into settled slots.

    tail      the same tokens in every head, exact, one row a token. It grows while nothing must go, and is a ring afterwards
    settled   each layer's and head's own slots, as many as it needs, in pages (zoo/attention/store.py)

    when=prompt   the prompt is read exactly and compressed once, at its end; decoded tokens are kept until the next prompt ends
    when=decode   the same, and from there on the cache never exceeds the budget
    when=stream   the cache never exceeds the budget, inside the prompt too
`prompt` and `decode` hold the whole prompt while it is read: their peak is the full cache. As long as a sequence has no more tokens than
the budget nothing is compressed: every method here is exact then. Once it has more, and in `decode` and `stream`, the tail is a ring of the
method's recent tokens and of `block` = 64 pending ones; where a sequence's length reaches a multiple of `block`, those that left the recent
tokens are absorbed. All of it is charged to the budget.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.attention.budget import Budget
from zoo.attention.cache import BLOCK, Attention, Cache, Caches, round_up
from zoo.attention.slots import (
    PAGE,
    PagedSlots,
    Parts,
    Slots,
    attention,
    blend,
    chunk_mass,
    finish,
    flash_pages,
    flash_slots,
    merge,
    paged_mass,
    paged_parts,
    slot_mass,
    slot_parts,
)
from zoo.attention.store import EMPTY, Pages, SlotStore
from zoo.errors import ZooError

SINKS = 4  # the first tokens of a sequence, which models attend to whatever they say (StreamingLLM, arXiv 2309.17453)
GROWING = 2**40  # rows of a ring that never wraps
QUARTER = Budget(25, percent=True, least=256)
MASSES = ("mass", "spikes")  # what a method may have added up beside tokens and slots
WHEN = ("prompt", "decode", "stream")


def names(values: Sequence[str]) -> str:
    return f"one of {', '.join(values)}"


@dataclass(frozen=True)
class Budgeted(Attention):
    """budget: slots a layer and head, on average over heads, that the bytes pay for; a share such as `25%` is of the tokens that the
    prompt has, or has had when it ends, and `25%/256` never means fewer than 256. when: prompt, decode or stream, as above."""

    budget: Budget = QUARTER
    when: str = "decode"

    exact_when: ClassVar[str] = "budget >= tokens"
    least: ClassVar[int] = 128  # slots in `decode` and `stream`: recent tokens, the ring, and one page; half of it in `prompt`
    observes: ClassVar[int] = 0  # after the prompt, every how many queries the attention that slots get is added up; 0 = never
    powers: ClassVar[dict[str, int]] = {"mass": 1}  # what is added up: probabilities, and for `spikes` their squares
    extra: ClassVar[dict[str, torch.dtype]] = {}  # one number each beside a settled slot

    def __post_init__(self) -> None:
        self.check(self.when in WHEN, "when", names(WHEN))
        if self.budget.percent:
            self.check(0 < self.budget.number <= 200, "budget", "above 0% and at most 200%")
        else:
            self.check(self.floor <= self.budget.number, "budget", f"at least {self.floor} slots with when={self.when}")
            self.check(self.budget.number <= 2**31, "budget", f"at most {2**31} slots")

    def check(self, good: bool, option: str, bound: str) -> None:
        """Raises ZooError, naming the bound, unless `good`."""
        if not good:
            raise ZooError(f"{self.name or type(self).__name__.lower()}: {option}={getattr(self, option)} must be {bound}")

    @property
    def floor(self) -> int:
        return self.least // 2 if self.when == "prompt" else self.least

    @property
    def beside(self) -> list[str]:
        """Which masses are added up."""
        return [name for name in MASSES if name in self.extra]

    @property
    def block(self) -> int:
        """How many tokens wait before they are absorbed."""
        return BLOCK

    def slots(self, tokens: int) -> int:
        """The budget, in slots, of a sequence of this many tokens."""
        return max(self.budget.tokens(tokens), self.floor)

    def recent(self, budget: int) -> int:
        """How many of the newest tokens stay exact in the tail, the pending ones aside."""
        return 0

    def settled(self, budget: int) -> int:
        """Slots a head that are left for settled ones, on average over heads."""
        return budget - self.recent(budget) - (0 if self.when == "prompt" else self.block)

    @abstractmethod
    def layer(self, index: int, pages: Pages, rotary: Any, config: Any, batch: int, dtype: torch.dtype, device: Any) -> BudgetedCache:
        """The cache of one layer."""

    def fields(self, config: Any, dtype: torch.dtype) -> dict[str, tuple[int, torch.dtype]]:
        """What is kept beside a settled slot: name -> (numbers, dtype); 0 numbers = a plain one."""
        return {name: (0, kind) for name, kind in self.extra.items()}

    def caches(
        self, config: Any, rotary: Any, batch: int, max_tokens: int | None, prompt_tokens: int | None, dtype: torch.dtype, device: Any
    ) -> Caches:
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        pages = Pages(layers, batch, heads, config.head_dim, dtype, device, self.fields(config, dtype))
        caches = [self.layer(i, pages, rotary, config, batch, dtype, device) for i in range(layers)]
        return self.gather(caches, config, batch, prompt_tokens, device)

    def gather(self, caches: Sequence[BudgetedCache], config: Any, batch: int, prompt_tokens: int | None, device: Any) -> Caches:
        return BudgetedCaches(self, caches, batch, prompt_tokens, device)


class BudgetedCache(Cache):
    """One layer: a tail of its own, and its pages of the arena that all layers share."""

    recent: Tensor  # (B,): the newest tokens that stay in the tail. These three are tensors: a compiled step must not depend on them
    ring: Tensor  # (B,): rows of the tail's ring
    origin: Tensor  # (B,): the position that stands in its first row
    listed: Tensor  # (N,) this layer's pages      owner (N,) whose each is      table (B G, J) where each head's pages are listed
    owner: Tensor
    table: Tensor
    mass: Tensor | None  # (N, PAGE): attention that settled slots got since the last `maintain`, and its squares
    spikes: Tensor | None
    OPEN: ClassVar[dict[str, int]] = {"listed": 0, "owner": 0, "table": 1, "mass": 0, "spikes": 0}

    def __init__(self, method: Budgeted, index: int, pages: Pages, rotary: Any, config: Any, batch: int, dtype: Any, device: Any) -> None:
        super().__init__()
        self.method, self.index, self.pages = method, index, pages
        self.rotary = [rotary]  # the model's module, in a list so that it is not part of this cache's state
        self.window = config.sliding_window
        self.store = SlotStore(batch, config.num_key_value_heads, 2, config.head_dim, dtype, device, shared=True, beside=method.beside)
        for name, value in (("recent", 0), ("ring", GROWING), ("origin", 0)):
            self.register_buffer(name, torch.full((batch,), value, dtype=torch.int64, device=device))
        for name in ("listed", "owner", "table", "mass", "spikes"):
            self.register_buffer(name, None)
        self.list_pages()

    def list_pages(self) -> None:
        """Look up this layer's pages, after they were laid out anew."""
        self.listed, self.owner, self.table = self.pages.lists(self.index, avoid=self.store.rows)
        for name in MASSES:
            if name in self.pages.fields:
                setattr(self, name, torch.zeros(len(self.listed), PAGE, device=self.listed.device))

    # A step

    def row(self, pos: Tensor) -> Tensor:
        return 1 + (pos - self.origin[:, None]) % self.ring[:, None]  # row 0 is for padding

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
        self.store.append(self.row(pos), k, v, pos)
        tail = self.store.read(self.window)
        fused = not torch.compiler.is_compiling() and q.device.type == "cpu" and self.backend != "eager"
        some = torch.compiler.is_compiling() or any(self.pages.count[self.index])  # a compiled step always asks for both
        observing = self.method.observes > 0 and self.store.mass is not None
        if not some and not observing:
            return attention(q, pos, tail, self.backend)
        whole: Parts = (flash_slots if fused else slot_parts)(q, pos, tail)
        settled = self.read_settled()
        if some:
            whole = blend(whole, flash_pages(q, pos, settled)) if fused else merge(whole, paged_parts(q, pos, settled))
        if observing:
            self.observe(q, pos, whole, tail, settled if some else None)
        return whole.num.view(q.shape).to(q.dtype) if fused else finish(whole, q.dtype)

    def read_settled(self) -> PagedSlots:
        p = self.pages
        views = () if torch.compiler.is_compiling() else p.views(self.index)
        return PagedSlots(p.k, p.v, p.pos, p.a, self.listed, self.owner, self.table, (), views, self.window)

    def observe(self, q: Tensor, pos: Tensor, whole: Parts, tail: Slots, settled: PagedSlots | None) -> None:
        """Add up the attention that slots get, to the method's `powers`: from all queries of a prompt, and from every `observes`-th
        one later,
        by position, which then stands for as many. Never more than the queries of one call x slots."""
        every = 1 if self.prompt_open else self.method.observes
        counts = (pos >= 0) & (pos % every == 0)
        eager = not torch.compiler.is_compiling()
        if every > 1 and eager:
            columns = counts.any(0).nonzero()[:, 0]
            if not len(columns):
                return
            q, pos, counts = q[:, :, columns], pos[:, columns], counts[:, columns]
            whole = Parts(*(x[:, :, :, columns] for x in whole))
        weight, powers = counts * every, self.method.powers
        if every == 1 and pos.shape[1] > 1 and eager:
            sums = chunk_mass(q, pos, tail, whole, tuple(powers.values()))
        else:
            sums = [slot_mass(q, pos, tail, whole, weight, power) for power in powers.values()]
        for (name, power), new in zip(powers.items(), sums, strict=True):
            getattr(self.store, name).add_(new)
            mine = getattr(self, name)
            if settled is not None and mine is not None:
                mine.add_(paged_mass(q, pos, settled, whole, weight, power))

    def reserve(self, ends: Tensor, most: int | None) -> Tensor:
        growing = self.ring == GROWING  # what is a ring has all the rows it needs
        rows, least = 1 + int(torch.where(growing, ends - self.origin, 0).max()), 1 + int(torch.where(growing, 0, self.ring).max())
        if rows > self.store.rows:
            end = 2**62 if most is None else 1 + most - int(torch.where(growing, self.origin, GROWING).min())
            rows = max(least, min(round_up(rows), end))
            self.store.resize(rows, capacity=min(2 * rows, end))
        return torch.where(growing, self.origin + self.store.rows - 1, 2**62)

    # Between steps

    def settled(self) -> dict[str, Tensor]:
        """This layer's settled slots, padded to the longest head (`Pages.read`), their mass up to date."""
        slots = self.pages.read(self.index)
        for name in MASSES:
            new = getattr(self, name)
            if new is not None and any(self.pages.count[self.index]):
                fresh = new[self.table.long()].view(*slots["pos"].shape[:2], -1)
                slots[name] = slots[name] + fresh[:, :, : slots["pos"].shape[2]]
        return slots

    def put(self, slots: dict[str, Tensor]) -> None:
        """Write settled slots."""
        self.pages.replace(self.index, slots)
        for name in MASSES:
            if (new := getattr(self, name)) is not None:
                new.zero_()

    def candidates(self, seen: Tensor, which: Tensor) -> dict[str, Tensor]:
        """The settled slots of all sequences, and, of those that `which` (B,) names, what is older than the recent tokens at lengths seen
        (B,): k, v (B, G, N, D), a, pos (B, G, N) and the method's own fields; pos -1 = nothing there. Expired ones are left out."""
        self.prepare()
        pos = self.store.pos[:, 0].long()
        old = (pos >= 0) & (pos < (seen - self.recent)[:, None]) & which[:, None]
        rows = old.any(0).nonzero()[:, 0]
        s, slots = self.store, self.settled()
        shape = (*s.k.shape[:2], len(rows))
        tail = {
            "k": s.k[:, :, rows],
            "v": s.v[:, :, rows],
            "a": torch.zeros(shape, device=s.k.device),
            "pos": torch.where(old, pos, -1)[:, None, rows].expand(shape),
        }
        for name in MASSES:
            if (beside := getattr(s, name)) is not None:
                tail[name] = beside[:, :, rows]
        tail |= self.fresh(tail, seen)
        both = {name: torch.cat((t, tail[name].to(t.dtype)), 2) for name, t in slots.items()}
        if self.window is not None:
            both["pos"] = torch.where(both["pos"] > (seen - self.window)[:, None, None], both["pos"], -1)
        return both

    def renewed(self, seen: Tensor, which: Tensor, room: Tensor, make: Any = None) -> dict[str, Tensor]:
        """The settled slots, those of the sequences that `which` (B,) names made anew (`compress`, or `make`) together with what leaves
        their tails. The others' stay as they are, whatever their neighbours do."""
        old = self.settled()
        new = (make or self.compress)(self.candidates(seen, which), seen, room, which)
        if bool(which.all()):
            return new
        n = max(old["pos"].shape[2], new["pos"].shape[2])

        def padded(name: str, t: Tensor) -> Tensor:
            return F.pad(t, (0, 0) * (t.dim() - 3) + (0, n - t.shape[2]), value=EMPTY.get(name, 0))

        return {
            name: torch.where(which.view(-1, *[1] * (t.dim() - 1)), padded(name, new[name].to(t.dtype)), padded(name, t))
            for name, t in old.items()
        }

    def prepare(self) -> None:
        """Called before candidates are looked up."""

    def begin_prompt(self, seen: Tensor) -> None:
        """A prompt or chat turn comes next, after seen (B,) tokens."""

    def fresh(self, tail: dict[str, Tensor], seen: Tensor) -> dict[str, Tensor]:
        """The method's own fields of tokens that come out of the tail."""
        return {}

    @abstractmethod
    def compress(self, slots: dict[str, Tensor], seen: Tensor, room: Tensor, which: Tensor) -> dict[str, Tensor]:
        """Candidates -> at most room (B, G) settled slots, those that hold something first. Sequences that `which` (B,) does not name have
        no candidates but what they own, and keep it."""

    def drop(self, seen: Tensor, which: Tensor) -> None:
        """Empty the tail's rows of what was handed to `compress`."""
        pos = self.store.pos[:, 0]
        self.store.free(((pos < (seen - self.recent)[:, None]) & which[:, None])[:, None])

    def lay_tail(self, which: Tensor, origin: Tensor, ring: Tensor) -> None:
        """Move the sequences that `which` (B,) names into a ring of this many rows that begins at `origin`; both (B,)."""
        self.origin.copy_(torch.where(which, origin, self.origin))
        self.ring.copy_(torch.where(which, ring, self.ring))
        pos = self.store.pos[:, 0].long()
        row = torch.where(pos >= 0, self.row(pos), 0)
        bounded = torch.where(self.ring == GROWING, 0, self.ring)
        self.store.move(row, max(2, int(row.max()) + 1, int(bounded.max()) + 1))

    def used(self) -> int:
        small = sum(t.nbytes for t in (self.recent, self.ring, self.origin, self.listed, self.owner, self.table))
        kept = sum(getattr(self.store, name) is not None for name in MASSES)
        mass = 4 * kept * self.store.k.shape[1] * int((self.store.pos >= 0).sum())
        mass += sum(new.nbytes for name in MASSES if (new := getattr(self, name)) is not None)
        return super().used() + self.pages.used(self.index) + small + mass

    def slots(self) -> Slots:
        s, tail = self.pages.read(self.index), super().slots()
        assert tail.a is not None
        k, v = torch.cat((s["k"], tail.k), 2), torch.cat((s["v"], tail.v), 2)
        a = torch.cat((s["a"], tail.a), 2)
        return Slots(k, v, torch.cat((s["pos"], tail.pos), 2), a, a, tail.window)


class BudgetedCaches(Caches):
    """All layers of a method with a budget."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[BudgetedCache]: ...  # type: ignore[override]
        def __getitem__(self, index: int) -> BudgetedCache: ...  # type: ignore[override]

    held: Tensor  # (B,): the budget in slots; 0 = not known yet
    bounded: Tensor  # (B,) bool: the tail is a ring

    def __init__(self, method: Budgeted, caches: Sequence[BudgetedCache], batch: int, prompt_tokens: int | None, device: Any) -> None:
        super().__init__(caches, batch, device)
        self.method, self.prompt_tokens = method, prompt_tokens
        self.pages = [caches[0].pages]  # in a list: a ModuleList would take the arena for a layer
        self.register_buffer("held", torch.zeros(batch, dtype=torch.int64, device=device))
        self.register_buffer("bounded", torch.zeros(batch, dtype=torch.bool, device=device))
        if prompt_tokens is not None or not method.budget.percent:
            self.held.fill_(method.slots(prompt_tokens or 0))

    @property
    def holding(self) -> bool:
        """Whether tokens are only taken in, for now."""
        m = self.method
        return m.when == "prompt" or (self.prompt_open and (m.when == "decode" or not bool(self.held.any())))

    def budget_of(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([self.method.slots(self.prompt_tokens or n) for n in tokens], device=self.held.device)

    def begin_prompt(self, lengths: Sequence[int]) -> None:
        before = self.held.clone()
        self.held.copy_(self.budget_of([n + m for n, m in zip(self.tokens_seen.tolist(), lengths, strict=True)]))
        if self.method.when == "stream":
            other = torch.where(self.bounded, before != self.held, self.tokens_seen >= self.held)
            if bool(other.any()):
                self.compress(other)
        elif bool(self.bounded.any()):  # the next turn is held exactly until it ends, behind what the ring has
            for cache in self:
                first = torch.where(cache.store.pos[:, 0] >= 0, cache.store.pos[:, 0].long(), GROWING).amin(1)
                cache.lay_tail(self.bounded, torch.minimum(first, self.tokens_seen), torch.full_like(first, GROWING))
            self.bounded.zero_()
        for cache in self:
            cache.begin_prompt(self.tokens_seen)
        super().begin_prompt(lengths)

    def end_prompt(self) -> None:
        if self.method.when == "stream" and bool(self.held.any()):
            for cache in self:
                cache.end_prompt(self.tokens_seen)
            self.prompt_open = False
            return
        self.held.copy_(self.budget_of(self.tokens_seen.tolist()))
        over = self.tokens_seen > self.held - int(self.method.when != "prompt")  # a bounded cache needs room for the next token
        pos, recent = self[0].store.pos[:, 0], self[0].recent
        over &= ((pos >= 0) & (pos < (self.tokens_seen - recent)[:, None])).any(1)  # else nothing has come since it was compressed
        if bool(over.any()):
            self.compress(over)
        for cache in self:
            cache.end_prompt(self.tokens_seen)
        self.prompt_open = False

    def ends(self, pos: Tensor) -> Tensor | None:
        if self.holding:
            return None
        return (pos >= 0) & (((pos + 1) % self.method.block == 0) | (pos + 1 == self.held[:, None]))

    def maintain(self) -> None:
        if self.holding:
            return
        full = ~self.bounded & (self.tokens_seen >= self.held)
        if bool(full.any()):
            self.compress(full)
        due = self.bounded & (self.tokens_seen % self.method.block == 0)
        if bool(due.any()):
            for cache in self:
                self.absorb(cache, due)

    def absorb(self, cache: BudgetedCache, due: Tensor) -> None:
        """Hand a layer the tokens that have left its recent ones."""
        seen = self.tokens_seen
        pos = cache.store.pos[:, 0]
        if bool(((pos >= 0) & (pos < (seen - cache.recent)[:, None]) & due[:, None]).any()):
            cache.put(cache.renewed(seen, due, cache.pages.share[cache.index] * PAGE))
            cache.drop(seen, due)

    def compress(self, which: Tensor) -> None:
        """Turn everything of the sequences that `which` (B,) names, but for the recent tokens, into settled slots within their budgets."""
        seen, m = self.tokens_seen, self.method
        recent = torch.tensor([m.recent(n) for n in self.held.tolist()], device=seen.device)
        for cache in self:
            cache.recent.copy_(torch.where(which, recent, cache.recent))
        pages = self.pages[0]
        share = torch.where(which[None, :, None], self.shares(which), pages.share)
        growing = m.when == "prompt"
        ring = torch.full_like(recent, GROWING) if growing else recent + m.block
        origin = (seen - recent).clamp(min=0) if growing else torch.zeros_like(seen)
        done = []
        for cache in self:
            done.append(cache.renewed(seen, which, share[cache.index] * PAGE))
            cache.drop(seen, which)
            cache.lay_tail(which, origin, ring)
        pages.lay_out(share.cpu())
        for cache, slots in zip(self, done, strict=True):
            cache.list_pages()
            cache.put(slots)
        if not growing:
            self.bounded |= which
        self.room = 0

    def shares(self, which: Tensor) -> Tensor:
        """Pages of each layer, sequence and head (L, B, G), for the sequences that `which` (B,) names: here the same for all heads."""
        pages = torch.tensor([self.method.settled(n) // PAGE for n in self.held.tolist()], device=which.device)
        return pages[None, :, None].expand(self.pages[0].share.shape)

    def make_room(self, ends: Tensor, most: int | None) -> None:
        if not self.holding:  # no tail outgrows the budget: a sequence is compressed when it gets there
            ends, most = torch.minimum(ends, self.held), int(self.held.max())
        super().make_room(ends, most)

    def refresh(self) -> None:
        self.pages = [self[0].pages]
        self.pages[0].index()

    def clone(self) -> Caches:
        new = super().clone()
        new.refresh()
        return new

    def expand(self, batch: int) -> Caches:
        for cache in self:
            if cache.mass is not None:
                cache.put(cache.settled())
        new = super().expand(batch)
        assert isinstance(new, BudgetedCaches)
        for cache in new:
            cache.list_pages()
        return new
