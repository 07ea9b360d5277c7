"""Attention over slots, linear layers of a few rows, and merging of clusters on CPUs, in C++ that is compiled when first needed, and kept.

    attention                         what queries see of a dense store, and of pages beside it: output and log-sum-exp
    attention_and_mass                the same, and the probability that slots received
    ward, rounded                     which clusters to merge, and their means in bfloat16
    torch.ops.zoo.linear(x, weight)   x (M, K) times weight (N, K) transposed, for up to FEW rows: every weight is read once
    torch.ops.zoo.linear_int8         the same for a weight of int8 numbers and a float32 scale a row: x, weight, scale (N,)

They are PyTorch operators (torch.ops.zoo.*), so that a compiled step stays one graph. The machine code is for this very processor. Where
there is no compiler, `ready` says so once, and attention runs through PyTorch's own kernels.

Letters: B batch, H query heads, G key/value heads, T new tokens, S slots, D head size; shapes as in zoo/attention/slots.py.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("zoo")

FOLDER = Path(__file__).parent
SOURCES = [FOLDER / name for name in ("slot_attention.cpp", "linear.cpp", "merging.cpp")]  # an object each
FEW = 16  # rows up to which keys, or weights, are read as they lie
FLAGS = ["-std=c++20", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fPIC", f"-DFEW={FEW}"]
WIDEST = 256  # head size
WORDS = 16  # numbers of a vector: what a row must be a multiple of


def covers(device: torch.device, dtype: torch.dtype, head_dim: int, rows: int) -> bool:
    """Whether the kernels are made for this: `rows` is T H / G. Many rows need bfloat16 and AVX-512, whose GEMM they use."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float32) or head_dim % WORDS or head_dim > WIDEST:
        return False
    if rows <= FEW:
        return True
    library = torch.compiler.is_compiling() or bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)
    return dtype == torch.bfloat16 and library and "AVX512" in torch.backends.cpu.get_cpu_capability().upper()


@functools.cache
def ready(folder: Path) -> bool:
    """Whether the kernels are loaded; compiles them into `folder` where that has not happened yet. Says why not, once."""
    if hasattr(torch.ops.zoo, "attention"):  # loaded already, from another folder; twice would end the process
        return True
    try:
        torch.ops.load_library(build(folder))
    except (OSError, RuntimeError, subprocess.SubprocessError) as e:
        why = getattr(e, "stderr", None) or str(e)
        log.warning(
            "the CPU kernels cannot be used (%s); attention and linear layers run through PyTorch's own", why.strip().partition("\n")[0]
        )
        return False
    declare()
    return True


def build(folder: Path) -> Path:
    """The library's file. Raises OSError where there is no compiler or the folder cannot be written, CalledProcessError with the
    compiler's words."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if not compiler or not shutil.which(compiler[0]):
        raise OSError(f"no C++ compiler {compiler[0]!r}: install g++, or let CXX name one" if compiler else "CXX is empty")
    if sys.platform != "linux":
        raise OSError(f"they are built on Linux only, not on {sys.platform}")
    about = [*(path.read_text() for path in sources()), torch.__version__, processor(), *compiler, *FLAGS]
    library = folder / f"cpu-{hashlib.sha256(chr(0).join(about).encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes one builds, the others wait for it
        if library.exists():
            return library
        with tempfile.TemporaryDirectory(dir=folder) as name, ThreadPoolExecutor() as pool:
            objects = [Path(name, f"{path.stem}.o") for path in SOURCES]
            list(pool.map(compile, SOURCES, objects))
            link(objects, Path(name, "cpu.so"))
            os.replace(f"{name}/cpu.so", library)
    return library


def compile(source: Path, to: Path, *more: str) -> None:
    """One file of C++ into an object. more: further options of the compiler."""
    call("-c", str(source), "-o", str(to), f"-I{Path(torch.__file__).parent / 'include'}", *more)


def link(objects: Sequence[Path], to: Path) -> None:
    call("-shared", *map(str, objects), "-o", str(to), f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-ltorch")


def call(*arguments: str) -> None:
    command = [*shlex.split(os.environ.get("CXX", "g++")), *FLAGS, *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)


def sources() -> list[Path]:
    """All files that the library is made of."""
    return [*SOURCES, *sorted(SOURCES[0].parent.glob("*.h"))]


def processor() -> str:
    """What -march=native depends on."""
    try:
        return next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()


def declare() -> None:
    """What the operators return, for tracing."""

    wide = torch.float32
    torch.library.register_fake("zoo::attention", lambda q, *rest: (q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide)))

    def with_mass(q: Tensor, q_pos: Tensor, k: Tensor, v: Tensor, pos: Tensor, a: Any, pk: Any, *rest: Any) -> tuple[Tensor, ...]:
        listed, page = rest[4], 1 if pk is None else pk.shape[1]
        shapes = (k.shape[:3], (0 if listed is None else listed.shape[0], page))
        return (q.new_empty(q.shape), *(q.new_empty(shape, dtype=wide) for shape in shapes for _ in range(2)))

    torch.library.register_fake("zoo::attention_and_mass", with_mass)

    def rows(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        return x.new_empty(x.shape[0], weight.shape[0])

    for name in ("linear", "linear_int8"):
        torch.library.register_fake(f"zoo::{name}", rows)
    torch.library.register_fake("zoo::ward", lambda x, *rest: x.new_empty(x.shape[:3], dtype=torch.int64))
    torch.library.register_fake("zoo::rounded", lambda mean, *rest: mean.new_empty(mean.shape, dtype=torch.bfloat16))


def attention(q: Tensor, q_pos: Tensor, slots: Any, pages: Any = None, spans: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """q (B, H, T, D) at q_pos (B, T), `Slots` without separate denominator weights and, if given, `PagedSlots` beside them, in one softmax
    -> out (B, H, T, D) in q's dtype, 0 where nothing is seen, and the log-sum-exp (B, H, T) float32, -inf there. spans (B G, 3) int32: a
    head's first page, how many it owns, where they begin in the list of pages."""
    return torch.ops.zoo.attention(*arguments(q, q_pos, slots, pages, spans), slots.window or 0)


def attention_and_mass(
    q: Tensor, q_pos: Tensor, slots: Any, pages: Any, spans: Tensor | None, weight: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """out (B, H, T, D), and the probability that each slot received, summed over queries, each times its weight (B, T) float32, and over
    the group's query heads, and the same of its square: of slots (B, G, S), and of the N pages that are listed (N, PAGE); float32."""
    listed = None if pages is None else pages.pages
    out, *sums = torch.ops.zoo.attention_and_mass(*arguments(q, q_pos, slots, pages, spans), listed, weight.contiguous(), slots.window or 0)
    return out, (sums[0], sums[1]), (sums[2], sums[3])


def arguments(q: Tensor, q_pos: Tensor, slots: Any, pages: Any, spans: Tensor | None) -> tuple[Tensor | None, ...]:
    beside = (None, None, None, None, None) if pages is None else (pages.k, pages.v, pages.pos, pages.a, spans)
    return q.contiguous(), q_pos.contiguous(), slots.k, slots.v, slots.pos.to(torch.int32), slots.a, *beside


def ward(x: Tensor, weight: Tensor, alive: Tensor, surplus: Tensor, tie: float) -> Tensor:
    """`zoo.attention.clustering.ward`: x (B, G, N, F) float32, weight (B, G, N) float32, alive (B, G, N) bool, surplus (B, G) int64 ->
    labels (B, G, N) int64. Squared distances below `tie` of the largest squared norm are ties."""
    return torch.ops.zoo.ward(x.contiguous(), weight.contiguous(), alive.contiguous(), surplus.contiguous(), tie)


def rounded(mean: Tensor, dtype: torch.dtype, seed: int, *where: Tensor) -> Tensor:
    """`zoo.attention.clustering.rounded`, for bfloat16 alone: mean (M, D) float32, where (M,) int64 each -> (M, D)."""
    assert dtype == torch.bfloat16
    return torch.ops.zoo.rounded(mean.contiguous(), (seed + 2**63) % 2**64 - 2**63, torch.stack(where, 1))
