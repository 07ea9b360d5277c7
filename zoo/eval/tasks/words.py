"""Words that prompts are made of: adjectives, nouns and verbs of the `wonderwords` package, which LongEval and RULER use."""

from __future__ import annotations

import functools
import random

from zoo.errors import ZooError


@functools.cache
def words(kind: str) -> list[str]:
    """All of a kind (adjective, noun, verb), in the package's order. Raises ZooError where it is not installed."""
    try:
        from wonderwords import RandomWord
    except ImportError:
        raise ZooError("these prompts are made of words of the package wonderwords: pip install wonderwords") from None
    return list(RandomWord().filter(include_categories=[kind]))


def pair(r: random.Random) -> str:
    return f"{r.choice(words('adjective'))}-{r.choice(words('noun'))}"
