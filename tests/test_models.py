"""Llama against `transformers` in numbers: tiny random models and the real one; all families in bfloat16 and in any shape."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, LLAMA, write_checkpoint, write_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import (
    CAUGHT,
    LONG,
    SMALL,
    TOLERANCE,
    Mutant,
    Pair,
    Pairs,
    attends,
    cached,
    eps,
    interleaved,
    layer,
    miss,
    mlp,
    no_bias,
    normed,
    on_queries_only,
    other_head,
    pair_maker,
    parallel,
    rope,
    some_ids,
    swapped_norms,
    theirs,
    tiled,
    turned,
)
from torch import Tensor

import zoo
from zoo import models
from zoo.errors import ZooError
from zoo.lm import CHUNK
from zoo.models import llama
from zoo.models.layers import Rope, turn
from zoo.sampling import sampler

ROOT = Path(__file__).parent.parent
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": SMALL,
    "one kv head": {**SMALL, "num_key_value_heads": 1},
    "three of three": {**SMALL, "hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 3},
    "head_dim left out": {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "num_hidden_layers": 2},
    "head_dim": {**SMALL, "head_dim": 32},
    "tied": {**SMALL, "tie_word_embeddings": True},
    "biases": {**SMALL, "attention_bias": True, "mlp_bias": True},
    "theta": {**SMALL, "rope_theta": 500000.0},
    "theta in rope_parameters": {**SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "rope_theta": ...},
    "llama 3.1": {**SMALL, "rope_scaling": LLAMA3},
    "llama 3.1 in rope_parameters": {**SMALL, "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}, "rope_theta": ...},
    "small embeddings": {**SMALL, "embeddings": 0.01},  # a mean square near eps, so that a wrong eps shows
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return pair_maker(tmp_path_factory.mktemp("llama"), "llama", VARIANTS)


# Tiny random models


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(pairs: Pairs, variant: str) -> None:
    pairs(variant).check()


@pytest.mark.parametrize("variant", ["tied", "biases", "head_dim", "llama 3.1"])
def test_reads_what_transformers_writes(pairs: Pairs, variant: str, tmp_path: Path) -> None:
    """`save_pretrained` spells the config its own way: rope_parameters, dtype, null for what is absent."""
    pair = pairs(variant)
    theirs(pair.folder).save_pretrained(tmp_path)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(pair.folder / file, tmp_path)
    assert max(replace(pair, folder=tmp_path).misses(zoo.load(str(tmp_path), compile="off"))) < TOLERANCE


def test_reads_shards(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("biases")
    theirs(pair.folder).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(pair.folder / file, tmp_path)
    assert miss(zoo.load(str(tmp_path), compile="off").logits(pair.ids), pair.expected) < TOLERANCE


@st.composite
def shapes(draw: st.DrawFn) -> tuple[dict[str, Any], int, int, int]:
    """config.json of any Llama, batch, prompt length, length."""
    G, R = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    config: dict[str, Any] = {
        "num_attention_heads": G * R,
        "num_key_value_heads": draw(st.sampled_from([G, ...])) if R == 1 else G,
        "head_dim": draw(st.sampled_from([16, 18, 24, 40, 64])),
        "hidden_size": round(draw(st.integers(28, 40)) / (G * R)) * G * R,  # transformers wants a multiple of the heads
        "intermediate_size": draw(st.integers(30, 120)),
        "num_hidden_layers": draw(st.integers(2, 3)),
        "vocab_size": draw(st.integers(400, 500)),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-3, ...])),
        "rope_theta": draw(st.sampled_from([100.0, 10000, 1e6, ...])),
        "rope_scaling": draw(st.sampled_from([None, LLAMA3, {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 16}])),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
    }
    prompt = draw(st.integers(1, 50))
    return config, draw(st.integers(1, 3)), prompt, prompt + draw(st.integers(0, 20))


@given(drawn=shapes())
@settings(max_examples=15, derandomize=True, deadline=None)
def test_logits_of_any_shape(tmp_path_factory: pytest.TempPathFactory, drawn: tuple[dict[str, Any], int, int, int]) -> None:
    config, batch, prompt, length = drawn
    folder = write_llama(tmp_path_factory.mktemp("drawn"), **config)
    pair = Pair.of(folder, some_ids(config["vocab_size"], batch, length))
    assert pair.expected.std() > 0.5
    assert max(pair.misses(pair.load(), prompt)) < TOLERANCE


# Mutants: one thing wrong, in one pass and through the cache alike

MUTANTS: dict[str, tuple[str, Mutant]] = {
    "rotary removed": ("grouped", turned(lambda x, cos, sin: x)),
    "rotary on queries only": ("grouped", on_queries_only),
    "rotary turns the other way": ("grouped", turned(lambda x, cos, sin: turn(x, cos, -sin))),
    "rotary layout": ("grouped", turned(interleaved)),
    "theta x 100": ("grouped", rope(lambda r: replace(r, theta=100 * r.theta))),
    "theta / 50": ("theta", rope(lambda r: replace(r, theta=10000.0))),
    "theta of rope_parameters ignored": ("theta in rope_parameters", rope(lambda r: Rope())),
    "llama 3.1 scaling ignored": ("llama 3.1", rope(lambda r: Rope(r.theta))),
    "llama 3.1 scaling ignored in rope_parameters": ("llama 3.1 in rope_parameters", rope(lambda r: Rope(r.theta))),
    "llama 3.1 scaling without the blend": (
        "llama 3.1",
        rope(lambda r: replace(r, scaling=replace(r.scaling, high_freq_factor=r.scaling.low_freq_factor + 1e-3)) if r.scaling else r),
    ),
    "heads tiled": ("grouped", attends(tiled)),
    "heads tiled, groups of three": ("three of three", attends(tiled)),
    "attention unscaled": ("grouped", attends(lambda cache, q, k, v, pos: cache.attend(q * q.shape[-1] ** 0.5, k, v, pos))),
    "attention scaled by hidden size / heads": ("head_dim", attends(lambda cache, q, k, v, pos: cache.attend(2 * q, k, v, pos))),
    "mlp beside attention": ("grouped", layer(parallel)),
    "residual of the norm": ("grouped", layer(normed)),
    "norms swapped": ("grouped", layer(swapped_norms)),
    "last norm skipped": ("grouped", lambda patch, lm: patch.setattr(lm.model.model.norm, "forward", lambda x: x)),
    "eps 1e-5 -> 1e-6": ("small embeddings", eps(1e-6)),
    "gelu": ("grouped", mlp(lambda self, x: self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x)))),
    "gate and up swapped": ("grouped", mlp(lambda self, x: self.down_proj(F.silu(self.up_proj(x)) * self.gate_proj(x)))),
    "tied head ignored": ("tied", other_head),
    **{f"bias of {name} dropped": ("biases", no_bias(f"{name}_proj")) for name in ("q", "k", "v", "o", "gate", "up", "down")},
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(pairs: Pairs, mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variant, apply = MUTANTS[mutant]
    pairs(variant).check_mutant(apply, monkeypatch)


# bfloat16

LOW: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "mistral": {**SMALL, "sliding_window": 800},
    "gpt_neox": {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "rotary_pct": 1.0},
}


@torch.no_grad()
def errors(lm: zoo.LM, folder: Path, seed: int) -> tuple[float, float]:
    """Mean absolute error of logits against float64, in units of transformers' own in bfloat16: in one pass, and through the cache."""
    ids, prompt = some_ids(lm.config.vocab_size, length=LONG, seed=seed), LONG - 5
    exact, low = theirs(folder, torch.float64)(ids).logits, theirs(folder, torch.bfloat16)(ids).logits
    error = (low - exact).abs()
    assert 1e-3 < error.mean() < 0.1 * exact.std()
    once, stepwise = (lm.logits(ids) - exact).abs(), (cached(lm, ids, prompt) - exact[:, prompt - 1 :]).abs()
    return float(once.mean() / error.mean()), float(stepwise.mean() / error[:, prompt - 1 :].mean())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_precise_as_transformers(tmp_path: Path, family: str, seed: int) -> None:
    folder = write_checkpoint(tmp_path, family, torch.bfloat16, seed, tie_word_embeddings=bool(seed % 2), **LOW[family])
    lm = zoo.load(str(folder), compile="off")
    assert lm.dtype == torch.bfloat16
    once, stepwise = errors(lm, folder, seed)
    assert once < 1.5
    assert stepwise < 1.5


def low_frequencies(patch: pytest.MonkeyPatch, lm: zoo.LM) -> None:
    lm.model.rotary.inv_freq = lm.model.rotary.inv_freq.bfloat16().float()


def low_positions(patch: pytest.MonkeyPatch, lm: zoo.LM) -> None:
    right = lm.model.rotary.tables
    patch.setattr(lm.model.rotary, "tables", lambda pos: right(pos.bfloat16()))


@pytest.mark.parametrize("mutant", [low_frequencies, low_positions])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_mutants_are_caught(tmp_path: Path, family: str, mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path, family, torch.bfloat16, **LOW[family])
    lm = zoo.load(str(folder), compile="off")
    mutant(monkeypatch, lm)
    once, stepwise = errors(lm, folder, seed=0)
    assert once > 2
    assert stepwise > 2


def test_frequencies_stay_float32(tiny: Path) -> None:
    """bfloat16 is the parameters' dtype, by whatever way they got it."""
    loaded, cast = (zoo.load(str(tiny), dtype=d, compile="off") for d in ("bfloat16", "float32"))
    cast.model.to(torch.bfloat16)
    assert loaded.model.rotary.inv_freq.dtype == cast.model.rotary.inv_freq.dtype == torch.float32
    ids = some_ids(loaded.config.vocab_size)
    assert torch.equal(loaded.logits(ids), cast.logits(ids))


# One pass, chunks and single tokens


def chunked(lm: zoo.LM, ids: Tensor, chunk: int, window: int | None = None) -> Tensor:
    """Logits (B, T, V) of `ids` fed `chunk` at a time; with a window, queries forget what lies further back."""
    cache = lm.new_cache(len(ids))
    for one in cache:
        one.window = window
    with torch.no_grad():
        out = torch.cat([lm.model(piece, cache) for piece in ids.split(chunk, 1)], 1)
    assert cache.tokens_seen.tolist() == [ids.shape[1]] * len(ids)
    return out


@pytest.mark.parametrize("chunk", [1, 7, 64, 150])
def test_chunks_give_what_one_pass_gives(tmp_path: Path, chunk: int) -> None:
    lm = zoo.load(str(write_llama(tmp_path / "model", **SMALL)), compile="off")
    ids = some_ids(lm.config.vocab_size, length=150)
    assert miss(chunked(lm, ids, chunk), lm.logits(ids)) < TOLERANCE
    # A cache that has lost the first ten tokens at the end is caught, there and nowhere else.
    short = chunked(lm, ids, chunk, window=140)
    assert miss(short[:, :140], lm.logits(ids)[:, :140]) < TOLERANCE
    assert miss(short, lm.logits(ids)) > CAUGHT


# SmolLM2-135M


@pytest.fixture(scope="module")
def real(smollm2: Path) -> tuple[zoo.LM, Any]:
    """The real model in float32, ours and theirs."""
    return zoo.load(str(smollm2), dtype="float32", compile="off"), theirs(smollm2, attention="sdpa")


@pytest.fixture(scope="module")
def moby_dick(real: tuple[zoo.LM, Any], test_data: Path) -> list[int]:
    """1,024 tokens of real text."""
    text = (test_data / "moby-dick-first-half.txt").read_text(encoding="utf-8")[:10_000]
    return real[0].tokenizer.encode(text)[:1024]


@pytest.mark.slow
def test_real_logits_are_those_of_transformers(real: tuple[zoo.LM, Any], moby_dick: list[int]) -> None:
    lm, model = real
    with torch.no_grad():
        expected = model(torch.tensor([moby_dick])).logits
    logits = lm.logits(moby_dick)
    assert logits.shape == (1, 1024, 49152)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    assert (logits - expected).abs_().max() < 1e-3


@pytest.mark.slow
def test_real_greedy_tokens_are_those_of_transformers(real: tuple[zoo.LM, Any], moby_dick: list[int]) -> None:
    """After a prompt of more than one chunk."""
    lm, model = real
    prompt = moby_dick[:520]
    assert len(prompt) > CHUNK
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)[0, len(prompt) :].tolist()
    assert len(expected) == 64
    assert [token for (token,) in lm.tokens([prompt], 64, sampler(0.0))] == expected


@pytest.mark.parametrize("attn", ["full", "subgen"])
def test_knows_the_capital_of_france(smollm2: Path, attn: str) -> None:
    lm = zoo.load(str(smollm2), attn=attn, compile="off")
    answer = lm.chat([{"role": "user", "content": "What is the capital of France? Answer in one sentence."}], 32)
    assert "Paris" in answer
    assert lm.stats.stopped_by == ["end token"]


# Configs and imports


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {**LLAMA3, "mscale": 1.0}}, "mscale"),
        ({"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "factor"}}, "factor"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "default", "factor": 4.0}}, "factor"),
        ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_scaling"),
        ({"num_key_value_heads": 3}, "kv heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"sliding_window": 4096}, "sliding_window"),
    ],
)
def test_refuses_what_it_does_not_compute(changes: dict[str, Any], named: str) -> None:
    right = {**LLAMA, **SMALL, "vocab_size": 400}
    llama.LlamaConfig.from_dict(right)
    with pytest.raises(ZooError, match=named):
        llama.LlamaConfig.from_dict({**right, **changes})


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_import_brings_no_heavy_package() -> None:
    heavy = {"transformers", "tokenizers", "triton", "torch._dynamo", "torch._inductor", "huggingface_hub", "hypothesis"}
    brought = set(python("import sys, zoo; print(*sys.modules)").split())
    assert {"torch", "zoo.lm"} <= brought
    assert not heavy & brought


def test_import_takes_little_longer_than_that_of_torch() -> None:
    """The quickest of five: what else the machine does can only add to it."""
    code = "import time, torch; start = time.perf_counter(); import zoo; print(time.perf_counter() - start)"
    assert any(float(python(code)) < 0.3 for _ in range(5))


# The configs of well-known checkpoints, in the spelling that their repositories have

COMMON = {
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "tie_word_embeddings": False,
}
LLAMA_2 = {
    **COMMON,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "vocab_size": 32000,
}
LLAMA_3 = {
    **LLAMA_2,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128009],
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
MISTRAL_1 = {
    **COMMON,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 32000,
}
PYTHIA = {
    **COMMON,
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {  # -> billions of parameters, as their makers count them
    "llama-1 7b": (
        {**LLAMA_2, "max_sequence_length": 2048, "pad_token_id": 0, "rms_norm_eps": 1e-06, "num_key_value_heads": None},
        6_738_415_616,
    ),
    "llama-2-7b": (LLAMA_2, 6_738_415_616),
    "llama-2 with sampling options": ({**LLAMA_2, "do_sample": True, "temperature": 0.9, "top_p": 0.6, "max_length": 4096}, 6_738_415_616),
    "llama-3.1-8b": ({**LLAMA_3, "intermediate_size": 14336}, 8_030_261_248),
    "llama-3.2-1b": (
        {**LLAMA_3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64, "tie_word_embeddings": True},
        1_235_814_400,
    ),
    "tinyllama-1.1b": (
        {
            **LLAMA_2,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_key_value_heads": 4,
            "attention_bias": False,
        },
        1_100_048_384,
    ),
    "mistral-7b-v0.1": (MISTRAL_1, 7_241_732_096),
    "mistral-7b-v0.3": ({**MISTRAL_1, "vocab_size": 32768, "rope_theta": 1000000.0, "sliding_window": None}, 7_248_023_552),
    "mistral-nemo": (
        {
            **MISTRAL_1,
            "hidden_size": 5120,
            "head_dim": 128,
            "num_hidden_layers": 40,
            "vocab_size": 131072,
            "sliding_window": None,
            "rope_theta": 1000000.0,
            "max_position_embeddings": 131072,
        },
        12_247_782_400,
    ),
    "pythia-1.4b": (PYTHIA, 1_414_647_808),
    "gpt-neox-20b": (
        {
            **PYTHIA,
            "hidden_act": "gelu_fast",
            "hidden_size": 6144,
            "intermediate_size": 24576,
            "num_attention_heads": 64,
            "num_hidden_layers": 44,
            "vocab_size": 50432,
            "attention_probs_dropout_prob": 0,
            "hidden_dropout_prob": 0,
        },
        20_554_567_680,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_of_well_known_checkpoints(name: str) -> None:
    """They are read, and the model they describe has the number of parameters that it is known for."""
    raw, parameters = PUBLISHED[name]
    family = models.FAMILIES[raw["model_type"]]
    with torch.device("meta"):
        model = family(family.Config.from_dict(raw))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_theta"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "disagree"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_contradictory_rotary_options_are_refused(changes: dict[str, Any], named: str) -> None:
    right = {**LLAMA, **SMALL, "vocab_size": 400}
    llama.LlamaConfig.from_dict({**right, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}})
    with pytest.raises(ZooError, match=named):
        llama.LlamaConfig.from_dict({**right, **changes})
