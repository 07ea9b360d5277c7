"""Reading a config.json: every key is used, ignored by name, or equal to the only value this code implements.

An unimplemented option must be an error that names its key: silently ignoring `rope_scaling` gives fluent nonsense.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.models.layers import DynamicScaling, LinearScaling, Llama3Scaling, Rope, Scaling, YarnScaling

# Said by every checkpoint, and of no consequence for the numbers this code computes.
BOOKKEEPING = frozenset(
    [
        "architectures",
        "model_type",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "use_cache",
        "initializer_range",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "_name_or_path",
        "attention_dropout",
        "is_llama_config",
        "transformers.js_config",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "problem_type",
        "id2label",
        "label2id",
        "chunk_size_feed_forward",
        "torchscript",
        "use_bfloat16",
        "custom_pipelines",
        # How to sample, which older checkpoints say here and not in generation_config.json.
        "max_length",
        "min_length",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "num_beams",
        "repetition_penalty",
        "max_sequence_length",  # Llama 1's second name for max_position_embeddings
        "is_decoder",
        "tokenizer_class",
        "gradient_checkpointing",
        "_attn_implementation_autoset",
        "unsloth_version",
    ]
)


class Config:
    """What the configs of all families share."""

    folder: Path | None = None  # of the checkpoint it was read from, where there is one; says nothing of what the model is, so no field


class Keys:
    """The raw config, with an account of which keys were asked for."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw, self.used = raw, set[str]()

    def get(self, name: str, kind: type, default: Any = ...) -> Any:
        """The value of `name`, checked to be a `kind`; null counts as absent. Raises ZooError when it is missing or of another kind."""
        self.used.add(name)
        value = self.raw.get(name)
        if value is None:
            if default is ...:
                raise ZooError(f"config.json lacks '{name}'; download it again")
            return default
        good = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            good, value = True, float(value)
        if not good or (kind in (int, float) and not 0 < value < 1e12):
            raise ZooError(f"config.json: '{name}' is {value!r}; expected {'a positive ' * (kind in (int, float))}{kind.__name__}")
        return value

    def must(self, name: str, *values: Any) -> None:
        """`name` may be absent or one of `values`; anything else is not implemented."""
        self.used.add(name)
        if name in self.raw and self.raw[name] not in values:
            raise ZooError(f"config.json: {name}={self.raw[name]!r} is not implemented; this code computes {name}={values[0]!r}")

    def finish(self, ignored: Set[str] = frozenset()) -> None:
        """Raises ZooError naming every key that nothing has accounted for."""
        given = {name for name, value in self.raw.items() if value is not None}
        unknown = sorted(given - self.used - ignored - BOOKKEEPING)
        if unknown:
            raise ZooError(
                f"config.json has keys this code does not know: {', '.join(unknown)}; the model may need something that is not "
                "implemented: if you know that it does not, remove them"
            )


def heads(keys: Keys, kv_heads: int | None = None) -> tuple[int, int, int]:
    """num_attention_heads, num_key_value_heads (`kv_heads` where the config is silent, null = as many as query heads) and head_dim."""
    query, hidden = keys.get("num_attention_heads", int), keys.get("hidden_size", int)
    default = kv_heads if kv_heads is not None and "num_key_value_heads" not in keys.raw else query
    kv = keys.get("num_key_value_heads", int, default)
    if keys.raw.get("head_dim") is None and hidden % query:
        raise ZooError(f"config.json: hidden_size={hidden} is no multiple of {query} heads, and there is no head_dim")
    head_dim = keys.get("head_dim", int, hidden // query)
    if query % kv or head_dim % 2 or head_dim < 2:
        raise ZooError(f"config.json: {query} heads must be a multiple of {kv} kv heads, and head_dim={head_dim} must be even and positive")
    return query, kv, head_dim


def rope(keys: Keys, head_dim: int, longest: int, theta: float = 10000.0, share: float | None = None) -> Rope:
    """Both spellings: `rope_theta` with `rope_scaling`, and the newer `rope_parameters` that holds both. longest: the config's
    max_position_embeddings. theta, share: what the family's own keys say; share None: all dimensions turn, and the config must not
    say otherwise. Raises ZooError naming what is missing, contradictory or not implemented."""
    theta, old = keys.get("rope_theta", float, theta), keys.get("rope_scaling", dict, None)
    new = keys.get("rope_parameters", dict, None)
    if new is not None and old is not None:
        raise ZooError("config.json has both rope_scaling and rope_parameters; keep the one that the model was trained with")
    inner = Keys(new or old or {})
    if share is None:
        inner.must("partial_rotary_factor", 1.0)
    partial = 1.0 if share is None else inner.get("partial_rotary_factor", float, share)
    outer, theta = theta, inner.get("rope_theta", float, theta)
    if keys.raw.get("rope_theta") is not None and theta != outer:
        raise ZooError(f"config.json says rope_theta {outer:g} and, among the rotary options, {theta:g}; keep the one it was trained with")
    kind = inner.get("rope_type", str, inner.get("type", str, "default"))
    if inner.get("type", str, kind) != kind:
        raise ZooError(f"config.json: rotary type {inner.raw['type']!r} and rope_type {kind!r} disagree; keep the one it was trained with")
    if theta <= 1 or partial > 1:
        raise ZooError(f"config.json: rotary theta {theta:g} must be above 1, and the rotary share {partial:g} at most 1")
    stretched = scaling(kind, inner, longest)
    if isinstance(stretched, DynamicScaling) and int(head_dim * partial) <= 2:
        raise ZooError("config.json: rotary scaling dynamic needs more than 2 turning dimensions a head")
    inner.finish()
    return Rope(theta, stretched, partial)


def scaling(kind: str, keys: Keys, longest: int) -> Scaling | None:
    """The rotary scaling of type `kind` with the options in `keys`."""
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(keys.get("factor", float))
    if kind == "dynamic":
        return DynamicScaling(keys.get("factor", float), longest)
    if kind == "llama3":
        low, high = keys.get("low_freq_factor", float), keys.get("high_freq_factor", float)
        if high <= low:
            raise ZooError("config.json: rotary scaling llama3 needs high_freq_factor > low_freq_factor")
        return Llama3Scaling(keys.get("factor", float), low, high, keys.get("original_max_position_embeddings", int, longest))
    if kind == "yarn":
        factor, mscale, all_dim = keys.get("factor", float), keys.get("mscale", float, 0.0), keys.get("mscale_all_dim", float, 0.0)
        grown = log_growth(factor, mscale) / log_growth(factor, all_dim) if mscale and all_dim else log_growth(factor, 1.0)
        keys.used.add("finetuned")  # how the weights came about
        return YarnScaling(
            factor=factor,
            original_max_position_embeddings=keys.get("original_max_position_embeddings", int, longest),
            attention_factor=keys.get("attention_factor", float, grown),
            beta_fast=keys.get("beta_fast", float, 32.0),
            beta_slow=keys.get("beta_slow", float, 1.0),
            truncate=keys.get("truncate", bool, True),
        )
    raise ZooError(f"config.json: rotary scaling of type {kind!r} is not implemented; known: default, linear, dynamic, llama3, yarn")


def log_growth(factor: float, mscale: float) -> float:
    """YaRN's attention factor, 0.1 m ln(s) + 1 for a context stretched s times."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
