"""`kivi`: keys and values in 2, 4 or 8 bits, keys per channel and values per token (KIVI, arXiv 2402.02750).

    x ~ zero + scale * n,  n in {0 .. 2**bits - 1}    zero, scale (float16): the minimum and range / (2**bits - 1) of those that share them
    keys: the 32 tokens of a group share them, in each channel.  values: 32 channels of a token do.
Keys have channels that are large in every token; a grid of their own keeps them from making all others coarse. Values have none.
exact when: residual >= tokens. Otherwise a number is at most scale / 2 away.
stacked, a key may come into a page whose grid is made. It has a grid of its own then, for each 32 channels, in steps of the page's:
    x ~ zero + scale * (zero' + scale' * n)         zero', scale': 0, 1 for the keys that the page's grid was made of
    scale is at least the median over channels here, as a page made of few keys knows nothing of later ones. Nothing is cut off as keys turn
    away with their positions, and a channel that is large in every key is no trouble for the others as long as it stays near its grid. One
    that turns far away takes the bits of its group: docs/methods/kivi.md has figures.
cost: bits D / 8 bytes and 4 D / 32 for a key (stacked: 8 D / 32), bits D / 8 and 4 D / 32 for a value (D a multiple of 32), 4 beside it for
its position (stacked: 8, with a log-weight).
alone: the newest `residual` tokens stay exact (the paper's keys: up to as many; its values: exactly as many). A prompt is read exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.attention.encoding import Code, Codes, Encoding
from zoo.attention.packing import decode_tokens, encode_tokens, grid, group, pack, packed, steps, unpack


@dataclass(frozen=True)
class Kivi(Encoding):
    """bits: 2, 4 or 8, of keys and values."""

    bits: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.bits in (2, 4, 8), "bits", "2, 4 or 8")

    def codes(self, size: int, stacked: bool = True) -> dict[str, Code]:
        half, byte, n = torch.float16, torch.uint8, packed(size, self.bits)
        grids = Code(2 * size // group(size), half)
        codes = {"k_steps": Code(n, byte), "k_grid": Code(2 * size, half, shared=True), "v_steps": Code(n, byte), "v_grid": grids}
        return codes | ({"k_own": grids} if stacked else {})

    def encode(self, k: Tensor, v: Tensor, old: Codes, fixed: Tensor, tables: Codes) -> Codes:
        new = torch.cat(grid(k.amin(1), k.amax(1), self.bits), -1)
        grids = torch.where(fixed[:, None], old["k_grid"], new)
        zero, scale = grids[:, None].to(k.dtype).chunk(2, -1)
        values, of_values = encode_tokens(v, self.bits)
        codes = {"k_steps": pack(steps(k, zero, scale, self.bits), self.bits), "k_grid": grids, "v_steps": values, "v_grid": of_values}
        if "k_own" in old:
            late, own = encode_tokens((zero - k) / self.wide(zero, scale), self.bits)  # downwards: the sign of a scale says that it is late
            plain = torch.tensor([0.0, 1.0], device=k.device).half().repeat_interleave(own.shape[-1] // 2)
            where = fixed[:, None, None]
            codes |= {"k_steps": torch.where(where, late, codes["k_steps"]), "k_own": torch.where(where, -own, plain.expand(own.shape))}
        return codes

    def wide(self, zero: Tensor, scale: Tensor) -> Tensor:
        """Steps of a page's grid as late keys take them (..., D). Few keys may agree in a channel where later ones do not, and one large
        number would make its whole group coarse: no step is below the median one, nor 0."""
        least = torch.maximum(scale.median(-1, keepdim=True).values, zero.abs().mean(-1, keepdim=True) / 512)
        return torch.maximum(scale, least.clamp(min=2**-14))

    def keys(self, codes: Codes, tables: Codes, size: int, dtype: torch.dtype) -> Tensor:
        zero, scale = codes["k_grid"].to(dtype)[:, None].chunk(2, -1)
        if "k_own" in codes:
            own = codes["k_own"]
            scale = torch.where(own[..., -1:].signbit(), self.wide(zero, scale), scale)
            return zero + scale * decode_tokens(codes["k_steps"], own, self.bits, size, dtype)
        return zero + scale * unpack(codes["k_steps"], self.bits, size)

    def values(self, codes: Codes, tables: Codes, size: int, dtype: torch.dtype) -> Tensor:
        return decode_tokens(codes["v_steps"], codes["v_grid"], self.bits, size, dtype)
