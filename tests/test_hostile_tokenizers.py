"""Tokenizer files and chat templates that somebody made to do harm: no crash, no hang, no giant, and an error of one line.

The inputs run in a process of their own, since a crash in C++ would take this one with it: `python test_hostile_tokenizers.py FOLDER`
prints a line of JSON for each. The rules: a ZooError or a result, within SECONDS, with at most twice the size of the files plus MARGIN of
memory, as the system counts it (so what C++ takes is in it).
"""

# ruff: noqa: E501 (lists of inputs, one after the other)
from __future__ import annotations

import base64
import ctypes
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers", reason="makes its tokenizers with `tokenizers`, of the test extra")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tokenizer import CORPUS, converted, sentencepiece_model, split, tekken, trained

from zoo.errors import ZooError
from zoo.tokenizer import Tokenizer

SECONDS, MARGIN, TEMPLATE_MARGIN = 2.0, 32 << 20, 64 << 20  # a template of 60 kB compiles to 50 MB
TEXTS = ["", "the numbers of Größe 東京 😀 \x00▁ x > 10", "a" * 40 + "!", " " * 40, "<s>[INST]<|end|><0x41>"]
Files = dict[str, bytes | int]  # an int is the size of a file of zeros
JSON, MODEL, TEKKEN, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer.model", "tekken.json", "tokenizer_config.json", "chat_template.jinja"


def bases() -> dict[str, Files]:
    config = json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages }}"}).encode()
    lines = b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256))
    made: dict[str, Files] = {
        "bytes": {JSON: trained("llama3").to_str().encode(), CONFIG: b'{"bos_token": "<|start|>"}'},
        "characters": {JSON: converted(sentencepiece_model(), "legacy").to_str().encode(), CONFIG: config},
        "metaspace": {JSON: converted(sentencepiece_model(), "first").to_str().encode(), CONFIG: config},
        "tekken": {TEKKEN: json.dumps(tekken(named=True)).encode(), CONFIG: config},
        "model": {MODEL: sentencepiece_model(), CONFIG: config},
        "normalizing": {MODEL: other_model(model_type="bpe", normalization_rule_name="nmt_nfkc", vocab_size=420), CONFIG: config},
        "unigram": {MODEL: other_model(model_type="unigram", vocab_size=380), CONFIG: config},
        "tiktoken": {MODEL: lines + b"YWI= 256\n"},
    }
    return made


def other_model(**options: Any) -> bytes:
    import io

    import sentencepiece

    out = io.BytesIO()
    given = {"sentence_iterator": iter(CORPUS), "model_writer": out, "byte_fallback": True, "minloglevel": 2, "character_coverage": 0.98}
    sentencepiece.SentencePieceTrainer.train(**given, user_defined_symbols=["<tool>"], **options)
    return out.getvalue()


# --- the classes --------------------------------------------------------------------------------------------------------------------------

GOOD: dict[str, Files] = {}
JSON_FILES = [("bytes", JSON), ("characters", JSON), ("metaspace", JSON), ("tekken", TEKKEN), ("characters", CONFIG)]


def put(base: str, name: str, content: bytes | int) -> Files:
    return GOOD[base] | {name: content}


def dumped(base: str, name: str, change: Callable[[Any], None]) -> Files:
    data = json.loads(GOOD[base][name])  # type: ignore[arg-type]
    change(data)
    return put(base, name, json.dumps(data).encode())


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value; of long lists and objects the first few and the last."""
    yield path
    keys = list(data) if isinstance(data, dict) else list(range(len(data))) if isinstance(data, list) else []
    for key in keys if len(keys) <= 12 else [*keys[:2], keys[-1]]:
        yield from places(data[key], (*path, key))


def set_at(path: tuple[Any, ...], value: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        if path:
            data[path[-1]] = value

    return change


def deep() -> Iterator[Files]:
    for base, name in JSON_FILES:
        for depth in (500, 990, 5_000, 100_000):
            for opening, closing in (("[", "]"), ('{"a":', "}"), ("[[],", "]")):
                yield put(base, name, (opening * depth + "1" + closing * depth).encode())
                yield put(base, name, (opening * depth).encode())
    sequence: dict[str, Any] = {"type": "ByteLevel"}
    for _ in range(300):
        sequence = {"type": "Sequence", "pretokenizers": [sequence], "normalizers": [sequence], "decoders": [], "processors": []}
    for part in ("pre_tokenizer", "normalizer", "decoder", "post_processor"):
        yield dumped("bytes", JSON, set_at((part,), {"type": "Sequence", "pretokenizers": [], "normalizers": [], "x": 1}))
        if part == "pre_tokenizer":
            yield put("bytes", JSON, GOOD["bytes"][JSON].replace(b'"pre_tokenizer":', b'"pre_tokenizer":' + b"[" * 900, 1))  # type: ignore[union-attr]


IDS = [2**40, 2**31, 2**63, 10**30, -1, -(2**40), 1.5, 1e300, float("nan"), float("inf"), True, None, "5", "-5", [], {}, 0, 5, 300]


def ids() -> Iterator[Files]:
    for i in IDS:
        for base in ("bytes", "characters", "metaspace"):
            yield dumped(base, JSON, set_at(("added_tokens", 0, "id"), i))
            for token in ("e", "t"):
                yield dumped(base, JSON, set_at(("model", "vocab", token), i))
            yield dumped(base, JSON, set_at(("post_processor",), {"type": "TemplateProcessing", **prefix_of(i)}))
        for place in ("default_vocab_size", "default_num_special_tokens", "num_vocab_tokens"):
            yield dumped("tekken", TEKKEN, set_at(("config", place), i))
        yield dumped("tekken", TEKKEN, set_at(("vocab", 300, "rank"), i))
        yield dumped("tekken", TEKKEN, set_at(("special_tokens", 2, "rank"), i))
        for base in ("model", "tiktoken", "tekken"):
            yield put(base, CONFIG, json.dumps({"added_tokens_decoder": {str(i): {"content": "<x>", "special": True}}}).encode())


def prefix_of(i: Any) -> dict[str, Any]:
    named = {"<s>": {"id": "<s>", "ids": [i], "tokens": ["<s>"]}}
    return {"single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}], "special_tokens": named}


def twice() -> Iterator[Files]:
    for base, name in JSON_FILES:
        text: bytes = GOOD[base][name]  # type: ignore[assignment]
        rng = random.Random(base)
        starts = [i for i, c in enumerate(text) if c == ord("{")]
        for at in rng.sample(starts, min(20, len(starts))):
            yield put(base, name, text[: at + 1] + b'"id": 7, "type": "BPE", "id": 8, "type": "x",' + text[at + 1 :])
    many = ",".join(f'"k{i}": {i}' for i in range(50_000))
    yield put("bytes", JSON, f'{{"model": {{{many}, "k49999": 1}}}}'.encode())


def wrong() -> Iterator[Files]:
    found: list[Files] = []
    where = [(base, name, path) for base, name in JSON_FILES for path in places(json.loads(GOOD[base][name]))]  # type: ignore[arg-type]
    odd = st.sampled_from(
        [None, True, 0, -1, 1e9, 2**70, "", "x", "\ud800", "▁", [], [1], [[]], {}, {"a": {}}, {"type": "ByteLevel"}, ["a", "b"]]
    )
    json_value = odd | st.recursive(
        st.none() | st.integers() | st.floats() | st.text(max_size=5), lambda v: st.lists(v, max_size=3), max_leaves=5
    )

    @settings(max_examples=700, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(where), json_value)
    def make(place: tuple[str, str, tuple[Any, ...]], value: Any) -> None:
        base, name, path = place
        found.append(dumped(base, name, set_at(path, value)) if path else put(base, name, json.dumps(value).encode()))

    make()
    yield from found


def cut_short() -> Iterator[Files]:
    rng = random.Random(0)
    for base, name in JSON_FILES:
        text: bytes = GOOD[base][name]  # type: ignore[assignment]
        for at in [0, 1, len(text) - 1, *(rng.randrange(len(text)) for _ in range(37))]:
            yield put(base, name, text[:at])


def garbled() -> Iterator[Files]:
    rng = random.Random(1)
    for base, name in JSON_FILES:
        for n in range(80):
            text = bytearray(GOOD[base][name])  # type: ignore[arg-type]
            at = rng.randrange(len(text))
            if n % 4 == 0:
                text[at : at + 1] = rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x00", b"\xef\xbb\xbf", b"\\ud800", b"\\u0000"])
            elif n % 4 == 1:
                text[at : at + 8] = rng.randbytes(8)
            elif n % 4 == 2:
                del text[at : at + rng.randrange(1, 40)]
            else:
                text[at] ^= 1 << rng.randrange(7)
            yield put(base, name, bytes(text))
    for base, name in JSON_FILES:
        for code in ("utf-16", "utf-32", "utf-8-sig"):
            yield put(base, name, GOOD[base][name].decode().encode(code))  # type: ignore[union-attr]
    yield from (put("bytes", name, b"{{ '\xff' }}") for name in (TEMPLATE, CONFIG, "special_tokens_map.json", "chat_template.json"))


def base_64() -> Iterator[Files]:
    bad = ["!", "YQ", "YQ=", "=YQ=", "Y Q==", "", "YQ==\n", "é", "YQ==YQ==", "\x00", "A" * 100_000, "AAAA" * 20_000, None, 5, [], "_-=="]
    for value in bad:
        for rank in (0, 255, 256, 300, 400):
            yield dumped("tekken", TEKKEN, set_at(("vocab", rank, "token_bytes"), value))
        yield dumped("tekken", TEKKEN, set_at(("vocab", 300), value))
        if isinstance(value, str):
            yield put("tiktoken", MODEL, GOOD["tiktoken"][MODEL] + value.encode() + b" 257\n")  # type: ignore[operator]


def merges() -> Iterator[Files]:
    odd: list[Any] = [["q", "zzz"], "q zzz", "a b c", "", " ", "a", ["a"], ["a", "b", "c"], [], ["", "e"], ["e", ""], None, 5, {}]
    odd += [["<0x41>", "<0x42>"], ["e", 5], [["e"], "r"], ["\ud800", "e"], "\u2581 zzz"]
    for base in ("bytes", "characters", "metaspace"):
        for merge in odd:
            for at in (0, -1):
                yield dumped(base, JSON, lambda data, at=at, merge=merge: data["model"]["merges"].insert(at, merge))
        yield dumped(base, JSON, lambda data: data["model"].update(merges=data["model"]["merges"] * 20))
        yield dumped(base, JSON, chain)


def chain(data: Any) -> None:
    """Tokens that double: the last has 2**20 letters."""
    grown = ["e" * 2**n for n in range(21)]
    data["model"]["vocab"] |= {token: 5000 + n for n, token in enumerate(grown[1:])}
    data["model"]["merges"] += [[token, token] for token in grown[:-1]]


REGEXES = ["(a+)+b", "(a|a)*b", "(a*)*b", "(?:a{0,999}){0,999}b", "(?:(?:a{999}){999}){999}", "(.*)*\\1x", "(?R)?a", "(?R)", "(?:aaa){e}"]
REGEXES += ["(a?){30}a{30}", "(?=(a+)+b)", "(?<=(a+)+)b", "(" * 3000, "((" * 500 + "))" * 500, "[" * 4000, "a{999}" * 600, "(?P<n>a)(?&n)"]
REGEXES += ["(a|b|ab)*c", "\\s*\\s*\\s*\\s*\\s*\\s*\\s*x", "( *)* x", "(?:a|aa)+b", "(a+)*(a+)*(a+)*b", "a**", "(?i:" * 900 + ")" * 900]
REGEXES += [
    "\\p{Nonsense}",
    "\\x",
    "(?<!a*)b",
    "(?#",
    "(?(1)a|b)",
    "\\L<x>",
    "|" * 4000,
    "(?:" + "a|" * 1900 + ")*b",
    "",
    "^",
    "$",
    "x" * 10_000,
]
REGEXES += [
    "(?>(a+)+)b",
    "(a{1,999}){1,999}b",
    "((a{1,99})+)+b",
    "[\\s\\S]*[\\s\\S]*[\\s\\S]*[\\s\\S]*\\d",
    "(?:(?:a?)*)*b",
    "(?:\\p{L}+\\s?)*\\d",
]


def regexes() -> Iterator[Files]:
    level = [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]
    for pattern in REGEXES:
        yield dumped("bytes", JSON, set_at(("pre_tokenizer",), split(pattern=pattern)))
        part = split(pattern=pattern)["pretokenizers"][:1]
        yield dumped("bytes", JSON, set_at(("pre_tokenizer",), {"type": "Sequence", "pretokenizers": part * 3 + level}))
        yield dumped(
            "bytes",
            JSON,
            set_at(("pre_tokenizer",), {"type": "Sequence", "pretokenizers": [part[0] | {"pattern": {"String": pattern}}, *level]}),
        )
        yield dumped("tekken", TEKKEN, set_at(("config", "pattern"), pattern))
    yield dumped(
        "bytes",
        JSON,
        set_at(("pre_tokenizer",), {"type": "Sequence", "pretokenizers": split("Isolated")["pretokenizers"][:1] * 5000 + level}),
    )


def protos() -> Iterator[Files]:
    rng = random.Random(2)
    for base in ("model", "normalizing", "unigram"):
        for n in range(200):
            data = bytearray(GOOD[base][MODEL])  # type: ignore[arg-type]
            at = rng.randrange(len(data)) if n % 2 else rng.randrange(max(len(data) - 500, 0), len(data))
            kind = n % 5
            if kind == 0:
                data[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                data[at] = rng.randrange(256)
            elif kind == 2:
                del data[at:]
            elif kind == 3:
                for _ in range(20):
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            else:
                data[at:at] = data[at : at + rng.randrange(1, 100)]
            yield put(base, MODEL, bytes(data))


def varint(n: int) -> bytes:
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def field(number: int, value: bytes | int) -> bytes:
    """A field of a protobuf message: an int as a varint, bytes with their length."""
    return varint(number << 3 | 2) + varint(len(value)) + value if isinstance(value, bytes) else varint(number << 3) + varint(value)


def piece(text: bytes, score: bytes, kind: int) -> bytes:
    return field(1, field(1, text) + varint(2 << 3 | 5) + score + field(3, kind))


def made_protos() -> Iterator[Files]:
    """Messages that are well formed and mean nonsense."""
    nan, inf, zero = b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\0\0"
    good: bytes = GOOD["model"][MODEL]  # type: ignore[assignment]
    for score in (nan, inf, b"\0\0\x80\xff", zero, b"\xff\xff\x7f\x7f"):
        for kind in (1, 2, 3, 4, 5, 6, 0, 7, 2**31, 2**63):
            for text in (b"ab", b"", b"\xff", b"\0", b"<0x41>", "\u2581\u2581".encode(), b"a" * 10_000, b"the"):
                yield put("model", MODEL, good + piece(text, score, kind))
    trainer = [
        (3, 99),
        (3, 1),
        (3, 3),
        (3, 4),
        (4, 2**31),
        (35, 0),
        (40, 2**31 - 1),
        (40, 5),
        (41, 2**63),
        (42, 0),
        (43, 10**9),
        (44, 5),
        (45, b"\xff"),
    ]
    for number, value in trainer:
        yield put("model", MODEL, good + field(2, field(number, value)))
    for blob in (
        b"",
        b"\0" * 4,
        b"\xff" * 400,
        b"\0\4\0\0" + b"\xff" * 1024,
        b"\0\4\0\0" + bytes(1024),
        os.urandom(4096),
        b"\x10\0\0\0" + os.urandom(500),
    ):
        yield put("model", MODEL, good + field(3, field(2, blob)))
        yield put("normalizing", MODEL, GOOD["normalizing"][MODEL] + field(3, field(2, blob)))  # type: ignore[operator]
        yield put("unigram", MODEL, GOOD["unigram"][MODEL] + field(5, field(2, blob)))  # type: ignore[operator]
    yield put("model", MODEL, b"".join(piece(b"p%d" % n, zero, 1) for n in range(30_000)))
    yield put("model", MODEL, good + b"\x0a" + varint(2**40))
    yield put("model", MODEL, good + b"\x0b" * 10_000)


def lines() -> Iterator[Files]:
    good: bytes = GOOD["tiktoken"][MODEL]  # type: ignore[assignment]
    ends = [
        b"YWI= 300\n",
        b"YQ== 257\n",
        b"YWM= x\n",
        b"YWM=\n",
        b"YWM= 1 2\n",
        b"\n\n",
        b"YWM= -1\n",
        b"YWM= 1e9\n",
        b"\xff\xff 257\n",
        b" 257\n",
    ]
    ends += [b"YWM= %d\n" % i for i in (2**31, 2**40, 2**64, 10**30, 0)] + [b"YWM= " + b"9" * 5000 + b"\n", b"YWM= 257", b"YWM= 0257\n"]
    for end in ends:
        for before in (good, good[: len(good) // 2], good * 2, b""):
            yield put("tiktoken", MODEL, before + end)
    rng = random.Random(3)
    rows = good.splitlines(keepends=True)
    for n in range(120):
        kept = [row for row in rows if rng.random() > 0.01] if n % 2 else rng.sample(rows, len(rows))
        yield put("tiktoken", MODEL, b"".join(kept))
    yield put("tiktoken", MODEL, b"".join(base64.b64encode(b"%06d" % i) + b" %d\n" % i for i in range(128_001)))
    yield put("tiktoken", MODEL, base64.b64encode(b"a" * 1_000_000) + b" 0\n")


REACHES = [f"{{{{ {it} }}}}" for it in (
    "''.__class__.__mro__", "''.__class__.__mro__[1].__subclasses__()", "cycler.__init__.__globals__", "cycler.__init__.__globals__.os.popen('id')",
    "lipsum.__globals__['os']", "joiner.__init__.__globals__", "namespace.__init__.__globals__", "namespace().__class__", "range.__class__.__mro__",
    "dict.__base__.__subclasses__()", "raise_exception.__globals__", "strftime_now.__globals__", "strftime_now.__code__.co_consts", "self.__init__",
    "self._TemplateReference__context", "self._TemplateReference__context.environment", "messages.__class__", "messages[0].__class__", "().__class__",
    "[].__class__.__base__", "{}.__class__", "1.0.__class__", "true.__class__", "none.__class__", "''|attr('__class__')", "''['__class__']",
    "''['__cl' ~ 'ass__']", "[''] | map(attribute='__class__') | list", "messages | map(attribute='__class__.__mro__') | list", "''.format.__globals__",
    "'{0.__class__}'.format('')", "'{0.__class__.__init__.__globals__}'.format(raise_exception)", "'{x.__class__}'.format_map({'x': 1})",
    "'%(a)s' | format(a=''.__class__)", "'%s' % raise_exception", "'%s' % range", "messages.append(1)", "messages[0].update({'role': 1})", "messages.pop()",
    "messages.clear()", "messages[0].__setitem__('a', 1)", "messages | xmlattr", "messages | pprint", "'a' | random", "undefined_thing.x.y", "''.encode()",
    "''.translate", "''.maketrans", "messages.sort()", "messages.copy()", "messages | sum", "get_flashed_messages.__globals__", "config", "request",
    "url_for.__globals__", "loop", "caller()", "context", "environment", "__builtins__", "_left", "zoo", "zoo_spend", "1 | zoo_spend", "-1 | zoo_spend",
    "(-10**9) | zoo_spend", "'' | zoo_concat", "'a'.join.__self__", "messages.index.__self__.__class__", "dict(a=1).items().__class__", "open('/etc/passwd')",
    "messages | groupby('role.__class__') | list", "messages | sort(attribute='__class__') | list", "messages | selectattr('__class__') | list",
    "namespace(a=1)._Namespace__attrs", "namespace(a=1)['__class__']", "namespace(__class__=1)", "messages[0].get.__self__",
)]  # fmt: skip
REACHES += [f"{{% {it} %}}" for it in (
    "include '/etc/passwd'", "import 'os' as os", "from 'os' import path", "extends '/etc/passwd'", "include messages[0].role", "set self = 1", "do 1",
    "block x %}{{ self.x() }}{% endblock", "set messages[0].role = 1", "set ns.x = 1", "autoescape true %}{% endautoescape", "debug", "trans %}x{% endtrans",
    "set x = namespace() %}{% set x.__class__ = 1", "for x in self", "for x in messages[0].__class__.__subclasses__() %}{% endfor", "raise", "call x() %}{% endcall",
)]  # fmt: skip
REACHES += [
    "{% macro m() %}{{ m.__globals__ }}{{ m._func }}{{ m._environment }}{{ caller }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m() }}"
]
REACHES += ["{% for x in [1] %}{{ loop.__class__ }}{{ loop._iterable }}{{ loop._iterator }}{{ loop._undefined }}{% endfor %}"]
SECRETS = ["root:", "subclasses", "<class", "<function", "<module", "environ", "<built-in", "object at 0x"]

GIANTS = [f"{{{{ {it} }}}}" for it in (
    "'a' * 10**9", "10**9 * 'a'", "[1] * 10**9", "[[1] * 10**6] * 10**6", "'a' * 10**5 * 10**5", "10**10**10", "2**63 * 2**63", "9**9**9", "(2**60)**60",
    "'%1000000000d' % 1", "'%*d' % (10**9, 1)", "'%.1000000000f' % 1.5", "'%1000000000s' | format('x')", "'%s%s' % (1, 2) * 10**9", "'{:>1000000000}'.format(1)",
    "'a' | center(10**9)", "'a'.center(10**9)", "'a'.ljust(10**9)", "'a'.zfill(10**9)", "'\\t'.expandtabs(10**9)", "'a\\nb' | indent(10**9)",
    "'a\\nb' | indent('x' * 10**6)", "messages | tojson(indent=10**9)", "messages | tojson(indent='x' * 10**6)", "messages | tojson(separators=('x' * 10**6, 'y'))",
    "range(10**9)", "range(10**9) | list", "range(99999) | list | string * 1000", "range(99999) | join('x' * 10**6)", "'ab' | replace('', 'x' * 10**6)",
    "('a' * 10**6).replace('a', 'b' * 10**6)", "('a' * 10**6) | replace('a', 'b' * 10**6)", "('x' * 10**6).join(range(10**5) | map('string') | list)",
    "('a' * 10**6) | list | tojson | list | tojson", "('a ' * 10**6).split()", "('\\n' * 10**6).splitlines()", "lipsum(n=10**9)", "1.5 | round(10**9)",
    "1.5 | round(10**9, 'ceil')", "'a' | wordwrap(1)", "[1] | batch(10**9, 'x') | list", "[1] | slice(10**9) | list", "10**4000 * 10**4000", "('9' * 4000) | int",
    "('9' * 10**6) | int", "strftime_now('%1000000000d')", "strftime_now('%c' * 10**6)", "('a' * 10**6) | escape | escape | escape", "('é' * 10**6) | tojson(ensure_ascii=true)",
    "('a' * 10**6)[::1] ~ ('b' * 10**6)", "range(99999) | sum(start=[])", "(['a' * 1000] * 1000) | sort | tojson", "['a' * 10**6] * 100 == ['a' * 10**6] * 100",
    "('ab' * 10**5) | title | upper | lower | trim | wordcount", "dict([(1, 2)] * 10**9)", "'a' in 'b' * 10**9", "namespace(a='x' * 10**9)", "'x'.count('y' * 10**9)",
)]  # fmt: skip
_DOUBLE = "{{% set ns = namespace(v={}) %}}{{% for i in range(60) %}}{{% set ns.v = {} %}}{{% endfor %}}{}"
for start, grow in [
    ("'ab'", "ns.v ~ ns.v"),
    ("'ab'", "ns.v + ns.v"),
    ("[1]", "[ns.v, ns.v]"),
    ("[1]", "ns.v + ns.v"),
    ("(1,)", "(ns.v, ns.v)"),
    ("3", "ns.v * ns.v"),
]:
    for use in [
        "{{ ns.v }}",
        "{{ ns.v == ns.v + ns.v }}",
        "{{ [ns.v] == [ns.v] }}",
        "{{ ns.v | tojson }}",
        "{{ ns.v | string | length }}",
        "{{ {ns.v: 1} }}",
        "{{ ns.v in [ns.v] }}",
    ]:
        GIANTS.append(_DOUBLE.format(start, grow, use))
GIANTS += [
    _DOUBLE.format("[1]", "{'a': ns.v, 'b': ns.v}", use)
    for use in ("{{ ns.v }}", "{{ ns.v | tojson }}", "{{ ns.v | dictsort }}", "{{ [ns.v] | sort }}")
]
GIANTS += [
    _DOUBLE.format("'ab'", grow, "")
    for grow in ("ns.v | replace('a', 'aa')", "ns.v.replace('a', 'aaa')", "[ns.v, ns.v] | join", "'%s%s' % (ns.v, ns.v)", "ns.v * 2")
]
GIANTS += [
    _DOUBLE.format("'ab'", grow, "")
    for grow in ("'%s%s' | format(ns.v, ns.v)", "(ns.v ~ 'x').join(['a', 'b', 'c'])", "ns.v | tojson | tojson", "ns.v | indent(4) ~ ns.v")
]
_LOOP = "{{% for i in range(99999) %}}{}{{% endfor %}}"
for inner in [
    "",
    "x",
    "{{ i }}",
    "{% set x = 1 %}",
    "{{ messages }}",
    "y" * 9000,
    "{% if i %}{% endif %}",
    "{% continue %}",
    "{{ 'a' * 9999 }}",
    "{{ loop.index }}",
]:
    GIANTS += [_LOOP.format(inner), _LOOP.format(_LOOP.format(inner)), _LOOP.format(_LOOP.format(_LOOP.format(inner)))]
    GIANTS.append("{% macro m(n) %}" + inner + "{{ m(n + 1) }}{% endmacro %}{{ m(0) }}")
    GIANTS.append("{% macro m(n) %}" + inner + "{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}")
    GIANTS.append("{% for i in [[1]] recursive %}" + inner + "{{ loop([[1], [1]]) }}{% endfor %}")
    GIANTS.append(
        "{% macro m() %}{{ caller() }}{{ caller() }}" + inner + "{% endmacro %}" + "{% call m() %}" * 15 + "x" + "{% endcall %}" * 15
    )
GIANTS += [
    "{% set ns = namespace(v=1) %}" + _LOOP.format("{% set ns.v = " + grow + " %}") + "{{ {ns.v: 1} }}{{ ns.v == ns.v }}"
    for grow in ("(ns.v,)", "[ns.v]", "{1: ns.v}", "-ns.v", "not ns.v")
]
GIANTS += [
    "{% set ns = namespace(v='') %}" + _LOOP.format("{% set ns.v = " + grow + " %}")
    for grow in ("ns.v ~ 'abcdefgh'", "ns.v + 'abcdefgh' * 99", "[ns.v, 'a' * 999]")
]
GIANTS += [
    "{{ range(99999) | map('string') | map('upper') | select('in', range(99999) | list) | list | length }}",
    "{% filter upper %}" * 50 + "x" * 1000 + "{% endfilter %}" * 50,
    "{% set x %}" + "y" * 1000 + "{% endset %}" + "{{ x }}" * 4900,
    *("{{a}}" * 11_900, "{{a}}" * 4900, "{% if a %}x{% endif %}" * 2700, "{{ [" + "a," * 29_000 + "] }}", "{{ " + "a~" * 4900 + "a }}", "{{ " + "a~" * 29_000 + "a }}", "{{ " + "a+" * 29_000 + "a }}"),
    *("{{ " + "(" * n + "a" + ")" * n + " }}" for n in (100, 1000, 29_000)),
    *("{{ " + "[" * n + "]" * n + " }}" for n in (100, 1000, 29_000)),
    *("{% for a in a %}" * n + "{% endfor %}" * n for n in (10, 25, 300, 3000)),
    *("{% if a %}" + "{% elif a %}" * n + "{% endif %}" for n in (100, 1000, 5000)),
    *("{{ " + "not " * n + "a }}" for n in (100, 20_000)),
    *("{{ a" + ".b" * n + " }}" for n in (100, 29_000)),
    *("{{ a" + "|lower" * n + " }}" for n in (100, 8000)),
    *("{{ 1" + " if 1 else 1" * n + " }}" for n in (50, 4000)),
    *("{#" * 29_000, "{{ '" * 20_000, "{% raw %}" * 10_000, "{%" * 29_000, "-%}" * 19_000, " " * 59_999 + "{", "{{" + " " * 59_000 + "}}", "\n" * 59_000 + "{% if"),
]  # fmt: skip


def reaches() -> Iterator[Files]:
    yield from (put("bytes", TEMPLATE, source.encode()) for source in REACHES)


def giants() -> Iterator[Files]:
    yield from (put("bytes", TEMPLATE, source.encode()) for source in GIANTS)


def large() -> Iterator[Files]:
    for name in (JSON, TEKKEN, MODEL, CONFIG, TEMPLATE, "special_tokens_map.json", "chat_template.json"):
        for size in (100 << 20, 5 << 30):
            yield ({} if name in (TEKKEN, MODEL) else GOOD["bytes"]) | {name: size}
    yield put("bytes", TEMPLATE, b"x" * 60_001)
    yield put("bytes", CONFIG, json.dumps({"chat_template": "x" * 15_000_000}).encode())
    yield put("bytes", CONFIG, json.dumps({"bos_token": "x" * 15_000_000}).encode())
    yield put("bytes", JSON, b"[" + b"1," * 4_100_000 + b"1]")
    yield put("bytes", CONFIG, b'{"a":[' + b"[[[[[[]]]]]]," * 1_100_000 + b"1]}")
    yield put("bytes", CONFIG, b'{"a":[' + b"[]," * 300_000 + b"1]}")
    yield put("bytes", JSON, b'{"a":[' + b"[[[]]]," * 380_000 + b"1]}")
    yield put("bytes", JSON, b'{"a":[' + b"[[[]]]," * 6_000_000 + b"1]}")
    added = [{"id": 2000 + i, "content": f"<{'x' * (i % 200)}{i}>", "special": True} for i in range(20_000)]
    added = [token | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) for token in added]
    yield dumped("bytes", JSON, set_at(("added_tokens",), added))
    yield dumped("bytes", JSON, set_at(("added_tokens", 0, "content"), "x" * 1_000_000))
    yield dumped("bytes", JSON, set_at(("model", "vocab", "x" * 5_000_000), 9999))


CLASSES: dict[str, tuple[Callable[[], Iterator[Files]], int]] = {  # with the least number of inputs
    "deep JSON": (deep, 100),
    "ids": (ids, 350),
    "keys twice": (twice, 75),
    "wrong types": (wrong, 600),
    "truncated JSON": (cut_short, 200),
    "garbled JSON": (garbled, 400),
    "base64": (base_64, 100),
    "merges": (merges, 100),
    "regexes": (regexes, 150),
    "sentencepiece, garbled": (protos, 600),
    "sentencepiece, made up": (made_protos, 400),
    "tiktoken lines": (lines, 150),
    "templates that reach for Python": (reaches, 90),
    "templates without end": (giants, 200),
    "large files": (large, 20),
}


# --- the process that runs them -----------------------------------------------------------------------------------------------------------


def memory(word: str) -> int:
    """Bytes, of VmRSS (now) or VmHWM (the most since `forget`)."""
    return next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(word))


def use(folder: Path) -> str:
    """What an input came to: "result" or the error's message. Anything else goes up."""
    messages = [{"role": "user", "content": "Hi <there>"}, {"role": "assistant", "content": "é"}]
    try:
        tokenizer = Tokenizer.load(folder)
        for text in TEXTS:
            tokenizer.decode(tokenizer.encode(text))
            tokenizer.decode(tokenizer.encode(text, special=True), skip_special=False)
        tokenizer.decode([0, 1, 2**40, -1, 300])
        if tokenizer.chat_template is not None:
            return "result: " + tokenizer.render(messages)[:5000]
        return "result"
    except ZooError as error:
        return str(error)


def run(root: Path, skip: int) -> None:
    """Endless inputs are ended by the alarm, giants by the limit: both count as a crash."""
    GOOD.update(bases())
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + (2 << 30),) * 2)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)
    folder, number = root / "in", 0
    for name, (make, _) in CLASSES.items():
        for files in make():
            number += 1
            if number <= skip:
                continue
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for file, content in files.items():
                if isinstance(content, int):
                    with open(folder / file, "wb") as f:
                        f.truncate(content)
                else:
                    (folder / file).write_bytes(content)
            size = sum(len(content) if isinstance(content, bytes) else content for content in files.values())
            print(json.dumps({"number": number, "class": name}), flush=True)
            signal.alarm(30)
            trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before, start = memory("VmRSS"), time.perf_counter()
            try:
                said = use(folder)
            except Exception as error:
                said = f"escaped: {type(error).__name__}: {error}"
            seconds = time.perf_counter() - start
            print(json.dumps({"said": said, "seconds": seconds, "memory": memory("VmHWM") - before, "size": size}), flush=True)


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="measures memory as Linux does")
def test_hostile_files(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    broken: list[Any] = []
    while True:
        command = [sys.executable, __file__, str(tmp_path), str(len(seen))]
        process = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        )
        rows = [json.loads(line) for line in process.stdout.splitlines()]
        answered = rows[: len(rows) // 2 * 2]  # what is over is an input without an answer: the worker died of it
        pairs = list(zip(answered[::2], answered[1::2], strict=True))
        seen += [about | result for about, result in pairs]
        if process.returncode == 0:
            break
        assert len(rows) % 2, process.stderr
        seen.append(rows[-1] | {"said": f"crash {process.returncode}", "seconds": 0.0, "memory": 0, "size": 0})
        broken.append(seen[-1])
        assert len(broken) < 20, broken

    for row in seen:
        said, margin = row["said"], TEMPLATE_MARGIN if "templates" in row["class"] else MARGIN
        good = said.startswith("result") or ("\n" not in said and str(tmp_path) in said and len(said) < 1500)
        if said.startswith("escaped") or not good or row["seconds"] > SECONDS or row["memory"] > 2 * row["size"] + margin:
            broken.append(row)
        if row["class"] == "templates that reach for Python":
            broken += [row for secret in SECRETS if said.startswith("result") and secret in said]
    counts = Counter(row["class"] for row in seen)
    for name, (_, least) in CLASSES.items():
        rows = [row for row in seen if row["class"] == name]
        slowest, largest = max(row["seconds"] for row in rows), max(row["memory"] - 2 * row["size"] for row in rows)
        errors = sum(not row["said"].startswith("result") for row in rows)
        print(f"{name}: {len(rows)} inputs, {errors} errors, slowest {slowest:.2f} s, {max(largest, 0) >> 20} MB beyond twice the file")
        assert counts[name] >= least
    print(f"in all: {len(seen)} inputs in {len(counts)} classes, {len(broken)} broke a rule")
    assert not broken, "\n".join(json.dumps(row)[:700] for row in broken[:20])
    assert len(seen) >= 2000
    assert len(counts) >= 8


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
