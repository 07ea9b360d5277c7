"""python -m zoo.generate --backend triton in Triton's interpreter: the eager path's tokens, by every method, and each kernel runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_checkpoint, write_llama
from kernel_checks import calls, graphs, targets
from zoo.kernels.launch import launches

import zoo
import zoo.generate
from zoo.attention import parse
from zoo.attention.cache import Caches
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
]
OBSERVING = ("h2o", "snapkv", "tova", "subgen:")  # those that ask what was attended to
PROMPT = "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse. " * 4


def test_every_method_is_here() -> None:
    assert {attn.partition(":")[0] for attn in METHODS} == set(zoo.attentions())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("m") / "m", num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=32)


def generate(capsys: pytest.CaptureFixture[str], folder: Path, attn: str, backend: str) -> dict[str, Any]:
    options = ["--max-new-tokens", "5", "--compile", "off", "--json"]
    prompt = PROMPT * 2 if attn == "full" else PROMPT  # longer than a split
    zoo.generate.main(["--model", str(folder), "--attn", attn, "--backend", backend, *options, prompt])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("attn", METHODS)
def test_tokens_are_the_eager_path_s(folder: Path, attn: str, capsys: pytest.CaptureFixture[str]) -> None:
    eager = generate(capsys, folder, attn, "eager")
    launches.clear()
    said = generate(capsys, folder, attn, "triton")
    assert said["backend"] == "triton"
    assert said["answers"] == eager["answers"]
    assert said["cache_bytes_used"] == eager["cache_bytes_used"]
    assert said["prompt_tokens"] > (256 if attn == "full" else 129)
    assert launches["slot_attention_kernel"] >= 1 + 4  # the prompt, and every token after the first
    assert (launches["column_mass_kernel"] > 0) == attn.startswith(OBSERVING)
    assert launches["merge_kernel"] > 0 or attn != "full"


@pytest.mark.parametrize("family", ["mistral", "gpt_neox"])
def test_other_families(tmp_path: Path, family: str) -> None:
    """A window of the model's own, and rotary embeddings of a part of the head: logits of a prompt and of steps, two sequences."""
    folder = str(write_checkpoint(tmp_path, family, num_hidden_layers=1))
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


def after_prompt(lm: LM, attn: str, tokens: int) -> tuple[torch.Tensor, torch.Tensor, Caches]:
    """What a decode step takes behind a prompt of so many tokens."""
    lm.attn = parse(attn)
    cache = lm.new_cache()
    lm.prefill(torch.randint(0, lm.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(1)), cache)
    cache.make_room(torch.tensor([tokens + 1]), tokens + 1)
    return torch.tensor([[5]]), torch.tensor([[tokens]]), cache


@pytest.mark.parametrize("attn", ["full", "subgen:budget=128", "h2o:budget=128", "subgen_paper:delta=3,s=20,block=16"])
def test_a_step_is_one_graph(folder: Path, attn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "one_compiled_row", lambda x: False)  # which rounds otherwise than the eager product
    lm = zoo.load(str(folder), backend="triton", compile="off")
    ids, pos, cache = after_prompt(lm, attn, 140)
    with torch.no_grad():
        eager = lm.step.eager(ids, pos, cache.clone())
    (graph,), traced = graphs(lm.step.eager, ids, pos, cache)
    assert (traced - eager).abs().max() < 1e-5
    expected = {
        "full": {"slot_attention_triton"},
        "subgen_paper": {"slot_parts_triton"},
    }.get(attn.partition(":")[0], {"slot_attention_triton", "page_attention_triton", "slot_mass_triton", "page_mass_triton"})
    assert expected <= calls(graph)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("m") / "m", num_hidden_layers=8, num_attention_heads=2, num_key_value_heads=1, head_dim=16)


@pytest.mark.parametrize(("backend", "attn", "regions"), [("triton", "full", 0), ("triton", "subgen:budget=128", 0), ("eager", "full", 2)])
def test_a_step_of_many_layers_is_one_graph(deep: Path, backend: str, attn: str, regions: int) -> None:
    """Runs of layers are one region, compiled once, but where the rotary kernel writes into the cache: PyTorch refuses that in a region
    that is called twice. It is called once a layer, and nothing else writes keys."""
    lm = zoo.load(str(deep), backend=backend, compile="off")
    ids, pos, cache = after_prompt(lm, attn, 5)
    twin = cache.clone()
    with torch.no_grad():
        eager = lm.step.eager(ids, pos, twin)
    (graph,), traced = graphs(lm.step.eager, ids, pos, cache, aot=True)
    assert (traced - eager).abs().max() < 1e-3
    for mine, other in zip(cache, twin, strict=True):
        assert (mine.store.k[:, :, 1:7] - other.store.k[:, :, 1:7]).abs().max() < 1e-4
        assert torch.equal(mine.store.pos, other.store.pos)
    called = targets(graph)
    assert sum("invoke_subgraph" in name for name in called) == regions
    assert sum("rotary_store_triton" in name for name in called) == (0 if regions else 8)
    assert any("index_put" in name for name in called) == (regions > 0)
