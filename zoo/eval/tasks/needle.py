"""`needle`: the needle in a haystack, for a map of depth x length (Kamradt, github.com/gkamradt/LLMTest_NeedleInAHaystack; the prompt is
that of papers on compression, after Fu et al., arXiv 2402.10171).

Sentences of --text (from a random one on), and among them, at a depth of 0, 25, 50, 75 and 100 % (or --depths), moved back to the end of a
sentence: "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
50 tokens are generated. `words`: the share of the needle's distinct words in them; right: all of them are there.
"""

from __future__ import annotations

import bisect
import itertools
from typing import Any

from zoo.eval import metrics
from zoo.eval.tasks.task import Answers, Draft, Material, Sample, at_depths, depth_of, fit

RIGHT = "eat a sandwich and sit in Dolores Park on a sunny day"
NEEDLE = f"The best thing to do in San Francisco is {RIGHT}."
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


class Needle(Answers):
    name = "needle"
    new_tokens = 50

    def variants(self, material: Material) -> list[str]:
        return at_depths("", material.depths or DEPTHS)

    def sample(self, material: Material, variant: str, length: int, number: int) -> Sample:
        def write(parts: int) -> Draft:
            sentences = material.passage(parts, material.random(self.name, variant, length, number))
            ends = list(itertools.accumulate(len(s) + 1 for s in sentences))
            sentences.insert(bisect.bisect_right(ends, depth_of(variant, 0) * ends[-1]), NEEDLE)
            question = " </book>.\nBased on the content of the book, Question: The best thing to do in San Francisco is: \nAnswer:"
            context = "This is a very long story book: <book> " + " ".join(sentences)
            return Draft(context, question, f" {RIGHT}", RIGHT)

        return fit(material.tokenizer, length, 1, write, self.name)

    def judge(self, said: str, expected: Any) -> dict[str, float]:
        words = metrics.words_found(said, expected)
        return {"right": float(words == 1), "words": words}
