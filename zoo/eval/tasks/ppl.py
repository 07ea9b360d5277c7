"""`ppl`: perplexity of true text behind, or through, a cache.

    prefill   of the 256 tokens that follow a compressed passage            stream   of the passage and of what follows, read as they come
`stream` is StreamingLLM's measure (arXiv 2309.17453), the method at work on every token of the prompt, too. The two are means over other
tokens, and not to be compared with each other.
    nll       mean -log p of the true token, in nats                        ppl      exp(nll)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from zoo.eval.protocols import Run
from zoo.eval.tasks.task import Passages, Sample


class Perplexity(Passages):
    name = "ppl"
    whole = True

    def watch(self, run: Run, sample: Sample) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the prompt's tokens, where they were looked at, and of those that follow."""
        first = run.logits.log_softmax(-1)[None]
        logs = torch.cat((first, run.follow(sample.follow)[:-1]))
        true = torch.tensor(sample.follow, device=logs.device)[:, None]
        return torch.cat([logs.new_empty(0), *run.inside]), logs.gather(1, true)[:, 0]

    def scores(self, seen: tuple[Tensor, Tensor], full: Any, sample: Sample, protocol: str) -> dict[str, Any]:
        inside, after = seen
        logs = torch.cat((inside, after)) if protocol == "stream" else after
        nll = -float(logs.double().mean())
        return {"nll": nll, "ppl": math.exp(nll)}
