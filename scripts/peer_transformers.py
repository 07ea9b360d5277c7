"""What `python -m zoo.bench --peer scripts/peer_transformers.py` compares with: transformers on the same weights.

transformers          a dynamic cache, eager: what its `generate` does unless told otherwise, without its bookkeeping
transformers-static   a static cache and a compiled forward pass (decode only)
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache


@functools.cache
def model_of(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


class Dynamic:
    def __init__(self, folder: Path, dtype: torch.dtype, threads: int, longest: int) -> None:
        self.model = model_of(folder, dtype)
        self.weight_bytes = sum(p.nbytes for p in self.model.parameters())

    def ids(self, tokens: int, batch: int) -> Tensor:
        return torch.randint(0, self.model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(tokens))

    @torch.no_grad()
    def read(self, context: int, batch: int) -> Any:
        return self.model(self.ids(context, batch), past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1).past_key_values

    def decode(self, context: int, batch: int, steps: int) -> Callable[[], float] | None:
        """All sequences of a batch have the same length: a dynamic cache has no other."""
        base, after = self.read(context, batch), self.ids(steps + 1, batch)

        @torch.no_grad()
        def run() -> float:
            past = copy.deepcopy(base)
            self.model(after[:, :1], past_key_values=past, use_cache=True)
            start = time.perf_counter()
            for t in range(1, steps + 1):
                self.model(after[:, t : t + 1], past_key_values=past, use_cache=True).logits[:, -1].argmax(-1)
            return time.perf_counter() - start

        return run

    def prefill(self, context: int, batch: int) -> Callable[[], float] | None:
        def run() -> float:
            start = time.perf_counter()
            self.read(context, batch)
            return time.perf_counter() - start

        return run


class Static(Dynamic):
    def decode(self, context: int, batch: int, steps: int) -> Callable[[], float] | None:
        """Later turns write over the rows of the first."""
        past, after = StaticCache(config=self.model.config, max_cache_len=context + steps + 2), self.ids(steps + 1, batch)
        with torch.no_grad():
            self.model(self.ids(context, batch), past_key_values=past, use_cache=True, logits_to_keep=1)
        step = torch.compile(self.model.forward, dynamic=False, recompile_limit=64)  # one graph a context and batch

        @torch.no_grad()
        def one(t: int) -> None:
            for layer in past.layers:  # as long as it was: it counts its tokens itself
                length = layer.cumulative_length
                layer.cumulative_length = context + t if isinstance(length, int) else length.fill_(context + t)
            at = torch.full((batch, 1), context + t)
            out = step(after[:, t : t + 1], past_key_values=past, position_ids=at, cache_position=at[0], use_cache=True)
            out.logits[:, -1].argmax(-1)

        def run() -> float:
            one(0)
            start = time.perf_counter()
            for t in range(1, steps + 1):
                one(t)
            return time.perf_counter() - start

        return run

    def prefill(self, context: int, batch: int) -> None:
        return None


PEERS = {"transformers": Dynamic, "transformers-static": Static}
