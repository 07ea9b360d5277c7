"""The families by the `model_type` of config.json: a class with `Config.from_dict`, `hidden`, `logits`, `rotary` and `ignored_tensors`."""

from typing import Any

from zoo.models.gpt_neox import GPTNeoX
from zoo.models.llama import Llama
from zoo.models.mistral import Mistral

FAMILIES: dict[str, Any] = {"llama": Llama, "mistral": Mistral, "gpt_neox": GPTNeoX}
