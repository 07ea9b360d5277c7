"""zoo.eval's prompts: the published formats, as close to the asked length as they come, the same for the same seed."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import CORPUS

import zoo
from zoo.errors import ZooError
from zoo.eval.tasks import TASKS, Material, lines, niah
from zoo.eval.tasks.data import parse
from zoo.eval.tasks.task import AFTER, Draft, largest, tokens

TEXT = "".join(f"Chapter {i}. {CORPUS}" for i in range(12))
PROMPTS = [name for name in TASKS if name != "data"]
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@pytest.fixture(scope="module")
def lm(tiny: Path) -> zoo.LM:
    return zoo.load(str(tiny))


@pytest.fixture
def material(lm: zoo.LM) -> Material:
    return Material(lm.tokenizer, TEXT)


def whole(material: Material, name: str, variant: str = "", length: int = 2000, number: int = 0) -> str:
    """A sample's prompt as text."""
    s = TASKS[name]().sample(material, variant, length, number)
    return material.tokenizer.decode(s.context + s.question)


def test_a_line_retrieval_prompt_is_the_published_one(material: Material) -> None:
    """LongEval's first test case of 200 lines, cut to four of them: token for token."""
    record = [("grotesque-classmate", 42527), ("imperfect-bull", 3119), ("torpid-kid", 2416), ("wide-eyed-hearthside", 37793)]
    published = (
        "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a '<REGISTER_CONTENT>' "
        "at the end of the line as a numerical value. For each line index, memorize its corresponding <REGISTER_CONTENT>. At the end of "
        "the record, I will ask you to retrieve the corresponding <REGISTER_CONTENT> of a certain line index. Now the record start:\n\n"
        "line grotesque-classmate: REGISTER_CONTENT is <42527>\nline imperfect-bull: REGISTER_CONTENT is <3119>\n"
        "line torpid-kid: REGISTER_CONTENT is <2416>\nline wide-eyed-hearthside: REGISTER_CONTENT is <37793>\n"
        "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line torpid-kid? I need the number. "
    )
    context, question = lines.prompt(record, "torpid-kid")
    s = tokens(material.tokenizer, Draft(context, question, "", ""))
    assert s.context + s.question == material.tokenizer.encode(published)
    assert material.tokenizer.decode(s.question).strip().startswith("Now the record is over.")


class Runs:
    """A tokenizer in which blank lines are one token, as in many: no text can be cut anywhere without changing its ids."""

    def encode(self, text: str, bos: bool = True) -> list[int]:
        return [0] * bos + [len(run) * 1000 + ord(run[0]) for run in re.findall(r"\n+|[^\n]", text)]


def test_the_question_begins_with_the_token_that_has_a_part_of_it() -> None:
    runs: Any = Runs()
    s = tokens(runs, Draft("ab\n", "\nc\n", " d", "d"))
    assert s.context + s.question == runs.encode("ab\n\nc\n")
    assert s.context == runs.encode("ab")
    assert s.follow == runs.encode(" d", bos=False)
    s = tokens(runs, Draft("ab", "\nc\n", "\nd", "d"))  # an answer that would change the question's last token is encoded by itself
    assert (s.context, s.question, s.follow) == (runs.encode("ab"), runs.encode("\nc\n", False), runs.encode("\nd", False))


def test_lines_are_made_in_that_form(material: Material) -> None:
    pytest.importorskip("wonderwords")
    s = TASKS["lines"]().sample(material, "", 2000, 3)
    context, question = material.tokenizer.decode(s.context), material.tokenizer.decode(s.question)
    found = [line.removeprefix("line ").split(": REGISTER_CONTENT is ") for line in context.removeprefix(lines.HEADER).splitlines() if line]
    record = [(name, int(number.strip("<>"))) for name, number in found]
    assert len(record) > 10
    assert len({name for name, _ in record}) == len(record)
    assert all(1 <= number <= 50000 for _, number in record)
    asked = question.split("in line ")[1].split("?")[0]
    assert str(dict(record)[asked]) == s.expected
    assert material.tokenizer.decode(s.follow) == f" <{s.expected}>"
    assert context + question == "".join(lines.prompt(record, asked)) + f"Line <{asked}>: <REGISTER_CONTENT> is"


@pytest.mark.parametrize(("depth", "place"), [("0", 0), ("0.5", None), ("1", -1)])
def test_lines_at_depths(material: Material, depth: str, place: int | None) -> None:
    pytest.importorskip("wonderwords")
    s = TASKS["lines"]().sample(material, f"depth={depth}", 2000, 0)
    numbers = [line.split("<")[-1][:-1] for line in material.tokenizer.decode(s.context).splitlines() if line.startswith("line ")]
    assert numbers.index(str(s.expected)) == (len(numbers) // 2 if place is None else place % len(numbers))


def test_passkey_is_the_published_one(material: Material) -> None:
    s = TASKS["passkey"]().sample(material, "depth=0.25", 1000, 0)
    task, before, key, after, question = material.tokenizer.decode(s.context + s.question).split("\n")
    assert task == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about the important "
        "information there."
    )
    assert key == f"The pass key is {s.expected}. Remember it. {s.expected} is the pass key."
    assert question == "What is the pass key? The pass key is"
    endless = " ".join([FILLER] * 100)
    assert endless.startswith(before)
    assert endless.startswith(after)
    assert len(before) == int(0.25 * (len(before) + len(after)))
    assert material.tokenizer.decode(s.follow) == f" {s.expected}"
    keys = [int(str(TASKS["passkey"]().sample(material, "", 400, i).expected)) for i in range(40)]
    assert 1 <= min(keys) < 5000
    assert 45000 < max(keys) <= 50000


def test_niah_is_in_rulers_form(material: Material) -> None:
    """Word for word, in the singular and in the plural."""
    pytest.importorskip("wonderwords")
    s = TASKS["niah"]().sample(material, "single", 2000, 0)
    text = material.tokenizer.decode(s.context + s.question)
    (value,) = s.expected or []
    (needle,) = [line for line in text.split("\n") if line.startswith("One of")]
    key = needle.removeprefix("One of the special magic numbers for ").removesuffix(f" is: {value}.")
    noise = text.split("\n")[1:-1]
    assert text == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the number "
        "afterwards.\n" + "\n".join(noise) + f"\nWhat is the special magic number for {key} mentioned in the provided text? "
        f"The special magic number for {key} mentioned in the provided text is"
    )
    assert set(noise) == {FILLER, needle}
    assert len(value) == 7

    text = whole(material, "niah", "multiquery")
    needles = [line for line in text.split("\n") if line.startswith("One of")]
    keys = [n.split(" for ")[1].split(" is: ")[0] for n in needles]
    query = text.split("special magic numbers for ")[-1].split(" mentioned")[0]
    assert sorted(query.replace("and ", "").split(", ")) == sorted(keys)
    assert text.startswith("Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz")
    assert text.endswith(f"What are all the special magic numbers for {query} mentioned in the provided text? "
                         f"The special magic numbers for {query} mentioned in the provided text are")  # fmt: skip


@pytest.mark.parametrize(("kind", "keys", "needles", "answers"), [("multikey", 4, 4, 1), ("multivalue", 1, 4, 4), ("multiquery", 4, 4, 4)])
def test_niah_counts(material: Material, kind: str, keys: int, needles: int, answers: int) -> None:
    pytest.importorskip("wonderwords")
    for own in (False, True):
        m = dataclasses.replace(material, own=own)
        s = TASKS["niah"]().sample(m, kind, 3000, 1)
        found = [part.split(".")[0] for part in m.tokenizer.decode(s.context).split("One of the special magic numbers for ")[1:]]
        assert len(found) == needles
        assert len({f.split(" is: ")[0] for f in found}) == keys
        assert isinstance(s.expected, list)
        assert len(s.expected) == answers
        assert set(s.expected) <= {f.split(" is: ")[1] for f in found}


def test_depths(material: Material) -> None:
    """The needle stands where the grid says, in noise and in a text."""
    pytest.importorskip("wonderwords")
    for own in (False, True):
        m = dataclasses.replace(material, own=own, depths=(0.0, 0.5, 1.0), variants={"niah": ("single",)})
        for name, sign in (("passkey", "The pass key is"), ("niah", "One of the special"), ("needle", "The best thing"), ("lines", None)):
            task = TASKS[name]()
            prefix = "single," if name == "niah" else ""
            assert task.variants(m) == [f"{prefix}depth={d}" for d in ("0", "0.5", "1")]
            for d in m.depths:
                s = task.sample(m, f"{prefix}depth={d:g}", 2500, 0)
                text = m.tokenizer.decode(s.context)
                at = text.index(sign or f"<{s.expected}>") / len(text)
                assert at == pytest.approx(0.08 + 0.84 * d if name != "lines" else 0.2 + 0.8 * d, abs=0.13), (name, own, d)


def test_needle_stands_between_sentences(material: Material) -> None:
    text = whole(material, "needle", "depth=0.5", 1500)
    at = text.index("The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.")
    assert text[at - 2] in ".!?"
    assert text.startswith("This is a very long story book: <book> ")
    assert text.endswith(" </book>.\nBased on the content of the book, Question: The best thing to do in San Francisco is: \nAnswer:")
    begins = {whole(material, "needle", f"depth={d:g}", 1500)[:200] for d in (0.25, 0.5, 0.75)}
    assert len(begins) == 3  # depths are not compared on one passage


def test_variable_tracking(material: Material) -> None:
    """Five names, each assigned the one before it, in this order; an example with its answer comes first."""
    s = TASKS["vt"]().sample(material, "", 4000, 0)
    text = material.tokenizer.decode(s.context + s.question)
    start = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    empty, example, own = text.split(start)
    assert not empty
    assert isinstance(s.expected, list)
    steps = [line for line in own.split("\n") if line.startswith("VAR")]
    value = steps[0].split(" = ")[1]
    assert steps == [f"VAR {s.expected[0]} = {value}"] + [f"VAR {b} = VAR {a} " for a, b in pairwise(s.expected)]
    assert len(steps) == len(s.expected) == 5
    assert all(len(name) == 5 and name.isupper() for name in s.expected)
    assert set(own.split("\n")) - set(steps) - {FILLER} == {own.split("\n")[-1]}
    question = (
        "Question: Find all variables that are assigned the value {} in the text above. Answer: According to the chain(s) of variable "
        "assignment in the text above, 5 variables are assigned the value {}, they are: "
    )
    assert own.endswith("\n" + question.format(value, value))
    names = [line.split()[1] for line in example.split("\n") if line.startswith("VAR")]
    other = example.split(f"VAR {names[0]} = ")[1].split("\n")[0]
    assert example.endswith("\n" + question.format(other, other) + " " + " ".join(names) + "\n\n")


@pytest.mark.parametrize(("length", "often", "seldom", "shown"), [(3000, 6, 1, (3, 1)), (6000, 30, 3, (10, 3))])
def test_common_words(material: Material, length: int, often: int, seldom: int, shown: tuple[int, int]) -> None:
    pytest.importorskip("wonderwords")
    s = TASKS["cwe"]().sample(material, "", length, 0)
    text = material.tokenizer.decode(s.context)
    empty, example, own = text.split(
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most often.\n"
    )
    assert not empty
    for part, counts in ((example.split("\nQuestion")[0], shown), (own, (often, seldom))):
        words = [w.split(" ", 1)[1] for w in part.replace(". ", ".\0 ").split("\0") if " " in w]
        words = [w.rsplit(" ", 1)[0] if w.rsplit(" ", 1)[-1].rstrip(".").isdigit() else w for w in words]
        found = {w: words.count(w) for w in words}
        assert set(found.values()) == set(counts)
        assert sum(n == counts[0] for n in found.values()) == 10
    assert isinstance(s.expected, list)
    assert {w for w, n in found.items() if n == often} == set(s.expected)
    assert material.tokenizer.decode(s.question) == (
        "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most often in the list are:"
    )


def test_frequent_words(material: Material) -> None:
    """Counts fall as 1/k^2, noise first."""
    s = TASKS["fwe"]().sample(material, "", 4000, 0)
    text = material.tokenizer.decode(s.context)
    head = "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded words. "
    assert text.startswith(head)
    words = text.removeprefix(head).split()
    counts = sorted(((words.count(w), w) for w in set(words)), reverse=True)
    assert counts[0][1] == "..."
    assert [w for _, w in counts[1:4]] == s.expected
    for k, (n, _) in enumerate(counts[:4], 1):
        assert n == pytest.approx(counts[0][0] / k**2, abs=1)
    assert material.tokenizer.decode(s.question) == (
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared words in "
        "the above coded text? Answer: According to the coded text above, the three most frequently appeared words are:"
    )


def test_passages_are_of_the_text_and_apart(material: Material) -> None:
    task, ids = TASKS["kl"](), material.ids
    count = len(ids) // (700 + AFTER)
    starts = []
    for number in range(count):
        s = task.sample(material, "", 700, number)
        assert (len(s.context), s.question, len(s.follow)) == (700, [], AFTER)
        starts += [i for i in range(len(ids)) if ids[i : i + 956] == s.context + s.follow]
    assert len(starts) == count >= 4
    assert min(b - a for a, b in pairwise(sorted(starts))) >= 956
    with pytest.raises(ZooError, match=f"only {count} passages of 700"):
        task.sample(material, "", 700, count)


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("length", [1600, 2111])
def test_prompts_fit_closely(material: Material, name: str, length: int) -> None:
    """Never longer than asked, and less than one part shorter; whole prompts are what the tokenizer makes of their text."""
    if name in ("lines", "niah", "cwe"):
        pytest.importorskip("wonderwords")
    task = TASKS[name]()
    most = {"passkey": 3, "lines": 60, "niah": 110, "vt": 110, "cwe": 40, "fwe": 40, "needle": 12}.get(name, 0)
    for own in (False, True):
        m = dataclasses.replace(material, own=own)
        for variant in task.variants(m):
            for number in (0, 1):
                s = task.sample(m, variant, length, number)
                ids = s.context + s.question
                assert length - most <= len(ids) <= length
                assert s.follow
                if task.asks:
                    assert s.question
                    assert m.tokenizer.encode(m.tokenizer.decode(ids)) == ids


@pytest.mark.parametrize("name", PROMPTS)
def test_samples_come_from_the_seed(material: Material, name: str) -> None:
    """The same again, another for another number, length or seed."""
    if name in ("lines", "niah", "cwe"):
        pytest.importorskip("wonderwords")
    again, other = (Material(material.tokenizer, TEXT, seed) for seed in (0, 1))
    variant = TASKS[name]().variants(material)[0]
    s = TASKS[name]().sample(material, variant, 1600, 1)
    assert TASKS[name]().sample(again, variant, 1600, 1) == s
    assert TASKS[name]().sample(again, variant, 1600, 1).hash == s.hash
    assert TASKS[name]().sample(again, variant, 1600, 0).hash != s.hash
    assert TASKS[name]().sample(again, variant, 1700, 1).hash != s.hash
    assert TASKS[name]().sample(other, variant, 1600, 1).hash != s.hash


@pytest.mark.parametrize("name", ["lines", "niah", "cwe", "vt", "fwe", "needle", "passkey", "kl"])
def test_too_short_a_length_is_one_line(material: Material, name: str) -> None:
    if name in ("lines", "niah", "cwe"):
        pytest.importorskip("wonderwords")
    task = TASKS[name]()
    with pytest.raises(ZooError, match=r"too short|shortest prompt has \d+ tokens, more than --lengths"):
        task.sample(material, task.variants(material)[0], 0 if name == "kl" else 20, 0)


def test_without_wonderwords(material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.eval.tasks import words

    words.words.cache_clear()
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    with pytest.raises(ZooError, match="pip install wonderwords"):
        niah.Needles().sample(material, "single", 2000, 0)
    words.words.cache_clear()


@pytest.mark.parametrize("cost", [1, 3.7, 40])
def test_largest_is_the_largest(cost: float) -> None:
    """Of sizes that grow evenly and of bumpy ones; with few looks."""
    for bumpy in (0, 5):
        looks = []

        def size(n: int, bumpy: int = bumpy, looks: list[int] = looks) -> int:
            looks.append(n)
            return int(30 + cost * n + (n * 7919 % (bumpy + 1)))

        for room in (100, 1000, 50000):
            looks.clear()
            n = largest(size, room, 1)
            assert n is not None
            assert size(n) <= room
            if not bumpy:
                assert size(n + 1) > room
            assert len(looks) < 30
    assert largest(lambda n: n, 10, 11) is None
    assert largest(lambda n: n, 1000, 1, most=50) == 50


def test_own_data(material: Material, tmp_path: Path) -> None:
    """A context that fits stays as it is; of one that does not, the middle goes."""
    item = {"context": "Once upon a time. " * 300 + "The end.", "input": "Who?", "answers": ["Nobody", "No one"]}
    m = dataclasses.replace(material, data=parse(json.dumps(item) + "\n\n" + json.dumps(item | {"context": "Short."}), "x"))
    long, short = (TASKS["data"]().sample(m, "", 600, i) for i in (0, 1))
    before, text, after = m.tokenizer.decode(long.context + long.question).split("\n\n", 2)
    assert before == "Read the following text and answer briefly."
    assert after == (
        "Now, answer the following question based on the above text, only give me the answer and do not output any other words.\n\n"
        "Question: Who?\nAnswer:"
    )
    assert 590 <= len(long.context + long.question) <= 600
    assert item["context"].startswith(text[: len(text) // 2 - 1])  # type: ignore[attr-defined]
    assert text.endswith("The end.")
    assert "\n\nShort.\n\n" in m.tokenizer.decode(short.context + short.question)
    assert (long.expected, m.tokenizer.decode(long.follow)) == (["Nobody", "No one"], " Nobody")
    with pytest.raises(ZooError, match="only 2 lines"):
        TASKS["data"]().sample(m, "", 600, 2)


def test_data_is_cut_at_line_feeds_alone() -> None:
    line = '{"context": "one\u2028two\x85three", "answers": ["b"]}'
    assert [item["context"] for item in parse(line + "\r\n" + line, "file.jsonl")] == ["one\u2028two\x85three"] * 2


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"context": "a", "answers": []}',
        '{"context": 1, "answers": ["a"]}',
        '{"context": "a", "answers": [" "]}',
        '{"input": "a"}',
    ],
)
def test_bad_data_names_its_line(line: str) -> None:
    good: dict[str, Any] = {"context": "a", "answers": ["b"]}
    with pytest.raises(ZooError, match=r"file.jsonl, line 2: expected"):
        parse(json.dumps(good) + "\n" + line, "file.jsonl")
    with pytest.raises(ZooError, match="has no lines"):
        parse("\n", "file.jsonl")
