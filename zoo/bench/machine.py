"""What this machine can do: the two rates that bound a language model, measured in the same run as everything else.

bandwidth   bytes a second that a sum over a large matrix reads, or its product with a vector if that is faster: a decode step, which
            needs each weight once, cannot be faster
matvec      bytes a second of the same matrix times a vector by PyTorch (float32): what a library's own matrix-vector product reaches
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


def reading() -> tuple[float, float]:
    """Bytes a second that are read from memory: by a sum, and by a matrix-vector product."""
    rows = MEGABYTES * 2**20 // 4 // 4096
    matrix, vector, out = torch.ones(rows, 4096), torch.ones(4096), torch.empty(rows)
    return matrix.nbytes / seconds(lambda: matrix.sum()), matrix.nbytes / seconds(lambda: torch.mv(matrix, vector, out=out))


def gemm(dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of a product of square matrices."""
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    out = torch.empty(size, size, dtype=dtype)
    return 2 * size**3 / seconds(lambda: torch.mm(a, b, out=out))


def rates(dtype: torch.dtype) -> dict[str, float]:
    bandwidth, matvec = reading()
    return {"bandwidth": max(bandwidth, matvec), "matvec": matvec, "gemm": gemm(dtype)}
