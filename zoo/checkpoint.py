"""Where a checkpoint is, and how its tensors are read: safetensors only, strict in both directions, no pickle ever.

A checkpoint is a folder with config.json, model.safetensors (or model.safetensors.index.json and the shards it names) and a
tokenizer. Where an index lies beside a model.safetensors, the index counts: only the files it names are fetched and read.

Tensors are mapped, not read, and copied one by one into a single anonymous buffer that holds the whole model, so memory peaks at
about the model's own bytes. The buffer asks the kernel for huge pages: decoding reads every weight once per token, and with 4 KiB
pages the walks through the page table cost it several per cent.
"""

from __future__ import annotations

import functools
import json
import math
import mmap
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from zoo import embedded
from zoo.errors import ZooError

ROOT = Path(__file__).resolve().parents[1]  # the checkout, where weights/ lies
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TOKENIZERS = ["tokenizer.json", "tokenizer.model"]
# All that is fetched beside the weights. Patterns match whole paths, so files of the same name in subfolders stay behind.
SMALL = ["config.json", "generation_config.json", "chat_template.jinja", INDEX, *TOKENIZERS]
SMALL += ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"]
HUB_ID = re.compile(r"[A-Za-z0-9]\w*(?:[-.]\w+)*/\w+(?:[-.]+\w+)*", re.ASCII)
JSON_LIMIT = 16 << 20  # bytes; the largest index on the hub is under 10 MB
ALIGN = 64  # bytes: one cache line, and the widest vector load


@dataclass(frozen=True)
class Known:
    """A checkpoint with a short name. Those with a chat form mean that one; base models are reached by their hub id."""

    hub_id: str
    family: str
    licence: str
    size: str  # of the weights in the hub's dtype


KNOWN = {
    embedded.NAME: Known("HuggingFaceTB/SmolLM2-135M-Instruct", "llama", "Apache-2.0", "0.27 GB"),
    "smollm2-360m": Known("HuggingFaceTB/SmolLM2-360M-Instruct", "llama", "Apache-2.0", "0.72 GB"),
    "smollm2-1.7b": Known("HuggingFaceTB/SmolLM2-1.7B-Instruct", "llama", "Apache-2.0", "3.4 GB"),
    "tinyllama-1.1b": Known("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "llama", "Apache-2.0", "2.2 GB"),
    "llama-3.2-1b": Known("meta-llama/Llama-3.2-1B-Instruct", "llama", "Llama 3.2 Community (gated)", "2.5 GB"),
    "llama-3.2-3b": Known("meta-llama/Llama-3.2-3B-Instruct", "llama", "Llama 3.2 Community (gated)", "6.4 GB"),
    "llama-3.1-8b": Known("meta-llama/Llama-3.1-8B-Instruct", "llama", "Llama 3.1 Community (gated)", "16 GB"),
    "llama-2-7b": Known("meta-llama/Llama-2-7b-chat-hf", "llama", "Llama 2 Community (gated)", "13.5 GB"),
}


# Where a checkpoint is


def find(name: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint: a folder that was named, weights/<name>/, the Hugging Face cache, an installed package, the hub.

    `name` is a folder, a short name from KNOWN, or a hub id "owner/repo"; `revision` is a branch, tag or commit on the hub.
    Raises ZooError when there is none, saying what to do.
    """
    path = os.path.expanduser(name)
    hub_id = KNOWN[name].hub_id if name in KNOWN else name if HUB_ID.fullmatch(name) else None
    if name and (os.path.isdir(path) or name[0] in "./~" or (os.sep in name and hub_id is None)):
        if revision:
            raise ZooError(f"{name!r} is a folder, and revision {revision!r} is for the hub: leave it out")
        return _folder(Path(path))
    if not revision and (local := _weights(name)):
        return _folder(local)
    if hub_id is None:
        raise ZooError(f"unknown model {name!r}: name a folder, a hub id like owner/repo, or one of {', '.join(KNOWN)}")
    if cached := _cached(hub_id, revision):
        return cached
    if name == embedded.NAME and not revision and embedded.where():
        return embedded.folder()
    return _download(name, hub_id, revision)


def available(name: str) -> str | None:
    """Where a known model is on this machine ("weights/...", "hub cache", "embedded (...)"), or None. Never touches the network."""
    if _weights(name):
        return f"weights/{name}"
    if name in KNOWN and _cached(KNOWN[name].hub_id, None):
        return "hub cache"
    state = embedded.where() if name == embedded.NAME else None
    return f"embedded ({state})" if state else None


def _weights(name: str) -> Path | None:
    folders = [root / "weights" / name for root in (ROOT, Path())] if name else []
    return next((f for f in folders if os.path.isdir(f)), None)


def _folder(path: Path) -> Path:
    if not os.path.isfile(path / "config.json"):
        why = "holds no config.json: it is no checkpoint" if os.path.isdir(path) else "is no folder"
        raise ZooError(f"{str(path)!r} {why}; a checkpoint is a folder with config.json, {SINGLE} and a tokenizer")
    return path


def _lacks(folder: Path) -> str | None:
    """The first file that config and weights need and `folder` does not hold."""
    return next((file for file in ["config.json", *weight_files(folder)] if not (folder / file).is_file()), None)


def _cached(hub_id: str, revision: str | None) -> Path | None:
    """The snapshot in the Hugging Face cache if it is whole: an interrupted download leaves one that is not."""
    with suppress(ImportError, OSError, ValueError, ZooError):
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(hub_id, revision=revision, local_files_only=True, allow_patterns=["config.json"]))
        if not _lacks(folder) and any((folder / t).is_file() for t in TOKENIZERS):
            return folder
    return None


def _download(name: str, hub_id: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ZooError(f"{name!r} is not on this machine, and fetching it needs: pip install huggingface-hub") from None
    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=SMALL))
        # The folder's name is the commit: both halves are of the same one, even if the repository changes in between.
        folder = Path(snapshot_download(hub_id, revision=folder.name, allow_patterns=list(weight_files(folder))))
    except ZooError:
        raise
    except Exception as e:  # the client lets through its HTTP library's errors, which share no base class with its own
        raise ZooError(one_line(_hub_failure(name, hub_id, revision, e))) from e
    if lacking := _lacks(folder):
        raise ZooError(f"{hub_id}, fetched to {str(folder)!r}, has no {lacking}; only safetensors checkpoints can be read")
    return folder


def _hub_failure(name: str, hub_id: str, revision: str | None, e: Exception) -> str:
    from huggingface_hub import constants, errors

    url = f"https://huggingface.co/{hub_id}"
    status = getattr(getattr(e, "response", None), "status_code", None)
    elsewhere = f"or use the copy in a package: {embedded.INSTALL}" if name == embedded.NAME else f"or put it in weights/{name}/"
    if isinstance(e, errors.RevisionNotFoundError):
        return f"{url} has no revision {revision!r}"
    if isinstance(e, errors.RepositoryNotFoundError) and not isinstance(e, errors.GatedRepoError):
        return f"no folder {name!r} here and no model at {url} (or it is private: then set HF_TOKEN to a token that may read it)"
    if isinstance(e, errors.GatedRepoError) or status in (401, 403):
        return f"{hub_id} is gated: accept its licence at {url} and set HF_TOKEN to a token of that account"
    if constants.HF_HUB_OFFLINE:
        return f"{hub_id} is not in the Hugging Face cache, and HF_HUB_OFFLINE forbids fetching it: unset that, {elsewhere}"
    if isinstance(e, errors.LocalEntryNotFoundError) or status is None and isinstance(e, ConnectionError):
        return f"{hub_id} is not on this machine, and the hub cannot be reached: connect, {elsewhere}"
    return f"fetching {hub_id} from the hub failed: {type(e).__name__}: {e}"


# What lies beside the tensors


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it is. Raises ZooError when it is missing, unreadable, no JSON object, or absurdly large or deep."""
    return _json(folder / "config.json")


def generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json, or {} without one. `eos_token_id` is an int or a list of ints. Raises ZooError as `read_config` does."""
    path = folder / "generation_config.json"
    raw = _json(path) if os.path.lexists(path) else {}
    eos = raw.get("eos_token_id")
    if any(type(e) is not int for e in (eos if isinstance(eos, list) else [eos])) and eos is not None:
        raise ZooError(one_line(f"{path}: eos_token_id is {eos!r}; expected a token id or a list of them"))
    return raw


def _json(path: Path) -> dict[str, Any]:
    with _reading(path):
        if path.stat().st_size > JSON_LIMIT:
            raise ValueError(f"larger than {JSON_LIMIT >> 20} MiB")
        raw = json.loads(path.read_bytes())
        if not isinstance(raw, dict):
            raise ValueError("holds no JSON object")
    return raw


def weight_files(folder: Path) -> Mapping[str, set[str] | None]:
    """Each weight file's name, with the tensors that the index places in it; None where there is no index.

    Raises ZooError for an index that is no index, or that names anything but safetensors files in this folder.
    """
    path = folder / INDEX
    if not os.path.lexists(path):
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


# The tensors


def load_into(model: nn.Module, folder: Path, dtype: torch.dtype | None, device: str | torch.device = "cpu") -> None:
    """Replace the parameters of `model`, laid out on `meta`, by the checkpoint's; buffers are the modules' own business.

    dtype None = the file's; where its tensors disagree, the one config.json names, else the widest among them. On the CPU all
    parameters are views of one buffer. One Parameter under two names (a tied output head) stays one: the checkpoint may hold it
    under either name, or under both with equal values.

    Raises ZooError, with `model` as it was, for a file that cannot be read and for tensors that are missing, unexpected (unless
    `model.ignored_tensors`, a list of regular expressions, matches the name), of another shape or no floating-point numbers: all
    of them in one message.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ZooError(f"dtype {dtype} cannot hold weights; use float32, float16 or bfloat16")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    first = {id(p): name for name, p in model.named_parameters()}
    names = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}  # every name -> the first for it
    with ExitStack() as stack:
        files = {}
        for file in weight_files(folder):
            with _reading(folder / file):
                files[file] = stack.enter_context(safe_open(folder / file, framework="pt"))
        held, dtypes = _account(folder, files, names, shapes, getattr(model, "ignored_tensors", ()))
        dtype = dtype or _agreed(folder, dtypes)
        new = {}
        buffers = _layout(shapes, dtype) if torch.device(device).type == "cpu" else {}
        for name in shapes:
            here = [n for n in names if names[n] == name and n in held]
            with _reading(folder / held[here[0]]):
                tensor, *copies = [files[held[n]].get_tensor(n) for n in here]
                if not all(torch.equal(tensor, copy) for copy in copies):
                    raise ValueError(f"config.json ties {' and '.join(here)}, but their values differ here; set tie_word_embeddings to false")
                data = buffers[name].copy_(tensor) if buffers else tensor.to(device, dtype)
            new[name] = nn.Parameter(data, requires_grad=False)
    for name, one in names.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new[one])
    if not buffers:
        model.to(device)


def _account(
    folder: Path, files: dict[str, Any], names: dict[str, str], shapes: dict[str, tuple[int, ...]], ignored: Any
) -> tuple[dict[str, str], set[torch.dtype]]:
    """Which file holds each parameter, and the dtypes seen. Raises ZooError with everything that does not fit."""
    held: dict[str, str] = {}
    dtypes, unexpected, misfit, alien = set(), [], [], []
    for file, placed in weight_files(folder).items():
        inside = set(files[file].keys())
        for name in sorted(inside | (placed or set())):
            if name not in names:
                if not any(re.fullmatch(pattern, name) for pattern in ignored):
                    unexpected.append(name)
            elif name in inside and placed is not None and name not in placed:
                unexpected.append(f"{name} (in {file}, where the index does not place it)")
            elif name in inside:
                held[name] = file
                with _reading(folder / file):
                    head = files[file].get_slice(name)
                    shape, kind = tuple(head.get_shape()), head.get_dtype()
                if shape != shapes[names[name]]:
                    misfit.append(f"{name} is {shape}, expected {shapes[names[name]]}")
                if kind not in DTYPES:
                    alien.append(f"{name} is {kind}, expected {' or '.join(DTYPES)}")
                dtypes.add(DTYPES.get(kind, torch.float32))
    present = {names[name] for name in held}
    faults = {"missing": [n for n in shapes if n not in present], "unexpected": unexpected, "wrong shape": misfit, "wrong dtype": alien}
    told = [f"{what}: {_some(which)}" for what, which in faults.items() if which]
    if told:
        raise ZooError(one_line(f"{folder}: the tensors do not fit this model: {'; '.join(told)}"))
    return held, dtypes


def _agreed(folder: Path, dtypes: set[torch.dtype]) -> torch.dtype:
    if len(dtypes) < 2:
        return next(iter(dtypes), torch.float32)
    raw = read_config(folder)
    named = f"torch.{raw.get('torch_dtype') or raw.get('dtype')}"
    return next((d for d in DTYPES.values() if str(d) == named), functools.reduce(torch.promote_types, dtypes))


def _layout(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """An uninitialised tensor for each parameter, in order, each on a cache line of its own, all in one buffer."""
    spans, end = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        spans[name] = slice(end, end + size)
        end += -(-size // ALIGN) * ALIGN
    try:
        # Private, where Python's default is shared: shared anonymous memory is a file in tmpfs, which gets no huge pages.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        memory = mmap.mmap(-1, max(end, 1), **private)
    except (OSError, ValueError, OverflowError) as e:
        raise ZooError(f"no memory for the model's {end / 1e9:.1f} GB in {dtype}: {one_line(e)}") from e
    with suppress(AttributeError, OSError):  # a system without huge pages: only speed is lost
        memory.madvise(mmap.MADV_HUGEPAGE)
    flat = torch.frombuffer(memory, dtype=torch.uint8)  # holds on to `memory`
    return {name: flat[spans[name]].view(dtype).view(shape) for name, shape in shapes.items()}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong with a file becomes a ZooError with its name."""
    try:
        yield
    except FileNotFoundError as e:
        raise ZooError(one_line(f"{path} is missing")) from e
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as e:  # too deep a JSON is a RuntimeError, too
        raise ZooError(one_line(f"{path}: {getattr(e, 'strerror', None) or e or type(e).__name__}")) from e


def _some(names: list[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def one_line(text: object) -> str:
    """`text` without line breaks or control characters, which a damaged file may hold."""
    line = " ".join(str(text).split())
    return "".join(c if c.isprintable() else "\ufffd" for c in line)[:4000]
