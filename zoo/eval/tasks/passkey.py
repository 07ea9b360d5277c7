"""`passkey`: a number in a text that says nothing (Mohtashami and Jaggi, Landmark Attention, arXiv 2305.16300; their run_test.py).

Five parts on lines of their own: the task, filler, "The pass key is {key}. Remember it. {key} is the pass key.", filler, and the question,
which ends where the number comes. The filler is one paragraph over and over, cut by characters, split at random (or by --depths).
The key is 1 to 50,000. Right: the first integer of 10 tokens is the key.
"""

from __future__ import annotations

from typing import Any

from zoo.eval import metrics
from zoo.eval.tasks.task import Answers, Draft, Material, Sample, at_depths, depth_of, fit

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about the important "
    "information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


class Passkey(Answers):
    name = "passkey"
    new_tokens = 10

    def variants(self, material: Material) -> list[str]:
        return at_depths("", material.depths)

    def sample(self, material: Material, variant: str, length: int, number: int) -> Sample:
        r = material.random(self.name, variant, length, number)
        key, share = r.randint(1, 50000), r.random()
        share = depth_of(variant, share)

        def write(characters: int) -> Draft:
            before = int(share * characters)
            filler = " ".join([FILLER] * (characters // len(FILLER) + 1))
            key_line = f"The pass key is {key}. Remember it. {key} is the pass key."
            context = "\n".join((TASK, filler[:before], key_line, filler[: characters - before]))
            return Draft(context, "\nWhat is the pass key? The pass key is", f" {key}", str(key))

        return fit(material.tokenizer, length, 0, write, self.name)

    def judge(self, said: str, expected: Any) -> dict[str, float]:
        return {"right": float(metrics.first_integer(said) == int(expected))}
