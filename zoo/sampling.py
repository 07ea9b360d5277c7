"""How the next token is chosen: small frozen values, applied in this order.

    RepetitionPenalty -> Temperature -> TopK -> TopP -> MinP -> a draw (or the largest logit, when there is no Temperature)

The draw adds Gumbel noise that is a function of (seed, sequence, position), so an answer depends on its place in the batch, and not on
the other prompts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.random import gumbel, seed_tensor


class Filter(Protocol):
    def __call__(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """logits (B, V) float32, seen (B, V) bool: tokens so far -> new logits (B, V)."""


@dataclass(frozen=True)
class RepetitionPenalty:
    """Logits of tokens already in the sequence: positive ones are divided by `penalty`, others multiplied (CTRL, arXiv 1909.05858)."""

    penalty: float

    def __call__(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        assert seen is not None
        return torch.where(seen, torch.where(logits > 0, logits / self.penalty, logits * self.penalty), logits)


@dataclass(frozen=True)
class Temperature:
    """Divide by t > 0."""

    t: float

    def __call__(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        return logits / self.t


@dataclass(frozen=True)
class TopK:
    """Only the k most likely tokens (ties of the k-th stay)."""

    k: int

    def __call__(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        least = logits.topk(min(self.k, logits.shape[-1]), -1).values[..., -1:]
        return logits.masked_fill(logits < least, -torch.inf)


@dataclass(frozen=True)
class TopP:
    """The fewest most likely tokens whose probabilities add up to at least p (nucleus sampling, arXiv 1904.09751)."""

    p: float

    def __call__(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        ordered, index = logits.sort(-1, descending=True)
        prob = ordered.softmax(-1)
        before = prob.cumsum(-1) - prob  # mass of the tokens ahead: the first always stays
        return torch.full_like(logits, -torch.inf).scatter(-1, index, ordered.masked_fill(before >= self.p, -torch.inf))


@dataclass(frozen=True)
class MinP:
    """Tokens with at least p times the probability of the likeliest (arXiv 2407.01082)."""

    p: float

    def __call__(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        prob = logits.softmax(-1)
        return logits.masked_fill(prob < self.p * prob.amax(-1, keepdim=True), -torch.inf)


@dataclass(frozen=True)
class Sampler:
    """filters, then a draw if `draw`, else the largest logit."""

    filters: tuple[Filter, ...] = ()
    draw: bool = False

    @property
    def needs_seen(self) -> bool:
        return any(isinstance(f, RepetitionPenalty) for f in self.filters)

    @property
    def kind(self) -> str:
        """What makes a compiled step another one: which filters, not their numbers (but for k, which is a size)."""
        return " ".join([*(f"top_k={f.k}" if isinstance(f, TopK) else type(f).__name__ for f in self.filters), *["draw"] * self.draw])

    def numbers_as_tensors(self, device: torch.device) -> Sampler:
        """The same with its numbers as () float32 tensors: a compiled step would take them for constants."""

        def convert(f: Any) -> Any:
            if not dataclasses.is_dataclass(f) or isinstance(f, (TopK, type)):  # k is a size
                return f
            floats = {x.name: getattr(f, x.name) for x in dataclasses.fields(f) if isinstance(getattr(f, x.name), (int, float))}
            return dataclasses.replace(f, **{name: torch.tensor(x, dtype=torch.float32, device=device) for name, x in floats.items()})

        return Sampler(tuple(convert(f) for f in self.filters), self.draw)

    def __call__(self, logits: Tensor, seen: Tensor | None, seed: int | Tensor, sequence: Tensor, pos: Tensor) -> Tensor:
        """logits (B, V) float32 -> token ids (B,) int64, for sequence numbers (B,) at positions pos (B,)."""
        for f in self.filters:
            logits = f(logits, seen)
        if self.draw:
            vocabulary = torch.arange(logits.shape[-1], device=logits.device)
            logits = logits + gumbel(seed, sequence[:, None], pos[:, None], vocabulary)
        return logits.argmax(-1)


@dataclass(frozen=True)
class Choice:
    """A sampler with all that a step needs to choose the next tokens: seen (B, V) bool, seed () int64, sequence (B,) int64."""

    sampler: Sampler
    seen: Tensor | None
    seed: Tensor
    sequence: Tensor

    @classmethod
    def of(cls, sampler: Sampler, batch: int, device: torch.device, seed: int = 0, seen: Tensor | None = None) -> Choice:
        return cls(sampler.numbers_as_tensors(device), seen, seed_tensor(seed, device), torch.arange(batch, device=device))

    def __call__(self, logits: Tensor, pos: Tensor) -> Tensor:
        """logits (B, V) float32 after the tokens at pos (B, 1) -> the next tokens (B,)."""
        return self.sampler(logits, self.seen, self.seed, self.sequence, pos[:, 0] + 1)


def sampler(
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
) -> Sampler:
    """The usual five numbers -> a Sampler; temperature 0 is greedy. Raises ZooError naming the bound that a number breaks."""

    def check(name: str, value: float | None, good: bool, bound: str) -> None:
        if value is not None and not good:
            raise ZooError(f"{name}={value} must be {bound}")

    check("temperature", temperature, temperature == 0 or 1e-6 <= temperature < float("inf"), "0 (greedy), or 0.000001 and more")
    check("top_k", top_k, (top_k or 0) >= 1, "at least 1")
    check("top_p", top_p, 0 < (top_p or 0) <= 1, "above 0 and at most 1")
    check("min_p", min_p, 0 <= (min_p if min_p is not None else 0) <= 1, "between 0 and 1")
    check("repetition_penalty", repetition_penalty, 0 < (repetition_penalty or 0) < float("inf"), "above 0 (1 = none)")
    chain: list[Filter] = []
    if repetition_penalty not in (None, 1.0):
        chain.append(RepetitionPenalty(repetition_penalty))  # type: ignore[arg-type]
    if temperature > 0:
        chain.append(Temperature(temperature))
        chain += [TopK(top_k)] if top_k is not None else []
        chain += [TopP(top_p)] if top_p is not None else []
        chain += [MinP(min_p)] if min_p is not None else []
    elif any(x is not None for x in (top_k, top_p, min_p)):
        raise ZooError("top_k, top_p and min_p choose what to draw from; they need temperature above 0")
    return Sampler(tuple(chain), draw=temperature > 0)
