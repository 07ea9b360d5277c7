"""How the tensors of a checkpoint are read: safetensors only, strict in both directions, no pickle ever.

    python -m zoo.checkpoint inspect NAME      what it is and whether this code runs it; reads headers, no weights
    python -m zoo.checkpoint verify NAME       whether every file is whole; reads everything once or twice

A checkpoint is a folder with config.json, a tokenizer, and model.safetensors or model.safetensors.index.json with the shards it
names. Where both lie there, the index counts: only the files it names are fetched and read.

A large model's parameters *are* the files: pages of a private mapping, read when they are first touched and shared with the page cache (a
page that is changed gets a copy of its own); while the model is in use, its files must stay as they are. A small model, and one that
changes its dtype, is read straight to its place in one block, which asks the kernel for huge pages: decoding reads every weight once per
token, and page walks cost it several per cent. Either way memory peaks at about the model's bytes.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.models import FAMILIES
from zoo.safetensors_header import Stored, one_line, open_file, read_header, read_json, reading

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ALIGN = 64  # bytes: one cache line, and the widest vector load
COPIED = 1 << 30  # bytes; a larger model is mapped, not copied
THREADS = 4  # more than cores: a cold disk is quickest with several requests at a time
PIECE, CONVERTED = 16 << 20, 1 << 20  # bytes read at a time: into place; before they are converted, which should happen in a core's cache
Shapes = dict[str, tuple[int, ...]]  # parameter -> shape
__path__: list[str] = []  # zoo imports this file before `python -m` runs it again; runpy warns of that unless it looks like a package


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it is. Raises ZooError when it is missing, unreadable, no JSON object, or absurdly large or deep."""
    return read_json(folder / "config.json")


def generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json, or {} without one. `eos_token_id` is an int or a list of ints. Raises ZooError as `read_config` does."""
    raw = read_json(path) if os.path.lexists(path := folder / "generation_config.json") else {}
    _ids(raw, path)
    return raw


def end_ids(folder: Path) -> set[int]:
    """The tokens that end an answer, as either config names them."""
    return {*_ids(generation_config(folder), folder), *_ids(read_config(folder), folder / "config.json")}


def _ids(raw: dict[str, Any], path: Path) -> list[int]:
    eos = raw.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if any(type(e) is not int for e in ids):
        raise ZooError(one_line(f"{path}: eos_token_id is {eos!r}; expected a token id or a list of them"))
    return ids


def lay_out(folder: Path) -> Any:
    """The model that config.json describes, on `meta`. Its sizes must occur in the tensors: modules that no weight stands behind cost
    memory too, and a config may ask for a billion layers, or for a head size that makes gigabytes of rotary frequencies."""
    raw = read_config(folder)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ZooError(one_line(f"{folder}/config.json: model_type {kind!r} is not implemented; known: {', '.join(FAMILIES)}"))
    family = FAMILIES[kind]
    try:
        config = family.Config.from_dict(raw)
    except ZooError as e:
        raise ZooError(one_line(f"{folder}/{e}" if str(e).startswith("config.json") else f"{folder}/config.json: {e}")) from None
    object.__setattr__(config, "folder", folder)
    tensors = {name: t for file in weight_files(folder) for name, t in read_header(folder / file).items()}
    widest = max((n for t in tensors.values() if t.end > t.begin for n in t.shape), default=0)
    sizes = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    sizes |= {f"{name} x head_dim": getattr(config, name) * config.head_dim for name in ("num_attention_heads", "num_key_value_heads")}
    for name, size in sizes.items():
        if not 1 <= size <= widest:
            raise ZooError(f"{folder}: config.json says {name}={size}, which no tensor has: the largest is {widest} wide")
    with torch.device("meta"):
        layer = {name for name, _ in family(replace(config, num_hidden_layers=1)).named_parameters() if "layers.0." in name}
        there = sum(re.sub(r"layers\.\d+\.", "layers.0.", name, count=1) in layer for name in tensors)
        if config.num_hidden_layers * len(layer) > 2 * there:  # a few that are missing are listed later, with all else that does not fit
            found = there // len(layer)
            raise ZooError(f"{folder}: config.json says num_hidden_layers={config.num_hidden_layers}, the tensors hold {found} layers")
        return family(config)


def weight_files(folder: Path) -> Mapping[str, set[str] | None]:
    """Each weight file's name, with the tensors that the index places in it (None: no index). Raises ZooError for a bad index."""
    if not os.path.lexists(path := folder / INDEX):
        return {SINGLE: None}
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ZooError(f"{path}: has no weight_map")
    files: dict[str, set[str]] = {}
    for tensor, file in table.items():
        if not isinstance(file, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", file, re.ASCII):
            raise ZooError(one_line(f"{path}: names the shard {file!r}; expected the plain name of a .safetensors file in that folder"))
        files.setdefault(file, set()).add(tensor)
    return dict(sorted(files.items()))


def load_into(model: nn.Module, folder: Path, dtype: torch.dtype | None, device: str | torch.device = "cpu") -> None:
    """Replace the parameters of `model`, laid out on `meta`, by the checkpoint's; buffers are the modules' own business.

    dtype None = the file's; where its tensors disagree, the one config.json names, else the widest among them. One Parameter under
    two names (a tied output head) stays one: the checkpoint may hold it under either name, or under both with equal values.
    Raises ZooError, with `model` as it was, for a file that cannot be read, and for tensors that are missing, unexpected (unless a
    regular expression in `model.ignored_tensors` matches the name), of another shape, or neither F32, F16 nor BF16: all of them in
    one message.
    """
    if dtype and not dtype.is_floating_point:
        raise ZooError(f"dtype {dtype} cannot hold weights; use float32, float16 or bfloat16")
    shapes, names = parameter_shapes(model), parameter_names(model)
    held = account(folder, names, shapes, getattr(model, "ignored_tensors", ()))
    dtype = dtype or _agreed(folder, {DTYPES[stored.dtype] for _, stored in held.values()})
    copies = {name: [n for n in names if names[n] == name and n in held] for name in shapes}
    for one, *others in copies.values():
        for other in others:
            if not _equal(*held[one], *held[other]):
                tie = f"config.json ties {one} and {other}, but they differ: set tie_word_embeddings to false"
                raise ZooError(one_line(f"{held[other][0]}: {tie}"))
    where = {name: held[copies[name][0]] for name in shapes}
    if torch.device(device).type == "cpu":
        size = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        if size > COPIED and all(_as_it_lies(stored, dtype) for _, stored in where.values()):
            data = _mapped(where, dtype)
        else:
            data = _layout(shapes, dtype)
            _fill([(*where[name], tensor) for name, tensor in data.items()])
    else:
        data = {}
        for name, shape in shapes.items():
            path, stored = where[name]
            _fill([(path, stored, host := torch.empty(shape, dtype=DTYPES[stored.dtype]))])
            data[name] = host.to(device, dtype)
    new = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in data.items()}
    for name, one in names.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new[one])
    if torch.device(device).type != "cpu":
        model.to(device)


def parameter_shapes(model: nn.Module) -> Shapes:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def parameter_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter -> the first for it."""
    first = {p: name for name, p in model.named_parameters()}
    return {name: first[p] for name, p in model.named_parameters(remove_duplicate=False)}


def account(folder: Path, names: dict[str, str], shapes: Shapes, ignored: Iterable[str]) -> dict[str, tuple[Path, Stored]]:
    """Where each parameter is stored. Raises ZooError with everything that does not fit."""
    held: dict[str, tuple[Path, Stored]] = {}
    unexpected, misfit, alien = [], [], []
    for file, placed in weight_files(folder).items():
        inside = read_header(folder / file)
        for name in sorted(inside.keys() | (placed or set())):
            if name not in names:
                unexpected += [name] * (not matches(name, ignored))
            elif name in inside and placed is not None and name not in placed:
                unexpected.append(f"{name} (in {file}, where the index does not place it)")
            elif name in inside:
                stored, expected = inside[name], shapes[names[name]]
                misfit += [f"{name} is {stored.shape}, expected {expected}"] * (stored.shape != expected)
                alien += [f"{name} is {stored.dtype}, expected {' or '.join(DTYPES)}"] * (stored.dtype not in DTYPES)
                held[name] = folder / file, stored
    present = {names[name] for name in held}
    missing = [name for name in shapes if name not in present]
    faults = {"missing": missing, "unexpected": unexpected, "wrong shape": misfit, "wrong dtype": alien}
    if any(faults.values()):
        told = "; ".join(f"{what}: {', '.join(w[:10])}" + f" and {len(w) - 10} more" * (len(w) > 10) for what, w in faults.items() if w)
        raise ZooError(one_line(f"{folder}: the tensors do not fit this model: {told}"))
    return held


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


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


def _as_it_lies(stored: Stored, dtype: torch.dtype) -> bool:
    """Whether a parameter can be a view of the file: a header may be of any length, and numbers then need not lie where they should."""
    return DTYPES[stored.dtype] == dtype and stored.begin % dtype.itemsize == 0 and stored.begin < stored.end


def _mapped(where: Mapping[str, tuple[Path, Stored]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters that are pages of their files, one storage each (see `_layout`)."""
    maps: dict[Path, mmap.mmap] = {}
    data: dict[str, Tensor] = {}
    for name, (path, stored) in where.items():
        with reading(path):
            if path not in maps:
                with open_file(path) as file:
                    maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            if stored.end > len(maps[path]):
                raise ValueError("has become shorter while it was read")
            count = math.prod(stored.shape)
            data[name] = torch.frombuffer(maps[path], dtype=dtype, count=count, offset=stored.begin).view(stored.shape)
    return data


def _fill(wanted: Iterable[tuple[Path, Stored, Tensor]]) -> None:
    """Stored tensors into tensors of their sizes, in pieces, by several threads: a read lets go of Python's lock, also while the kernel
    hands out and clears the pages that it writes to, which takes as long as copying what is cached."""
    jobs = []
    for path, stored, tensor in wanted:
        flat, step = tensor.view(-1), PIECE // DTYPES[stored.dtype].itemsize
        jobs += [(path, stored, i, flat[i : i + step]) for i in range(0, len(flat), step)]
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(lambda job: read_numbers(*job), jobs):  # leaving the loop by an error or Ctrl-C drops the jobs that wait
            pass


def read_numbers(path: Path, stored: Stored, start: int, out: Tensor) -> None:
    """Numbers `start` and following of a stored tensor, as many as `out` (n,) holds, converted to its dtype."""
    kind = DTYPES[stored.dtype]
    buffer = out if out.dtype == kind else torch.empty(min(len(out), CONVERTED // kind.itemsize), dtype=kind)
    with reading(path), open_file(path) as file:
        file.seek(stored.begin + start * kind.itemsize)
        for part in out.split(len(buffer)):
            room = memoryview((ctypes.c_char * (len(part) * kind.itemsize)).from_address(buffer.data_ptr())).cast("B")
            while room:
                if not (n := file.readinto(room)):
                    raise ValueError("became shorter while it was read")
                room = room[n:]
            if buffer is not out:
                with torch.inference_mode():  # the caller may be in it, and threads do not inherit that
                    part.copy_(buffer[: len(part)])


def _equal(path: Path, stored: Stored, other_path: Path, other: Stored) -> bool:
    """Whether two stored tensors hold the same numbers, compared in float32, which holds all dtypes of the file exactly."""
    step = CONVERTED // 4
    a, b = torch.empty(step), torch.empty(step)
    for start in range(0, count := math.prod(stored.shape), step):
        n = min(step, count - start)
        read_numbers(path, stored, start, a[:n])
        read_numbers(other_path, other, start, b[:n])
        if not torch.equal(a[:n], b[:n]):
            return False
    return True


if __name__ == "__main__":
    from zoo.cli import run
    from zoo.inspection import main

    raise SystemExit(run(main))
