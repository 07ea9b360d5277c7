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

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from zoo.attention.budget import Budget
from zoo.attention.cache import BLOCK, Attention, Caches
from zoo.attention.encoding import WHEN, EncodedPages, Encoding
from zoo.attention.slots import PAGE
from zoo.attention.store import Pages
from zoo.attention.tail import GROWING, MASSES, BudgetedCache, put, renewed, settled
from zoo.errors import ZooError

SINKS = 4  # the first tokens of a sequence, which models attend to whatever they say (StreamingLLM, arXiv 2309.17453)
QUARTER = Budget(25, percent=True, least=256)


def names(values: Sequence[str]) -> str:
    return f"one of {', '.join(values)}"


@dataclass(frozen=True)
class Budgeted(Attention):
    """budget: slots a layer and head, on average over heads, that the bytes pay for; a share such as `25%` is of the tokens that the
    prompt has, or has had when it ends, and `25%/256` never means fewer than 256. when: prompt, decode or stream, as above."""

    budget: Budget = QUARTER
    when: str = "decode"
    encoding: Encoding | None = dataclasses.field(default=None, kw_only=True)  # of settled slots: `+kivi:bits=4`

    exact_when: ClassVar[str] = "budget >= tokens"
    least: ClassVar[int] = 128  # slots in `decode` and `stream`: recent tokens, the ring, and one page; half of it in `prompt`
    observes: ClassVar[int] = 0  # after the prompt, every how many queries the attention that slots get is added up; 0 = never
    powers: ClassVar[dict[str, int]] = {"mass": 1}  # what is added up: probabilities, and for `spikes` their squares
    moves: ClassVar[bool] = True  # whether slots come and go, each by itself
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

    def __str__(self) -> str:
        return super().__str__() + (f"+{self.encoding}" if self.encoding else "")

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

    def spare(self, budget: int) -> int:
        """Slots that whole pages leave over: more recent tokens."""
        return (budget - self.recent(budget) - (0 if self.when == "prompt" else self.block)) % PAGE

    def settled(self, budget: int) -> int:
        """Slots a head that are left for settled ones, on average over heads."""
        return budget - self.recent(budget) - self.spare(budget) - (0 if self.when == "prompt" else self.block)

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
        about = (layers, batch, heads, config.head_dim, dtype, device, self.fields(config, dtype))
        pages = Pages(*about) if self.encoding is None else EncodedPages(self.encoding, *about, stacked=self.moves)
        caches = [self.layer(i, pages, rotary, config, batch, dtype, device) for i in range(layers)]
        return self.gather(caches, config, batch, prompt_tokens, device)

    def gather(self, caches: Sequence[BudgetedCache], config: Any, batch: int, prompt_tokens: int | None, device: Any) -> Caches:
        return BudgetedCaches(self, caches, batch, prompt_tokens, device)


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
        if prompt_tokens or not method.budget.percent:
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
        over &= self[0].settles(self.tokens_seen).any(1) | (~self.bounded & (self.method.when != "prompt"))  # else nothing has come since
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
        if bool((due[:, None] & self[0].settles(self.tokens_seen)).any()):
            self.absorb(due)

    def absorb(self, due: Tensor) -> None:
        """Hand the settled slots of the sequences that are due (B,) the tokens that have left the recent ones."""
        for layers in self.groups():
            put(layers, self.made(layers, due, self.pages[0].share))
            for cache in layers:
                cache.drop(self.tokens_seen, due)

    def groups(self) -> Iterator[Sequence[BudgetedCache]]:
        """The layers, in groups that are worked on at once."""
        return ([cache] for cache in self)  # one at a time, unless a method can do more

    def together(self, rows: int, most: int) -> int:
        """How many layers of so many rows a head may be worked on at once, for at most `most` rows in all; codes are decoded a layer at a
        time."""
        heads = self.pages[0].share[0].numel()
        return 1 if self.method.encoding is not None else max(1, most // (heads * max(rows, 1)))

    def made(self, layers: Sequence[BudgetedCache], which: Tensor, share: Tensor) -> dict[str, Tensor]:
        """A group's settled slots made anew, for the sequences that `which` (B,) names, to fit into share (L, B, G) pages."""
        room = share[[cache.index for cache in layers]].flatten(0, 1) * PAGE
        return renewed(layers, self.tokens_seen, which, room, layers[0].maker(layers))

    def compress(self, which: Tensor) -> None:
        """Turn everything of the sequences that `which` (B,) names, but for the recent tokens, into settled slots within their budgets."""
        seen, m = self.tokens_seen, self.method
        recent = torch.tensor([m.recent(n) + m.spare(n) for n in self.held.tolist()], device=seen.device)
        for cache in self:
            cache.recent.copy_(torch.where(which, recent, cache.recent))
        pages = self.pages[0]
        share = torch.where(which[None, :, None], self.shares(which), pages.share)
        growing = m.when == "prompt"
        ring = torch.full_like(recent, GROWING) if growing else recent + m.block
        origin = (seen - recent).clamp(min=0) if growing else torch.zeros_like(seen)
        done = []
        for layers in self.groups():
            done.append((layers, self.made(layers, which, share)))
            for cache in layers:
                cache.drop(seen, which)
                cache.lay_tail(which, origin, ring)
        pages.lay_out(share.cpu())
        for cache in self:
            cache.list_pages()
        for layers, slots in done:
            put(layers, slots)
        if not growing:
            self.bounded |= which
        self.room = 0

    def shares(self, which: Tensor) -> Tensor:
        """Pages of each layer, sequence and head (L, B, G), for the sequences that `which` (B,) names: here the same for all heads."""
        pages = torch.tensor([self.method.settled(n) // PAGE for n in self.held.tolist()], device=which.device)
        return pages[None, :, None].expand(self.pages[0].share.shape)

    def kind(self) -> str:
        hint = self.prompt_tokens if self.method.budget.percent else None
        return super().kind() + (f", prompt_tokens={hint}" if hint else "")

    def reserve(self, pos: Tensor) -> None:
        super().reserve(pos)
        # Asked in every layer, a GPU would have to answer before the next one is begun.
        looks = self.prompt_open or self.method.observes <= 1 or bool(self[0].counted(pos)[0].any())
        if looks != self[0].looks:
            for cache in self:
                cache.looks = looks

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
                put([cache], settled([cache]))
        new = super().expand(batch)
        assert isinstance(new, BudgetedCaches)
        for cache in new:
            cache.list_pages()
        return new
