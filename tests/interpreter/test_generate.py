"""python -m zoo.generate --backend triton in Triton's interpreter: the eager path's tokens, by every method, and each kernel runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_checkpoint, write_llama
from kernel_checks import calls, graphs, targets
from zoo.kernels import slot_attention
from zoo.kernels.launch import launches

import zoo
import zoo.generate
from zoo.attention import parse
from zoo.attention.cache import Caches
from zoo.attention.subgen import SubGen
from zoo.attention.tables import save_table
from zoo.lm import LM
from zoo.models import layers

# Prompts are longer than these budgets, so that all of them have settled slots; `prompt` and `stream` go other ways than `decode`.
METHODS = [
    "full",
    "sliding:window=40",
    "subgen:budget=128",
    "subgen:budget=128,when=stream",
    "subgen:delta=3",
    "subgen_kcenter:budget=128",
    "subgen_paper:delta=3,s=20,block=16",
    "h2o:budget=128",
    "h2o:budget=64,when=prompt",
    "snapkv:budget=128",
    "tova:budget=128",
    "keydiff:budget=128",
    "l2norm:budget=128",
    "sinks:budget=128",
    "uniform:budget=128",
    "balancekv:budget=128",
    "balancekv:mode=tree,batch=32",
    "kivi:residual=32",
    "turboquant:residual=32",
    "qjl:residual=32",
    "h2o:budget=128+kivi",
    "snapkv:budget=128+qjl",
    "pod:recent=40",
    "kvsharer",
]
OBSERVING = ("h2o", "snapkv", "tova", "subgen:")  # those that ask what was attended to
PROMPT = "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse. " * 4


def test_every_method_is_here() -> None:
    assert {attn.partition(":")[0] for attn in METHODS} == set(zoo.attentions())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("m") / "m", num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=32)


@pytest.fixture
def shared_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose second layer reads the first one's, by the tables of `pod` and `kvsharer`."""
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    folder = write_llama(tmp_path / "m", num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    config = zoo.load(str(folder), compile="off").config
    save_table("kvsharer", config, {"pairs": [[1, 0]]})
    save_table("pod", config, {"groups": [[0], [0]]})
    return folder


def generate(capsys: pytest.CaptureFixture[str], folder: Path, attn: str, backend: str) -> dict[str, Any]:
    options = ["--max-new-tokens", "5", "--compile", "off", "--json"]
    zoo.generate.main(["--model", str(folder), "--attn", attn, "--backend", backend, *options, PROMPT])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("attn", METHODS)
def test_tokens_are_the_eager_path_s(
    request: pytest.FixtureRequest, attn: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = attn.partition(":")[0]
    folder = request.getfixturevalue("shared_folder" if name in ("pod", "kvsharer") else "folder")
    if attn == "full":
        monkeypatch.setattr(slot_attention, "SHARE", 64)  # so that a prompt this short has two
    if attn == "subgen:delta=3":
        monkeypatch.setattr(SubGen, "slots", lambda self, tokens: 64)  # clustering begins after so many tokens, not 512
    eager = generate(capsys, folder, attn, "eager")
    launches.clear()
    said = generate(capsys, folder, attn, "triton")
    assert said["backend"] == "triton"
    assert said["answers"] == eager["answers"]
    assert said["cache_bytes_used"] == eager["cache_bytes_used"]
    assert said["prompt_tokens"] > 129
    assert launches["rotate_and_store"] >= 4
    if name in ("kivi", "turboquant", "qjl") or "+" in attn:  # the prompt: no kernel reads codes, or what lies beside them
        assert launches["slot_attention_kernel"] == 1
        assert (launches["column_mass_kernel"] > 0) == attn.startswith("h2o")
        return
    # The prompt, and of every token after the first what it asks: one store, or tail and pages, or three estimators; of two layers twice.
    assert launches["slot_attention_kernel"] >= 1 + 4 * {"full": 1, "sliding": 1, "subgen_paper": 3, "pod": 4}.get(name, 2)
    assert (launches["column_mass_kernel"] > 0) == attn.startswith(OBSERVING)
    assert launches["merge_kernel"] > 0 or attn != "full"
    assert (launches["assign"] > 0) == name.startswith("subgen")
    assert (launches["add_up"] > 0) == (name == "subgen")


@pytest.mark.parametrize(("family", "heads"), [("mistral", {"num_key_value_heads": 1}), ("gpt_neox", {})])
def test_other_families(tmp_path: Path, family: str, heads: dict[str, int]) -> None:
    """A window of the model's own, and rotary embeddings of a part of the head: logits of a prompt and of steps, two sequences."""
    folder = str(write_checkpoint(tmp_path, family, num_hidden_layers=1, num_attention_heads=2, hidden_size=32, **heads))
    logits = []
    for backend in ("eager", "triton"):
        lm = zoo.load(folder, backend=backend, compile="off")
        lm.attn = parse("h2o:budget=128")
        ids = torch.randint(0, lm.config.vocab_size, (2, 142), generator=torch.Generator().manual_seed(1))
        cache = lm.new_cache(2)
        lm.prefill(ids[:, :139], cache, [139, 133])
        logits.append(torch.stack([lm.decode_step(ids[:, t], cache) for t in range(139, 142)]))
    assert (logits[0] - logits[1]).abs().max() < 1e-3


# A compiled step


def after_prompt(folder: Path, attn: str, tokens: int) -> tuple[LM, torch.Tensor, torch.Tensor, Caches]:
    """A model, and what a decode step by the kernels takes behind a prompt of so many tokens, which came by the formula: it is quicker."""
    lm = zoo.load(str(folder), attn=attn, backend="eager", compile="off")
    cache = lm.new_cache()
    lm.prefill(torch.randint(0, lm.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(1)), cache)
    cache.make_room(torch.tensor([tokens + 1]), tokens + 1)
    for layer in cache:
        layer.backend = "triton"
    return lm, torch.tensor([[5]]), torch.tensor([[tokens]]), cache


@pytest.mark.parametrize("attn", ["full", "subgen:budget=128", "h2o:budget=128", "subgen_paper:delta=3,s=20,block=16"])
def test_a_step_is_one_graph(folder: Path, attn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "one_compiled_row", lambda x: False)  # which rounds otherwise than the eager product
    lm, ids, pos, cache = after_prompt(folder, attn, 140)
    with torch.no_grad():
        eager = lm.step.eager(ids, pos, cache.clone())
    (graph,), traced = graphs(lm.step.eager, ids, pos, cache)
    assert (traced - eager).abs().max() < 1e-5
    expected = {
        "full": {"slot_attention_triton"},
        "subgen_paper": {"slot_parts_triton"},
    }.get(attn.partition(":")[0], {"slot_attention_triton", "page_attention_triton", "slot_mass_triton", "page_mass_triton"})
    assert expected <= calls(graph)


@pytest.mark.parametrize("attn", ["full", "subgen:budget=128"])
def test_a_step_of_eight_layers_is_one_graph(tmp_path: Path, attn: str) -> None:
    """The rotary kernel writes into the cache, which PyTorch refuses in a region that is called twice. It is called once a layer, and
    nothing else writes keys."""
    folder = write_llama(tmp_path, num_hidden_layers=8, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    lm, ids, pos, cache = after_prompt(folder, attn, 5)
    twin = cache.clone()
    with torch.no_grad():
        eager = lm.step.eager(ids, pos, twin)
    (graph,), traced = graphs(lm.step.eager, ids, pos, cache, aot=True)
    assert (traced - eager).abs().max() < 1e-3
    for mine, other in zip(cache, twin, strict=True):
        assert (mine.store.k[:, :, 1:7] - other.store.k[:, :, 1:7]).abs().max() < 1e-4
        assert torch.equal(mine.store.pos, other.store.pos)
    called = targets(graph)
    assert sum("rotary_store_triton" in name for name in called) == 8
    assert not any("index_put" in name for name in called)
