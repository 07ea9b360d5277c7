"""python -m zoo.bench: what it counts is right, what it prints is whole, and bad input is one line. No test asserts a time."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_llama
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo import cli, embedded
from zoo.attention import parse
from zoo.bench import __main__ as bench
from zoo.bench import machine, ours, peers, report
from zoo.bench.random_model import CONFIGS, random_model
from zoo.errors import ZooError
from zoo.models import FAMILIES

ROOT = Path(__file__).parents[1]
SHORT = ["--steps", "2", "--repeats", "2", "--compile", "off", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def quick_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small matrix: rates are measured, but of a cache."""
    monkeypatch.setattr(machine, "MEGABYTES", 4)


def rows(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, Any]]:
    assert cli.run(bench.main, [*argv, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_decode_and_prefill_rows(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each method, context and batch has a row, with what it had to move or compute and what share of the machine's rate that is."""
    got = rows(
        capsys, "decode", "prefill", "--model", str(tiny), "--attn", "full", "--attn", "subgen:budget=128", "--attn", "kivi:residual=32",
        "--attn", "h2o:budget=128+qjl", "--contexts", "8", "400", "--batch", "1", "3", *SHORT,
    )  # fmt: skip
    keys = [(r["task"], r["attn"], r["context"], r["batch"]) for r in got]
    assert len(set(keys)) == len(keys) == 2 * 4 * 2 * 2
    weights = ours.weight_bytes(zoo.load(str(tiny), dtype="float32", compile="off").model)
    for r in got:
        if r["task"] == "decode":
            assert r["bytes_per_step"] == weights + r["cache_read"]
            assert r["cache_read"] <= r["cache_bytes"]
            rate = r["bytes_per_step"] / (r["ms_per_step"] / 1e3) / (r["machine"]["bandwidth"] * 1e9)
            assert r["share_of_bandwidth"] == pytest.approx(rate, rel=0.05, abs=2e-3)
            assert r["tokens_per_second"] == pytest.approx(1e3 * r["batch"] / r["ms_per_step"], rel=0.05)
        else:
            assert r["tokens_per_second"] == pytest.approx(r["context"] * r["batch"] / r["seconds"], rel=0.2)
            assert r["flops"] > 0
            assert r["share_of_gemm"] == pytest.approx(r["flops"] / r["seconds"] / (r["machine"]["gemm"] * 1e9), rel=0.1, abs=2e-3)
        assert r["quartiles"][0] <= r.get("ms_per_step", r.get("seconds")) <= r["quartiles"][1]
        assert r["peak_memory"] > 2**26
    full = {r["context"]: r["cache_bytes"] for r in got if r["task"] == "decode" and r["attn"] == "full" and r["batch"] == 1}
    per_token = 3 * 2 * 2 * 16 * 4 + 3 * 4  # layers x (k, v) x heads x head size x float32, and positions
    assert full[400] == 400 * per_token + 8
    small = next(r for r in got if r["task"] == "decode" and r["attn"].startswith("subgen") and r["context"] == 400 and r["batch"] == 1)
    assert small["cache_bytes"] < full[400] / 2


def test_each_row_runs_its_own_method(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Cases are made before any of them runs: a method must not be the last one's."""
    ran: list[str] = []
    real = zoo.LM.prefill
    monkeypatch.setattr(
        zoo.LM, "prefill", lambda self, ids, cache, *a: ran.append(cache.about.partition(" ")[0]) or real(self, ids, cache, *a)
    )
    argv = ["prefill", "--model", str(tiny), "--attn", "full", "--attn", "sliding:window=5", "--contexts", "8", *SHORT]
    assert [r["attn"] for r in rows(capsys, *argv)] == ["full", "sliding:window=5"]
    assert ran == ["full", "sliding:window=5"] * 3


def test_contexts_must_fit_the_model(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(bench.main, ["--model", str(tiny), "--contexts", "4096", *SHORT]) == 2
    assert "holds 4096 tokens" in capsys.readouterr().err


def test_bytes_of_the_families_heads(tiny_neox: Path) -> None:
    """GPT-NeoX calls its output head embed_out; it is read all the same, and its input embedding is not."""
    model = zoo.load(str(tiny_neox), compile="off").model
    everything = sum(p.nbytes for p in model.parameters())
    assert ours.weight_bytes(model) == everything - model.gpt_neox.embed_in.weight.nbytes


def test_bytes_are_those_of_weights_that_a_step_reads(tmp_path: Path) -> None:
    """An embedding that is also the head counts once, one that is not does not."""
    for tied in (False, True):
        model = zoo.load(str(write_llama(tmp_path / str(tied), tie_word_embeddings=tied)), compile="off").model
        everything = sum(p.nbytes for p in model.parameters())
        assert ours.weight_bytes(model) == everything - (0 if tied else model.model.embed_tokens.weight.nbytes)


def test_flops_are_what_pytorch_counts(tiny: Path) -> None:
    """Matrix products of one pass without a cache, the head aside; attention there is counted with all keys for every query."""
    lm = zoo.load(str(tiny), dtype="float32", compile="off")
    c, n = lm.config, 40
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lm.model.hidden(torch.arange(n)[None], None)
    by_op = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(flops for op, flops in by_op.items() if "mm" in op and "bmm" not in op)
    assert products == n * ours.matrix_flops(lm.model)
    square = 4 * n * n * c.num_attention_heads * c.head_dim * c.num_hidden_layers
    assert ours.attention_flops(c, n) == square * (n + 1) // (2 * n)


def test_flops_of_methods_that_do_not_read_prompts_exactly(tiny: Path) -> None:
    """Attention that a method does not compute is not to its credit."""
    lm = zoo.load(str(tiny), dtype="float32", compile="off")
    matrices, exact = 400 * ours.matrix_flops(lm.model), ours.attention_flops(lm.config, 400)
    assert exact > 0
    for attn in ("full", "subgen:budget=128", "h2o:budget=128,when=prompt"):
        assert ours.prompt_flops(lm.model, parse(attn), 400) == matrices + exact
    for attn in ("sliding:window=64", "subgen:budget=128,when=stream", "subgen_paper:delta=3,s=20,block=16"):
        assert ours.prompt_flops(lm.model, parse(attn), 400) == matrices


@pytest.mark.parametrize("window", [1, 7, 40, 100])
def test_attention_flops_of_a_window(window: int) -> None:
    """Pairs of queries and keys, counted one by one."""

    class Config:
        sliding_window, num_attention_heads, head_dim, num_hidden_layers = window, 2, 8, 3

    pairs = sum(min(t + 1, window) for t in range(40))
    assert ours.attention_flops(Config, 40) == 4 * pairs * 2 * 8 * 3


def test_a_batch_has_different_lengths() -> None:
    assert ours.lengths(256, 1) == [256]
    assert ours.lengths(256, 3) == [256, 192, 128]


def test_table_and_files(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table for people; rows.jsonl holds the rows; decode.png where matplotlib is installed."""
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    argv = ["decode", "load", "--model", str(tiny), "--attn", "full", "--contexts", "8", "16", *SHORT, "--out", str(tmp_path / "o")]
    assert cli.run(bench.main, argv) == 0
    out = capsys.readouterr().out
    assert out.count("zoo full") == 2
    assert "load:" in out
    lines = (tmp_path / "o/rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["task"] for line in lines] == ["decode", "decode", "load"]
    assert (tmp_path / "o/decode.png").stat().st_size > 5000
    (tmp_path / "file").write_text("")
    with pytest.raises(ZooError, match="cannot write"):
        report.write([], tmp_path / "file")


def test_random_models(capsys: pytest.CaptureFixture[str]) -> None:
    """A config alone is enough; --layers makes it short; every known one is a model that this code implements."""
    (r,) = rows(capsys, "--random", "long-context", "--layers", "1", "--attn", "full", "--contexts", "8", *SHORT)
    assert r["model"] == "long-context"
    assert r["weight_bytes"] == ours.weight_bytes(random_model("long-context", torch.float32, 1))
    for name in CONFIGS:
        raw = CONFIGS[name]
        assert FAMILIES[raw["model_type"]].Config.from_dict(raw).num_hidden_layers == raw["num_hidden_layers"]
    a, b = (random_model("long-context", torch.bfloat16, 1) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    with pytest.raises(ZooError, match="known are mistral-7b"):
        random_model("mistral-8b", torch.bfloat16)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["sing"], "unknown task 'sing'"),
        (["--contexts", "4q"], "write 256 or 4k"),
        (["--contexts", "0"], "at least 1"),
        (["--steps", "0"], "at least 1"),
        (["--batch", "0"], "at least 1"),
        (["load", "--random", "mistral-7b"], "use --model"),
        (["--layers", "2"], "--layers goes with --random"),
        (["--random", "mistral-8b"], "known are"),
        (["--peer", "nowhere.py"], "nowhere.py"),
    ],
)
def test_bad_input_is_one_line(argv: list[str], says: str, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = [] if "--random" in argv else ["--model", str(tiny)]
    assert cli.run(bench.main, [*model, *SHORT, *argv] if "--steps" not in argv else [*model, *SHORT[2:], *argv]) == 2
    err = capsys.readouterr().err.strip()
    assert says in err
    assert len(err.splitlines()) == 1


def test_count() -> None:
    assert [bench.count(t) for t in ("256", "4k", "64K")] == [256, 4096, 65536]


PEER = """
import time
class Slow:
    weight_bytes = 7
    def __init__(self, folder, dtype, threads, longest):
        self.about = (folder, dtype, threads, longest)
    def decode(self, context, batch, steps):
        return lambda: 10.0 * steps
    def prefill(self, context, batch):
        return None
class Half(Slow):
    cache_item = 2
    def prefill(self, context, batch):
        return lambda: 1.0
PEERS = {"slow": Slow, "other": Half}
"""


def test_peers(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A peer's rows stand beside zoo's; the first is what speedups are relative to; names can be chosen."""
    (tmp_path / "peer.py").write_text(PEER)
    argv = ["decode", "prefill", "--model", str(tiny), "--attn", "full", "--contexts", "8", *SHORT]
    got = rows(capsys, *argv, "--peer", f"{tmp_path}/peer.py")
    assert [r["who"] for r in got] == ["zoo", "slow", "other", "zoo", "other"]
    numbers = 8 * 3 * 2 * 2 * 16  # tokens x layers x (k, v) x heads x head size
    assert [r["bytes_per_step"] for r in got[1:3]] == [7 + 4 * numbers, 7 + 2 * numbers]
    assert all(r["share_of_bandwidth"] >= 0 for r in got[:3])
    assert got[4]["flops"] == got[3]["flops"] > 0
    assert got[1]["ms_per_step"] == 10_000
    assert got[1]["speedup"] == 1
    assert got[0]["speedup"] == pytest.approx(10_000 / got[0]["ms_per_step"], rel=0.01)
    assert [r["who"] for r in rows(capsys, *argv, "--peer", f"{tmp_path}/peer.py:other")] == ["zoo", "other", "zoo", "other"]
    with pytest.raises(ZooError, match="has no 'x'; it has slow, other"):
        peers.load(f"{tmp_path}/peer.py:x", tiny, torch.float32, 1, 8)


def test_transformers_is_a_peer(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="what is compared with is not installed")
    script = ROOT / "scripts/peer_transformers.py"
    argv = ["decode", "prefill", "--model", str(tiny), "--attn", "full", "--contexts", "8", *SHORT]
    got = rows(capsys, *argv, "--peer", f"{script}:transformers")
    assert [(r["task"], r["who"]) for r in got] == [
        ("decode", "zoo"),
        ("decode", "transformers"),
        ("prefill", "zoo"),
        ("prefill", "transformers"),
    ]


@pytest.mark.parametrize("kind", ["bf16", "f16", "q8_0"])
def test_gguf_holds_the_same_weights(tmp_path: Path, kind: str) -> None:
    """Read back by the code that reads the embedded model's file: equal, or within a block's step for q8_0."""
    gguf = pytest.importorskip("gguf", reason="writing GGUF needs the package gguf")
    script = runpy.run_path(str(ROOT / "scripts/write_gguf.py"))
    lm = zoo.load(str(write_llama(tmp_path / "m", tie_word_embeddings=True)), dtype="bfloat16", compile="off")
    script["write"](lm.model, tmp_path / "m.gguf", kind)
    c = lm.config
    said = {"llama.attention.head_count": c.num_attention_heads, "llama.attention.head_count_kv": c.num_key_value_heads}
    read = embedded._tensors(gguf.GGUFReader(tmp_path / "m.gguf"), said)
    ours_ = dict(lm.model.named_parameters())
    assert read.keys() == ours_.keys()
    for name, t in read.items():
        step = float(ours_[name].abs().max()) / 127 if kind == "q8_0" else 0.0
        assert (t.float() - ours_[name].float()).abs().max() <= step, name


def test_gguf_refuses_what_it_cannot_say(tiny_neox: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="writing GGUF needs the package gguf")
    script = runpy.run_path(str(ROOT / "scripts/write_gguf.py"))
    with pytest.raises(ZooError, match="only Llama and Mistral"):
        script["write"](zoo.load(str(tiny_neox), compile="off").model, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_startup_and_load_are_of_what_was_asked_for(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights and backend reach `zoo.load`, and the command line of the processes that start."""
    asked: list[tuple[str | None, str]] = []
    real = zoo.load
    monkeypatch.setattr(zoo, "load", lambda *a, **b: asked.append((b["weights"], b["backend"])) or real(*a, **b | {"weights": None}))
    both = ["--model", str(tiny), "--weights", "model", "--weights", "int8", "--backend", "sdpa", "--repeats", "1", "--dtype", "float32"]
    assert [r.get("weights") for r in rows(capsys, "load", *both)] == [None, "int8"]
    assert set(asked) == {(None, "sdpa"), ("int8", "sdpa")}
    told: list[list[str]] = []
    monkeypatch.setattr(ours, "startup", lambda attn, compile, new, options, env: told.append(options) or ours.Case({}, lambda: 1.0, 1))
    assert [r.get("weights") for r in rows(capsys, "startup", *both, "--attn", "full")] == [None] * 3 + ["int8"] * 3
    assert all(options[options.index("--backend") + 1] == "sdpa" for options in told)
    assert [options[-2:] == ["--weights", "int8"] for options in told] == [False] * 3 + [True] * 3


@pytest.mark.slow
def test_startup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three ways to start, each a process of its own, with the time of its first token."""
    one_layer = str(write_llama(tmp_path / "m", num_hidden_layers=1))
    got = rows(capsys, "startup", "--model", one_layer, "--attn", "full", "--dtype", "float32", "--repeats", "1", "--new-tokens", "5")
    assert [r["who"] for r in got] == ["zoo, compile=auto", "zoo, compile=off", "zoo, compile=on"]
    assert all(0 < r["first_token_seconds"] <= r["seconds"] for r in got)
    with pytest.raises(ZooError, match="ended with code 2"):
        ours.startup("nonsense", "off", 5, ["--model", one_layer], dict).run()
