"""`kl`: how far the next token's distribution moves when the cache is another one.

A passage of a text is the prompt; the 256 tokens that follow it are fed as they are, and after each of them the model's distribution is
compared with the one it has with the full cache, in float32:
    kl     mean KL(full || method), in nats                top1   share of tokens where both hold the same one for the likeliest
Nothing is generated, so nothing can drift, and every token counts: the least noisy measure here. It says how much the model's behaviour
changed, not whether it became worse. Used by, among others, "Accuracy is Not All You Need" (arXiv 2407.09141).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zoo.eval import metrics
from zoo.eval.protocols import Run
from zoo.eval.tasks.task import Passages, Sample


class KL(Passages):
    name = "kl"
    compares = True

    def watch(self, run: Run, sample: Sample) -> Tensor:
        return run.follow(sample.follow)

    def scores(self, seen: Tensor, full: Tensor, sample: Sample, protocol: str) -> dict[str, Any]:
        return {"kl": metrics.kl(full, seen), "top1": metrics.top1(full, seen)}
