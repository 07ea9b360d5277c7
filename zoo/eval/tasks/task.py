"""What a task is, and the prompts that tasks make: text that fits a number of tokens, cut where the question begins."""

from __future__ import annotations

import functools
import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from zoo.errors import ZooError
from zoo.eval import metrics
from zoo.eval.protocols import Run
from zoo.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sample:
    """One prompt. context: what a cache may compress before it knows the question. follow: the tokens that come after the prompt, of a text
    or of the right answer."""

    context: list[int]
    question: list[int]
    follow: list[int]
    expected: str | list[str] | None = None

    @property
    def hash(self) -> str:
        return hashlib.sha256(" ".join(map(str, self.context + self.question)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Material:
    """What samples are made of. text: a long text, and whether the user gave it (`own`). depths: where in it a needle is put, 0 to 1; none:
    anywhere. variants: of tasks that have some, by the task's name. data: lines of --data."""

    tokenizer: Tokenizer
    text: str
    seed: int = 0
    own: bool = False
    depths: tuple[float, ...] = ()
    variants: dict[str, tuple[str, ...]] = field(default_factory=dict)
    data: tuple[dict[str, Any], ...] = ()

    @functools.cached_property
    def ids(self) -> list[int]:
        """The text's tokens, without BOS."""
        return self.tokenizer.encode(self.text, bos=False)

    @functools.cached_property
    def bos(self) -> list[int]:
        return self.tokenizer.encode("")

    @functools.cached_property
    def sentences(self) -> list[str]:
        """The text's sentences, white space made one blank."""
        text = " ".join(self.text.split())
        ends = [i + 1 for i, c in enumerate(text[:-1]) if c in ".!?" and text[i + 1] == " "]
        return [text[a:b].strip() for a, b in zip([0, *ends], [*ends, len(text)], strict=True) if text[a:b].strip()]

    def passage(self, words: int, r: random.Random) -> list[str]:
        """Sentences of so many words in all, from a random one on; the text begins again where it ends, and the last may be cut."""
        start, out = r.randrange(len(self.sentences)), []
        while words > 0:
            some = self.sentences[start % len(self.sentences)].split()[:words]
            out.append(" ".join(some))
            words, start = words - len(some), start + 1
        return out

    def random(self, *about: Any) -> random.Random:
        """A generator of its own for each prompt: a sample is the same whatever else is run."""
        return random.Random(" ".join(map(str, (self.seed, *about))))


class Task(ABC):
    name: ClassVar[str]
    asks: ClassVar[bool] = True  # whether there is a question, which a cache may or may not know while it compresses
    compares: ClassVar[bool] = False  # whether a row needs what the full cache did
    whole: ClassVar[bool] = False  # whether `stream` looks at the tokens of the prompt, too
    uneven: ClassVar[bool] = False  # whether one prompt may not fit where the others do
    new_tokens: int = 32  # that may follow the prompt

    def variants(self, material: Material) -> list[str]:
        return [""]

    @abstractmethod
    def sample(self, material: Material, variant: str, length: int, number: int) -> Sample:
        """The prompt of this number, of at most `length` tokens. Raises ZooError where none fits."""

    def forward(self, lm: Any, sample: Sample) -> Any:
        """What reads tokens in the model's place; None: the model."""
        return None

    @abstractmethod
    def watch(self, run: Run, sample: Sample) -> Any:
        """Let the run go on behind its prompt (and question), and tell what happened."""

    @abstractmethod
    def scores(self, seen: Any, full: Any, sample: Sample, protocol: str) -> dict[str, Any]:
        """Of what `watch` saw; `full` is what it saw of the full cache, where the task compares."""

    def answer(self, seen: Any) -> str | None:
        return None

    def more(self, seen: Any, full: Any) -> dict[str, Any]:
        """Further keys of a row."""
        return {}


AFTER = 256  # tokens that a passage task looks at


class Passages(Task):
    """Prompts that are passages of a text; the tokens behind them are true. No two samples of one length overlap."""

    asks = False
    new_tokens = AFTER

    def sample(self, material: Material, variant: str, length: int, number: int) -> Sample:
        room = length - len(material.bos)
        if room < 1:
            raise ZooError(f"{self.name}: a length of {length} tokens is too short")
        size = room + AFTER
        count = len(material.ids) // size
        if number >= count:
            raise ZooError(f"the text has only {count} passages of {length} + {AFTER} tokens; give a longer --text, or fewer --samples")
        start = size * material.random("passages", length).sample(range(count), count)[number]
        ids = material.ids[start : start + size]
        return Sample(material.bos + ids[:room], [], ids[room:])


class Answers(Task):
    """Prompts that end in a question. Scored twice: by what the model says, greedily, and by the log-probability of the right answer in
    the model's own terms, which tells methods apart where a small model never says it."""

    def watch(self, run: Run, sample: Sample) -> tuple[str, float]:
        talk = run.clone()
        said = talk.reply(self.new_tokens, lambda said: self.settled(said, sample.expected))
        run.peak, run.steps = max(run.peak, talk.peak), talk.steps
        return said, run.logprob(sample.follow)

    def scores(self, seen: tuple[str, float], full: Any, sample: Sample, protocol: str) -> dict[str, Any]:
        return {**self.judge(seen[0], sample.expected), "logprob": seen[1]}

    def answer(self, seen: tuple[str, float]) -> str:
        return seen[0]

    def settled(self, said: str, expected: Any) -> bool:
        """Whether nothing that may still be said changes the score."""
        return self.judge(said, expected) == {"right": 1} and type(self).judge is Answers.judge

    def judge(self, said: str, expected: Any) -> dict[str, float]:
        """`right`: the share of the expected strings that were said."""
        return {"right": metrics.found(said, [expected] if isinstance(expected, str) else expected)}


@dataclass(frozen=True)
class Draft:
    """A prompt as text. A format's answer prefix, where it has one, ends the question."""

    context: str
    question: str
    answer: str
    expected: str | list[str]


def tokens(tokenizer: Tokenizer, draft: Draft) -> Sample:
    """The whole prompt is encoded at once, so that it is, token for token, what the format says; the context ends with the last token that
    the question has no part in."""
    whole = draft.context + draft.question
    ids = tokenizer.encode(whole)
    alone = tokenizer.encode(draft.context)
    cut = next((i for i, (a, b) in enumerate(zip(ids, alone, strict=False)) if a != b), min(len(ids), len(alone)))
    right = tokenizer.encode(whole + draft.answer)
    answer = right[len(ids) :] if right[: len(ids)] == ids else tokenizer.encode(draft.answer, bos=False)
    return Sample(ids[:cut], ids[cut:], answer, draft.expected)


def fit(tokenizer: Tokenizer, length: int, least: int, write: Callable[[int], Draft], what: str, most: int = 2**40) -> Sample:
    """The prompt of at most `length` tokens with as many parts as fit, `least` to `most`. write(parts) -> Draft. Raises ZooError."""

    def size(parts: int) -> int:
        draft = write(parts)
        return len(tokenizer.encode(draft.context + draft.question))

    parts = largest(size, length, least, most)
    if parts is None:
        raise ZooError(f"{what}: the shortest prompt has {size(least)} tokens, more than --lengths {length}")
    return tokens(tokenizer, write(parts))


def largest(size: Callable[[int], int], room: int, least: int, most: int = 2**40) -> int | None:
    """The largest n, `least` to `most`, with size(n) <= room, of a size that grows by about as much each time: few looks, since each
    encodes a text. None where not even size(least) fits."""
    fits, low = least, size(least)
    if low > room:
        return None
    over = min(2 * least + 8, most)
    high = size(over)
    while high <= room:
        if over == most:
            return most
        each = max(0.1, (high - low) / (over - fits))
        fits, low, over = over, high, min(most, over + 1 + int((room - high) / each * 1.05))
        high = size(over)
    looks = 0
    while over - fits > 1:
        looks += 1
        guess = fits + (room - low) * (over - fits) // max(1, high - low)
        n = (fits + over) // 2 if looks % 4 == 0 else min(max(guess, fits + 1), over - 1)
        if (at := size(n)) <= room:
            fits, low = n, at
        else:
            over, high = n, at
    return fits


def at_depths(kind: str, depths: Sequence[float]) -> list[str]:
    """The variants of a kind, one for each depth; the kind itself where none is asked for."""
    return [f"{kind},depth={d:g}".lstrip(",") for d in depths] or [kind]


def depth_of(variant: str, otherwise: float) -> float:
    _, equals, depth = variant.partition("depth=")
    return float(depth) if equals else otherwise


def joined(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + ", and " + words[-1] if len(words) > 1 else words[0]
