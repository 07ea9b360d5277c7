"""`fwe`: the three most frequent words of a coded text (RULER's frequent words extraction, arXiv 2404.06654; its freq_words_extraction.py).

Words are six random letters; the k-th of them stands n k^-2 / zeta(2) times in a text of n words, in random order. The most frequent one is
"...", noise that the question says to ignore; asked for are the next three. There is one word for every 50 tokens of the length.
50 tokens are generated; right: the share of the three words in them.
"""

from __future__ import annotations

import math
import string

from zoo.eval.tasks.task import Answers, Draft, Material, Sample, fit, joined

BEFORE = "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded words. "
AFTER = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared words in the "
    "above coded text? Answer: According to the coded text above, the three most frequently appeared words are:"
)
ZETA = math.pi**2 / 6


class FrequentWords(Answers):
    name = "fwe"
    new_tokens = 50

    def sample(self, material: Material, variant: str, length: int, number: int) -> Sample:
        r = material.random(self.name, length, number)
        words: list[str] = ["..."]
        while len(words) < max(length // 50, 5):
            word = "".join(r.choices(string.ascii_lowercase, k=6))
            words += [word] * (word not in words)

        def write(count: int) -> Draft:
            text = [word for k, word in enumerate(words, 1) for _ in range(int(count * k**-2 / ZETA))]
            material.random(self.name, length, number, "order").shuffle(text)
            return Draft(BEFORE + " ".join(text), AFTER, " " + joined(words[1:4]), words[1:4])

        return fit(material.tokenizer, length, 64, write, self.name)
