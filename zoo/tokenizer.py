"""Text to token ids and back: tiktoken and sentencepiece behind one small class, and chat templates.

A checkpoint folder holds one of three formats: `tokenizer.json` (read if it is byte-level BPE: Llama 3, SmolLM2, GPT-NeoX), or
`tokenizer.model`, which is a sentencepiece model (Llama 2, Mistral) or tiktoken's list of tokens (Llama 3 as Meta ships it).

What is unusual: the ids are those of Hugging Face's `tokenizers`, also where a vocabulary lacks bytes (SmolLM2's) and where the order of
the merges is not the order of the ids. Two differences remain, both for characters younger than the tables in `tokenizers`: the `regex`
module may know them as letters or digits, and Python's NFC sorts them as combining marks.
"""

from __future__ import annotations

import base64
import codecs
import json
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import regex
import sentencepiece
import tiktoken

from zoo.errors import ZooError

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPECIAL = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id"]
LLAMA3_SPECIAL += ["step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag", "image"]
LLAMA3_SPECIAL += [f"reserved_special_token_{i}" for i in range(2, 246)]

# Byte-level vocabularies are written in 256 letters: a printable byte is itself, the others count up from U+0100.
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
LETTERS = {chr(b): b for b in _PRINTABLE}
LETTERS |= {chr(0x100 + n): b for n, b in enumerate(b for b in range(256) if b not in _PRINTABLE)}
_LETTER_SET, _LETTER_TO_BYTE = frozenset(LETTERS), str.maketrans({letter: chr(b) for letter, b in LETTERS.items()})


class Tokenizer:
    """Turns text into token ids and back, as the checkpoint's own tokenizer does. Made by `Tokenizer.load`.

    special: ids of the special tokens by name. vocab_size: largest id + 1. bos_id, eos_id: None where the checkpoint names none.
    chat_template: Jinja source or None; it may be set.
    """

    def __init__(
        self, backend: BytePairs | SentencePieces, added: list[Added], prefix: list[int] | None, nfc: bool, settings: Settings
    ) -> None:
        """prefix: the ids that open a text unless the settings say otherwise; None = BOS."""
        roles = {key: _text(value) for key, value in settings.items() if key.endswith("_token")}
        self._roles = {key: name for key, name in roles.items() if name is not None}
        # A token with a role is special, whatever its flag says, and also if it is listed in the vocabulary only.
        ids = {token.text: token.id for token in added}
        for name in self._roles.values():
            if name not in ids and (found := [i for i, piece in backend.pieces.items() if piece == name.encode()]):
                added = [*added, Added(found[0], name, True)]
        self.special = {token.text: token.id for token in added if token.special or token.text in self._roles.values()}
        for key in ("bos_token", "eos_token"):
            if self._roles.get(key) not in {None, *self.special}:
                raise ZooError(f"{key} {self._roles[key]!r} is not in the vocabulary; correct it in tokenizer_config.json")
        self.bos_id = self.special.get(self._roles.get("bos_token", ""))
        self.eos_id = self.special.get(self._roles.get("eos_token", ""))
        self.chat_template = _default_template(settings.get("chat_template"))

        if settings.get("add_eos_token"):
            raise ZooError("add_eos_token is not supported: a prompt that ends with the end token cannot be continued; set it to false")
        add_bos = settings.get("add_bos_token", True if prefix is None else None)
        if add_bos and self.bos_id is None:
            raise ZooError("a text is to begin with BOS, but there is no bos_token; name it in tokenizer_config.json")
        self._prefix = (prefix or []) if add_bos is None else [self.bos_id] if add_bos and self.bos_id is not None else []
        self._backend, self._nfc = backend, nfc
        self._before = Finder([token for token in added if not token.normalized], set(self.special))
        self._after = Finder([token for token in added if token.normalized], set(self.special))
        self._pieces = backend.pieces | {token.id: token.text.encode() for token in added}
        self.vocab_size = max(self._pieces) + 1

    @staticmethod
    def load(folder: Path) -> Tokenizer:
        """Reads tokenizer.json, or else tokenizer.model, with tokenizer_config.json, special_tokens_map.json and chat_template.jinja
        where they exist. ZooError names the file that is missing, broken or of an unsupported kind."""
        path = folder = Path(folder)
        try:
            settings: Settings = {}
            for name in ("special_tokens_map.json", "tokenizer_config.json"):
                if (path := folder / name).exists():
                    settings |= {key: value for key, value in _read_json(path).items() if value is not None}
            if (path := folder / "chat_template.jinja").exists():
                settings["chat_template"] = path.read_text(encoding="utf-8")
            model = folder / "tokenizer.model"
            if (path := folder / "tokenizer.json").exists():
                data = _read_json(path)
                # Mistral and Llama 2 ship both files; their tokenizer.json is another notation of the sentencepiece model.
                if not model.exists() or '"ByteLevel"' in json.dumps(data["pre_tokenizer"]):
                    return _from_json(data, settings)
            if (path := model).exists():
                content = path.read_bytes()
                return _from_tiktoken(content, settings) if _TIKTOKEN_LINE.match(content) else _from_sentencepiece(content, settings)
        except ZooError as error:
            raise ZooError(f"{path}: {error}") from None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, regex.error) as error:
            raise ZooError(f"{path}: cannot be read ({_one_line(error)}); download it again") from error
        raise ZooError(f"{folder}: no tokenizer; put the checkpoint's tokenizer.json or tokenizer.model there")

    def encode(self, text: str, bos: bool = True, special: bool = False) -> list[int]:
        """bos: begin with BOS where the checkpoint's tokenizer does so by default. special: turn the names of special tokens inside the
        text into their ids; without it they are plain text, which is right for what users type. A lone surrogate becomes U+FFFD."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = list(self._prefix) if bos else []
        first = True
        for token, stretch in self._before.cut(text, special):
            stretch = unicodedata.normalize("NFC", stretch) if self._nfc and token is None else stretch
            for inner, plain in self._after.cut(stretch, special) if token is None else [(token, stretch)]:
                ids += self._backend.encode(plain, first) if inner is None else [inner]
                first = False
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`. Bytes that are no UTF-8 become U+FFFD; ids outside the vocabulary are nothing."""
        stream = self.stream(skip_special)
        return "".join([stream.push(i) for i in ids]) + stream.finish()

    def stream(self, skip_special: bool = True) -> Stream:
        """Decodes one id at a time."""
        return Stream(self._pieces, set(self.special.values()) if skip_special else set(), self._backend.strips)

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The conversation as the chat template writes it. ZooError when there is no template or it fails."""
        if self.chat_template is None:
            raise ZooError(
                "this checkpoint has no chat template; write one to chat_template.jinja in its folder, or set tokenizer.chat_template"
            )
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            return _compile(self.chat_template).render(**given, **self._roles)
        except Exception as error:  # a template is a program: anything may come out of it
            raise ZooError(f"the chat template failed ({_one_line(error)}); check the messages, or set another template") from error

    def chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """The ids of the rendered conversation; the template writes BOS itself."""
        return self.encode(self.render(messages, add_generation_prompt), bos=False, special=True)


class Stream:
    """Decoding as tokens arrive. `push` returns the text that is certain by now, never half a UTF-8 character; `finish` the rest."""

    def __init__(self, pieces: dict[int, bytes], skip: set[int], strips: bool) -> None:
        self._pieces, self._skip, self._strips = pieces, skip, strips
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, i: int) -> str:
        piece = b"" if int(i) in self._skip else self._pieces.get(int(i), b"")
        if self._strips and piece:
            piece, self._strips = piece.removeprefix(b" "), False
        return self._utf8.decode(piece)

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


@dataclass(frozen=True)
class Added:
    """A token that is found in the text before merging; `normalized` ones are looked for after normalization."""

    id: int
    text: str
    special: bool
    normalized: bool = False


class Finder:
    """Finds added tokens in a text: the leftmost, and of those the longest."""

    def __init__(self, tokens: list[Added], special: set[str]) -> None:
        self._tokens = {token.text: (token.id, token.text in special) for token in tokens}
        self._pattern = regex.compile("|".join(map(regex.escape, sorted(self._tokens, key=len, reverse=True))))

    def cut(self, text: str, special: bool) -> Iterator[tuple[int | None, str]]:
        """Pairs (id, its text) for tokens and (None, text) for what lies between. Without `special` a special token is text as a whole:
        no other token is looked for inside it."""
        end = 0
        for match in self._pattern.finditer(text) if self._tokens else ():
            token, is_special = self._tokens[match.group()]
            if special or not is_special:
                if match.start() > end:
                    yield None, text[end : match.start()]
                yield token, match.group()
                end = match.end()
        if end < len(text):
            yield None, text[end:]


class BytePairs:
    """Byte-level BPE: `splits` cut the text into pieces, one after the other, and tiktoken merges the bytes of each piece.

    prefix_space: a space goes before what reaches the last split. tokens: bytes -> id of the tokens that merging can produce, by priority.
    pieces: id -> bytes of all tokens. whole: a piece that is a token is that token, whatever the merges say.
    """

    strips = False

    def __init__(self, splits: list[str], prefix_space: bool, tokens: dict[bytes, int], pieces: dict[int, bytes], whole: bool) -> None:
        self._splits, self._prefix_space, self.pieces = [regex.compile(split) for split in splits], prefix_space, pieces
        self._whole = {piece: i for i, piece in pieces.items()} if whole else {}
        # tiktoken's ids are priorities here, and a byte without a token is kept from it: it would panic.
        self._ids, ranks = list(tokens.values()), {token: rank for rank, token in enumerate(tokens)}
        self._missing = bytes(b for b in range(256) if bytes([b]) not in ranks)
        self._tiktoken = tiktoken.Encoding("zoo", pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={})
        self._remembered = lru_cache(maxsize=1 << 16)(self._merge)

    def encode(self, text: str, first: bool) -> list[int]:
        pieces = [text]
        for split in self._splits[:-1]:
            pieces = [part for piece in pieces for part in _cut(split, piece)]
        if self._prefix_space:
            pieces = [piece if piece.startswith(" ") else " " + piece for piece in pieces]
        parts = [part for piece in pieces for part in _cut(self._splits[-1], piece)]
        return [i for part in parts for i in (self._remembered(part) if len(part) < 64 else self._merge(part))]

    def _merge(self, part: str) -> list[int]:
        data = part.encode()
        if data in self._whole:
            return [self._whole[data]]
        data = data.translate(None, self._missing)  # dropped before merging, so that the neighbours may merge
        return [self._ids[rank] for rank in self._tiktoken._encode_single_piece(data)] if data else []


def _cut(split: regex.Pattern[str], text: str) -> Iterator[str]:
    """The matches of `split` and what lies between them, in order."""
    end = 0
    for match in split.finditer(text):
        start, stop = match.span()
        if start > end:
            yield text[end:start]
        if stop > start:
            yield text[start:stop]
        end = stop
    if end < len(text):
        yield text[end:]


class SentencePieces:
    """A sentencepiece model. It puts a space before the text; with `every`, before every stretch between special tokens ("legacy")."""

    def __init__(self, proto: bytes, every: bool) -> None:
        self.model, self._every = sentencepiece.SentencePieceProcessor(model_proto=proto), every
        # Serialized protobuf messages merge when they are joined: this appends normalizer_spec { add_dummy_prefix: false }.
        self._bare = sentencepiece.SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")
        names = {i: self.model.id_to_piece(i) for i in range(self.model.vocab_size())}
        self.pieces = {
            i: bytes([int(name[3:5], 16)]) if self.model.is_byte(i) else name.replace("\u2581", " ").encode() for i, name in names.items()
        }
        self.strips = any(not self.model.decode([i]).startswith(" ") for i, piece in self.pieces.items() if piece[:1] == b" " != piece)

    def encode(self, text: str, first: bool) -> list[int]:
        ids: list[int] = (self.model if first or self._every else self._bare).encode(text)
        return ids


Settings = dict[str, Any]  # what tokenizer_config.json and special_tokens_map.json say


def _from_json(data: dict[str, Any], settings: Settings) -> Tokenizer:
    """`tokenizer.json` as Hugging Face's `tokenizers` writes it. What is not understood is an error that names it."""
    splits, prefix_space = _splits(data["pre_tokenizer"])
    normalizers = [part["type"] for part in _flat(data["normalizer"], "normalizers")]
    _require(set(normalizers) <= {"NFC"}, "normalizer", normalizers)
    decoders = [part["type"] for part in _flat(data["decoder"], "decoders")]
    _require(decoders == ["ByteLevel"], "decoder", decoders)
    model = data["model"]
    for option, value in model.items():
        if option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
            _require(not value, option, value)
    _require(model["type"] == "BPE", "model type", model["type"])

    vocab: dict[str, int] = model["vocab"]
    added, pieces = [], {i: _token_bytes(token) for token, i in vocab.items()}
    for token in data["added_tokens"]:
        i, text = token["id"], token["content"]
        for option in ("single_word", "lstrip", "rstrip"):
            _require(not token[option], f"option of added token {text!r}:", option)
        _require(
            vocab.get(text, i) == i and pieces.get(i, text.encode()) in (text.encode(), _token_bytes(text)), "id of added token", (text, i)
        )
        text = unicodedata.normalize("NFC", text) if normalizers and token["normalized"] else text
        added.append(Added(i, text, token["special"], token["normalized"]))
    _require(len(pieces) == len(vocab) and len({token.id for token in added}) == len(added), "vocabulary", "one id for two tokens")
    _require(all(isinstance(i, int) and i >= 0 for i in pieces), "vocabulary", "an id that is no natural number")

    letters = [letter for letter in LETTERS if letter in vocab]
    _require(len(letters) == 256 or model.get("unk_token") is None, "unk_token where bytes lack tokens:", model.get("unk_token"))
    tokens = {_token_bytes(token): vocab[token] for token in letters + _by_priority(model["merges"], vocab)}
    backend = BytePairs(splits, prefix_space, tokens, pieces, whole=bool(model.get("ignore_merges")))
    return Tokenizer(backend, added, _prefix(data["post_processor"]), bool(normalizers), settings)


def _splits(pre_tokenizer: dict[str, Any] | None) -> tuple[list[str], bool]:
    """Patterns that cut the text one after the other; and whether a space goes before what reaches the last one."""
    parts = _flat(pre_tokenizer, "pretokenizers")
    kinds = [part["type"] for part in parts]
    _require(kinds[-1:] == ["ByteLevel"] and set(kinds[:-1]) <= {"Digits", "Split"}, "pre_tokenizer", kinds)
    patterns: list[str] = []
    for part in parts[:-1]:
        if part["type"] == "Digits":
            patterns.append(r"\p{N}" if part["individual_digits"] else r"\p{N}+")
        else:
            [(kind, pattern)] = part["pattern"].items()
            _require(part["behavior"] == "Isolated" and not part["invert"], "behavior of Split", (part["behavior"], part["invert"]))
            # The engines disagree about sets within sets.
            _require(kind == "String" or not regex.search(r"&&|\[\[", pattern), "pattern of Split", pattern)
            patterns.append(regex.escape(pattern) if kind == "String" else pattern)
    # Without its own pattern ByteLevel takes what reaches it as it is.
    return [*patterns, GPT2_SPLIT if parts[-1].get("use_regex", True) else r"(?s:.+)"], parts[-1]["add_prefix_space"]


def _by_priority(merges: list[str] | list[list[str]], vocab: dict[str, int]) -> list[str]:
    """The tokens that merging can produce, most urgent first.

    `tokenizers` merges the pairs that are listed, tiktoken merges any pair whose product has a rank. They agree when a token ranks where
    the merge that completes it stands in the list, and when tokens that are never completed have no rank. A token's letters always
    merge in the same way, whatever stands around them; so it is enough to merge each token's letters once.
    """
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    odd = [pair for pair in pairs if len(pair) != 2 or not (pair[0] in vocab and pair[1] in vocab and pair[0] + pair[1] in vocab)]
    _require(not odd, "merge of tokens that are not in the vocabulary:", odd[:1])
    rank = {pair: number for number, pair in enumerate(pairs)}
    never = len(pairs)
    letters = _LETTER_SET & vocab.keys()
    completed: dict[int, str] = {}
    for token in dict.fromkeys(map("".join, pairs)):
        parts = list(token) if letters.issuperset(token) else []
        ranks = [rank.get(pair, never) for pair in pairwise(parts)]
        while len(ranks) > 1 and (low := min(ranks)) < never:
            at = ranks.index(low)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            del ranks[at]
            for left in range(max(at - 1, 0), min(at + 1, len(ranks))):
                ranks[left] = rank.get((parts[left], parts[left + 1]), never)
        if len(ranks) == 1 and ranks[0] < never:
            completed[ranks[0]] = token
    return [completed[number] for number in sorted(completed)]


def _prefix(post_processor: dict[str, Any] | None) -> list[int]:
    """The ids that open a text by default."""
    prefix: list[int] = []
    for part in _flat(post_processor, "processors"):
        _require(part["type"] in ("ByteLevel", "TemplateProcessing"), "post_processor", part["type"])
        if part["type"] == "TemplateProcessing":
            *before, last = part["single"]
            _require("Sequence" in last, "post_processor that appends", last)
            prefix += [i for token in before for i in part["special_tokens"][token["SpecialToken"]["id"]]["ids"]]
    return prefix


_TIKTOKEN_LINE = regex.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")


def _from_tiktoken(data: bytes, settings: Settings) -> Tokenizer:
    """Lines of a token in base64 and its rank. The file says neither pattern nor special tokens; they are Llama 3's."""
    pairs = sorted((int(rank), base64.b64decode(token, validate=True)) for token, rank in map(bytes.split, data.splitlines()))
    pieces = dict(pairs)
    _require(len(pairs) <= 128_000, "tiktoken file, larger than Llama 3's:", f"{len(pairs)} tokens")
    _require(list(pieces) == list(range(len(pairs))) and len(set(pieces.values())) == len(pairs), "tiktoken file", "gaps or repetitions")
    names = {len(pairs) + n: f"<|{name}|>" for n, name in enumerate(LLAMA3_SPECIAL)}
    names |= {int(i): token["content"] for i, token in settings.get("added_tokens_decoder", {}).items()}
    backend = BytePairs([LLAMA3_SPLIT], False, {token: rank for rank, token in pairs}, pieces, whole=False)
    settings = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"} | settings
    return Tokenizer(backend, [Added(i, name, True) for i, name in names.items()], None, False, settings)


def _from_sentencepiece(data: bytes, settings: Settings) -> Tokenizer:
    backend = SentencePieces(data, every=settings.get("legacy", True))
    model = backend.model
    added = {i: Added(i, model.id_to_piece(i), True) for i in backend.pieces if model.is_control(i) or model.is_unknown(i)}
    roles = {key: added[i].text for key, i in (("bos_token", model.bos_id()), ("eos_token", model.eos_id())) if i in added}
    for i, token in settings.get("added_tokens_decoder", {}).items():
        added[int(i)] = Added(int(i), token["content"], token["special"])
    return Tokenizer(backend, list(added.values()), None, False, roles | settings)


@lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    """The environment that chat templates are written for. A template is somebody else's program: it runs in Jinja's sandbox."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
        # Jinja's own filter escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(source)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here only its body counts."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _default_template(value: Any) -> str | None:
    """One template, or a list of named ones, of which "default" or the only one is taken."""
    if not isinstance(value, list):
        return value if isinstance(value, str) else None
    named = {entry["name"]: entry["template"] for entry in value}
    return named.get("default", value[0]["template"] if len(value) == 1 else None)


def _read_json(path: Path) -> dict[str, Any]:
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise TypeError("not a JSON object")
    return data


def _flat(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A part of tokenizer.json as a list: null is none, a Sequence is its members."""
    if part is None:
        return []
    return [inner for member in part[key] for inner in _flat(member, key)] if part["type"] == "Sequence" else [part]


def _token_bytes(token: str) -> bytes:
    """The bytes of a token written in byte letters; a token with any other character is itself."""
    return token.translate(_LETTER_TO_BYTE).encode("latin-1") if _LETTER_SET.issuperset(token) else token.encode()


def _text(token: Any) -> str | None:
    """A token in tokenizer_config.json is its text, or an object that holds it."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _require(true: bool, what: str, value: object) -> None:
    if not true:
        raise ZooError(
            f"unsupported {what} {value!r}; byte-level BPE like that of Llama 3, SmolLM2 and GPT-NeoX is read, and tokenizer.model"
        )


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
