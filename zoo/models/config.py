"""Reading a config.json: every key is used, ignored by name, or equal to the only value this code implements.

An unimplemented option must be an error that names its key: silently ignoring `rope_scaling` gives fluent nonsense.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from zoo.errors import ZooError
from zoo.models.layers import Llama3Scaling, Rope

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
    ]
)


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
                raise ZooError(f"config.json lacks '{name}'")
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
        unknown = sorted(set(self.raw) - self.used - ignored - BOOKKEEPING)
        if unknown:
            raise ZooError(
                f"config.json has keys this code does not know: {', '.join(unknown)}; the model may need something that is not implemented"
            )


def rope(keys: Keys) -> Rope:
    """Both spellings: `rope_theta` with `rope_scaling`, and the newer `rope_parameters` that holds both."""
    theta, scaling = keys.get("rope_theta", float, 10000.0), keys.get("rope_scaling", dict, None)
    new = keys.get("rope_parameters", dict, None)
    if new is not None and scaling is not None:
        raise ZooError("config.json has both rope_scaling and rope_parameters; keep the one that the model was trained with")
    inner = Keys(new or scaling or {})
    theta = inner.get("rope_theta", float, theta)
    kind = inner.get("rope_type", str, inner.get("type", str, "default"))
    numbers = None
    if kind == "llama3":
        numbers = Llama3Scaling(
            factor=inner.get("factor", float),
            low_freq_factor=inner.get("low_freq_factor", float),
            high_freq_factor=inner.get("high_freq_factor", float),
            original_max_position_embeddings=inner.get("original_max_position_embeddings", int),
        )
        if numbers.high_freq_factor <= numbers.low_freq_factor:
            raise ZooError("config.json: rope_scaling needs high_freq_factor > low_freq_factor")
    elif kind != "default":
        raise ZooError(f"config.json: rotary scaling of type {kind!r} is not implemented; known: default, llama3")
    inner.finish()
    return Rope(theta, numbers)
