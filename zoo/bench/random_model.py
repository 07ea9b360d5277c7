"""Models that are only a config: weights are drawn in place, the answers are nonsense, and times are those of the real thing."""

from __future__ import annotations

from typing import Any

import torch

from zoo.errors import ZooError
from zoo.quantized import quantize

MISTRAL = {
    "model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 1e6, "sliding_window": None,
    "max_position_embeddings": 32768,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "mistral-7b": MISTRAL,
    "llama-3.1-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 5e5, "max_position_embeddings": 131072,
    },
    "pythia-1.4b": {
        "model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 16, "rotary_pct": 0.25, "use_parallel_residual": True, "max_position_embeddings": 2048,
    },
    "long-context": {  # small enough to read 64k tokens on a CPU
        "model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2, "rope_theta": 1e6, "max_position_embeddings": 131072,
    },
}  # fmt: skip


def random_model(name: str, dtype: torch.dtype, layers: int | None = None, weights: str | None = None) -> Any:
    """A model of this shape with normal weights of std 0.02 (norms: ones), seeded. layers: fewer of them, where memory is short.
    weights: as in zoo.load."""
    from zoo.models import FAMILIES

    if name not in CONFIGS:
        raise ZooError(f"--random {name}: known are {', '.join(CONFIGS)}")
    raw = CONFIGS[name] | ({} if layers is None else {"num_hidden_layers": layers})
    family = FAMILIES[raw["model_type"]]
    with torch.device("meta"):
        model = family(family.Config.from_dict(raw))
    generator = torch.Generator().manual_seed(0)
    drawn: dict[Any, torch.nn.Parameter] = {}
    for full, p in list(model.named_parameters(remove_duplicate=False)):
        if p not in drawn:
            weight = torch.empty(p.shape, dtype=dtype)
            weight.fill_(1.0) if p.dim() == 1 and full.endswith("weight") else weight.normal_(std=0.02, generator=generator)
            drawn[p] = torch.nn.Parameter(weight, requires_grad=False)
        parent, _, leaf = full.rpartition(".")
        setattr(model.get_submodule(parent), leaf, drawn[p])
    model = model.eval().requires_grad_(False)
    quantize(model, weights)
    return model
