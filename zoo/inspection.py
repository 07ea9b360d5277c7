"""python -m zoo.checkpoint inspect NAME: what a checkpoint is, and whether this code runs it, from its headers and small files.
python -m zoo.checkpoint verify NAME: whether its bytes are right; reads all of them."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from zoo import hub
from zoo.checkpoint import (
    CONVERTED,
    DTYPES,
    INDEX,
    account,
    end_ids,
    lay_out,
    matches,
    parameter_names,
    parameter_shapes,
    read_config,
    read_numbers,
    weight_files,
)
from zoo.cli import Parser
from zoo.errors import ZooError
from zoo.models import FAMILIES
from zoo.safetensors_header import Stored, one_line, read_header, read_json, reading
from zoo.tokenizer import Tokenizer


def inspect(folder: Path) -> dict[str, Any]:
    """What the headers and the small files say; no weight is read. Raises ZooError where they cannot be read; a checkpoint that is
    whole but that this code cannot run has its first reason in `refused`."""
    raw, files = read_config(folder), {file: read_header(folder / file) for file in weight_files(folder)}
    tensors = {name: t for inside in files.values() for name, t in inside.items()}
    about: dict[str, Any] = {"folder": str(folder), "family": raw.get("model_type"), "config": raw, "parameters": None, "refused": None}
    about["bytes"] = sum(t.end - t.begin for t in tensors.values())
    about["files"] = {file: os.path.getsize(folder / file) for file in files}
    about["dtypes"] = sorted({t.dtype for t in tensors.values()})
    about |= {"tensors": len(tensors), "ignored": [], "tokenizer": None, "vocabulary": None}
    try:
        model = lay_out(folder)
        about["ignored"] = sorted(name for name in tensors if matches(name, model.ignored_tensors))
        about["parameters"] = sum(p.numel() for p in model.parameters())
        account(folder, parameter_names(model), parameter_shapes(model), model.ignored_tensors)
        end_ids(folder)
        tokenizer = Tokenizer.load(folder)
        about |= {"tokenizer": tokenizer.kind, "vocabulary": tokenizer.vocab_size}
    except ZooError as e:
        about["refused"] = str(e)
    return about


def verify(folder: Path) -> list[tuple[str, str, bool]]:
    """(file, what was found, whether it is as it should be): sizes, names, checksums where the hub's cache knows them, weights that are
    no finite number. Reads all weights. Raises ZooError where config.json cannot be read."""
    sums = {file: sha256 for file, (_, sha256) in hub.checksums(folder).items() if sha256}
    found, data = [], 0
    family = FAMILIES.get(str(read_config(folder).get("model_type")))
    ignored = family.ignored_tensors if family else ()  # a mask may well hold -infinity
    try:
        table = weight_files(folder)
    except ZooError as e:
        return [(INDEX, str(e), False)]
    for file, placed in table.items():
        try:
            tensors = read_header(folder / file)
            data += sum(t.end - t.begin for t in tensors.values())
            words = [f"{os.path.getsize(folder / file):,} bytes, {len(tensors)} tensors"]
            wrong = [f"{len(names)} {what} ({', '.join(sorted(names)[:3])})" for what, names in _strays(tensors, placed).items() if names]
            numbers = {name: t for name, t in tensors.items() if t.dtype in DTYPES and not matches(name, ignored)}
            bad = {name: n for name, t in numbers.items() if (n := _not_finite(folder / file, t))}
            wrong += [f"{sum(bad.values()):,} weights are NaN or infinite ({', '.join(list(bad)[:3])})"] * bool(bad)
            same = _as_on_the_hub(folder / file, sums)
            words += ["no checksum known" if same is None else "the hub's sha256"] * (same is not False)
            wrong += ["its sha256 is not the hub's; download it again"] * (same is False)
            found.append((file, one_line(", ".join(words + wrong)), not wrong))
        except ZooError as e:
            found.append((file, str(e), False))
    if os.path.lexists(folder / INDEX):
        about = read_json(folder / INDEX).get("metadata")
        total = about.get("total_size") if isinstance(about, dict) else None
        good = total is None or total == data
        found.insert(0, (INDEX, one_line(f"{len(table)} shards, total_size {total!r}" + f", but they hold {data}" * (not good)), good))
    for file in sorted(sums.keys() - table.keys()):
        same = _as_on_the_hub(folder / file, sums)
        found.append((file, "the hub's sha256" if same else "its sha256 is not the hub's; download it again", bool(same)))
    checks: list[tuple[str, Any]] = [("config.json", lambda: _check(folder)), ("tokenizer", lambda: Tokenizer.load(folder))]
    for what, check in checks:
        try:
            check()
            found.append((what, "fit this code", True))
        except ZooError as e:
            found.append((what, str(e), False))
    return found


def _as_on_the_hub(path: Path, sums: Mapping[str, str]) -> bool | None:
    """Whether a file has the SHA-256 that the hub gives; None: it gives none."""
    if path.name not in sums:
        return None
    with reading(path), open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() == sums[path.name]


def _check(folder: Path) -> None:
    """All that loading checks before it reads weights."""
    model = lay_out(folder)
    account(folder, parameter_names(model), parameter_shapes(model), model.ignored_tensors)
    end_ids(folder)


def _strays(tensors: Mapping[str, Stored], placed: set[str] | None) -> dict[str, set[str]]:
    if placed is None:
        return {}
    return {"tensors that the index does not place here": tensors.keys() - placed, "tensors missing": placed - tensors.keys()}


def _not_finite(path: Path, stored: Stored) -> int:
    step = CONVERTED // DTYPES[stored.dtype].itemsize
    buffer, bad = torch.empty(step, dtype=DTYPES[stored.dtype]), 0
    for start in range(0, count := math.prod(stored.shape), step):
        read_numbers(path, stored, start, part := buffer[: min(step, count - start)])
        if not part.abs().amax().isfinite():  # much quicker than counting, and hardly ever true
            bad += len(part) - int(part.isfinite().sum())
    return bad


def main(argv: list[str] | None = None) -> None:
    p = Parser(prog="python -m zoo.checkpoint", description="What a checkpoint is, and whether it is whole.")
    p.add_argument("command", choices=["inspect", "verify"], help="inspect reads headers only; verify reads all weights")
    p.add_argument("name", help="a known name, a hub id, or a folder; fetched first where it is not on this machine")
    p.add_argument("--json", action="store_true", help="print the findings as one JSON object, the last line of standard output")
    args = p.parse_args(argv)
    folder = hub.find(args.name)
    if args.command == "inspect":
        about = inspect(folder)
        print(show(about))
        if args.json:
            print(json.dumps(about))
        return
    found = verify(folder)
    for file, text, good in found:
        print(f"{'ok   ' if good else 'WRONG'} {file}: {text}")
    if args.json:
        print(json.dumps([{"file": file, "found": text, "ok": good} for file, text, good in found]))
    if wrong := [file for file, _, good in found if not good]:
        raise ZooError(f"{folder}: {len(wrong)} of {len(found)} checks failed: {', '.join(wrong)}")


def show(about: dict[str, Any]) -> str:
    """The findings of `inspect` for people."""
    numbers = {key: value for key, value in about["config"].items() if type(value) in (int, float, dict)}
    count, ignored = about["parameters"], about["ignored"]
    lines = {
        "folder": about["folder"],
        "family": about["family"],
        "config": ", ".join(f"{key} {value}" for key, value in numbers.items()),
        "parameters": f"{count:,}" if count else "unknown",
        "weights": f"{about['bytes']:,} bytes, {about['tensors']} tensors, {', '.join(about['dtypes'])}",
        "files": ", ".join(f"{file} ({size:,})" for file, size in about["files"].items()),
        "tokenizer": f"{about['tokenizer']}, {about['vocabulary']:,} tokens" if about["tokenizer"] else "not read",
        "ignored": f"{len(ignored)} tensors: {', '.join(ignored[:5])}" if ignored else "nothing",
        "runs": f"no: {about['refused']}" if about["refused"] else "yes",
    }
    return "\n".join(f"{key:<11}{one_line(value)}" for key, value in lines.items())
