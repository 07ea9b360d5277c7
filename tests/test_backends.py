"""What computes attention, clustering and linear layers: the choice of backends.py, as a table, and that nothing else chooses."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_llama
from torch import Tensor
from zoo.kernels import cpu

import zoo
from zoo import cli
from zoo.attention import backends, clustering, parse
from zoo.attention.backends import NAMES, choose, kernels_ready
from zoo.attention.tail import BudgetedCache
from zoo.bench import __main__ as bench
from zoo.errors import ZooError
from zoo.models.layers import Linear

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
ROOT = Path(__file__).parent.parent


def machine(monkeypatch: pytest.MonkeyPatch, lacks: str = "", capability: tuple[int, int] = (9, 0)) -> None:
    """One that has everything but what it `lacks`: triton, a compiler."""
    pytest.importorskip("triton")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == lacks else found(name))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(backends, "kernels_ready", lambda: lacks != "compiler")
    monkeypatch.setattr("zoo.compiled.missing_tool", lambda: "no C++ compiler (g++)" if lacks == "compiler" else None)


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "head_dim", "lacks", "expected"),
    [
        ("auto", CPU, F32, 64, "", "cpp"),
        ("auto", CPU, BF16, 64, "triton", "cpp"),
        ("auto", CPU, F32, 64, "compiler", "auto"),
        ("auto", CPU, F32, 24, "", "auto"),
        ("auto", CPU, F16, 64, "", "auto"),
        ("auto", CUDA, BF16, 64, "", "triton"),
        ("auto", CUDA, BF16, 64, "compiler", "triton"),
        ("auto", CUDA, F64, 64, "", "flex"),
        ("auto", CUDA, BF16, 64, "triton", "auto"),  # which refuses no method, as sdpa would `subgen_paper`
        ("sdpa", CUDA, BF16, 64, "triton", "sdpa"),
        ("eager", CPU, F64, 24, "compiler", "eager"),
        ("flex", CPU, F32, 64, "", "flex"),
        ("flex", CPU, F32, 64, "compiler", "backend 'flex' cannot be used: PyTorch compiles its kernels, and there is no C++ compiler"),
        ("flex", CUDA, F32, 64, "compiler", "flex"),
        ("flex", CUDA, F32, 64, "triton", "backend 'flex' cannot be used: the package triton is not installed"),
        ("triton", CUDA, F32, 64, "triton", "backend 'triton' cannot be used: the package triton is not installed"),
        ("cpp", CPU, F32, 64, "compiler", "backend 'cpp' cannot be used: its kernels could not be built"),
        ("cpp", CPU, F64, 64, "", "made for float32 or bfloat16 on a CPU, heads of a multiple of 16; here: torch.float64 on cpu, 64"),
        ("banana", CPU, F32, 64, "", "choose one of auto, eager, sdpa, cpp, triton, flex"),
    ],
)
def test_choice(
    monkeypatch: pytest.MonkeyPatch, backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, lacks: str, expected: str
) -> None:
    machine(monkeypatch, lacks)
    if expected in NAMES:
        assert choose(backend, device, dtype, head_dim) == expected
        return
    with pytest.raises(ZooError, match=re.escape(expected)) as e:
        choose(backend, device, dtype, head_dim)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("lacks", ["", "compiler"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("backend", NAMES)
def test_what_clusters_are_made_by(
    monkeypatch: pytest.MonkeyPatch, backend: str, device: torch.device, dtype: torch.dtype, lacks: str
) -> None:
    """GPU kernels by their backend's name; the CPU's by device and dtype, whatever computes attention."""
    machine(monkeypatch, lacks)
    from zoo.kernels import nearest

    by, here = backends.clustering(backend, device, dtype), device == CPU and dtype != F16 and not lacks
    assert by.nearest is (nearest.nearest if backend == "triton" else None)
    assert by.sums is (backends.triton_sums if backend == "triton" else clustering.sums)
    assert getattr(by.ward, "func", by.ward) is (cpu.ward if here else clustering.ward)
    assert by.rounded is (cpu.rounded if here and dtype == BF16 else clustering.rounded)
    assert backends.cpu_kernels(device, dtype) == here
    assert backends.rotates(backend) == (backend == "triton")


@pytest.mark.skipif(not kernels_ready(), reason="the CPU kernels cannot be built here")
@pytest.mark.parametrize(("backend", "head_dim"), [("auto", 16), ("auto", 8), ("sdpa", 16), ("eager", 16)])
def test_linear_layers_and_merging_do_not_ask_how_attention_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, head_dim: int
) -> None:
    called: set[str] = set()
    for name in ("ward", "rounded"):
        real = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *a, real=real, name=name, **k: called.add(name) or real(*a, **k))
    folder = str(write_llama(tmp_path, hidden_size=32, head_dim=head_dim))
    lm = zoo.load(folder, "subgen:budget=128", dtype="bfloat16", backend=backend, compile="off")
    assert {m.few for m in lm.model.modules() if isinstance(m, Linear) and m.in_features % 16 == 0} == {cpu.FEW}
    cache = lm.new_cache()
    lm.prefill(torch.arange(140)[None] % lm.config.vocab_size, cache)
    for t in range(64):
        lm.decode_step([t], cache)
    assert called == {"ward", "rounded"}


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_layers_do_not_ask_each_whether_a_query_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Every eighth token is, in all layers; else one question for all of them."""
    lm, asked, counted = (
        zoo.load(str(write_llama(tmp_path)), dtype="float32", backend=backend, compile="off"),
        list[int](),
        BudgetedCache.counted,
    )

    def spy(self: BudgetedCache, pos: Tensor) -> Any:
        asked.append(self.index)
        return counted(self, pos)

    lm.attn = parse("subgen:budget=128")
    cache = lm.new_cache()
    lm.prefill(torch.arange(140)[None], cache)
    lm.decode_step([3], cache)
    monkeypatch.setattr(BudgetedCache, "counted", spy)
    for t in range(141, 150):
        asked.clear()
        mass = cache[-1].store.mass.clone()
        lm.decode_step([t], cache)
        looked = t % 8 == 0
        assert asked == ([0, *range(len(cache))] if looked else [0]), t
        assert bool((cache[-1].store.mass != mass).any()) == looked


def test_nothing_else_compares_names() -> None:
    """`backend == "..."` stands in backends.py alone."""
    compares = re.compile(r"""\bbackend\b\s*(==|!=|in\b|not in\b)|["'](eager|sdpa|cpp|triton|flex)["']\s*(==|!=)""")
    sources = [path for path in (ROOT / "zoo").rglob("*.py") if "kernels" not in path.parts]
    assert [path.name for path in sources if compares.search(path.read_text())] == ["backends.py"]


def test_all_names_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """Where a user reads what there is to choose from."""
    assert ", ".join(NAMES) in " ".join(cli.parser("zoo.generate", "").format_help().split())
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    assert ", ".join(NAMES) in " ".join(capsys.readouterr().out.split())
    design = (ROOT / "docs" / "design.md").read_text().partition("## Backends")[2].partition("\n## ")[0]
    for text in (zoo.load.__doc__, backends.__doc__, design):
        assert text
        assert all(name in text for name in NAMES)
