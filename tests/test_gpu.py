"""On a GPU: the checks that Triton's interpreter runs elsewhere, and what a decode step's attention takes beside SDPA and FlexAttention.

python -m pytest tests/test_gpu.py -s          prints the table of times; nothing here depends on them
"""

from __future__ import annotations

from pathlib import Path

import kernel_checks as checks
import pytest
import torch
from conftest import write_llama
from kernel_checks import DTYPES, SHAPES, make, microseconds

import zoo
from zoo.attention import parse
from zoo.attention.slots import Slots, sdpa

pytest.importorskip("triton", reason="the package triton is not installed")

from zoo.kernels import column_mass, slot_attention
from zoo.kernels.launch import launches

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")]
LONG = [(1, 8, 2, 1, 128, 32768), (1, 8, 1, 16, 128, 5000), (2, 9, 3, 512, 64, 1500), (1, 8, 2, 16, 256, 3000)]
METHODS = ["full", "sliding:window=40", "subgen:budget=128", "subgen_paper:delta=3,s=20", "h2o:budget=128", "snapkv:budget=128"]


@pytest.mark.parametrize(("weights", "window"), [(False, None), (True, 50)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, *LONG])
def test_attention(nan_filled: None, shape: tuple[int, ...], dtype: torch.dtype, weights: bool, window: int | None) -> None:
    for big in (2.0, 5.0):
        checks.attention_matches(slot_attention, shape, dtype, weights, window, big, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", slot_attention.HEADS)
def test_pages_and_parts(nan_filled: None, D: int, dtype: torch.dtype) -> None:
    for T in (1, 16, 70):
        checks.pages_match(slot_attention, dtype, T, D, None, "cuda")
        checks.pages_match(slot_attention, dtype, T, D, 12, "cuda")
        checks.parts_match(slot_attention, (1, 8, 2, T, D, 600), dtype, "cuda")
    checks.rising_scores_match(slot_attention, "cuda")


@pytest.mark.parametrize(("weights", "window"), [(False, None), (True, 50)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, *LONG[1:]])
def test_mass(nan_filled: None, shape: tuple[int, ...], dtype: torch.dtype, weights: bool, window: int | None) -> None:
    checks.mass_matches(column_mass, shape, dtype, weights, window, "cuda")
    checks.page_mass_matches(column_mass, dtype, shape[3], window, "cuda")


def test_sums_are_the_same_every_time() -> None:
    checks.sums_repeat(slot_attention, column_mass, "cuda")


@pytest.mark.parametrize("attn", METHODS)
@pytest.mark.parametrize("compile", ["off", "on"])
def test_generation(tmp_path: Path, attn: str, compile: str) -> None:
    """The CPU's eager tokens, eager steps and compiled ones; `auto` takes these kernels."""
    folder = str(write_llama(tmp_path / "m", num_hidden_layers=8, head_dim=32))
    cpu = zoo.load(folder, attn=attn, dtype="float32", backend="eager", compile="off")
    gpu = zoo.load(folder, attn=attn, dtype="float32", device="cuda", compile=compile)
    assert gpu.backend == "triton"
    launches.clear()
    prompt = "Call me Ishmael. Some years ago, never mind how long precisely. " * 6
    assert gpu.generate(prompt, max_new_tokens=20) == cpu.generate(prompt, max_new_tokens=20)
    assert launches["slot_attention_kernel"] > 0


@pytest.mark.parametrize("T", [1, 16])
def test_times(T: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Attention of a decode step, bfloat16, over a cache that is full: all three give the same, and each says how long it takes."""
    from torch.nn.attention.flex_attention import flex_attention

    flex = torch.compile(flex_attention, dynamic=False)
    lines = [
        "| slots | query / kv heads | D | new tokens | Triton us | SDPA us | FlexAttention us | Triton GB/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for S, H, G, D in (
        (1024, 32, 8, 128),
        (8192, 32, 8, 128),
        (32768, 32, 8, 128),
        (32768, 8, 8, 128),
        (32768, 9, 3, 64),
        (32768, 8, 1, 256),
    ):
        q, _, s = make((1, H, G, T, D, S), torch.bfloat16, 1, False, None, device="cuda")
        pos = torch.arange(S, dtype=torch.int32, device="cuda").view(1, 1, S)
        s, at = Slots(s.k.contiguous(), s.v.contiguous(), pos), torch.arange(S - T, S, device="cuda")[None]

        def ahead(score: torch.Tensor, b: object, h: object, row: torch.Tensor, j: torch.Tensor, S: int = S) -> torch.Tensor:
            return torch.where(j <= S - T + row, score, -torch.inf)

        runs = {
            "triton": lambda q=q, at=at, s=s: slot_attention.slot_attention(q, at, s)[0],
            "sdpa": lambda q=q, at=at, s=s: sdpa(q, at, s),
            "flex": lambda q=q, s=s, ahead=ahead: flex(q, s.k, s.v, score_mod=ahead, enable_gqa=True),
        }
        outs = {name: run() for name, run in runs.items()}
        for name in ("sdpa", "flex"):
            assert (outs["triton"].float() - outs[name].float()).abs().max() < 2e-2
        us = {name: microseconds(run) for name, run in runs.items()}
        rate = 2 * s.k.nbytes / us["triton"] / 1000
        lines.append(f"| {S} | {H} / {G} | {D} | {T} | {us['triton']:.1f} | {us['sdpa']:.1f} | {us['flex']:.1f} | {rate:.0f} |")
    with capsys.disabled():
        print("", torch.cuda.get_device_name(), *lines, sep="\n")


def test_a_step_is_one_graph(tmp_path: Path) -> None:
    """fullgraph=True compiles once for 40 steps past a block's edge."""
    lm = zoo.load(str(write_llama(tmp_path / "m", num_hidden_layers=8, head_dim=32)), device="cuda", dtype="bfloat16", compile="on")
    lm.attn = parse("subgen:budget=128")
    cache = lm.new_cache(max_tokens=240)
    ids = torch.randint(0, lm.config.vocab_size, (1, 240), device="cuda")
    lm.prefill(ids[:, :180], cache)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t in range(180, 240):
            assert torch.isfinite(lm.decode_step(ids[:, t], cache)).all()
    assert lm.step.ran["compiled"] == 60
