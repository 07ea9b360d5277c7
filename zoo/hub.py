"""Where a checkpoint is: the table of known names, folders on this machine, and the Hugging Face hub.

Looked for in this order: a folder that was named; weights/<name>/; the Hugging Face cache; an installed package that ships it; the hub.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from zoo import embedded
from zoo.checkpoint import INDEX, SINGLE, one_line, weight_files
from zoo.errors import ZooError

ROOT = Path(__file__).resolve().parents[1]  # the checkout, where weights/ lies
TOKENIZERS = ["tokenizer.json", "tokenizer.model"]
# All that is fetched beside the weights. Patterns match whole paths, so files of the same name in subfolders stay behind.
SMALL = ["config.json", "generation_config.json", "chat_template.jinja", INDEX, *TOKENIZERS]
SMALL += ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"]
HUB_ID = re.compile(r"[A-Za-z0-9]\w*(?:[-.]\w+)*/\w+(?:[-.]+\w+)*", re.ASCII)


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
