"""The CPU kernels' tests must fail where the kernels are wrong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernel_checks import require_cpu_kernels
from test_cpu_attention import few_only
from zoo.kernels import cpu

from zoo.folders import cache_folder

require_cpu_kernels()


QUICKLY = "-O1"
vnni = pytest.mark.skipif("avx512_vnni" not in cpu.processor(), reason="sums of bytes need AVX512-VNNI")
MUTANTS = [  # what is wrong: in which words
    ("a query does not see its own token", "pos <= at &&", "pos < at &&"),
    ("one token too many is in the window", "pos > at - window)", "pos >= at - window)"),
    ("scores are not scaled", "load(out + i) * scale", "load(out + i)"),
    ("log-weights are forgotten", "if (h.a)\n            for (int64_t j = 0; j < count; j++) x[j] += h.a[s + j];", ""),
    ("chunks are added without their maxima", "weight = std::exp(part[D] - max);", "weight = 1;"),
    ("the sum is not rescaled when the maximum grows", "*den *= shrink, *max = new_max;", "*max = new_max;"),
    ("the same for many rows", "store(&den[16 * m], load(&den[16 * m]) * shrink);", "", few_only),
    ("sums of many rows are never rescaled", "any(got.high > all(LAG))", "base[m] == NONE && any(got.high > all(LAG))", few_only),
    ("weights are those of the old maximum", "got = weigh(row, unit, new_base", "weigh(row, unit, new_base", few_only),
    ("many rows see their future", "pos >= first & pos <= last", "pos >= first", few_only),
    ("and all of their past", "pos >= first & pos <= last", "pos >= 0 & pos <= last", few_only),
    ("log-weights are in the wrong unit", "h.a[s + j] / scale", "h.a[s + j]", few_only),
    (
        "values are the neighbour's",
        "j < count ? v + j * row : zeros, *y = j + 1",
        "j + 1 < count ? v + (j + 1) * row : zeros, *y = j + 1",
        few_only,
    ),
    ("squares are no squares", "+= weight * x[j] * x[j]", "+= weight * x[j]"),
    ("nor for many rows", "part * e", "part", few_only),
    ("every head writes its mass where the first does", "mass, spikes, head * k.size(2)", "mass, spikes, 0"),
    ("and that of its pages", "span[3 * head + 2]", "span[2]"),
    ("a page's last row is left out", "spans[3 * head + 1] * page", "spans[3 * head + 1] * page - 1"),
    ("a row of fewer than four keys is written anew", "std::min(j, count - 4)", "std::min<int64_t>(j, 0)"),
    ("every query is the first", "acc[n][i] += load(q + n * D + d) * x", "acc[n][i] += load(q + d) * x"),
    ("sums are those of the first key", "to[i] = c[4 * i]", "to[i] = c[0]"),
    (
        "the last of 16 bytes is lost",
        "return __builtin_convertvector(x, vf);",
        "vf y = __builtin_convertvector(x, vf); y[15] = 0; return y;",
    ),
    ("all rows are the first", "out[m * N + n + j] = y[m * BLOCK + j] * scale(n + j)", "out[m * N + n + j] = y[j] * scale(n + j)"),
    ("a scale serves a block", "y[m * BLOCK + j] * scale(n + j)", "y[m * BLOCK + j] * scale(n)"),
    ("every block is the first", "products(wide.data(), M, weight + n * D", "products(wide.data(), M, weight"),
    ("half the digits are lost", "whole - 256 * digit", "0 * digit", vnni),
    ("one unit serves all columns", "* x.unit[at]", "* x.unit[0]", vnni),
    ("the shift is not taken off in full", "-128 * x.highs[at]", "-127 * x.highs[at]", vnni),
    ("the partner's weight is forgotten", "(c.inverse[pairs[p].one] + inverse) * unit", "(c.inverse[pairs[p].one] + 0 * inverse) * unit"),
    ("means are not weighted", "*x * c.weight[a] + y * c.weight[b]", "(*x + y) / 2 * both"),
    ("nothing is a tie", "const float unit = unit_of(c, tie)", "const float unit = 1e-30f"),
    ("what merged is not looked at anew", "most = (surplus + 1) / 2", "most = surplus"),
    ("negative numbers are rounded the wrong way", "up == negative ? -1 : 1", "up ? 1 : -1"),
]

CHECK = """
import os, sys, traceback
sys.path[:0] = sys.argv[1:]
import conftest, kernel_checks, torch  # most of what tests import; they themselves load the kernels as they are, unless others are there
from hypothesis import strategies
from zoo.kernels import cpu

def attention():
    import test_cpu_attention as a
    a.test_pages_match_float64(torch.float32, 1, None)
    a.test_a_store_and_pages_share_one_softmax(torch.float32, 4, None)
    for weights, window in ((True, 50), (True, None), (False, 50), (False, None)):
        for shape in a.SHAPES:
            a.test_attention_matches_float64(shape, torch.float32, weights, window, 2.0)
            a.test_mass_matches_float64(shape, torch.float32, weights, window)
        for shape in a.LONG if a.MANY else ():
            a.test_attention_matches_float64(shape, torch.bfloat16, weights, window, 2.0)
            a.test_attention_matches_float64(shape, torch.bfloat16, weights, window, 7.0)
            a.test_mass_matches_float64(shape, torch.bfloat16, weights, window)

def linear():
    import test_cpu_linear as l
    for shape in ((3, 1000, 48), (16, 65, 128)):
        l.test_linear_matches_float64(*shape, torch.float32)
    for shape in ((3, 1000, 48), (16, 65, 320), (2, 130, 14336)):
        l.test_int8_linear_matches_float64(*shape, torch.bfloat16)
        l.test_int8_linear_matches_float64(*shape, torch.float32)

def merging():
    import test_cpu_merging as m
    m.test_ward_is_the_one_of_clustering((3, 3, 400, 16))
    m.test_ward_takes_near_points_for_equal()
    m.test_rounding_is_the_one_of_clustering()
    for step in (0.7, 1.5):
        m.test_ward_with_equal_points(step)

CHECKS = {"slot_attention.cpp": attention, "linear.cpp": linear, "merging.cpp": merging}

def run(library, changed):
    torch.ops.load_library(library)
    cpu.declare()
    for name in sorted(CHECKS, key=lambda name: name != changed):  # those of what is wrong come first: they say so
        CHECKS[name]()
    return "passed"

for line in sys.stdin:  # a process for each library, forked from one that has imported everything
    if (child := os.fork()) == 0:
        try:
            said = run(*line.rstrip("\\n").split("\\t"))
        except BaseException:
            said = traceback.format_exc()
        print(repr(said), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(repr("crashed"), flush=True)
"""


class Checker:
    """Runs the tests of a library, in a process of their own."""

    def __init__(self) -> None:
        here = Path(__file__).parent
        command = [sys.executable, "-c", CHECK, str(here), str(here.parent)]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, library: Path, changed: str = "") -> str:
        """ "passed", or what the first test that failed says. changed: the file whose tests come first."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(f"{library}\t{changed}\n")
        self.server.stdin.flush()
        return str(ast.literal_eval(self.server.stdout.readline()))


@pytest.fixture(scope="module")
def check() -> Iterator[Checker]:
    checker = Checker()
    yield checker
    checker.server.communicate()


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The kernels as they are, a file each: a mutant compiles only what it changes."""
    made = {path.name: tmp_path_factory.mktemp("objects") / f"{path.name}.o" for path in cpu.SOURCES}
    for path in cpu.SOURCES:
        cpu.compile(path, made[path.name], QUICKLY)
    return made


def test_the_kernels_pass(check: Checker) -> None:
    assert check(cpu.build(cache_folder() / "kernels")) == "passed"


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new"), [pytest.param(old, new, id=what, marks=marks) for what, old, new, *marks in MUTANTS])
def test_mutants_fail(old: str, new: str, objects: dict[str, Path], check: Checker, tmp_path: Path) -> None:
    texts = {path.name: path.read_text() for path in cpu.sources()}
    (changed,) = (name for name, text in texts.items() if old in text)
    for name, text in texts.items():
        (tmp_path / name).write_text(text.replace(old, new))
    linked = dict(objects)
    for name in objects if changed.endswith(".h") else [changed]:
        linked[name] = tmp_path / f"{name}.o"
        cpu.compile(tmp_path / name, linked[name], QUICKLY)
    cpu.link(list(linked.values()), tmp_path / "cpu.so")
    said = check(tmp_path / "cpu.so", changed)
    assert "AssertionError" in said, f"not caught\n{said[-500:]}"


def test_the_kernels_pass_when_compiled_quickly(objects: dict[str, Path], check: Checker, tmp_path: Path) -> None:
    """What mutants are linked with is not what is wrong with them."""
    cpu.link(list(objects.values()), tmp_path / "cpu.so")
    assert check(tmp_path / "cpu.so") == "passed"
