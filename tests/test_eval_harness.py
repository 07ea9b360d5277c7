"""zoo as a model of lm-evaluation-harness: requests and whole tasks as its own HFLM answers them from the same weights, every method's
score through its cache, and bad arguments in one line. Nothing may ask the network."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CORPUS, write_checkpoint

import zoo
from zoo import cli
from zoo.attention import ATTENTION
from zoo.errors import ZooError

pytest.importorskip("lm_eval", reason="the extra `harness` is not installed")

import lm_eval
from lm_eval._cli import HarnessCLI
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from zoo.eval import harness
from zoo.eval.harness_lm import ZooLM

KNOWN = ", ".join(sorted(ATTENTION))

ROOT = Path(__file__).resolve().parents[1]
CLOSE = 1e-3
LENGTH = 200  # of both models' contexts: shorter than some requests

PAIRS = [
    (CORPUS[:300], " a little"),  # three that share a context, of several tokens and of one
    (CORPUS[:300], " the world. It is"),
    (CORPUS[:300], "x"),
    ("", "Call me Ishmael"),
    ("", "<|im_start|>Call"),  # begins with what an empty context would be
    ("Call me ", "Ishmael"),  # the space belongs to what is scored
    ("<|im_start|>user\nhello<|im_end|>\n", "naïve <|im_end|> café"),
    (CORPUS, CORPUS[:90]),  # loses its beginning
    ("x", CORPUS[:500]),
]
TEXTS = ["Call me Ishmael.", CORPUS, "", CORPUS[40:700], "x"]
PROMPTS = [
    (CORPUS[:300], {"until": ["e"], "max_gen_toks": 30}),
    ("never mind", {"until": ["e"], "max_gen_toks": 30}),
    ("Call me", {"until": ["e"], "max_gen_toks": 30}),
    ("Call me", {"until": "\n\n", "max_new_tokens": 12, "do_sample": False, "temperature": 0.0, "num_beams": 1}),
    (CORPUS, {"until": [], "max_gen_toks": 60}),  # loses its beginning
    ("<|im_start|>user\nhello<|im_end|>\n", {"max_gen_toks": 40, "repetition_penalty": 1.3}),
]


def requests(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, a if isinstance(a, tuple) else (a,), i) for i, a in enumerate(arguments)]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(self: Any, address: Any) -> None:
        raise AssertionError(f"the network was asked: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for constant in ("huggingface_hub.constants.HF_HUB_OFFLINE", "datasets.config.HF_HUB_OFFLINE"):
        monkeypatch.setattr(constant, True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def with_bos(folder: Path) -> Path:
    """Its tokenizer begins every text with BOS."""
    path = folder / "tokenizer.json"
    file = json.loads(path.read_text())
    bos: dict[str, Any] = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    special = {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    file["post_processor"] = {"type": "TemplateProcessing", "single": [bos, first], "pair": [bos, first, second], "special_tokens": special}
    path.write_text(json.dumps(file))
    about = json.loads((folder / "tokenizer_config.json").read_text())
    del about["add_bos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module", params=["llama", "mistral", "gpt_neox", "llama with BOS"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A checkpoint, and lm_eval's own model of it."""
    folder = write_checkpoint(tmp_path_factory.mktemp("harness") / "tiny", request.param.partition(" ")[0])
    if request.param.endswith("BOS"):
        with_bos(folder)
    # Their logits_cache takes the wrong tokens of requests whose context and continuation are cut elsewhere in the same text.
    theirs = get_model("hf")(pretrained=str(folder), device="cpu", max_length=LENGTH, batch_size=2, logits_cache=False)
    theirs.tokenizer.pad_token = "<|endoftext|>"  # theirs of GPT-NeoX is not in this vocabulary
    return folder, theirs


def likely(theirs: Any) -> tuple[str, str]:
    """A context and one character that the model holds to be the likeliest after it."""
    for end in range(40, 400):
        logits = theirs._model_call(torch.tensor([theirs.tok_encode(CORPUS[:end])]))[0, -1]
        text = theirs.tokenizer.decode(logits.argmax().item())
        if text.isprintable() and not text.isspace() and theirs._encode_pair(CORPUS[:end], text)[1] == [int(logits.argmax())]:
            return CORPUS[:end], text
    raise AssertionError("no context of these is continued by a token of its own")


@pytest.mark.parametrize("batch", [1, 3])
def test_loglikelihoods_are_those_of_transformers(pair: tuple[Path, Any], batch: int) -> None:
    folder, theirs = pair
    asked = requests("loglikelihood", [*PAIRS, likely(theirs)])
    ours = ZooLM(str(folder), max_length=LENGTH, batch_size=batch).loglikelihood(asked)
    right = theirs.loglikelihood(asked)
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in right], abs=CLOSE)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in right]
    assert right[-1][1]
    assert not right[0][1]
    assert len({round(score, 2) for score, _ in ours}) == len(asked)


@pytest.mark.parametrize("batch", [1, 3])
def test_rolling_loglikelihoods_are_those_of_transformers(pair: tuple[Path, Any], batch: int) -> None:
    folder, theirs = pair
    asked = requests("loglikelihood_rolling", [text for text in TEXTS if text])
    ours = ZooLM(str(folder), max_length=LENGTH, batch_size=batch).loglikelihood_rolling(asked)
    assert len(theirs.tok_encode(CORPUS)) > 2 * LENGTH
    assert ours == pytest.approx(theirs.loglikelihood_rolling(asked), abs=CLOSE)


@pytest.mark.parametrize("batch", [1, 3])
def test_answers_are_those_of_transformers(pair: tuple[Path, Any], batch: int) -> None:
    folder, theirs = pair
    asked = requests("generate_until", PROMPTS)
    ours = ZooLM(str(folder), max_length=LENGTH, batch_size=batch).generate_until(asked)
    assert ours == theirs.generate_until(asked)
    assert all("e" not in text for text in ours[:3])
    assert len(set(ours)) > 4


def test_texts_become_the_same_tokens(pair: tuple[Path, Any], tmp_path: Path) -> None:
    folder, theirs = pair
    ours = ZooLM(str(folder))
    assert ours.prefix_token_id == theirs.prefix_token_id == 1
    assert ours.eot_token_id == theirs.eot_token_id == 2
    assert ours.max_length == 4096
    for text in ["Call me", "<|im_start|>user\nhi<|im_end|>", "", " naïve <|endoftext|>"]:
        for special in (None, True, False):
            assert ours.tok_encode(text, add_special_tokens=special) == theirs.tok_encode(text, add_special_tokens=special)
    ours = ZooLM(str(folder), add_bos_token=True, prefix_token_id=0)
    assert ours.prefix_token_id == 0
    assert ours.tok_encode("Call me") == [1, *ZooLM(str(folder), add_bos_token=False).tok_encode("Call me")]
    assert ours.tok_encode("<|endoftext|>Call") == ours.tok_encode(
        "<|endoftext|>Call", add_special_tokens=False
    )  # as it is what comes first


def test_chat_templates_are_written_alike(pair: tuple[Path, Any]) -> None:
    folder, theirs = pair
    ours = ZooLM(str(folder))
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "The answer is"},
    ]
    for messages, generation in ((chat[:2], True), (chat, False)):
        assert ours.apply_chat_template(messages, generation) == theirs.apply_chat_template(messages, generation)
    assert ours.apply_chat_template(chat, False).endswith("assistant\nThe answer is")
    assert ours.chat_template(True) == theirs.chat_template(True) != ""
    assert ours.tokenizer_name == str(folder).replace("/", "__")
    ours.tokenizer.chat_template = (
        "{% for m in messages %}{{ raise_exception('no system') if m.role == 'system' else m.content }}{% endfor %}"
    )
    assert ours.apply_chat_template(chat[:2]) == "Hello?"
    ours.tokenizer.chat_template = "{{ raise_exception('nothing') }}"
    with pytest.raises(ZooError, match="nothing"):
        ours.apply_chat_template(chat[:2])


# Methods

METHODS = [
    "subgen:budget=64,when=prompt",
    "subgen:budget=50%,when=decode",
    "snapkv:budget=25%,when=prompt",
    "sinks:budget=128,when=stream",
    "sliding:window=20",
    "subgen_paper",
]


def by_hand(lm: Any, context: list[int], new: list[int], share: int | None = None) -> tuple[float, bool]:
    """A prompt, then one token after the other, the context's last to begin with."""
    cache = lm.new_cache(1, prompt_tokens=share)
    logits, total, greedy = lm.prefill(context[:-1] or context, cache), 0.0, True
    if len(context) > 1:
        logits = lm.decode_step(context[-1:], cache)
    for n, token in enumerate(new):
        total += float(logits[0].log_softmax(-1)[token])
        greedy &= int(logits[0].argmax()) == token
        if n + 1 < len(new):
            logits = lm.decode_step([token], cache)
    return total, greedy


@pytest.mark.parametrize("attn", METHODS)
def test_a_score_is_of_the_cache_that_the_method_leaves(tiny: Path, attn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the batch, as by hand; and where something was dropped, not full attention's."""
    context, other = CORPUS[:600], CORPUS[100:900]
    asked = requests("loglikelihood", [(context, CORPUS[600:760]), (context, " a"), (other, CORPUS[:300]), (context, " zoo"), ("x", " y")])
    model = ZooLM(str(tiny), attn)
    want = [by_hand(model.lm, *model._encode_pair(*request.args)) for request in asked]
    for batch, chunk in ((1, 512), (2, 30), (3, 7), (4, 512)):
        monkeypatch.setattr("zoo.eval.harness_lm.CHUNK", chunk)
        got = ZooLM(str(tiny), attn, batch_size=batch).loglikelihood(asked)
        assert [score for score, _ in got] == pytest.approx([score for score, _ in want], abs=CLOSE)
        assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
    full = ZooLM(str(tiny)).loglikelihood(asked)
    assert abs(full[0][0] - want[0][0]) > 100 * CLOSE
    assert abs(full[1][0] - want[1][0]) > 10 * CLOSE  # a continuation of one token
    assert abs(full[2][0] - want[2][0]) > 100 * CLOSE
    assert full[4][0] == pytest.approx(want[4][0], abs=CLOSE)  # nothing to drop


@pytest.mark.parametrize("attn", ["sinks:budget=50%,when=stream", "subgen:budget=50%,when=decode", "sliding:window=20"])
def test_a_rolling_score_is_a_streaming_one(tiny: Path, attn: str) -> None:
    asked = requests("loglikelihood_rolling", [CORPUS[:700], CORPUS[7:1000], CORPUS[:30]])
    model = ZooLM(str(tiny), attn)
    ids = [model.tok_encode(request.args[0]) for request in asked]
    share = [len(i) + 1 if "%" in attn else None for i in ids]
    want = [by_hand(model.lm, [1], i, n)[0] for i, n in zip(ids, share, strict=True)]
    for batch in (1, 3):
        assert ZooLM(str(tiny), attn, batch_size=batch).loglikelihood_rolling(asked) == pytest.approx(want, abs=CLOSE)
    full = ZooLM(str(tiny)).loglikelihood_rolling(asked)
    assert min(abs(a - b) for a, b in zip(full[:2], want[:2], strict=True)) > 1
    assert full[2] == pytest.approx(want[2], abs=CLOSE) or "sliding" in attn


def test_rolling_with_a_prompt_method_says_that_it_compresses_nothing(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = requests("loglikelihood_rolling", [CORPUS[:900]])
    got = ZooLM(str(tiny), "sinks:budget=64,when=prompt").loglikelihood_rolling(asked)
    assert "sinks:budget=64,when=prompt: whole texts are scored without compressing anything" in caplog.text
    assert got == pytest.approx(ZooLM(str(tiny)).loglikelihood_rolling(asked), abs=CLOSE)
    caplog.clear()
    ZooLM(str(tiny), "sinks:budget=128,when=stream").loglikelihood_rolling(asked)
    assert not caplog.records


def test_shared_contexts_are_read_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    prefill = zoo.LM.prefill
    monkeypatch.setattr(zoo.LM, "prefill", lambda self, ids, cache, lengths: read.extend(lengths) or prefill(self, ids, cache, lengths))
    asked = requests("loglikelihood", [(CORPUS[:n], text) for text in (" a", " little", " of the world") for n in (300, 200)])
    for batch in (1, 2, 3, 8):
        read.clear()
        ZooLM(str(tiny), "sinks:budget=64,when=prompt", batch_size=batch).loglikelihood(asked)
        assert len(read) == 2


@pytest.mark.parametrize("batch", [1, 3])
def test_answers_of_a_method_are_those_of_zoo(tiny: Path, batch: int) -> None:
    attn = "subgen:budget=64,when=prompt"
    asked = requests("generate_until", [(text, {"max_gen_toks": 20}) for text in (CORPUS[:600], CORPUS[50:500], "x")])
    answers = ZooLM(str(tiny), attn, batch_size=batch).generate_until(asked)
    lm = zoo.load(str(tiny), attn)
    assert answers == [lm.generate(request.args[0], 20, stop=["<|im_end|>"]) for request in asked]
    assert answers != ZooLM(str(tiny)).generate_until(asked)


def test_an_answer_ends_at_a_special_token_that_a_task_names(tiny: Path) -> None:
    """Names of special tokens are not in the text, so only the token itself can end it."""
    model = ZooLM(str(tiny))
    lm = model.lm
    for prompt in (CORPUS[n : n + 60] for n in range(60)):
        new = [step[0] for step in lm.tokens([lm.tokenizer.encode(prompt)], 40, zoo.lm.sampler())]
        if 0 in new[1:]:  # <|endoftext|>, which is no end token of this checkpoint
            break
    else:
        raise AssertionError("none of these prompts is answered with the special token")
    (answer,) = model.generate_until(requests("generate_until", [(prompt, {"until": ["<|endoftext|>"], "max_gen_toks": 40})]))
    assert answer == lm.tokenizer.decode(new[: new.index(0)])


def test_sampled_answers_differ_and_repeat(tiny: Path) -> None:
    asked = requests("generate_until", [("Call me", {"max_gen_toks": 20, "do_sample": True, "temperature": 0.9, "top_p": 0.95})] * 3)
    first, again = ZooLM(str(tiny)).generate_until(asked), ZooLM(str(tiny)).generate_until(asked)
    assert first == again
    assert len(set(first)) == 3


# lm_eval's command line

TASKS = {
    "choice": """
task: zoo_choice
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
num_fewshot: 1
""",
    "rolling": """
task: zoo_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "until": """
task: zoo_until
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three tasks over one file."""
    folder = tmp_path_factory.mktemp("tasks")
    with open(folder / "docs.jsonl", "w") as file:
        for n in range(6):
            doc = {"text": CORPUS[n * 10 : n * 60 + 250], "choices": [" a", " the world", " so", " in my purse"], "answer": n % 4}
            file.write(json.dumps(doc) + "\n")
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/docs.jsonl}}}}\ntest_split: test\nfewshot_split: test\n"
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(task + data)
    return folder


NAMES = ("zoo_choice", "zoo_rolling", "zoo_until")
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def evaluate(tasks: Path) -> Run:
    """lm_eval on the three tasks, or on those named, but for its own thousands, which take seconds to index."""

    def run(model: str, arguments: str, names: Sequence[str] = NAMES, **options: Any) -> dict[str, Any]:
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        return lm_eval.simple_evaluate(model, arguments, list(names), batch_size=4, device="cpu", task_manager=manager, **options)

    return run


def numbers(found: dict[str, Any]) -> dict[str, float]:
    return {
        f"{task} {metric}": value
        for task, row in found["results"].items()
        for metric, value in row.items()
        if isinstance(value, float) and "stderr" not in metric and math.isfinite(value)
    }


def test_tasks_give_the_numbers_of_transformers(evaluate: Run, tiny: Path) -> None:
    ours, theirs = evaluate("zoo", f"model={tiny}"), evaluate("hf", f"pretrained={tiny}")
    assert numbers(ours) == pytest.approx(numbers(theirs), rel=1e-4)
    assert len(numbers(ours)) == 5
    assert ours["config"]["model_num_parameters"] == theirs["config"]["model_num_parameters"]
    less, rolling = evaluate("zoo", f"model={tiny},attn=sliding:window=8", ["zoo_rolling"]), "zoo_rolling bits_per_byte,none"
    assert abs(numbers(less)[rolling] - numbers(ours)[rolling]) > 0.01
    assert less["config"]["zoo_attn"] == "sliding:window=8"
    models = (("zoo", f"model={tiny}"), ("hf", f"pretrained={tiny}"))
    chats = [evaluate(*model, ["zoo_choice"], apply_chat_template=True) for model in models]
    assert numbers(chats[0]) == pytest.approx(numbers(chats[1]), rel=1e-4)
    prompts = [chat["samples"]["zoo_choice"][1]["arguments"] for chat in chats]
    assert prompts[0] == prompts[1]
    assert "<|im_start|>user" in str(prompts[0])


SPELLINGS = [
    ["model={tiny},attn=subgen:budget=50%/64,when=prompt"],  # lm_eval splits at the comma: two arguments
    ["model={tiny},attn='subgen:budget=50%/64,when=prompt'"],
    ["model={tiny}", "attn=subgen", "budget=50%/64", "when=prompt"],
    ['{{"model": "{tiny}", "attn": "subgen:budget=50%/64,when=prompt"}}'],
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_a_method(tiny: Path, spelling: list[str]) -> None:
    """As lm_eval's command line reads them, and where it can, lm_eval from Python."""
    given = [part.format(tiny=tiny) for part in spelling]
    args = HarnessCLI()._parser.parse_args(["run", "--model", "zoo", "--model_args", *given])
    assert str(ZooLM.create_from_arg_obj(args.model_args).lm.attn) == "subgen:budget=50%/64,when=prompt"
    if given[0][0] != "{" and "'" not in given[0]:
        assert str(ZooLM.create_from_arg_string(",".join(given), {"device": None}).lm.attn) == "subgen:budget=50%/64,when=prompt"


BAD = {
    "attn=nothing": f"unknown attention method 'nothing'; known: {KNOWN}",
    "attn=subgen,bugdet=1": "unknown model argument 'bugdet'; known: model, attn, .*prefix_token_id; and options of attn=subgen: budget",
    "pretrained=x": "unknown model argument 'pretrained'; known: model, .*attn=full: none",
    "attn=subgen:budget=-3": "budget='-3' is not a number of tokens",
    "attn=subgen:budget=25%,budget=50%": "'budget' is given twice",
    "dtype=int7": "dtype 'int7' is unknown",
    "batch_size=0": "batch_size=0 must be a whole number of at least 1",
    "batch_size=auto": "batch_size=auto must be a whole number",
    "max_length=-1": "max_length=-1 must be",
    "threads=many": "threads=many must be",
    "device=tpu9": "device 'tpu9' cannot be used here",
    "prefix_token_id=100000": "token ids must be between 0 and",
    "model=/nowhere": "/nowhere",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_model_arguments_are_one_line(arguments: str, tiny: Path) -> None:
    model = "" if arguments.startswith("model=") else f"model={tiny},"
    with pytest.raises(ZooError, match=BAD[arguments]) as raised:
        ZooLM.create_from_arg_string(model + arguments)
    assert "\n" not in str(raised.value)


def test_where_there_is_no_gpu_the_device_that_lm_eval_presumes_is_the_cpu(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert str(ZooLM(str(tiny), device="cuda:0").device) == "cpu"
    assert "cuda:0 is not here: using the CPU" in caplog.text


def test_bad_requests_are_one_line(tiny: Path) -> None:
    model = ZooLM(str(tiny), max_length=16)
    with pytest.raises(ZooError, match=r"continuation of \d+ tokens behind 1 does not fit max_length=16"):
        model.loglikelihood(requests("loglikelihood", [("x", CORPUS)]))
    for arguments, said in (
        ({"max_gen_toks": 16}, "max_gen_toks=16 leaves no room"),
        ({"num_beams": 4, "max_gen_toks": 4}, "only num_beams=1"),
        ({"typical_p": 0.5, "max_gen_toks": 4}, "unknown generation argument 'typical_p'; known: until"),
    ):
        with pytest.raises(ZooError, match=said):
            model.generate_until(requests("generate_until", [("x", arguments)]))


@pytest.mark.slow  # lm_eval indexes its own thousands of tasks
def test_the_module_is_the_command_line_of_lm_eval(tiny: Path, tasks: Path, tmp_path: Path) -> None:
    """As a process of its own: the arguments are lm_eval's, and so are the table and the file that it writes."""
    model = ["--model", "zoo", "--model_args", f"model={tiny},attn=sinks:budget=50%/64,when=prompt", "--batch_size", "2"]
    argv = [*model, "--tasks", "zoo_until", "--include_path", str(tasks), "--output_path", str(tmp_path), "--limit", "3"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    said = subprocess.run([sys.executable, "-m", "zoo.eval.harness", *argv], capture_output=True, text=True, cwd=ROOT, env=env)
    assert said.returncode == 0, said.stderr
    assert "|zoo_until|" in said.stdout
    (file,) = tmp_path.rglob("results_*.json")
    found = json.loads(file.read_text())
    assert found["config"]["zoo_attn"] == "sinks:budget=50%/64,when=prompt"
    assert found["n-samples"]["zoo_until"]["effective"] == 3


def test_the_module_ends_with_one_line_where_arguments_do_not_fit(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def execute(args: Any) -> None:  # without indexing lm_eval's own tasks
        lm_eval.simple_evaluate(args.model, args.model_args, args.tasks)

    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr("lm_eval._cli.run.Run._execute", staticmethod(execute))
    assert cli.run(harness.main, ["--model", "zoo", "--tasks", "x", "--model_args", f"model={tiny}", "attn=nothing"]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == f"error: unknown attention method 'nothing'; known: {KNOWN}"


def test_without_lm_eval_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.models", None)
    assert cli.run(harness.main, []) == 2
    assert "cannot be imported" in (line := capfd.readouterr().err)
    assert line.endswith("install it with pip install -e '.[harness]'\n")
