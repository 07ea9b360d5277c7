"""Where a checkpoint is: the table of known names, folders on this machine, and the Hugging Face hub.

Looked for in this order: a folder that was named; weights/<name>/; the Hugging Face cache; an installed package that ships it; the hub.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from zoo import embedded
from zoo.checkpoint import INDEX, SINGLE, one_line, weight_files
from zoo.errors import ZooError

ROOT = Path(__file__).resolve().parents[1]  # the checkout, where weights/ lies
TOKENIZERS = ["tokenizer.json", "tokenizer.model", "tekken.json"]
# All that is fetched beside the weights. Patterns match whole paths, so files of the same name in subfolders stay behind.
SMALL = ["config.json", "generation_config.json", INDEX, *TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json"]
SMALL += ["chat_template.jinja", "chat_template.json"]
HUB_ID = re.compile(r"[A-Za-z0-9]\w*(?:[-.]\w+)*/\w+(?:[-.]+\w+)*", re.ASCII)
SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Known:
    """A checkpoint with a short name."""

    family: str
    gigabytes: float  # of the weight files on the hub
    licence: str  # as the hub tags it
    gated: bool  # the hub gives it only to accounts that have accepted the licence
    hub_id: str
    revision: str  # a commit, so that a name means the same weights next year


# A plain name is the base model, -instruct and -chat are tuned ones; but SmolLM2 and TinyLlama are here in their tuned form only.
# Llama 1 is not here: its makers never put it on the hub. Any copy that someone else keeps there works by its hub id.
TABLE = """
smollm2-135m             llama      0.269 apache-2.0 open  HuggingFaceTB/SmolLM2-135M-Instruct   12fd25f77366fa6b3b4b768ec3050bf629380bac
smollm2-360m             llama      0.724 apache-2.0 open  HuggingFaceTB/SmolLM2-360M-Instruct   a10cc1512eabd3dde888204e902eca88bddb4951
smollm2-1.7b             llama      3.42  apache-2.0 open  HuggingFaceTB/SmolLM2-1.7B-Instruct   31b70e2e869a7173562077fd711b654946d38674
tinyllama-1.1b           llama      2.2   apache-2.0 open  TinyLlama/TinyLlama-1.1B-Chat-v1.0    fe8a4ea1ffedaf415f4da2f062534de366a451e6
llama-2-7b               llama     13.5   llama2     gated meta-llama/Llama-2-7b-hf              01c7f73d771dfac7d292323805ebc428287df4f9
llama-2-7b-chat          llama     13.5   llama2     gated meta-llama/Llama-2-7b-chat-hf         f5db02db724555f92da89c216ac04704f23d4590
llama-2-13b              llama     26.0   llama2     gated meta-llama/Llama-2-13b-hf             5c31dfb671ce7cfe2d7bb7c04375e44c55e815b1
llama-2-13b-chat         llama     26.0   llama2     gated meta-llama/Llama-2-13b-chat-hf        a2cb7a712bb6e5e736ca7f8cd98167f81a0b5bd8
llama-3-8b               llama     16.1   llama3     gated meta-llama/Meta-Llama-3-8B            8cde5ca8380496c9a6cc7ef3a8b46a0372a1d920
llama-3-8b-instruct      llama     16.1   llama3     gated meta-llama/Meta-Llama-3-8B-Instruct   8afb486c1db24fe5011ec46dfbe5b5dccdb575c2
llama-3.1-8b             llama     16.1   llama3.1   gated meta-llama/Llama-3.1-8B               d04e592bb4f6aa9cfee91e2e20afa771667e1d4b
llama-3.1-8b-instruct    llama     16.1   llama3.1   gated meta-llama/Llama-3.1-8B-Instruct      0e9e39f249a16976918f6564b8830bc894c89659
llama-3.2-1b             llama      2.47  llama3.2   gated meta-llama/Llama-3.2-1B               4e20de362430cd3b72f300e6b0f18e50e7166e08
llama-3.2-1b-instruct    llama      2.47  llama3.2   gated meta-llama/Llama-3.2-1B-Instruct      9213176726f574b556790deb65791e0c5aa438b6
llama-3.2-3b             llama      6.43  llama3.2   gated meta-llama/Llama-3.2-3B               13afe5124825b4f3751f836b40dafda64c1ed062
llama-3.2-3b-instruct    llama      6.43  llama3.2   gated meta-llama/Llama-3.2-3B-Instruct      0cb88a4f764b7a12671c53f0838cd831a0843b95
llama-3.3-70b-instruct   llama    141     llama3.3   gated meta-llama/Llama-3.3-70B-Instruct     6f6073b423013f6a7d4d9f39144961bfbfbc386b
mistral-7b               mistral   14.5   apache-2.0 open  mistralai/Mistral-7B-v0.3             caa1feb0e54d415e2df31207e5f4e273e33509b1
mistral-7b-instruct      mistral   14.5   apache-2.0 open  mistralai/Mistral-7B-Instruct-v0.3    c170c708c41dac9275d15a8fff4eca08d52bab71
mistral-7b-v0.1          mistral   14.5   apache-2.0 open  mistralai/Mistral-7B-v0.1             27d67f1b5f57dc0953326b2601d68371d40ea8da
mistral-7b-instruct-v0.1 mistral   14.5   apache-2.0 open  mistralai/Mistral-7B-Instruct-v0.1    ec5deb64f2c6e6fa90c1abf74a91d5c93a9669ca
mistral-7b-instruct-v0.2 mistral   14.5   apache-2.0 open  mistralai/Mistral-7B-Instruct-v0.2    63a8b081895390a26e140280378bc85ec8bce07a
mistral-nemo             mistral   24.5   apache-2.0 open  mistralai/Mistral-Nemo-Base-2407      a4477a2f977929a969745b69bbd62e03043551a5
mistral-nemo-instruct    mistral   24.5   apache-2.0 open  mistralai/Mistral-Nemo-Instruct-2407  04d8a90549d23fc6bd7f642064003592df51e9b3
pythia-70m               gpt_neox   0.166 apache-2.0 open  EleutherAI/pythia-70m                 a39f36b100fe8a5377810d56c3f4789b9c53ac42
pythia-160m              gpt_neox   0.375 apache-2.0 open  EleutherAI/pythia-160m                50f5173d932e8e61f858120bcb800b97af589f46
pythia-410m              gpt_neox   0.911 apache-2.0 open  EleutherAI/pythia-410m                9879c9b5f8bea9051dcb0e68dff21493d67e9d4f
pythia-1b                gpt_neox   2.09  apache-2.0 open  EleutherAI/pythia-1b                  f73d7dcc545c8bd326d8559c8ef84ffe92fea6b2
pythia-1.4b              gpt_neox   2.93  apache-2.0 open  EleutherAI/pythia-1.4b                fedc38a16eea3bd36a96b906d78d11d2ce18ed79
pythia-2.8b              gpt_neox   5.68  apache-2.0 open  EleutherAI/pythia-2.8b                2a259cdd96a4beb1cdf467512e3904197345f6a9
pythia-6.9b              gpt_neox  13.8   apache-2.0 open  EleutherAI/pythia-6.9b                c0e3eee36dc47af0c49f361c74cfe459c09f7f23
pythia-12b               gpt_neox  23.8   apache-2.0 open  EleutherAI/pythia-12b                 bb1e3e710cdf6b524461d543cfb5ba773f0a81b6
gpt-neox-20b             gpt_neox  41.3   apache-2.0 open  EleutherAI/gpt-neox-20b               c292233c833e336628618a88a648727eb3dff0a7
"""
ROWS = [line.split() for line in TABLE.strip().splitlines()]
KNOWN = {name: Known(family, float(gb), licence, gate == "gated", *where) for name, family, gb, licence, gate, *where in ROWS}


def find(name: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint: a folder that was named, weights/<name>/, the Hugging Face cache, an installed package, the hub.

    `name` is a folder, a short name from KNOWN, or a hub id "owner/repo"; `revision` is a branch, tag or commit on the hub, by default
    the commit in KNOWN (or, where the cache has not got that one, the `main` it has), and else `main`.
    Raises ZooError when there is none, saying what to do.
    """
    path = os.path.expanduser(name)
    known = KNOWN.get(name)
    hub_id = known.hub_id if known else name if HUB_ID.fullmatch(name) else None
    if name and (os.path.isdir(path) or name[0] in "./~" or (os.sep in name and hub_id is None)):
        if revision:
            raise ZooError(f"{name!r} is a folder, and revision {revision!r} is for the hub: leave it out")
        return _folder(Path(path))
    if not revision and (local := _weights(name)):
        return _folder(local)
    if hub_id is None:
        near = difflib.get_close_matches(name, KNOWN, n=3, cutoff=0.5) or list(KNOWN)[:3]
        raise ZooError(
            f"unknown model {name!r}: name a folder, a hub id like owner/repo, or a known one such as {', '.join(near)} (--list)"
        )
    if cached := _in_cache(hub_id, revision, known):
        return cached
    if name == embedded.NAME and not revision and embedded.where():
        return embedded.folder()
    return _download(name, hub_id, revision or (known.revision if known else None))


def available(name: str) -> str | None:
    """Where a known model is on this machine ("weights/...", "hub cache", "embedded (...)"), or None. Never touches the network."""
    state, hub = name == embedded.NAME and embedded.where(), name in KNOWN and _in_cache(KNOWN[name].hub_id, None, KNOWN[name])
    return f"weights/{name}" if _weights(name) else "hub cache" if hub else f"embedded ({state})" if state else None


def checksums(folder: Path) -> dict[str, tuple[int, str | None]]:
    """File -> (its size here, its SHA-256 on the hub or None where that is not known), for the files directly in `folder`.

    Needs no network: in the Hugging Face cache a file is a link to a blob, and a blob from outside git (all weights are) is named by its
    hash. Small files that the hub keeps in git, and all files of any other folder, have None. The hash says what the bytes should be:
    whether they are is for the caller to compute. The size is what lies here, for the cache records no other. A file that is gone, though
    its link is left, is left out.
    """
    found: dict[str, tuple[int, str | None]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.is_file():
            # One link and no further: a blob may itself be a link, into a store that repositories share, named by another kind of hash.
            blob = Path(os.readlink(file)) if file.is_symlink() else file
            known = blob.parent.name == "blobs" and SHA256.fullmatch(blob.name)
            found[file.name] = file.stat().st_size, blob.name if known else None
    return found


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


def _in_cache(hub_id: str, revision: str | None, known: Known | None) -> Path | None:
    return (_cached(hub_id, known.revision) if known and not revision else None) or _cached(hub_id, revision)


def _cached(hub_id: str, revision: str | None) -> Path | None:
    """The snapshot in the Hugging Face cache if it is whole: an interrupted download leaves one that is not."""
    with suppress(OSError, ValueError, ZooError):
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(hub_id, revision=revision, local_files_only=True, allow_patterns=["config.json"]))
        if not _lacks(folder) and any((folder / t).is_file() for t in TOKENIZERS):
            return folder
    return None


def _download(name: str, hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    try:
        HfApi().model_info(hub_id, revision=revision)  # what follows would ask a hub that cannot be reached for half a minute
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=SMALL))
        for file, (_, sha256) in checksums(folder).items():
            if sha256 and file in SMALL and _sha256(folder / file) != sha256:
                for path in ((folder / file).resolve(), folder / file):
                    path.unlink(missing_ok=True)
                raise _damaged(hub_id, file)
        for file in weight_files(folder):
            _fetch(hub_id, folder, file)
    except ZooError:
        raise
    except Exception as e:  # the client lets through its HTTP library's errors, which share no base class with its own
        raise ZooError(one_line(_hub_failure(name, hub_id, revision, e))) from e
    if lacking := _lacks(folder):
        raise ZooError(f"{hub_id} has no {lacking} in {str(folder)!r}; a model without safetensors cannot be read")
    return folder


def _fetch(hub_id: str, folder: Path, file: str) -> None:
    """Bring a weight file into the snapshot `folder`, whose name is the commit: what was broken off goes on from there.

    The client drops half a file when it is interrupted, gigabytes of it, and compares its length with the hub's, but not its SHA-256.
    So the blob is put into the cache here, under the client's own lock, and the client only links it. In plain HTTP, one file after
    the other: its Xet transfer cannot be taken up again, and its threads go on until their files are whole when Ctrl-C comes.
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    if (folder / file).is_file():
        return
    url = hf_hub_url(hub_id, file, revision=folder.name)
    try:
        meta = get_hf_file_metadata(url)
    except errors.RemoteEntryNotFoundError:
        return  # the caller says what that means
    if meta.etag and meta.size and SHA256.fullmatch(meta.etag):  # else it is not among the hub's large files: the client's job alone
        repo = folder.parents[1]
        blob, part = repo / "blobs" / meta.etag, repo / "blobs" / f"{meta.etag}.incomplete"
        lock = repo.parent / ".locks" / repo.name / f"{meta.etag}.lock"
        for parent in (blob.parent, lock.parent):
            parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if not blob.exists():
                with part.open("ab") as f:
                    done = f.tell() if f.tell() <= meta.size else f.truncate(0)
                    http_get(url, f, resume_size=done, headers=build_hf_headers(), expected_size=meta.size, displayed_filename=file)
                if _sha256(part) != meta.etag:
                    part.unlink()
                    raise _damaged(hub_id, file)
                part.replace(blob)
    hf_hub_download(hub_id, file, revision=folder.name)


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _damaged(hub_id: str, file: str) -> ZooError:
    return ZooError(f"{file} of {hub_id} arrived damaged, its SHA-256 is not the hub's: it was dropped; run again to fetch it anew")


def _hub_failure(name: str, hub_id: str, revision: str | None, e: Exception) -> str:
    from huggingface_hub import constants, errors

    url, chain = f"https://huggingface.co/{hub_id}", [e, *filter(None, (e.__cause__, e.__context__))]
    status = next((r.status_code for r in (getattr(x, "response", None) for x in chain) if r is not None), None)
    elsewhere = f"or use the copy in a package: {embedded.INSTALL}" if name == embedded.NAME else f"or put it in weights/{name}/"
    if isinstance(e, errors.RevisionNotFoundError):
        return f"{url} has no revision {revision!r}" + f": --model {hub_id} takes its newest" * (name in KNOWN)
    if status == 401 and "credentials" in str(e).lower():
        return f"the hub does not know the token in HF_TOKEN: make one at {constants.ENDPOINT}/settings/tokens, or unset it"
    if isinstance(e, errors.GatedRepoError) or status == 403:
        return f"{hub_id} is gated: accept its licence at {url} and set HF_TOKEN to a token of that account"
    if isinstance(e, errors.RepositoryNotFoundError) or status in (401, 404):
        return f"no folder {name!r} here and no model at {url}; if it is private, set HF_TOKEN to a token that may read it"
    if constants.HF_HUB_OFFLINE:
        return f"{hub_id} is not in the Hugging Face cache, and HF_HUB_OFFLINE forbids fetching it: unset that, {elsewhere}"
    if status:
        return f"the hub answered {status} for {hub_id}: try again later, {elsewhere}"
    if any(getattr(x, "errno", None) == errno.ENOSPC for x in chain):
        need = f"; the weights are {KNOWN[name].gigabytes} GB" if name in KNOWN else ""
        return f"no space left in {constants.HF_HUB_CACHE!r}{need}: make room and run again to go on, or set HF_HOME to another folder"
    if isinstance(e, errors.LocalEntryNotFoundError) or type(e).__module__.startswith("httpx"):  # httpx or httpx2, as the client has it
        return f"{hub_id} is not on this machine, and the hub cannot be reached: connect, {elsewhere}"
    return f"fetching {hub_id} from the hub failed: {type(e).__name__}: {e}; run again to go on where it stopped"
