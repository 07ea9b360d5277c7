"""GPT-NeoX against `transformers`: both residual wirings, partial rotary positions, the fused matrix, activations, old checkpoints."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import NEOX, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import (
    TOLERANCE,
    Mutant,
    Pair,
    Pairs,
    attends,
    eps,
    interleaved,
    layer,
    miss,
    no_bias,
    normed,
    on_queries_only,
    other_head,
    pair_maker,
    parallel,
    rope,
    sequential,
    some_ids,
    swapped_norms,
    theirs,
    turned,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import zoo
from zoo.errors import ZooError
from zoo.models.gpt_neox import ACTIVATIONS, GPTNeoXConfig
from zoo.models.layers import turn

SMALL: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}


def new_names(**changes: Any) -> dict[str, Any]:
    """The rotary options as transformers writes them now."""
    options = {"rope_type": "default", "rope_theta": 500.0, **changes}
    return {**SMALL, "rotary_pct": ..., "rotary_emb_base": ..., "max_position_embeddings": 128, "rope_parameters": options}


VARIANTS: dict[str, dict[str, Any]] = {
    f"{'parallel' if wiring else 'sequential'}, {share:g} turns, {'biases' if bias else 'no biases'}": {
        **SMALL,
        "use_parallel_residual": wiring,
        "rotary_pct": share,
        "attention_bias": bias,
    }
    for wiring, share, bias in itertools.product((True, False), (0.25, 0.5, 1.0), (True, False))
}
PARALLEL, SEQUENTIAL = "parallel, 0.25 turns, biases", "sequential, 0.25 turns, biases"
VARIANTS |= {
    "three heads": {**SMALL, "hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 3},
    "tied": {**SMALL, "tie_word_embeddings": True},
    "theta": {**SMALL, "rotary_emb_base": 500},
    "new names": new_names(partial_rotary_factor=0.5),
    "new names, share left out": new_names(),
    "linear": new_names(rope_type="linear", factor=4.0),
    "yarn": new_names(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, partial_rotary_factor=0.5),
    "odd share": {**SMALL, "hidden_size": 40},  # a quarter of 20 is 5 dimensions: three pairs turn
    "everything left out": {**SMALL, **dict.fromkeys(["rotary_pct", "rotary_emb_base", "use_parallel_residual", "hidden_act"], ...)},
    **{act: {**SMALL, "hidden_act": act} for act in ACTIVATIONS},
    "small embeddings": {**SMALL, "embeddings": 0.01},  # a variance near eps, so that a wrong eps shows
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return pair_maker(tmp_path_factory.mktemp("neox"), "gpt_neox", VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(pairs: Pairs, variant: str) -> None:
    pairs(variant).check()


@st.composite
def shapes(draw: st.DrawFn) -> tuple[dict[str, Any], int, int, int]:
    """config.json of any GPT-NeoX, batch, prompt length, length."""
    heads = draw(st.integers(1, 4))
    config: dict[str, Any] = {
        "num_attention_heads": heads,
        "hidden_size": heads * draw(st.sampled_from([n for n in (16, 18, 20, 24, 40) if 28 <= n * heads <= 44] or [32 // heads])),
        "intermediate_size": draw(st.integers(30, 120)),
        "num_hidden_layers": draw(st.integers(2, 3)),
        "vocab_size": draw(st.integers(400, 500)),
        "hidden_act": draw(st.sampled_from(sorted(ACTIVATIONS))),
        "layer_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-3, ...])),
        "rotary_pct": draw(st.sampled_from([0.25, 0.4, 0.5, 1.0, ...])),
        "rotary_emb_base": draw(st.sampled_from([100.0, 10000, 1e6, ...])),
        "use_parallel_residual": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
    }
    prompt = draw(st.integers(1, 50))
    return config, draw(st.integers(1, 3)), prompt, prompt + draw(st.integers(0, 20))


@given(drawn=shapes())
@settings(max_examples=12, derandomize=True, deadline=None)
def test_logits_of_any_shape(tmp_path_factory: pytest.TempPathFactory, drawn: tuple[dict[str, Any], int, int, int]) -> None:
    config, batch, prompt, length = drawn
    folder = write_checkpoint(tmp_path_factory.mktemp("drawn"), "gpt_neox", **config)
    pair = Pair.of(folder, some_ids(config["vocab_size"], batch, length))
    assert pair.expected.std() > 0.5
    assert max(pair.misses(pair.load(), prompt)) < TOLERANCE


KINDS = [{"gelu", "gelu_python"}, {"quick_gelu"}, {"relu"}]
KINDS += [set(ACTIVATIONS).difference(*KINDS)]  # the tanh form has five names


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name: str) -> None:
    """By the names that configs use; in float64, where forms of gelu that differ in the fourth digit stay apart."""
    activations = pytest.importorskip("transformers.activations", reason="compares with `transformers`, of the test extra")
    x = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    same = {other for other in ACTIVATIONS if miss(ACTIVATIONS[other](x), activations.ACT2FN[name](x)) < 1e-8}
    assert same == next(kind for kind in KINDS if name in kind)


# Mutants


def wiring(_: pytest.MonkeyPatch, lm: zoo.LM) -> None:
    for one in lm.model.gpt_neox.layers:
        one.parallel = not one.parallel


def one_norm(self: Any, x: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
    """Both branches read the same normed x, as GPT-J does."""
    y = self.input_layernorm(x)
    return x + attention(y) + self.mlp(y)


def two_norms(self: Any, x: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
    """Both branches read x, each through the other's norm."""
    return x + attention(self.post_attention_layernorm(x)) + self.mlp(self.input_layernorm(x))


def fused(order: Callable[[Tensor], Tensor]) -> Mutant:
    """Another order of the fused matrix's rows; `order` gets (H, 3, D, ...)."""

    def apply(_: pytest.MonkeyPatch, lm: zoo.LM) -> None:
        for one in lm.model.gpt_neox.layers:
            for p in one.attention.query_key_value.parameters():
                rows = p.view(one.attention.heads, 3, -1, *p.shape[1:])
                p.copy_(order(rows).reshape(p.shape).clone())

    return apply


def norms(forward: Callable[[nn.LayerNorm, Tensor], Tensor]) -> Mutant:
    return lambda patch, lm: patch.setattr(nn.LayerNorm, "forward", forward)


def last_turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The last dimensions turn, where the first should."""
    n = 2 * cos.shape[-1]
    return torch.cat((x[..., :-n], turn(x[..., -n:], cos, sin)), -1)


def act(name: str) -> Mutant:
    def apply(patch: pytest.MonkeyPatch, lm: zoo.LM) -> None:
        for one in lm.model.gpt_neox.layers:
            one.mlp.act = ACTIVATIONS[name]

    return apply


MUTANTS: dict[str, tuple[str, Mutant]] = {
    "rotary removed": (PARALLEL, turned(lambda x, cos, sin: x)),
    "rotary on queries only": (PARALLEL, on_queries_only),
    "rotary turns the other way": (PARALLEL, turned(lambda x, cos, sin: turn(x, cos, -sin))),
    "rotary layout": (PARALLEL, turned(interleaved)),
    "a half turns": (PARALLEL, rope(lambda r: replace(r, partial=0.5))),
    "all of it turns": (PARALLEL, rope(lambda r: replace(r, partial=1.0))),
    "a quarter turns": ("parallel, 0.5 turns, biases", rope(lambda r: replace(r, partial=0.25))),
    "a share under its new name ignored": ("new names", rope(lambda r: replace(r, partial=0.25))),
    "a share left out is all": ("new names, share left out", rope(lambda r: replace(r, partial=1.0))),
    "an odd share rounded down": ("odd share", rope(lambda r: replace(r, partial=0.2))),
    "the last dimensions turn": (PARALLEL, turned(last_turn)),
    "theta ignored": ("theta", rope(lambda r: replace(r, theta=10000.0))),
    "theta x 100": (PARALLEL, rope(lambda r: replace(r, theta=100 * r.theta))),
    "linear scaling ignored": ("linear", rope(lambda r: replace(r, scaling=None))),
    "yarn ignored": ("yarn", rope(lambda r: replace(r, scaling=None))),
    "parallel as sequential": (PARALLEL, wiring),
    "sequential as parallel": (SEQUENTIAL, wiring),
    "sequential as parallel, written out": (SEQUENTIAL, layer(parallel)),
    "parallel as sequential, written out": (PARALLEL, layer(sequential)),
    "one norm for both": (PARALLEL, layer(one_norm)),
    "norms swapped": (PARALLEL, layer(two_norms)),
    "norms swapped in sequence": (SEQUENTIAL, layer(swapped_norms)),
    "residual of the norm": (SEQUENTIAL, layer(normed)),
    "last norm skipped": (PARALLEL, lambda patch, lm: patch.setattr(lm.model.gpt_neox.final_layer_norm, "forward", lambda x: x)),
    "fused matrix in blocks q, k, v": (PARALLEL, fused(lambda w: w.view(3, -1, *w.shape[2:]).transpose(0, 1))),
    "keys and values swapped": (PARALLEL, fused(lambda w: w[:, [0, 2, 1]])),
    "queries and keys swapped": (PARALLEL, fused(lambda w: w[:, [1, 0, 2]])),
    "norms without bias": (PARALLEL, norms(lambda self, x: F.layer_norm(x, x.shape[-1:], self.weight, None, self.eps))),
    "norms without weight": (PARALLEL, norms(lambda self, x: F.layer_norm(x, x.shape[-1:], None, self.bias, self.eps))),
    "norms without mean": (PARALLEL, norms(lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.eps) + self.bias)),
    "eps 1e-5 -> 1e-6": ("small embeddings", eps(1e-6)),
    "attention unscaled": (PARALLEL, attends(lambda cache, q, k, v, pos: cache.attend(q * q.shape[-1] ** 0.5, k, v, pos))),
    "scaled by what turns": (PARALLEL, attends(lambda cache, q, k, v, pos: cache.attend(2 * q, k, v, pos))),
    "tied head ignored": ("tied", other_head),
    **{
        f"bias of {name} dropped": (PARALLEL, no_bias(name))
        for name in ("query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h")
    },
    "relu": (PARALLEL, act("relu")),
    "quick gelu": (PARALLEL, act("quick_gelu")),
    "gelu for relu": ("relu", act("gelu")),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(pairs: Pairs, mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variant, apply = MUTANTS[mutant]
    pairs(variant).check_mutant(apply, monkeypatch)


@pytest.mark.parametrize(("variant", "other"), [("gelu", "gelu_new"), ("gelu_new", "gelu"), ("gelu_fast", "gelu_python")])
def test_forms_of_gelu_are_told_apart(pairs: Pairs, variant: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They differ by at most 5e-4, so the same factor of 100 needs a finer comparison: rounding is below 1e-5 in this model."""
    pairs(variant).check_mutant(act(other), monkeypatch, tolerance=1e-5)


# Checkpoints as they are found


def copied(pair: Pair, folder: Path) -> Path:
    return Path(shutil.copytree(pair.folder, folder, dirs_exist_ok=True))


@pytest.mark.parametrize("variant", [PARALLEL, SEQUENTIAL, "sequential, 1 turns, no biases", "tied", "linear", "odd share"])
def test_reads_what_transformers_writes(pairs: Pairs, variant: str, tmp_path: Path) -> None:
    """`save_pretrained` spells the config its own way: everything rotary in rope_parameters."""
    folder = copied(pairs(variant), tmp_path)
    for file in ("config.json", "model.safetensors"):
        (folder / file).unlink()
    theirs(pairs(variant).folder).save_pretrained(folder)
    assert "partial_rotary_factor" in json.loads((folder / "config.json").read_text())["rope_parameters"]
    replace(pairs(variant), folder=folder).check()


def test_old_and_new_names_mean_the_same() -> None:
    raw = {key: value for key, value in {**NEOX, "vocab_size": 9}.items() if not key.startswith("rotary")}
    old = GPTNeoXConfig.from_dict({**raw, "rotary_pct": 0.5, "rotary_emb_base": 500})
    new = GPTNeoXConfig.from_dict({**raw, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}})
    assert old == new
    assert (old.rope.partial, old.rope.theta) == (0.5, 500.0)


BUFFERS = {
    "attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
    "attention.masked_bias": torch.tensor(-1e9),
    "attention.rotary_emb.inv_freq": torch.ones(2),
}


def with_tensors(folder: Path, extra: dict[str, Tensor]) -> Path:
    held = load_file(folder / "model.safetensors")
    save_file({**held, **extra}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_buffers_of_old_checkpoints_are_ignored(pairs: Pairs, tmp_path: Path) -> None:
    """Whatever they say: the config says it too."""
    extra = {f"gpt_neox.layers.{i}.{name}": t.clone() for i in range(2) for name, t in BUFFERS.items()}
    replace(pairs(PARALLEL), folder=with_tensors(copied(pairs(PARALLEL), tmp_path), extra)).check()


@pytest.mark.parametrize(
    "name",
    [
        "gpt_neox.layers.0.attention.query_key_value.scale",
        "gpt_neox.layers.0.attention.rotary_emb.cos",
        "gpt_neox.layers.0.attention.bias2",
        "gpt_neox.layers.x.attention.bias",
        "gpt_neox.layers.0.mlp.bias",
        "layers.0.attention.bias",
        "embed_out.bias",
        "gpt_neox.layers.2.input_layernorm.weight",
    ],
)
def test_any_other_extra_tensor_is_refused(pairs: Pairs, tmp_path: Path, name: str) -> None:
    folder = with_tensors(copied(pairs(PARALLEL), tmp_path), {name: torch.ones(3)})
    with pytest.raises(ZooError, match=re.escape(name)):
        zoo.load(str(folder))


def test_biases_must_be_as_the_config_says(pairs: Pairs, tmp_path: Path) -> None:
    """A checkpoint with attention biases under a config without them, and the other way round."""
    for variant, says in ((PARALLEL, False), ("parallel, 0.25 turns, no biases", True)):
        folder = copied(pairs(variant), tmp_path)
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**raw, "attention_bias": says}))
        with pytest.raises(ZooError, match=r"attention\.dense\.bias"):
            zoo.load(str(folder))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "swish"}, "swish"),
        ({"num_key_value_heads": 2}, "key/value head"),
        ({"head_dim": 32}, "key/value head"),
        ({"hidden_size": 66}, "66"),
        ({"rotary_pct": 1.5}, "1.5"),
        ({"rotary_pct": 0.5, "partial_rotary_factor": 0.25}, "partial_rotary_factor"),
        ({"rotary_emb_base": 500, "rope_theta": 10000.0}, "rope_theta"),
        ({"sliding_window": 16}, "sliding_window"),
        ({"mlp_bias": False}, "mlp_bias"),
        ({"use_parallel_residual": "yes"}, "use_parallel_residual"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
    ],
)
def test_refuses_what_it_does_not_compute(changes: dict[str, Any], named: str) -> None:
    right = {**NEOX, "vocab_size": 400}
    GPTNeoXConfig.from_dict(right)
    with pytest.raises(ZooError, match=named):
        GPTNeoXConfig.from_dict({**right, **changes})
