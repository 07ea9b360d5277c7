"""Random numbers that are a function of where they are used: the same seed gives the same numbers in any batch, chunking or process.

A generator with state would make a sequence's draws depend on its neighbours in the batch, and would break a compiled graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN, MIX1, MIX2 = -7046029254386353131, -4658895280553007687, -7723592293110705685  # splitmix64's constants, as signed int64


def scramble(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * MIX1  # int64's >> copies the sign; the masks make it a logical shift
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * MIX2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def seed_tensor(seed: int, device: torch.device | str) -> Tensor:
    """() int64: a seed for a compiled step, which would take a number for a constant. It counts modulo 2**64."""
    return torch.full((), (seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)


def uniform(seed: int | Tensor, *coordinates: Tensor) -> Tensor:
    """Uniform float32 in (0, 1), one for each element of the broadcast int64 coordinates."""
    seed = seed if isinstance(seed, Tensor) else seed_tensor(seed, coordinates[0].device)
    x = scramble(seed + GOLDEN)
    for c in coordinates:
        x = scramble(x * GOLDEN + c.to(torch.int64) + 1)
    # 23 bits and a half are exact in float32; with 24 the largest would round to 1, whose Gumbel noise is infinite.
    return (((x >> 41) & 0x7FFFFF).to(torch.float32) + 0.5) * 2.0**-23


def gumbel(seed: int | Tensor, *coordinates: Tensor) -> Tensor:
    """Gumbel noise: argmax(logits + gumbel) is a draw from softmax(logits)."""
    return -(-uniform(seed, *coordinates).log()).log()
