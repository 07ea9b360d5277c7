"""`cwe`: the ten most common words of a list (RULER's common words extraction, arXiv 2404.06654; its common_words_extraction.py).

A numbered list in random order, in which ten words stand 30 times and all others 3 times; below 4,096 tokens 6 times and once. A short list
of the same kind, with its answer, comes first. Words are nouns, adjectives and verbs of `wonderwords`.
120 tokens are generated; right: the share of the ten words in them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from zoo.eval.tasks.task import Answers, Draft, Material, Sample, fit
from zoo.eval.tasks.words import words

COMMON = 10
BEFORE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most often.\n"
)
AFTER = "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most often in the list are:"


def numbered(some: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(some, 1))


def listing(chosen: Sequence[str], often: int, seldom: int, r: random.Random) -> str:
    everything = list(chosen[:COMMON]) * often + list(chosen[COMMON:]) * seldom
    r.shuffle(everything)
    return BEFORE + numbered(everything)


class CommonWords(Answers):
    name = "cwe"
    new_tokens = 120

    def sample(self, material: Material, variant: str, length: int, number: int) -> Sample:
        r = material.random(self.name, length, number)
        every = sorted({word for kind in ("noun", "adjective", "verb") for word in words(kind)})
        short = length < 4096
        shown, often, seldom = ((20, 3, 1), 6, 1) if short else ((40, 10, 3), 30, 3)
        few = r.sample(every, shown[0])
        example = listing(few, *shown[1:], r) + AFTER + " " + numbered(few[:COMMON]) + "\n"
        order = r.sample(every, len(every))

        def write(count: int) -> Draft:
            text = listing(order[:count], often, seldom, material.random(self.name, length, number, "order"))
            return Draft(example + text, AFTER, " " + numbered(order[:COMMON]), order[:COMMON])

        return fit(material.tokenizer, length, COMMON + 1, write, self.name, most=len(every))
