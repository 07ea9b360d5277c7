"""Text to token ids and back: one small class over three backends, and chat templates.

zoo/tokenizer_files.py says which files are read and which comes first, zoo/bpe.py merges, zoo/templates.py renders.

What is unusual: the ids are those of Hugging Face's `tokenizers`, also where a vocabulary lacks bytes (SmolLM2's) and where the order of
the merges is not the order of the ids. Three differences remain. Two are for characters younger than the tables in `tokenizers`: the
`regex` module may know them as letters or digits, and Python's NFC sorts them as combining marks. And of byte tokens that are no UTF-8
the characters between the broken bytes are kept, as sentencepiece does; `tokenizers` gives up the whole run, which no stream can.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import regex

from zoo import templates
from zoo.bpe import BytePairs
from zoo.errors import ZooError
from zoo.tokenizer_files import MAX_ADDED, Added, Parts, plain, read, short, told


class Tokenizer:
    """Turns text into token ids and back, as the checkpoint's own tokenizer does. Made by `Tokenizer.load`.

    special: ids of the special tokens by name. vocab_size: largest id + 1. bos_id, eos_id: None where the checkpoint names none.
    chat_template: Jinja source or None; it may be set. kind: the file that was read and what it holds, for people.
    """

    def __init__(self, parts: Parts) -> None:
        added, settings, backend = parts.added, parts.settings, parts.backend
        roles = {key: _text(value) for key, value in settings.items() if key.endswith("_token")}
        self._roles = {key: name for key, name in roles.items() if name is not None}
        # A token with a role is special, whatever its flag says, and also if it is listed in the vocabulary only.
        ids = {token.text: token.id for token in added}
        for name in self._roles.values():
            if name not in ids and (found := [i for i, piece in backend.pieces.items() if piece == name.encode()]):
                added = [*added, plain(found[0], name)]
        self.special = {token.text: token.id for token in added if token.special or token.text in self._roles.values()}
        for key in ("bos_token", "eos_token"):
            if self._roles.get(key) not in {None, *self.special}:
                raise ZooError(f"{key} {short(self._roles[key])} is not in the vocabulary; correct it in tokenizer_config.json")
        self.bos_id = self.special.get(self._roles.get("bos_token", ""))
        self.eos_id = self.special.get(self._roles.get("eos_token", ""))
        self.chat_template = _default_template(settings.get("chat_template"))
        if len(self.chat_template or "") > templates.MAX_TEMPLATE:
            raise ZooError(f"a chat template of more than {templates.MAX_TEMPLATE:,} characters; write one to chat_template.jinja")

        if settings.get("add_eos_token"):
            raise ZooError("add_eos_token is not supported: a prompt that ends with the end token cannot be continued; set it to false")
        add_bos = settings.get("add_bos_token", True if parts.prefix is None else None)
        if add_bos and self.bos_id is None:
            raise ZooError("a text is to begin with BOS, but there is no bos_token; name it in tokenizer_config.json")
        self._prefix = (parts.prefix or []) if add_bos is None else [self.bos_id] if add_bos and self.bos_id is not None else []
        self._file, self._loaded_template = parts.file, self.chat_template
        self._backend, self._normalize = backend, parts.normalize
        self.kind = f"{parts.file.name}, {backend.kind}"
        self._before = Finder([token for token in added if not token.normalized], set(self.special))
        self._after = Finder([token for token in added if token.normalized], set(self.special))
        self._pieces = backend.pieces | {token.id: token.piece for token in added}
        self.vocab_size = max(self._pieces) + 1

    @staticmethod
    def load(folder: Path) -> Tokenizer:
        """Reads tokenizer.json, or else tekken.json, or else tokenizer.model, with tokenizer_config.json, special_tokens_map.json and the
        chat template's file where they exist. ZooError names the file that is missing, broken or of an unsupported kind."""
        parts = read(Path(folder))
        try:
            return Tokenizer(parts)
        except ZooError as error:
            raise ZooError(f"{parts.file}: {error}") from None
        except Exception as error:  # the file is anybody's: anything may come out of it
            raise ZooError(f"{parts.file}: cannot be read ({told(error)}); download it again") from error

    def encode(self, text: str, bos: bool = True, special: bool = False) -> list[int]:
        """bos: begin with BOS where the checkpoint's tokenizer does so by default. special: turn the names of special tokens inside the
        text into their ids; without it they are plain text, which is right for what users type. A lone surrogate becomes U+FFFD.
        ZooError when the file's pattern takes exponential time."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = list(self._prefix) if bos else []
        first = True
        deadline = time.monotonic() + 0.5 + 5e-5 * len(text)  # for the file's patterns, which may be exponential; usual ones take 1e-6
        try:
            for token, stretch in self._before.cut(text, special):
                stretch = self._normalize(stretch) if self._normalize and token is None else stretch
                for inner, plain in self._after.cut(stretch, special) if token is None else [(token, stretch)]:
                    ids += self._backend.encode(plain, first, deadline) if inner is None else [inner]
                    first = False
        except (TimeoutError, MemoryError):
            raise ZooError(f"{self._file}: its Split pattern takes too much on this text; give it one that backtracks less") from None
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`. Bytes that are no UTF-8 become U+FFFD; ids outside the vocabulary are nothing."""
        stream = self.stream(skip_special)
        return "".join([stream.push(i) for i in ids]) + stream.finish()

    def stream(self, skip_special: bool = True) -> Stream:
        """Decodes one id at a time."""
        skip = set(self.special.values()) if skip_special else set()
        return Stream(self._pieces, skip, self._backend.strips, each_byte=not isinstance(self._backend, BytePairs))

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The conversation as the chat template writes it. ZooError when there is no template, it fails, or it does not end."""
        if self.chat_template is None:
            raise ZooError(
                "this checkpoint has no chat template; write one to chat_template.jinja in its folder, or set tokenizer.chat_template"
            )
        given = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            return templates.render(self.chat_template, messages, given | self._roles)
        except Exception as error:  # a template is a program: anything may come out of it
            where = f"{self._file.parent}: " if self.chat_template is self._loaded_template else ""
            raise ZooError(f"{where}the chat template failed ({told(error)}); check the messages, or set another template") from error

    def chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """The ids of the rendered conversation; the template writes BOS itself."""
        return self.encode(self.render(messages, add_generation_prompt), bos=False, special=True)


codecs.register_error("zoo-each-byte", lambda error: ("\ufffd" * (error.end - error.start), error.end))  # type: ignore[attr-defined]


class Stream:
    """Decoding as tokens arrive. `push` returns the text that is certain by now, never half a UTF-8 character; `finish` the rest.

    each_byte: every byte that is in no character becomes U+FFFD, as sentencepiece has it; else every broken character does."""

    def __init__(self, pieces: dict[int, bytes], skip: set[int], strips: bool, each_byte: bool = False) -> None:
        self._pieces, self._skip, self._strips = pieces, skip, strips
        self._utf8 = codecs.getincrementaldecoder("utf-8")("zoo-each-byte" if each_byte else "replace")

    def push(self, i: int) -> str:
        piece = b"" if int(i) in self._skip else self._pieces.get(int(i), b"")
        if self._strips and piece:
            piece, self._strips = piece.removeprefix(b" "), False
        return self._utf8.decode(piece)

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class Finder:
    """Finds added tokens in a text: the leftmost, and of those the longest. Their number does not slow it down."""

    def __init__(self, tokens: list[Added], special: set[str]) -> None:
        self._tokens = {token.find: (token.id, token.text in special) for token in tokens if token.find}
        if long := [name for name in self._tokens if len(name) > MAX_ADDED]:
            raise ZooError(f"unsupported added token of {len(long[0])} characters; at most {MAX_ADDED} are read")
        self._lengths: dict[str, set[int]] = {}  # by what the token begins with
        for name in self._tokens:
            self._lengths.setdefault(name[:2], set()).add(len(name))
        self._start = regex.compile("[" + "".join(regex.escape(c) for c in sorted({name[0] for name in self._tokens} | {"\0"})) + "]")

    def _at(self, text: str, start: int) -> str | None:
        lengths = self._lengths.get(text[start : start + 2], set()) | self._lengths.get(text[start], set())
        return next((name for n in sorted(lengths, reverse=True) if (name := text[start : start + n]) in self._tokens), None)

    def cut(self, text: str, special: bool) -> Iterator[tuple[int | None, str]]:
        """Pairs (id, its text) for tokens and (None, text) for what lies between. Without `special` a special token is text as a whole:
        no other token is looked for inside it."""
        end = at = 0
        while self._tokens and (match := self._start.search(text, at)):
            start = match.start()
            name = self._at(text, start)
            at = start + len(name or " ")
            if name and (special or not self._tokens[name][1]):
                if start > end:
                    yield None, text[end:start]
                yield self._tokens[name][0], name
                end = at
        if end < len(text):
            yield None, text[end:]


def _default_template(value: Any) -> str | None:
    """One template, or a list of named ones, of which "default" or the only one is taken."""
    if not isinstance(value, list):
        return value if isinstance(value, str) else None
    named = {entry["name"]: entry["template"] for entry in value}
    return _text(named.get("default", value[0]["template"] if len(value) == 1 else None))


def _text(token: Any) -> str | None:
    """A token in tokenizer_config.json is its text, or an object that holds it."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


class StopText:
    """Streaming text that ends before the first stop string: what might be the start of one is held back until it is not."""

    def __init__(self, stream: Any, stop: Sequence[str]) -> None:
        stop = (stop,) if isinstance(stop, str) else stop
        if not all(stop):
            raise ZooError("a stop string is empty; leave it out instead")
        self.stream, self.stop, self.held, self.stopped = stream, tuple(stop), "", False

    def push(self, token: int) -> str:
        return self.take(self.stream.push(token), final=False)

    def finish(self) -> str:
        return self.take(self.stream.finish(), final=True)

    def take(self, piece: str, final: bool) -> str:
        if self.stopped:
            return ""
        self.held += piece
        found = [i for i in (self.held.find(s) for s in self.stop) if i >= 0]
        if found:
            self.stopped, out, self.held = True, self.held[: min(found)], ""
            return out
        keep = 0 if final else max((n for s in self.stop for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        out, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return out
