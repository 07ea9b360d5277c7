"""`data`: questions of your own, in the form of LongBench's files (arXiv 2308.14508): a JSON object on each line with

    context   a text        input   a question about it, may be empty        answers   a list of right answers
A context that is too long loses its middle, as in LongBench. The prompt is LongBench's for questions about a text. 64 tokens are generated,
up to the first line's end; f1, rouge_l, exact and edit (similarity) are each the best over the answers, and logprob is of the first one.
"""

from __future__ import annotations

import json
from typing import Any

from zoo.errors import ZooError
from zoo.eval import metrics
from zoo.eval.tasks.task import Answers, Draft, Material, Sample, fit, tokens

BEFORE = "Read the following text and answer briefly.\n\n"
AFTER = (
    "\n\nNow, answer the following question based on the above text, only give me the answer and do not output any other words.\n\n"
    "Question: {input}\nAnswer:"
)


def parse(text: str, path: str) -> tuple[dict[str, Any], ...]:
    """The lines of a file. Raises ZooError, naming the line."""
    out = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            good = isinstance(item["context"], str) and isinstance(item.get("input", ""), str) and isinstance(item["answers"], list)
            good = good and item["answers"] and all(isinstance(a, str) and a.strip() for a in item["answers"])
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise ZooError(f'{path}, line {number}: expected {{"context": text, "input": text, "answers": [text, ...]}}')
        out.append(item)
    if not out:
        raise ZooError(f"{path} has no lines")
    return tuple(out)


class Data(Answers):
    name = "data"
    new_tokens = 64

    def sample(self, material: Material, variant: str, length: int, number: int) -> Sample:
        if number >= len(material.data):
            raise ZooError(f"--data has only {len(material.data)} lines; ask for fewer --samples")
        item = material.data[number]
        context, question = item["context"], AFTER.format(input=item.get("input", ""))

        def write(characters: int) -> Draft:
            half = characters // 2
            kept = context if characters >= len(context) else context[:half] + context[len(context) - (characters - half) :]
            return Draft(BEFORE + kept, question, f" {item['answers'][0].strip()}", item["answers"])

        if len((whole := tokens(material.tokenizer, write(len(context)))).context) + len(whole.question) <= length:
            return whole
        return fit(material.tokenizer, length, 0, write, f"--data, line {number + 1}", most=len(context))

    def judge(self, said: str, expected: Any) -> dict[str, float]:
        line = said.strip().partition("\n")[0]
        each = {"f1": metrics.f1, "rouge_l": metrics.rouge_l, "exact": metrics.exact, "edit": metrics.edit}
        return {name: metrics.best(metric, line, expected) for name, metric in each.items()}
