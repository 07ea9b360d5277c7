"""Mistral, from scratch: 7B v0.1 to v0.3, their instruct forms, Nemo, and every checkpoint whose config says `model_type: mistral`.

What differs from Llama (zoo/models/llama.py):
- a sliding window, in v0.1: a query at position p sees positions p-W+1 .. p, its own included. v0.2 and later have none (`null`).
  It limits every attention method, `full` too; the caches of `full` and `sliding` never hold more than the window
- head_dim is an option of its own: Nemo's 32 heads of 128 are narrower than its hidden size of 5120
- grouped queries everywhere, 8 key/value heads; no biases

What is the same: pre-norm blocks with RMSNorm, half-split rotary positions (theta 1e4 in v0.1, 1e6 since), SwiGLU, checkpoint names.

Letters: B batch, T new tokens, C hidden size, H query heads, G key/value heads, D head size, V vocabulary, W window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.cache import Caches
from zoo.models.config import Config, Keys, heads, rope
from zoo.models.layers import CausalLM, Embedding, Linear, RMSNorm, Rope, Rotary, attend


@dataclass(frozen=True)
class MistralConfig(Config):
    """What a Mistral is. Field names are those of config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    sliding_window: int | None  # keys a query sees, its own included; None = all
    max_position_embeddings: int = 131072
    tie_word_embeddings: bool = False

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> MistralConfig:
        """Read config.json. Raises ZooError naming a key that is missing, wrong or not implemented."""
        keys = Keys(raw)
        keys.must("hidden_act", "silu")
        query, kv, head_dim = heads(keys, kv_heads=8)
        longest = keys.get("max_position_embeddings", int, 131072)
        config = MistralConfig(
            vocab_size=keys.get("vocab_size", int),
            hidden_size=keys.get("hidden_size", int),
            intermediate_size=keys.get("intermediate_size", int),
            num_hidden_layers=keys.get("num_hidden_layers", int),
            num_attention_heads=query,
            num_key_value_heads=kv,
            head_dim=head_dim,
            rms_norm_eps=keys.get("rms_norm_eps", float, 1e-6),
            rope=rope(keys, head_dim, longest),
            # An absent window is v0.1's; only an explicit null means none.
            sliding_window=keys.get("sliding_window", int, None if "sliding_window" in raw else 4096),
            max_position_embeddings=longest,
            tie_word_embeddings=keys.get("tie_word_embeddings", bool, False),
        )
        keys.finish()
        return config


class Attention(nn.Module):
    def __init__(self, c: MistralConfig) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, pos: Tensor, cache: Any) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (
            proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, T, h*D) -> (B, h, T, D)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = attend(cache, q, k, v, pos, cos, sin)  # (B, H, T, D)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, c: MistralConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: MistralConfig) -> None:
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, pos: Tensor, cache: Any) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, pos, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Embedding, layers and last norm: everything a checkpoint calls `model.*`."""

    def __init__(self, c: MistralConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Mistral(CausalLM):
    """The whole model. `model(ids, cache)` -> logits (B, T, V) float32."""

    Config = MistralConfig
    ignored_tensors = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)  # old checkpoints store what the config implies

    def __init__(self, c: MistralConfig) -> None:
        super().__init__()
        self.config = c
        self.model = Trunk(c)
        self.lm_head = Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.rotary = Rotary(c.head_dim, c.rope)

    def hidden(self, ids: Tensor, pos: Tensor | None, cache: Caches | None = None) -> Tensor:
        x = self.through(self.model.layers, self.model.embed_tokens(ids), pos, cache)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden).float()
