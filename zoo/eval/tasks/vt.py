"""`vt`: a variable's value, handed on four times (RULER's variable tracking, arXiv 2404.06654; its variable_tracking.py).

"VAR AAAAA = 12345", "VAR BBBBB = VAR AAAAA " and so on stand in this order between lines of noise; asked for are all five variables with
the value. An example of at most 500 tokens, with names of three letters, comes first, its answer behind it.
30 tokens are generated; right: the share of the five names in them.
"""

from __future__ import annotations

import itertools
import random
import string

from zoo.eval.tasks.passkey import FILLER
from zoo.eval.tasks.task import Answers, Draft, Material, Sample, fit, largest

HOPS = 4
BEFORE = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
AFTER = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to the chain(s) of variable "
    "assignment in the text above, {count} variables are assigned the value {value}, they are: "
)


def chain(lines: int, letters: int, r: random.Random) -> tuple[str, str, list[str]]:
    """The text, the question, and the names."""
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(r.choices(string.ascii_uppercase, k=letters))
        names += [name] * (name not in names)
    value = r.randrange(10000, 99999)
    steps = [f"VAR {names[0]} = {value}"] + [f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(names)]
    text = [FILLER] * lines
    for i, place in enumerate(sorted(r.sample(range(lines), len(steps)))):
        text.insert(place + i, steps[i])
    return BEFORE + "\n".join(text), AFTER.format(value=value, count=HOPS + 1), names


class VariableTracking(Answers):
    name = "vt"
    new_tokens = 30

    def sample(self, material: Material, variant: str, length: int, number: int) -> Sample:
        seed = (self.name, length, number)

        def example(lines: int) -> str:
            text, question, names = chain(lines, 3, material.random(*seed, "example"))
            return f"{text}{question} {' '.join(names)}\n\n"

        least = HOPS + 1
        lines = largest(lambda n: len(material.tokenizer.encode(example(n))), 500, least) or least
        shown = example(lines)

        def write(parts: int) -> Draft:
            text, question, names = chain(parts, 5, material.random(*seed))
            return Draft(shown + text, question, " " + " ".join(names), names)

        return fit(material.tokenizer, length, least, write, self.name)
