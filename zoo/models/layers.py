"""What the families share: RMSNorm, the rotary embedding, and a linear layer that decodes at memory speed.

Shapes: B batch, T new tokens, h any number of heads, D head size; positions (B, T) int64, -1 = padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    """`nn.Linear` whose compiled single-token form is a plain multiply-and-sum.

    One token through a weight matrix is bound by reading the matrix once. Inductor turns the multiply-and-sum into one vectorised
    loop with float32 sums; on CPUs it reads bfloat16 weights at about twice the speed of the library's one-row GEMM (docs/log.md).
    """

    def forward(self, x: Tensor) -> Tensor:
        one_row = x.numel() == x.shape[-1]
        if not (torch.compiler.is_compiling() and one_row and x.device.type == "cpu"):
            return F.linear(x, self.weight, self.bias)
        wide = torch.promote_types(x.dtype, torch.float32)
        # as_strided makes Inductor store the row, converted, once; without it a compiled step was slower (docs/log.md).
        row = x.reshape(1, -1).to(wide).as_strided((1, x.shape[-1]), (x.shape[-1], 1))
        y = (self.weight.to(wide) * row).sum(-1)
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)


@dataclass(frozen=True)
class Rope:
    """Rotary options as a checkpoint's config states them. `scaling` None = plain, else Llama 3.1's four numbers."""

    theta: float = 10000.0
    scaling: Llama3Scaling | None = None


@dataclass(frozen=True)
class Llama3Scaling:
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class Rotary(nn.Module):
    """Rotary position embedding (RoFormer, arXiv 2104.09864), in the half-split layout of Hugging Face's checkpoints:
    dimension i turns together with dimension i + D/2. Swapping it for the interleaved layout passes short prompts and drifts
    after ten tokens.

    Angles, cos and sin are float32 whatever the model's dtype. `unrotate` is the inverse, for methods that compare keys without
    their positions.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int, rope: Rope) -> None:
        super().__init__()
        self.head_dim, self.rope = head_dim, rope
        self.register_buffer("inv_freq", self.frequencies(), persistent=False)

    def frequencies(self) -> Tensor:
        """(D/2,) float32 radians per position. Always computed on the CPU: also a model laid out on `meta` has real frequencies."""
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device="cpu") / self.head_dim
        freq = 1.0 / self.rope.theta**exponent
        s = self.rope.scaling
        if s is None:
            return freq
        # Llama 3.1: wavelengths beyond the original context are stretched by `factor`, short ones kept, those between blended.
        wavelength = 2 * math.pi / freq
        turns = s.original_max_position_embeddings / wavelength
        keep = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
        return keep * freq + (1 - keep) * freq / s.factor

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Moves with the model but never changes dtype: bfloat16 frequencies would misplace every token past the first hundred."""
        super()._apply(fn, recurse)
        self.inv_freq = self.frequencies().to(self.inv_freq.device)
        return self

    def tables(self, pos: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (B, 1, T, D/2) float32 for positions (B, T); shared by all layers of one call."""
        angle = pos[:, None, :, None].to(torch.float32) * self.inv_freq
        return angle.cos(), angle.sin()

    def rotate(self, x: Tensor, pos: Tensor) -> Tensor:
        """x (B, h, T, D) at positions (B, T) -> the same, rotated."""
        return turn(x, *self.tables(pos))

    def unrotate(self, x: Tensor, pos: Tensor) -> Tensor:
        """The inverse of `rotate`."""
        cos, sin = self.tables(pos)
        return turn(x, cos, -sin)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) by the angles in cos and sin."""
    left, right = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1).to(x.dtype)


def spans(layers: Sequence[nn.Module] | nn.ModuleList, caches: Sequence[Any]) -> Iterator[tuple[list[nn.Module], list[Any]]]:
    """The layers with their caches in equal runs of at most six: what `run` takes at a time."""
    n = len(layers)
    size = max(k for k in range(1, 7) if n % k == 0)
    for i in range(0, n, size):
        yield list(layers)[i : i + size], list(caches)[i : i + size]


@torch.compiler.nested_compile_region
def run(layers: list[nn.Module], caches: list[Any], x: Tensor, cos: Tensor, sin: Tensor, pos: Tensor) -> Tensor:
    """x (B, T, C) through some layers. torch.compile compiles the first such run and reuses its code for the others, which
    makes the first compiled token come two to three times sooner; alone it is an ordinary loop."""
    for layer, cache in zip(layers, caches, strict=True):
        x = layer(x, cos, sin, pos, cache)
    return x
