"""`subgen_paper`: Algorithm 1 of SubGen to the letter (arXiv 2402.06082): keys in online clusters, sampled for the denominator, and values,
sampled apart from them, for the numerator.

    a new key k     nearest representative x within delta: n' += 1, and each of its t samples becomes k with probability 1/n'
                    none: a cluster of its own, with representative k, t copies of k as samples, n' = 1
    its value v     each of s slots becomes (k, v) with probability |v|^2 / (mu + |v|^2); then mu += |v|^2
    a query q       z   = sum over the s slots                     mu / (s |v|^2) exp(<q, k>) v
                    tau = sum over clusters n'/t sum over samples                 exp(<q, k>)         out = z / tau
Distances are between keys as they are cached, after the rotary embedding. The paper has no 1/sqrt(D): its q is ours divided by sqrt(D).
Each layer, sequence and kv head has clusters and samples of its own; a draw is a function of (seed, layer, head, position, number).
Nothing is held exactly, inside the prompt neither, but for up to `block` pending tokens, which count fully in both sums and are absorbed
where a length reaches a multiple of it: one after the other, so that the state is then the same for every `block`. block=1 is the paper.

a slot: a sample of a cluster has b = log(n'/t), a = -inf and no value, half the bytes; one of the s has a = log(mu / (s |v|^2)), b = -inf.
exact when: never (sampling with replacement). z and tau are unbiased, z / tau is not.
cost: with m clusters D (m + m t + 2 s) numbers a head; a token costs m distances, a query m t + s scores. m grows as the keys want it.
The storage is dense, as long as the longest head of all layers wants it, and doubles: often several times what is used.

Useless at practical sizes on real keys, and kept because it is the paper. With sinks and recent tokens exact beside it, its KL to the full
cache was 1.9 nats and more at an eighth of the cache, where dropping everything but those costs 0.1 (SmolLM2-135M, prose); alone, as here,
13 nats with the defaults (0.7 of the bytes) and 24 at a tenth. The norm of v says nothing about q.k, so that the numerator misses the few
tokens that matter; and keys hardly cluster after the rotary embedding. With a model's own sliding window, samples that have left it are not
seen, while n' and mu go on counting: the estimates are then biased.

The theorem, with constants that make it hold for a query of |q|/sqrt(D) <= r, epsilon <= 1, but for a probability of 1/125 + 2/n:
    |z/tau - Attn(q)| <= epsilon |softmax(K q)| |V|_op       s = 500 D / epsilon^2       t = 32/3 e^(2 delta r) log n / epsilon^2
Let A = exp(K q), Z = sum A, N = A^T V, R = e^(2 delta r).
  s: E |z - N|^2 <= |V|_F^2 |A|^2 / s <= D |V|_op^2 |A|^2 / s, so by Chebyshev |z - N| <= epsilon/2 |A| |V|_op but for 1/125.
  t: in a cluster A varies by a factor of at most R. So tau is a sum of independent terms, each at most Z R / t from its mean, and their
     variances add up to at most Z^2 R / (4 t); by Bernstein |tau - Z| <= epsilon/4 Z but for 2/n.
  Then |z/tau - N/Z| <= (|z - N| + |N| |tau - Z| / Z) / tau <= (1/2 + 1/4) / (1 - 1/4) epsilon |A| |V|_op / Z.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from zoo import random
from zoo.attention.backends import clustering, parts
from zoo.attention.cache import BLOCK, Attention, Cache, Caches
from zoo.attention.slots import Parts, Slots, finish, merge
from zoo.attention.store import SlotStore
from zoo.errors import ZooError

MOST = 2**16  # samples
ROWS = 16  # clusters that storage begins with
EXACTLY = "donot_use_mm_for_euclid_dist"  # distances from differences, not from products


def replace_key(count: Tensor) -> Tensor:
    """The probability that a sample of a cluster becomes its newest key, which is its `count`-th."""
    return 1 / count


def replace_value(norm: Tensor, mu: Tensor) -> Tensor:
    """The probability that a slot becomes a token whose |v|^2 is `norm`, after tokens with a sum of `mu`."""
    return norm / (mu + norm)


def key_weight(count: Tensor, t: int) -> Tensor:
    """b of a cluster's samples; -inf where there is no cluster."""
    return (count / t).log()


def value_weight(mu: Tensor, norm: Tensor, s: int) -> Tensor:
    """a of the numerator's slots."""
    return (mu / (s * norm)).log()


class Fixed(SlotStore):
    """Slots whose number never changes."""

    OPEN: ClassVar[Mapping[str, int]] = {}


class SubGenPaperCache(Cache):
    """One layer: `store`, the ring of pending tokens; `values`, the s slots of the numerator (the paper's M); and clusters (its D), M rows
    a head, of which those without a cluster have count 0."""

    leader: Tensor  # (B, G, M, D): representatives
    count: Tensor  # (B, G, M) int32: n'
    sample: Tensor  # (B, G, M, t, D)
    sample_pos: Tensor  # (B, G, M, t) int32, -1 = nothing there
    mu: Tensor  # (B, G)
    OPEN: ClassVar[Mapping[str, int]] = {"leader": 2, "count": 2, "sample": 2, "sample_pos": 2}

    def __init__(self, method: SubGenPaper, index: int, t: int, s: int, config: Any, batch: int, dtype: torch.dtype, device: Any) -> None:
        super().__init__()
        self.method, self.index, self.t, self.s, self.window = method, index, t, s, config.sliding_window
        heads, size = config.num_key_value_heads, config.head_dim
        self.store = Fixed(batch, heads, 1 + method.block, size, dtype, device, shared=True)
        self.values = Fixed(batch, heads, s, size, dtype, device, shared=False)
        self.register_buffer("leader", torch.zeros(batch, heads, ROWS, size, dtype=dtype, device=device))
        self.register_buffer("count", torch.zeros(batch, heads, ROWS, dtype=torch.int32, device=device))
        self.register_buffer("sample", torch.zeros(batch, heads, ROWS, t, size, dtype=dtype, device=device))
        self.register_buffer("sample_pos", torch.full((batch, heads, ROWS, t), -1, dtype=torch.int32, device=device))
        self.register_buffer("mu", torch.zeros(batch, heads, dtype=torch.promote_types(dtype, torch.float32), device=device))

    # A step

    def row(self, pos: Tensor) -> Tensor:
        return 1 + pos % self.method.block  # row 0 is for padding

    def reserve(self, ends: Tensor, most: int | None) -> Tensor:
        return torch.full_like(ends, 2**62)  # clusters make their room when they open

    def respond(self, q: Tensor, pos: Tensor) -> Tensor:
        z = parts(q, pos, self.values.read(self.window), self.backend)
        z = z._replace(den=torch.zeros_like(z.den), max_den=torch.full_like(z.max_den, -torch.inf))
        keys = self.sample.flatten(2, 3)
        samples = Slots(keys, keys[..., :0], self.sample_pos.flatten(2), self.b(), window=self.window)
        tau = parts(q, pos, samples, self.backend)
        tau = Parts(torch.zeros_like(z.num), torch.full_like(tau.max_num, -torch.inf), tau.den, tau.max_den)
        return finish(merge(parts(q, pos, self.store.read(self.window), self.backend), merge(z, tau)), q.dtype)

    def b(self) -> Tensor:
        """(B, G, M t) float32: the denominator log-weights of all samples."""
        return key_weight(self.count, self.t)[..., None].expand(self.sample_pos.shape).flatten(2)

    # Between steps

    def absorb(self, due: Tensor) -> None:
        """Run the algorithm over the pending tokens of the sequences that `due` (B,) names, and empty their ring."""
        k, v = self.store.k[:, :, 1:], self.store.v[:, :, 1:]  # in the order of their positions
        pos = torch.where(due[:, None], self.store.pos[:, 0, 1:], -1).long()  # (B, N)
        head, draw = torch.arange(k.shape[1], device=pos.device)[:, None, None], torch.arange(self.t + self.s, device=pos.device)
        u = random.uniform(self.method.seed, torch.full_like(head, self.index), head, pos[:, None, :, None], draw)  # (B, G, N, t + s)
        self.update_softmax_normalizer(k, pos, u[..., : self.t])
        self.update_matrix_product(k, v, pos, u[..., self.t :])
        self.store.free(due[:, None, None])

    def update_softmax_normalizer(self, k: Tensor, pos: Tensor, u: Tensor) -> None:
        """Put keys k (B, G, N, D) at pos (B, N), -1 = none, into clusters one by one, and into their samples as u (B, G, N, t) says."""
        B, G, N, _ = k.shape
        M, live, held = self.count.shape[2], (pos >= 0)[:, None], self.count > 0  # live (B, 1, N)
        x, leaders = k.to(self.mu.dtype), self.leader.to(self.mu.dtype)
        if nearest := clustering(self.backend, k.device, k.dtype).nearest:
            label, dist, *_ = nearest(x.contiguous(), leaders, live.expand(B, G, N).contiguous(), held)
            dist = dist.sqrt()
        else:
            dist, label = torch.cdist(x, leaders, compute_mode=EXACTLY).masked_fill(~held[:, :, None], torch.inf).min(-1)
        # Of the clusters that are there, only each key's nearest comes into question: column 0, and behind it the keys themselves.
        space = torch.cat((dist[..., None], torch.cdist(x, x, compute_mode=EXACTLY)), 3)
        leads = torch.zeros(B, G, 1 + N, dtype=torch.bool, device=k.device)
        leads[:, :, 0] = held.any(-1)
        home = torch.zeros(B, G, N, dtype=torch.int64, device=k.device)  # which of those each key belongs to
        for i in range(N):
            least, which = space[:, :, i].masked_fill(~leads, torch.inf).min(-1)
            joins = least <= self.method.delta
            home[:, :, i] = torch.where(joins, which, 1 + i)
            leads[:, :, 1 + i] = ~joins & live[:, :, i]
        opens = leads[:, :, 1:]
        new = (self.count > 0).sum(-1, keepdim=True) + opens.cumsum(-1) - 1  # the row that each new cluster gets
        home = torch.where(home < 1, label.long(), new.gather(2, (home - 1).clamp(min=0)))
        if int(new.max()) >= M:
            self.grow(max(int(new.max()) + 1, 2 * M))
        home = home.clamp(min=0)  # -1 is of padding

        same = (home[:, :, :, None] == home[:, :, None]) & live[:, :, None]  # (B, G, N, N): j is in i's cluster
        count = self.count.gather(2, home) + same.tril().sum(-1)  # n' when each key comes
        takes = (u < replace_key(count)[..., None]) & live[..., None]  # (B, G, N, t)
        first = same.int().argmax(-1)[..., None].expand(takes.shape)  # what happens to a cluster is gathered at its first key here
        turn = torch.where(takes, torch.arange(N, device=k.device)[:, None], -1)
        last = torch.full_like(turn, -1).scatter_reduce_(2, first, turn, "amax")  # the last key that each sample became
        b, g, at, j = (last >= 0).nonzero(as_tuple=True)
        row, taken = home[b, g, at], last[b, g, at, j]
        self.sample[b, g, row, j], self.sample_pos[b, g, row, j] = k[b, g, taken], pos[b, taken].int()
        b, g, at = opens.nonzero(as_tuple=True)
        self.leader[b, g, home[b, g, at]] = k[b, g, at]
        self.count.scatter_add_(2, home, live.int().expand(home.shape))

    def update_matrix_product(self, k: Tensor, v: Tensor, pos: Tensor, u: Tensor) -> None:
        """Offer keys and values (B, G, N, D) at pos (B, N), -1 = none, to the s slots one by one, as u (B, G, N, s) says."""
        norm = v.to(self.mu.dtype).square().sum(-1) * (pos >= 0)[:, None]  # (B, G, N)
        sums = norm.cumsum(-1)
        chance = replace_value(norm, self.mu[..., None] + (sums - norm))[..., None]  # NaN, never taken, before the first v that is not 0
        last = torch.where(u < chance, torch.arange(norm.shape[2], device=k.device)[:, None], -1).amax(2)  # (B, G, s)
        index, new, old = last.clamp(min=0), last >= 0, self.values
        rows = index[..., None].expand(old.k.shape)
        k, v = (torch.where(new[..., None], x.gather(2, rows), was) for x, was in ((k, old.k), (v, old.v)))
        where = torch.where(new, pos[:, None].expand(norm.shape).gather(2, index), old.pos.long())
        self.mu += sums[..., -1]
        a = value_weight(self.mu[..., None], v.to(norm.dtype).square().sum(-1), self.s)
        old.replace(0, k, v, torch.where(where >= 0, a, -torch.inf), where)

    def grow(self, rows: int) -> None:
        """Make room for this many clusters in every head."""
        for name in self.OPEN:
            old = getattr(self, name)
            if old.shape[2] < rows:
                new = old.new_full((*old.shape[:2], rows, *old.shape[3:]), -1 if name == "sample_pos" else 0)
                new[:, :, : old.shape[2]] = old
                setattr(self, name, new)

    def slots(self) -> Slots:
        k, pos, new, kept = self.sample.flatten(2, 3), self.sample_pos.flatten(2), super().slots(), self.values
        assert new.a is not None
        assert kept.a is not None
        a = torch.cat((torch.full_like(self.b(), -torch.inf), kept.a, new.a), 2)
        b = torch.cat((self.b(), torch.full_like(kept.a, -torch.inf), new.a), 2)
        v, pos = torch.cat((torch.zeros_like(k), kept.v, new.v), 2), torch.cat((pos, kept.pos, new.pos), 2)
        return Slots(torch.cat((k, kept.k, new.k), 2), v, pos, a, b, self.window)

    def used(self) -> int:
        key = self.leader.shape[3] * self.leader.element_size()
        clusters = int((self.count > 0).sum()) * (key + 4 + self.t * (key + 4))
        return super().used() + clusters + int((self.values.pos >= 0).sum()) * (2 * key + 8) + self.mu.nbytes


class SubGenPaperCaches(Caches):
    """All layers."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[SubGenPaperCache]: ...  # type: ignore[override]
        def __getitem__(self, index: int) -> SubGenPaperCache: ...  # type: ignore[override]

    def ends(self, pos: Tensor) -> Tensor | None:
        return (pos >= 0) & ((pos + 1) % self[0].method.block == 0)

    def maintain(self) -> None:
        due = (self.tokens_seen % self[0].method.block == 0) & (self[0].store.pos[:, 0] >= 0).any(1)
        if bool(due.any()):
            for layer in self:
                layer.absorb(due)
            rows = max(layer.count.shape[2] for layer in self)
            for layer in self:  # a compiled step takes all layers to have one shape
                layer.grow(rows)


@dataclass(frozen=True)
class SubGenPaper(Attention):
    """delta: the L2 distance that a key may be from its representative; at 12, 1,024 tokens make 195 clusters a head of SmolLM2, where
    two keys are 9 to 20 apart. t: samples a cluster. s: samples of values. block: tokens that wait, exact, 1 to 64. epsilon and r,
    where given, set t and s by the theorem above, with n = max_tokens, else prompt_tokens, else the model's context."""

    delta: float = 12.0
    t: int = 4
    s: int = 256
    seed: int = 0
    block: int = BLOCK
    epsilon: float = 0.0
    r: float = 0.0

    name: ClassVar[str] = "subgen_paper"
    main: ClassVar[str] = "delta"
    exact_when: ClassVar[str] = "never"

    def __post_init__(self) -> None:
        self.check(0 <= self.delta <= 1e6, "delta", "between 0 and 1e6")
        self.check(1 <= self.t <= MOST, "t", f"between 1 and {MOST}")
        self.check(1 <= self.s <= MOST, "s", f"between 1 and {MOST}")
        self.check(-(2**63) <= self.seed < 2**63, "seed", "between -2**63 and 2**63 - 1")
        self.check(1 <= self.block <= BLOCK, "block", f"between 1 and {BLOCK}")
        self.check(self.epsilon == 0 or 1e-3 <= self.epsilon <= 1, "epsilon", "between 0.001 and 1, or 0 = not used")
        self.check(0 <= self.r <= 1e6, "r", "above 0 and at most 1e6, or 0 = not used")
        self.check((self.r > 0) == (self.epsilon > 0), "r", "above 0 where epsilon is given, and only there")

    def check(self, good: bool, option: str, bound: str) -> None:
        """Raises ZooError, naming the bound, unless `good`."""
        if not good:
            raise ZooError(f"{self.name}: {option}={getattr(self, option)} must be {bound}")

    def samples(self, head_dim: int, tokens: int) -> tuple[int, int]:
        """(t, s) for sequences of this many tokens. Raises ZooError where the theorem asks for too many."""
        if not self.epsilon:
            return self.t, self.s
        factor = math.exp(min(2 * self.delta * self.r, 700))  # as far as a float goes
        t, s = (32 / 3 * factor * math.log(max(tokens, 2)) / self.epsilon**2, 500 * head_dim / self.epsilon**2)
        if max(t, s) > MOST:
            raise ZooError(
                f"{self.name}: epsilon={self.epsilon} and r={self.r} ask for t={t:.4g} (e^(2 delta r) = {factor:.4g}) and s={s:.4g}; "
                f"both must be at most {MOST}: take a larger epsilon, or a smaller delta or r"
            )
        return math.ceil(t), math.ceil(s)

    def caches(
        self, config: Any, rotary: Any, batch: int, max_tokens: int | None, prompt_tokens: int | None, dtype: torch.dtype, device: Any
    ) -> Caches:
        t, s = self.samples(config.head_dim, (max_tokens or prompt_tokens or config.max_position_embeddings) if self.epsilon else 0)
        layers = [SubGenPaperCache(self, i, t, s, config, batch, dtype, device) for i in range(config.num_hidden_layers)]
        return SubGenPaperCaches(layers, batch, device)
