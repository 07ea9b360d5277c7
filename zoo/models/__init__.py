"""The families by the `model_type` of config.json: a class with `Config.from_dict`, `hidden`, `logits`, `rotary` and `ignored_tensors`."""

from zoo.models.llama import Llama

FAMILIES = {"llama": Llama}
