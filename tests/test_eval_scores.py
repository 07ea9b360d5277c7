"""zoo.eval's metrics against values worked out by hand, and its intervals against cases whose bootstrap distribution is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from zoo.eval import metrics, stats
from zoo.eval.tasks import TASKS


def test_kl_and_top1() -> None:
    """KL of (1/2, 1/2) from (1/4, 3/4) is 1/2 log(4/3); of a distribution from itself 0. The mean is over tokens."""
    half = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    other = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    assert metrics.kl(half, other) == pytest.approx(0.5 * math.log(4 / 3) / 2, rel=1e-6)
    assert metrics.kl(other, half) == pytest.approx((0.25 * math.log(0.5) + 0.75 * math.log(1.5)) / 2, rel=1e-6)
    assert metrics.kl(other, other) == 0
    three = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0], [0.0, 3.0, 0.0]])
    assert metrics.top1(three, three.roll(1, 0)) == 0
    assert metrics.top1(three, three[[0, 1, 0]]) == pytest.approx(2 / 3)


def test_attention_errors_are_of_each_layer_and_head() -> None:
    """Of heads with outputs (3, 4): off by (3, 4) is an error of 1, off by 1 in one number of 1/5."""
    true = torch.tensor([3.0, 4.0]).expand(2, 3, 1, 2)
    other = true.clone()
    other[0, 1] *= 2
    other[1, 2, 0, 0] += 1
    assert torch.equal(metrics.errors(true, other), torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.2]], dtype=torch.float64))


def test_integers() -> None:
    assert metrics.first_integer("the 12 of 345") == 12
    assert metrics.last_integer("the 12 of 345.") == 345
    assert metrics.last_integer("<2416>") == 2416
    assert metrics.first_integer("none") is metrics.last_integer("none") is None


def test_found() -> None:
    assert metrics.found("It is BLUE, and 17", ["blue", "17", "red", "18"]) == 0.5
    assert metrics.words_found("Eat, in the park!", "eat a sandwich in Dolores Park") == pytest.approx(3 / 5)  # "a" does not count


@pytest.mark.parametrize(
    ("answer", "expected", "f1", "rouge", "exact", "edit"),
    [
        ("blue", "Blue.", 1, 0, 1, 1 - 2 / 5),  # case and punctuation count for neither f1 nor exact; ROUGE keeps the full stop
        ("the cat sat", "a cat sat down", 4 / 5, 2 * 2 / 7, 0, 1 - 8 / 14),  # words cat, sat of (cat, sat) and (cat, sat, down)
        ("b a c", "a b c", 1, 2 * 2 / 6, 1, 1 - 2 / 5),  # articles count for neither f1 nor exact; a common subsequence has length 2
        ("", "x", 0, 0, 0, 0),
        ("x x", "x", 2 / 3, 2 / 3, 0, 1 / 3),
    ],
)
def test_answers(answer: str, expected: str, f1: float, rouge: float, exact: float, edit: float) -> None:
    assert metrics.f1(answer, expected) == pytest.approx(f1)
    assert metrics.rouge_l(answer, expected) == pytest.approx(rouge)
    assert metrics.exact(answer, expected) == exact
    assert metrics.edit(answer, expected) == pytest.approx(edit)
    assert metrics.best(metrics.f1, answer, ["zzz", expected]) == pytest.approx(f1)


def test_edit_is_levenshtein() -> None:
    """kitten -> sitting takes 3 of 7."""
    assert metrics.edit("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert metrics.edit("", "") == metrics.edit("same", "same") == 1


@pytest.mark.parametrize(
    ("task", "said", "expected", "scores"),
    [
        ("passkey", " 123. And 9", "123", {"right": 1}),
        ("passkey", " 9. And 123", "123", {"right": 0}),
        ("passkey", " none", "123", {"right": 0}),
        ("lines", " <12>\nLine <x-y>: <77", "77", {"right": 1, "first": 0}),
        ("lines", " <77>", "77", {"right": 1, "first": 1}),
        ("niah", " 1, 2, and 3.", ["1", "3", "4", "5"], {"right": 0.5}),
        ("vt", " ABCDE fghij", ["ABCDE", "FGHIJ", "KLMNO"], {"right": 2 / 3}),
        ("needle", " eat a sandwich", "eat a sandwich and sit", {"right": 0, "words": 0.5}),
        ("data", " Blue.\nRed", ["green", "blue"], {"f1": 1, "rouge_l": 0, "exact": 1, "edit": 0.6}),
    ],
)
def test_judges(task: str, said: str, expected: Any, scores: dict[str, float]) -> None:
    got = TASKS[task]().judge(said, expected)  # type: ignore[attr-defined]
    assert got == pytest.approx(scores)
    assert set(got) <= set(metrics.BETTER)


def test_an_answer_ends_when_nothing_can_change_its_score() -> None:
    """Strings that were found stay found; a last integer does not."""
    assert TASKS["niah"]().settled(" 17 and 23", ["17", "23"])  # type: ignore[attr-defined]
    assert not TASKS["niah"]().settled(" 17 and 2", ["17", "23"])  # type: ignore[attr-defined]
    assert not TASKS["lines"]().settled(" <17", "17")  # type: ignore[attr-defined]
    assert not TASKS["passkey"]().settled(" 17", "17")  # type: ignore[attr-defined]


# Intervals


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([0, 1], 0, 1),  # means 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4
        ([0, 0, 3], 0, 3),  # P(mean = 3) = 1/27, more than 2.5 %
        ([0, 0, 0, 4], 0, 4),  # P(mean = 4) = 1/256, more than the 0.00012 that four values leave out on a side
        ([7, 7, 7, 7, 7], 7, 7),
    ],
)
def test_bootstrap_where_its_distribution_is_known(values: list[float], low: float, high: float) -> None:
    assert stats.interval(values) == (low, high)


def test_bootstrap_of_many_is_the_normal_interval() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(1)).double() * 3 + 10
    got = stats.interval(values.tolist())
    assert got is not None
    half = 1.96 * float(values.std()) / 20
    assert got == pytest.approx((float(values.mean()) - half, float(values.mean()) + half), abs=0.08 * half)
    assert stats.interval(values.tolist()) == got


def test_an_interval_of_few_misses_the_truth_as_seldom_as_it_says() -> None:
    values = torch.randn(2000, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    missed = sum(not low <= 0 <= high for low, high in (stats.interval(row, 1000) or (0, 0) for row in values.tolist()))
    assert 0.035 < missed / len(values) < 0.075  # plain percentiles miss it in 0.098 of all cases
    assert stats.tail(8) == pytest.approx(0.0057375, rel=1e-4)  # t = 2.364624 with 7 degrees of freedom
    assert stats.tail(10_000) == pytest.approx(0.025, rel=1e-3)


def test_one_value_has_no_interval() -> None:
    assert stats.interval([3.0]) is None
    assert stats.estimate([3.0]) == {"mean": 3.0, "low": None, "high": None, "n": 1}


def rows(attn: str, scores: list[float | None], final: int = 50, **changes: Any) -> list[dict[str, Any]]:
    base = {"task": "kl", "variant": "", "attn": attn, "protocol": "prefill", "question": "", "length": 8, "tokens": 8, "seed": 0}
    base |= {"bytes": {"peak": 100, "final": final, "full": 100, "tokens": 10}} | changes
    return [base | {"sample": i, "scores": {"kl": score}} for i, score in enumerate(scores)]


def test_methods_are_compared_prompt_by_prompt() -> None:
    """Prompts that differ by hundreds hide a difference of 1/2 from two means, but not from the pairs."""
    full, worse, same = [0.0, 100.0, 500.0, 900.0], [0.5, 100.5, 500.5, 900.5], [0.5, 99.5, 500.5, 899.5]
    cells = stats.summary([*rows("full", full), *rows("worse", worse), *rows("same", same)], baseline="worse")
    by = {cell["attn"]: cell["scores"]["kl"] for cell in cells}
    assert by["worse"]["low"] < by["full"]["mean"] < by["worse"]["high"]
    assert by["worse"]["to_full"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 4, "distinct": True}
    assert by["same"]["to_full"]["mean"] == 0
    assert by["same"]["to_full"]["distinct"] is False
    assert by["same"]["to_baseline"]["mean"] == -0.5
    assert by["full"]["to_full"] is by["worse"]["to_baseline"] is None


def test_only_what_was_asked_the_same_is_paired() -> None:
    """Another length, protocol, question, seed or depth is another prompt; what is missing is not compared."""
    a = rows("full", [1.0, 2.0, 3.0])
    for name, value in {"length": 9, "protocol": "stream", "question": "seen", "seed": 1, "variant": "x,depth=0.5"}.items():
        cells = stats.summary([*a, *rows("m", [5.0, 6.0], **{name: value})])
        assert cells[-1]["scores"]["kl"]["to_full"] is None
    assert stats.summary([*a, *rows("m", [5.0, 7.0, 9.0, 11.0])])[-1]["scores"]["kl"]["to_full"]["n"] == 3
    assert stats.summary([*a, *rows("m", [5.0, None, 9.0])])[-1]["scores"]["kl"]["n"] == 2


def test_depths_are_one_cell_and_bytes_are_shares() -> None:
    some = [
        *rows("m", [1.0, 2.0], variant="single,depth=0"),
        *rows("m", [5.0], 20, variant="single,depth=1"),
        *rows("m", [9.0], variant="multi"),
    ]
    one, other = stats.summary(some)
    assert (one["group"], one["n"], other["group"], other["n"]) == ("single", 3, "multi", 1)
    assert one["scores"]["kl"]["mean"] == pytest.approx(8 / 3, rel=1e-5)
    assert one["bytes"] == {"peak": 100, "final": 40, "full": 100, "per_token": 4.0, "share": 0.4, "peak_share": 1.0}


def test_numbers_in_files_are_short_and_finite() -> None:
    assert stats.rounded({"a": [1 / 3, math.nan, math.inf], "b": 12345678.9, "c": 12345678, "d": True}) == {
        "a": [0.333333, None, None], "b": 12345700.0, "c": 12345678, "d": True,
    }  # fmt: skip
