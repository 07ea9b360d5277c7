"""How a model is held to `transformers`: one checkpoint, both read it, logits are compared in one pass and through the cache.

A parity test is worth what it catches. So each has mutants: the same model with one thing wrong, which must miss by far more than
the tolerance. Mutants change a loaded model, or patch its family's file for the length of a test.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import write_checkpoint
from torch import Tensor

import zoo
from zoo.models import layers
from zoo.models.layers import Rope, Rotary, turn

TOLERANCE = 1e-4  # of a float32 logit, where logits have a standard deviation of about 2; rounding was seen to reach half of it
CAUGHT = 100 * TOLERANCE  # what every mutant must miss by
PROMPT, LENGTH = 40, 60  # tokens prefilled, and in all
LONG = 1000  # positions that bfloat16 cannot count

# Attention scores grow with the hidden size: with weights of std 0.3 a larger one makes softmax all peaks, which blow up rounding.
SMALL: dict[str, Any] = {"hidden_size": 32, "head_dim": 16, "num_hidden_layers": 2}


def theirs(folder: Path, dtype: torch.dtype = torch.float32, attention: str = "eager") -> Any:
    """The checkpoint as transformers reads it."""
    transformers = pytest.importorskip("transformers", reason="compares with `transformers`, of the test extra")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()


def some_ids(vocab: int, batch: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def miss(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; NaN counts as infinite."""
    assert a.shape == b.shape
    return float((a.double() - b.double()).abs().nan_to_num(torch.inf).max())


def cached(lm: zoo.LM, ids: Tensor, prompt: int) -> Tensor:
    """Logits (B, T - prompt + 1, V) after the prompt and after each further token, fed one by one."""
    cache = lm.new_cache(len(ids), max_tokens=ids.shape[1])
    out = [lm.prefill(ids[:, :prompt], cache)]
    out += [lm.decode_step(ids[:, t], cache) for t in range(prompt, ids.shape[1])]
    return torch.stack(out, 1)


@dataclass
class Pair:
    """A checkpoint, and what transformers computes from it."""

    folder: Path
    ids: Tensor
    expected: Tensor  # (B, T, V) float32

    @staticmethod
    @torch.no_grad()
    def of(folder: Path, ids: Tensor | None = None) -> Pair:
        ids = some_ids(json.loads((folder / "config.json").read_text())["vocab_size"]) if ids is None else ids
        return Pair(folder, ids, theirs(folder)(ids).logits)

    def load(self) -> zoo.LM:
        return zoo.load(str(self.folder), compile="off")

    def misses(self, lm: zoo.LM, prompt: int = PROMPT) -> tuple[float, float]:
        """Largest difference of a logit: in one pass, and through the cache."""
        return miss(lm.logits(self.ids), self.expected), miss(cached(lm, self.ids, prompt), self.expected[:, prompt - 1 :])

    def check(self) -> None:
        """Ours are theirs, and large enough that this says something."""
        assert 0.5 < self.expected.std() < 5
        once, stepwise = self.misses(self.load())
        assert once < TOLERANCE
        assert stepwise < TOLERANCE

    def check_mutant(self, mutant: Mutant, patch: pytest.MonkeyPatch, tolerance: float = TOLERANCE) -> None:
        """Right before, and wrong only because of the mutant."""
        lm = self.load()
        assert max(self.misses(lm)) < tolerance
        mutant(patch, lm)
        once, stepwise = self.misses(lm)
        assert once > 100 * tolerance
        assert stepwise > 100 * tolerance


Pairs = Callable[[str], Pair]


def pair_maker(root: Path, family: str, variants: dict[str, dict[str, Any]]) -> Pairs:
    """Variant -> its Pair, made once."""
    made: dict[str, Pair] = {}

    def make(variant: str) -> Pair:
        if variant not in made:
            made[variant] = Pair.of(write_checkpoint(root / str(len(made)), family, **variants[variant]))
        return made[variant]

    return make


# Mutants of any family

Mutant = Callable[[pytest.MonkeyPatch, zoo.LM], None]
Turn = Callable[[Tensor, Tensor, Tensor], Tensor]


def file_of(lm: zoo.LM) -> ModuleType:
    """The family's module."""
    return sys.modules[type(lm.model).__module__]


def rope(change: Callable[[Rope], Rope]) -> Mutant:
    """Other rotary options than the checkpoint's."""

    def apply(_: pytest.MonkeyPatch, lm: zoo.LM) -> None:
        lm.model.rotary = Rotary(lm.config.head_dim, change(lm.config.rope))

    return apply


def scaled(**changes: Any) -> Mutant:
    """Other options of its rotary scaling than the checkpoint's."""
    return rope(lambda r: dataclasses.replace(r, scaling=dataclasses.replace(r.scaling, **changes)))  # type: ignore[type-var]


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The other rotary layout: dimension 2i turns together with 2i + 1."""
    n = 2 * cos.shape[-1]
    halves = torch.cat((x[..., :n:2], x[..., 1:n:2]), -1)
    return torch.cat((torch.stack(turn(halves, cos, sin).chunk(2, -1), -1).flatten(-2), x[..., n:]), -1)


def turned(function: Turn) -> Mutant:
    return lambda patch, lm: patch.setattr(layers, "turn", function)


def attends(attend: Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor]) -> Mutant:
    """`attend(cache, q, k, v, pos)` in place of cache.attend(q, k, v, pos)."""

    class Around:
        def __init__(self, cache: Any) -> None:
            self.cache = cache

        def attend(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
            return attend(self.cache, q, k, v, pos)

    def apply(patch: pytest.MonkeyPatch, lm: zoo.LM) -> None:
        attention = file_of(lm).Attention
        right = attention.forward
        patch.setattr(attention, "forward", lambda self, x, cos, sin, pos, cache: right(self, x, cos, sin, pos, Around(cache)))

    return apply


def tiled(cache: Any, q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
    """Query head h reads kv head h % G, where it should be h // R."""
    B, H, T, D = q.shape
    G = k.shape[1]
    out = cache.attend(q.view(B, H // G, G, T, D).transpose(1, 2).reshape(q.shape), k, v, pos)
    return out.view(B, G, H // G, T, D).transpose(1, 2).reshape(q.shape)


def on_queries_only(patch: pytest.MonkeyPatch, lm: zoo.LM) -> None:
    attends(lambda cache, q, k, v, pos: cache.attend(q, lm.model.rotary.unrotate(k, pos), v, pos))(patch, lm)


def layer(forward: Callable[..., Tensor]) -> Mutant:
    """`forward(layer, x, attention)` in place of a layer's own, where attention(x) is its self-attention."""

    def apply(patch: pytest.MonkeyPatch, lm: zoo.LM) -> None:
        def other(self: Any, x: Tensor, *rest: Any) -> Tensor:
            attention = self.self_attn if hasattr(self, "self_attn") else self.attention
            return forward(self, x, lambda y: attention(y, *rest))

        patch.setattr(file_of(lm).Layer, "forward", other)

    return apply


def parallel(self: Any, x: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
    """The mlp reads x from before the attention."""
    return x + attention(self.input_layernorm(x)) + self.mlp(self.post_attention_layernorm(x))


def sequential(self: Any, x: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
    """The mlp reads x from after the attention."""
    x = x + attention(self.input_layernorm(x))
    return x + self.mlp(self.post_attention_layernorm(x))


def normed(self: Any, x: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
    """The residual carries the normed x."""
    y = self.input_layernorm(x)
    x = y + attention(y)
    return x + self.mlp(self.post_attention_layernorm(x))


def swapped_norms(self: Any, x: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
    x = x + attention(self.post_attention_layernorm(x))
    return x + self.mlp(self.input_layernorm(x))


def eps(value: float) -> Mutant:
    def apply(patch: pytest.MonkeyPatch, lm: zoo.LM) -> None:
        for module in lm.model.modules():
            if hasattr(module, "eps"):
                patch.setattr(module, "eps", value)

    return apply


def no_bias(name: str) -> Mutant:
    """The biases of all modules of that name are zero."""

    def apply(_: pytest.MonkeyPatch, lm: zoo.LM) -> None:
        for path, module in lm.model.named_modules():
            if path.endswith(name):
                module.bias.zero_()

    return apply


def other_head(_: pytest.MonkeyPatch, lm: zoo.LM) -> None:
    """An output head of its own, where the checkpoint ties it to the embedding."""
    head = lm.model.embed_out if hasattr(lm.model, "embed_out") else lm.model.lm_head
    weight = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(1)) * 0.3
    head.weight = torch.nn.Parameter(weight, requires_grad=False)


def mlp(forward: Callable[[Any, Tensor], Tensor]) -> Mutant:
    return lambda patch, lm: patch.setattr(file_of(lm).MLP, "forward", forward)


def window(change: int) -> Mutant:
    """A window that many tokens wider."""

    def apply(_: pytest.MonkeyPatch, lm: zoo.LM) -> None:
        lm.config = lm.model.config = dataclasses.replace(lm.config, sliding_window=lm.config.sliding_window + change)

    return apply
