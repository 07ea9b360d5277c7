"""What `python -m zoo.bench --peer scripts/peer_transformers.py` compares with: transformers on the same weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

NAME = "transformers"


def runner(folder: Any, dtype: torch.dtype, ids: list[int], new: int) -> Callable[[], tuple[list[int], float, float]]:
    """A generation by transformers' `generate` (dynamic cache, eager): -> token ids, seconds to the first token, seconds for the rest."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())  # called for the prompt, then for each token

        def end(self) -> None:
            pass

    def run() -> tuple[list[int], float, float]:
        clock, start = Clock(), time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                streamer=clock,
            )
        return out[0, len(ids) :].tolist(), clock.times[1] - start, clock.times[-1] - clock.times[1]

    return run
