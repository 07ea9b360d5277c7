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


def uniform(seed: int, *coordinates: Tensor) -> Tensor:
    """Uniform float32 in (0, 1), one for each element of the broadcast int64 coordinates. `seed` counts modulo 2**64."""
    seed = (seed + 2**63) % 2**64 - 2**63
    x = scramble(torch.full((), seed, dtype=torch.int64, device=coordinates[0].device) + GOLDEN)
    for c in coordinates:
        x = scramble(x * GOLDEN + c.to(torch.int64) + 1)
    # 23 bits and a half are exact in float32; with 24 the largest would round to 1, whose Gumbel noise is infinite.
    return (((x >> 41) & 0x7FFFFF).to(torch.float32) + 0.5) * 2.0**-23


def gumbel(seed: int, *coordinates: Tensor) -> Tensor:
    """Gumbel noise: argmax(logits + gumbel) is a draw from softmax(logits)."""
    return -(-uniform(seed, *coordinates).log()).log()
