"""What this machine can do: the two rates that bound a language model, measured in the same run as everything else.

bandwidth   bytes a second that a sum over a large matrix, or its product with a vector, reads, whichever is faster; decode multiplies
            each weight with one vector and cannot be faster
gemm        floating-point operations a second of a large matrix product; prefill is made of these
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

MEGABYTES = 256  # of the matrix that is read: far more than any cache holds


def seconds(call: Callable[[], object], repeats: int = 7) -> float:
    """Median seconds of a call, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def bandwidth() -> float:
    """Bytes a second that are read from memory."""
    rows = MEGABYTES * 2**20 // 4 // 4096
    matrix, vector, out = torch.ones(rows, 4096), torch.ones(4096), torch.empty(rows)
    return matrix.nbytes / min(seconds(lambda: torch.mv(matrix, vector, out=out)), seconds(lambda: matrix.sum()))


def gemm(dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of a product of square matrices."""
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    out = torch.empty(size, size, dtype=dtype)
    return 2 * size**3 / seconds(lambda: torch.mm(a, b, out=out))


def rates(dtype: torch.dtype) -> dict[str, float]:
    return {"bandwidth": bandwidth(), "gemm": gemm(dtype)}
