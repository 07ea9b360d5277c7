"""Mistral against `transformers`, and its window: in one pass, in chunks, past the ring's wrap, in every attention method, and in bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import MISTRAL, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import (
    CAUGHT,
    LENGTH,
    PROMPT,
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
    window,
)
from torch import Tensor

import zoo
from zoo.attention import parse
from zoo.attention.cache import Caches
from zoo.errors import ZooError
from zoo.models.mistral import MistralConfig

VARIANTS: dict[str, dict[str, Any]] = {
    "window < prompt": SMALL,
    "window of one": {**SMALL, "sliding_window": 1},
    "window = prompt": {**SMALL, "sliding_window": PROMPT},
    "window = prompt + 1": {**SMALL, "sliding_window": PROMPT + 1},
    "window = length": {**SMALL, "sliding_window": LENGTH},
    "window > length": {**SMALL, "sliding_window": LENGTH + 1},
    "no window": {**SMALL, "sliding_window": None},
    "window left out": {**SMALL, "sliding_window": ...},
    "head_dim": {**SMALL, "head_dim": 32},
    "head_dim left out": {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "num_hidden_layers": 2},
    "theta": {**SMALL, "rope_theta": 1e6},
    "theta in rope_parameters": {**SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": ...},
    "four query heads a kv head": {**SMALL, "num_key_value_heads": 1},
    "three query heads a kv head": {**SMALL, "hidden_size": 36, "num_attention_heads": 6},
    "one query head a kv head": {**SMALL, "num_key_value_heads": 4},
    "eight kv heads unsaid": {**SMALL, "num_attention_heads": 16, "num_key_value_heads": ...},
    "tied": {**SMALL, "tie_word_embeddings": True},
    "three layers": {**SMALL, "num_hidden_layers": 3},
    "small embeddings": {**SMALL, "embeddings": 0.01},
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return pair_maker(tmp_path_factory.mktemp("mistral"), "mistral", VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(pairs: Pairs, variant: str) -> None:
    pairs(variant).check()


def test_a_window_is_set_left_out_or_none(pairs: Pairs) -> None:
    """Left out it is v0.1's, an explicit null is none."""
    windows = {name: pairs(name).load().config.sliding_window for name in ("window < prompt", "no window", "window left out")}
    assert windows == {"window < prompt": 16, "no window": None, "window left out": 4096}
    assert miss(pairs("no window").expected, pairs("window left out").expected) == 0
    assert miss(pairs("no window").expected, pairs("window < prompt").expected) > CAUGHT


@st.composite
def shapes(draw: st.DrawFn) -> tuple[dict[str, Any], int, int, int]:
    """config.json of any Mistral, batch, prompt length, length."""
    G, R = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    config: dict[str, Any] = {
        "num_attention_heads": G * R,
        "num_key_value_heads": G,
        "head_dim": draw(st.sampled_from([16, 18, 24, 40, 64])),
        "hidden_size": round(draw(st.integers(28, 40)) / (G * R)) * G * R,
        "intermediate_size": draw(st.integers(30, 120)),
        "num_hidden_layers": draw(st.integers(2, 3)),
        "vocab_size": draw(st.integers(400, 500)),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-3, ...])),
        "rope_theta": draw(st.sampled_from([100.0, 10000, 1e6, ...])),
        "sliding_window": draw(st.sampled_from([1, 2, 7, 16, 33, 64, 65, None, ...])),
        "tie_word_embeddings": draw(st.booleans()),
    }
    prompt = draw(st.integers(1, 50))
    return config, draw(st.integers(1, 3)), prompt, prompt + draw(st.integers(0, 20))


@given(drawn=shapes())
@settings(max_examples=12, derandomize=True, deadline=None)
def test_logits_of_any_shape(tmp_path_factory: pytest.TempPathFactory, drawn: tuple[dict[str, Any], int, int, int]) -> None:
    config, batch, prompt, length = drawn
    folder = write_checkpoint(tmp_path_factory.mktemp("drawn"), "mistral", **config)
    pair = Pair.of(folder, some_ids(config["vocab_size"], batch, length))
    assert pair.expected.std() > 0.5
    assert max(pair.misses(pair.load(), prompt)) < TOLERANCE


@pytest.mark.parametrize("variant", ["window < prompt", "no window", "head_dim", "tied"])
def test_reads_what_transformers_writes(pairs: Pairs, variant: str, tmp_path: Path) -> None:
    """`save_pretrained` spells the config its own way; no window is null there too."""
    theirs(pairs(variant).folder).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in said
    assert said["sliding_window"] == (None if variant == "no window" else 16)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(pairs(variant).folder / file, tmp_path)
    replace(pairs(variant), folder=tmp_path).check()


FIRST = "window < prompt"
MUTANTS: dict[str, tuple[str, Mutant]] = {
    "window + 1": (FIRST, window(1)),
    "window - 1": (FIRST, window(-1)),
    "window of one + 1": ("window of one", window(1)),
    "window = prompt - 1": ("window = prompt", window(-1)),
    "window = prompt + 1": ("window = prompt", window(1)),
    "window = length - 1": ("window = length", window(-1)),
    "window none": (FIRST, window(10**6)),
    "rotary removed": (FIRST, turned(lambda x, cos, sin: x)),
    "rotary on queries only": (FIRST, on_queries_only),
    "rotary layout": (FIRST, turned(interleaved)),
    "theta ignored": ("theta", rope(lambda r: replace(r, theta=10000.0))),
    "theta of rope_parameters ignored": ("theta in rope_parameters", rope(lambda r: replace(r, theta=10000.0))),
    "heads tiled": (FIRST, attends(tiled)),
    "heads tiled, groups of three": ("three query heads a kv head", attends(tiled)),
    "attention unscaled": (FIRST, attends(lambda cache, q, k, v, pos: cache.attend(q * q.shape[-1] ** 0.5, k, v, pos))),
    "attention scaled by hidden size / heads": ("head_dim", attends(lambda cache, q, k, v, pos: cache.attend(2 * q, k, v, pos))),
    "mlp beside attention": (FIRST, layer(parallel)),
    "residual of the norm": (FIRST, layer(normed)),
    "norms swapped": (FIRST, layer(swapped_norms)),
    "last norm skipped": (FIRST, lambda patch, lm: patch.setattr(lm.model.model.norm, "forward", lambda x: x)),
    "eps 1e-5 -> 1e-6": ("small embeddings", eps(1e-6)),
    "gelu": (FIRST, mlp(lambda self, x: self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x)))),
    "gate and up swapped": (FIRST, mlp(lambda self, x: self.down_proj(F.silu(self.up_proj(x)) * self.gate_proj(x)))),
    "tied head ignored": ("tied", other_head),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(pairs: Pairs, mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variant, apply = MUTANTS[mutant]
    pairs(variant).check_mutant(apply, monkeypatch)


def test_head_dim_is_an_option_of_its_own(pairs: Pairs, tmp_path: Path) -> None:
    """Without it the weights no longer fit: hidden size / heads is another number."""
    shutil.copytree(pairs("head_dim").folder, tmp_path, dirs_exist_ok=True)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k != "head_dim"}))
    with pytest.raises(ZooError, match="q_proj"):
        zoo.load(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"sliding_window": "16"}, "sliding_window"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"attention_bias": True}, "attention_bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_local_experts": 8}, "num_local_experts"),
    ],
)
def test_refuses_what_it_does_not_compute(changes: dict[str, Any], named: str) -> None:
    right = {**MISTRAL, "vocab_size": 400}
    MistralConfig.from_dict(right)
    with pytest.raises(ZooError, match=named):
        MistralConfig.from_dict({**right, **changes})


# The window, prompts of three of them


CHUNKS: dict[str, Callable[[int], int]] = {  # tokens a call
    "1": lambda W: 1,
    "7": lambda W: 7,
    "W - 1": lambda W: W - 1,
    "W": lambda W: W,
    "W + 1": lambda W: W + 1,
    "all": lambda W: 3 * W + 5,
}
PROMPTS: dict[str, Callable[[int], int]] = {name: CHUNKS[name] for name in ("W - 1", "W", "W + 1", "all")}


class Windowed:
    """A Mistral with a window of W tokens, a text of three windows and five tokens, and its logits in one pass without a cache."""

    def __init__(self, folder: Path, W: int) -> None:
        self.W, self.T, self.folder = W, 3 * W + 5, write_checkpoint(folder, "mistral", **SMALL, sliding_window=W)
        self.lm = zoo.load(str(self.folder), compile="off")
        self.ids = some_ids(self.lm.config.vocab_size, 1, 6 * W)
        self.once = self.lm.logits(self.ids)

    def new(self, attn: str = "full", batch: int = 1) -> Caches:
        self.lm.attn = parse(attn)
        return self.lm.new_cache(batch)


@pytest.fixture(scope="module", params=[16, 64])
def windowed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Windowed:
    return Windowed(tmp_path_factory.mktemp("windowed"), request.param)


def test_one_pass_is_that_of_transformers(windowed: Windowed) -> None:
    with torch.no_grad():
        assert miss(windowed.once, theirs(windowed.folder)(windowed.ids).logits) < TOLERANCE


@torch.no_grad()
def chunked(w: Windowed, cache: Caches, chunk: int) -> Tensor:
    return torch.cat([w.lm.model(piece, cache) for piece in w.ids[:, : w.T].split(chunk, 1)], 1)


@pytest.mark.parametrize("attn", ["full", "sliding:window=100000", "subgen:budget=100000"])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunks_give_what_one_pass_gives(windowed: Windowed, attn: str, chunk: str) -> None:
    size = CHUNKS[chunk](windowed.W)
    assert miss(chunked(windowed, windowed.new(attn), size), windowed.once[:, : windowed.T]) < TOLERANCE


@pytest.mark.parametrize("attn", ["full", "subgen:budget=100000"])
@pytest.mark.parametrize("chunk", ["1", "7", "all"])
@pytest.mark.parametrize("change", [-1, 1])
def test_another_window_is_caught(windowed: Windowed, attn: str, chunk: str, change: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above see a window one token too narrow or too wide."""
    lm, config = windowed.lm, windowed.lm.config
    monkeypatch.setattr(lm, "config", replace(config, sliding_window=windowed.W + change))
    cache = windowed.new(attn)
    size = CHUNKS[chunk](windowed.W)
    assert miss(chunked(windowed, cache, size), windowed.once[:, : windowed.T]) > CAUGHT


@pytest.mark.parametrize("attn", ["full", "sliding:window=100000", "subgen:budget=100000"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_decodes_far_past_the_window(windowed: Windowed, attn: str, prompt: str) -> None:
    """More than two windows of single tokens, the ring wrapping twice; `once` is what transformers computes."""
    w = windowed
    n = PROMPTS[prompt](w.W)
    ids = w.ids[:, : n + 2 * w.W + 3]
    w.lm.attn = parse(attn)
    assert miss(cached(w.lm, ids, n), w.once[:, n - 1 : ids.shape[1]]) < TOLERANCE


@pytest.mark.parametrize("attn", ["full", "subgen:budget=100000"])
def test_a_batch_of_two_lengths_is_two_batches_of_one(windowed: Windowed, attn: str) -> None:
    w = windowed
    lengths = [w.T, w.W - 3]
    ids = some_ids(w.lm.config.vocab_size, 2, w.T + w.W + 5, seed=1)
    cache = w.new(attn, 2)
    together = [w.lm.prefill(ids[:, : w.T], cache, lengths)]
    steps = w.W + 5
    together += [w.lm.decode_step(torch.stack([ids[b, n + t] for b, n in enumerate(lengths)]), cache) for t in range(steps)]
    for b, n in enumerate(lengths):
        expected = w.lm.logits(ids[b : b + 1, : n + steps])[0, n - 1 :]
        assert miss(torch.stack([out[b] for out in together]), expected) < TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("attn", "chunk"), [("full", 1), ("full", 7), ("full", 1000), ("sliding:window=100000", 7)])
def test_a_cache_holds_one_window(windowed: Windowed, dtype: str, attn: str, chunk: int) -> None:
    """Per layer W rows and two more (row 0 for padding, one at the end), each of keys and values of both heads and a position; after any
    call, whatever the length of the prompt, with and without knowing what comes."""
    W, lm = windowed.W, zoo.load(str(windowed.folder), attn, dtype, compile="off")
    row = 2 * 2 * 16 * {"float32": 4, "bfloat16": 2}[dtype] + 4
    bound = 2 * (W + 2) * row + 8  # two layers, and the count of tokens
    for hint in (None, 20 * W):
        cache = lm.new_cache(max_tokens=hint)
        cache.begin_prompt([5 * W])
        most = 0
        for piece in some_ids(lm.config.vocab_size, 1, 5 * W).split(chunk, 1):
            with torch.no_grad():
                lm.model(piece, cache)
            most = max(most, cache.nbytes().allocated)
        cache.end_prompt()
        for t in range(W + 3):
            lm.decode_step([t], cache)
            most = max(most, cache.nbytes().allocated)
        assert most == bound
        assert cache.nbytes().used == 2 * W * row + 8


def test_a_narrower_sliding_window_wins(windowed: Windowed) -> None:
    """The narrower of the model's window and the method's."""
    W, lm = windowed.W, windowed.lm
    narrow = chunked(windowed, windowed.new(f"sliding:window={W - 5}"), 7)
    assert miss(narrow, windowed.once[:, : windowed.T]) > CAUGHT
    other = zoo.load(str(windowed.folder), compile="off")
    other.config = other.model.config = replace(lm.config, sliding_window=W - 5)
    assert miss(narrow, other.logits(windowed.ids[:, : windowed.T])) < TOLERANCE


@pytest.mark.parametrize("attn", ["none", "full", "sliding:window=100000", "subgen:budget=100000"])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_nothing_older_than_the_window_counts(windowed: Windowed, attn: str, chunk: int) -> None:
    """Two layers see W - 1 tokens back each: what lies 2W - 1 or more behind a query cannot change its logits, and what lies 2W - 2
    behind does."""
    w = windowed
    reach, ids = 2 * (w.W - 1), w.ids[:, : w.T]
    at = w.T - 1

    def last(ids: Tensor) -> Tensor:
        if attn == "none":
            return w.lm.logits(ids)[:, -1]
        cache = w.new(attn)
        with torch.no_grad():
            return torch.cat([w.lm.model(piece, cache) for piece in ids.split(chunk, 1)], 1)[:, -1]

    before = last(ids)
    old, oldest = ids.clone(), ids.clone()
    old[:, : at - reach] = (old[:, : at - reach] + 7) % 300
    oldest[:, at - reach] = (oldest[:, at - reach] + 7) % 300
    assert miss(last(old), before) < 1e-6
    assert miss(last(oldest), before) > 1e-5


def test_subgen_is_exact_while_its_recent_tokens_cover_the_window(windowed: Windowed) -> None:
    """A budget of 256 slots keeps 64 tokens exact, and clusters of what is older have left the window, however long the text."""
    w = windowed
    ids = some_ids(w.lm.config.vocab_size, 1, 700)
    cache = w.new("subgen:budget=256")
    w.lm.prefill(ids[:, :500], cache)
    with torch.no_grad():
        out = torch.cat([w.lm.model(piece, cache) for piece in ids[:, 500:].split(50, 1)], 1)
    assert miss(out, w.lm.logits(ids)[:, 500:]) < TOLERANCE


def test_subgen_is_an_approximation_within_a_wider_window(tmp_path: Path) -> None:
    """There more tokens are in the window, but not recent, than there are clusters."""
    lm = zoo.load(str(write_checkpoint(tmp_path, "mistral", **SMALL, sliding_window=300)), "subgen:budget=256", compile="off")
    ids = some_ids(lm.config.vocab_size, 1, 500)
    out = cached(lm, ids, 490)
    assert miss(out[:, 0], lm.logits(ids)[:, 489]) < TOLERANCE  # the prompt itself is attended exactly
    assert miss(out[:, 1:], lm.logits(ids)[:, 490:]) > CAUGHT


@pytest.mark.parametrize("turns", [(700,), (300, 400)])
def test_subgen_spends_no_cluster_on_what_left_the_window(tmp_path: Path, turns: tuple[int, ...]) -> None:
    """With a window longer than the recent tokens: when a prompt or chat turn ends, what no query will see any more is in no cluster."""
    folder = write_checkpoint(tmp_path, "mistral", **{**SMALL, "num_hidden_layers": 1}, sliding_window=200)
    lm = zoo.load(str(folder), attn="subgen:budget=256", compile="off")
    ids = some_ids(300, 1, 701)
    other = (ids + 1 + some_ids(200, 1, 701, seed=1)) % 300

    def run(old: int) -> tuple[Tensor, Tensor]:
        """With others in place of the first `old` ids: logits after all, the last one decoded; and the positions of slots before that."""
        cache, text = lm.new_cache(), torch.cat((other[:, :old], ids[:, old:]), 1)
        for turn_ids in text[:, :700].split(turns, 1):
            lm.prefill(turn_ids, cache)
        slots = cache[0].slots()
        held = slots.pos[0]
        assert ((held >= 0) * slots.a[0].exp()).sum(-1).round().tolist() == [199, 199]  # tokens that the next query will see
        return lm.decode_step(text[:, 700], cache), held[held >= 0]

    logits, held = run(0)
    assert held.min() >= 501
    assert miss(run(520)[0], logits) > CAUGHT
