"""GPT-NeoX, from scratch: GPT-NeoX-20B (arXiv 2204.06745), Pythia, and every checkpoint whose config says `model_type: gpt_neox`.

What to know in ten seconds:
- two residual wirings, chosen by the config:

      parallel (NeoX-20B, Pythia)                        sequential

      x ---+------------------------+----> +             x ---+-----------------> + --+-----------------> +
           |-> norm1 -> attention --|      ^                  |-> norm1 -> attn --^   |-> norm2 -> mlp ---^
           |-> norm2 -> mlp --------+------|

  In the parallel one both branches read the same x, each through a norm of its own, and both are added to it
- LayerNorm with weight and bias, and biases in every linear layer but the output head
- query, key and value are one fused matrix, interleaved by head: its rows are q, k, v of head 0, then q, k, v of head 1, ...
- partial rotary: only the first `rotary_pct` of each head's dimensions turn (a quarter), in the half-split layout
- every query head has a key/value head of its own (H = G); an MLP with one hidden layer and a gelu that the config names
- the output head `embed_out` is a matrix of its own, not the embedding

Letters: B batch, T new tokens, C hidden size, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.cache import Caches
from zoo.errors import ZooError
from zoo.models.config import Config, Keys, heads, rope
from zoo.models.layers import CausalLM, Embedding, Linear, Rope, Rotary, attend

tanh_gelu = partial(F.gelu, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # by the names that configs use
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_fast": tanh_gelu,  # NeoX-20B's
    "gelu_new": tanh_gelu,
    "gelu_pytorch_tanh": tanh_gelu,
    "gelu_python_tanh": tanh_gelu,
    "gelu_accurate": tanh_gelu,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
}
DROPOUT = frozenset(["hidden_dropout", "attention_dropout", "classifier_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"])


@dataclass(frozen=True)
class GPTNeoXConfig(Config):
    """What a GPT-NeoX is. Field names are those of config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float
    rope: Rope
    use_parallel_residual: bool = True
    attention_bias: bool = True  # on query_key_value and dense
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False

    sliding_window = None

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> GPTNeoXConfig:
        """Read config.json, with the rotary options under their old names (rotary_pct, rotary_emb_base) or their new ones. Raises
        ZooError naming a key that is missing, wrong or not implemented."""
        keys = Keys(raw)
        act = keys.get("hidden_act", str, "gelu")
        if act not in ACTIVATIONS:
            raise ZooError(f"config.json: hidden_act={act!r} is not implemented; known: {', '.join(ACTIVATIONS)}")
        query, kv, head_dim = heads(keys)
        hidden, longest = keys.get("hidden_size", int), keys.get("max_position_embeddings", int, 2048)
        if kv != query or head_dim * query != hidden:
            raise ZooError(f"config.json: GPT-NeoX has one key/value head a query head, of hidden_size / heads; not {kv} of {head_dim}")
        share = keys.get("rotary_pct", float, keys.get("partial_rotary_factor", float, 0.25))
        theta = keys.get("rotary_emb_base", float, keys.get("rope_theta", float, 10000.0))
        keys.must("partial_rotary_factor", share, None)  # second names of the same two; they must not contradict
        keys.must("rope_theta", theta, None)
        config = GPTNeoXConfig(
            vocab_size=keys.get("vocab_size", int),
            hidden_size=hidden,
            intermediate_size=keys.get("intermediate_size", int),
            num_hidden_layers=keys.get("num_hidden_layers", int),
            num_attention_heads=query,
            hidden_act=act,
            layer_norm_eps=keys.get("layer_norm_eps", float, 1e-5),
            rope=rope(keys, head_dim, longest, theta, share),
            use_parallel_residual=keys.get("use_parallel_residual", bool, True),
            attention_bias=keys.get("attention_bias", bool, True),
            max_position_embeddings=longest,
            tie_word_embeddings=keys.get("tie_word_embeddings", bool, False),
        )
        keys.finish(DROPOUT)
        return config


class Attention(nn.Module):
    def __init__(self, c: GPTNeoXConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = c.num_attention_heads, c.head_dim
        self.query_key_value = Linear(c.hidden_size, 3 * c.hidden_size, bias=c.attention_bias)
        self.dense = Linear(c.hidden_size, c.hidden_size, bias=c.attention_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, pos: Tensor, cache: Any) -> Tensor:
        B, T, _ = x.shape
        # (B, T, H*3*D) -> three of (B, H, T, D): the matrix holds q, k and v of one head side by side
        q, k, v = self.query_key_value(x).view(B, T, self.heads, 3, self.head_dim).permute(3, 0, 2, 1, 4)
        out = attend(cache, q, k, v, pos, cos, sin)  # (B, H, T, D)
        return self.dense(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, c: GPTNeoXConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = Linear(c.hidden_size, c.intermediate_size)
        self.dense_4h_to_h = Linear(c.intermediate_size, c.hidden_size)
        self.act = ACTIVATIONS[c.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(self.act(self.dense_h_to_4h(x)))


class Layer(nn.Module):
    def __init__(self, c: GPTNeoXConfig) -> None:
        super().__init__()
        self.attention = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.parallel = c.use_parallel_residual

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, pos: Tensor, cache: Any) -> Tensor:
        after = x + self.attention(self.input_layernorm(x), cos, sin, pos, cache)
        return after + self.mlp(self.post_attention_layernorm(x if self.parallel else after))


class Trunk(nn.Module):
    """Embedding, layers and last norm: everything a checkpoint calls `gpt_neox.*`."""

    def __init__(self, c: GPTNeoXConfig) -> None:
        super().__init__()
        self.embed_in = Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)


class GPTNeoX(CausalLM):
    """The whole model. `model(ids, cache)` -> logits (B, T, V) float32."""

    Config = GPTNeoXConfig
    # Old checkpoints store what the config implies: frequencies, and the causal mask with the value that it masks with.
    ignored_tensors = (r"gpt_neox\.layers\.\d+\.attention\.(rotary_emb\.inv_freq|bias|masked_bias)",)

    def __init__(self, c: GPTNeoXConfig) -> None:
        super().__init__()
        self.config = c
        self.gpt_neox = Trunk(c)
        self.embed_out = Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.embed_out.weight = self.gpt_neox.embed_in.weight
        self.rotary = Rotary(c.head_dim, c.rope)

    def hidden(self, ids: Tensor, pos: Tensor | None, cache: Caches | None = None) -> Tensor:
        x = self.through(self.gpt_neox.layers, self.gpt_neox.embed_in(ids), pos, cache)
        return self.gpt_neox.final_layer_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.embed_out(hidden).float()
