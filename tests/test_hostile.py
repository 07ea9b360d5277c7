"""Malformed checkpoints: thousands of them are loaded, and each must be refused in one line, or hold the very same weights.

A worker process loads one folder after the other, and this one watches it. A fault is: any exception but ZooError, a death of the
worker, over 2 seconds, memory grown by more than twice the checkpoint's bytes plus SLACK (resident, and by a limit on address space), a
message of more than one line or without the folder, or weights that changed silently. `pytest -s` prints a line a class.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import json
import os
import random
import resource
import selectors
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import FAMILIES, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")

SECONDS, SLACK = 2.0, 8 << 20  # SLACK: what the interpreter and PyTorch take for themselves, and 128 KiB of the densest JSON
ROOM = 96 << 20  # bytes of address space a load may reserve: thread stacks are 8 MiB each, resident or not
WEIGHTS, INDEX, CONFIG, GENERATION = "model.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json"
TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
Content = bytes | Callable[[Path], None] | None  # of a file: its bytes, or what makes it, or nothing: it is missing
Mutant = dict[str, Content]


# The worker


def work(bug: str) -> None:
    """Loads each folder named on a line of standard input and answers with a line of JSON. `bug` is planted from the second
    on, to test the watching."""
    import torch

    import zoo
    from zoo.errors import ZooError
    from zoo.safetensors_header import reading

    def status(key: str) -> int:
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

    def load(folder: str, bug: str) -> str:
        if bug == "crash":
            raise KeyError("planted")
        if bug == "segfault":
            ctypes.string_at(0)
        if bug == "hang":
            time.sleep(60)
        if bug == "slow":
            time.sleep(2.2)
        if bug == "allocation":
            torch.ones(SLACK)
        if bug == "reservation":
            with reading(Path(folder)):
                torch.empty(ROOM)
        if bug == "lines":
            raise ZooError(f"{folder}:\nplanted")
        if bug == "anonymous":
            raise ZooError("something is wrong")
        digest = hashlib.sha256()
        for name, p in zoo.load(folder, compile="off").model.named_parameters():
            if bug == "weights":
                p = p + 1
            digest.update(name.encode() + bytes(memoryview(p.view(torch.uint8).flatten().numpy())))
        return digest.hexdigest()

    torch.set_num_threads(1)
    limited = False
    for line in sys.stdin:
        folder = json.loads(line)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is held now
        before, start, reply = status("VmRSS"), time.perf_counter(), {"error": None, "crash": None, "digest": None}
        try:
            reply["digest"] = load(folder, bug if limited else "")
        except ZooError as e:
            reply["error"] = str(e)
        except BaseException as e:
            reply["crash"] = f"{type(e).__name__}: {e}"
        seconds = time.perf_counter() - start
        print(json.dumps(reply | {"seconds": seconds, "grown": status("VmHWM") - before}), flush=True)
        if not limited and reply["digest"]:  # the first is the unmodified one: everything is imported and warm after it
            limited = True
            gc.collect()
            gc.freeze()  # collecting among all of PyTorch's objects takes a tenth of a second
            resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + ROOM, resource.RLIM_INFINITY))


@dataclass
class Reply:
    error: str | None = None
    crash: str | None = None
    digest: str | None = None
    seconds: float = 0.0
    grown: int = 0


class Worker:
    def __init__(self, good: Path, bug: str = "") -> None:
        self.good, self.bug = good, bug
        self.start()

    def start(self) -> None:
        # One malloc arena: each reserves 64 MiB of address space, used or not.
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, self.bug]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
        )
        self.digest = self.load(self.good, patience=60).digest
        assert self.digest, "the unmodified checkpoint does not load"

    def load(self, folder: Path, patience: float = 10) -> Reply:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(str(folder)) + "\n")
        self.process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            answered = selector.select(patience)
        line = self.process.stdout.readline() if answered else ""
        if line:
            return Reply(**json.loads(line))
        self.stop()
        reply = Reply(crash=f"the worker died with code {self.process.returncode}") if answered else Reply(seconds=patience)
        if not self.bug:
            self.start()
        return reply

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def fault(reply: Reply, folder: Path, digest: str | None) -> str | None:
    """What is wrong with how a load ended, or None."""
    if reply.crash:
        return f"crash: {reply.crash}"
    if reply.seconds > SECONDS:
        return f"hang: {reply.seconds:.1f} s"
    size = sum(f.stat().st_size for f in folder.iterdir() if f.is_file() and not f.is_symlink())
    if reply.grown > 2 * size + SLACK:
        return f"allocation: {reply.grown:,} bytes for a checkpoint of {size:,}"
    if reply.error is not None:
        if "no memory" in reply.error or "allocate" in reply.error or "MemoryError" in reply.error:
            return f"reservation: {reply.error}"
        if not reply.error.isprintable() or len(reply.error) > 5000:
            return f"message: not one plain line: {reply.error!r}"
        return None if str(folder) in reply.error else f"message: names no file: {reply.error}"
    return None if reply.digest == digest else "weights: they changed silently"


# The classes of malformed input: each a generator of mutants of the good checkpoint, and how many there are


@dataclass
class Good:
    folder: Path
    files: dict[str, bytes]

    @property
    def config(self) -> dict[str, Any]:
        return dict(json.loads(self.files[CONFIG]))

    @property
    def header(self) -> dict[str, Any]:
        return dict(json.loads(self.files[WEIGHTS][8 : 8 + self.length]))

    @property
    def length(self) -> int:
        return int.from_bytes(self.files[WEIGHTS][:8], "little")

    @property
    def data(self) -> bytes:
        return self.files[WEIGHTS][8 + self.length :]

    def weights(self, header: Any, data: bytes | None = None) -> Mutant:
        """`header`: an object, or a text as it is."""
        text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
        return {WEIGHTS: struct.pack("<Q", len(text)) + text + (self.data if data is None else data)}

    def index(self, table: Any, name: str = "weight_map") -> Mutant:
        return {INDEX: json.dumps({"metadata": {"total_size": len(self.data)}, name: table}).encode()}


ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64, 10**30, -(2**63), 0.0, 0.5, -1.5, 1e-300, 1e30, 1e300,
    float("nan"), float("inf"), float("-inf"), "", "x", "4096", "\x00\n\x1b[31m", "\ud800",
    "é" * 99, [], [1], [[]], {}, {"a": 1}, [None], [2**62] * 3,
]  # fmt: skip
NAMES = [
    "",
    "\n",
    "\x00",
    "\x1b[2J",
    "\u202e",
    "\ud800",
    "..",
    "/",
    "a" * 10_000,
    "é" * 500,
    "\U0001f40b",
    "model.layers.0",
    "__metadata__ ",
]
NAMES += [
    "layers.99999999999999999999.x",
    "model.layers.-1.x",
    "model.layers.\u0663.mlp.up_proj.weight",
    "lm_head.weight ",
    "model..norm.weight",
]


def truncated(g: Good, r: random.Random) -> Iterator[Mutant]:
    whole = g.files[WEIGHTS]
    for size in [*range(64), *(r.randrange(len(whole)) for _ in range(236))]:
        yield {WEIGHTS: whole[:size]}
    for file in (CONFIG, GENERATION):
        for size in range(0, len(g.files[file]), 3):
            yield {file: g.files[file][:size]}


def extended(g: Good, r: random.Random) -> Iterator[Mutant]:
    for n in (1, 7, 8, 100, 4096):
        for filling in (b"\0", b"\xff", b"{"):
            yield {WEIGHTS: g.files[WEIGHTS] + filling * n}
            yield g.weights(json.dumps(g.header).encode() + filling * n)
            yield g.weights(filling * n + json.dumps(g.header).encode())


def header_lengths(g: Good, r: random.Random) -> Iterator[Mutant]:
    lengths = [0, 1, 2, g.length - 1, g.length + 1, g.length + 8, len(g.files[WEIGHTS]), len(g.files[WEIGHTS]) - 8]
    lengths += [2**n + d for n in range(8, 64) for d in (-1, 0)] + [2**64 - 1, 2**64 - 8]
    for length in lengths:
        yield {WEIGHTS: struct.pack("<Q", length) + g.files[WEIGHTS][8:]}


def flipped_bits(g: Good, r: random.Random) -> Iterator[Mutant]:
    for _ in range(700):
        bad = bytearray(g.files[WEIGHTS])
        for _ in range(r.choice([1, 1, 1, 2, 5])):
            bad[r.randrange(8 + g.length)] ^= 1 << r.randrange(8)
        yield {WEIGHTS: bytes(bad)}
    for file in (CONFIG, GENERATION):
        for _ in range(150):
            bad = bytearray(g.files[file])
            bad[r.randrange(len(bad))] ^= 1 << r.randrange(8)
            yield {file: bytes(bad)}


def odd_entries(g: Good, r: random.Random) -> Iterator[Mutant]:
    names = list(g.header)
    for part in ("dtype", "shape", "data_offsets", None):
        for value in ODD:
            header = g.header
            name = r.choice(names[1:])
            header[name] = {**header[name], part: value} if part else value
            yield g.weights(header)
    for value in ODD:
        yield g.weights(g.header | {"__metadata__": value})
        yield g.weights(g.header | {"__metadata__": {"format": value}})
        yield g.weights(value)


def offsets(g: Good, r: random.Random) -> Iterator[Mutant]:
    names = [n for n in g.header if n != "__metadata__"]
    for _ in range(150):
        header, (a, b) = g.header, r.sample(names, 2)
        begin, end = header[a]["data_offsets"]
        odd = r.choice([0, 1, -1, 4, -4, 64, 10**6, 2**62, 2**63 - 1, 2**64 - 1])
        which = r.randrange(5)
        if which == 0:
            header[a]["data_offsets"] = header[b]["data_offsets"]  # shared, and a gap
        elif which == 1:
            header[a]["data_offsets"], header[b]["data_offsets"] = [end, begin], [begin, end]
        elif which == 2:
            header[a]["data_offsets"] = [begin + odd, end + odd] if odd else [end, begin]
        elif which == 3:
            header[a]["data_offsets"] = [begin, end + odd] if odd else [begin]
        else:
            del header[a]  # its bytes belong to nobody
        yield g.weights(header)


def shapes(g: Good, r: random.Random) -> Iterator[Mutant]:
    names = [n for n in g.header if n != "__metadata__"]
    absurd = [
        [2**63, 2**63],
        [2**32, 2**32],
        [2**62, 4],
        [0, 10**9],
        [10**9, 0],
        [-1, -4],
        [-16],
        [1.0, 16],
        [True],
        ["16"],
        [None],
        [1] * 17,
        [2] * 1000,
    ]
    absurd += [[2**64 - 1] * 5000, [], [[16]], {"0": 16}, 16, [10**9], [0], [0] * 16, [1, 1, 1, 16], [10**18, 10**18, 0]]
    for shape in absurd:
        for name in r.sample(names, 4):
            header = g.header
            header[name]["shape"] = shape
            yield g.weights(header)
            header[name]["data_offsets"] = [0, 0]
            yield g.weights(header)
    for shape in absurd:  # an extra tensor that has no bytes
        yield g.weights(g.header | {"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}})


def dtypes(g: Good, r: random.Random) -> Iterator[Mutant]:
    names = [n for n in g.header if n != "__metadata__"]
    kinds = [
        "F64",
        "I8",
        "U8",
        "I16",
        "U16",
        "I32",
        "U32",
        "I64",
        "U64",
        "BOOL",
        "F8_E4M3",
        "F8_E5M2",
        "F8_E8M0",
        "F4",
        "F6_E2M3",
        "C64",
        "F16",
        "BF16",
        "f32",
        "F",
        "",
    ]
    for kind in [*kinds, "F32 ", "BF16\n", "F16\x00", "Q4_K", "x" * 5000]:
        one, every = g.header, g.header
        one[r.choice(names)]["dtype"] = kind
        yield g.weights(one)
        for name in names:
            every[name]["dtype"] = kind
        yield g.weights(every)
        half = {
            n: {**t, "dtype": kind, "data_offsets": [o // 4 for o in t["data_offsets"]]} for n, t in g.header.items() if n != "__metadata__"
        }
        yield g.weights(half, g.data[: len(g.data) // 4])


def names(g: Good, r: random.Random) -> Iterator[Mutant]:
    for name in NAMES:
        yield g.weights(g.header | {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})
        header = g.header
        header[name] = header.pop(r.choice([n for n in header if n != "__metadata__"]))
        yield g.weights(header)
        yield g.index({name: WEIGHTS})
        yield g.index(dict.fromkeys([*g.header, name], WEIGHTS))


def twice(g: Good, r: random.Random) -> Iterator[Mutant]:
    """A key that stands twice: readers differ in which one counts."""
    text, header = g.files[WEIGHTS][8 : 8 + g.length].decode().rstrip(), g.header
    for name in header:
        for other in (header[name], {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, None):
            yield g.weights(f"{text[:-1]},{json.dumps(name)}:{json.dumps(other)}}}".encode())
            yield g.weights(f"{{{json.dumps(name)}:{json.dumps(other)},{text[1:]}".encode())
        escaped = "".join(f"\\u{ord(c):04x}" for c in name)
        yield g.weights(f'{text[:-1]},"{escaped}":{json.dumps(header[name])}}}'.encode())
    inner = '"shape":'
    for at in [i for i in range(len(text)) if text.startswith(inner, i)]:
        yield g.weights((text[:at] + '"shape":[1],' + text[at:]).encode())
    config = g.files[CONFIG].decode()
    for key, value in g.config.items():
        for other in (value, 10**9):
            yield {CONFIG: f"{config[:-1]}, {json.dumps(key)}: {json.dumps(other)}}}".encode()}
    table = json.dumps(dict.fromkeys((n for n in header if n != "__metadata__"), WEIGHTS))
    for name in header:
        yield {INDEX: f'{{"weight_map": {table[:-1]}, {json.dumps(name)}: "{WEIGHTS}", {json.dumps(name)}: "x.safetensors"}}}}'.encode()}
    yield {INDEX: f'{{"weight_map": {table}, "weight_map": {table}}}'.encode()}
    yield {GENERATION: b'{"eos_token_id": 2, "eos_token_id": 3}'}


def indexes(g: Good, r: random.Random) -> Iterator[Mutant]:
    names = [n for n in g.header if n != "__metadata__"]
    shards: list[Any] = [
        "../x.safetensors",
        "/etc/passwd",
        "/x.safetensors",
        "..",
        ".",
        "",
        INDEX,
        "./model.safetensors",
        "sub/model.safetensors",
        "x" * 300,
    ]
    shards += [
        "a\x00.safetensors",
        "\n.safetensors",
        "..safetensors",
        "~.safetensors",
        "C:\\x.safetensors",
        "\\\\host\\x.safetensors",
        "x.safetensors",
    ]
    shards += [
        "x" * 5000 + ".safetensors",
        "model.safetensors\n",
        "é.safetensors",
        "-.safetensors",
        "model.safetensors.safetensors",
        "\ud800.safetensors",
    ]
    for shard in [*shards, *ODD]:
        yield g.index(dict.fromkeys(names, shard))
        yield g.index(dict.fromkeys(names, WEIGHTS) | {r.choice(names): shard})
        yield g.index(dict.fromkeys(names, WEIGHTS) | {"extra": shard})
    for value in ODD:
        yield {INDEX: json.dumps(value).encode()}
        yield {INDEX: json.dumps({"weight_map": value}).encode()}
        yield g.index(dict.fromkeys(names, WEIGHTS)) | {WEIGHTS: None}
    for n in range(len(names)):
        yield g.index(dict.fromkeys(names[:n], WEIGHTS))
        yield g.index({name: f"{i}.safetensors" for i, name in enumerate(names)}) | {f"{i}.safetensors": g.files[WEIGHTS] for i in range(n)}
    text = json.dumps({"weight_map": dict.fromkeys(names, WEIGHTS)}).encode()
    for size in range(0, len(text), 11):
        yield {INDEX: text[:size]}


SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"]


def config_sizes(g: Good, r: random.Random) -> Iterator[Mutant]:
    absurd = [
        0,
        -1,
        1,
        3,
        5,
        7,
        17,
        63,
        1000,
        65536,
        10**6,
        10**8,
        10**9,
        2**31,
        2**40,
        10**11,
        10**12,
        2**62,
        2**63,
        2**64,
        10**30,
        10**400,
        0.5,
        1e9,
        1e30,
    ]
    for family, (right, _) in FAMILIES.items():
        base = g.config if family == "llama" else {**right, **TINY, "vocab_size": g.config["vocab_size"]}
        for key in [*SIZES, "max_position_embeddings", "sliding_window"]:
            for value in absurd:
                yield {CONFIG: json.dumps(base | {key: value}).encode()}
        for _ in range(40):  # several at a time, so that sizes agree with each other
            yield {CONFIG: json.dumps(base | {key: r.choice(absurd) for key in r.sample(SIZES, r.randrange(2, 6))}).encode()}
    for value in (10**9, 10**6):  # with tensors that have the size, and no bytes
        wide = g.header | {"model.wide": {"dtype": "F32", "shape": [value, 0], "data_offsets": [0, 0]}}
        for key in SIZES:
            yield {CONFIG: json.dumps(g.config | {key: value}).encode()} | g.weights(wide)


def config_types(g: Good, r: random.Random) -> Iterator[Mutant]:
    for family, (right, _) in FAMILIES.items():
        base = g.config if family == "llama" else {**right, **TINY, "vocab_size": g.config["vocab_size"]}
        for key in [*base, "rope_scaling", "rope_parameters", "mystery", "\n\x1b"]:
            for value in ODD if family == "llama" else r.sample(ODD, 6):
                yield {CONFIG: json.dumps(base | {key: value}).encode()}
    for key in (
        "rope_type",
        "type",
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
        "attention_factor",
    ):
        for kind in ("llama3", "yarn", "linear", "dynamic", "default"):
            for value in r.sample(ODD, 6):
                inner = {
                    "rope_type": kind,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 512,
                }
                yield {CONFIG: json.dumps(g.config | {"rope_scaling": inner | {key: value}}).encode()}


def ends(g: Good, r: random.Random) -> Iterator[Mutant]:
    for value in ODD:
        for eos in (value, [value], [2, value]):
            yield {GENERATION: json.dumps({"eos_token_id": eos}).encode()}
            yield {CONFIG: json.dumps(g.config | {"eos_token_id": eos}).encode()}
        yield {GENERATION: json.dumps(value).encode()}


def texts(g: Good, r: random.Random) -> Iterator[Mutant]:
    """What is no JSON, or hardly."""
    deep = [b"[" * n for n in (10, 1000, 100_000)] + [b'{"a":' * n for n in (10, 1000, 40_000)] + [b"[" * 900 + b"]" * 900]
    odd = [
        b"\xff",
        b"\xfe\xff{}",
        b"\xef\xbb\xbf{}",
        b"\xc0\x80",
        b"\xed\xa0\x80",
        b"{}\x00",
        b"\x00{}",
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"1e999",
        b"{]",
    ]
    odd += [
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b'{"a": -Infinity}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": 1' + b"0" * 100_000 + b"}",
        b"{'a': 1}",
        b"{} {}",
    ]
    odd += [
        b'{"a": "\\ud800"}',
        b'{"\\u0000": 1}',
        b'{"a" 1}',
        b'{"a": 01}',
        b'{"a": 1,}',
        "é".encode("utf-16"),
        "{}".encode("utf-32"),
        b" " * 300_000,
    ]
    for text in deep + odd:
        for file in (CONFIG, INDEX, GENERATION):
            yield {file: text}
        yield g.weights(text)
        yield g.weights(b'{"x":' + text + b"}")
    for _ in range(100):
        yield {r.choice([CONFIG, INDEX, GENERATION, WEIGHTS]): r.randbytes(r.choice([1, 8, 9, 100, 5000]))}


def dense(g: Good, r: random.Random) -> Iterator[Mutant]:
    """Texts that are far larger once they are parsed."""
    for size in (100_000, 130_900, 600_000, 3_000_000):
        for unit in (b"[],", b"{},", b'{"":0},', b"0.5,", b'"",', b'"\\u6f22",', b"[[[[]]]],", b"99999,"):
            text = b"[" + unit * (size // len(unit)) + b'"\xf0\x9f\x90\x8b"]'
            for file in (CONFIG, INDEX, GENERATION):
                yield {file: b'{"a":' + text + b"}"}
            yield g.weights(b'{"a":' + text + b"}")
            yield g.weights(b'{"a":{"dtype":"F32","data_offsets":[0,0],"shape":' + text + b"}}")
        many = {f"model.layers.{i}.x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(size // 80)}
        yield g.weights(g.header | many)
        yield {CONFIG: json.dumps(g.config | {"num_hidden_layers": size // 80}).encode()} | g.weights(g.header | many)
        yield g.index(dict.fromkeys(many, WEIGHTS))


def no_files(g: Good, r: random.Random) -> Iterator[Mutant]:
    """A pipe, a folder, a device, a link to nowhere or in a circle, a socket in place of a file."""

    def sock(path: Path) -> None:
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as s:
            s.bind(os.path.relpath(path))

    table = g.index(dict.fromkeys((n for n in g.header if n != "__metadata__"), WEIGHTS))
    for file in (CONFIG, INDEX, GENERATION, WEIGHTS):
        for make in (
            os.mkfifo,
            os.mkdir,
            sock,
            *(lambda p, to=to: os.symlink(to, p) for to in ("/dev/zero", "/dev/full", "/nowhere", file, "/", ".")),
        ):
            yield {file: make}
            if file == WEIGHTS:
                yield {**table, file: make}
        yield {file: None}


CLASSES: dict[str, tuple[Callable[[Good, random.Random], Iterator[Mutant]], int]] = {
    "truncated": (truncated, 439),
    "extended": (extended, 45),
    "header lengths": (header_lengths, 122),
    "flipped bits": (flipped_bits, 1000),
    "odd entries": (odd_entries, 266),
    "offsets": (offsets, 150),
    "shapes": (shapes, 207),
    "dtypes": (dtypes, 78),
    "names": (names, 72),
    "keys twice": (twice, 231),
    "indexes": (indexes, 455),
    "config sizes": (config_sizes, 809),
    "config types": (config_types, 1252),
    "end tokens": (ends, 266),
    "texts": (texts, 270),
    "dense texts": (dense, 172),
    "no files": (no_files, 49),
}
# Classes of which some members are harmless: the same weights under another metadata, end token or context length.
MAY_LOAD = {"flipped bits", "odd entries", "config sizes", "config types", "end tokens", "texts", "dense texts", "no files"}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    folder = write_checkpoint(tmp_path_factory.mktemp("hostile") / "good", **TINY)
    return Good(folder, {f.name: f.read_bytes() for f in folder.iterdir()})


@pytest.fixture(scope="module")
def worker(good: Good) -> Iterator[Worker]:
    one = Worker(good.folder)
    yield one
    one.stop()


def put(folder: Path, files: Mutant) -> None:
    for name, content in files.items():
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        path.unlink(missing_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            content(path)


@pytest.fixture
def place(good: Good, tmp_path: Path) -> Path:
    shutil.copytree(good.folder, tmp_path / "bad")
    return tmp_path / "bad"


@pytest.mark.parametrize("kind", CLASSES)
def test_malformed(kind: str, good: Good, worker: Worker, place: Path) -> None:
    generator, expected = CLASSES[kind]
    count, loaded, slowest, largest, faults = 0, 0, 0.0, 0, []
    for mutant in generator(good, random.Random(kind)):
        put(place, mutant)
        reply = worker.load(place)
        if wrong := fault(reply, place, worker.digest):
            faults.append(f"{kind} {count}: {wrong}")
        put(place, {name: good.files.get(name) for name in mutant})
        count, loaded = count + 1, loaded + (reply.digest is not None)
        slowest, largest = max(slowest, reply.seconds), max(largest, reply.grown)
    print(f"\n{kind}: {count} inputs, {loaded} harmless, slowest {slowest * 1000:.0f} ms, largest growth {largest / 2**20:.1f} MiB", end="")
    assert not faults, "\n".join(faults[:20]) + f"\n{len(faults)} in all"
    assert count == expected
    assert kind in MAY_LOAD or not loaded


def test_there_are_enough() -> None:
    assert len(CLASSES) >= 12
    assert sum(count for _, count in CLASSES.values()) >= 3500


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(["F32", "BF16", WEIGHTS, "lm_head.weight"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=9) | st.sampled_from(["dtype", "shape", "data_offsets", "weight_map", "__metadata__", *SIZES]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@settings(derandomize=True, database=None, deadline=None, max_examples=400, suppress_health_check=list(HealthCheck))
@given(
    value=JSON,
    key=st.sampled_from([None, "model.norm.weight", "lm_head.weight", *SIZES]),
    file=st.sampled_from([CONFIG, INDEX, GENERATION, WEIGHTS]),
)
def test_any_json(value: Any, key: str | None, file: str, good: Good, worker: Worker, place: Path) -> None:
    """Whatever a JSON text may hold, alone or as the value of one key."""
    if file == WEIGHTS:
        mutant = good.weights(good.header | {key: value} if key else value)
    else:
        mutant = {file: json.dumps((good.config if file == CONFIG else {}) | {key: value} if key else value).encode()}
    put(place, mutant)
    assert not fault(worker.load(place), place, worker.digest)
    put(place, {name: good.files.get(name) for name in mutant})


@pytest.mark.parametrize("family", FAMILIES)
def test_unmodified_checkpoints_load(tmp_path: Path, worker: Worker, family: str) -> None:
    reply = worker.load(write_checkpoint(tmp_path / family, family, **TINY))
    assert reply.digest
    assert fault(reply, tmp_path / family, reply.digest) is None


@pytest.mark.parametrize(
    ("bug", "seen"),
    [
        ("crash", "crash: KeyError"),
        ("segfault", "crash: the worker died with code -11"),
        ("hang", "hang: 3.0 s"),
        ("slow", "hang: 2."),
        ("allocation", "allocation: 3"),
        ("reservation", "reservation: "),
        ("lines", "message: not one"),
        ("anonymous", "message: names no"),
        ("weights", "weights: they changed"),
    ],
)
def test_the_watch_catches_a_planted_bug(good: Good, worker: Worker, bug: str, seen: str) -> None:
    buggy = Worker(good.folder, bug)
    reply = buggy.load(good.folder, patience=3)
    buggy.stop()
    assert (fault(reply, good.folder, worker.digest) or "no fault").startswith(seen)


if __name__ == "__main__":
    work(sys.argv[1])
