"""Which rows there are, and how they come about: prompt by prompt, each read as rarely as possible.

Samples are the outermost loop: a run that is stopped early has some samples of every cell rather than all of a few. For one prompt, the
methods that read it alike (`prefill`: the same method with other budgets) share one reading, a copy of which each compresses; what has no
protocol (`full`, `sliding`) runs once for both; and what the full cache did is kept for the tasks that compare with it.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from zoo.attention.budgeted import Budgeted
from zoo.attention.encoding import Encoding
from zoo.errors import ZooError
from zoo.eval import protocols
from zoo.eval.protocols import PACE, FullBytes, Run, method_of, same_reading
from zoo.eval.records import Records
from zoo.eval.tasks import Material, Sample, Task
from zoo.lm import LM


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was asked for."""

    tasks: dict[str, Task]
    attn: Sequence[str]
    protocols: Sequence[str]
    questions: Sequence[str]
    lengths: Sequence[int]
    samples: int
    seed: int

    def prompts(self, material: Material) -> Iterator[tuple[int, str, str, int]]:
        """(sample, task, variant, length), in the order in which they are run."""
        for number in range(self.samples):
            for name, task in self.tasks.items():
                for variant in task.variants(material):
                    for length in self.lengths:
                        yield number, name, variant, length

    def rows(self, task: Task) -> list[tuple[str, str, str]]:
        """(question, protocol, spelling) of each row of a prompt."""
        questions = self.questions if task.asks else [""]
        return [(q, p, attn) for q in questions for p in self.protocols for attn in self.attn]

    def weight(self, length: int) -> float:
        """What a row takes, about: products with weights, and attention that grows with the square."""
        return length + length**2 / 4096


@dataclasses.dataclass
class Outcome:
    """What one method did on one prompt."""

    seen: Any
    tokens: int
    nbytes: dict[str, int]
    rate: dict[str, float | None]


class Prompt:
    """One prompt, and what is known of it so far."""

    def __init__(self, lm: LM, task: Task, sample: Sample, full_bytes: FullBytes, whole: bool) -> None:
        self.lm, self.task, self.sample, self.full_bytes = lm, task, sample, full_bytes
        self.whole = whole and task.whole  # whether some row looks at the tokens of the prompt
        self.forward = task.forward(lm, sample)
        self.kept: dict[Any, Outcome] = {}  # of methods without a protocol

    def ids(self, question: str) -> list[int]:
        s = self.sample
        return s.context if question == "unseen" else s.context + s.question

    def full(self) -> Outcome:
        return self.once("full", "", "prefill")

    def once(self, spelling: str, question: str, protocol: str) -> Outcome:
        """Of a method without a protocol. A full cache does not care, either, whether it knows the question, which always comes after it:
        its numbers must not depend on what was run before."""
        if spelling == "full":
            question = "unseen" if self.task.asks else ""
        key = (spelling, question)
        if key not in self.kept:
            run = self.read(method_of(spelling, protocol, len(self.ids(question))), question, self.whole)
            self.kept[key] = self.finish(protocols.end(run), question)
        return self.kept[key]

    def read(self, method: Any, question: str, inside: bool) -> Run:
        more = len(self.sample.question) + self.task.new_tokens + PACE
        return protocols.read(self.lm, method, self.ids(question), more, self.forward, inside)

    def finish(self, run: Run, question: str) -> Outcome:
        """Ask, watch, and take down what it took."""
        read = run.tokens
        if question == "unseen":
            run.ask(self.sample.question)
        seen = self.task.watch(run, self.sample)
        size, full = run.cache.nbytes(), self.full_bytes(run.tokens)
        nbytes = {"peak": run.peak, "final": size.used, "full": full, "tokens": run.tokens, "allocated": size.allocated}
        if not run.steps and self.forward is None:
            run.pace()
        step = statistics.median(run.steps) if run.steps else None
        rate = {"prefill": read / run.seconds, "decode": 1 / step if step else None}
        return Outcome(seen, len(self.sample.context) + len(self.sample.question), nbytes, rate)

    def outcomes(
        self, rows: Sequence[tuple[str, str, str]], done: Collection[tuple[str, str, str]] = ()
    ) -> Iterator[tuple[tuple[str, str, str], Outcome]]:
        """Of these rows, those of one reading together, without those that are done: in the same order, whatever is done already."""
        readings: dict[Any, list[tuple[tuple[str, str, str], Any]]] = {}
        for row in rows:
            question, protocol, spelling = row
            method = method_of(spelling, protocol, len(self.ids(question)))
            alike = (question, protocol, same_reading(method) if protocol == "prefill" else spelling)
            readings.setdefault(alike, []).append((row, method))
        for (question, protocol, _), alike_rows in readings.items():
            some = [(row, method) for row, method in alike_rows if row not in done]
            if not some:
                continue
            if not isinstance(some[0][1], (Budgeted, Encoding)):
                yield from ((row, self.once(row[2], question, protocol)) for row, _ in some)
                continue
            run = self.read(some[0][1], question, self.whole and protocol == "stream")
            for i, (row, method) in enumerate(some):
                last = i + 1 == len(some)
                one = run if last else run.clone()
                if len(some) > 1:
                    protocols.adopt(one.cache, method)
                yield row, self.finish(protocols.end(one), question)


def record(row: tuple[str, str, str], outcome: Outcome, prompt: Prompt, about: dict[str, Any], seed: int) -> dict[str, Any]:
    question, protocol, spelling = row
    task, sample = prompt.task, prompt.sample
    full = prompt.full().seen if task.compares else None
    return {
        "task": about["task"],
        "variant": about["variant"],
        "attn": spelling,
        "protocol": protocol,
        "question": question,
        "length": about["length"],
        "tokens": outcome.tokens,
        "sample": about["sample"],
        "seed": seed,
        "prompt": sample.hash,
        "scores": task.scores(outcome.seen, full, sample, protocol),
        "answer": task.answer(outcome.seen),
        "expected": sample.expected,
        "bytes": outcome.nbytes,
        **task.more(outcome.seen, full),
    }


def room(lm: LM, task: Task, length: int) -> int:
    """Tokens of a prompt of this asked length: what follows it must fit the model's context, too."""
    return min(length, lm.config.max_position_embeddings - task.new_tokens - PACE)


def check(lm: LM, plan: Plan, material: Material) -> None:
    """Raises ZooError for what this model, text or tokenizer cannot be asked: before the first hour rather than after it."""
    most = lm.config.max_position_embeddings
    if (longest := max(plan.lengths)) > most:
        raise ZooError(f"--lengths {longest}: this model's context holds {most} tokens")
    for attn in plan.attn:
        for protocol in plan.protocols:
            lm.attn = method_of(attn, protocol, min(plan.lengths))
            lm.new_cache(max_tokens=1)
    for number, name, variant, length in plan.prompts(material):
        if number == plan.samples - 1 or plan.tasks[name].uneven:
            plan.tasks[name].sample(material, variant, room(lm, plan.tasks[name], length), number)


def run(lm: LM, plan: Plan, material: Material, records: Records, progress: Any) -> None:
    """Everything that records do not have yet. progress(weight done, weight in all, what)."""
    full_bytes, todo = FullBytes(lm), []
    for number, name, variant, length in plan.prompts(material):
        rows = plan.rows(plan.tasks[name])
        done = {(q, p, a) for q, p, a in rows if (name, variant, a, p, q, length, number, plan.seed) in records.done}
        if len(done) < len(rows):
            todo.append((number, name, variant, length, done))
    total, so_far = 0.0, 0.0
    for _, name, _, length, done in todo:
        total += (len(plan.rows(plan.tasks[name])) - len(done)) * plan.weight(length)
    for number, name, variant, length, done in todo:
        task = plan.tasks[name]
        about = {"task": name, "variant": variant, "length": length, "sample": number}
        what = f"{name} {variant} {length} tokens, sample {number + 1} of {plan.samples}".replace("  ", " ")
        progress(so_far, total, what)
        sample = task.sample(material, variant, room(lm, task, length), number)
        prompt = Prompt(lm, task, sample, full_bytes, "stream" in plan.protocols)
        for row, outcome in prompt.outcomes(plan.rows(task), done):
            records.add(record(row, outcome, prompt, about, plan.seed), outcome.rate)
            so_far += plan.weight(length)
            progress(so_far, total, what)
