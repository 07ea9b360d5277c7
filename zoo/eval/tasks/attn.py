"""`attn`: how far attention outputs are from exact ones, layer by layer and head by head, for the same queries.

The model reads a passage and the 256 tokens behind it once, exactly, and every layer's queries, keys and values are written down. Each
method's cache is then given the same ones: so an error of an early layer does not change what a later one is asked. Over the 256 tokens,
    error   |out - exact| / |exact| (BalanceKV's measure, arXiv 2502.07861), the mean over layers and heads        worst   the largest
and `heads` has all of them (layers x heads).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.attention import parse
from zoo.eval import metrics, protocols
from zoo.eval.protocols import Run
from zoo.eval.tasks.task import Passages, Sample


class Replay:
    """In the model's place: gives caches what the model gave a full one. Called with ids, pos, cache -> outputs (1, T, layers H D)."""

    def __init__(self, lm: Any, ids: Sequence[int]) -> None:
        self.layers: list[list[tuple[Tensor, ...]]] = [[] for _ in range(lm.config.num_hidden_layers)]

        def forward(t: Tensor, pos: Tensor, cache: Any) -> Tensor:
            for layer, log in zip(cache, self.layers, strict=True):
                if not hasattr(layer, "plain"):
                    layer.plain = layer.attend
                    layer.attend = lambda q, k, v, p, layer=layer, log=log: log.append((q, k, v)) or layer.plain(q, k, v, p)
                    layer.rotates = lambda tokens: False
            return lm.model.hidden(t, pos, cache)

        protocols.read(lm, parse("full"), ids, forward=forward)
        self.qkv = [tuple(torch.cat(parts, 2) for parts in zip(*log, strict=True)) for log in self.layers]
        self.layers = []

    def __call__(self, ids: Tensor, pos: Tensor, cache: Any) -> Tensor:
        at = slice(int(pos[0, 0]), int(pos[0, -1]) + 1)
        out = []
        for layer, parts in zip(cache, self.qkv, strict=True):
            q, k, v = (x[:, :, at].contiguous() for x in parts)
            out.append(layer.attend(q, k, v, pos).transpose(1, 2).flatten(2))
        return torch.cat(out, 2)


class AttentionError(Passages):
    name = "attn"
    compares = True

    def forward(self, lm: Any, sample: Sample) -> Replay:
        self.shape = (lm.config.num_hidden_layers, lm.config.num_attention_heads)
        return Replay(lm, sample.context + sample.follow)

    def watch(self, run: Run, sample: Sample) -> Tensor:
        """Outputs (layers, H, T, D) for what follows the prompt."""
        return run.feed(sample.follow).unflatten(1, (*self.shape, -1)).permute(1, 2, 0, 3)

    def scores(self, seen: Tensor, full: Tensor, sample: Sample, protocol: str) -> dict[str, Any]:
        each = metrics.errors(full, seen)
        return {"error": float(each.mean()), "worst": float(each.max())}

    def more(self, seen: Tensor, full: Tensor) -> dict[str, Any]:
        return {"heads": [[round(x, 4) for x in row] for row in metrics.errors(full, seen).tolist()]}
