"""python -m zoo.eval: it scores what the model does, what it writes is whole, and a run that was stopped goes on as if it had not been."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CORPUS
from torch import Tensor

import zoo
from zoo import cli, random
from zoo.attention import ATTENTION, parse
from zoo.attention.budgeted import Budgeted
from zoo.attention.full import Full, FullCache
from zoo.attention.selecting import Selecting, SelectingCache
from zoo.eval import __main__ as command
from zoo.eval import protocols
from zoo.eval.protocols import FullBytes, method_of, same_reading
from zoo.eval.records import Records
from zoo.eval.run import Prompt
from zoo.eval.tasks import TASKS, Sample
from zoo.sampling import Sampler

TEXT = "".join(f"Chapter {i}. {CORPUS}" for i in range(9))


@pytest.fixture(scope="module")
def lm(tiny: Path) -> zoo.LM:
    return zoo.load(str(tiny), compile="off")


@pytest.fixture(scope="module")
def ids(lm: zoo.LM) -> list[int]:
    return lm.tokenizer.encode(TEXT)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def evaluate(tiny: Path, text: Path, out: Path, *argv: str) -> int:
    return cli.run(command.main, ["--model", str(tiny), "--text", str(text), "--out", str(out), "--threads", "1", *argv])


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]


def means(out: Path, score: str) -> dict[str, float]:
    return {cell["attn"]: cell["scores"][score]["mean"] for cell in json.loads((out / "summary.json").read_text())["cells"]}


# Protocols

BUDGETED = [name for name, kind in ATTENTION.items() if issubclass(kind, Budgeted)]


@pytest.mark.parametrize("attn", ["full", "sliding:window=100", "subgen:budget=25%", "h2o:budget=128", "snapkv:budget=25%"])
@pytest.mark.parametrize("protocol", ["prefill", "stream"])
def test_a_prompt_is_read_as_prefill_reads_it(lm: zoo.LM, ids: list[int], attn: str, protocol: str) -> None:
    """The same logits and the same state, to the last bit."""
    method, prompt = method_of(attn, protocol, 900), ids[:900]
    run = protocols.end(protocols.read(lm, method, prompt, more=10))
    cache = lm.new_cache(max_tokens=910)
    assert torch.equal(run.logits, lm.prefill(prompt, cache)[0])
    mine = dict(run.cache.named_buffers())
    assert all(torch.equal(t, mine[name]) for name, t in cache.named_buffers())


@pytest.mark.parametrize("name", BUDGETED)
def test_one_reading_serves_every_budget(lm: zoo.LM, ids: list[int], name: str) -> None:
    """Compressing a copy of what a method read with another budget is the same, to the last bit, as reading with this one."""
    prompt, after = ids[:700], ids[700:800]
    first = method_of(f"{name}:budget=50%", "prefill", 700)
    shared = protocols.read(lm, first, prompt, more=100)
    for budget in ("25%", "150", "50%", "12.5%", "80%/300"):
        method = method_of(f"{name}:budget={budget}", "prefill", 700)
        assert same_reading(method) == same_reading(first)
        alone = protocols.end(protocols.read(lm, method, prompt, more=100))
        copy = shared.clone()
        protocols.adopt(copy.cache, method)
        copy = protocols.end(copy)
        assert copy.cache.kind() == alone.cache.kind()
        theirs = dict(copy.cache.named_buffers())
        assert all(torch.equal(t, theirs[n]) for n, t in alone.cache.named_buffers())
        assert torch.equal(alone.follow(after), copy.follow(after))
        assert (alone.peak, alone.final()) == (copy.peak, copy.final())


def test_what_is_read_together_differs_in_its_budget_only() -> None:
    """Other options, `stream`, and methods without a budget are read by themselves."""
    keys = [same_reading(method_of(attn, "prefill", 500)) for attn in (
        "full", "sliding:window=25%", "sliding:window=50%", "subgen:budget=25%", "subgen:scores=expected", "h2o", "h2o:age=true",
        "subgen:delta=2",
    )]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert same_reading(method_of("h2o:budget=25%", "stream", 500)) != same_reading(method_of("h2o:budget=50%", "stream", 500))


def test_methods_under_protocols() -> None:
    assert method_of("subgen:budget=25%", "prefill", 9).when == "prompt"  # type: ignore[attr-defined]
    assert method_of("h2o", "stream", 9).when == "stream"  # type: ignore[attr-defined]
    assert method_of("sinks:budget=64", "prefill", 9).budget.number == 64  # type: ignore[attr-defined]
    assert method_of("sliding:window=12.5%", "stream", 1001) == parse("sliding:window=126")
    assert method_of("full", "stream", 9) == parse("full")


@pytest.mark.parametrize("attn", ["sinks:budget=200", "subgen:budget=256", "h2o:budget=150"])
def test_peak_of_a_stream_is_of_every_step(lm: zoo.LM, ids: list[int], attn: str) -> None:
    """Read in chunks or token by token, the most bytes are the same, and the budget's: well below what the prompt takes."""
    method = method_of(attn, "stream", 600)
    run = protocols.end(protocols.read(lm, method, ids[:600]))
    lm.attn = method
    cache = lm.new_cache()
    cache.begin_prompt([600])
    most = 0
    with torch.no_grad():
        for token in ids[:600]:
            for piece, where in cache.split(torch.tensor([[token]])):
                lm.model.hidden(piece, where, cache)
                most = max(most, cache.nbytes().used)
    assert run.peak == most
    assert run.final() < run.peak < 0.7 * FullBytes(lm)(600)
    prefill = protocols.end(protocols.read(lm, method_of(attn, "prefill", 600), ids[:600]))
    assert prefill.peak >= FullBytes(lm)(600) - 64


def test_full_bytes_are_those_of_a_full_cache(lm: zoo.LM, tiny_mistral: Path, ids: list[int]) -> None:
    windowed = zoo.load(str(tiny_mistral), compile="off")
    for model in (lm, windowed):
        for n in (3, 16, 17, 200):
            assert protocols.end(protocols.read(model, parse("full"), ids[:n])).final() == FullBytes(model)(n)


def test_answers_are_the_models_own(lm: zoo.LM, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run says is what `generate` says, and its log-probability of an answer is that of one pass without a cache."""
    prompt, answer = ids[:300], ids[500:507]
    run = protocols.end(protocols.read(lm, parse("full"), prompt[:280]))
    run.ask(prompt[280:])
    said = run.clone().reply(12)
    lm.attn = parse("full")
    assert said == "".join(lm.stream(prompt, 12))
    logs = lm.logits(prompt + answer)[0].log_softmax(-1)
    true = float(logs[299:306].gather(1, torch.tensor(answer)[:, None]).sum())
    tokens = run.tokens
    assert run.logprob(answer) == pytest.approx(true, abs=1e-3)
    assert run.tokens == tokens + 7
    again = protocols.end(protocols.read(lm, parse("full"), prompt))
    assert said.startswith(again.clone().reply(12, lambda text: len(text) >= 5))
    new = [token for (token,) in lm.tokens([prompt], 12, Sampler())]
    monkeypatch.setattr(lm, "end_ids", frozenset(new[5:6]))
    assert again.reply(12) == "".join(lm.stream(prompt, 12)) != said


def test_the_tokens_of_a_prompt_are_all_looked_at(lm: zoo.LM, ids: list[int]) -> None:
    """Across chunks and blocks: perplexity of a stream that is exact is that of one pass."""
    task = TASKS["ppl"]()
    sample = Sample(ids[:700], [], ids[700:740])
    logs = lm.logits(ids[:740])[0].log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:740])[:, None])[:, 0]
    for attn in ("full", "subgen:budget=2000"):
        run = protocols.end(protocols.read(lm, method_of(attn, "stream", 700), sample.context, inside=True))
        seen = task.watch(run, sample)
        got = [task.scores(seen, None, sample, protocol)["nll"] for protocol in ("stream", "prefill")]
        assert got == pytest.approx([-float(logs.mean()), -float(logs[699:].mean())], abs=1e-3)


def test_attention_errors_are_those_of_each_layer_alone(lm: zoo.LM, ids: list[int]) -> None:
    """A cache that is exact has no error. One that keeps only the last 4 tokens answers with attention to them."""
    task = TASKS["attn"]()
    sample = Sample(ids[:200], [], ids[200:240])
    prompt = Prompt(lm, task, sample, FullBytes(lm), whole=False)
    outcomes = prompt.outcomes([("", "prefill", attn) for attn in ("sliding:window=4", "subgen:budget=100%", "full")])
    full = prompt.full().seen
    scores = {row[2]: task.scores(outcome.seen, full, sample, "prefill") for row, outcome in outcomes}
    assert scores["full"] == {"error": 0, "worst": 0}
    assert scores["subgen:budget=100%"]["worst"] < 1e-5
    q, k, v = (t[:, :, :240] for t in prompt.forward.qkv[1])
    scores_of = (q.unflatten(1, (2, 2)) @ k[:, :, None].transpose(-1, -2)) / 4
    ahead = torch.arange(240)[:, None] - torch.arange(240)
    window = scores_of.masked_fill((ahead < 0) | (ahead >= 4), -torch.inf).softmax(-1)
    everything = scores_of.masked_fill(ahead < 0, -torch.inf).softmax(-1)
    out, true = ((p @ v[:, :, None])[..., 200:, :].flatten(1, 2)[0] for p in (window, everything))
    error = (out - true).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1)
    seen = prompt.once("sliding:window=4", "", "prefill").seen
    assert task.more(seen, full)["heads"][1] == pytest.approx(error.tolist(), abs=2e-4)


# The command


def test_attn_given_twice_is_both() -> None:
    assert command.arguments(["--attn", "full", "--attn", "h2o", "tova", "--out", "x"]).attn == ["full", "h2o", "tova"]
    assert command.arguments(["--out", "x"]).attn == ["full", "subgen"]


def test_a_run_writes_every_row(tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One row for each method, protocol, question and sample; a full cache has KL 0; bytes and rates are there."""
    out, attn = tmp_path / "out", ["full", "sliding:window=25%", "subgen:budget=25%", "subgen:budget=50%", "h2o:budget=25%"]
    argv = ["--attn", *attn, "--tasks", "kl,passkey", "--protocols", "prefill,stream", "--question", "unseen,seen", "--lengths", "400,0.5k"]
    assert evaluate(tiny, text, out, *argv, "--samples", "2", "--baseline", "h2o:budget=25%") == 0
    got = rows(out)
    keys = [tuple(r[n] for n in ("task", "attn", "protocol", "question", "length", "sample")) for r in got]
    assert len(set(keys)) == len(keys) == 2 * 5 * 2 * 2 * 2 + 2 * 5 * 2 * 2
    for r in got:
        assert list(r) == [
            "task", "variant", "attn", "protocol", "question", "length", "tokens", "sample", "seed", "prompt", "scores", "answer",
            "expected", "bytes",
        ]  # fmt: skip
        assert r["length"] - 3 <= r["tokens"] <= r["length"]
        assert r["bytes"]["final"] <= r["bytes"]["peak"]
        assert set(r["scores"]) == ({"kl", "top1"} if r["task"] == "kl" else {"right", "logprob"})
        if r["attn"] == "full":
            assert r["bytes"]["final"] == r["bytes"]["full"]
            assert r["task"] != "kl" or r["scores"] == {"kl": 0, "top1": 1}
        elif r["task"] == "kl":
            assert r["scores"]["kl"] > 0.1
    cells = json.loads((out / "summary.json").read_text())["cells"]
    each = [cell["bytes"]["per_token"] for cell in cells if cell["attn"] == "full"]
    assert len(each) == 12  # two lengths; bytes are those of the tokens that were held, whatever came behind the prompt
    assert max(each) == pytest.approx(min(each), rel=1e-3)
    said = capsys.readouterr().out
    printed = said.splitlines()
    assert len(printed) == len(cells)
    for line, cell in zip(printed, cells, strict=True):
        assert f"{cell['bytes']['peak_share' if cell['protocol'] == 'stream' else 'share']:.1%} of the bytes" in line
    assert any(round(cell["bytes"]["peak_share"], 3) != round(cell["bytes"]["share"], 3) for cell in cells if cell["protocol"] == "stream")
    timings = [json.loads(line) for line in (out / "timings.jsonl").read_text().splitlines()]
    assert [[t[n] for n in ("task", "attn", "sample")] for t in timings] == [[r[n] for n in ("task", "attn", "sample")] for r in got]
    assert all(t["rate"]["prefill"] > 0 and t["rate"]["decode"] > 0 for t in timings)
    assert len({r["prompt"] for r in got}) == 2 * 2 * 2
    config = json.loads((out / "config.json").read_text())
    assert {"command", "arguments", "versions", "commit", "seed", "machine", "started"} <= set(config)
    assert config["command"].startswith("python -m zoo.eval --model ")
    cells = json.loads((out / "summary.json").read_text())["cells"]
    assert len(cells) == 5 * 2 * 2 + 5 * 2 * 2 * 2
    assert all(c["n"] == 2 and c["scores"] for c in cells)
    assert said.count("subgen:budget=25%") == 12


def test_seen_and_unseen_questions(tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same prompt; where it is unseen, the cache compresses without it, and the question is kept whole on top of the budget. The full
    cache runs once, whatever was run before."""
    readings: list[tuple[str, str, int]] = []
    plain = Prompt.read

    def read(self: Prompt, method: Any, question: str, inside: bool) -> Any:
        run = plain(self, method, question, inside)
        readings.append((str(method).partition(":")[0], question, run.tokens))
        return run

    monkeypatch.setattr(Prompt, "read", read)
    argv = ["--attn", "full", "snapkv:budget=25%", "--tasks", "passkey", "--question", "seen,unseen", "--lengths", "700", "--samples", "1"]
    assert evaluate(tiny, text, tmp_path / "out", *argv) == 0
    seen, seen_snap, unseen, unseen_snap = rows(tmp_path / "out")
    question = len(zoo.load(str(tiny)).tokenizer.encode("\nWhat is the pass key? The pass key is"))
    less = seen["tokens"] - question
    assert readings == [("full", "unseen", less), ("snapkv", "seen", seen["tokens"]), ("snapkv", "unseen", less)]
    assert len({r["prompt"] for r in (seen, seen_snap, unseen, unseen_snap)}) == 1
    assert seen["scores"] == unseen["scores"]
    assert seen_snap["scores"] != unseen_snap["scores"]
    assert seen_snap["bytes"]["final"] < unseen_snap["bytes"]["final"] < seen["bytes"]["final"]
    whole = (records := tmp_path / "out" / "records.jsonl").read_bytes()
    records.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))  # goes on with what was unseen alone
    assert evaluate(tiny, text, tmp_path / "out", *argv) == 0
    assert records.read_bytes() == whole


@pytest.mark.parametrize("task", ["ppl", "attn", "lines", "niah", "needle", "vt", "cwe", "fwe"])
def test_every_task_runs(tiny: Path, text: Path, tmp_path: Path, task: str) -> None:
    if task in ("lines", "niah", "cwe"):
        pytest.importorskip("wonderwords")
    argv = ["--attn", "full", "sinks:budget=25%", "--tasks", task, "--lengths", "1400", "--samples", "1", "--protocols", "prefill,stream"]
    more = ["--niah", "multivalue", *(["--depths", "50"] if task in ("lines", "needle") else [])]
    assert evaluate(tiny, text, tmp_path / "out", *argv, *more) == 0
    got = rows(tmp_path / "out")
    assert [(r["attn"], r["protocol"]) for r in got] == [(a, p) for p in ("prefill", "stream") for a in ("full", "sinks:budget=25%")]
    full, small, streamed, small_streamed = got
    assert full["scores"] != small["scores"]
    assert (full["scores"] == streamed["scores"]) == (task != "ppl")
    assert small_streamed["bytes"]["peak"] < small["bytes"]["peak"] / 2
    assert (full["answer"] is None) == (task in ("ppl", "attn"))
    if task == "attn":
        assert torch.tensor(small["heads"]).shape == (3, 4)
        assert torch.tensor(small["heads"]).mean() == pytest.approx(small["scores"]["error"], abs=1e-4)
        assert torch.tensor(small["heads"]).max() == pytest.approx(small["scores"]["worst"], abs=1e-4)


def test_own_data_runs(tiny: Path, text: Path, tmp_path: Path) -> None:
    lines = [{"context": CORPUS, "input": "Who?", "answers": ["Ishmael"]}, {"context": CORPUS[:200], "input": "", "answers": ["a", "b"]}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    argv = ["--data", str(tmp_path / "mine.jsonl"), "--attn", "full", "--lengths", "500", "--samples", "2"]
    assert evaluate(tiny, text, tmp_path / "out", *argv) == 0
    assert [(r["task"], r["expected"]) for r in rows(tmp_path / "out")] == [("data:mine", ["Ishmael"]), ("data:mine", ["a", "b"])]
    assert all(set(r["scores"]) == {"f1", "rouge_l", "exact", "edit", "logprob"} for r in rows(tmp_path / "out"))


def test_every_line_of_own_data_is_looked_at_before_the_first_is_run(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A question that does not fit, between two that do."""
    lines = [{"context": CORPUS, "input": "Who?" * n, "answers": ["Ishmael"]} for n in (1, 900, 1)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    argv = ["--data", str(tmp_path / "mine.jsonl"), "--attn", "full", "--lengths", "500", "--samples", "3"]
    assert evaluate(tiny, text, tmp_path / "out", *argv) == 2
    assert "--data, line 2: the shortest prompt has" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_stream_that_drops_nothing_moves_nothing(tiny: Path, text: Path, tmp_path: Path) -> None:
    """In float32, whose rounding is small: reading a prompt in other pieces is not a method's loss."""
    attn = ["sinks:budget=956", "h2o:budget=956", "sinks:budget=900"]  # of 700 tokens and the 256 behind them
    argv = ["--attn", *attn, "--protocols", "stream", "--lengths", "700", "--samples", "1"]
    assert evaluate(tiny, text, tmp_path / "out", "--dtype", "float32", *argv) == 0
    kl = means(tmp_path / "out", "kl")
    assert kl["sinks:budget=900"] > 1e-3
    assert kl["sinks:budget=956"] < 1e-6
    assert kl["h2o:budget=956"] < 1e-6


def test_without_a_text_pythons_own_is_read(tiny: Path, tmp_path: Path) -> None:
    argv = ["--model", str(tiny), "--out", str(tmp_path / "out"), "--attn", "full", "--lengths", "64", "--samples", "1"]
    assert cli.run(command.main, argv) == 0
    assert rows(tmp_path / "out")[0]["scores"] == {"kl": 0, "top1": 1}
    assert len(command.reference()) > 300_000


def test_a_prompt_leaves_room_for_what_follows(tiny: Path, text: Path, tmp_path: Path) -> None:
    """The model's context holds 4,096 tokens, of which a passage's 256 are needed, and 8 to time a decode step."""
    assert evaluate(tiny, text, tmp_path / "out", "--attn", "full", "--lengths", "4k", "--samples", "1") == 0
    (row,) = rows(tmp_path / "out")
    assert (row["length"], row["tokens"]) == (4096, 3832)


# Methods that are broken must look it


@dataclasses.dataclass(frozen=True)
class RandomSlots(Selecting):
    """Keeps tokens at random, and nothing says for how many each stands."""

    def score(self, cache: SelectingCache, slots: dict[str, Tensor], seen: Tensor) -> Tensor:
        return random.uniform(7, slots["pos"].long())


class ShiftedCache(FullCache):
    def __init__(self, rotary: Any, *args: Any) -> None:
        super().__init__(*args)
        self.rotary = [rotary]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
        return super().attend(q, self.rotary[0].rotate(self.rotary[0].unrotate(k, pos), pos + 1), v, pos)


@dataclasses.dataclass(frozen=True)
class Shifted(Full):
    """Keys stand one position too late."""

    def caches(self, config: Any, rotary: Any, batch: int, *rest: Any) -> Any:
        made = super().caches(config, rotary, batch, *rest)
        return type(made)([ShiftedCache(rotary, config, batch, 0, *rest[2:]) for _ in made], batch, rest[3])


def test_broken_methods_score_worse(tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By how much is known: on this model, half of the tokens chosen at random cost 1.45 nats more than those with the most attention (2.7
    against 1.2), and keys one position off 3.1 nats where nothing is dropped at all. Paired by passage, neither could be chance."""
    monkeypatch.setitem(ATTENTION, "random", RandomSlots)
    monkeypatch.setitem(ATTENTION, "shifted", Shifted)
    attn = ["full", "h2o:budget=50%", "random:budget=50%", "shifted"]
    argv = ["--attn", *attn, "--tasks", "kl,attn", "--lengths", "600", "--samples", "4", "--baseline", "h2o:budget=50%"]
    assert evaluate(tiny, text, tmp_path / "out", *argv) == 0
    cells = {(c["task"], c["attn"]): c for c in json.loads((tmp_path / "out" / "summary.json").read_text())["cells"]}
    kl = {a: cells["kl", a]["scores"]["kl"] for a in attn}
    assert kl["full"]["mean"] == 0
    assert cells["kl", "random:budget=50%"]["bytes"]["final"] <= 1.02 * cells["kl", "h2o:budget=50%"]["bytes"]["final"]
    assert 1.2 < kl["random:budget=50%"]["to_baseline"]["low"] < kl["random:budget=50%"]["to_baseline"]["high"] < 1.7
    assert 2.8 < kl["shifted"]["to_full"]["low"] < kl["shifted"]["to_full"]["high"] < 3.4
    assert cells["attn", "random:budget=50%"]["scores"]["error"]["to_baseline"]["low"] > 0.25
    assert cells["attn", "shifted"]["scores"]["error"]["mean"] > 0.5


# Interruptions

SHORT = [
    "--attn",
    "full",
    "subgen:budget=25%",
    "h2o:budget=50%",
    "subgen:budget=50%",
    "--tasks",
    "kl,passkey",
    "--lengths",
    "300",
    "--samples",
    "2",
]
SHORT += ["--protocols", "prefill,stream"]


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of SHORT, never interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text.txt").write_text(TEXT)
    assert evaluate(tiny, folder / "text.txt", folder / "out", *SHORT) == 0
    return folder


def same(a: Path, b: Path) -> None:
    for name in ("records.jsonl", "summary.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    keys = [[[r[n] for n in ("attn", "protocol", "sample")] for r in map(json.loads, (f / "timings.jsonl").open())] for f in (a, b)]
    assert keys[0] == keys[1]


def test_two_runs_are_the_same_to_the_last_byte(tiny: Path, finished: Path, tmp_path: Path) -> None:
    assert evaluate(tiny, finished / "text.txt", tmp_path / "out", *SHORT) == 0
    same(finished / "out", tmp_path / "out")
    other = tmp_path / "other"
    assert evaluate(tiny, finished / "text.txt", other, *SHORT, "--seed", "1") == 0
    keys = [{r["prompt"] for r in rows(out) if r["task"] == "passkey"} for out in (other, finished / "out")]
    assert not keys[0] & keys[1]
    assert rows(other)[0]["prompt"] != rows(finished / "out")[0]["prompt"]


def test_a_finished_run_does_nothing_more(tiny: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (finished / "out" / "records.jsonl").stat().st_mtime_ns
    monkeypatch.setattr(Prompt, "read", lambda *args: pytest.fail("a prompt was read"))
    assert evaluate(tiny, finished / "text.txt", finished / "out", *SHORT) == 0
    assert (finished / "out" / "records.jsonl").stat().st_mtime_ns == before


def cut(records: bytes, timings: bytes, where: str) -> tuple[bytes, bytes]:
    """What a killed run may leave."""
    lines, times = records.splitlines(keepends=True), timings.splitlines(keepends=True)
    return {
        "nothing": (b"", b""),
        "within a reading": (b"".join(lines[:2]), b"".join(times[:2])),
        "between rows": (b"".join(lines[:7]), b"".join(times[:7])),
        "in a row": (b"".join(lines[:9]) + lines[9][:40], b"".join(times[:10])),
        "before a line's end": (b"".join(lines[:9]) + lines[9][:-1], b"".join(times[:10])),
        "in a timing": (b"".join(lines[:4]), b"".join(times[:4]) + times[4][:30]),
        "in a character": (b"".join(lines[:9]) + lines[9][: lines[9].index(b"\xef") + 1], b"".join(times[:10])),
    }[where]


@pytest.mark.parametrize(
    "where", ["nothing", "within a reading", "between rows", "in a row", "before a line's end", "in a timing", "in a character"]
)
def test_a_killed_run_goes_on(tiny: Path, finished: Path, tmp_path: Path, where: str) -> None:
    """From whatever was left; the result is the one of a run that nobody stopped."""
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(finished / "out" / "config.json", out)
    left = cut(*((finished / "out" / name).read_bytes() for name in ("records.jsonl", "timings.jsonl")), where)
    for name, data in zip(("records.jsonl", "timings.jsonl"), left, strict=True):
        (out / name).write_bytes(data)
    assert evaluate(tiny, finished / "text.txt", out, *SHORT) == 0
    same(finished / "out", out)


def test_kill_and_go_on(tiny: Path, finished: Path, tmp_path: Path) -> None:
    """A real process, killed when it has written some rows."""
    out = tmp_path / "out"
    argv = ["--model", str(tiny), "--text", str(finished / "text.txt"), "--out", str(out), *SHORT]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-m", "zoo.eval", *argv], stderr=subprocess.DEVNULL, env=environment) as process:
        records, until = out / "records.jsonl", time.monotonic() + 120
        while time.monotonic() < until and not (records.exists() and records.read_bytes().count(b"\n") >= 5):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert 5 <= records.read_bytes().count(b"\n") < 24
    assert evaluate(tiny, finished / "text.txt", out, *SHORT) == 0
    same(finished / "out", out)


def test_ctrl_c_keeps_what_is_done(
    tiny: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []
    plain = Prompt.finish

    def finish(self: Prompt, *args: Any) -> Any:
        calls.append(1)
        if len(calls) > 10:
            raise KeyboardInterrupt
        return plain(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Prompt, "finish", finish)
        assert evaluate(tiny, finished / "text.txt", tmp_path / "out", *SHORT) == 130
    kept, err = rows(tmp_path / "out"), capsys.readouterr().err
    assert len(kept) >= 10
    assert f"{len(kept)} rows are kept in {tmp_path / 'out'}" in err
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["cells"]
    assert evaluate(tiny, finished / "text.txt", tmp_path / "out", *SHORT) == 0
    same(finished / "out", tmp_path / "out")


def test_a_report_that_fails_does_not_hide_why_a_run_ended(
    tiny: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: Any) -> Any:
        raise KeyboardInterrupt

    def fail(*args: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(command, "finish", fail)
    monkeypatch.setattr(Prompt, "finish", stop)
    assert evaluate(tiny, finished / "text.txt", tmp_path / "out", *SHORT) == 130
    assert "no report of them could be made: no space" in capsys.readouterr().err


def test_progress_says_what_and_how_long(capsys: pytest.CaptureFixture[str]) -> None:
    progress = command.Progress()
    progress(0, 100, "kl 300 tokens, sample 1 of 3")
    progress.bar.delay = 0
    progress.bar.start_t -= 100
    progress(25, 100, "kl 300 tokens, sample 2 of 3")
    progress.bar.refresh()
    assert "kl 300 tokens, sample 2 of 3:  25%" in (err := capsys.readouterr().err)
    assert "01:40, 05:00 left" in err
    progress.close()


# What the user can mend


def fails(capsys: pytest.CaptureFixture[str], status: int, says: str) -> None:
    err = capsys.readouterr().err
    assert status == 2
    assert says in err
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err


BAD: list[tuple[list[str], str]] = [
    (["--tasks", "quiz"], "'quiz' is unknown; choose of kl, ppl"),
    (["--tasks", "kl,,ppl"], "write each once, with commas"),
    (["--tasks", "kl,kl"], "write each once"),
    (["--lengths", "1k,1024"], "two of these are the same number"),
    (["--depths", "25,25.0"], "two of these are the same number"),
    (["--tasks", "data"], "needs --data"),
    (["--protocols", "both"], "choose of prefill, stream"),
    (["--question", "maybe"], "choose of unseen, seen"),
    (["--attn", "magic"], "unknown attention method 'magic'"),
    (["--attn", "full", "full"], "given twice"),
    (["--attn", "subgen:when=decode"], "leave `when` out"),
    (["--attn", "subgen:budget=0%"], "above 0%"),
    (["--attn", "h2o:budget=100", "--protocols", "stream"], "at least 128"),
    (["--attn", "sliding:window=x"], "not a whole number"),
    (["--lengths", "long"], "'long' tokens is no number"),
    (["--lengths", "0"], "too short"),
    (["--lengths", "5k"], "holds 4096 tokens"),
    (["--lengths", "2k", "--samples", "99"], "passages of 2048"),
    (["--samples", "0"], "must be at least 1"),
    (["--samples", "few"], "invalid int value"),
    (["--depths", "150"], "write 0 to 100"),
    (["--depths", "50", "--tasks", "kl,niah", "--niah", "multikey"], "is for the tasks passkey, lines and needle"),
    (["--niah", "triple", "--tasks", "niah"], "'triple' is unknown"),
    (["--baseline", "h2o"], "not one of --attn"),
    (["--text", "/nowhere"], "cannot read /nowhere"),
    (["--data", "/nowhere"], "cannot read /nowhere"),
    (["--threads", "0"], "between 1 and 1024"),
    (["--dtype", "int3"], "invalid choice"),
    (["--backend", "magic"], "backend 'magic' is unknown"),
    (["--model", "/nowhere"], "/nowhere"),
    (["--nonsense"], "unrecognized arguments"),
    (["--tasks", "passkey", "--lengths", "20"], "more than --lengths 20"),
]


@pytest.mark.parametrize(("argv", "says"), BAD, ids=lambda x: "_".join(x)[:40] if isinstance(x, list) else "")
def test_bad_options_are_one_line(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    """And nothing is written."""
    try:
        status = evaluate(tiny, text, tmp_path / "out", *argv)
    except SystemExit as e:  # argparse's own
        status = int(e.code or 0)
    fails(capsys, status, says)
    assert not (tmp_path / "out").exists()


def test_json_is_one_last_line(tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(tiny, text, tmp_path / "out", "--lengths", "300", "--samples", "2", "--attn", "full", "sinks:budget=128", "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    said = json.loads(line)
    assert said == {"out": str(tmp_path / "out"), "cells": json.loads((tmp_path / "out/summary.json").read_text())["cells"]}
    assert len(said["cells"]) == 2


def test_the_code_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of a file of the package, or of a kernel, is another code, committed or not."""
    from zoo.kernels import cpu

    found = [command.sources()]
    assert found == [command.sources()]
    for module, file, change in ((zoo, "lm.py", "# changed"), (cpu, "linear.cpp", "// changed")):
        here = tmp_path / module.__name__
        shutil.copytree(Path(module.__file__).parent, here)
        with monkeypatch.context() as patch:
            patch.setattr(module, "__file__", str(here / Path(module.__file__).name))
            assert command.sources() == found[0]
            (here / file).write_text((here / file).read_text() + change)
            found.append(command.sources())
    assert len(set(found)) == 3


def test_a_folder_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        command.main([])
    fails(capsys, int(e.value.code or 0), "required: --out")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--threads", "2"], "made with threads = 1, not 2"),
        (["--seed", "1"], "made with seed = 0, not 1"),
        (["--samples", "3"], "made with samples = 2, not 3"),
        (["--lengths", "300,301"], "made with lengths = [300], not [300, 301]"),
        (["--text", "other"], "made with text = "),
    ],
)
def test_a_folder_of_other_arguments_is_refused(
    tiny: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    before = {path: path.read_bytes() for path in (finished / "out").iterdir()}
    (tmp_path / "other").write_text(TEXT)
    argv = [str(tmp_path / "other") if a == "other" else a for a in argv]
    fails(capsys, evaluate(tiny, finished / "text.txt", finished / "out", *SHORT, *argv), says)
    assert before == {path: path.read_bytes() for path in (finished / "out").iterdir()}


def damage_config(out: Path) -> None:
    (out / "config.json").write_text("{")


def damage_records(out: Path) -> None:
    (out / "records.jsonl").write_text("{}\n")


def lose_config(out: Path) -> None:
    (out / "config.json").unlink()


def change_text(out: Path) -> None:
    (out.parent / "text.txt").write_text(TEXT + ".")


def change_config(**new: Any) -> Callable[[Path], None]:
    def harm(out: Path) -> None:
        path = out / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | new))

    return harm


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (change_config(commit="0123456789"), 'made with commit = "0123456789", not'),
        (change_config(versions={"torch": "1.0"}), 'made with versions = {"torch": "1.0"}, not'),
        (change_config(model={"backend": "flex"}), "made with the model's config = "),
        (damage_config, "config.json is damaged"),
        (damage_records, "records.jsonl is damaged"),
        (lose_config, "has records.jsonl but no config.json"),
        (change_text, "made with text_sha256 = "),
    ],
)
def test_a_damaged_folder_is_one_line(
    tiny: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None], says: str
) -> None:
    shutil.copytree(finished / "out", tmp_path / "out")
    shutil.copy(finished / "text.txt", tmp_path)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["arguments"]["text"] = str(tmp_path / "text.txt")
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    harm(tmp_path / "out")
    fails(capsys, evaluate(tiny, tmp_path / "text.txt", tmp_path / "out", *SHORT), says)


def test_a_folder_has_one_run_at_a_time(tiny: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(finished / "out", tmp_path / "out")
    first = Records(tmp_path / "out", json.loads((tmp_path / "out" / "config.json").read_text()))
    fails(capsys, evaluate(tiny, finished / "text.txt", tmp_path / "out", *SHORT), "is being written by another run")
    first.close()
    assert evaluate(tiny, finished / "text.txt", tmp_path / "out", *SHORT) == 0


@pytest.mark.parametrize("how", ["error", "short"])
def test_a_full_disk(
    tiny: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    """In the middle of a row: one line, and when there is room again the run goes on."""
    write, rows_written = os.write, []

    def full(file: int, data: bytes) -> int:
        rows_written.append(data)
        if len(rows_written) < 9:
            return write(file, data)
        if how == "error":
            raise OSError(28, "No space left on device")
        return write(file, data[:20])

    with monkeypatch.context() as patch:
        patch.setattr("zoo.eval.records.os.write", full)
        status = evaluate(tiny, finished / "text.txt", tmp_path / "out", *SHORT)
    err = capsys.readouterr().err.rsplit("\r", 1)[-1].strip()
    assert (status, len(err.splitlines())) == (2, 1)
    assert err.endswith("No space left on device")
    assert evaluate(tiny, finished / "text.txt", tmp_path / "out", *SHORT) == 0
    same(finished / "out", tmp_path / "out")


def test_a_folder_that_cannot_be_written(tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    fails(capsys, evaluate(tiny, text, tmp_path / "file" / "out", *SHORT), "cannot write to")
