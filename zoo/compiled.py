"""The decode step under torch.compile: one full graph, compiled once, kept on disk between runs.

Whether compiling pays is a question of how many tokens follow: a compiled step takes about half the time of an eager one, but the first
one takes seconds where Inductor's cache is warm, and most of a minute where it is cold (figures in docs/log.md). `auto` compiles when the
tokens still to come earn that back.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import sysconfig
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.attention.cache import Caches, open_dimensions
from zoo.errors import ZooError
from zoo.folders import cache_folder
from zoo.sampling import Choice

log = logging.getLogger("zoo")

WARM, COLD = 450, 2600  # new tokens from which a compiled answer is finished first, with and without Inductor's cache on disk
MODES = ("auto", "on", "off")


def missing_tool() -> str | None:
    """What Inductor needs on a CPU and does not find, or None."""
    compiler = os.environ.get("CXX", "g++").split()
    if not compiler or not any(shutil.which(c) for c in (compiler[0], "clang++")):
        return "no C++ compiler (g++)"
    if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        return "no Python.h (python3-dev)"
    return None


class Step:
    """logits (B, V) of one new token a sequence: eager, or compiled as `mode` says (auto, on, off)."""

    def __init__(self, model: Any, mode: str | bool, description: str) -> None:
        mode = {True: "on", False: "off"}.get(mode, mode) if isinstance(mode, bool) else mode
        if mode not in MODES:
            raise ZooError(f"compile={mode!r} is unknown; choose one of {', '.join(MODES)}")
        self.model, self.mode = model, mode
        self.compiled: Callable[[Tensor, Tensor, Caches, Choice | None], Tensor] | None = None
        self.marked: weakref.WeakKeyDictionary[Caches, set[str | None]] = weakref.WeakKeyDictionary()  # -> kinds of choice it has seen
        self.ran: dict[str, int] = {"compiled": 0, "eager": 0}
        self.description = description
        self.weights: list[tuple[Any, ...]] = []  # what they were like when the step was compiled
        self.dtype: torch.dtype | None = None
        self.told = False

    def eager(self, ids: Tensor, pos: Tensor, cache: Caches, choice: Choice | None = None) -> Tensor:
        """ids, pos (B, 1) -> logits (B, V) float32; with a choice, the next tokens (B,) instead."""
        logits = self.model.logits(self.model.hidden(ids, pos, cache))[:, -1]
        return logits if choice is None else choice(logits, pos)

    def note(self, cache: Caches, kind: str | None = None) -> Path:
        """A file that says: a step like this was compiled here before, so Inductor's cache is warm."""
        machine = f"{torch.__version__} {torch.get_num_threads()} {torch.backends.cpu.get_cpu_capability()}"
        about = f"{self.description} {type(cache[0]).__name__} {cache.batch} {kind} {machine}"
        return inductor_folder() / "zoo-compiled" / hashlib.sha256(about.encode()).hexdigest()[:32]

    def wanted(self, cache: Caches, to_come: int, kind: str | None = None) -> bool:
        if self.mode != "auto":
            return self.mode == "on"
        return to_come >= COLD or (to_come >= WARM and self.note(cache, kind).exists())

    def __call__(self, ids: Tensor, pos: Tensor, cache: Caches, to_come: int, choice: Choice | None = None) -> Tensor:
        """One step. `to_come`: how many tokens are expected to follow, for `auto`."""
        kind = None if choice is None else choice.sampler.kind
        new = kind not in self.marked.get(cache, ()) or next(self.model.parameters()).dtype != self.dtype
        if new and not (self.wanted(cache, to_come, kind) and self.fits(cache) and self.prepare()):
            self.ran["eager"] += 1
            return self.eager(ids, pos, cache, choice)
        assert self.compiled is not None
        try:
            out = (self.first if new else self.compiled)(ids, pos, cache, choice)
        except Exception as e:  # Dynamo and Inductor raise many kinds, before the step has touched the cache
            if self.ran["compiled"] or self.mode == "on":
                raise
            log.warning("torch.compile failed (%s); decoding runs eagerly", str(e).strip().partition("\n")[0])
            self.mode, self.marked = "off", weakref.WeakKeyDictionary()
            return self(ids, pos, cache, to_come, choice)
        if new:
            self.marked.setdefault(cache, set()).add(kind)
            try:
                self.note(cache, kind).parent.mkdir(parents=True, exist_ok=True)
                self.note(cache, kind).touch()
            except OSError:
                pass  # only the choice of `auto` depends on it
        self.ran["compiled"] += 1
        return out

    def fits(self, cache: Caches) -> bool:
        """Whether layers are alike. Where compiling was asked for and they are not, that is said once."""
        if alike(cache):
            return True
        if self.mode == "on" and not self.told:
            log.warning("the layers of this cache differ, which one compiled step cannot serve; decoding runs eagerly")
            self.told = True
        return False

    def prepare(self) -> bool:
        """Make the compiled function, unless a tool is missing: then one line, and eager from here on."""
        weights = [(p.dtype, p.shape, p.stride()) for p in self.model.parameters()]
        if self.compiled is not None and weights == self.weights:  # their guards are left out, so they are looked at here
            return True
        self.weights, self.dtype, self.marked = weights, next(self.model.parameters()).dtype, weakref.WeakKeyDictionary()
        lacking = missing_tool() if self.model.rotary.inv_freq.device.type == "cpu" else None
        if lacking:
            log.warning("torch.compile cannot run here: %s; decoding runs eagerly", lacking)
            self.mode = "off"
            return False
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(inductor_folder()))  # PyTorch's default is in /tmp, lost at reboot
        self.compiled = torch.compile(  # type: ignore[call-overload]
            self.eager,
            fullgraph=True,
            recompile_limit=64,  # one graph for each method and batch size
            isolate_recompiles=True,  # several models in one process must not count against one another's recompilations
            options={"guard_filter_fn": lambda guards: [worth_checking(g.guard_type, g.name) for g in guards], "size_asserts": False},
        )
        return True

    def first(self, ids: Tensor, pos: Tensor, cache: Caches, choice: Choice | None) -> Tensor:
        """The first step with this cache: the one that may compile. The number of rows of its tensors is left open, so that growing does
        not recompile; Dynamo otherwise takes the shapes of buffers for constants. Nothing else is left open: it would also open whatever
        differs from an earlier method's cache, which nested regions cannot bind."""
        from zoo.kernels.cpu import sources

        assert self.compiled is not None
        for _, t, dim in open_dimensions(cache):
            torch._dynamo.maybe_mark_dynamic(t, dim)
        static = ("force_parameter_static_shapes", "force_nn_module_property_static_shapes", "automatic_dynamic_shapes")
        # What is on disk was compiled for these very kernels: Inductor knows operators by their names only.
        tag = {"cache_key_tag": hashlib.sha256(b"".join(path.read_bytes() for path in sources())).hexdigest()}
        with torch._dynamo.config.patch(dict.fromkeys(static, False)), torch.compiler.config.patch(tag):  # type: ignore[attr-defined]
            return self.compiled(ids, pos, cache, choice)


def worth_checking(kind: str, name: str) -> bool:
    """Whether a compiled step must ask each time if this assumption still holds; asking all two thousand costs it a millisecond.

    Weights change neither shape nor type, and all layers of a cache are alike, so that the first answers for the others.
    """
    return not (OTHER_LAYERS.match(name) or (kind == "TENSOR_MATCH" and name.startswith("self.")))


def alike(cache: Caches) -> bool:
    """Whether the layers differ in nothing that a compiled step takes for granted; if they do, the step runs eagerly."""

    def about(layer: Any) -> list[Any]:
        opened = {name: dim for name, _, dim in open_dimensions(layer)}
        found: list[Any] = [type(layer), layer.window, layer.backend]
        for prefix, part in layer.named_modules():
            if not hasattr(part, "fields"):  # pages are one object for all layers
                for name, t in part._buffers.items():
                    path = f"{prefix}.{name}".lstrip(".")
                    found.append((path, None if t is None else (t.dtype, [n for d, n in enumerate(t.shape) if d != opened.get(path)])))
        return found

    first = about(cache[0])
    return all(about(layer) == first for layer in cache)


OTHER_LAYERS = re.compile(r"cache\._modules\['[1-9]")


def inductor_folder() -> Path:
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or cache_folder() / "inductor")
