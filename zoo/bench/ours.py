"""zoo's own cases: decode steps behind a context, a prompt, loading, starting.

A case is a function that is called in turn with the others and returns seconds. What is prepared once (a model, a cache that has read its
context) is prepared before.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import zoo
from zoo.attention import parse
from zoo.errors import ZooError
from zoo.sampling import Choice, Sampler


@dataclass
class Case:
    """One row to be: what is timed, and what is known of it. run() -> seconds for `work` tokens."""

    about: dict[str, Any]  # who, attn, context, batch ...
    run: Callable[[], float]
    work: int
    bytes: int = 0  # that a decode step cannot do without: weights and cache
    flops: int = 0  # that a prompt takes
    seconds: list[float] = field(default_factory=list)
    more: Callable[[], dict[str, Any]] = dict  # what is known after the runs only


def weight_bytes(model: Any) -> int:
    """Bytes of weights that a decode step reads: all of them once, but of an embedding that is no output head, only a row."""

    def weights(module: Any) -> list[Tensor]:
        return [*module.parameters(recurse=False), *(t for name, t in module.named_buffers(recurse=False) if name == "scale")]

    read = [t for m in model.modules() if not isinstance(m, torch.nn.Embedding) for t in weights(m)]
    return sum({t.data_ptr(): t.nbytes for t in read}.values())


def read_bytes(cache: Any) -> int:
    """Bytes of a cache that a decode step reads: of each slot the key and the value (or their codes), the position and, where slots have
    one, the log-weight. What a method keeps beside slots, to work on them between steps, is not among them."""
    total = 0
    for layer in cache:
        s, pages = layer.store, getattr(layer, "pages", None)
        if pages is not None:  # beside them a tail, of which heads share positions
            total += pages.read_bytes(layer.index) + int((s.pos >= 0).sum()) * (2 * s.k[0, :, 0].nbytes + 4)
            continue
        held = int((layer.slots().pos >= 0).sum())
        small = 8 if s.a is not None else 4 / (s.k.shape[1] // s.pos.shape[1])  # heads may share positions
        total += int(held * (2 * s.k.shape[3] * s.k.element_size() + small))
    return total


def matrix_flops(model: Any) -> int:
    """FLOPs a token in matrix products with weights, the output head aside: a prompt needs that for its last token only."""
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers." in name]
    return sum(2 * m.in_features * m.out_features for _, m in linear)


def attention_flops(config: Any, tokens: int) -> int:
    """FLOPs of exact causal attention over a prompt: a query with each key up to its own, in two products."""
    window = min(tokens, config.sliding_window or tokens)
    pairs = tokens * window - window * (window - 1) // 2  # the first `window` queries see less
    return 4 * pairs * config.num_attention_heads * config.head_dim * config.num_hidden_layers


def prompt_flops(model: Any, method: Any, tokens: int) -> int:
    """FLOPs that a prompt cannot do without: matrix products with weights, and exact attention by methods that read prompts exactly. What
    others compute of attention is less, and is not counted."""
    exact = method.exact_when == "always" or getattr(method, "when", "stream") != "stream"
    return tokens * matrix_flops(model) + (attention_flops(model.config, tokens) if exact else 0)


def exact_bytes(config: Any, tokens: int, item: int) -> int:
    """Keys and values that a decode step reads behind `tokens` tokens in exact attention, a number taking `item` bytes."""
    seen = min(tokens, config.sliding_window or tokens)
    return 2 * seen * config.num_key_value_heads * config.head_dim * config.num_hidden_layers * item


def some_ids(vocabulary: int, tokens: int, batch: int = 1) -> Tensor:
    """Ids that any model has, no two sequences alike: (batch, tokens) int64."""
    return torch.randint(0, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def lengths(context: int, batch: int) -> list[int]:
    """A batch's contexts: `context`, and the others shorter, down to half of it."""
    return [context - context // 2 * i // max(1, batch - 1) for i in range(batch)]


def decode(lm: Any, attn: str, context: int, batch: int, steps: int) -> Case:
    """Decode steps behind a context, tokens being fed that were drawn before: what is timed does not depend on what is said. Each turn
    begins with a copy of the cache and one step that is not timed; what a method absorbs on the way is timed with the steps.
    Sequences of a batch have different lengths, from half the context to all of it."""
    lm.attn = parse(attn)
    n = lengths(context, batch)
    ids, after = some_ids(lm.config.vocab_size, context, batch), some_ids(lm.config.vocab_size, steps + 1, batch)
    base = lm.new_cache(batch, max_tokens=context + steps + 2, prompt_tokens=context)
    lm.prefill(ids, base, n)
    greedy, size = Choice.of(Sampler(), batch, lm.device), base.nbytes()

    def run() -> float:
        cache = base.clone()
        cache.max_tokens = context + steps + 2
        lm.decode_step(after[:, 0], cache, choice=greedy)
        start = time.perf_counter()
        for t in range(steps):
            lm.decode_step(after[:, 1 + t], cache, choice=greedy)
        return time.perf_counter() - start

    read = read_bytes(base)
    about = {"attn": str(lm.attn), "context": context, "batch": batch}
    about |= {"cache_bytes": size.used, "cache_allocated": size.allocated, "cache_read": read}
    return Case(about, run, steps * batch, bytes=weight_bytes(lm.model) + read)


def prefill(lm: Any, attn: str, context: int, batch: int) -> Case:
    """A prompt, from its first token to the logits of the last, compressing included."""
    method, ids = parse(attn), some_ids(lm.config.vocab_size, context, batch)

    def run() -> float:
        lm.attn = method
        start = time.perf_counter()
        lm.prefill(ids, lm.new_cache(batch, max_tokens=context + 1, prompt_tokens=context))
        return time.perf_counter() - start

    about = {"attn": str(method), "context": context, "batch": batch}
    return Case(about, run, context * batch, flops=batch * prompt_flops(lm.model, method, context))


def load(name: str, dtype: str, weights: str | None, backend: str) -> Case:
    """`zoo.load`, and every page of the weights once, with what the system has cached of the files."""
    lm = zoo.load(name, dtype=dtype, compile="off", weights=weights, backend=backend)
    size = sum(p.nbytes for p in lm.model.parameters())
    del lm

    def run() -> float:
        start = time.perf_counter()
        lm = zoo.load(name, dtype=dtype, compile="off", weights=weights, backend=backend)
        for p in lm.model.parameters():
            p.view(-1)[:: 4096 // p.element_size()].sum()
        return time.perf_counter() - start

    return Case({}, run, 1, bytes=size)


def startup(attn: str, compile: str, new: int, options: list[str], environment: Callable[[], Mapping[str, str]]) -> Case:
    """`python -m zoo.generate` with these options, as a process of its own: until its first character, and until it has ended."""
    command = [sys.executable, "-m", "zoo.generate", *options, "--attn", attn, "--compile", compile]
    command += ["--max-new-tokens", str(new), "Once upon a time"]
    firsts: list[float] = []

    def run() -> float:
        start = time.perf_counter()
        with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            firsts.append(time.perf_counter() - start)
            process.stdout.read()
        if process.returncode:
            raise ZooError(f"{' '.join(command)} ended with code {process.returncode}; run it to see why")
        return time.perf_counter() - start

    about = {"attn": attn, "compile": compile, "new_tokens": new}
    return Case(about, run, new, more=lambda: {"first_token_seconds": round(statistics.median(firsts[1:] or firsts), 3)})


def startups(attn: str, new: int, cold: bool, options: list[str]) -> list[tuple[str, Case]]:
    """Starting eagerly, compiled, and as `auto` chooses, with a cache folder of this run's own that the first turn fills; `cold`: also
    compiled with an empty one each time (the CPU kernels, 4 s, are kept all the same). options: `zoo.generate`'s."""
    shared = tempfile.TemporaryDirectory(prefix="zoo-bench-")
    kept = os.environ | {"TORCHINDUCTOR_CACHE_DIR": shared.name}

    def empty() -> Mapping[str, str]:
        return kept | {"TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp(dir=shared.name)}

    cases = [(f"zoo, compile={c}", startup(attn, c, new, options, lambda: kept)) for c in ("auto", "off", "on")]
    if cold:
        cases.append(("zoo, compiled anew", startup(attn, "on", new, options, empty)))
    for _, case in cases:
        case.about["folder"] = shared  # lives as long as the cases
    return cases
