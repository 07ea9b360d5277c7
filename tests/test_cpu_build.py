"""The CPU kernels as a library: how they are built, when they are chosen, and that a model's steps run them."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_llama
from kernel_checks import Called, require_cpu_kernels
from zoo.kernels import cpu

import zoo
from zoo.attention import parse
from zoo.errors import ZooError

require_cpu_kernels()


def test_without_a_compiler_attention_runs_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line says why; a compiler that fails says its own first line; nothing is left in the folder."""
    monkeypatch.setattr(torch.ops, "zoo", object())  # as in a process that has not loaded them
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING, "zoo"):
        assert not cpu.ready.__wrapped__(tmp_path / "a")
    assert "install g++" in caplog.text
    assert caplog.text.count("\n") == 1
    caplog.clear()
    fake = tmp_path / "cc"
    fake.write_text("#!/bin/sh\necho 'this compiler is broken' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    with caplog.at_level(logging.WARNING, "zoo"):
        assert not cpu.ready.__wrapped__(tmp_path / "b")
    assert "this compiler is broken" in caplog.text
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["lock"]
    monkeypatch.delenv("CXX")
    (tmp_path / "c").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, "zoo"):
        assert not cpu.ready.__wrapped__(tmp_path / "c")


PATIENT_COMPILER = """#!/bin/sh
echo begins "$@" >> {log}
for i in $(seq 300); do
    if [ $(grep -c begins {log}) -ge {files} ] && [ $(grep -c arrives {log}) = 2 ]; then break; fi
    sleep 0.1
done
while [ "$1" != -o ]; do shift; done
echo made > "$2"
echo ends >> {log}
"""
BUILD = """
import pathlib, sys
from zoo.kernels import cpu
with open(sys.argv[2], "a") as log:
    print("arrives", file=log)
print(cpu.build(pathlib.Path(sys.argv[1])))
"""


def test_of_several_processes_one_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both get the same file; sources are compiled at the same time, and linked when all of them are. The compiler waits for both
    processes, and for as many compilations as there are sources."""
    fake, log, built, files = tmp_path / "cc", tmp_path / "log", tmp_path / "built", len(cpu.SOURCES)
    fake.write_text(PATIENT_COMPILER.format(log=log, files=files))
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    command = [sys.executable, "-c", BUILD, str(built), str(log)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(said) == 1
    library = Path(said.pop())
    assert library.read_text() == "made\n"
    assert {path.name for path in built.iterdir()} == {library.name, "lock"}
    lines = [line for line in log.read_text().splitlines() if line != "arrives"]
    assert [line.split()[0] for line in lines] == ["begins"] * files + ["ends"] * files + ["begins", "ends"]
    assert ["-shared" in line for line in lines if line != "ends"] == [False] * files + [True]


def test_backend_by_name(tmp_path: Path) -> None:
    """`cpp` is what auto takes here; where it is not made for the numbers, it says so, and auto does without. Both give one answer."""
    folder = str(write_llama(tmp_path / "m"))
    lms = [zoo.load(folder, dtype="float32", backend=b, compile="off") for b in ("auto", "cpp", "sdpa", "eager")]
    assert [lm.backend for lm in lms] == ["cpp", "cpp", "sdpa", "eager"]
    assert len({lm.generate("Call me", 20) for lm in lms}) == 1
    with pytest.raises(ZooError, match="float32 or bfloat16"):
        zoo.load(folder, dtype="float16", backend="cpp")
    assert zoo.load(folder, dtype="float16").backend == "auto"


@pytest.mark.parametrize("attn", ["full", "sliding:window=40", *(f"{name}:budget=128" for name in ("subgen", "h2o", "tova"))])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_run_and_change_nothing(tmp_path: Path, attn: str, dtype: str) -> None:
    """A model's own caches, prompt and 80 steps: the same logits as by the formula in float32, or as near as the formula in bfloat16; and
    the kernels were called."""
    folder = str(write_llama(tmp_path / "m", head_dim=16))
    logits, ran = [], []
    for backend, numbers in (("eager", "float32"), ("eager", dtype), ("cpp", dtype)):
        lm = zoo.load(folder, dtype=numbers, backend=backend, compile="off")
        lm.attn = parse(attn)
        ids = torch.randint(0, lm.config.vocab_size, (2, 280), generator=torch.Generator().manual_seed(2))
        cache = lm.new_cache(2)
        with Called() as called:
            lm.prefill(ids[:, :200], cache, [200, 171])
            logits.append(torch.stack([lm.decode_step(ids[:, t], cache) for t in range(200, 280)]))
        ran.append(called.names)
    both = {"attention", "attention_and_mass"}
    asks = {"subgen": both | {"ward"}, "tova": both, "h2o": {"attention_and_mass"}}
    expected = {"linear"} | asks.get(attn.partition(":")[0], {"attention"})
    if dtype == "bfloat16" and attn.startswith("subgen"):
        expected.add("rounded")
    whatever = expected - both  # linear layers and merging are no form of attention
    assert ran == [whatever - {"rounded"}, whatever, expected]
    true, eager, got = logits
    assert (got - true).square().mean() ** 0.5 <= 1.5 * (eager - true).square().mean() ** 0.5 + 1e-4
    if dtype == "float32":
        assert (got - true).abs().max() < 1e-3
