"""zoo: language models to read, hack and run, with the attention's memory as a part you swap by name.

lm = zoo.load("smollm2-135m", attn="subgen")
print(lm.generate("Once upon a time"))
"""

import sys
from types import ModuleType

from zoo import models
from zoo.attention import ATTENTION, options
from zoo.errors import ZooError
from zoo.hub import KNOWN
from zoo.lm import LM, load


class _Models(ModuleType):
    """`zoo.models` is the package of model families; called, it lists the names that `load` knows."""

    def __call__(self) -> list[str]:
        return sorted(KNOWN)  # any hub id or folder of an implemented family works too


sys.modules[models.__name__].__class__ = _Models


def attentions() -> dict[str, dict[str, object]]:
    """Attention method -> its options and their defaults."""
    return {name: {key: default for key, (_, default) in options(method).items()} for name, method in ATTENTION.items()}


__all__ = ["LM", "ZooError", "attentions", "load", "models"]
