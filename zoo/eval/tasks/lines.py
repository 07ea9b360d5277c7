"""`lines`: a register's number in a long record of them (LongEval's line retrieval, lmsys.org/blog/2023-06-29-longchat; the task of
SubGen's experiments, which had 200, 300 and 400 lines).

The published prompt, token for token: a paragraph that says what comes, lines `line {adjective}-{noun}: REGISTER_CONTENT is <{number}>`
with distinct names and numbers of 1 to 50,000, and a question about one of them. Behind it stands the beginning of the answer that
LongEval gives to models without a chat template (`Line <...>: <REGISTER_CONTENT> is`), whose 15 tokens it looks at.
Right: the last integer in them is the number. `first`: the first one is (a model that has answered may go on with other lines).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zoo.eval import metrics
from zoo.eval.tasks.task import Answers, Draft, Material, Sample, at_depths, depth_of, fit
from zoo.eval.tasks.words import pair

HEADER = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a '<REGISTER_CONTENT>' at "
    "the end of the line as a numerical value. For each line index, memorize its corresponding <REGISTER_CONTENT>. At the end of the "
    "record, I will ask you to retrieve the corresponding <REGISTER_CONTENT> of a certain line index. Now the record start:\n\n"
)


def prompt(lines: Sequence[tuple[str, int]], target: str) -> tuple[str, str]:
    """The record, and the question about `target`."""
    record = "".join(f"line {name}: REGISTER_CONTENT is <{number}>\n" for name, number in lines)
    question = f"\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line {target}? I need the number. "
    return HEADER + record, question


class Lines(Answers):
    name = "lines"
    new_tokens = 15

    def variants(self, material: Material) -> list[str]:
        return at_depths("", material.depths)

    def sample(self, material: Material, variant: str, length: int, number: int) -> Sample:
        r = material.random(self.name, variant, length, number)
        share = depth_of(variant, r.random())
        record: dict[str, int] = {}  # grows as far as it must, so that a shorter record is the beginning of a longer one

        def write(count: int) -> Draft:
            while len(record) < count:
                record.setdefault(pair(r), r.randint(1, 50000))
            lines = list(record.items())[:count]
            name, right = lines[min(int(share * count), count - 1)]
            context, question = prompt(lines, name)
            return Draft(context, f"{question}Line <{name}>: <REGISTER_CONTENT> is", f" <{right}>", str(right))

        return fit(material.tokenizer, length, 1, write, self.name)

    def judge(self, said: str, expected: Any) -> dict[str, float]:
        right = int(expected)
        return {"right": float(metrics.last_integer(said) == right), "first": float(metrics.first_integer(said) == right)}
