"""Scores. BETTER says of each whether more or less is better."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from torch import Tensor

BETTER = {
    "kl": "lower",
    "top1": "higher",
    "nll": "lower",
    "ppl": "lower",
    "error": "lower",
    "worst": "lower",
    "right": "higher",
    "first": "higher",
    "words": "higher",
    "logprob": "higher",
    "f1": "higher",
    "rouge_l": "higher",
    "exact": "higher",
    "edit": "higher",
}


# Distributions


def kl(true: Tensor, other: Tensor) -> float:
    """Mean KL(true || other) in nats over T tokens, of log-probabilities (T, V) float32."""
    return float((true.exp() * (true - other)).sum(-1).mean())


def top1(true: Tensor, other: Tensor) -> float:
    """The share of T tokens after which both hold the same token for the likeliest; log-probabilities (T, V)."""
    return float((true.argmax(-1) == other.argmax(-1)).float().mean())


def errors(true: Tensor, other: Tensor) -> Tensor:
    """Relative error |other - true| / |true| of attention outputs (layers, heads, T, D) -> (layers, heads), by Frobenius norms."""
    true, other = true.double(), other.double()
    return (other - true).flatten(2).norm(dim=2) / true.flatten(2).norm(dim=2)


# Answers


def first_integer(text: str) -> int | None:
    found = re.search(r"\d+", text)
    return int(found[0]) if found else None


def last_integer(text: str) -> int | None:
    found = re.findall(r"\d+", text)
    return int(found[-1]) if found else None


def found(answer: str, expected: Sequence[str]) -> float:
    """The share of `expected` that stands in the answer, whatever the case (RULER, arXiv 2404.06654)."""
    return sum(e.lower() in answer.lower() for e in expected) / len(expected)


def words_found(answer: str, expected: str) -> float:
    """The share of the distinct words of `expected` that the answer has."""
    wanted = set(normal(expected))
    return len(wanted & set(normal(answer))) / len(wanted)


def normal(text: str) -> list[str]:
    """The words of an answer, without case, punctuation and articles (SQuAD, arXiv 1606.05250)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in text.split() if word not in ("a", "an", "the")]


def f1(answer: str, expected: str) -> float:
    """Harmonic mean of precision and recall of normalised words."""
    got, wanted = normal(answer), normal(expected)
    same = sum((Counter(got) & Counter(wanted)).values())
    return 2 * same / (len(got) + len(wanted)) if same else 0.0


def rouge_l(answer: str, expected: str) -> float:
    """F1 of the longest common subsequence of words (ROUGE-L, Lin 2004), lower case."""
    got, wanted = answer.lower().split(), expected.lower().split()
    row = [0] * (len(wanted) + 1)
    for a in got:
        diagonal = 0
        for j, b in enumerate(wanted, 1):
            diagonal, row[j] = row[j], diagonal + 1 if a == b else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(got) + len(wanted)) if row[-1] else 0.0


def exact(answer: str, expected: str) -> float:
    return float(normal(answer) == normal(expected))


def edit(answer: str, expected: str) -> float:
    """1 - Levenshtein distance of characters over the longer text's length."""
    if not (longest := max(len(answer), len(expected))):
        return 1.0
    row = list(range(len(expected) + 1))
    for i, a in enumerate(answer, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(expected, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return 1 - row[-1] / longest


def best(metric: Callable[[str, str], float], answer: str, expected: Sequence[str]) -> float:
    """The best over all references, as LongBench counts."""
    return max(metric(answer, e) for e in expected)
