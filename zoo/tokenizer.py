"""Text to token ids and back: tiktoken and sentencepiece behind one small class, and chat templates.

A checkpoint folder holds one of three formats: `tokenizer.json` (byte-level BPE: Llama 3, SmolLM2, GPT-NeoX), or `tokenizer.model`, which is
a sentencepiece model (Llama 2, Mistral) or tiktoken's own list of tokens (Llama 3 as Meta ships it).

What is unusual: the ids are those of Hugging Face's `tokenizers`, also where bytes are missing from a vocabulary (SmolLM2's) and where the
order of the merges is not the order of the ids. Two differences remain, both for characters younger than what `tokenizers` was built with:
the `regex` module may already call them letters or digits, and Python's NFC already orders them as combining marks.
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
from typing import Any, ClassVar, Protocol

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
LLAMA3_TOKENS = 128_000
LLAMA3_SPECIAL = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id"]
LLAMA3_SPECIAL += ["step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag", "image"]
LLAMA3_SPECIAL += [f"reserved_special_token_{i}" for i in range(2, 246)]


def _byte_letters() -> dict[str, int]:
    """The 256 letters in which byte-level vocabularies are written: a printable byte is itself, the others count up from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


LETTERS = _byte_letters()


@dataclass(frozen=True)
class Added:
    """A token found in the text before anything else is done to it; `normalized` ones are looked for after normalization."""

    id: int
    text: str
    special: bool
    normalized: bool = False


class Backend(Protocol):
    """`encode` turns plain text into ids (`start`: it opens the whole text); `pieces` holds the bytes that each id stands for."""

    pieces: dict[int, bytes]

    def encode(self, text: str, start: bool) -> list[int]: ...


class BytePairs:
    """Byte-level BPE: `splits` cut the text into pieces one after the other, tiktoken merges the bytes of each piece.

    ranks: the bytes of each token that merging can produce -> its priority. ids: priority -> id, None where they are the same.
    whole: pieces that are one token whatever the merges say.
    """

    def __init__(
        self,
        splits: list[str],
        prefix_space: bool,
        ranks: dict[bytes, int],
        ids: list[int] | None,
        whole: dict[bytes, int],
        pieces: dict[int, bytes],
    ) -> None:
        self.pieces = pieces
        self._splits = [regex.compile(split) for split in splits]
        self._prefix_space, self._ids, self._whole = prefix_space, ids, whole
        # A byte without a token is dropped before merging, so that its neighbours may merge. tiktoken would panic on it.
        self._missing = bytes(b for b in range(256) if bytes([b]) not in ranks)
        self._tiktoken = tiktoken.Encoding("zoo", pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={})
        self._remembered = lru_cache(maxsize=1 << 16)(self._merge)

    def encode(self, text: str, start: bool) -> list[int]:
        pieces = [text]
        for number, split in enumerate(self._splits):
            if self._prefix_space and number == len(self._splits) - 1:
                pieces = [piece if piece.startswith(" ") else " " + piece for piece in pieces]
            pieces = [part for piece in pieces for part in _cut(split, piece)]
        ids: list[int] = []
        for piece in pieces:
            ids += self._remembered(piece) if len(piece) < 64 else self._merge(piece)
        return ids

    def _merge(self, piece: str) -> list[int]:
        data = piece.encode()
        if data in self._whole:
            return [self._whole[data]]
        data = data.translate(None, self._missing)
        if not data:
            return []
        ranks = self._tiktoken._encode_single_piece(data)
        return ranks if self._ids is None else [self._ids[rank] for rank in ranks]


def _cut(split: regex.Pattern[str], text: str) -> Iterator[str]:
    """The matches of `split` and what lies between them, in order."""
    end = 0
    for match in split.finditer(text):
        if match.start() > end:
            yield text[end : match.start()]
        if match.end() > match.start():
            yield match.group()
        end = match.end()
    if end < len(text):
        yield text[end:]


class SentencePieces:
    """A sentencepiece model. It puts a space before the text; with `every` before every stretch between special tokens (`legacy`)."""

    def __init__(self, proto: bytes, every: bool) -> None:
        self.model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        # Serialized protobuf messages merge when they are joined: this appends normalizer_spec { add_dummy_prefix: false }.
        self._bare = sentencepiece.SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")
        self._every = every
        self.pieces = {i: self._bytes(i) for i in range(self.model.vocab_size())}
        worded = [i for i, piece in self.pieces.items() if piece.startswith(b" ") and len(piece) > 1]
        self.strips = bool(worded) and not self.model.decode([worded[0]]).startswith(" ")

    def _bytes(self, i: int) -> bytes:
        piece: str = self.model.id_to_piece(i)
        if self.model.is_byte(i):
            return bytes([int(piece[3:5], 16)])  # "<0x0A>"
        return piece.replace("\u2581", " ").encode()

    def encode(self, text: str, start: bool) -> list[int]:
        ids: list[int] = (self.model if start or self._every else self._bare).encode(text)
        return ids


class Tokenizer:
    """Turns text into token ids and back, as the checkpoint's own tokenizer does. Made by `Tokenizer.load`.

    special: ids of the special tokens by name. vocab_size: largest id + 1. bos_id, eos_id: None where the checkpoint names none.
    chat_template: Jinja source or None; it may be set.
    """

    def __init__(
        self,
        backend: Backend,
        added: list[Added],
        settings: dict[str, Any],
        *,
        prefix: list[int] | None = None,
        nfc: bool = False,
        strips: bool = False,
        default_bos: str | None = None,
        default_eos: str | None = None,
    ) -> None:
        """prefix: ids that open a text by default, None = BOS. strips: a text's first space is the tokenizer's, not the writer's."""
        known = {token.text: token.id for token in added} | _inverse(backend.pieces)
        stated = {"bos_token": default_bos, "eos_token": default_eos} | settings
        names = {key: name for key in stated if key.endswith("_token") and (name := _content(stated[key])) is not None}
        for key in ("bos_token", "eos_token"):
            if key in names and names[key] not in known:
                raise ZooError(f"{key} {names[key]!r} is not in the vocabulary; correct it in tokenizer_config.json")
        # Tokens with a role are special whatever their flag says.
        roles = {name for name in names.values() if name in known}
        added = [Added(t.id, t.text, t.special or t.text in roles, t.normalized) for t in added]
        added += [Added(known[name], name, True) for name in sorted(roles - {t.text for t in added})]

        self.special = {token.text: token.id for token in added if token.special}
        self.bos_id = known[names["bos_token"]] if "bos_token" in names else None
        self.eos_id = known[names["eos_token"]] if "eos_token" in names else None
        self.chat_template = _template(settings.get("chat_template"))
        self._backend, self._nfc, self._strips, self._names = backend, nfc, strips, names
        self._pieces = backend.pieces | {token.id: token.text.encode() for token in added}
        self.vocab_size = max(self._pieces) + 1
        self._special_ids = set(self.special.values())
        self._raw = _finder([t for t in added if not t.normalized], nfc=False)
        self._normal = _finder([t for t in added if t.normalized], nfc)

        if settings.get("add_eos_token"):
            raise ZooError("add_eos_token is not supported: a prompt that ends with the end token cannot be continued; set it to false")
        wants_bos = settings.get("add_bos_token")
        if (wants_bos or (wants_bos is None and prefix is None)) and self.bos_id is None:
            raise ZooError("a text is to begin with a BOS token, but there is no bos_token; name it in tokenizer_config.json")
        if wants_bos is not None or prefix is None:
            prefix = [self.bos_id] if wants_bos is not False and self.bos_id is not None else []
        self._prefix = prefix

    @staticmethod
    def load(folder: Path) -> Tokenizer:
        """Reads tokenizer.json, or else tokenizer.model, with tokenizer_config.json, special_tokens_map.json and chat_template.jinja
        where they exist. ZooError names the file that is missing, broken or of an unsupported kind."""
        folder = Path(folder)
        path = folder
        try:
            settings: dict[str, Any] = {}
            for name in ("special_tokens_map.json", "tokenizer_config.json"):
                if (path := folder / name).exists():
                    settings |= {key: value for key, value in _json(path).items() if value is not None}
            if (path := folder / "chat_template.jinja").exists():
                settings["chat_template"] = path.read_text(encoding="utf-8")
            model = folder / "tokenizer.model"
            if (path := folder / "tokenizer.json").exists():
                data = _json(path)
                if not model.exists() or '"ByteLevel"' in json.dumps(data.get("pre_tokenizer")):
                    return _from_json(data, settings)
            if (path := model).exists():
                return _from_model(path.read_bytes(), settings)
        except ZooError as error:
            raise ZooError(f"{path}: {error}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, RecursionError, regex.error) as error:
            raise ZooError(f"{path}: cannot be read ({_one_line(error)}); download it again") from error
        raise ZooError(f"{folder}: no tokenizer; put the checkpoint's tokenizer.json or tokenizer.model there")

    def encode(self, text: str, bos: bool = True, special: bool = False) -> list[int]:
        """bos: begin with BOS where the checkpoint's tokenizer does so by default. special: parse the names of special tokens inside the
        text to their ids; without it they are plain text, which is right for what users type. A lone surrogate becomes U+FFFD."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = list(self._prefix) if bos else []
        start = True
        for found, stretch in self._raw.cut(text, special):
            if found is not None:
                ids.append(found)
            else:
                stretch = unicodedata.normalize("NFC", stretch) if self._nfc else stretch
                for inner, plain in self._normal.cut(stretch, special):
                    ids += self._backend.encode(plain, start) if inner is None else [inner]
                    start = False
            start = False
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`. Bytes that are no UTF-8 become U+FFFD; ids outside the vocabulary are nothing."""
        stream = self.stream(skip_special)
        return "".join([stream.push(i) for i in ids]) + stream.finish()

    def stream(self, skip_special: bool = True) -> Stream:
        """Decodes one id at a time."""
        return Stream(self._pieces, self._special_ids if skip_special else set(), self._strips)

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The conversation as the chat template writes it. ZooError when there is no template or it fails."""
        if self.chat_template is None:
            raise ZooError(
                "this checkpoint has no chat template; write one to chat_template.jinja in its folder, or set tokenizer.chat_template"
            )
        try:
            template = _compile(self.chat_template)
            return template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **self._names
            )
        except Exception as error:  # a template is a program: anything may come out of it
            raise ZooError(f"the chat template failed: {_one_line(error)}; check the messages, or set another template") from error

    def chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """The ids of the rendered conversation; the template writes BOS itself."""
        return self.encode(self.render(messages, add_generation_prompt), bos=False, special=True)


class Stream:
    """Decoding as tokens arrive. `push` returns the text that is certain by now, never half a UTF-8 character; `finish` the rest."""

    def __init__(self, pieces: dict[int, bytes], skip: set[int], strips: bool) -> None:
        self._pieces, self._skip, self._strips = pieces, skip, strips
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, i: int) -> str:
        i = int(i)
        piece = b"" if i in self._skip else self._pieces.get(i, b"")
        if self._strips and piece:
            piece, self._strips = piece.removeprefix(b" "), False
        return self._utf8.decode(piece)

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _finder:
    """Finds added tokens in a text: the leftmost, and of those the longest."""

    def __init__(self, tokens: list[Added], nfc: bool) -> None:
        self.tokens = {unicodedata.normalize("NFC", t.text) if nfc else t.text: t for t in tokens}
        self.pattern = regex.compile("|".join(map(regex.escape, sorted(self.tokens, key=len, reverse=True))))

    def cut(self, text: str, special: bool) -> Iterator[tuple[int | None, str]]:
        """Pairs (id, "") for tokens and (None, text) for what lies between. Without `special` a special token is text, as a whole:
        other tokens inside it are not looked for."""
        end = 0
        for match in self.pattern.finditer(text) if self.tokens else ():
            token = self.tokens[match.group()]
            if token.special and not special:
                continue
            if match.start() > end:
                yield None, text[end : match.start()]
            yield token.id, ""
            end = match.end()
        if end < len(text):
            yield None, text[end:]


def _from_json(data: dict[str, Any], settings: dict[str, Any]) -> Tokenizer:
    """`tokenizer.json` as Hugging Face's `tokenizers` writes it, if it is byte-level BPE."""
    splits, prefix_space = _splits(data["pre_tokenizer"])
    normalizers = {part["type"] for part in _flat(data["normalizer"], "normalizers")}
    _require(normalizers <= {"NFC"}, "normalizer", sorted(normalizers - {"NFC"}))
    decoders = [part["type"] for part in _flat(data["decoder"], "decoders")]
    _require(decoders == ["ByteLevel"], "decoder", decoders)

    model = data["model"]
    _require(model["type"] == "BPE", "model type", model["type"])
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        _require(not model.get(option), option, model.get(option))
    vocab: dict[str, int] = model["vocab"]
    added = []
    for token in data.get("added_tokens", ()):
        for option in ("single_word", "lstrip", "rstrip"):
            _require(not token.get(option), f"option {option} of added token {token['content']!r}", token.get(option))
        _require(vocab.get(token["content"], token["id"]) == token["id"], f"second id for {token['content']!r}", token["id"])
        added.append(Added(token["id"], token["content"], token["special"], token.get("normalized", not token["special"])))

    pieces = {i: _token_bytes(token) for token, i in vocab.items()}
    names = {token.id: token.text for token in added}
    _require(len(pieces) == len(vocab) and len(names) == len(added), "vocabulary", "one id for two tokens")
    _require(all(type(i) is int and i >= 0 for i in [*pieces, *names]), "vocabulary", "an id that is no natural number")
    for i, token_text in names.items():
        _require(pieces.get(i) in (None, _token_bytes(token_text)), "vocabulary", f"id {i} for two tokens")

    order = _merge_order(model["merges"], vocab)
    single = [letter for letter in LETTERS if letter in vocab]
    if len(single) < 256:
        _require(model.get("unk_token") is None and not model.get("byte_fallback"), "unk_token or byte_fallback", model.get("unk_token"))
    reachable = single + order
    ranks = {_token_bytes(token): rank for rank, token in enumerate(reachable)}
    whole = {piece: i for i, piece in pieces.items()} if model.get("ignore_merges") else {}
    backend = BytePairs(splits, prefix_space, ranks, [vocab[token] for token in reachable], whole, pieces)
    prefix = _prefix(data.get("post_processor"))
    return Tokenizer(backend, added, settings, prefix=prefix, nfc=bool(normalizers))


def _splits(pre_tokenizer: Any) -> tuple[list[str], bool]:
    """Patterns that cut the text one after the other; True: a space goes before each piece that reaches the last one."""
    parts = _flat(pre_tokenizer, "pretokenizers")
    kinds = [part["type"] for part in parts]
    _require(kinds[-1:] == ["ByteLevel"], "pre_tokenizer without a ByteLevel part at its end", kinds)
    patterns: list[str] = []
    for part in parts[:-1]:
        if part["type"] == "Digits":
            patterns.append(r"\p{N}" if part["individual_digits"] else r"\p{N}+")
        elif part["type"] == "Split":
            how = (part["behavior"], part.get("invert", False))
            _require(how == ("Isolated", False), "Split with behavior and invert", how)
            kind, pattern = next(iter(part["pattern"].items()))
            # The two engines read nested sets and set operations inside [] differently.
            _require(kind == "String" or not regex.search(r"&&|\[\[|--|~~", pattern), "Split pattern", pattern)
            patterns.append(pattern if kind == "Regex" else regex.escape(pattern))
        else:
            _require(False, "pre_tokenizer", part["type"])
    patterns.append(GPT2_SPLIT if parts[-1].get("use_regex", True) else r"(?s:.+)")
    return patterns, parts[-1].get("add_prefix_space", True)


def _merge_order(merges: list[Any], vocab: dict[str, int]) -> list[str]:
    """The tokens that merging can produce, by priority.

    `tokenizers` merges the pairs that are listed; tiktoken merges any pair whose product has a rank. They agree when each token ranks where
    the merge that completes it stands, and tokens that their own letters never complete have no rank; so every token's letters are
    merged here once, by the listed pairs.
    """
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    for pair in pairs:
        if len(pair) != 2 or any(token not in vocab for token in (*pair, "".join(pair))):
            _require(False, "merge of tokens that are not in the vocabulary", pair)
    rank: dict[tuple[str, ...], int] = {}
    for number, pair in enumerate(pairs):
        rank[pair] = number  # of a pair listed twice the later counts, as in `tokenizers`
    never = len(pairs)
    completed: dict[int, str] = {}
    for token in dict.fromkeys("".join(pair) for pair in pairs):
        parts = list(token)
        if any(letter not in LETTERS or letter not in vocab for letter in parts):
            continue
        ranks = [rank.get(pair, never) for pair in pairwise(parts)]
        while len(ranks) > 1 and (low := min(ranks)) < never:
            at = ranks.index(low)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            del ranks[at]
            if at > 0:
                ranks[at - 1] = rank.get((parts[at - 1], parts[at]), never)
            if at < len(ranks):
                ranks[at] = rank.get((parts[at], parts[at + 1]), never)
        if len(ranks) == 1 and ranks[0] < never:
            completed[ranks[0]] = token
    return [completed[number] for number in sorted(completed)]


def _prefix(post_processor: Any) -> list[int]:
    """The ids that are put before a text by default."""
    prefix: list[int] = []
    for part in _flat(post_processor, "processors"):
        if part["type"] == "TemplateProcessing":
            single = part["single"]
            _require("Sequence" in single[-1], "post_processor that appends tokens", single[-1])
            for token in single[:-1]:
                prefix += part["special_tokens"][token["SpecialToken"]["id"]]["ids"]
        else:
            _require(part["type"] == "ByteLevel", "post_processor", part["type"])
    return prefix


def _from_model(data: bytes, settings: dict[str, Any]) -> Tokenizer:
    """`tokenizer.model`: lines of base64 and rank are tiktoken's format, everything else must be sentencepiece."""
    listed = settings.get("added_tokens_decoder", {}).items()
    added = [Added(int(i), token["content"], token.get("special", False)) for i, token in listed]
    if regex.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data):
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in data.splitlines() if line)}
        _require(len(ranks) <= LLAMA3_TOKENS, "tiktoken file that is larger than Llama 3's", f"{len(ranks)} tokens")
        _require(sorted(ranks.values()) == list(range(len(ranks))), "tiktoken file", "ranks with gaps")
        names = {len(ranks) + i: f"<|{name}|>" for i, name in enumerate(LLAMA3_SPECIAL)} | {token.id: token.text for token in added}
        pieces = {rank: token for token, rank in ranks.items()}
        return Tokenizer(
            BytePairs([LLAMA3_SPLIT], False, ranks, None, {}, pieces),
            [Added(i, name, True) for i, name in names.items()],
            settings,
            default_bos="<|begin_of_text|>",
            default_eos="<|end_of_text|>",
        )
    backend = SentencePieces(data, every=settings.get("legacy", True))
    model = backend.model
    control = {i: model.id_to_piece(i) for i in range(model.vocab_size()) if model.is_control(i) or model.is_unknown(i)}
    added += [Added(i, name, True) for i, name in control.items() if i not in {token.id for token in added}]
    return Tokenizer(
        backend, added, settings, strips=backend.strips, default_bos=control.get(model.bos_id()), default_eos=control.get(model.eos_id())
    )


@lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    """The environment that chat templates are written for. A template comes from the internet, so it runs in Jinja's sandbox."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
        # Jinja's own filter escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is all that counts."""

    tags: ClassVar = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _template(value: Any) -> str | None:
    """One template, or a list of named ones, of which "default" or the only one is taken."""
    if isinstance(value, list):
        named = {entry["name"]: entry["template"] for entry in value}
        value = named.get("default", next(iter(named.values())) if len(named) == 1 else None)
    return value


def _json(path: Path) -> dict[str, Any]:
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise TypeError("not a JSON object")
    return data


def _flat(part: Any, key: str) -> list[dict[str, Any]]:
    """A part of tokenizer.json as a list: null is none, a Sequence is its members."""
    if part is None:
        return []
    return [inner for member in part[key] for inner in _flat(member, key)] if part["type"] == "Sequence" else [part]


def _token_bytes(token: str) -> bytes:
    """The bytes of a token written in byte letters; a token with any other character is itself."""
    return bytes(LETTERS[c] for c in token) if all(c in LETTERS for c in token) else token.encode()


def _content(value: Any) -> str | None:
    """A token in tokenizer_config.json: its text, or an object with its text."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _inverse(pieces: dict[int, bytes]) -> dict[str, int]:
    return {piece.decode("utf-8", "replace"): i for i, piece in pieces.items()}


def _require(true: bool, what: str, value: object) -> None:
    if not true:
        raise ZooError(f"unsupported {what}: {value!r}; only byte-level BPE as Llama 3, SmolLM2 and GPT-NeoX use it is read from here")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
