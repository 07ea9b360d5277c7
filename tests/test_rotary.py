"""Rotary positions: every scaling against `transformers` in several Llamas, both spellings, the way back, and what `dynamic` does."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, LLAMA, MISTRAL, NEOX, write_llama
from parity import CAUGHT, LENGTH, PROMPT, SMALL, TOLERANCE, Mutant, Pair, cached, miss, rope, scaled, some_ids, theirs
from torch import Tensor

import zoo
from zoo import models
from zoo.errors import ZooError
from zoo.models.config import Keys
from zoo.models.config import rope as read
from zoo.models.layers import DynamicScaling, LinearScaling, Rope, Rotary

TRAINED = 32  # tokens of the context that a checkpoint was first trained on; the tests' prompts are longer
LLAMAS: dict[str, dict[str, Any]] = {
    "grouped": SMALL,
    "tied": {**SMALL, "tie_word_embeddings": True},
    "biases": {**SMALL, "attention_bias": True, "mlp_bias": True},
    "head_dim": {**SMALL, "head_dim": 20},
    "a kv head a query head": {**SMALL, "num_key_value_heads": 4},
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    },
    "yarn": YARN,
    "yarn, the ramp not at whole dimensions": {**YARN, "truncate": False},
    "yarn, attention factor": {**YARN, "attention_factor": 0.7},
    "yarn, mscale": {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5},
    "yarn, half an mscale": {**YARN, "mscale": 2.0},  # without the other it does not count
    "yarn, betas": {**YARN, "beta_fast": 3.0, "beta_slow": 0.5, "truncate": False},
    "yarn, a ramp without a width": {**YARN, "beta_slow": 6.0},
    "yarn, original length left out": {"rope_type": "yarn", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}


def context(scaling: dict[str, Any]) -> int:
    """max_position_embeddings: the trained length where a scaling is told so by that key."""
    told = scaling.get("original_max_position_embeddings")
    return TRAINED if told is None else 4 * told


def spelled(scaling: dict[str, Any], spelling: str, theta: float = 500.0) -> dict[str, Any]:
    """The keys of config.json that say the same in one of three ways."""
    about: dict[str, Any] = {"max_position_embeddings": context(scaling)}
    if spelling == "rope_parameters":
        return {**about, "rope_theta": ..., "rope_parameters": {**scaling, "rope_theta": theta}}
    if spelling == "type":
        scaling = {("type" if key == "rope_type" else key): value for key, value in scaling.items()}
    return {**about, "rope_theta": theta, "rope_scaling": scaling}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each Llama, its rotary options still to be written."""
    return {name: write_llama(tmp_path_factory.mktemp("rotary"), **changes) for name, changes in LLAMAS.items()}


def pair(checkpoints: dict[str, Path], folder: Path, llama: str, scaling: str, spelling: str = "rope_parameters") -> Pair:
    """A copy of that Llama with that scaling."""
    shutil.copytree(checkpoints[llama], folder, dirs_exist_ok=True)
    raw = {**json.loads((folder / "config.json").read_text()), **spelled(SCALINGS[scaling], spelling)}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))
    return Pair.of(folder)


def check(some: Pair, scaling: str) -> None:
    """Parity in one pass and through the cache. With `dynamic` the two differ by definition, so there the whole text is the prompt."""
    if scaling == "dynamic":
        lm = some.load()
        assert some.expected.std() > 0.5
        assert miss(lm.logits(some.ids), some.expected) < TOLERANCE
        assert miss(lm.prefill(some.ids, lm.new_cache(2)), some.expected[:, -1]) < TOLERANCE
    else:
        some.check()


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("llama", LLAMAS)
def test_logits_are_those_of_transformers(checkpoints: dict[str, Path], tmp_path: Path, llama: str, scaling: str) -> None:
    check(pair(checkpoints, tmp_path, llama, scaling), scaling)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_spellings_mean_the_same(scaling: str) -> None:
    """`rope_parameters`, and `rope_theta` with a `rope_scaling` whose type is called `type` or `rope_type`."""
    said = [
        models.FAMILIES[family].Config.from_dict({**raw, **{k: v for k, v in keys.items() if v is not ...}}).rope
        for family in ("llama", "mistral")
        for raw in [{k: v for k, v in FAMILIES[family][0].items() if k != "rope_theta"} | {"vocab_size": 9}]
        for keys in [spelled(SCALINGS[scaling], spelling) for spelling in ("rope_parameters", "type", "rope_type")]
    ]
    assert said == [said[0]] * 6
    assert said[0].theta == 500.0
    assert (said[0].scaling is None) == (scaling == "default")


@pytest.mark.parametrize("scaling", ["linear", "yarn", "dynamic"])
def test_the_older_spelling_against_transformers(checkpoints: dict[str, Path], tmp_path: Path, scaling: str) -> None:
    check(pair(checkpoints, tmp_path, "grouped", scaling, "type"), scaling)


# Mutants

FLAT = rope(lambda r: Rope(r.theta))  # no scaling at all
MUTANTS: dict[str, tuple[str, Mutant]] = {
    "linear ignored": ("linear", FLAT),
    "linear by another factor": ("linear", scaled(factor=2.0)),
    "llama3 ignored": ("llama3", FLAT),
    "llama3 with the current length": ("llama3", scaled(original_max_position_embeddings=4 * TRAINED)),
    "yarn ignored": ("yarn", FLAT),
    "yarn without its ramp": ("yarn", rope(lambda r: replace(r, scaling=LinearScaling(4.0)))),
    "yarn without its attention factor": ("yarn", scaled(attention_factor=1.0)),
    "yarn with the current length": ("yarn", scaled(original_max_position_embeddings=4 * TRAINED)),
    "attention factor not as given": ("yarn, attention factor", scaled(attention_factor=1.1386)),
    "mscale ignored": ("yarn, mscale", scaled(attention_factor=1.1386)),
    "half an mscale counts": ("yarn, half an mscale", scaled(attention_factor=1.2773)),
    "ramp at whole dimensions": ("yarn, the ramp not at whole dimensions", scaled(truncate=True)),
    "ramp not at whole dimensions": ("yarn", scaled(truncate=False)),
    "beta_fast ignored": ("yarn, betas", scaled(beta_fast=32.0)),
    "beta_slow ignored": ("yarn, betas", scaled(beta_slow=1.0)),
    "another original length than the context": ("yarn, original length left out", scaled(original_max_position_embeddings=4 * TRAINED)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(checkpoints: dict[str, Path], tmp_path: Path, mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scaling, apply = MUTANTS[mutant]
    pair(checkpoints, tmp_path, "grouped", scaling).check_mutant(apply, monkeypatch)


# Dynamic: the angles of a call depend on its length


def stepwise(folder: Path, ids: Tensor, prompt: int) -> Tensor:
    """What transformers computes with a cache: logits after the prompt and after each further token."""
    model = theirs(folder)
    with torch.no_grad():
        out = model(ids[:, :prompt], use_cache=True)
        logits = [out.logits[:, -1]]
        for t in range(prompt, ids.shape[1]):
            out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


def off_by_one(self: DynamicScaling, pos: Tensor, theta: float, dim: int) -> Tensor:
    return RIGHT(self, pos - 1, theta, dim)


def frozen(self: DynamicScaling, pos: Tensor, theta: float, dim: int) -> Tensor:
    """The prompt's angles for every token after it."""
    return RIGHT(self, pos.clamp(max=PROMPT - 1), theta, dim)


RIGHT = DynamicScaling.frequencies


@pytest.mark.parametrize("prompt", [20, TRAINED, PROMPT])
def test_dynamic_decodes_as_transformers_does(
    checkpoints: dict[str, Path], tmp_path: Path, prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step turns its query and its key by the length at that step; keys keep the angles that they came with. So it is a function of
    how the tokens came, and one pass over all of them is another."""
    some = pair(checkpoints, tmp_path, "grouped", "dynamic")
    lm, expected = some.load(), stepwise(tmp_path, some.ids, prompt)
    assert miss(cached(lm, some.ids, prompt), expected) < TOLERANCE
    assert miss(cached(lm, some.ids, prompt), some.expected[:, prompt - 1 :]) > CAUGHT
    if prompt < TRAINED:  # up to there it is the plain rotary embedding, however the tokens come
        short = some.ids[:, :TRAINED]
        assert miss(cached(lm, short, prompt), lm.logits(short)[:, prompt - 1 :]) < TOLERANCE
    FLAT(monkeypatch, lm)
    assert miss(cached(lm, some.ids, prompt), expected) > CAUGHT
    for other in (off_by_one, frozen):
        monkeypatch.setattr(DynamicScaling, "frequencies", other)
        assert miss(cached(some.load(), some.ids, prompt), expected) > CAUGHT


def test_dynamic_prompts_come_in_one_call(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a chunk of prefill, and in a batch with shorter ones: each sequence has the angles of its own length."""
    pair(checkpoints, tmp_path, "grouped", "dynamic")
    ids, lengths = some_ids(300, 3, 90), [90, 20, 50]
    lm = zoo.load(str(tmp_path), compile="off")
    monkeypatch.setattr(zoo.lm, "CHUNK", 16)
    together = lm.prefill(ids, lm.new_cache(3), lengths)
    for b, n in enumerate(lengths):
        with torch.no_grad():
            assert miss(together[b], theirs(tmp_path)(ids[b : b + 1, :n]).logits[0, -1]) < TOLERANCE
    monkeypatch.setattr(Rotary, "whole_prompts", False)  # in chunks it is something else
    assert miss(lm.prefill(ids, lm.new_cache(3), lengths)[0], together[0]) > CAUGHT


# The way back


def turns(scaling: str, head_dim: int = 16, **changes: Any) -> Rotary:
    return Rotary(head_dim, replace(read(Keys(spelled_flat(scaling)), head_dim, context(SCALINGS[scaling])), **changes))


def spelled_flat(scaling: str) -> dict[str, Any]:
    return {key: value for key, value in spelled(SCALINGS[scaling], "rope_parameters").items() if value is not ...}


@pytest.mark.parametrize("partial", [1.0, 0.5, 0.3])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_unrotate_is_the_inverse(scaling: str, partial: float) -> None:
    rotary = turns(scaling, 20, partial=partial)
    x = torch.randn(2, 3, 50, 20, generator=torch.Generator().manual_seed(0))
    pos = torch.stack((torch.arange(50), torch.arange(1000, 1050)))
    there = rotary.rotate(x, pos)
    assert miss(rotary.unrotate(there, pos), x) < 1e-5
    assert miss(there, x) > 1
    dims = 2 * len(rotary.inv_freq)
    assert dims == {1.0: 20, 0.5: 10, 0.3: 6}[partial]
    assert torch.equal(there[..., dims:], x[..., dims:])
    scaling_factor = 1.0 if rotary.rope.scaling is None else rotary.rope.scaling.attention_factor
    assert miss(there[..., :dims].norm(dim=-1), scaling_factor * x[..., :dims].norm(dim=-1)) < 1e-4


def test_attention_factors() -> None:
    """0.1 m ln(4) + 1, as given, or the quotient of two."""
    factors = [turns(name).rope.scaling.attention_factor for name in SCALINGS if "yarn" in name]  # type: ignore[union-attr]
    assert [round(f, 3) for f in factors] == [1.139, 1.139, 0.7, 1.194, 1.139, 1.139, 1.139, 1.139]


def test_which_keys_unrotate_sees_under_dynamic() -> None:
    """Keys as though all had come in one call that ended at the last of their positions: exact for one call's keys and for several calls
    within the trained length; not for a call's first keys without its last, nor for several longer calls."""
    rotary, x = turns("dynamic"), torch.randn(2, 1, 60, 16, generator=torch.Generator().manual_seed(0))
    pos = torch.stack((torch.arange(60), torch.arange(60).clamp(max=30)))  # the second sequence never gets long
    one_call = rotary.rotate(x, pos)
    back = rotary.unrotate(one_call, pos)
    assert miss(back, x) < 1e-5
    assert miss(rotary.unrotate(one_call[:, :, 20:], pos[:, 20:]), x[:, :, 20:]) < 1e-5  # its last keys
    first = rotary.unrotate(one_call[:, :, :20], pos[:, :20])
    assert miss(first[0], x[0, :, :20]) > 0.1
    assert miss(first[1], x[1, :, :20]) < 1e-5
    calls = torch.cat([rotary.rotate(x[:, :, i : i + 10], pos[:, i : i + 10]) for i in range(0, 60, 10)], 2)
    assert miss(rotary.unrotate(calls[:, :, :30], pos[:, :30]), x[:, :, :30]) < 1e-5
    together = rotary.unrotate(calls, pos)
    assert miss(together[0], x[0]) > 0.1
    assert miss(together[1], x[1]) < 1e-5


def test_tables_are_float32_and_follow_the_model() -> None:
    for scaling in SCALINGS:
        rotary = turns(scaling).to(torch.bfloat16)
        assert {t.dtype for t in rotary.tables(torch.arange(5)[None])} == {torch.float32}
        assert torch.equal(rotary.inv_freq, turns(scaling).inv_freq)


# Configs


@pytest.mark.parametrize("family", [LLAMA, MISTRAL, NEOX])
@pytest.mark.parametrize("kind", ["longrope", "su", "foo", "ntk"])
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_other_scalings_are_refused_by_name(family: dict[str, Any], kind: str, key: str) -> None:
    config = models.FAMILIES[family["model_type"]].Config
    for where in ("rope_scaling", "rope_parameters"):
        with pytest.raises(ZooError, match=f"'{kind}' is not implemented; known: default, linear, dynamic, llama3, yarn"):
            config.from_dict({**family, "vocab_size": 9, where: {key: kind, "factor": 2.0}})


@pytest.mark.parametrize(
    ("scaling", "named"),
    [
        ({"rope_type": "linear"}, "lacks 'factor'"),
        ({"rope_type": "linear", "factor": -2.0}, "factor"),
        ({"rope_type": "linear", "factor": 2.0, "low_freq_factor": 1.0}, "low_freq_factor"),
        ({"rope_type": "dynamic"}, "lacks 'factor'"),
        ({"rope_type": "dynamic", "factor": 2.0, "alpha": 1000.0}, "alpha"),
        ({**SCALINGS["llama3"], "high_freq_factor": 1.0}, "high_freq_factor > low_freq_factor"),
        ({**SCALINGS["llama3"], "beta_fast": 32.0}, "beta_fast"),
        ({"rope_type": "yarn"}, "lacks 'factor'"),
        ({**YARN, "truncate": "no"}, "truncate"),
        ({**YARN, "short_factor": [1.0]}, "short_factor"),
        ({"rope_type": 3}, "rope_type"),
        ({"rope_type": "default", "rope_theta": 1.0}, "theta"),
    ],
)
def test_refuses_what_it_does_not_compute(scaling: dict[str, Any], named: str) -> None:
    for where in ("rope_scaling", "rope_parameters"):
        with pytest.raises(ZooError, match=named):
            models.FAMILIES["llama"].Config.from_dict({**LLAMA, "vocab_size": 9, where: scaling})


def test_longer_than_the_prompts() -> None:
    """The tests above look past the trained length."""
    assert TRAINED < PROMPT < LENGTH


def test_dynamic_needs_more_than_two_dimensions() -> None:
    """Its exponent is dim / (dim - 2)."""
    raw = {**NEOX, "vocab_size": 400, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "hidden_size": 32, "num_attention_heads": 4}
    assert models.GPTNeoX.Config.from_dict({**raw, "rotary_pct": 0.5}).rope.partial == 0.5
    with pytest.raises(ZooError, match="more than 2"):
        models.GPTNeoX.Config.from_dict({**raw, "rotary_pct": 0.25})
