"""Numbers of a few bits, several to a byte, and the grids that they are steps of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST = 65504.0  # of float16


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integers below 2**bits (..., n) -> uint8 (..., `packed`(n, bits)): number i takes the bits from i * bits on, lowest first."""
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[-1] % 8))
    each = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = (codes[..., None] >> each & 1).flatten(-2).unflatten(-1, (codes.shape[-1] // 8 * bits, 8))
    return (stream << torch.arange(8, dtype=torch.uint8, device=codes.device)).sum(-1, dtype=torch.uint8)


def packed(n: int, bits: int) -> int:
    """Bytes that n numbers take: whole eights of them."""
    return -(-n // 8) * bits


def unpack(data: Tensor, bits: int, n: int) -> Tensor:
    """The numbers (..., n) that `pack` made (..., bytes) of: uint8."""
    if bits in (1, 2, 4):
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)
        return (data[..., None] >> shifts & (1 << bits) - 1).flatten(-2)[..., :n]
    if bits == 8:
        return data[..., :n]
    bytes_ = data.unflatten(-1, (data.shape[-1] // bits, bits)).long()  # eight numbers lie in as many bytes as one has bits
    words = (bytes_ << torch.arange(0, 8 * bits, 8, device=data.device)).sum(-1)
    codes = words[..., None] >> torch.arange(0, 8 * bits, bits, device=data.device) & (1 << bits) - 1
    return codes.flatten(-2)[..., :n].to(torch.uint8)


def grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(zero, scale) float16 so that zero + scale * {0 .. 2**bits - 1} reaches from below `low` to above `high`: rounded outwards, so that
    whatever lies between is at most scale / 2 from a step."""
    low, high = low.clamp(-LARGEST, LARGEST), high.clamp(-LARGEST, LARGEST)
    zero = low.half()
    zero = torch.where(zero > low, (low - low.abs() * 2**-10 - 2**-24).half(), zero)
    step = (high - zero) / (2**bits - 1)
    scale = step.half()
    return zero, torch.where(scale < step, (step * (1 + 2**-10) + 2**-24).half(), scale)


def steps(x: Tensor, zero: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The nearest step of a grid, uint8; what lies outside goes to its ends."""
    return ((x - zero) / scale.to(x.dtype).clamp(min=1e-8)).round().clamp(0, 2**bits - 1).to(torch.uint8)


# Tokens on grids of their own: each has one for every 32 channels


def group(size: int) -> int:
    """Channels that share a grid."""
    return math.gcd(size, 32)


def encode_tokens(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x (..., D) -> packed steps (..., D bits / 8) and grids (..., 2 D / 32) float16, zeros first."""
    x = x.unflatten(-1, (-1, group(x.shape[-1])))
    zero, scale = grid(x.amin(-1), x.amax(-1), bits)
    return pack(steps(x, zero[..., None], scale[..., None], bits).flatten(-2), bits), torch.cat((zero, scale), -1)


def decode_tokens(data: Tensor, grids: Tensor, bits: int, size: int, dtype: torch.dtype) -> Tensor:
    """(..., D) in `dtype`."""
    zero, scale = grids.to(dtype)[..., None].chunk(2, -2)
    return (zero + scale * unpack(data, bits, size).unflatten(-1, (-1, group(size)))).flatten(-2)
