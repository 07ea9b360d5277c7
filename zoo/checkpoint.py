"""How the tensors of a checkpoint are read: safetensors only, strict in both directions, no pickle ever.

A checkpoint is a folder with config.json, a tokenizer, and model.safetensors or model.safetensors.index.json with the shards it
names. Where both lie there, the index counts: only the files it names are fetched and read.

Tensors are mapped, not read, and copied one by one into one buffer that holds the whole model: memory peaks at the model's bytes.
It asks the kernel for huge pages, since decoding reads every weight once per token, and page walks cost it several per cent.
"""

from __future__ import annotations

import functools
import json
import math
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from zoo.errors import ZooError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
JSON_LIMIT = 16 << 20  # bytes; the largest index on the hub is under 10 MB
ALIGN = 64  # bytes: one cache line, and the widest vector load
Shapes = dict[str, tuple[int, ...]]  # parameter -> shape


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it is. Raises ZooError when it is missing, unreadable, no JSON object, or absurdly large or deep."""
    return _json(folder / "config.json")


def generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json, or {} without one. `eos_token_id` is an int or a list of ints. Raises ZooError as `read_config` does."""
    raw = _json(path) if os.path.lexists(path := folder / "generation_config.json") else {}
    eos = raw.get("eos_token_id")
    if eos is not None and any(type(e) is not int for e in (eos if isinstance(eos, list) else [eos])):
        raise ZooError(one_line(f"{path}: eos_token_id is {eos!r}; expected a token id or a list of them"))
    return raw


def _json(path: Path) -> dict[str, Any]:
    with _reading(path):
        if path.stat().st_size > JSON_LIMIT:
            raise ValueError(f"larger than {JSON_LIMIT >> 20} MiB")
        if isinstance(raw := json.loads(path.read_bytes()), dict):
            return raw
        raise ValueError("holds no JSON object")


def weight_files(folder: Path) -> Mapping[str, set[str] | None]:
    """Each weight file's name, with the tensors that the index places in it (None: no index). Raises ZooError for a bad index."""
    if not os.path.lexists(path := folder / INDEX):
        return {SINGLE: None}
    table = _json(path).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ZooError(f"{path}: has no weight_map")
    files: dict[str, set[str]] = {}
    for tensor, file in table.items():
        if not isinstance(file, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", file, re.ASCII):
            raise ZooError(one_line(f"{path}: names the shard {file!r}; expected the plain name of a .safetensors file in that folder"))
        files.setdefault(file, set()).add(tensor)
    return files


def load_into(model: nn.Module, folder: Path, dtype: torch.dtype | None, device: str | torch.device = "cpu") -> None:
    """Replace the parameters of `model`, laid out on `meta`, by the checkpoint's; buffers are the modules' own business.

    dtype None = the file's; where its tensors disagree, the one config.json names, else the widest among them. On the CPU all
    parameters lie in one buffer. One Parameter under two names (a tied output head) stays one: the checkpoint may hold it under
    either name, or under both with equal values. Raises ZooError, with `model` as it was, for a file that cannot be read, and for
    tensors that are missing, unexpected (unless a regular expression in `model.ignored_tensors` matches the name), of another
    shape, or neither F32, F16 nor BF16: all of them in one message.
    """
    if dtype and not dtype.is_floating_point:
        raise ZooError(f"dtype {dtype} cannot hold weights; use float32, float16 or bfloat16")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    first = {p: name for name, p in model.named_parameters()}
    names = {name: first[p] for name, p in model.named_parameters(remove_duplicate=False)}  # every name -> the first for it
    held, dtypes = _account(folder, names, shapes, getattr(model, "ignored_tensors", ()))
    dtype = dtype or _agreed(folder, dtypes)
    new, buffers = {}, _layout(shapes, dtype) if torch.device(device).type == "cpu" else {}
    for name in shapes:
        here = [n for n in names if names[n] == name and n in held]
        with _reading(folder / held[here[0]]):
            tensor, *copies = [_tensor(folder / held[n], n) for n in here]
            if not all(torch.equal(tensor, copy) for copy in copies):
                raise ValueError(f"config.json ties {' and '.join(here)}, but they differ: set tie_word_embeddings to false")
            data = buffers[name].copy_(tensor) if buffers else tensor.to(device, dtype)
        new[name] = nn.Parameter(data, requires_grad=False)
    for name, one in names.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new[one])
    if not buffers:
        model.to(device)


def _account(folder: Path, names: dict[str, str], shapes: Shapes, ignored: Iterable[str]) -> tuple[dict[str, str], set[torch.dtype]]:
    """The file of each parameter, and the dtypes seen. Raises ZooError with everything that does not fit."""
    held: dict[str, str] = {}
    dtypes, unexpected, misfit, alien = set(), [], [], []
    for file, placed in weight_files(folder).items():
        with _reading(folder / file), safe_open(folder / file, framework="pt") as opened:
            inside = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
        for name in sorted(inside.keys() | (placed or set())):
            if name not in names:
                unexpected += [name] * (not any(re.fullmatch(pattern, name) for pattern in ignored))
            elif name in inside and placed is not None and name not in placed:
                unexpected.append(f"{name} (in {file}, where the index does not place it)")
            elif name in inside:
                shape, kind, expected = tuple(inside[name].get_shape()), inside[name].get_dtype(), shapes[names[name]]
                misfit += [f"{name} is {shape}, expected {expected}"] * (shape != expected)
                alien += [f"{name} is {kind}, expected {' or '.join(DTYPES)}"] * (kind not in DTYPES)
                dtypes.add(DTYPES.get(kind, torch.float32))
                held[name] = file
    present = {names[name] for name in held}
    missing = [name for name in shapes if name not in present]
    faults = {"missing": missing, "unexpected": unexpected, "wrong shape": misfit, "wrong dtype": alien}
    if any(faults.values()):
        told = "; ".join(f"{what}: {', '.join(w[:10])}" + f" and {len(w) - 10} more" * (len(w) > 10) for what, w in faults.items() if w)
        raise ZooError(one_line(f"{folder}: the tensors do not fit this model: {told}"))
    return held, dtypes


def _agreed(folder: Path, dtypes: set[torch.dtype]) -> torch.dtype:
    if len(dtypes) < 2:
        return next(iter(dtypes), torch.float32)
    named = (raw := read_config(folder)).get("torch_dtype") or raw.get("dtype")
    return next((d for d in DTYPES.values() if str(d) == f"torch.{named}"), functools.reduce(torch.promote_types, dtypes))


def _layout(shapes: Shapes, dtype: torch.dtype) -> dict[str, Tensor]:
    """An uninitialised tensor for each parameter, in order, each on a cache line of its own, all in one buffer."""
    starts, end = {}, 0
    for name, shape in shapes.items():
        starts[name] = end
        end += -(-math.prod(shape) * dtype.itemsize // ALIGN) * ALIGN
    try:
        # Private, where Python's default is shared: shared anonymous memory is a file in tmpfs, which gets no huge pages.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        memory = mmap.mmap(-1, max(end, 1), **private)
    except (OSError, ValueError, OverflowError) as e:
        raise ZooError(f"no memory for the model's {end / 1e9:.1f} GB in {dtype}: {e}") from e
    with suppress(AttributeError, OSError):  # a system without huge pages: only speed is lost
        memory.madvise(mmap.MADV_HUGEPAGE)
    # One storage a parameter, each holding on to `memory`: torch.compile's nested regions refuse inputs that share a storage.
    return {n: torch.frombuffer(memory, dtype=dtype, count=math.prod(s), offset=starts[n]).view(s) for n, s in shapes.items()}


def _tensor(path: Path, name: str) -> Tensor:
    # The file is opened anew for each tensor: pages of a mapping that stays open pile up, and count as this process's memory.
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong with a file becomes a ZooError with its name."""
    try:
        yield
    except FileNotFoundError as e:
        denied = path.exists() and not os.access(path, os.R_OK)  # safetensors says "not found" of any file that it cannot open
        raise ZooError(one_line(f"{path}: Permission denied" if denied else f"{path} is missing")) from e
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as e:  # too deep a JSON is a RuntimeError, too
        raise ZooError(one_line(f"{path}: {getattr(e, 'strerror', None) or e or type(e).__name__}")) from e


def one_line(text: object) -> str:
    """`text` without line breaks or control characters, which a damaged file may hold."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(str(text).split()))[:4000]
