"""On a GPU: the checks of the kernels that fill and cluster caches, FlexAttention with its parts merged, and times.

python -m pytest tests/test_gpu_cache.py -s          prints the table of times; nothing here depends on them
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cache_checks as checks
import pytest
import torch
from cache_checks import NEAREST, ROTARY
from conftest import write_llama
from kernel_checks import DTYPES, SHAPES, allowed, close, kernels_match, make, microseconds, wide

import zoo
from zoo.attention import flex
from zoo.attention.backends import kernels
from zoo.attention.slots import slot_attention
from zoo.attention.store import SlotStore
from zoo.models.layers import turn

pytest.importorskip("triton", reason="the package triton is not installed")

from zoo.kernels import nearest, rotary_store

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")]
OPTIONS = [(), ("tie", "limit"), ("tie", "limit", "scale", "number", "weight", "k", "v")]


@pytest.mark.parametrize("masses", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*ROTARY, (2, 32, 8, 513, 128, 1.0)])
def test_rotary_store(nan_filled: None, shape: tuple[Any, ...], dtype: torch.dtype, masses: bool) -> None:
    """The very bits here, too: products and sums are not fused."""
    checks.rotary_matches(rotary_store, shape, dtype, masses, shape[1] == shape[2], "cuda")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*NEAREST, (4, 8, 1500, 16, 700, 128)])
def test_nearest(nan_filled: None, shape: tuple[int, ...], dtype: torch.dtype, options: tuple[str, ...]) -> None:
    checks.nearest_matches(nearest, shape, dtype, options, "cuda")
    checks.cluster_sums_match(nearest, shape, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 8, 1, 300, 64, 500)])
def test_flex(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for weights, window in ((False, None), (True, 50)):
        q, q_pos, s = make(shape, dtype, 1, weights, window, device="cuda")
        true = slot_attention(q.double(), q_pos, wide(s))
        rounded = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps * float(true.abs().max())
        close(flex.flex(q, q_pos, s), true, allowed(slot_attention(q, q_pos, s), true, q, s) + rounded, "output")


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("backend", ["flex", "triton"])
def test_parts_are_merged(backend: str, T: int) -> None:
    """Tail and pages, each by a kernel of its own, merged by their log-sum-exp."""
    mine = kernels(backend, torch.zeros(2, 6, T, 64, device="cuda"), 2)
    assert mine is not None
    kernels_match(mine, T, "cuda")


@pytest.mark.parametrize("compile", ["off", "on"])
def test_generation_by_flex(tmp_path: Path, compile: str) -> None:
    """The CPU's tokens, by a method with a budget: its parts and masses."""
    folder, attn = str(write_llama(tmp_path / "m", head_dim=32)), "subgen:budget=128"
    cpu = zoo.load(folder, attn=attn, dtype="float32", backend="eager", compile="off")
    gpu = zoo.load(folder, attn=attn, dtype="float32", device="cuda", backend="flex", compile=compile)
    prompt = "Call me Ishmael. Some years ago, never mind how long precisely. " * 6
    assert gpu.generate(prompt, max_new_tokens=20) == cpu.generate(prompt, max_new_tokens=20)


def test_times(capsys: pytest.CaptureFixture[str]) -> None:
    """A token's and a prompt's rotary embedding and write, and a block's nearest centres, beside the PyTorch operations they stand for."""
    lines = ["| what | shape | Triton us | PyTorch us |", "|---|---|---|---|"]
    for B, H, G, T, D in ((1, 32, 8, 1, 128), (1, 32, 8, 8192, 128)):
        q, k, v = (torch.randn(B, T, h, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for h in (H, G, G))
        cos, sin = (torch.randn(B, 1, T, D // 2, device="cuda") for _ in range(2))
        pos = torch.arange(T, device="cuda").expand(B, T)
        s = SlotStore(B, G, T + 1, D, q.dtype, "cuda", shared=True)
        kernel = lambda a=(q, k, v, cos, sin, pos, pos + 1, s.k, s.v, s.pos): rotary_store.rotary_store(*a)  # noqa: E731

        def plain(q: Any = q, k: Any = k, v: Any = v, cos: Any = cos, sin: Any = sin, pos: Any = pos, s: SlotStore = s) -> None:
            turn(q, cos, sin)
            s.append(pos + 1, turn(k, cos, sin), v, pos)

        lines.append(f"| rotary, write | {B} x {T}, {H} / {G} heads of {D} | {microseconds(kernel):.1f} | {microseconds(plain):.1f} |")
    for A, G, N, F, M in ((32, 8, 64, 128, 512), (32, 8, 8000, 16, 64)):
        x, c = torch.randn(A, G, N, F, device="cuda"), torch.randn(A, G, M, F, device="cuda")
        alive, valid = (torch.ones(A, G, n, dtype=torch.bool, device="cuda") for n in (N, M))
        kernel = lambda a=(x, c, alive, valid): nearest.nearest(*a)  # noqa: E731
        plain = lambda x=x, c=c: torch.cdist(x, c).min(-1)  # type: ignore[assignment]  # noqa: E731
        lines.append(f"| nearest | {A * G} heads, {N} points, {M} centres, {F} | {microseconds(kernel):.1f} | {microseconds(plain):.1f} |")
    with capsys.disabled():
        print("", torch.cuda.get_device_name(), *lines, sep="\n")
