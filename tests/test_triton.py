"""The Triton kernels, without a GPU: their tests in the interpreter, in a process of its own, and what their binaries take."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_checks import calls, graphs

import zoo
from zoo.attention import parse
from zoo.attention.backends import choose
from zoo.attention.slots import Slots
from zoo.errors import ZooError

pytest.importorskip("triton", reason="the package triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process is Triton's interpreter itself", allow_module_level=True)

HERE = Path(__file__).parent


@pytest.mark.slow(100)
@pytest.mark.parametrize("file", sorted(path.name for path in (HERE / "interpreter").glob("test_*.py")))
def test_interpreter(file: str) -> None:
    """tests/interpreter/, which says itself what failed."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / "interpreter" / file)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=HERE.parent, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-8000:]


def test_every_binary_is_on_record() -> None:
    """Each shipped configuration has been compiled from exactly this source for sm_80, sm_90, sm_100 and gfx942, spills nothing and fits;
    the table in kernels/README.md is what the record says."""
    from zoo.kernels import resources

    if not resources.recorded():
        pytest.skip("the record is of another version of Triton: test_binaries compiles everything")
    known = resources.recorded()
    absent = [c.name for c in resources.configurations() if resources.key(c) not in known]
    assert not absent, "python -m zoo.kernels.resources --write"
    found = resources.measure(list(resources.CHIPS), 1)
    assert len(found) == 4 * len(resources.configurations()) > 1000
    assert {c.kernel.__name__ for c, _, _ in found} == {
        "slot_attention_kernel", "merge_kernel", "column_mass_kernel", "assign", "add_up", "rotate_and_store",
    }  # fmt: skip
    assert resources.wrong(found) == []
    readme = (HERE.parent / "kernels" / "README.md").read_text()
    assert resources.shown(found, list(resources.CHIPS)) in readme


@pytest.mark.slow(60)
def test_binaries() -> None:
    """Every sixteenth configuration, compiled again, takes what the record says. Where the record is of another Triton, all of them."""
    from zoo.kernels.resources import recorded

    some = ["--again", "--every", "16"] if recorded() else []
    command = [sys.executable, "-m", "zoo.kernels.resources", *some]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("| slot_attention_kernel |") > 5


def test_a_kernel_s_text_is_part_of_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel calls, a constant that it names, an option: with another one, there is nothing on record."""
    from zoo.kernels import launch, resources, slot_attention

    c = resources.configurations()[0]
    assert set(resources.text(slot_attention.slot_attention_kernel)) == {
        "slot_attention_kernel", "dot", "rounded", "exponentials", "UPCAST",
    }  # fmt: skip
    keys = {resources.key(c), resources.key(replace(c, options=replace(c.options, warps=2)))}
    keys.add(resources.key(replace(c, constexprs=dict(c.constexprs) | {"D": 48})))
    monkeypatch.setattr(launch, "UPCAST", type(launch.UPCAST)(True))
    keys.add(resources.key(c))
    monkeypatch.undo()
    for function in ("slot_attention_kernel", "exponentials"):
        kernel = getattr(slot_attention, function)
        monkeypatch.setattr(kernel, "_src", kernel.src + "\n    pass\n")
        keys.add(resources.key(c))
        monkeypatch.undo()
    assert len(keys) == 6


def test_what_is_wrong_with_a_binary_is_said() -> None:
    from zoo.kernels import resources
    from zoo.kernels.resources import CHIPS, Used, occupancy, wrong

    known = resources.configurations()[0]
    c = replace(known, constexprs=dict(known.constexprs) | {"D": 48})  # not on record
    assert wrong([(c, "sm_80", Used(255, 0, 163 * 1024)), (c, "gfx942", Used(512, 0, 65536))]) == []
    assert "8 bytes of spills" in wrong([(c, "sm_90", Used(255, 8, 0))])[0]
    assert "65537 bytes of shared memory" in wrong([(c, "gfx942", Used(10, 0, 65537))])[0]
    if resources.recorded():
        assert "on record as" in wrong([(known, "sm_90", Used(255, 0, 0))])[0]
    # By hand: 168 registers let 3 warps into each of four schedulers, three blocks of 4 warps out of 64; 100 KiB let two blocks in.
    assert occupancy(Used(168, 0, 0), 4, CHIPS["sm_80"]) == 12 / 64
    assert occupancy(Used(32, 0, 100 * 1024), 4, CHIPS["sm_90"]) == 8 / 64
    assert occupancy(Used(256, 0, 0), 4, CHIPS["gfx942"]) == 8 / 32


def test_kernels_refuse_a_cpu() -> None:
    """One line that says what to do: of the backend, before a model has answered anything, and of the operators."""
    from zoo.kernels import slot_attention

    with pytest.raises(ZooError, match="TRITON_INTERPRET=1"):
        choose("triton", torch.device("cpu"), torch.float32, 64)
    q, k = torch.zeros(1, 2, 1, 64), torch.zeros(1, 1, 5, 64)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        slot_attention.slot_attention(q, torch.zeros(1, 1).long(), Slots(k, k, torch.zeros(1, 1, 5)))


@pytest.mark.parametrize(
    ("capability", "dtype", "size", "expected"),
    [
        ((9, 0), torch.bfloat16, 128, "triton"),
        ((8, 0), torch.float16, 256, "triton"),
        ((7, 5), torch.float16, 64, "flex"),
        ((9, 0), torch.float64, 64, "flex"),
        ((9, 0), torch.float32, 512, "flex"),
    ],
)
def test_auto_on_gpus(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, size: int, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert choose("auto", torch.device("cuda"), dtype, size) == expected
    if expected != "triton":
        with pytest.raises(ZooError, match="cannot be used"):
            choose("triton", torch.device("cuda"), dtype, size)


@pytest.mark.parametrize("attn", ["full", "subgen:budget=128", "subgen_paper:delta=3,s=20,block=16"])
def test_a_step_traces_without_a_device(tmp_path: Path, attn: str) -> None:
    """Model and cache without any data (device meta): one graph, every operator says what it would return, and no kernel runs."""
    from conftest import write_llama
    from zoo.kernels.launch import launches

    lm = zoo.load(str(write_llama(tmp_path, num_hidden_layers=2)), compile="off")
    lm.attn = parse(attn)
    cache = lm.new_cache()
    lm.prefill(torch.randint(0, lm.config.vocab_size, (1, 140)), cache)
    cache.make_room(torch.tensor([141]), 141)
    for layer in cache:
        layer.backend = "triton"
    for part in (lm.model, cache, *(p for layer in cache if (p := getattr(layer, "pages", None)) is not None)):
        part.to("meta")
    ids, pos = (torch.zeros(1, 1, dtype=torch.int64, device="meta") for _ in range(2))
    launches.clear()
    made, out = graphs(lm.step.eager, ids, pos, cache)
    assert (out.device.type, out.shape) == ("meta", (1, lm.config.vocab_size))
    assert len(made) == 1
    called = calls(made[0])
    assert ("slot_parts_triton" if attn.startswith("subgen_paper") else "slot_attention_triton") in called
    assert ("page_attention_triton" in called) == attn.startswith("subgen:")
    assert not launches
