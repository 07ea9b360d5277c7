"""`qjl`: keys as signs of random projections, values in 2 bits (QJL, arXiv 2406.03482).

    a key k is kept as sign(S k), m = sketch D bits, and |k|, float16      S: rows in random directions, orthogonal in blocks of D
    q.k ~ f |k| (S q).sign(S k) / m         f so that it is unbiased; the query is not quantised
Scores come straight from the sketch: S q once a step, no key is decoded (f |k| S^T sign(S k) / m says the same, but is longer than k; what
    goes into other slots has the length |k| and the same signs: `again`).
outliers: in each group of 32 tokens, the 8 channels of the largest norm have a sketch (half as many bits) and a norm of their own: a
    channel that is large in every key would otherwise make noise for all, which grows with |q| |k|.
values: per token, 2 bits, as in kivi.py.
exact when: residual >= tokens; otherwise scores are right on average, and their error falls with m (the exponential of a noisy score is
    larger than that of its mean, though). Not here: twice the bits in the first 15 layers, as the paper's experiments have.
cost: 1.5 sketch D / 8 bytes + 4 for a key, 8 for the channels of 32 keys; 2 D / 8 + 4 D / 32 for a value; 4 beside it for its
position (stacked: 8, with a log-weight); for all layers together 4 m (D + 4) bytes. A step multiplies S q with as many signs as there are
keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.attention.encoding import Code, Codes, Encoding
from zoo.attention.packing import LARGEST, decode_tokens, encode_tokens, group, pack, packed
from zoo.attention.turboquant import rotation, signs, unbiased

OUTLIERS = 8  # channels
BITS = 2  # of values
STEPS, MARGIN = 8, 0.2  # of `again`


def directions(seed: int, rows: int, size: int, which: int) -> Tensor:
    """(rows, size) of length sqrt(size), in random directions, orthogonal in blocks of `size`: float32."""
    blocks = [rotation(seed, size, which + i) for i in range(-(-rows // size))]
    return (torch.cat(blocks)[:rows] * size**0.5).float()


@dataclass(frozen=True)
class QJL(Encoding):
    """sketch: bits for each channel of a key, half as many again for channels that stand out."""

    sketch: int = 2
    seed: int = 0

    main: ClassVar[str] = "sketch"
    shared: ClassVar[tuple[str, ...]] = ("sketch", "outlier_sketch")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(1 <= self.sketch <= 64, "sketch", "between 1 and 64")

    def codes(self, size: int, stacked: bool = True) -> dict[str, Code]:
        byte, half, m = torch.uint8, torch.float16, self.sketch * size
        return {
            "k_sign": Code(packed(m, 1), byte),
            "k_outlier": Code(packed(m // 2, 1), byte),
            "k_norms": Code(2, half),
            "k_channels": Code(min(OUTLIERS, size), byte, shared=True),
            "v_steps": Code(packed(size, BITS), byte),
            "v_grid": Code(2 * size // group(size), half),
        }

    def tables(self, size: int) -> dict[str, Tensor]:
        m = self.sketch * size
        return {
            "sketch": directions(self.seed, m, size, 0),
            "outlier_sketch": directions(self.seed, m // 2, min(OUTLIERS, size), m),
        }

    def encode(self, k: Tensor, v: Tensor, old: Codes, fixed: Tensor, tables: Codes) -> Codes:
        largest = k.norm(dim=1).topk(min(OUTLIERS, k.shape[-1])).indices.sort().values.to(torch.uint8)
        channels = torch.where(fixed[:, None], old["k_channels"], largest)
        plain, own = self.parted(k, channels)
        values, grids = encode_tokens(v, BITS)
        return {
            "k_sign": pack(plain @ tables["sketch"].to(k.dtype).mT > 0, 1),
            "k_outlier": pack(own @ tables["outlier_sketch"].to(k.dtype).mT > 0, 1),
            "k_norms": torch.stack((plain.norm(dim=-1), own.norm(dim=-1)), -1).clamp(max=LARGEST).half(),
            "k_channels": channels,
            "v_steps": values,
            "v_grid": grids,
        }

    def parted(self, x: Tensor, channels: Tensor) -> tuple[Tensor, Tensor]:
        """x (P, X, D) without the channels (P, 8) that stand out in a page, and these alone (P, X, 8)."""
        index = channels.long()[:, None].expand(*x.shape[:2], -1)
        return x.scatter(2, index, 0.0), x.gather(2, index)

    def halves(self, codes: Codes, tables: Codes, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of the plain channels and of those that stand out: sketch (m, size), signs (P, PAGE, m), and a key's factor (P, PAGE, 1)."""
        both = []
        for i, (table, bits) in enumerate((("sketch", "k_sign"), ("outlier_sketch", "k_outlier"))):
            s, norm = tables[table].to(dtype), codes["k_norms"][..., i, None].to(dtype)
            both.append((s, signs(codes[bits], len(s), dtype), norm * (unbiased(s.shape[1]) / len(s))))
        return both

    def scores(self, q: Tensor, codes: Codes, tables: Codes, size: int) -> Tensor:
        queries, halves = self.parted(q, codes["k_channels"]), self.halves(codes, tables, q.dtype)
        x, y = (one @ s.mT @ sign.mT * scale.mT for one, (s, sign, scale) in zip(queries, halves, strict=True))
        return x + y

    def keys(self, codes: Codes, tables: Codes, size: int, dtype: torch.dtype) -> Tensor:
        plain, own = (sign @ s * scale for s, sign, scale in self.halves(codes, tables, dtype))
        return plain.scatter(2, codes["k_channels"].long()[:, None].expand(*own.shape), own)

    def again(self, codes: Codes, tables: Codes, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys of the length that was kept, in a direction that has all signs: from the estimate's, a few steps towards those it misses."""
        found, index = [], codes["k_channels"].long()[:, None]
        for i, (s, sign, _) in enumerate(self.halves(codes, tables, dtype)):
            x = sign @ s
            x = x if i else x.scatter(2, index.expand(*x.shape[:2], -1), 0.0)
            keep = (x != 0).to(dtype)  # not the channels that stand out
            for _ in range(STEPS):
                x = F.normalize(x, dim=-1)
                x = x + keep * (((MARGIN - sign * (x @ s.mT)).clamp(min=0) * sign) @ s) / len(s)
            found.append(F.normalize(x, dim=-1) * codes["k_norms"][..., i, None].to(dtype))
        plain, own = found
        return plain.scatter(2, index.expand(*own.shape), own), self.values(codes, tables, size, dtype)

    def values(self, codes: Codes, tables: Codes, size: int, dtype: torch.dtype) -> Tensor:
        return decode_tokens(codes["v_steps"], codes["v_grid"], BITS, size, dtype)
