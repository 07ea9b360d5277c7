"""What is read of a checkpoint before its weights: JSON texts and safetensors headers, trusted in nothing.

A safetensors file is the header's length in 8 bytes, the header, and the tensors' bytes one after the other:

    {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ..., "__metadata__": {"text": "text"}}

Readers disagree about what this leaves open, so it is an error here: a key that stands twice, bytes that two tensors share or none owns,
numbers beyond 64 bits, NaN. Parsed JSON takes up to thirty times its text in memory; therefore a text may only be as long as its weights
justify. Whatever is wrong becomes one ZooError of one line with the file's name.
"""

from __future__ import annotations

import io
import json
import math
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.errors import ZooError

BITS = dict.fromkeys(["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"], 8)
BITS |= dict.fromkeys(["I16", "U16", "F16", "BF16"], 16) | dict.fromkeys(["I32", "U32", "F32"], 32)
BITS |= dict.fromkeys(["I64", "U64", "F64", "C64"], 64) | {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
JSON_LIMIT = 16 << 20  # bytes; the largest index on the hub is under 10 MB
JSON_FREE, JSON_SHARE = 128 << 10, 64  # a text may hold 128 KiB, and a byte more for every 64 of weights


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: its bytes are [begin, end), counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Stored]:
    """Name -> where the tensor lies, in the order of the bytes. Raises ZooError unless the file is exactly a header and the
    tensors that it names."""
    with reading(path), open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise ValueError(f"{size} bytes are no safetensors file; download it again")
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size - 8:
            raise ValueError(f"its header of {length} bytes does not fit into a file of {size}; download it again")
        if length > _limit(size):
            raise ValueError(f"its header of {length} bytes is too long for a file of {size}")
        raw = parse(file.read(length))
        if not isinstance(raw, dict):
            raise ValueError("its header is no JSON object")
        about = raw.pop("__metadata__", {})
        if not isinstance(about, dict) or not all(isinstance(text, str) for text in about.values()):
            raise ValueError("__metadata__ in its header is no object of texts")
        tensors = {name: _stored(name, entry, 8 + length) for name, entry in raw.items()}
        tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
        end = 8 + length
        for name, t in tensors.items():
            if t.begin != end:
                raise ValueError(f"tensor {name[:200]!r} begins at byte {t.begin}, expected {end}: overlap or gap")
            end = t.end
        if end != size:
            raise ValueError(f"holds {size} bytes, its header describes {end}; download it again")
        return tensors


def _stored(name: str, entry: Any, start: int) -> Stored:
    what = f"tensor {name[:200]!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{what} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise ValueError(f"{what} has a dtype that is no text")
    if not _naturals(shape) or len(shape) > 16:
        raise ValueError(f"{what} has the shape {str(shape)[:200]}; expected at most 16 natural numbers")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{what} has the data_offsets {str(offsets)[:200]}; expected a begin and an end")
    size = offsets[1] - offsets[0]
    if dtype in BITS and math.prod(shape) * BITS[dtype] != size * 8:
        raise ValueError(f"{what} of {dtype} and shape {shape} has {size} bytes; download it again")
    return Stored(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object beside the weights. Raises ZooError when it is missing, unreadable, no object, or absurdly large or deep."""
    with reading(path), open_file(path) as file:
        limit = _limit(sum(f.stat().st_size for f in os.scandir(path.parent) if f.name.endswith(".safetensors") and f.is_file()))
        if os.fstat(file.fileno()).st_size > limit:
            raise ValueError(f"larger than {limit >> 10} KiB, which these weights do not explain")
        if isinstance(raw := parse(file.read(limit)), dict):
            return raw
        raise ValueError("holds no JSON object")


def _limit(weights: int) -> int:
    return min(JSON_FREE + weights // JSON_SHARE, JSON_LIMIT)


def parse(text: bytes) -> Any:
    """JSON in UTF-8, with one meaning only. Raises ValueError."""
    return json.loads(text.decode(), object_pairs_hook=_once, parse_int=_integer, parse_float=_finite, parse_constant=_finite)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(table := dict(pairs)) == len(pairs):
        return table
    seen = set[str]()
    twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    raise ValueError(f"the key {twice[:200]!r} stands twice in one object")


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= (n := int(digits)) < 2**64:
        raise ValueError(f"the number {digits[:40]} is beyond 64 bits")
    return n


def _finite(digits: str) -> float:
    if math.isfinite(x := float(digits)):
        return x
    raise ValueError(f"{digits[:40]} is no finite number")


@contextmanager
def open_file(path: Path) -> Iterator[io.FileIO]:
    """A regular file, unbuffered. A pipe or a device is refused, which could make the reader wait for ever."""
    file = io.FileIO(path, opener=lambda p, flags: os.open(p, flags | getattr(os, "O_NONBLOCK", 0)))
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("is no regular file")
        yield file


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong with a file becomes a ZooError with its name."""
    try:
        yield
    except FileNotFoundError as e:
        raise ZooError(one_line(f"{path} is missing")) from e
    except (OSError, ValueError, RuntimeError, MemoryError) as e:  # too deep a JSON is a RuntimeError, too
        raise ZooError(one_line(f"{path}: {getattr(e, 'strerror', None) or e or type(e).__name__}")) from e


def one_line(text: object) -> str:
    """`text` without line breaks or control characters, which a damaged file may hold."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(str(text).split()))[:4000]
