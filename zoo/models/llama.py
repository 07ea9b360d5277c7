"""Llama, from scratch: Llama 1 to 3.x, TinyLlama, SmolLM2 and every checkpoint whose config says `model_type: llama`.

What to know in ten seconds:
- pre-norm residual blocks with RMSNorm:  x += attention(norm(x));  x += mlp(norm(x))
- rotary positions in the half-split layout, applied to queries and keys in every layer, plain or stretched (linear, llama3, yarn, dynamic)
- grouped queries: H query heads share G key/value heads, query head h reads kv head h // (H/G)
- SwiGLU: down(silu(gate(x)) * up(x))
- the output head is the embedding when the config ties them; biases only where the config asks for them
- module names are the checkpoint's tensor names, so loading is a loop
- the model calls `attend` of the cache it is given, and knows no attention method; without a cache it is one exact causal pass

Letters: B batch, T new tokens, C hidden size, H query heads, G key/value heads, D head size, V vocabulary.
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
class LlamaConfig(Config):
    """What a Llama is. Field names are those of config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int  # usually hidden_size / num_attention_heads, but a config may say otherwise
    rms_norm_eps: float
    rope: Rope
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # on q, k, v and o
    mlp_bias: bool = False

    sliding_window = None  # Llama has none; caches ask every family

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> LlamaConfig:
        """Read config.json. Raises ZooError naming a key that is missing, wrong or not implemented."""
        keys = Keys(raw)
        keys.must("hidden_act", "silu")
        keys.must("pretraining_tp", 1)  # a training layout; other values split matrices and change rounding
        keys.must("rope_interleaved", False)
        query, kv, head_dim = heads(keys)
        longest = keys.get("max_position_embeddings", int, 2048)
        config = LlamaConfig(
            vocab_size=keys.get("vocab_size", int),
            hidden_size=keys.get("hidden_size", int),
            intermediate_size=keys.get("intermediate_size", int),
            num_hidden_layers=keys.get("num_hidden_layers", int),
            num_attention_heads=query,
            num_key_value_heads=kv,
            head_dim=head_dim,
            rms_norm_eps=keys.get("rms_norm_eps", float, 1e-6),
            rope=rope(keys, head_dim, longest),
            max_position_embeddings=longest,
            tie_word_embeddings=keys.get("tie_word_embeddings", bool, False),
            attention_bias=keys.get("attention_bias", bool, False),
            mlp_bias=keys.get("mlp_bias", bool, False),
        )
        keys.finish()
        return config


class Attention(nn.Module):
    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.attention_bias)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.attention_bias)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.attention_bias)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.attention_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, pos: Tensor, cache: Any) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (
            proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, T, h*D) -> (B, h, T, D)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = attend(cache, q, k, v, pos, cos, sin)  # (B, H, T, D)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: LlamaConfig) -> None:
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

    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Llama(CausalLM):
    """The whole model. `model(ids, cache)` -> logits (B, T, V) float32."""

    Config = LlamaConfig
    ignored_tensors = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)  # old checkpoints store what the config implies

    def __init__(self, c: LlamaConfig) -> None:
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
