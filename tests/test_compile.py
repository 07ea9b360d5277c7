"""The compiled decode step: one graph, compiled once, the same numbers as eager; and when it is chosen."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_checkpoint, write_llama
from kernel_checks import calls_of_a_step, graphs, targets

import zoo
from zoo import compiled
from zoo.attention import parse
from zoo.attention.cache import Caches
from zoo.compiled import COLD, WARM, Step, worth_checking
from zoo.errors import ZooError
from zoo.lm import LM
from zoo.sampling import Sampler, sampler

pytestmark = pytest.mark.skipif(
    compiled.missing_tool() is not None, reason=f"torch.compile needs a C++ compiler: {compiled.missing_tool()}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # seven runs of one layer: one is compiled, six reuse it
    return write_llama(tmp_path_factory.mktemp("compile") / "m", num_hidden_layers=7, hidden_size=32, head_dim=16)


@pytest.fixture(scope="module")
def lm(folder: Path) -> LM:
    return zoo.load(str(folder), compile="on")


@pytest.fixture
def one_graph() -> Iterator[None]:
    """Any recompilation in the test is an error."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def tokens(lm: LM, attn: str, prompt: int, new: int, choose: Sampler | None = None) -> list[int]:
    lm.attn, lm.end_ids = parse(attn), frozenset()
    ids = torch.randint(0, lm.config.vocab_size, (prompt,), generator=torch.Generator().manual_seed(prompt)).tolist()
    return [t for (t,) in lm.tokens([ids], new, choose or sampler())]  # type: ignore[misc]


@pytest.mark.slow
@pytest.mark.parametrize("attn", ["full", "sliding:window=700", "subgen:budget=512"])
def test_2000_tokens_compile_once(folder: Path, attn: str, one_graph: None) -> None:
    """2,000 new tokens with the length known: one graph, no recompilation, past windows, budgets and block edges."""
    from torch._dynamo.utils import counters

    lm = zoo.load(str(folder), compile="on")
    counters.clear()
    got = tokens(lm, attn, 40, 2000)
    assert len(got) == 2000
    assert lm.step.ran == {"compiled": 1999, "eager": 0}
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "attn", ["full", "sliding:window=50", "subgen:budget=300", "subgen:delta=3", "h2o:budget=300", "snapkv:budget=300,when=decode"]
)
def test_compiled_equals_eager(folder: Path, attn: str) -> None:
    """The same logits for 150 steps of two sequences from prompts of 330 and 290 tokens, each step fed the same tokens. In float64, where
    seven layers of large random weights do not blow rounding up to 1e-4. Angles are float32 all the same: a compiled sine differs in its
    last bit, keys of the first layer by 3e-7, and these layers make 1.5e-5 of it."""
    lm = zoo.load(str(folder), compile="on")
    lm.model.double()
    lm.attn = parse(attn)
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, lm.config.vocab_size, (2, 480), generator=g)
    caches = [lm.new_cache(2), lm.new_cache(2)]
    for cache in caches:
        lm.prefill(ids[:, :330], cache, [330, 290])
    mode, ran = lm.step.mode, dict(lm.step.ran)
    for t in range(330, 480):
        lm.step.mode = "on"
        a = lm.decode_step(ids[:, t], caches[0])
        lm.step.mode = "off"
        b = lm.decode_step(ids[:, t], caches[1])
        assert (a - b).abs().max() < 3e-5
    lm.step.mode = mode
    assert lm.step.ran["compiled"] - ran["compiled"] == 150
    assert lm.step.ran["eager"] - ran["eager"] == 150


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"head_dim": 16, "sliding_window": 50}),  # the ring wraps three times
        ("gpt_neox", {"rotary_pct": 0.5, "use_parallel_residual": False}),
        ("llama", {"head_dim": 16, "rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 100}),  # 100 lies within
    ],
)
def test_families_compile_once_and_equal_eager(tmp_path: Path, family: str, changes: dict[str, Any], one_graph: None) -> None:
    """One graph for 150 steps from a prompt of 30 tokens, each step fed the same token as the eager one; in float64."""
    from torch._dynamo.utils import counters

    lm = zoo.load(str(write_checkpoint(tmp_path, family, num_hidden_layers=2, hidden_size=32, **changes)), compile="on")
    lm.model.double()
    ids = torch.randint(0, lm.config.vocab_size, (1, 180), generator=torch.Generator().manual_seed(1))
    caches = [lm.new_cache(max_tokens=180) for _ in range(2)]
    for cache in caches:
        lm.prefill(ids[:, :30], cache)
    counters.clear()
    misses = []
    for t in range(30, 180):
        lm.step.mode = "on"
        a = lm.decode_step(ids[:, t], caches[0])
        lm.step.mode = "off"
        misses.append(float((a - lm.decode_step(ids[:, t], caches[1])).abs().max()))
    assert max(misses) < 1e-5
    assert lm.step.ran == {"compiled": 150, "eager": 150}
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.slow
def test_other_prompts_and_growth_do_not_recompile(lm: LM) -> None:
    """After the first generation with a method, other lengths and caches that outgrow their hint reuse the graph."""
    tokens(lm, "full", 30, 10)
    cache = lm.new_cache()
    lm.prefill([1, 2, 3], cache)
    lm.decode_step([4], cache)  # logits alone are a graph of their own
    with torch._dynamo.config.patch(error_on_recompile=True):
        tokens(lm, "full", 300, 100)
        cache = lm.new_cache()  # no hint: the storage doubles on the way
        lm.prefill([1, 2, 3], cache)
        for t in range(400):
            lm.decode_step(torch.tensor([t % 50]), cache)
    assert cache.tokens_seen.tolist() == [403]


@pytest.mark.slow
def test_batches_compile_and_agree(lm: LM) -> None:
    """A batch of two with different lengths, compiled, against each alone, eager."""
    lm.attn = parse("full")
    lm.end_ids = frozenset()
    prompts = [list(range(3, 43)), list(range(50, 57))]
    both = list(zip(*lm.tokens(prompts, 30, sampler()), strict=True))
    lm.step.mode = "off"
    alone = [[t for (t,) in lm.tokens([p], 30, sampler())] for p in prompts]
    lm.step.mode = "on"
    assert [list(x) for x in both] == alone


def test_auto_is_by_the_tokens_to_come(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short answers run eagerly; long ones compile; the middle ones where this step was compiled before."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    lm = zoo.load(str(folder), compile="auto")
    cache = lm.new_cache()
    assert [lm.step.wanted(cache, n) for n in (100, WARM, COLD - 1, COLD)] == [False, False, False, True]
    lm.step.note(cache).parent.mkdir(parents=True)
    lm.step.note(cache).touch()
    assert [lm.step.wanted(cache, n) for n in (100, WARM - 1, WARM, COLD)] == [False, False, True, True]
    lm.attn = parse("subgen")
    assert not lm.step.wanted(lm.new_cache(), WARM)  # another method is another graph
    assert lm.generate("Call me", 5)
    assert lm.step.ran == {"compiled": 0, "eager": 4}


def test_without_a_compiler_one_line_and_eager(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Said once, and the answer is the eager one."""
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    lm = zoo.load(str(folder), compile="on")
    with caplog.at_level(logging.WARNING, "zoo"):
        text = lm.generate("Call me", 8)
        assert lm.generate("Call me", 8) == text
    assert [r.getMessage() for r in caplog.records] == ["torch.compile cannot run here: no C++ compiler (g++); decoding runs eagerly"]
    assert lm.step.ran["compiled"] == 0


def test_a_failing_compiler_falls_back(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """`auto` answers eagerly when compilation breaks, with one line; `on` says what broke."""

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("cc1plus: out of memory\nmore lines")

    monkeypatch.setattr(compiled, "COLD", 1)
    monkeypatch.setattr(torch, "compile", lambda f, **options: broken)
    lm = zoo.load(str(folder), compile="auto")
    with caplog.at_level(logging.WARNING, "zoo"):
        text = lm.generate("Call me", 8)
    assert [r.getMessage() for r in caplog.records] == ["torch.compile failed (cc1plus: out of memory); decoding runs eagerly"]
    assert text == zoo.load(str(folder), compile="off").generate("Call me", 8)
    with pytest.raises(RuntimeError, match="cc1plus"):
        zoo.load(str(folder), compile="on").generate("Call me", 8)


def test_runs_of_layers_are_one_region(tmp_path: Path) -> None:
    """What makes the first compiled token come soon: of twelve layers six are compiled, and called twice."""
    lm = zoo.load(str(write_llama(tmp_path, num_hidden_layers=12)), backend="eager", compile="off")
    cache = lm.new_cache()
    lm.prefill([[5, 6, 7]], cache)
    (graph,), _ = graphs(lm.step.eager, torch.tensor([[8]]), torch.tensor([[3]]), cache)
    called = targets(graph)
    assert sum("invoke_subgraph" in name for name in called) == 2
    assert sum("index_put" in name for name in called) == 6 * 3  # keys, values, positions


def test_unknown_mode() -> None:
    """Names the known ones."""
    with pytest.raises(ZooError, match="auto, on, off"):
        Step(None, "fast", "")


def test_nothing_global_is_set(folder: Path, tmp_path: Path) -> None:
    """Importing and loading leave PyTorch's defaults alone."""
    import subprocess
    import sys

    code = (
        "import os, torch; before = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), dict(os.environ))\n"
        f"import zoo; zoo.load({str(folder)!r}, compile='off').generate('Call me', 2)\n"
        "assert before == (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), dict(os.environ))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


SAMPLERS = [
    {"temperature": 0.0},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.3, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "seed": 4},
    {"temperature": 0.0, "repetition_penalty": 1.3},
]


@pytest.mark.slow
def test_tokens_are_chosen_inside_the_step(folder: Path) -> None:
    """Every sampler says the same compiled and eager, in float64; a sampler with other numbers is the same graph, another seed too."""
    from torch._dynamo.utils import counters

    lm = zoo.load(str(folder), compile="off")
    lm.model.double()
    eager = [lm.generate("Call me", 12, **numbers) for numbers in SAMPLERS]
    lm.step.mode = "on"
    counters.clear()
    assert [lm.generate("Call me", 12, **numbers) for numbers in SAMPLERS] == eager
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == len(SAMPLERS)
    with torch._dynamo.config.patch(error_on_recompile=True):
        others = [lm.generate("Call me", 12, temperature=t, seed=s) for t, s in ((0.8, 3), (0.5, 3), (0.8, 9), (3.0, -7))]
    assert counters["stats"]["unique_graphs"] == graphs
    assert others[0] == eager[1]
    assert len(set(others)) == 4


def masses(cache: Caches) -> list[torch.Tensor]:
    """What was added up of the attention in the first layer; of the others' inputs, rounding is larger."""
    first: Any = cache[0]
    return [t for one in (first.store, first) for t in (one.mass, one.spikes) if t is not None]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attn", "dtype"),
    [
        *((attn, "float32") for attn in ("full", "sliding:window=50", "subgen:budget=300", "h2o:budget=300", "tova:budget=300")),
        *((attn, "bfloat16") for attn in ("full", "subgen:budget=300", "tova:budget=300")),
    ],
)
def test_compiled_kernels_equal_eager_kernels(tmp_path: Path, attn: str, dtype: str) -> None:
    """The CPU kernels inside the graph, on caches whose storage is longer than what is shown; 70 steps past a block's end. In float32 the
    logits are near; in bfloat16, rounded elsewhere once operations are fused, they are as near to those of float32 as eager ones. What was
    added up is the same until something is absorbed."""
    folder = str(write_llama(tmp_path / "m", num_hidden_layers=2, hidden_size=32, head_dim=16))
    lm = zoo.load(folder, dtype=dtype, compile="on", attn=attn)
    if lm.backend != "cpp":
        pytest.skip("no C++ compiler: the CPU kernels cannot be built")
    exact = zoo.load(folder, dtype="float32", compile="off", backend="eager", attn=attn)
    ids = torch.randint(0, lm.config.vocab_size, (2, 401), generator=torch.Generator().manual_seed(1))
    caches = [lm.new_cache(2, max_tokens=600), lm.new_cache(2, max_tokens=600), exact.new_cache(2)]
    for one, cache in zip((lm, lm, exact), caches, strict=True):
        one.prefill(ids[:, :330], cache, [330, 290])
    observing, misses = attn.startswith(("subgen", "h2o")), {"on": [], "off": []}
    for t in range(330, 400):
        true = exact.decode_step(ids[:, t], caches[2])
        for (mode, missed), cache in zip(misses.items(), caches[:2], strict=True):
            lm.step.mode = mode
            missed.append(lm.decode_step(ids[:, t], cache) - true)
        if t == 338 and observing:
            for a, b in zip(*map(masses, caches[:2]), strict=True):
                assert b.max() > 0.1
                assert (a - b).abs().max() <= (1e-5 if dtype == "float32" else 0.02) * b.max()
    compiled, eager = (torch.stack(missed) for missed in misses.values())
    assert compiled.square().mean() ** 0.5 <= 1.5 * eager.square().mean() ** 0.5
    if dtype == "float32":
        assert (compiled - eager).abs().max() < 2e-4
    assert lm.step.ran == {"compiled": 70, "eager": 70}
    called = calls_of_a_step(lm, caches[0], ids[:, 400])
    assert called == {"linear", "attention_and_mass" if observing else "attention"}


def test_what_is_checked_at_each_step() -> None:
    """Weights' shapes and the layers after a cache's first are not; everything else is."""
    assert not worth_checking("TENSOR_MATCH", "self.model._modules['model']._modules['norm']._parameters['weight']")
    assert not worth_checking("TENSOR_MATCH", "cache._modules['1']._modules['store']._buffers['k']")
    assert not worth_checking("TYPE_MATCH", "cache._modules['29']")
    assert worth_checking("TYPE_MATCH", "self.model._modules['model']._modules['layers']._modules['3']")
    assert worth_checking("TENSOR_MATCH", "cache._modules['0']._modules['store']._buffers['k']")
    assert worth_checking("TENSOR_MATCH", "ids")


@pytest.mark.slow
def test_guards_are_called_as_expected(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo's own names for them, of a real step: most are left out, and what may change is not."""
    asked: dict[str, bool] = {}
    real = worth_checking
    monkeypatch.setattr(compiled, "worth_checking", lambda kind, name: asked.setdefault(f"{kind} {name}", real(kind, name)))
    lm = zoo.load(str(folder), dtype="float32", compile="on")
    cache = lm.new_cache(1, max_tokens=20)
    lm.prefill([1, 2, 3], cache)
    lm.decode_step([4], cache)
    left_out = [name for name, kept in asked.items() if not kept]
    assert sum(name.startswith("TENSOR_MATCH self.model") for name in left_out) > 40
    assert sum("cache._modules['6']" in name for name in left_out) > 2
    assert any(kept and "cache._modules['0']" in name and name.startswith("TENSOR_MATCH") for name, kept in asked.items())


@pytest.mark.slow
def test_weights_that_change_are_compiled_anew(folder: Path) -> None:
    """A cast model, though guards on weights are left out; and layers that are not alike run eagerly."""
    lm = zoo.load(str(folder), dtype="float32", compile="on")
    first = lm.generate("Call me", 6)
    lm.model.double()
    assert lm.generate("Call me", 6) == first
    cache = lm.new_cache()
    lm.prefill([1, 2, 3], cache)
    cache[3].window = 2
    before = dict(lm.step.ran)
    lm.decode_step([4], cache)
    assert lm.step.ran == {"compiled": before["compiled"], "eager": before["eager"] + 1}


@pytest.mark.slow
def test_a_cache_of_another_kind_is_another_graph(folder: Path) -> None:
    """Though only its first layer is looked at: methods, batches and windows in turn give what they give alone."""
    lm = zoo.load(str(folder), dtype="float32", compile="on")
    kinds = [("full", 1), ("sliding:window=40", 1), ("full", 2), ("sliding:window=41", 1), ("full", 1)]
    answers = []
    for mode in ("off", "on"):
        lm.step.mode = mode
        for attn, batch in kinds:
            lm.attn = parse(attn)
            answers.append(lm.generate(["Call me Ishmael. " * 20] * batch, 8))
    assert answers[:5] == answers[5:]
