"""The formats in which a checkpoint's tokenizer is written: `read(folder)` finds the file and makes a `Parts` of it.

The first of these that is in the folder is read, and it alone; tokenizer_config.json and special_tokens_map.json are read beside it:

1. tokenizer.json, of Hugging Face's `tokenizers`: byte-level BPE (Llama 3, SmolLM2, GPT-NeoX), or BPE of characters, which is how a
   sentencepiece model is written there (Llama 2, TinyLlama, Mistral);
2. tekken.json, Mistral's (Nemo and newer): tiktoken's list of tokens in JSON. Where both are there they give the same ids;
3. tokenizer.model: a sentencepiece model (Llama 2, Mistral), or tiktoken's list of tokens (Llama 3 as Meta ships it).

The chat template is chat_template.jinja, or else chat_template.json's, or else tokenizer_config.json's. The folder
additional_chat_templates is not read.

What is not understood is an error that names it. The files are anybody's: their size, the ids and the patterns in them have limits.
"""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from zoo.bpe import GPT2_SPLIT, LETTERS, BytePairs, CharPairs, Pair, SentencePieces, by_priority, char_token_bytes, token_bytes
from zoo.errors import ZooError
from zoo.safetensors_header import one_line, parse
from zoo.templates import MAX_TEMPLATE

LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPECIAL = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id"]
LLAMA3_SPECIAL += ["step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag", "image"]
LLAMA3_SPECIAL += [f"reserved_special_token_{i}" for i in range(2, 246)]
# Those of a tekken.json that lists none.
TEKKEN_SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"]
TEKKEN_SPECIAL += ["[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]"]
TEKKEN_SPECIAL += ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"]

MB = 1 << 20
MAX_VOCABULARY, MAX_CONFIG = 64 * MB, 16 * MB  # bytes of a file; the largest known are 33 MB and below 1 MB
MAX_VALUES = 4_000_000  # in a JSON file: three bytes of it may take a hundred in memory
MAX_CONTAINERS = 20_000  # lists and objects in a file of settings
MAX_ID = 1 << 24
MAX_ADDED = 256  # characters of an added token
TIKTOKEN_LINE = regex.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")

Settings = dict[str, Any]  # what tokenizer_config.json and special_tokens_map.json say
Normalize = Callable[[str], str]


@dataclass(frozen=True)
class Added:
    """A token that is found in the text before merging; `normalized` ones are looked for, as `find`, after normalization.
    piece: what it decodes to."""

    id: int
    text: str
    special: bool
    normalized: bool
    find: str
    piece: bytes


def plain(i: int, text: str, special: bool = True) -> Added:
    return Added(i, text, special, False, text, text.encode())


@dataclass(frozen=True)
class Parts:
    """What a tokenizer is made of. prefix: the ids that open a text unless the settings say otherwise; None = BOS."""

    file: Path
    backend: BytePairs | CharPairs | SentencePieces
    added: list[Added]
    prefix: list[int] | None
    normalize: Normalize | None
    settings: Settings


def read(folder: Path) -> Parts:
    """ZooError names the file that is missing, broken or of an unsupported kind."""
    path = folder
    try:
        settings: Settings = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json", "chat_template.json"):
            if (path := folder / name).exists():
                found = {key: value for key, value in _read_json(path, MAX_CONFIG).items() if value is not None}
                settings |= {key: found[key] for key in ("chat_template",) if key in found} if name == "chat_template.json" else found
        if (path := folder / "chat_template.jinja").exists():
            settings["chat_template"] = _read(path, MAX_TEMPLATE, "no chat template is that long").decode()
        for name, reader in (("tokenizer.json", _from_json), ("tekken.json", _from_tekken), ("tokenizer.model", _from_model)):
            if (path := folder / name).exists():
                return reader(path, settings)
    except ZooError as error:
        raise ZooError(f"{path}: {error}") from None
    except Exception as error:  # the file is anybody's: anything may come out of it
        raise ZooError(f"{path}: cannot be read ({one_line(f'{type(error).__name__}: {error}')[:300]}); download it again") from error
    raise ZooError(f"{folder}: no tokenizer; put the checkpoint's tokenizer.json, tekken.json or tokenizer.model there")


# --- tokenizer.json -----------------------------------------------------------------------------------------------------------------------


def _from_json(path: Path, settings: Settings) -> Parts:
    data = _read_json(path, MAX_VOCABULARY)
    model = data["model"]
    _require(model["type"] == "BPE", "model type", model["type"])
    for option, value in model.items():
        if option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            _require(not value, option, value)
    vocab: dict[str, int] = model["vocab"]
    for i in vocab.values():
        _check_id(i)
    pairs: list[Pair] = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    odd = [pair for pair in pairs if len(pair) != 2 or not (pair[0] in vocab and pair[1] in vocab and pair[0] + pair[1] in vocab)]
    _require(not odd, "merge of tokens that are not in the vocabulary:", odd[:1])
    _require(all(left and right for left, right in pairs), "merge of", "an empty token")

    stages = _flat(data["pre_tokenizer"], "pretokenizers") + _flat(data["decoder"], "decoders")
    byte_level = any(part["type"] == "ByteLevel" for part in stages)
    to_bytes = token_bytes if byte_level else char_token_bytes
    normalize = _normalizer(data["normalizer"], byte_level)
    backend = _byte_pairs(data, vocab, pairs) if byte_level else _char_pairs(data, vocab, pairs)
    added, pieces = [], backend.pieces
    for token in data["added_tokens"]:
        i, text = _check_id(token["id"]), token["content"]
        for option in ("single_word", "lstrip", "rstrip"):
            _require(not token[option], f"option of added token {text!r}:", option)
        _require(
            vocab.get(text, i) == i and pieces.get(i, text.encode()) in (text.encode(), to_bytes(text)), "id of added token", (text, i)
        )
        # What is looked for after normalization is normalized too, and so is decoded.
        find = normalize(text) if normalize and token["normalized"] else text
        added.append(Added(i, text, token["special"], token["normalized"], find, to_bytes(find)))
    _require(len(pieces) == len(vocab) and len({token.id for token in added}) == len(added), "vocabulary", "one id for two tokens")
    return Parts(path, backend, added, _prefix(data["post_processor"]), normalize, settings)


def _normalizer(part: dict[str, Any] | None, byte_level: bool) -> Normalize | None:
    """NFC for bytes; for characters a first space, and U+2581 for each space."""
    steps = [(step["type"], step.get("prepend"), step.get("pattern"), step.get("content")) for step in _flat(part, "normalizers")]
    kinds = [kind for kind, *_ in steps]
    _require(set(kinds) <= ({"NFC"} if byte_level else {"Prepend", "Replace"}), "normalizer", kinds)
    if byte_level:
        return (lambda text: unicodedata.normalize("NFC", text)) if kinds else None
    prepend, replace = ("Prepend", "\u2581", None, None), ("Replace", None, {"String": " "}, "\u2581")
    _require(steps in ([], [replace], [prepend, replace]), "normalizer", part)
    first = "\u2581" if prepend in steps else ""
    return (lambda text: (first + text if text else "").replace(" ", "\u2581")) if steps else None


def _byte_pairs(data: dict[str, Any], vocab: dict[str, int], pairs: list[Pair]) -> BytePairs:
    model = data["model"]
    splits, prefix_space = _splits(data["pre_tokenizer"])
    decoders = [part["type"] for part in _flat(data["decoder"], "decoders")]
    _require(decoders == ["ByteLevel"], "decoder", decoders)
    _require(not model.get("byte_fallback"), "byte_fallback", True)
    letters = [letter for letter in LETTERS if letter in vocab]
    _require(len(letters) == 256 or model.get("unk_token") is None, "unk_token where bytes lack tokens:", model.get("unk_token"))
    tokens = {token_bytes(token): vocab[token] for token in letters + by_priority(pairs, vocab)}
    pieces = {i: token_bytes(token) for token, i in vocab.items()}
    return BytePairs(splits, prefix_space, tokens, pieces, whole=bool(model.get("ignore_merges")))


def _splits(pre_tokenizer: dict[str, Any] | None) -> tuple[list[str], bool]:
    """Patterns that cut the text one after the other; and whether a space goes before what reaches the last one."""
    parts = _flat(pre_tokenizer, "pretokenizers")
    kinds = [part["type"] for part in parts]
    _require(kinds[-1:] == ["ByteLevel"] and set(kinds[:-1]) <= {"Digits", "Split"} and len(kinds) <= 16, "pre_tokenizer", kinds)
    patterns: list[str] = []
    for part in parts[:-1]:
        if part["type"] == "Digits":
            patterns.append(r"\p{N}" if part["individual_digits"] else r"\p{N}+")
        else:
            [(kind, pattern)] = part["pattern"].items()
            _require(part["behavior"] == "Isolated" and not part["invert"], "behavior of Split", (part["behavior"], part["invert"]))
            patterns.append(regex.escape(pattern) if kind == "String" else pattern)
    # Without its own pattern ByteLevel takes what reaches it as it is.
    return [*patterns, GPT2_SPLIT if parts[-1].get("use_regex", True) else r"[\s\S]+"], parts[-1]["add_prefix_space"]


def _char_pairs(data: dict[str, Any], vocab: dict[str, int], pairs: list[Pair]) -> CharPairs:
    model, parts = data["model"], _flat(data["pre_tokenizer"], "pretokenizers")
    prepare: Callable[[str, bool], str] = lambda text, first: text  # noqa: E731
    split = False
    if parts:
        _require([part["type"] for part in parts] == ["Metaspace"], "pre_tokenizer", [part["type"] for part in parts])
        scheme = parts[0].get("prepend_scheme", "always" if parts[0].get("add_prefix_space", True) else "never")
        _require(parts[0]["replacement"] == "\u2581" and scheme in ("first", "always", "never"), "pre_tokenizer", parts[0])
        split = parts[0].get("split", True)

        def prepare(text: str, first: bool) -> str:
            text = text.replace(" ", "\u2581")
            wanted = scheme == "always" or (scheme == "first" and first)
            return "\u2581" + text if wanted and not text.startswith("\u2581") else text

    decoders = [
        {key: value for key, value in part.items() if key != "type"} | {"type": part["type"]} for part in _flat(data["decoder"], "decoders")
    ]
    known: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    _require(decoders in (known, [*known, strip]), "decoder", data["decoder"])

    fallback = bool(model.get("byte_fallback"))
    named = [f"<0x{b:02X}>" in vocab for b in range(256)]
    _require(not fallback or all(named) or not any(named), "byte_fallback", "with tokens for some bytes and not for others")
    in_pairs = {token for pair in pairs for token in pair}
    _require(not any(f"<0x{b:02X}>" in in_pairs for b in range(256)), "merge of", "byte tokens")
    unk, whole = model.get("unk_token"), bool(model.get("ignore_merges"))
    _require(unk is None or unk in vocab, "unk_token, which is not in the vocabulary:", unk)
    _require(not split or ("\u2581" in vocab and not whole), "pre_tokenizer", "Metaspace that splits")
    return CharPairs(
        vocab,
        pairs,
        None if unk is None else vocab[unk],
        byte_fallback=fallback and all(named),
        fuse_unk=bool(model.get("fuse_unk")),
        whole=whole,
        split=split,
        prepare=prepare,
        strips=strip in decoders,
    )


def _prefix(post_processor: dict[str, Any] | None) -> list[int]:
    """The ids that open a text by default."""
    prefix: list[int] = []
    for part in _flat(post_processor, "processors"):
        _require(part["type"] in ("ByteLevel", "TemplateProcessing"), "post_processor", part["type"])
        if part["type"] == "TemplateProcessing":
            *before, last = part["single"]
            _require("Sequence" in last, "post_processor that appends", last)
            prefix += [_check_id(i) for token in before for i in part["special_tokens"][token["SpecialToken"]["id"]]["ids"]]
    return prefix


# --- tekken.json and tokenizer.model ------------------------------------------------------------------------------------------------------


def _from_tekken(path: Path, settings: Settings) -> Parts:
    """The special tokens have the first ids. The vocabulary has more tokens than are used: those beyond default_vocab_size are not."""
    data = _read_json(path, MAX_VOCABULARY)
    config, named = data["config"], data.get("special_tokens")
    base, size = _check_id(config["default_num_special_tokens"]), _check_id(config["default_vocab_size"])
    vocab = data["vocab"][: max(size - base, 0)]
    _require(len(vocab) == size - base >= 256, "default_vocab_size", (size, base, len(data["vocab"])))
    tokens = [base64.b64decode(token["token_bytes"], validate=True) for token in vocab]
    _require(all(token["rank"] == rank for rank, token in enumerate(vocab)), "vocab", "ranks that do not count up")
    _require(tokens[:256] == [bytes([b]) for b in range(256)], "vocab", "that does not begin with the 256 bytes")
    _require(len(set(tokens)) == len(tokens) and b"" not in tokens, "vocab", "with an empty token or the same twice")
    if named is None:  # files up to version 7 mean these
        _require(config["version"] in ("v1", "v2", "v3", "v7"), "version without special_tokens", config["version"])
        named = [{"rank": rank, "token_str": name} for rank, name in enumerate(TEKKEN_SPECIAL)]
    names = [token["token_str"] for token in named]
    _require([token["rank"] for token in named] == list(range(len(names))) and len(names) <= base, "special_tokens", "ranks")
    # Each filler comes of some memory: their number must not be any.
    _require(base <= 100_000, "default_num_special_tokens", base)
    names += [f"<SPECIAL_{i}>" for i in range(len(names), base)]
    _require(len(set(names)) == base and all(names), "special_tokens", "the same twice, or empty")
    backend = BytePairs(
        [config["pattern"]], False, {token: base + i for i, token in enumerate(tokens)}, {base + i: t for i, t in enumerate(tokens)}, False
    )
    return _with_names(path, backend, dict(enumerate(names)), {"bos_token": "<s>", "eos_token": "</s>"} | settings)


def _from_model(path: Path, settings: Settings) -> Parts:
    data = _read(path, MAX_VOCABULARY)
    return _from_tiktoken(path, data, settings) if TIKTOKEN_LINE.match(data) else _from_sentencepiece(path, data, settings)


def _from_tiktoken(path: Path, data: bytes, settings: Settings) -> Parts:
    """Lines of a token in base64 and its rank. The file says neither pattern nor special tokens; they are Llama 3's."""
    pairs = sorted((int(rank), base64.b64decode(token, validate=True)) for token, rank in map(bytes.split, data.splitlines()))
    pieces = dict(pairs)
    _require(len(pairs) <= 128_000, "tiktoken file, larger than Llama 3's:", f"{len(pairs)} tokens")
    _require(list(pieces) == list(range(len(pairs))) and len(set(pieces.values())) == len(pairs), "tiktoken file", "gaps or repetitions")
    backend = BytePairs([LLAMA3_SPLIT], False, {token: rank for rank, token in pairs}, pieces, whole=False)
    names = {len(pairs) + n: f"<|{name}|>" for n, name in enumerate(LLAMA3_SPECIAL)}
    return _with_names(path, backend, names, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"} | settings)


def _with_names(path: Path, backend: BytePairs, names: dict[int, str], settings: Settings) -> Parts:
    names |= {_check_id(int(i)): token["content"] for i, token in settings.get("added_tokens_decoder", {}).items()}
    return Parts(path, backend, [plain(i, name) for i, name in names.items()], None, None, settings)


def _from_sentencepiece(path: Path, data: bytes, settings: Settings) -> Parts:
    backend = SentencePieces(data, every=settings.get("legacy", True))
    model = backend.model
    names = {i: model.id_to_piece(i) for i in backend.pieces if model.is_control(i) or model.is_unknown(i)}
    added = {i: plain(i, name) for i, name in names.items()}
    roles = {key: names[i] for key, i in (("bos_token", model.bos_id()), ("eos_token", model.eos_id())) if i in names}
    for i, token in settings.get("added_tokens_decoder", {}).items():
        added[_check_id(int(i))] = plain(int(i), token["content"], token["special"])
    return Parts(path, backend, list(added.values()), None, None, roles | settings)


def _read(path: Path, limit: int, why: str = "no known tokenizer is that large") -> bytes:
    """Asks for the size before it reads."""
    size = path.stat().st_size
    if not path.is_file() or size > limit:
        raise ZooError(f"{size:,} bytes, and at most {limit:,} of a file are read: {why}" if path.is_file() else "is no file; remove it")
    return path.read_bytes()


def _read_json(path: Path, limit: int) -> dict[str, Any]:
    text = _read(path, limit).decode()
    containers = text.count("[") + text.count("{")
    # An empty list takes twenty times its text in memory; a merge, the shortest list that occurs in numbers, has ten characters.
    most = MAX_CONTAINERS if limit == MAX_CONFIG else MAX_CONTAINERS + len(text) // 8
    if text.count(",") + containers > MAX_VALUES or containers > most:
        raise ZooError(f"more than {MAX_VALUES:,} values or {most:,} lists and objects: no known tokenizer has as many")
    data = parse(text.encode())
    if not isinstance(data, dict):
        raise TypeError("not a JSON object")
    return data


def _flat(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A part of tokenizer.json as a list: null is none, a Sequence is its members."""
    if part is None:
        return []
    return [inner for member in part[key] for inner in _flat(member, key)] if part["type"] == "Sequence" else [part]


def _check_id(i: Any) -> int:
    if type(i) is not int or not 0 <= i < MAX_ID:
        raise ZooError(f"unsupported id {short(i)}; it must be a natural number below {MAX_ID:,}")
    return i


def _require(true: bool, what: str, value: object) -> None:
    if not true:
        kinds = "byte-level BPE like that of Llama 3, SmolLM2 and GPT-NeoX, BPE of characters like that of Llama 2 and Mistral"
        raise ZooError(f"unsupported {what} {short(value)}; {kinds}, tekken.json and tokenizer.model are read")


def short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def told(error: BaseException) -> str:
    return one_line(f"{type(error).__name__}: {error}")[:300]
