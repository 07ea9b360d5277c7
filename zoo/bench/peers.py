"""What zoo is compared with: other programs on the same weights, each in a Python file of its own (scripts/peer_*.py).

Such a file has PEERS, a dict: name -> a function of (model's folder, dtype, threads, longest context) that returns an object with

    decode(context, batch, steps)   -> None where it cannot, else a function that takes `steps` steps behind a context: -> seconds
    prefill(context, batch)         -> the same for a prompt of `context` tokens
    weight_bytes                    what its weights take
    cache_item                      bytes of a number in its cache, where that is not of the model's dtype
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import torch

from zoo.attention.full import Full
from zoo.bench.ours import Case, exact_bytes, prompt_flops
from zoo.errors import ZooError


def load(what: str, folder: Path, dtype: torch.dtype, threads: int, longest: int) -> dict[str, Any]:
    """`FILE` or `FILE:NAME,NAME` -> the peers by name. Raises ZooError where the file is none, or what it needs is not installed."""
    path, _, names = what.partition(":")
    need = "it must be a Python file with PEERS, and what it imports installed"
    try:
        peers = runpy.run_path(path)["PEERS"]
    except (OSError, SyntaxError, ImportError, KeyError) as e:
        raise ZooError(f"--peer {path} cannot be used: {e}; {need}") from e
    wanted = [name.strip() for name in names.split(",")] if names else list(peers)
    if unknown := [name for name in wanted if name not in peers]:
        raise ZooError(f"--peer {path} has no {unknown[0]!r}; it has {', '.join(peers)}")
    try:
        return {name: peers[name](folder, dtype, threads, longest) for name in wanted}
    except (ImportError, OSError, RuntimeError, ValueError) as e:
        raise ZooError(f"--peer {path} cannot be used: {e}; {need}") from e


def case(peer: Any, task: str, context: int, batch: int, steps: int, lm: Any) -> Case | None:
    """A peer's case, its attention being exact; lm: zoo's model of the same shape."""
    run = peer.decode(context, batch, steps) if task == "decode" else peer.prefill(context, batch)
    work = batch * (steps if task == "decode" else context)
    about = {"context": context, "batch": batch, "weight_bytes": peer.weight_bytes}
    if run is None:
        return None
    if task == "prefill":
        return Case(about, run, work, flops=batch * prompt_flops(lm.model, Full(), context))
    cache = batch * exact_bytes(lm.config, context, getattr(peer, "cache_item", lm.dtype.itemsize))
    return Case(about, run, work, bytes=peer.weight_bytes + cache)
