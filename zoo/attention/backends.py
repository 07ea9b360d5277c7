"""What computes attention and clustering: one table, one choice. Nothing else in zoo asks for a backend by its name.

    auto    on a GPU triton, else flex; on a CPU cpp; where none of them can be used, sdpa, and in a compiled step the formula
    eager   the formula (slots.py)      sdpa   PyTorch's fused kernel      cpp   the CPU kernels (kernels/cpu.py)
    triton  the GPU kernels (kernels/slot_attention.py, column_mass.py, rotary_store.py, nearest.py)
    flex    PyTorch's FlexAttention (flex.py)

A new form is a function with the signature of `slot_attention` and an entry of BACKENDS; of UNABLE, where it is not for every machine; and
of `auto` in `choose`. What it has kernels for, it names in `kernels` (pages, masses), `parts`, `rotates` and `clustering`.

The CPU kernels for linear layers and for merging are no form of attention: whatever the backend, they run where they are loaded and made
for the model's device and dtype (`cpu_kernels`).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.attention.clustering import TIE, rounded, sums, ward
from zoo.attention.slots import PagedSlots, Parts, Slots, blend, divided, finish, sdpa, slot_attention, slot_parts
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


def triton(q: Tensor, q_pos: Tensor, slots: Slots) -> Tensor:
    """`slot_attention` by the GPU kernels."""
    if slots.b is not None:
        return finish(triton_parts(q, q_pos, slots), q.dtype)
    from zoo.kernels import slot_attention as gpu

    return gpu.slot_attention(q, q_pos, slots)[0]


def flex(q: Tensor, q_pos: Tensor, slots: Slots) -> Tensor:
    """`slot_attention` through FlexAttention."""
    from zoo.attention import flex

    return flex.flex(q, q_pos, slots)


def triton_parts(q: Tensor, q_pos: Tensor, slots: Slots) -> Parts:
    """`slot_parts` by the GPU kernels."""
    from zoo.kernels import slot_attention as gpu

    return Parts(*(x.unflatten(1, (slots.k.shape[1], -1)) for x in gpu.slot_parts(q, q_pos, slots)))


def parts(q: Tensor, q_pos: Tensor, slots: Slots, backend: str) -> Parts:
    """`slot_parts`, by the kernels of a backend that has some for it. Raises ZooError for `sdpa`, which has none."""
    if backend == "sdpa":
        raise ZooError("backend 'sdpa' cannot weigh numerator and denominator apart, as subgen_paper does; use backend 'eager'")
    return (triton_parts if backend == "triton" else slot_parts)(q, q_pos, slots)


class Kernels(NamedTuple):
    """Attention over a dense store and pages beside it in one softmax, with the signatures of kernels/cpu.py."""

    attention: Callable[..., tuple[Tensor, Tensor]]
    attention_and_mass: Callable[..., tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]


def kernels(backend: str, q: Tensor, heads: int) -> Kernels | None:
    """Those of a backend, or None where it has none for queries (B, H, T, D) on this many key/value heads."""
    if backend == "cpp" and covered(q, heads):
        from zoo.kernels import cpu

        return Kernels(cpu.attention, cpu.attention_and_mass)
    if backend == "triton":
        from zoo.kernels import column_mass
        from zoo.kernels import slot_attention as gpu

        return composed(gpu.slot_attention, gpu.page_attention, column_mass.slot_mass, column_mass.page_mass)
    if backend == "flex" and q.device.type == "cuda":  # on CPUs it gives no log-sum-exp, which parts are merged by
        from zoo.attention import flex

        return composed(flex.flex_slots, flex.flex_pages, flex.flex_mass, flex.flex_page_mass)
    return None


def composed(
    of_slots: Callable[..., tuple[Tensor, Tensor]],
    of_pages: Callable[..., tuple[Tensor, Tensor]],
    slot_mass: Callable[..., tuple[Tensor, Tensor]],
    page_mass: Callable[..., tuple[Tensor, Tensor]],
) -> Kernels:
    """From kernels for a store and for pages, each with a log-sum-exp by which they are merged."""

    def both(q: Tensor, q_pos: Tensor, slots: Slots, pages: PagedSlots | None, spans: Tensor) -> tuple[Tensor, Tensor]:
        answer = of_slots(q, q_pos, slots)
        if pages is None:
            return answer
        heads = slots.k.shape[1]
        whole = blend(as_parts(answer, heads), as_parts(of_pages(q, q_pos, pages, spans), heads))
        return whole.num.view(q.shape).to(q.dtype), whole.max_den.flatten(1, 2)

    def with_mass(q: Tensor, q_pos: Tensor, slots: Slots, pages: PagedSlots | None, spans: Tensor, weight: Tensor) -> Any:
        out, lse = both(q, q_pos, slots, pages, spans)
        none = (lse.new_zeros(0), lse.new_zeros(0))
        return out, slot_mass(q, q_pos, slots, lse, weight), none if pages is None else page_mass(q, q_pos, pages, spans, lse, weight)

    return Kernels(both, with_mass)


def as_parts(answer: tuple[Tensor, Tensor], heads: int) -> Parts:
    """What attention kernels return, output (B, H, T, D) and log-sum-exp (B, H, T), for `blend`."""
    out, lse = (x.unflatten(1, (heads, -1)) for x in answer)
    return divided(out, lse)


class Clustering(NamedTuple):
    """What clusters are found and made by: functions of clustering.py, or kernels in their place. nearest: that of kernels/nearest.py, or
    None, where matrix products of PyTorch do it."""

    nearest: Callable[..., tuple[Tensor, ...]] | None
    sums: Callable[..., tuple[Tensor, list[Tensor]]]
    ward: Callable[..., Tensor]
    rounded: Callable[..., Tensor]


def clustering(backend: str, device: torch.device, dtype: torch.dtype) -> Clustering:
    """For a cache of keys and values of this dtype. The GPU kernels belong to their backend."""
    found = Clustering(None, sums, ward, rounded)
    if backend == "triton":
        from zoo.kernels.nearest import nearest

        found = found._replace(nearest=nearest, sums=triton_sums)
    if cpu_kernels(device, dtype):
        from zoo.kernels import cpu

        found = found._replace(ward=functools.partial(cpu.ward, tie=TIE), rounded=cpu.rounded if dtype == torch.bfloat16 else rounded)
    return found


def triton_sums(label: Tensor, weight: Tensor, chosen: Tensor, size: int, *values: Tensor) -> tuple[Tensor, list[Tensor]]:
    """`sums` of clustering.py by the GPU kernel, two of the values at a time."""
    from zoo.kernels.nearest import cluster_sums

    label, weight, out = label.int(), weight.contiguous(), list[Tensor]()
    for i in range(0, len(values), 2):
        _, total, *some = cluster_sums(label, size, weight, weight, *(t.contiguous() for t in values[i : i + 2]))
        out += [t.flatten(0, 2)[chosen] for t in some[: len(values) - i]]
    return total.flatten()[chosen, None], out


def cpu_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the CPU kernels for linear layers and for merging are loaded and made for such a model."""
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and kernels_ready()


def rotates(backend: str) -> bool:
    """Whether a kernel rotates queries and keys and writes a cache at once: that of kernels/rotary_store.py."""
    return backend == "triton"


def flashes(backend: str, q: Tensor) -> bool:
    """Whether parts that have no kernels run through PyTorch's fused one, which gives a log-sum-exp on CPUs, and not in a compiled step."""
    return backend != "eager" and q.device.type == "cpu" and not torch.compiler.is_compiling()


def no_cpp(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the CPU kernels cannot be used here, or None."""
    from zoo.kernels import cpu

    if not cpu.covers(device, dtype, head_dim, 1):
        return f"its kernels are made for float32 or bfloat16 on a CPU, heads of a multiple of 16; here: {dtype} on {device}, {head_dim}"
    return None if kernels_ready() else "its kernels could not be built, for the reason in the line above"


def no_triton(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the GPU kernels cannot be used here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    from zoo.kernels.launch import INTERPRETED
    from zoo.kernels.slot_attention import WIDEST

    if device.type != "cuda" and not INTERPRETED:
        return f"its kernels run on GPUs, not on {device}; TRITON_INTERPRET=1 runs them on a CPU, for tests"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "its kernels are compiled for compute capability 8.0 and newer"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or head_dim > WIDEST:
        return f"its kernels are made for float32, bfloat16 and float16, and heads of at most {WIDEST}; here: {dtype}, {head_dim}"
    return None


def no_flex(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why FlexAttention, which PyTorch compiles, cannot be used here, or None."""
    from zoo.compiled import missing_tool

    if device.type == "cuda":
        return "the package triton is not installed" if importlib.util.find_spec("triton") is None else None
    return f"PyTorch compiles its kernels, and there is {lacking}" if (lacking := missing_tool()) else None


BACKENDS: dict[str, Any] = {"eager": slot_attention, "sdpa": sdpa, "cpp": cpp, "triton": triton, "flex": flex}
UNABLE = {"cpp": no_cpp, "triton": no_triton, "flex": no_flex}
NAMES = ("auto", *BACKENDS)


def choose(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The backend by name, for a model. `auto`: the first of the device's own that can be used, else `auto` itself (`attention`). Raises
    ZooError for a name that is unknown or cannot be used."""
    if backend not in NAMES:
        raise ZooError(f"backend {backend!r} is unknown; choose one of {', '.join(NAMES)}")
    if backend == "auto":
        own = ("triton", "flex") if device.type == "cuda" else ("cpp",)
        return next((name for name in own if not UNABLE[name](device, dtype, head_dim)), "auto")
    if backend in UNABLE and (why := UNABLE[backend](device, dtype, head_dim)):
        raise ZooError(f"backend {backend!r} cannot be used: {why}")
    return backend


def attention(q: Tensor, q_pos: Tensor, slots: Slots, backend: str = "auto") -> Tensor:
    """`slot_attention`, computed by the backend of that name. `auto`: the formula itself in a compiled step, which Inductor fuses into two
    passes over the slots, and for separate weights; else SDPA."""
    if backend == "auto":
        one_compiled = q.shape[2] == 1 and torch.compiler.is_compiling()
        backend = "eager" if one_compiled or slots.b is not None else "sdpa"
    return BACKENDS[backend](q, q_pos, slots)
