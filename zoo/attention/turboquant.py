"""`turboquant`: keys and values in a few bits a number after a random rotation, without a look at the data (TurboQuant, arXiv 2504.19874).

    y = sqrt(D) Pi x / |x|       Pi: a random rotation (QR of a Gaussian matrix), the same everywhere; |x| is kept, float16
    each y_i -> the nearest of 2**bits centroids of N(0, 1) (Lloyd-Max)          x ~ |x| Pi^T c / sqrt(D)
After the rotation the coordinates of any vector are nearly Gaussian, so that one list of centroids, found once, is the best for all:
    E |x - x~|^2 / |x|^2 = 0.363, 0.117, 0.0346, 0.0095 at 1, 2, 3, 4 bits     (the bound: sqrt(3) pi / 2 * 4**-bits)
mode=mse: keys and values as above.  mode=prod: keys with one bit less, and of what is left, r = y - c, the signs of S r and |r|:
    q.k ~ |k| / sqrt(D) (Pi q.c + f |r| (S Pi q).sign(S r) / D)    S: random orthogonal rows of length sqrt(D); f so that it is unbiased
    An inner product is then right on average, at the price of more noise; values have mode mse, as a mean wants little noise and no bias.
bits may be a fraction: at 3.5, half of the rotated coordinates have 4 bits, the others 3. (The paper gives the bits to channels that stand
    out, which it must find in the data, and has two rotations and two norms; here a rotation has made all alike.)
exact when: residual >= tokens. cost: bits D / 8 bytes + 2 for a key (prod: + 4), bits D / 8 + 2 for a value, 4 beside it for its
position (stacked: 8, with a log-weight); a rotation of each query and each answer, in place of one for each key; for all layers together
4 D^2 bytes (prod: 8 D^2).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import random
from zoo.attention.encoding import Code, Codes, Encoding
from zoo.attention.packing import LARGEST, pack, packed, unpack
from zoo.errors import ZooError

MODES = ("mse", "prod")


@functools.cache
def centroids(bits: int) -> Tensor:
    """The 2**bits numbers (ascending, float64) to which a number of N(0, 1) is nearest in the mean square: Lloyd's iteration, exactly."""
    half = torch.arange(2 ** max(bits - 1, 0), dtype=torch.float64)
    x = 3**0.5 * torch.special.ndtri((half + 0.5) / len(half) / 2 + 0.5)  # of the density that many centroids have (Panter and Dite, 1951)
    for _ in range(20 * 4**bits if bits < 6 else 20000):
        edges = torch.cat((torch.zeros(1), (x[1:] + x[:-1]) / 2, torch.full((1,), torch.inf)))
        density, above = (-edges.square() / 2).exp() / math.sqrt(2 * math.pi), torch.special.erfc(edges / math.sqrt(2)) / 2
        old, x = x, (density[:-1] - density[1:]) / (above[:-1] - above[1:])
        if (x - old).abs().max() < 1e-12:
            break
    return torch.cat((-x.flip(0), x)) if bits else torch.zeros(1, dtype=torch.float64)


def gaussian(seed: int, rows: int, columns: int, which: int) -> Tensor:
    """(rows, columns) float64 of N(0, 1), a function of the seed and of which matrix it is."""
    i, j, n = torch.arange(rows)[:, None], torch.arange(columns), torch.tensor(which)
    radius = (-2 * random.uniform(seed, n, i, j, torch.tensor(0)).double().log()).sqrt()
    return radius * (2 * math.pi * random.uniform(seed, n, i, j, torch.tensor(1)).double()).cos()


def rotation(seed: int, size: int, which: int) -> Tensor:
    """A random orthogonal matrix (size, size), float64."""
    q, r = torch.linalg.qr(gaussian(seed, size, size, which))
    return q * r.diagonal().sign()  # else not all rotations were equally likely


def unbiased(size: int) -> float:
    """f with E[f <s, q> sign <s, r>] = <q, r> / |r| for s of length sqrt(size) in a random direction: sqrt(pi / 2) for large sizes."""
    return math.exp(math.lgamma((size + 1) / 2) - math.lgamma(size / 2)) * math.sqrt(math.pi / size)


def signs(data: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Packed bits -> -1 and 1 (..., size)."""
    return 2 * unpack(data, 1, size).to(dtype) - 1


@dataclass(frozen=True)
class TurboQuant(Encoding):
    """bits: 1 to 8 a number, fractions too, such as 2.5 or 3.5, where that is a whole number of eights. mode: mse or prod, of keys."""

    bits: float = 4.0
    mode: str = "mse"
    seed: int = 0

    shared: ClassVar[tuple[str, ...]] = ("rotation", "sketch", "centroids")
    factor: ClassVar[str] = "v_norm"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(1 <= self.bits <= 8, "bits", "between 1 and 8")
        self.check(self.mode in MODES, "mode", f"one of {', '.join(MODES)}")

    @property
    def of_keys(self) -> float:
        return self.bits - (self.mode == "prod")

    def runs(self, bits: float, size: int) -> list[tuple[int, int]]:
        """(coordinates, bits of each): those with one bit more first, in whole eights. Raises ZooError where bits asks for others."""
        exact = (bits - math.floor(bits)) * size / 8
        more = round(exact) * 8
        if abs(more - 8 * exact) > 1e-6:
            less, most = (self.bits + (n - exact) * 8 / size for n in (math.floor(exact), min(math.ceil(exact), size / 8)))
            where = f"a whole number of eights of the {size} coordinates of a head"
            raise ZooError(f"turboquant: bits={self.bits:g} must give one bit more to {where}; take {less:g} or {most:g}")
        return [(n, b) for n, b in ((more, math.floor(bits) + 1), (size - more, math.floor(bits))) if n]

    def codes(self, size: int, stacked: bool = True) -> dict[str, Code]:
        def bytes_(bits: float) -> Code:
            return Code(sum(packed(n, b) for n, b in self.runs(bits, size)), torch.uint8)

        norm = Code(1, torch.float16)
        codes = {"k_code": bytes_(self.of_keys), "k_norm": norm, "v_code": bytes_(self.bits), "v_norm": norm}
        return codes | ({"k_sign": Code(packed(size, 1), torch.uint8), "k_rest": norm} if self.mode == "prod" else {})

    def tables(self, size: int) -> dict[str, Tensor]:
        sketch = rotation(self.seed, size, 1) * size**0.5 if self.mode == "prod" else torch.zeros(0)
        levels = {b for bits in (self.of_keys, self.bits) for _, b in self.runs(bits, size)}
        lists = torch.cat([centroids(b) for b in sorted(levels)])
        return {"rotation": rotation(self.seed, size, 0).float(), "sketch": sketch.float(), "centroids": lists.float()}

    def levels(self, tables: Codes, bits: int, size: int, dtype: torch.dtype) -> Tensor:
        """The centroids of this many bits, out of the table."""
        before = sum(2**b for b in {b for bits in (self.of_keys, self.bits) for _, b in self.runs(bits, size)} if b < bits)
        return tables["centroids"][before : before + 2**bits].to(dtype)

    def compress(self, x: Tensor, bits: float, tables: Codes) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., D) -> code (..., bytes), norm (..., 1), and what the code leaves of the rotated x, scaled to length sqrt(D)."""
        D, norm = x.shape[-1], x.norm(dim=-1, keepdim=True)
        y = x @ tables["rotation"].to(x.dtype).mT * (D**0.5 / norm.clamp(min=1e-30))
        code, rest, start = [], [], 0
        for n, b in self.runs(bits, D):
            level, part = self.levels(tables, b, D, x.dtype), y[..., start : start + n]
            nearest = torch.bucketize(part.contiguous(), (level[1:] + level[:-1]) / 2)
            code.append(pack(nearest, b))
            rest.append(part - level[nearest])
            start += n
        return torch.cat(code, -1), norm.clamp(max=LARGEST).half(), torch.cat(rest, -1)

    def expand(self, code: Tensor, bits: float, tables: Codes, size: int, dtype: torch.dtype) -> Tensor:
        """The centroids (..., D) of a code."""
        out, start = [], 0
        for n, b in self.runs(bits, size):
            end = start + packed(n, b)
            index = unpack(code[..., start:end], b, n) if b else torch.zeros(*code.shape[:-1], n, dtype=torch.uint8, device=code.device)
            out.append(self.levels(tables, b, size, dtype)[index.int()])
            start = end
        return torch.cat(out, -1)

    def encode(self, k: Tensor, v: Tensor, old: Codes, fixed: Tensor, tables: Codes) -> Codes:
        codes = {}
        codes["k_code"], codes["k_norm"], rest = self.compress(k, self.of_keys, tables)
        codes["v_code"], codes["v_norm"], _ = self.compress(v, self.bits, tables)
        if self.mode == "prod":
            codes["k_sign"] = pack(rest @ tables["sketch"].to(rest.dtype).mT > 0, 1)
            codes["k_rest"] = rest.norm(dim=-1, keepdim=True).half()
        return codes

    def turned(self, codes: Codes, tables: Codes, size: int, dtype: torch.dtype, factor: float) -> Tensor:
        """Of decoded keys of length sqrt(D), still rotated: (..., D). factor: of the signs' part; f is unbiased, 1 / f nearest."""
        y = self.expand(codes["k_code"], self.of_keys, tables, size, dtype)
        if self.mode == "prod":
            scale = codes["k_rest"].to(dtype) * (factor / size)
            y = y + scale * (signs(codes["k_sign"], size, dtype) @ tables["sketch"].to(dtype))
        return y

    def keys(self, codes: Codes, tables: Codes, size: int, dtype: torch.dtype) -> Tensor:
        y = self.turned(codes, tables, size, dtype, unbiased(size)) * (codes["k_norm"].to(dtype) * size**-0.5)
        return y @ tables["rotation"].to(dtype)

    def again(self, codes: Codes, tables: Codes, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        k, v = self.turned(codes, tables, size, dtype, 1 / unbiased(size)), self.expand(codes["v_code"], self.bits, tables, size, dtype)
        pairs = ((k, codes["k_norm"]), (v, codes["v_norm"]))
        k, v = (F.normalize(y, dim=-1) * norm.to(dtype) @ tables["rotation"].to(dtype) for y, norm in pairs)
        return k, v

    def values(self, codes: Codes, tables: Codes, size: int, dtype: torch.dtype) -> Tensor:
        return self.expand(codes["v_code"], self.bits, tables, size, dtype) * (codes["v_norm"].to(dtype) * size**-0.5)

    def answer(self, out: Tensor, tables: Codes) -> Tensor:
        return out @ tables["rotation"].to(out.dtype)

    def ask(self, q: Tensor, tables: Codes) -> Tensor:
        q = q @ tables["rotation"].to(q.dtype).mT
        return torch.cat((q, q @ tables["sketch"].to(q.dtype).mT), -1) if self.mode == "prod" else q

    def scores(self, q: Tensor, codes: Codes, tables: Codes, size: int) -> Tensor:
        score = q[..., :size] @ self.expand(codes["k_code"], self.of_keys, tables, size, q.dtype).mT
        if self.mode == "prod":
            scale = codes["k_rest"].to(q.dtype) * (unbiased(size) / size)
            score = score + q[..., size:] @ signs(codes["k_sign"], size, q.dtype).mT * scale.mT
        return score * (codes["k_norm"].to(q.dtype) * size**-0.5).mT
