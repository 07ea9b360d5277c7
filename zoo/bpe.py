"""Three ways to merge the pieces of a text: byte-level BPE (tiktoken), BPE of characters, and a sentencepiece model.

Each has `pieces` (id -> bytes of every token), `strips` (decoding drops one leading space) and `encode(text, first, deadline)`,
where `first` says that nothing came before and the deadline is for patterns. What these may cost is bounded: see `compile_pattern`.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise

import regex
import sentencepiece
import tiktoken

from zoo.errors import ZooError

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Byte-level vocabularies are written in 256 letters: a printable byte is itself, the others count up from U+0100.
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
LETTERS = {chr(b): b for b in _PRINTABLE}
LETTERS |= {chr(0x100 + n): b for n, b in enumerate(b for b in range(256) if b not in _PRINTABLE)}
_LETTER_SET, _LETTER_TO_BYTE = frozenset(LETTERS), str.maketrans({letter: chr(b) for letter, b in LETTERS.items()})

Pair = tuple[str, str]


# --- patterns -----------------------------------------------------------------------------------------------------------------------------

# What the patterns of tokenizers are made of. Not in it: references to groups and recursion, which cost memory beside time; fuzzy
# matching; anchors, flags and sets within sets, about which the engines disagree.
_PATTERN = regex.compile(
    r"""(?: \\[pP]\{\^?\w+\} | \\[pP]\w | \\x[0-9A-Fa-f]{2} | \\u[0-9A-Fa-f]{4} | \\[sSdDwWrntfvbB] | \\[^\w\d]   # classes, escapes
        | \((?:\?(?:i?:|<?[=!]|>)|(?!\?)) | \) | \| | [*+?][+?]? | \{\d{1,3}(?:,\d{0,3})?\}\??                      # groups, repeats
        | \[\^?\]?(?:\\[pP]\{\^?\w+\}|\\[^\d]|[^\]\\\[&]|&(?!&))*+\] | [^\\()\[\]{}*+?|^$] )*+""",
    regex.X,
)
_COUNTED_GROUP, _COUNTS = regex.compile(r"\)[+?*]?\{"), regex.compile(r"(?<=\{|,)\d+(?=[,}])")


def compile_pattern(pattern: str) -> regex.Pattern[str]:
    """A pattern out of a file. It may still take exponential time: `cut` has a deadline. What costs memory is refused here, for `regex`
    writes out what is counted: three nested groups {1000} fill a computer."""
    counts = sum(map(int, _COUNTS.findall(pattern)))
    if len(pattern) > 4000 or not _PATTERN.fullmatch(pattern) or _COUNTED_GROUP.search(pattern) or counts > 1000:
        raise ZooError(f"unsupported pattern of Split {pattern[:60]!r}; classes, groups, repeats and lookaround are read")
    return regex.compile(pattern)


def cut(pattern: regex.Pattern[str], text: str, deadline: float) -> Iterator[str]:
    """The matches of `pattern` and what lies between them, in order. TimeoutError when time.monotonic() reaches `deadline`."""
    end = 0
    for match in pattern.finditer(text, timeout=max(deadline - time.monotonic(), 1e-3)):
        start, stop = match.span()
        if start > end:
            yield text[end:start]
        if stop > start:
            yield text[start:stop]
        end = stop
    if end < len(text):
        yield text[end:]


# --- byte-level BPE -----------------------------------------------------------------------------------------------------------------------

MAX_LETTERS = 2048  # of a token that merging makes: working out how it comes about takes n log n steps


class BytePairs:
    """Byte-level BPE: `splits` cut the text into pieces, one after the other, and tiktoken merges the bytes of each piece.

    prefix_space: a space goes before what reaches the last split. tokens: bytes -> id of the tokens that merging can produce, by priority.
    pieces: id -> bytes of all tokens. whole: a piece that is a token is that token, whatever the merges say.
    """

    strips = False

    kind = "byte-level BPE"

    def __init__(self, splits: list[str], prefix_space: bool, tokens: dict[bytes, int], pieces: dict[int, bytes], whole: bool) -> None:
        self._splits, self._prefix_space, self.pieces = [compile_pattern(split) for split in splits], prefix_space, pieces
        self._whole = {piece: i for i, piece in pieces.items()} if whole else {}
        # tiktoken's ids are priorities here, and a byte without a token is kept from it: it would panic.
        self._ids, ranks = list(tokens.values()), {token: rank for rank, token in enumerate(tokens)}
        self._missing = bytes(b for b in range(256) if bytes([b]) not in ranks)
        self._tiktoken = tiktoken.Encoding("zoo", pat_str=r"\s", mergeable_ranks=ranks, special_tokens={})
        self._remembered = lru_cache(maxsize=1 << 16)(self._merge)

    def encode(self, text: str, first: bool, deadline: float) -> list[int]:
        pieces = [text]
        for split in self._splits[:-1]:
            pieces = [part for piece in pieces for part in cut(split, piece, deadline)]
        if self._prefix_space:
            pieces = [piece if piece.startswith(" ") else " " + piece for piece in pieces]
        parts = [part for piece in pieces for part in cut(self._splits[-1], piece, deadline)]
        return [i for part in parts for i in (self._remembered(part) if len(part) < 64 else self._merge(part))]

    def _merge(self, part: str) -> list[int]:
        data = part.encode()
        if data in self._whole:
            return [self._whole[data]]
        data = data.translate(None, self._missing)  # dropped before merging, so that the neighbours may merge
        return [self._ids[rank] for rank in self._tiktoken._encode_single_piece(data)] if data else []


def token_bytes(token: str) -> bytes:
    """The bytes of a token written in byte letters; a token with any other character is itself."""
    return token.translate(_LETTER_TO_BYTE).encode("latin-1") if _LETTER_SET.issuperset(token) else token.encode()


def by_priority(pairs: list[Pair], vocab: dict[str, int]) -> list[str]:
    """The tokens that merging can produce, most urgent first.

    `tokenizers` merges the pairs that are listed, tiktoken merges any pair whose product has a rank. They agree when a token ranks where
    the merge that completes it stands in the list, and when tokens that are never completed have no rank. A token's letters always
    merge in the same way, whatever stands around them; so it is enough to merge each token's letters once.
    """
    if any(len(left) + len(right) > MAX_LETTERS for left, right in pairs):
        raise ZooError(f"a merge that makes a token of more than {MAX_LETTERS} letters; no known tokenizer has one")
    rank = {pair: number for number, pair in enumerate(pairs)}
    letters = _LETTER_SET & vocab.keys()
    completed: dict[int, str] = {}
    for token in dict.fromkeys(map("".join, pairs)):
        parts, last = merge(list(token), rank) if letters.issuperset(token) else ([], None)
        if len(parts) == 1 and last is not None:
            completed[last] = token
    return [completed[number] for number in sorted(completed)]


def merge(parts: list[str], rank: dict[Pair, int]) -> tuple[list[str], int | None]:
    """Joins neighbours, the pair of lowest rank first and of equal ones the leftmost; also the rank of the last pair that was joined."""
    if len(parts) > 40:
        return _merge_long(parts, rank)
    last, never = None, len(rank)
    ranks = [rank.get(pair, never) for pair in pairwise(parts)]
    while ranks and (low := min(ranks)) < never:
        at, last = ranks.index(low), low
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del ranks[at]
        for left in range(max(at - 1, 0), min(at + 1, len(ranks))):
            ranks[left] = rank.get((parts[left], parts[left + 1]), never)
    return parts, last


def _merge_long(parts: list[str], rank: dict[Pair, int]) -> tuple[list[str], int | None]:
    """The same in n log n steps. A part that was joined to its left neighbour is empty; entries of the heap that are out of date stay."""
    last, n = None, len(parts)
    before, after = list(range(-1, n - 1)), list(range(1, n + 1))
    heap = [(rank[pair], left) for left, pair in enumerate(pairwise(parts)) if pair in rank]
    heapq.heapify(heap)
    while heap:
        number, left = heapq.heappop(heap)
        right = after[left]
        if right == n or not parts[left] or rank.get((parts[left], parts[right])) != number:
            continue
        last = number
        parts[left] += parts[right]
        parts[right] = ""
        after[left] = after[right]
        if after[left] < n:
            before[after[left]] = left
        for at in (before[left], left):
            if at >= 0 and after[at] < n and (found := rank.get((parts[at], parts[after[at]]))) is not None:
                heapq.heappush(heap, (found, at))
    return [part for part in parts if part], last


# --- BPE of characters --------------------------------------------------------------------------------------------------------------------


class CharPairs:
    """BPE that starts from characters, as tokenizer.json writes down a sentencepiece model. There are no words: merges may go anywhere.

    prepare: (text, first) -> text with its spaces written as U+2581. split: no merge goes across the left side of U+2581. A character
    that is no token becomes its bytes if those have tokens; else unk, one for a whole run with fuse_unk; without unk it is nothing.
    """

    kind = "BPE of characters"

    def __init__(
        self,
        vocab: dict[str, int],
        pairs: list[Pair],
        unk: int | None,
        *,
        byte_fallback: bool,
        fuse_unk: bool,
        whole: bool,
        split: bool,
        prepare: Callable[[str, bool], str],
        strips: bool,
    ) -> None:
        self._vocab, self._rank, self._unk, self._fuse, self._whole = vocab, {pair: n for n, pair in enumerate(pairs)}, unk, fuse_unk, whole
        self._bytes = [vocab[f"<0x{b:02X}>"] for b in range(256)] if byte_fallback else []
        # Between two characters that no pair brings together the text may be cut, and what is cut is short and comes again.
        touching = {(left[-1], right[0]) for left, right in pairs}
        self._touching = {(a, b) for a, b in touching if a in vocab and b in vocab and not (split and b == "\u2581")}
        self._prepare, self.strips = prepare, strips
        self.pieces = {i: char_token_bytes(token) for token, i in vocab.items()}
        self._remembered = lru_cache(maxsize=1 << 16)(self._merge)

    def encode(self, text: str, first: bool, deadline: float) -> list[int]:
        text = self._prepare(text, first)
        if self._whole and text in self._vocab:
            return [self._vocab[text]]
        if self._unk is None and not self._bytes:
            text = "".join([c for c in text if c in self._vocab])
        ends = [end for end, pair in enumerate(pairwise(text), 1) if pair not in self._touching]
        ids: list[int] = []
        in_run = False
        for start, end in pairwise([0, *ends, len(text)]) if text else ():
            part = text[start:end]
            if end - start > 1 or part in self._vocab:
                ids += self._remembered(part) if len(part) < 64 else self._merge(part)
                in_run = False
            elif self._bytes:
                ids += [self._bytes[b] for b in part.encode()]
            else:
                ids += [] if self._unk is None or (in_run and self._fuse) else [self._unk]
                in_run = True
        return ids

    def _merge(self, part: str) -> list[int]:
        return [self._vocab[token] for token in merge(list(part), self._rank)[0]]


def char_token_bytes(token: str) -> bytes:
    """The bytes of a token where U+2581 is a space and <0x0A> is a byte."""
    found = _BYTE.fullmatch(token)
    return bytes([int(found[1], 16)]) if found else token.replace("\u2581", " ").encode()


_BYTE = regex.compile("<0x([0-9A-F]{2})>")


class SentencePieces:
    """A sentencepiece model. It puts a space before the text; with `every`, before every stretch between special tokens ("legacy")."""

    kind = "a sentencepiece model"

    def __init__(self, proto: bytes, every: bool) -> None:
        self.model, self._every = sentencepiece.SentencePieceProcessor(model_proto=proto), every
        # Serialized protobuf messages merge when they are joined: this appends normalizer_spec { add_dummy_prefix: false }.
        self._bare = sentencepiece.SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")
        names = {i: self.model.id_to_piece(i) for i in range(self.model.vocab_size())}
        self.pieces = {
            i: bytes([int(name[3:5], 16)]) if self.model.is_byte(i) else name.replace("\u2581", " ").encode() for i, name in names.items()
        }
        self.strips = any(not self.model.decode([i]).startswith(" ") for i, piece in self.pieces.items() if piece[:1] == b" " != piece)

    def encode(self, text: str, first: bool, deadline: float) -> list[int]:
        ids: list[int] = (self.model if first or self._every else self._bare).encode(text)
        return ids
