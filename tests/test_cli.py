"""python -m zoo.generate and zoo.chat: every flag has an effect that is seen here, and bad input gets one line and exit code 2."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import TEMPLATE, write_llama
from safetensors.torch import load_file, save_file

import zoo
import zoo.attention.slots
import zoo.chat
import zoo.cli
import zoo.generate
import zoo.lm
from zoo.attention import ATTENTION
from zoo.attention.tables import save_table
from zoo.chat import Conversation
from zoo.sampling import RepetitionPenalty, sampler

KNOWN = ", ".join(sorted(ATTENTION))

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "Call me Ishmael. Some years ago"
PROMPTS = ["never mind how long precisely, having little", "x", PROMPT]
FIGURES = re.compile(
    r"prompt (\d+) tokens at [\d.]+ tokens/s; new (\d+) tokens(?: at [\d.]+ tokens/s)?; first token after [\d.]+ s\n"
    r"(\S+) cache [\d.]+ MiB used, [\d.]+ MiB allocated, [\d.]+ MiB at its peak; "
    r"(float32|float16|bfloat16)(, compiled)?; peak memory [\d.]+ MiB\n"
)


class Said(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def last(self) -> dict[str, Any]:
        """The JSON of --json: the last line of standard output."""
        return json.loads(self.out.splitlines()[-1])

    @property
    def turns(self) -> list[dict[str, Any]]:
        return self.last["turns"]


Call = Callable[..., Said]
Calls = list[tuple[list[int], list[int]]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run a main function in this process, with text or bytes on standard input."""

    def call(main: Callable[[list[str] | None], None], *argv: str | Path, stdin: str | bytes = b"") -> Said:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        capsys.readouterr()
        try:
            code = zoo.cli.run(main, [str(a) for a in argv])
        except SystemExit as e:  # argparse
            code = int(e.code or 0)
        return Said(code, *capsys.readouterr())

    return call


@pytest.fixture
def generate(command: Call, tiny: Path) -> Call:
    """zoo.generate on the tiny model, unless the arguments name another."""
    return lambda *argv, **kw: command(zoo.generate.main, "--model", tiny, *argv, **kw)


@pytest.fixture
def chat(command: Call, tiny: Path) -> Call:
    """zoo.chat on the tiny model, unless the arguments name another; lines on standard input."""
    return lambda *argv, lines=(), **kw: command(zoo.chat.main, "--model", tiny, *argv, **{"stdin": "".join(f"{x}\n" for x in lines), **kw})


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[zoo.LM]:
    """The models that the command line loads."""
    models, load = list[zoo.LM](), zoo.load
    monkeypatch.setattr(zoo, "load", lambda *a, **kw: models.append(load(*a, **kw)) or models[-1])
    return models


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """For each generation of a single sequence: the tokens that were fed first, and the tokens that were chosen."""
    kept: Calls = []
    tokens = zoo.LM.tokens

    def spy(self: zoo.LM, prompts: Any, *args: Any) -> Iterator[list[int | None]]:
        kept.append((list(prompts[0]), []))
        for step in tokens(self, prompts, *args):
            kept[-1][1].append(step[0])  # type: ignore[arg-type]
            yield step

    monkeypatch.setattr(zoo.LM, "tokens", spy)
    return kept


@pytest.fixture(scope="module")
def lm(tiny: Path) -> zoo.LM:
    return zoo.load(str(tiny), compile="off")


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says its end token every few words."""
    folder = write_llama(tmp_path_factory.mktemp("ends") / "ends", seed=3)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][2] *= 2
    save_file(tensors, folder / "model.safetensors")
    return folder


def greedy(lm: zoo.LM, ids: list[int], n: int, penalty: float = 1.0) -> list[int]:
    """n tokens after ids, or fewer up to an end token: one pass over everything for each, without a cache."""
    ids, start = list(ids), len(ids)
    while len(ids) < start + n and not (len(ids) > start and ids[-1] in lm.end_ids):
        logits = lm.logits(ids)[:, -1]
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[0, ids] = True
        ids.append(int(RepetitionPenalty(penalty)(logits, seen).argmax()))
    return ids[start:]


def readable(text: str, n: int) -> str:
    """n characters out of a random model's text, not at its start, that are whole characters."""
    found = re.search(rf"(?<=.)[^\ufffd\s]{{{n}}}", text, re.DOTALL)
    assert found, text
    return found[0]


def one_line(said: Said, *fragments: str) -> None:
    """What bad input gets: exit code 2, one line on standard error, nothing on standard output."""
    assert said.code == 2, said
    assert said.out == ""
    assert re.fullmatch(r"[^\n]+\n", said.err), said.err
    assert said.err.startswith(("error: ", "python -m zoo."))
    assert "Traceback" not in said.err
    for fragment in fragments:
        assert fragment in said.err, said.err


# generate


def test_text_on_standard_output_figures_on_standard_error(generate: Call, lm: zoo.LM) -> None:
    said = generate(PROMPT, "--max-new-tokens", "10")
    ids = lm.tokenizer.encode(PROMPT)
    assert said.code == 0
    assert said.out == lm.tokenizer.decode(greedy(lm, ids, 10)) + "\n"
    found = FIGURES.fullmatch(said.err)
    assert found, said.err
    assert found.groups() == (str(len(ids)), "10", "full", "float32", None)


@pytest.mark.parametrize("attn", ["full", "sliding", "subgen"])
@pytest.mark.parametrize("family", ["tiny", "tiny_mistral", "tiny_neox"])
def test_families_answer_with_every_method(generate: Call, request: pytest.FixtureRequest, family: str, attn: str) -> None:
    """At this length every method is exact, so the answer is that of one pass per token, past Mistral's window of 16."""
    folder, n = request.getfixturevalue(family), 24
    lm = zoo.load(str(folder), compile="off")
    expected = greedy(lm, lm.tokenizer.encode(PROMPT), n)
    assert len(expected) > 16
    said = generate("--model", folder, PROMPT, "--attn", attn, "--max-new-tokens", str(n), "--json")
    assert said.code == 0
    assert said.last["answers"] == [lm.tokenizer.decode(expected)]
    assert said.last["new_tokens"] == len(expected)
    assert re.search(rf"^{attn}\S* cache", said.err, re.M)


def test_one_new_token_has_no_decode_speed(generate: Call) -> None:
    said = generate(PROMPT, "--max-new-tokens", "1", "--json")
    assert FIGURES.fullmatch(said.err)
    assert "new 1 tokens; first" in said.err
    assert said.last["decode_tokens_per_second"] is None


def test_json_figures_agree_with_reality(generate: Call, loaded: list[zoo.LM], tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill, decode = zoo.LM.prefill, zoo.LM.decode_step
    monkeypatch.setattr(zoo.LM, "prefill", lambda *a: time.sleep(0.2) or prefill(*a))
    monkeypatch.setattr(zoo.LM, "decode_step", lambda *a: time.sleep(0.02) or decode(*a))
    start = time.perf_counter()
    said = generate(PROMPT, "--max-new-tokens", "9", "--json")
    wall = time.perf_counter() - start
    (lm,), f = loaded, said.last
    n = len(lm.tokenizer.encode(PROMPT))
    assert f["model"] == str(tiny)
    assert f["answers"] == [said.out.rpartition("\n{")[0]]
    assert len(f["answers"][0]) > 5
    assert (f["prompt_tokens"], f["new_tokens"], f["stopped_by"]) == (n, 9, ["length"])
    assert (f["attn"], f["dtype"], f["backend"], f["compiled_steps"]) == ("full", "float32", "cpp", 0)
    # 3 layers, 2 kv heads of size 16, float32, a 4-byte position; the last new token is never fed; 8 bytes count the tokens
    assert f["cache_bytes_used"] == 3 * (n + 8) * (2 * 2 * 16 * 4 + 4) + 8
    assert lm.cache is not None
    assert f["cache_bytes_allocated"] == lm.cache.nbytes().allocated >= f["cache_bytes_used"]
    assert 0.2 <= f["first_token_seconds"] <= wall
    assert f["prefill_tokens_per_second"] == round(n / lm.stats.prefill_seconds, 1)
    assert f["decode_tokens_per_second"] == round(8 / lm.stats.decode_seconds, 1)
    assert n / wall < f["prefill_tokens_per_second"] <= n / 0.2 + 0.1
    assert 8 / wall < f["decode_tokens_per_second"] <= 8 / (8 * 0.02) + 0.1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert 0.9 * peak <= f["peak_memory_bytes"] <= peak
    shown = FIGURES.fullmatch(said.err)
    assert shown
    assert f"at {f['decode_tokens_per_second']} tokens/s; first" in said.err
    assert f"peak memory {f['peak_memory_bytes'] / 2**20:.1f} MiB" in said.err


def test_a_bar_for_long_prompts_only(generate: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill = zoo.LM.prefill

    def slow(self: zoo.LM, ids: Any, cache: Any, lengths: Any, progress: Callable[[int, int], None]) -> Any:
        progress(1, 3)
        time.sleep(1.1)
        progress(2, 3)
        progress(3, 3)
        return prefill(self, ids, cache, lengths, progress)

    assert "reading" not in generate(PROMPT, "--max-new-tokens", "1").err
    monkeypatch.setattr(zoo.LM, "prefill", slow)
    said = generate(PROMPT, "--max-new-tokens", "1")
    assert "reading the prompt" in said.err
    assert "2/3" in said.err
    assert "reading" not in said.out


def test_max_new_tokens(generate: Call) -> None:
    for n in (1, 5):
        assert generate(PROMPT, "--max-new-tokens", str(n), "--json").last["new_tokens"] == n
    assert generate(PROMPT, "--json").last["new_tokens"] == 100


def test_the_context_ends_an_answer(generate: Call, tmp_path: Path, lm: zoo.LM) -> None:
    n = len(lm.tokenizer.encode(PROMPT))
    folder = write_llama(tmp_path, max_position_embeddings=n + 3)
    said = generate("--model", folder, PROMPT, "--json")
    assert said.code == 0
    assert said.last["new_tokens"] == 3
    for context in (n, n - 1):
        folder = write_llama(tmp_path, max_position_embeddings=context)
        one_line(generate("--model", folder, PROMPT), f"the prompt is {n} tokens", f"holds {context}")


def test_an_end_token_ends_an_answer(generate: Call, tmp_path: Path, lm: zoo.LM) -> None:
    ids = greedy(lm, lm.tokenizer.encode(PROMPT), 6)
    folder = write_llama(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, ids[4]]}))
    said = generate("--model", folder, PROMPT, "--json")
    first = ids.index(ids[4])
    assert said.last["answers"] == [lm.tokenizer.decode(ids[:first])]
    assert said.last["stopped_by"] == ["end token"]
    assert said.last["new_tokens"] == first + 1


def test_seed(generate: Call) -> None:
    def draw(seed: str) -> str:
        return generate(PROMPT, "--max-new-tokens", "8", "--temperature", "1.2", "--seed", seed).out

    assert draw("3") == draw("3")
    assert len({draw(seed) for seed in ("0", "3", "-3", "99999999999999999999999")}) == 4
    assert draw("0") == generate(PROMPT, "--max-new-tokens", "8", "--temperature", "1.2").out


def test_temperature_and_its_filters(generate: Call) -> None:
    def text(*argv: str) -> str:
        said = generate(PROMPT, "--max-new-tokens", "8", *argv)
        assert said.code == 0, said.err
        return said.out

    plain, warm = text(), text("--temperature", "2")
    assert warm != plain
    assert text("--temperature", "0.0001") == plain
    for narrow in (["--top-k", "1"], ["--top-p", "1e-6"], ["--min-p", "1"]):
        assert text("--temperature", "2", *narrow) == plain, narrow
    for wide in (["--top-k", "100000"], ["--top-p", "1"], ["--min-p", "0"]):
        assert text("--temperature", "2", *wide) == warm, wide


def test_repetition_penalty(generate: Call, lm: zoo.LM) -> None:
    ids = lm.tokenizer.encode("x")
    expected = greedy(lm, ids, 12, penalty=20)
    assert expected != greedy(lm, ids, 12)
    assert generate("x", "--max-new-tokens", "12", "--repetition-penalty", "20").out == lm.tokenizer.decode(expected) + "\n"


def test_stop_ends_before_the_text(generate: Call) -> None:
    whole = generate(PROMPT, "--max-new-tokens", "20").out[:-1]
    middle = readable(whole, 5)  # over several tokens: its start must be held back
    late = readable(whole.partition(middle)[2], 2)
    said = generate(PROMPT, "--max-new-tokens", "20", "--stop", middle, "--json")
    assert said.last["answers"] == [whole.partition(middle)[0]]
    assert said.last["stopped_by"] == ["stop string"]
    assert said.last["new_tokens"] < 20
    both = generate(PROMPT, "--max-new-tokens", "20", "--stop", late, "--stop", middle, "--stop", "never said", "--json").last["answers"][0]
    assert both == whole[: min(whole.find(middle), whole.find(late))]
    tail = middle[-2:]  # both are complete with the same token: the one that starts first counts
    assert whole.find(tail) > whole.find(middle)
    assert generate(PROMPT, "--max-new-tokens", "20", "--stop", tail, "--stop", middle).out[:-1] == whole.partition(middle)[0]
    assert generate(PROMPT, "--max-new-tokens", "20", "--stop", "never said").out[:-1] == whole


def test_several_prompts_are_answered_as_if_alone(generate: Call, lm: zoo.LM, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPTS[2], encoding="utf-8")
    alone = [generate(p, "--max-new-tokens", "12", "--json").last["answers"][0] for p in PROMPTS]
    assert len(set(alone)) == 3
    said = generate(PROMPTS[0], "-", "--file", file, "--max-new-tokens", "12", "--json", stdin=PROMPTS[1])
    assert said.last["answers"] == alone
    assert said.out.rpartition("{")[0] == "".join(f"[{i + 1}] {answer}\n" for i, answer in enumerate(alone))
    assert said.last["prompt_tokens"] == sum(len(lm.tokenizer.encode(p)) for p in PROMPTS)
    assert said.last["new_tokens"] == 36


def test_prompts_of_a_batch_end_apart(generate: Call, ends: Path) -> None:
    """By end tokens and stop strings, at different steps; the others go on as if alone."""
    argv = ["--model", ends, "--max-new-tokens", "20", "--json"]
    prompts = [*PROMPTS, "having little or no money in my purse"]
    alone = [generate(*argv, p).last for p in prompts]
    stop = readable(max((f["answers"][0] for f in alone), key=len), 2)
    alone = [generate(*argv, "--stop", stop, p).last for p in prompts]
    together = generate(*argv, "--stop", stop, *prompts).last
    assert together["answers"] == [f["answers"][0] for f in alone]
    assert together["stopped_by"] == [f["stopped_by"][0] for f in alone]
    assert {"end token", "stop string", "length"} == set(together["stopped_by"])
    assert together["new_tokens"] == sum(f["new_tokens"] for f in alone)


def test_file_and_standard_input(generate: Call, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    text = PROMPT + "\n\nnaïve 漢字"
    file.write_text(text, encoding="utf-8")
    expected = generate(text, "--max-new-tokens", "6").out
    assert expected != generate(PROMPT, "--max-new-tokens", "6").out
    assert generate("--file", file, "--max-new-tokens", "6").out == expected
    assert generate("-", "--max-new-tokens", "6", stdin=text).out == expected
    assert generate("--file", "-", "--max-new-tokens", "6", stdin=text).out == expected


def test_chat_template(generate: Call, lm: zoo.LM) -> None:
    said = generate("--chat", PROMPT, "--max-new-tokens", "6", "--json")
    ids = lm.tokenizer.encode(f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n", special=True)
    assert ids[0] == 1
    assert said.last["prompt_tokens"] == len(ids)
    assert said.last["answers"] == [lm.tokenizer.decode(greedy(lm, ids, 6))]
    assert said.last["answers"] != generate(PROMPT, "--max-new-tokens", "6", "--json").last["answers"]


def test_threads(generate: Call) -> None:
    for n in (3, 2):
        assert generate(PROMPT, "--threads", str(n), "--max-new-tokens", "1").code == 0
        assert torch.get_num_threads() == n
    generate(PROMPT, "--max-new-tokens", "1")
    assert torch.get_num_threads() == 2  # left alone


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(generate: Call, loaded: list[zoo.LM], dtype: str) -> None:
    said = generate(PROMPT, "--dtype", dtype, "--max-new-tokens", "4", "--json")
    assert said.last["dtype"] == dtype
    assert {str(p.dtype) for p in loaded[0].model.parameters()} == {f"torch.{dtype}"}
    rows = said.last["prompt_tokens"] + 3
    assert said.last["cache_bytes_used"] == 3 * rows * (2 * 2 * 16 * (4 if dtype == "float32" else 2) + 4) + 8


def test_the_files_own_dtype(generate: Call, tmp_path: Path) -> None:
    folder = write_llama(tmp_path, dtype=torch.bfloat16)
    assert generate("--model", folder, PROMPT, "--max-new-tokens", "1", "--json").last["dtype"] == "bfloat16"


def test_backend(generate: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: dict[str, int] = {}
    for name, function in dict(zoo.attention.backends.BACKENDS).items():

        def counted(*args: Any, name: str = name, function: Any = function) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return function(*args)

        monkeypatch.setitem(zoo.attention.backends.BACKENDS, name, counted)
    texts, ran = set(), {}
    for backend in ("auto", "eager", "sdpa", "cpp"):
        counts.clear()
        said = generate(PROMPT, "--backend", backend, "--max-new-tokens", "10", "--compile", "off", "--json")
        texts.add(said.last["answers"][0])
        ran[backend] = set(counts)
        assert said.last["backend"] == ("cpp" if backend == "auto" else backend)
    assert len(texts) == 1
    assert ran["eager"] == {"eager"}
    assert ran["sdpa"] == {"sdpa"}
    assert "cpp" in ran["cpp"]


@pytest.mark.parametrize("method", zoo.attentions())
def test_every_attention_method(generate: Call, lm: zoo.LM, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    save_table("pod", lm.config, {"groups": [[0] * lm.config.num_key_value_heads] * lm.config.num_hidden_layers})
    save_table("kvsharer", lm.config, {"pairs": []})
    said = generate(PROMPT, "--attn", method, "--max-new-tokens", "10", "--json")
    assert said.code == 0
    assert said.last["attn"].partition(":")[0] == method
    # With their defaults the methods are exact for a few tokens: full always, kvsharer without a pair, a window of 1024, 256 slots.
    assert said.last["answers"] == [lm.tokenizer.decode(greedy(lm, lm.tokenizer.encode(PROMPT), 10))]


def test_attention_options(generate: Call) -> None:
    text = " ".join([PROMPT] * 40)
    full = generate(text, "--max-new-tokens", "6", "--json").last
    assert full["prompt_tokens"] > 400
    window = generate(text, "--attn", "sliding:window=64", "--max-new-tokens", "6", "--json").last
    assert window["attn"] == "sliding:window=64"
    assert window["cache_bytes_used"] == 3 * 64 * (2 * 2 * 16 * 4 + 4) + 8
    assert window["answers"] != full["answers"]
    subgen = generate(text, "--attn", "subgen:budget=256", "--max-new-tokens", "6", "--json").last
    assert subgen["attn"] == "subgen:budget=256"
    assert subgen["cache_bytes_used"] < full["cache_bytes_used"]
    assert subgen["answers"] != full["answers"]


def test_device(generate: Call, loaded: list[zoo.LM]) -> None:
    assert generate(PROMPT, "--device", "cpu:0", "--max-new-tokens", "1").code == 0
    assert loaded[0].device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_device_cuda(generate: Call) -> None:
    expected = generate(PROMPT, "--max-new-tokens", "10").out
    assert generate(PROMPT, "--device", "cuda", "--max-new-tokens", "10").out == expected


@pytest.mark.slow
def test_compile(generate: Call) -> None:
    eager = generate(PROMPT, "--compile", "off", "--max-new-tokens", "8", "--json").last
    compiled = generate(PROMPT, "--compile", "on", "--max-new-tokens", "8", "--json")
    assert eager["compiled_steps"] == 0
    assert compiled.last["compiled_steps"] == 7
    assert ", compiled;" in compiled.err
    assert compiled.last["answers"] == eager["answers"]


def test_list(generate: Call) -> None:
    said = generate("--list")
    assert said.code == 0
    assert said.err == ""
    for name in zoo.models():
        assert re.search(rf"^  {re.escape(name)} ", said.out, re.MULTILINE)
    for name, options in zoo.attentions().items():
        (line,) = [x for x in said.out.splitlines() if re.match(rf"  {name}[: ]", x)]
        assert all(f"{key}={str(value).lower() if isinstance(value, bool) else value}" in line for key, value in options.items())
        assert f"exact when: {zoo.attention.ATTENTION[name].exact_when}" in line


@pytest.mark.parametrize("main", [zoo.generate.main, zoo.chat.main])
def test_help_names_every_option(command: Call, main: Any) -> None:
    said = command(main, "--help")
    assert said.code == 0
    assert said.err == ""
    for option in ("--model", "--attn", "--dtype", "--device", "--compile", "--backend", "--threads", "--seed", "--stop", "--json"):
        assert option in said.out


# chat


def check_turns(lm: zoo.LM, calls: Calls, said: Said, messages: list[dict[str, str]], lines: list[str], n: int) -> None:
    """Each turn read only what was new, and answered as one pass over the whole conversation does."""
    context: list[int] = []
    for (fed, chosen), turn, line in zip(calls, said.turns, lines, strict=True):
        messages = [*messages, {"role": "user", "content": line}]
        context += fed
        text = lm.tokenizer.decode(context, skip_special=False)
        assert text == lm.tokenizer.render(messages), "what the cache has read is not the conversation"
        assert chosen == greedy(lm, context, n)
        assert turn["prompt_tokens"] == len(fed)
        assert turn["new_tokens"] == len(chosen)
        context += chosen[:-1]  # the last one is fed with the next turn, or stands in its text
        messages.append({"role": "assistant", "content": turn["answer"]})
        assert turn["answer"] == lm.tokenizer.decode([i for i in chosen if i not in lm.end_ids])


def spoken(*contents: str) -> list[dict[str, str]]:
    """Messages of the user and the assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


LINES = ["Call me Ishmael.", "having little or no money", "on shore"]


def test_chat_reads_only_the_new_turn(chat: Call, calls: Calls, lm: zoo.LM) -> None:
    """Answers cut by --max-new-tokens: their last token is read with the next turn."""
    said = chat("--max-new-tokens", "7", "--json", lines=LINES)
    assert said.code == 0
    assert [t["stopped_by"] for t in said.turns] == [["length"]] * 3
    check_turns(lm, calls, said, [], LINES, 7)
    for turn, line in list(zip(said.turns, LINES, strict=True))[1:]:
        new = lm.tokenizer.encode(f"<|im_end|>\n<|im_start|>user\n{line}<|im_end|>\n<|im_start|>assistant\n", bos=False, special=True)
        assert turn["prompt_tokens"] == 1 + len(new)
    assert said.out.splitlines()[:-1] == "\n".join(t["answer"] for t in said.turns).splitlines()


def test_chat_after_an_end_token(chat: Call, calls: Calls, ends: Path) -> None:
    """Answers that the model ended: the end token stands in the next turn's text, and is read once."""
    said = chat("--model", ends, "--max-new-tokens", "40", "--json", lines=LINES)
    assert ["end token"] in [t["stopped_by"] for t in said.turns[:2]]
    check_turns(zoo.load(str(ends), compile="off"), calls, said, [], LINES, 40)
    assert calls[1][0][0] == 2
    assert 2 not in calls[0][1][:-1]


def test_chat_system_message(chat: Call, calls: Calls, lm: zoo.LM) -> None:
    said = chat("--system", "Be brief.", "--max-new-tokens", "5", "--json", lines=LINES[:2])
    check_turns(lm, calls, said, [{"role": "system", "content": "Be brief."}], LINES[:2], 5)
    assert lm.tokenizer.decode(calls[0][0], skip_special=False).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert said.turns[0]["answer"] != chat("--max-new-tokens", "5", "--json", lines=LINES[:1]).turns[0]["answer"]


def test_chat_template_file(chat: Call, calls: Calls, lm: zoo.LM, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{% for m in messages %}{{ m.role[0] + ': ' + m.content + '\n' }}{% endfor %}a: ")
    bare = write_llama(tmp_path / "bare", chat=False)
    said = chat("--model", bare, "--template", file, "--max-new-tokens", "5", "--json", lines=LINES[:2])
    assert said.code == 0
    assert lm.tokenizer.decode(calls[0][0]) == "u: Call me Ishmael.\na: "
    assert calls[1][0][0] == calls[0][1][-1]
    assert lm.tokenizer.decode(calls[1][0][1:]) == "\nu: having little or no money\na: "
    one_line(chat("--model", bare, lines=LINES), "has no chat template; pass one with --template FILE")
    one_line(chat("--template", tmp_path / "none.jinja", lines=LINES), "cannot read", "none.jinja")


def test_a_template_that_rewrites_the_past_is_read_again(chat: Call, calls: Calls, lm: zoo.LM, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE.replace("m['content']", "(m['content'] if loop.last else '...')"))
    said = chat("--template", file, "--max-new-tokens", "5", "--json", lines=LINES[:2])
    text = "<|im_start|>user\n...<|im_end|>\n<|im_start|>assistant\n...<|im_end|>\n<|im_start|>user\nhaving little or no money<|im_end|>\n"
    assert lm.tokenizer.decode(calls[1][0], skip_special=False) == text + "<|im_start|>assistant\n"
    assert calls[1][1] == greedy(lm, calls[1][0], 5)
    assert said.turns[1]["prompt_tokens"] == len(calls[1][0])


def test_chat_with_a_stop_string_is_read_again(chat: Call, calls: Calls, lm: zoo.LM) -> None:
    whole = chat("--max-new-tokens", "12", "--json", lines=LINES[:1]).turns[0]["answer"]
    stop = readable(whole, 2)
    calls.clear()
    said = chat("--max-new-tokens", "12", "--stop", stop, "--json", lines=LINES[:2])
    first, second = said.turns
    assert first["answer"] == whole.partition(stop)[0]
    assert first["stopped_by"] == ["stop string"]
    messages = spoken(LINES[0], first["answer"], LINES[1])
    assert calls[1][0] == lm.tokenizer.chat(messages)
    assert second["answer"] == lm.chat(messages, 12, stop=[stop])


def test_chat_sampling(chat: Call) -> None:
    def talk(*argv: str) -> list[str]:
        return [t["answer"] for t in chat("--max-new-tokens", "6", "--json", *argv, lines=LINES[:2]).turns]

    plain, warm = talk(), talk("--temperature", "2", "--seed", "1")
    assert warm != plain
    assert warm == talk("--temperature", "2", "--seed", "1")
    assert warm != talk("--temperature", "2", "--seed", "2")
    for narrow in (["--top-k", "1"], ["--top-p", "1e-6"], ["--min-p", "1"]):
        assert talk("--temperature", "2", *narrow) == plain
    assert talk("--repetition-penalty", "1.7") != plain


def test_chat_load_options(chat: Call, loaded: list[zoo.LM]) -> None:
    options = "--dtype bfloat16 --backend eager --attn sliding:window=16 --threads 2 --compile off --device cpu --max-new-tokens 3"
    (turn,) = chat("--json", *options.split(), lines=LINES[:1]).turns
    assert (turn["dtype"], turn["backend"], turn["attn"], turn["compiled_steps"]) == ("bfloat16", "eager", "sliding:window=16", 0)
    assert torch.get_num_threads() == 2
    assert loaded[0].step.mode == "off"
    assert turn["cache_bytes_used"] == 3 * 16 * (2 * 2 * 16 * 2 + 4) + 8


def test_chat_reset(chat: Call) -> None:
    said = chat("--max-new-tokens", "5", "--json", lines=[LINES[0], LINES[1], "/reset", LINES[0], LINES[1]])
    a, b, c, d = said.turns
    assert (a["answer"], b["answer"]) == (c["answer"], d["answer"])
    assert (a["prompt_tokens"], b["prompt_tokens"]) == (c["prompt_tokens"], d["prompt_tokens"])
    assert "forgotten" in said.err


def test_chat_stats(chat: Call) -> None:
    said = chat("--max-new-tokens", "5", "--json", lines=["/stats", LINES[0], "/stats"])
    assert "nothing has been said yet" in said.err
    shown = FIGURES.search(said.err)
    assert shown
    assert shown[1] == str(said.turns[0]["prompt_tokens"])
    assert shown[2] == "5"
    assert len(said.turns) == 1
    assert "tokens/s" not in said.out


def test_chat_switches_attention(chat: Call, lm: zoo.LM, calls: Calls) -> None:
    said = chat("--max-new-tokens", "5", "--json", lines=[LINES[0], "/attn sliding:window=8", LINES[1], "/attn nonsense", LINES[2]])
    assert [t["attn"] for t in said.turns] == ["full", "sliding:window=8", "sliding:window=8"]
    assert "attention is sliding:window=8; the conversation is read again" in said.err
    assert f"error: unknown attention method 'nonsense'; known: {KNOWN}\n" in said.err
    assert said.code == 0
    past = spoken(LINES[0], said.turns[0]["answer"], LINES[1])
    assert calls[1][0] == lm.tokenizer.chat(past)
    assert len(calls[2][0]) < len(calls[1][0])  # the failed switch has dropped nothing
    assert said.turns[1]["cache_bytes_used"] == 3 * 8 * (2 * 2 * 16 * 4 + 4) + 8


@pytest.mark.parametrize("line", ["/help", "/nonsense", "/"])
def test_chat_help(chat: Call, line: str) -> None:
    said = chat("--json", lines=[line])
    assert said.code == 0
    assert said.err.count(zoo.chat.HELP) == 1
    assert said.turns == []
    assert len(said.out.splitlines()) == 1


@pytest.mark.parametrize("line", ["/exit", "/quit"])
def test_chat_exit(chat: Call, line: str) -> None:
    said = chat("--max-new-tokens", "2", "--json", lines=[LINES[0], line, LINES[1]])
    assert said.code == 0
    assert len(said.turns) == 1


def test_chat_ends_with_its_input(chat: Call) -> None:
    said = chat(lines=[])
    assert said.code == 0
    assert said.out == ""
    assert said.err == "> \n"
    said = chat("--max-new-tokens", "2", "--json", stdin=b"\n  \nCall me")  # blank lines say nothing; the last line lacks its end
    assert said.code == 0
    assert len(said.turns) == 1


def test_chat_goes_on_after_a_turn_that_is_too_long(chat: Call, calls: Calls, lm: zoo.LM, tmp_path: Path) -> None:
    folder = write_llama(tmp_path, max_position_embeddings=100)
    said = chat("--model", folder, "--max-new-tokens", "4", "--json", lines=[LINES[0], "漢字 " * 200, LINES[1]])
    assert said.code == 0
    assert "error: the prompt is " in said.err
    assert "Traceback" not in said.err
    first, second = said.turns
    messages = spoken(LINES[0], first["answer"], LINES[1])
    assert calls[-1][0] == lm.tokenizer.chat(messages)  # as if it had never been said
    assert second["answer"] == lm.chat(messages, 4)


def test_a_conversation_fills_the_context(chat: Call, calls: Calls, tmp_path: Path) -> None:
    """What earlier turns put into the cache counts, not only the new one."""
    n = len(chat("--max-new-tokens", "4", "--json", lines=LINES[:1]) and calls.pop()[0])
    folder = write_llama(tmp_path, max_position_embeddings=n + 10)
    said = chat("--model", folder, "--max-new-tokens", "4", "--json", lines=[LINES[0], "x"])
    assert len(said.turns) == 1
    assert len(calls[1][0]) < n + 10  # alone it would fit
    assert f"error: the prompt is {n + 3 + len(calls[1][0])} tokens; this model's context holds {n + 10}" in said.err


def test_chat_takes_a_message_back_when_interrupted(lm: zoo.LM) -> None:
    talk = zoo.chat.Conversation(lm, None, 20, {})
    first = "".join(talk.say(LINES[0]))
    pieces = talk.say(LINES[1])
    next(pieces)
    with pytest.raises(KeyboardInterrupt):
        pieces.throw(KeyboardInterrupt())
    assert [m["content"] for m in talk.messages] == [LINES[0], first]
    assert "".join(talk.say(LINES[2])) == lm.chat([*talk.messages[:2], {"role": "user", "content": LINES[2]}], 20)


@pytest.mark.slow
def test_chat_with_a_real_model(command: Call, calls: Calls, smollm2: Path) -> None:
    lines = ["What is the capital of France?", "And of Italy?"]
    said = command(zoo.chat.main, "--model", smollm2, "--dtype", "float32", "--max-new-tokens", "8", "--json", stdin="\n".join(lines))
    real = zoo.load(str(smollm2), dtype="float32", compile="off")
    messages: list[dict[str, str]] = []
    for line, turn in zip(lines, said.turns, strict=True):
        messages.append({"role": "user", "content": line})
        assert turn["answer"] == real.chat(messages, 8)  # a fresh conversation that reads everything at once
        messages.append({"role": "assistant", "content": turn["answer"]})
    assert "Paris" in said.turns[0]["answer"]
    assert said.turns[1]["prompt_tokens"] < len(real.tokenizer.encode("And of Italy?")) + 15


# Bad input


def damaged(kind: str, folder: Path) -> Path:
    """A checkpoint with one fault."""
    changes: dict[str, dict[str, Any]] = {
        "unknown key": {"frobnication": 3},
        "scaling": {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}},
        "activation": {"hidden_act": "gelu"},
        "family": {"model_type": "mamba"},
        "shape": {"intermediate_size": 95},
        "negative": {"num_hidden_layers": -2},
    }
    write_llama(folder, **({} if kind not in changes or kind == "shape" else changes[kind]))
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    match kind:
        case "no config":
            (folder / "config.json").unlink()
        case "config is no JSON":
            (folder / "config.json").write_text('{"model_type": "llama",\n')
        case "shape":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, **changes["shape"]}))
        case "half a shard":
            weights.write_bytes(data[: len(data) // 2])
        case "flipped bit":
            weights.write_bytes(data[:12] + bytes([data[12] ^ 0x80]) + data[13:])
        case "flipped length":
            weights.write_bytes(data[:6] + bytes([data[6] ^ 0x10]) + data[7:])
        case "no weights":
            weights.unlink()
        case "int8":
            save_file({k: v.to(torch.int8) if "q_proj" in k else v for k, v in load_file(weights).items()}, weights)
        case "missing tensor":
            save_file({k: v for k, v in load_file(weights).items() if "1.mlp.up" not in k}, weights)
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
        case "broken tokenizer":
            (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes()[:100])
    return folder


FAULTS = {
    "no config": ["no config.json"],
    "config is no JSON": ["config.json"],
    "unknown key": ["frobnication"],
    "scaling": ["'longrope' is not implemented"],
    "activation": ["hidden_act='gelu' is not implemented"],
    "family": ["model_type 'mamba' is not implemented", "llama"],
    "shape": ["wrong shape", "expected (95, 64)"],
    "negative": ["num_hidden_layers", "-2"],
    "half a shard": ["model.safetensors"],
    "flipped bit": ["model.safetensors"],
    "flipped length": ["model.safetensors"],
    "no weights": ["model.safetensors", "missing"],
    "int8": ["wrong dtype", "q_proj.weight is I8"],
    "missing tensor": ["missing: model.layers.1.mlp.up_proj.weight"],
    "no tokenizer": ["no tokenizer"],
    "broken tokenizer": ["tokenizer.json"],
}


@pytest.mark.parametrize("kind", FAULTS)
def test_damaged_checkpoints(generate: Call, tmp_path: Path, kind: str) -> None:
    one_line(generate("--model", damaged(kind, tmp_path / "model"), PROMPT), *FAULTS[kind])


ARGUMENTS: list[tuple[list[str], list[str]]] = [
    (["--model", "no-such-model"], ["unknown model 'no-such-model'", "smollm2-135m"]),
    (["--model", "./no/such/folder"], ["no/such/folder", "is no folder"]),
    (["--model", ""], ["unknown model ''"]),
    (["--attn", "subgen:budget=-5"], ["budget='-5' is not a number of tokens such as 1024, or a share such as 25% or 25%/256"]),
    (["--attn", "subgen:budget=0"], ["budget=0 must be at least 128"]),
    (["--attn", "subgen:budget=0%"], ["budget=0% must be above 0%"]),
    (["--attn", "subgen:budget=900%"], ["budget=900% must be", "at most 200%"]),
    (["--attn", "subgen:budget=banana"], ["budget='banana' is not"]),
    (["--attn", "subgen:budget=1e9"], ["budget='1e9' is not"]),
    (["--attn", "subgen:budget=99999999999999999999"], ["subgen: budget=100000000000000000000 must be"]),
    (["--attn", "sliding:window=0"], ["window=0 must be between 1 and"]),
    (["--attn", "sliding:window=-1"], ["window=-1 must be between 1 and"]),
    (["--attn", "sliding:window=99999999999999999999"], ["must be between 1 and"]),
    (["--attn", "sliding:window=1.5"], ["window='1.5' is not a whole number"]),
    (["--attn", "banana"], [f"unknown attention method 'banana'; known: {KNOWN}\n"]),
    (["--attn", ""], ["unknown attention method ''"]),
    (["--attn", "sliding:banana=3"], ["sliding: unknown option 'banana=3'", "window=1024"]),
    (["--attn", "sliding:window"], ["sliding: option 'window' has no value; write window=1024"]),
    (["--attn", "full:window=3"], ["full: unknown option 'window=3'", "none"]),
    (["--attn", "sliding:window=8,window=8"], ["sliding: option 'window' is given twice"]),
    (["--backend", "banana"], ["backend 'banana' is unknown; choose one of auto, eager, sdpa"]),
    (["--dtype", "float8"], ["invalid choice: 'float8'"]),
    (["--compile", "banana"], ["invalid choice: 'banana'"]),
    (["--device", "banana"], ["device 'banana' cannot be used here"]),
    (["--device", ""], ["device '' cannot be used here"]),
    (["--threads", "0"], ["--threads 0 must be between 1 and 1024"]),
    (["--threads", "99999"], ["--threads 99999 must be"]),
    (["--threads", "two"], ["--threads", "'two'"]),
    (["--temperature", "-1"], ["temperature=-1.0 must be 0 (greedy)"]),
    (["--temperature", "nan"], ["temperature=nan must be"]),
    (["--temperature", "hot"], ["--temperature", "'hot'"]),
    (["--temperature", "1", "--top-p", "0"], ["top_p=0.0 must be above 0 and at most 1"]),
    (["--temperature", "1", "--top-k", "0"], ["top_k=0 must be at least 1"]),
    (["--temperature", "1", "--min-p", "2"], ["min_p=2.0 must be between 0 and 1"]),
    (["--top-p", "0.9"], ["they need temperature above 0"]),
    (["--top-k", "3"], ["they need temperature above 0"]),
    (["--repetition-penalty", "0"], ["repetition_penalty=0.0 must be above 0"]),
    (["--seed", "x"], ["--seed", "'x'"]),
    (["--stop", ""], ["--stop '' is empty"]),
    (["--max-new-tokens", "0"], ["--max-new-tokens 0 must be at least 1"]),
    (["--max-new-tokens", "-1"], ["--max-new-tokens -1 must be at least 1"]),
    (["--no-such-option"], ["unrecognized arguments: --no-such-option"]),
    (["--no-such\noption"], ["unrecognized arguments: --no-such option"]),
]


@pytest.mark.parametrize(("argv", "says"), ARGUMENTS, ids=[" ".join(a) for a, _ in ARGUMENTS])
def test_bad_arguments(generate: Call, argv: list[str], says: list[str]) -> None:
    one_line(generate(PROMPT, *argv), *says)


@pytest.mark.parametrize(("argv", "says"), ARGUMENTS, ids=[" ".join(a) for a, _ in ARGUMENTS])
def test_bad_arguments_of_chat(chat: Call, argv: list[str], says: list[str]) -> None:
    one_line(chat(*argv, lines=LINES), *says)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here, so asking for it is no mistake")
def test_cuda_without_a_gpu(generate: Call) -> None:
    one_line(generate(PROMPT, "--device", "cuda"), "device 'cuda' cannot be used here")


def test_bad_prompts(generate: Call, tmp_path: Path) -> None:
    latin, empty = tmp_path / "latin.txt", tmp_path / "empty.txt"
    latin.write_bytes("café".encode("latin-1"))
    empty.write_bytes(b"")
    one_line(generate(), "no prompt; give some text, - for standard input, or --file")
    one_line(generate(""), "the prompt is empty")
    one_line(generate(PROMPT, ""), "the prompt is empty")
    one_line(generate("-", stdin=b""), "the prompt is empty")
    one_line(generate("--file", empty), "the prompt is empty")
    one_line(generate("--file", tmp_path / "none.txt"), "cannot read", "none.txt", "No such file")
    one_line(generate("--file", tmp_path), "cannot read", str(tmp_path), "Is a directory")
    one_line(generate("--file", latin), "latin.txt is not UTF-8 text")
    one_line(generate("-", stdin=b"caf\xe9"), "standard input is not UTF-8 text")


def test_prompt_longer_than_the_context(generate: Call, lm: zoo.LM) -> None:
    text = "漢字 " * 4000
    n = len(lm.tokenizer.encode(text))
    one_line(generate(text), f"the prompt is {n} tokens; this model's context holds 4096, answer included: shorten it")
    one_line(generate("short", text), f"the prompt is {n} tokens")


def test_chat_option_without_a_template(generate: Call, tmp_path: Path) -> None:
    bare = write_llama(tmp_path, chat=False)
    one_line(generate("--model", bare, "--chat", PROMPT), "has no chat template; pass one with --template FILE")
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}!")
    one_line(generate("--model", bare, "--template", template, PROMPT), "--template is for --chat")
    told = generate("--model", bare, "--chat", "--template", template, PROMPT, "--max-new-tokens", "5")
    assert (told.code, told.out) == (0, generate("--model", bare, PROMPT + "!", "--max-new-tokens", "5").out)


def test_chat_input_that_is_no_text(chat: Call) -> None:
    said = chat(stdin=b"caf\xe9\n")
    assert said.code == 2
    assert said.out == ""
    assert said.err == "> error: standard input is not UTF-8 text\n"


@pytest.mark.parametrize("main", [zoo.generate.main, zoo.chat.main])
def test_no_standard_input_at_all(tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, main: Any) -> None:
    monkeypatch.setattr(sys, "stdin", None)  # what Python makes of `<&-`
    code = zoo.cli.run(main, ["--model", str(tiny), *(["-"] if main is zoo.generate.main else [])])
    one_line(Said(code, *capsys.readouterr()), "standard input is closed")


def test_no_permission(generate: Call, tmp_path: Path) -> None:
    file, folder = tmp_path / "secret.txt", write_llama(tmp_path / "model")
    file.write_text("text")
    file.chmod(0)
    if os.access(file, os.R_OK):
        pytest.skip("root may read everything, so there is no file without permission")
    one_line(generate("--file", file), "cannot read", "Permission denied")
    (folder / "model.safetensors").chmod(0)
    one_line(generate("--model", folder, PROMPT), "model.safetensors", "ermission denied")
    (folder / "config.json").chmod(0)
    one_line(generate("--model", folder, PROMPT), "config.json", "ermission denied")


def test_no_permission_as_said_by_the_system(generate: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as far as root can see it: the system's answer is injected."""

    def refused(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refused)
    one_line(generate("--file", tmp_path / "secret.txt"), "cannot read", "secret.txt: Permission denied")


def test_more_memory_than_there_is(generate: Call, tmp_path: Path) -> None:
    """A cache of half a petabyte: beyond any address space, so that it fails at once."""
    folder = write_llama(tmp_path, max_position_embeddings=9 * 10**11, head_dim=64)
    one_line(generate("--model", folder, PROMPT, "--max-new-tokens", str(8 * 10**11), "--compile", "off"), "out of memory; a smaller model")


def test_other_errors_are_not_swallowed() -> None:
    def broken(argv: list[str] | None) -> None:
        raise RuntimeError("a mistake in the code")

    with pytest.raises(RuntimeError, match="a mistake"):
        zoo.cli.run(broken, [])


# Real processes


# Buffered, as it is for users: what a failed write leaves in the buffer must not fail again when the interpreter ends.
ENV = {**{k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}, "OMP_NUM_THREADS": "1"}


def shell(*argv: str | Path, **kw: Any) -> subprocess.CompletedProcess[str]:
    options = {"cwd": ROOT, "env": ENV, "encoding": "utf-8", "timeout": 120, "capture_output": True, **kw}
    return subprocess.run([sys.executable, *map(str, argv)], **options)


def test_a_process_that_generates(tiny: Path, lm: zoo.LM) -> None:
    done = shell("-m", "zoo.generate", "--model", tiny, "-", "--max-new-tokens", "6", "--json", input=PROMPT)
    assert done.returncode == 0
    assert done.stdout.startswith(lm.generate(PROMPT, 6) + "\n")
    assert json.loads(done.stdout.splitlines()[-1])["new_tokens"] == 6
    assert FIGURES.fullmatch(done.stderr)


def test_a_process_that_chats(tiny: Path, lm: zoo.LM) -> None:
    done = shell("-m", "zoo.chat", "--model", tiny, "--max-new-tokens", "6", input=LINES[0] + "\n")
    assert done.returncode == 0
    assert done.stderr == "> > \n"
    assert done.stdout == lm.chat(spoken(LINES[0]), 6) + "\n"


def test_a_process_with_bad_input(tiny: Path) -> None:
    done = shell("-m", "zoo.generate", "--model", tiny, PROMPT, "--attn", "banana")
    one_line(Said(done.returncode, done.stdout, done.stderr), "unknown attention method 'banana'")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
@pytest.mark.parametrize("module", ["zoo.generate", "zoo.chat"])
def test_full_disk(tiny: Path, module: str) -> None:
    argv = [PROMPT] if module == "zoo.generate" else []
    with open("/dev/full", "w") as full:
        done = shell("-m", module, "--model", tiny, *argv, input="hi\n", stdout=full, capture_output=False, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr.removeprefix("> ") == "error: No space left on device\n"


def test_closed_pipe(tiny: Path) -> None:
    argv = ["-m", "zoo.generate", "--model", str(tiny), PROMPT, "--max-new-tokens", "2000", "--compile", "off"]
    process = subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV)
    assert process.stdout
    assert process.stderr
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 0


def test_interrupt(tiny: Path) -> None:
    argv = ["-m", "zoo.generate", "--model", str(tiny), PROMPT, "--max-new-tokens", "4000", "--compile", "off"]
    process = subprocess.Popen(
        [sys.executable, *argv],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENV,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,  # a shell's background jobs ignore it
    )
    assert process.stdout
    assert process.stdout.read(1)  # text is streamed: it comes long before the end
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == b"interrupted\n"


def test_standard_output_that_cannot_hold_the_text(tiny: Path, lm: zoo.LM) -> None:
    assert not lm.generate(PROMPT, 20).isascii()
    done = shell("-m", "zoo.generate", "--model", tiny, PROMPT, "--max-new-tokens", "20", env={**ENV, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2
    assert done.stderr == "error: standard output takes only ascii text; set PYTHONIOENCODING=utf-8\n"


def test_no_compiler(tiny: Path, lm: zoo.LM, tmp_path: Path) -> None:
    env = {**{k: v for k, v in ENV.items() if k != "CXX"}, "PATH": str(tmp_path)}
    done = shell("-m", "zoo.generate", "--model", tiny, PROMPT, "--max-new-tokens", "6", "--compile", "on", env=env)
    assert done.returncode == 0
    assert done.stdout == lm.generate(PROMPT, 6) + "\n"
    first, told, rest = done.stderr.split("\n", 2)
    assert first.startswith("the CPU kernels cannot be used (no C++ compiler 'g++': install g++")
    assert told == "torch.compile cannot run here: no C++ compiler (g++); decoding runs eagerly"
    assert FIGURES.fullmatch(rest)
    assert "compiled" not in rest


def test_flex_without_a_compiler(tiny: Path, tmp_path: Path) -> None:
    """FlexAttention is compiled at its first call: said before, and in one line."""
    env = {**{k: v for k, v in ENV.items() if k != "CXX"}, "PATH": str(tmp_path)}
    done = shell("-m", "zoo.generate", "--model", tiny, PROMPT, "--backend", "flex", env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: backend 'flex' cannot be used: PyTorch compiles its kernels, and there is no C++ compiler (g++)\n"


def test_chat_repetition_penalty_counts_the_whole_conversation(tiny: Path) -> None:
    """Continuing a cache with its tokens as context answers as reading everything at once does, and chat passes every token it has read."""
    lm = zoo.load(str(tiny), dtype="float32", compile="off")
    lm.end_ids = frozenset()
    choose = sampler(repetition_penalty=5.0)
    first, second = list(range(5, 30)), [40, 41, 42]
    cache = lm.new_cache()
    lm.prefill(first, cache)
    kept = list(lm.tokens([second], 12, choose, cache=cache.clone(), context=first))
    assert kept == list(lm.tokens([first + second], 12, choose))
    assert kept != list(lm.tokens([second], 12, choose, cache=cache))
    talk = Conversation(lm, None, 12, {"repetition_penalty": 5.0})
    "".join(talk.say("Call me Ishmael"))
    assert talk.cache is not None
    assert len(talk.read) == int(talk.cache.tokens_seen) + 1  # the last new token is not fed yet
    other = Conversation(lm, None, 12, {"repetition_penalty": 5.0})
    "".join(other.say("Call me Ishmael"))
    other.read = []
    assert "".join(other.say("and then?")) != "".join(talk.say("and then?"))


def test_stop_may_be_one_string(tiny: Path) -> None:
    """`stop="abc"` is one stop string, not three."""
    lm = zoo.load(str(tiny), dtype="float32", compile="off")
    text = str(lm.generate("Call me", 30))
    stop = text[8:11]
    assert lm.generate("Call me", 30, stop=stop) == lm.generate("Call me", 30, stop=[stop]) == text[: text.index(stop)]
    assert any(letter in text[: text.index(stop)] for letter in stop) or text.index(stop) == 8
