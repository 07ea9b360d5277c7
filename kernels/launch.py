"""What the Triton kernels share: how one is launched and counted, and how its shipped configurations are listed.

They run on CUDA and ROCm devices; on CPU tensors only in Triton's interpreter, which TRITON_INTERPRET=1 turns on before Python starts.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret  # read when kernels are decorated, so it holds for the whole process
UPCAST = tl.constexpr(INTERPRETED)  # the interpreter's bfloat16 products are wrong; in float32 they are right

launches: Counter[str] = Counter()  # kernel name -> how often it ran
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}  # in signatures


class Blocks(NamedTuple):
    """Sizes of a tile of attention: query rows, slots, head size; and warps."""

    M: int
    N: int
    D: int
    warps: int


@dataclass(frozen=True)
class Options:
    """What a kernel is compiled with, at its launch and ahead of time. `registers`: of a thread, at most, on NVIDIA's chips. `fused`: a
    product and its sum are rounded once."""

    warps: int = 4
    registers: int | None = None
    fused: bool = True

    def of(self, backend: str) -> dict[str, Any]:
        """As Triton calls them, for cuda or hip. All are said: Triton's defaults differ by chip."""
        found = {"num_warps": self.warps, "num_stages": 1, "enable_fp_fusion": self.fused}
        return found if self.registers is None or backend != "cuda" else found | {"maxnreg": self.registers}


@dataclass(frozen=True)
class Shipped:
    """A configuration that a kernel runs in, as the ahead-of-time compiler wants it. `signature`: argument -> type, such as *bf16 or i32;
    those that are `constexprs` are left out: a launch makes constants of None and of 1, too. `aligned`: which are multiples of 16."""

    kernel: Any
    name: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    options: Options
    aligned: frozenset[str] = field(default_factory=frozenset)


@triton.jit
def dot(x, y, acc=None):
    """x @ y (+ acc) with float32 sums. float32 inputs are not rounded to TF32."""
    if UPCAST:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, acc, input_precision="ieee")


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 x in `dtype`, to nearest even; the interpreter's own conversion to bfloat16 cuts off."""
    if UPCAST and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


def check(*tensors: Tensor | None) -> None:
    """Raises RuntimeError unless the tensors lie on one device where Triton kernels run."""
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        raise RuntimeError(f"all tensors must be on one device; these are on {', '.join(sorted(map(str, devices)))}")
    if not INTERPRETED and any(d.type != "cuda" for d in devices):
        raise RuntimeError(f"Triton kernels run on GPUs, not on {devices.pop()}; TRITON_INTERPRET=1 runs them on a CPU, for tests")


def rows_together(t: Tensor) -> Tensor:
    """t, or a copy of it whose last dimension is contiguous."""
    return t if t.stride(-1) == 1 else t.contiguous()


def strides(t: Tensor | None, of: tuple[int, ...]) -> tuple[int, ...]:
    """Strides along the first len(of) dimensions, 0 where one entry serves all."""
    return tuple(0 if t is None or t.shape[i] < n else t.stride(i) for i, n in enumerate(of))


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, options: Options, *args: Any, **constants: int) -> None:
    """Run a kernel on `device`, whichever is current, and count it."""
    launches[kernel.fn.__name__] += 1
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, **constants, **options.of("hip" if torch.version.hip else "cuda"))


def op(name: str, mutates: Sequence[str] = ()) -> Any:
    """An operator zoo::<name> that takes a cache as it lies: without the tag a compiled step copies keys and values before each call."""
    return torch.library.custom_op(f"zoo::{name}", mutates_args=mutates, tags=(torch.Tag.flexible_layout,))
