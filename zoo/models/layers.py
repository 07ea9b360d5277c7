"""What the families share: RMSNorm, the rotary embedding, a linear layer that decodes at memory speed, and the way through the layers.

Shapes: B batch, T new tokens, h any number of heads, D head size; positions (B, T) int64, -1 = padding.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.cache import Cache, Caches, NoCache


class RMSNorm(nn.Module):
    """x / rms(x) * weight (arXiv 1910.07467). The mean square is taken in float32, whatever the model's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class Linear(nn.Linear):
    """`nn.Linear` that reads its weight once, at the speed of memory, for a few rows on a CPU.

    A token through a weight matrix is bound by reading the matrix. Compiled, a single row is a plain multiply-and-sum, which Inductor turns
    into one vectorised loop with float32 sums; up to `few` rows otherwise go to the CPU kernels (kernels/cpu.py). Both read bfloat16
    weights at about twice the speed of the library's GEMM (docs/performance.md), which is the best for many rows.
    """

    few = 0  # rows that the CPU kernels take; LM sets it where they are loaded and made for this weight

    def reset_parameters(self) -> None:
        """Parameters come from a checkpoint; on `meta`, PyTorch's initialisation imports its compiler, which takes a second."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in x's dtype."""
        rows = x.numel() // x.shape[-1]
        if one_compiled_row(x):
            y = self.row(x)
        elif rows <= self.few and self.has_kernel(x):
            y = self.few_rows(x.reshape(rows, -1).contiguous())
        else:
            return self.many_rows(x)
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def has_kernel(self, x: Tensor) -> bool:
        """Whether the CPU kernels are made for such numbers; they have no gradient."""
        weight = self.weight  # a module's attributes are slow to look up
        made = x.dtype in (torch.bfloat16, torch.float32) and weight.dtype in (x.dtype, torch.int8)
        return made and x.device.type == "cpu" and not (x.requires_grad or weight.requires_grad)

    def row(self, x: Tensor) -> Tensor:
        """One row x (..., in) -> (out,), at least float32, without the bias."""
        return row_times(x, self.weight)

    def few_rows(self, x: Tensor) -> Tensor:
        """x (M, in) -> (M, out), without the bias."""
        return torch.ops.zoo.linear(x, self.weight)

    def many_rows(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), with the bias."""
        return F.linear(x, self.weight, self.bias)


def use_kernels(model: nn.Module, yes: bool) -> None:
    """Let linear layers of a few rows go to the CPU kernels, where those are made for their weights, or back to the library."""
    from zoo.kernels.cpu import FEW, WORDS

    for module in model.modules():
        if isinstance(module, Linear):
            made = module.weight.dtype in (torch.bfloat16, torch.float32, torch.int8) and not module.in_features % WORDS
            module.few = FEW if yes and made else 0


def one_compiled_row(x: Tensor) -> bool:
    """Whether this is a compiled step's single token on a CPU."""
    return torch.compiler.is_compiling() and x.numel() == x.shape[-1] and x.device.type == "cpu"


def row_times(x: Tensor, weight: Tensor) -> Tensor:
    """One row x (..., n) times weight (m, n) of any dtype -> (m,), at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    # as_strided makes Inductor store the row, converted, once; without it a compiled step was slower (docs/log.md).
    row = x.reshape(1, -1).to(wide).as_strided((1, x.shape[-1]), (x.shape[-1], 1))
    return (weight.to(wide) * row).sum(-1)


class Embedding(nn.Embedding):
    """`nn.Embedding` that leaves its weight uninitialised, as `Linear` does."""

    def reset_parameters(self) -> None:
        pass


class Scaling:
    """How a checkpoint's frequencies were stretched beyond the context that it was first trained on."""

    attention_factor = 1.0  # what rotated queries and keys are multiplied by

    def stretch(self, freq: Tensor, theta: float, dim: int) -> Tensor:
        """freq (dim/2,) float32, theta ** (-2i / dim) radians per position -> the stretched ones."""
        return freq


@dataclass(frozen=True)
class LinearScaling(Scaling):
    """Position interpolation (arXiv 2306.15595): every frequency is divided by `factor`."""

    factor: float

    def stretch(self, freq: Tensor, theta: float, dim: int) -> Tensor:
        return freq / self.factor


@dataclass(frozen=True)
class Llama3Scaling(Scaling):
    """Llama 3.1: wavelengths beyond the original context are stretched by `factor`, short ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def stretch(self, freq: Tensor, theta: float, dim: int) -> Tensor:
        turns = self.original_max_position_embeddings * freq / (2 * math.pi)  # within the original context
        keep = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return keep * freq + (1 - keep) * freq / self.factor


@dataclass(frozen=True)
class YarnScaling(Scaling):
    """YaRN (arXiv 2309.00071): dimensions that turn more than `beta_fast` times within the original context are kept, those that turn less
    than `beta_slow` times are divided by `factor`, a ramp over the dimension's index lies between; queries and keys grow by
    `attention_factor`."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # the ramp begins and ends at whole dimensions

    def stretch(self, freq: Tensor, theta: float, dim: int) -> Tensor:
        def dimension(turns: float) -> float:
            """The index of the dimension pair that turns this often within the original context."""
            return dim * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = (torch.arange(len(freq), dtype=torch.float32, device=freq.device) - low) / (high - low or 0.001)
        ramp = ramp.clamp(0, 1)
        return freq * (1 - ramp) + freq / self.factor * ramp


@dataclass(frozen=True)
class DynamicScaling(Scaling):
    """ "Dynamic NTK": theta grows with the length of the sequence once that exceeds `max_position_embeddings`.

    The length is that of the call: the largest position of each sequence in it. So a key keeps the angles of the call that it came
    with: a prompt is one call, and each decoded token another with angles of its own. Past `max_position_embeddings` one pass,
    chunks and single tokens therefore differ, by the method's definition.
    """

    factor: float
    max_position_embeddings: int

    def frequencies(self, pos: Tensor, theta: float, dim: int) -> Tensor:
        """For a call with positions (B, T): (B, 1, 1, dim/2) float32."""
        length = (pos.amax(1) + 1).clamp(min=self.max_position_embeddings).double()
        base = theta * (self.factor * length / self.max_position_embeddings - (self.factor - 1)) ** (dim / (dim - 2))
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=pos.device) / dim
        return (base[:, None, None, None] ** -exponent).float()


@dataclass(frozen=True)
class Rope:
    """Rotary options as a checkpoint's config states them. partial: the share of a head's dimensions, its first ones, that turn."""

    theta: float = 10000.0
    scaling: Scaling | None = None
    partial: float = 1.0


class Rotary(nn.Module):
    """Rotary position embedding (RoFormer, arXiv 2104.09864), in the half-split layout of Hugging Face's checkpoints:
    of n turning pairs, dimension i goes together with dimension i + n. Swapping it for the interleaved layout passes short prompts
    and drifts after ten tokens. Where `rope.partial` is less than 1, dimensions from 2n on carry no position.

    Angles, cos and sin are float32 whatever the model's dtype. `unrotate` is the inverse, for methods that compare keys without
    their positions. With DynamicScaling it sees keys as though all had come in one call that ended at the last of their positions:
    exact for one call's keys and up to `max_position_embeddings`, an approximation for keys of several longer calls.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int, rope: Rope) -> None:
        super().__init__()
        self.rope, self.dim = rope, int(head_dim * rope.partial)
        self.register_buffer("inv_freq", self.frequencies(), persistent=False)

    @property
    def whole_prompts(self) -> bool:
        """Whether a prompt must come in one call, because its angles depend on its length."""
        return isinstance(self.rope.scaling, DynamicScaling)

    def frequencies(self) -> Tensor:
        """(n,) float32 radians per position. Always computed on the CPU: also a model laid out on `meta` has real frequencies."""
        freq = 1.0 / self.rope.theta ** (torch.arange(0, self.dim, 2, dtype=torch.float32, device="cpu") / self.dim)
        return freq if self.rope.scaling is None else self.rope.scaling.stretch(freq, self.rope.theta, self.dim)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Moves with the model but never changes dtype: bfloat16 frequencies would misplace every token past the first hundred."""
        super()._apply(fn, recurse)
        self.inv_freq = self.frequencies().to(self.inv_freq.device)
        return self

    def tables(self, pos: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (B, 1, T, n) float32 for positions (B, T), times the scaling's attention factor; shared by all layers of one
        call."""
        s = self.rope.scaling
        freq = s.frequencies(pos, self.rope.theta, self.dim) if isinstance(s, DynamicScaling) else self.inv_freq
        angle = pos[:, None, :, None].to(torch.float32) * freq
        return scaled(angle.cos(), angle.sin(), 1.0 if s is None else s.attention_factor)

    def rotate(self, x: Tensor, pos: Tensor) -> Tensor:
        """x (B, h, T, D) at positions (B, T) -> the same, rotated."""
        return turn(x, *self.tables(pos))

    def unrotate(self, x: Tensor, pos: Tensor) -> Tensor:
        """The inverse of `rotate`."""
        cos, sin = self.tables(pos)
        s = self.rope.scaling
        return turn(x, *scaled(cos, -sin, 1.0 if s is None else s.attention_factor**-2))


def scaled(cos: Tensor, sin: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + n}), i < n, by the angles in cos and sin (..., n); what lies behind 2n stays as it is."""
    n = cos.shape[-1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    left, right = wide[..., :n], wide[..., n : 2 * n]
    turned = [left * cos - right * sin, right * cos + left * sin]
    return torch.cat(turned if 2 * n == x.shape[-1] else [*turned, wide[..., 2 * n :]], -1).to(x.dtype)


def rotates(cache: Any, tokens: int) -> bool:
    """Whether a cache rotates calls of this many tokens itself."""
    return isinstance(cache, Cache) and cache.rotates(tokens)


def attend(cache: Any, q: Tensor, k: Tensor, v: Tensor, pos: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """q (B, H, T, D), k, v (B, G, T, D), not rotated yet -> out (B, H, T, D): `cache.attend` of them rotated; a cache that says so does the
    rotation itself, in one pass with the write."""
    if rotates(cache, q.shape[2]):
        return cache.attend_rotating(q, k, v, pos, cos, sin)
    return cache.attend(turn(q, cos, sin), turn(k, cos, sin), v, pos)


def spans(layers: Sequence[nn.Module] | nn.ModuleList, caches: Sequence[Any]) -> Iterator[tuple[list[nn.Module], list[Any]]]:
    """The layers with their caches in equal runs of at most six: what `region` takes at a time."""
    n = len(layers)
    size = max(k for k in range(1, 7) if n % k == 0)
    for i in range(0, n, size):
        yield list(layers)[i : i + size], list(caches)[i : i + size]


def run(layers: list[nn.Module], caches: list[Any], x: Tensor, cos: Tensor, sin: Tensor, pos: Tensor) -> Tensor:
    """x (B, T, C) through some layers."""
    for layer, cache in zip(layers, caches, strict=True):
        x = layer(x, cos, sin, pos, cache)
    return x


# The same, of which torch.compile compiles the first call and reuses its code for the others: the first compiled token comes two to three
# times sooner. Not for what writes into caches by an operator of ours: PyTorch refuses those in a region that is called twice.
region = torch.compiler.nested_compile_region(run)


class CausalLM(nn.Module):
    """What every family is: `hidden` and `logits` make the model."""

    config: Any
    rotary: Rotary

    @abstractmethod
    def hidden(self, ids: Tensor, pos: Tensor | None, cache: Caches | None = None) -> Tensor:
        """ids (B, T) int64 at positions (B, T) (None = from 0) -> last hidden states (B, T, C), in the model's dtype."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, V) float32."""

    def through(self, layers: nn.ModuleList, x: Tensor, pos: Tensor | None, cache: Caches | None) -> Tensor:
        """x (B, T, C) through all layers at positions (B, T) (None = from 0); without a cache, one exact causal pass."""
        without = NoCache(self.config.sliding_window, positions=pos is not None)
        caches = [without] * len(layers) if cache is None else list(cache)
        pos = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) if pos is None else pos
        cos, sin = self.rotary.tables(pos)
        if any(rotates(c, x.shape[1]) for c in caches):
            return run(list(layers), caches, x, cos, sin, pos)
        for some, theirs in spans(layers, caches):
            x = region(some, theirs, x, cos, sin, pos)
        return x

    def forward(self, ids: Tensor, cache: Caches | None = None, pos: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) float32 of T new tokens `ids` (B, T) int64. With a cache, it is read and extended; positions follow on
        from what it has seen unless `pos` (B, T) says otherwise (-1 = padding). Without, one exact causal pass."""
        if cache is None:
            return self.logits(self.hidden(ids, pos))
        return torch.cat([self.logits(self.hidden(i, p, cache)) for i, p in cache.split(ids, pos)], 1)
