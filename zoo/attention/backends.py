"""How attention over slots is computed: one table, one choice.

    eager   the formula (slots.py)      sdpa   PyTorch's fused kernel      cpp   the CPU kernels (kernels/cpu.py)

A new form is a function with the signature of `slot_attention`, an entry of BACKENDS, and a line in `choose` that says when
`auto` takes it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from zoo.attention.slots import Slots, sdpa, slot_attention
from zoo.errors import ZooError
from zoo.folders import cache_folder


def cpp(q: Tensor, q_pos: Tensor, slots: Slots) -> Tensor:
    """`slot_attention` by the CPU kernels of kernels/cpu.py where they are made for this; else as without them."""
    if slots.b is not None or not covered(q, slots.k.shape[1]):
        return attention(q, q_pos, slots)
    from zoo.kernels import cpu

    return cpu.attention(q, q_pos, slots)[0]


def covered(q: Tensor, heads: int) -> bool:
    """Whether the CPU kernels are made for queries (B, H, T, D) on this many key/value heads."""
    from zoo.kernels import cpu

    there = torch.compiler.is_compiling() or kernels_ready()  # a compiled step was asked before
    return there and cpu.covers(q.device, q.dtype, q.shape[3], q.shape[2] * q.shape[1] // heads)


@functools.cache
def kernels_ready() -> bool:
    """Whether the CPU kernels are loaded; builds them where that has not happened yet."""
    from zoo.kernels import cpu

    return cpu.ready(cache_folder() / "kernels")


BACKENDS: dict[str, Any] = {"eager": slot_attention, "sdpa": sdpa, "cpp": cpp}


def choose(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The backend by name; for `auto` the CPU kernels, where they can be built and are made for such heads."""
    if backend not in ("auto", "cpp"):
        return backend
    from zoo.kernels import cpu

    made = cpu.covers(device, dtype, head_dim, 1)
    if made and kernels_ready():
        return "cpp"
    if backend == "cpp":
        if made:
            raise ZooError("backend 'cpp' cannot be used: its kernels could not be built, for the reason in the line above")
        raise ZooError(
            f"backend 'cpp' is made for float32 or bfloat16 on a CPU, and heads of a multiple of 16; here: {dtype} on {device}, {head_dim}"
        )
    return "auto"


def attention(q: Tensor, q_pos: Tensor, slots: Slots, backend: str = "auto") -> Tensor:
    """`slot_attention`, computed by the backend of that name. `auto`: the formula itself in a compiled step, which Inductor fuses into two
    passes over the slots, and for separate weights; else SDPA."""
    if backend == "auto":
        one_compiled = q.shape[2] == 1 and torch.compiler.is_compiling()
        backend = "eager" if one_compiled or slots.b is not None else "sdpa"
    return BACKENDS[backend](q, q_pos, slots)
