"""Decoding over codes, compiled: one graph, the same numbers as eager."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import write_llama
from test_compile import one_graph, tokens

import zoo
from zoo import compiled
from zoo.attention import parse

pytestmark = pytest.mark.skipif(
    compiled.missing_tool() is not None, reason=f"torch.compile needs a C++ compiler: {compiled.missing_tool()}"
)
__all__ = ["one_graph"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("compile") / "m", num_hidden_layers=3, hidden_size=32, head_dim=16)


@pytest.mark.slow
@pytest.mark.parametrize("attn", ["kivi:bits=2", "h2o:budget=200+turboquant:bits=3.5,mode=prod", "snapkv:budget=200,when=decode+qjl"])
def test_one_graph_and_the_same_numbers(folder: Path, attn: str, one_graph: None) -> None:
    """One graph for 150 steps, while pages grow and slots are replaced; the same logits as eager steps fed the same tokens, in float64."""
    from torch._dynamo.utils import counters

    lm = zoo.load(str(folder), compile="on")
    lm.model.double()
    lm.attn = parse(attn)
    ids = torch.randint(0, lm.config.vocab_size, (2, 480), generator=torch.Generator().manual_seed(1))
    caches = [lm.new_cache(2, max_tokens=480) for _ in range(2)]
    for cache in caches:
        lm.prefill(ids[:, :330], cache, [330, 290])
    counters.clear()
    for t in range(330, 480):
        lm.step.mode = "on"
        a = lm.decode_step(ids[:, t], caches[0])
        lm.step.mode = "off"
        b = lm.decode_step(ids[:, t], caches[1])
        assert (a - b).abs().max() < 3e-5
    assert lm.step.ran == {"compiled": 150, "eager": 150}
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("attn", ["kivi:bits=4", "sinks:budget=200+kivi:bits=4"])
def test_600_tokens_compile_once(folder: Path, attn: str, one_graph: None) -> None:
    """From a prompt that nothing of is encoded, past the residual and the budget."""
    from torch._dynamo.utils import counters

    lm = zoo.load(str(folder), compile="on")
    counters.clear()
    assert len(tokens(lm, attn, 40, 600)) == 600
    assert lm.step.ran == {"compiled": 599, "eager": 0}
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
