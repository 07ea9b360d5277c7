"""How a cache reads a prompt: two protocols, named and never mixed.

    prefill   exact attention over the prompt, compressed once at its end; what comes afterwards is kept (SnapKV, BalanceKV, most papers)
    stream    never more than the budget, inside the prompt too (StreamingLLM, H2O, SubGen's theory)

They are the option `when` of the methods with a budget. `full` and `sliding` have no such choice: they run as they are under both names.

What is read is what `LM.prefill` reads, chunk for chunk, except that the cache's bytes are sampled before each absorption, so that the peak
is one of every step; and that a prompt read for `prefill` can be compressed several times: until its end, nothing that a cache does depends
on how many slots it may keep then.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.attention import ATTENTION, Attention, Budget, parse
from zoo.attention.budgeted import Budgeted
from zoo.attention.cache import Caches
from zoo.errors import ZooError
from zoo.lm import CHUNK, LM

PROTOCOLS = {"prefill": "prompt", "stream": "stream"}  # and what `when` is there
Forward = Callable[[Tensor, Tensor, Caches], Tensor]  # ids, pos (1, T), cache -> hidden states (1, T, C)


def method_of(spelling: str, protocol: str, tokens: int) -> Attention:
    """The method as it runs under a protocol on a prompt of so many tokens, of which `sliding:window=25%` is a share. Raises ZooError."""
    share = re.fullmatch(r"(sliding:window=)(\d+(?:\.\d+)?%)", spelling.strip())
    if share:
        return parse(share[1] + str(max(1, Budget.parse(share[2]).tokens(tokens))))
    name = spelling.strip().partition(":")[0]
    if not issubclass(ATTENTION.get(name, Attention), Budgeted):
        return parse(spelling)
    if "when=" in spelling:
        raise ZooError(f"--attn {spelling}: the protocol says when to compress (--protocols prefill,stream); leave `when` out")
    method = parse(spelling.strip() + (",when=" if ":" in spelling else ":when=") + PROTOCOLS[protocol])
    assert isinstance(method, Budgeted)
    if method.when != PROTOCOLS[protocol]:
        raise ZooError(f"--attn {spelling}: it has no other form than when={method.when}; --protocols stream")
    return method


def same_reading(method: Attention) -> Attention:
    """A key for methods whose caches are the same until the prompt's end."""
    if isinstance(method, Budgeted) and method.when == "prompt" and not getattr(method, "delta", 0):
        return dataclasses.replace(method, budget=Budget(100, percent=True))
    return method


@dataclasses.dataclass
class Run:
    """A cache on its way: what it has read, what comes next, and what it took."""

    lm: LM
    cache: Caches
    forward: Forward
    logits: Tensor  # (V,) float32 after the last token; of a replay (V = C) no logits
    tokens: int = 0
    peak: int = 0  # bytes used, at most
    seconds: float = 0.0  # reading the prompt and compressing it, without counting bytes
    steps: list[float] = dataclasses.field(default_factory=list)  # seconds of each decoded token
    inside: list[Tensor] = dataclasses.field(default_factory=list)  # log-probabilities of the prompt's own tokens, where asked for

    def final(self) -> int:
        return self.cache.nbytes().used

    def sample(self) -> float:
        """Look at the bytes; the seconds that it took."""
        start = time.perf_counter()
        self.peak = max(self.peak, self.final())
        return time.perf_counter() - start

    def clone(self) -> Run:
        return dataclasses.replace(self, cache=self.cache.clone(), steps=list(self.steps), inside=list(self.inside))

    @torch.no_grad()
    def feed(self, ids: Sequence[int], most: int = 256) -> Tensor:
        """Hidden states (T, C) after each of these tokens, in chunks."""
        out = []
        t = torch.tensor([list(ids)], device=self.lm.device)
        for start in range(0, t.shape[1], most):
            for piece, where in self.cache.split(t[:, start : start + most]):
                out.append(self.forward(piece, where, self.cache)[0])
                self.sample()
        self.tokens += t.shape[1]
        return torch.cat(out)

    def follow(self, ids: Sequence[int]) -> Tensor:
        """Log-probabilities (T, V) float32 of the token after each of these."""
        with torch.no_grad():
            return self.lm.model.logits(self.feed(ids)).log_softmax(-1)

    def ask(self, ids: Sequence[int]) -> None:
        """The question comes: in one piece, as nothing is decided in between."""
        if ids:
            with torch.no_grad():
                self.logits = self.lm.model.logits(self.feed(ids)[-1])

    def logprob(self, answer: Sequence[int]) -> float:
        """log P(answer | everything read) in nats. The answer is then read, too."""
        after = self.logits.log_softmax(-1)[None]
        if len(answer) > 1:
            after = torch.cat((after, self.follow(answer[:-1])))
        self.feed(answer[-1:])
        return float(after.gather(1, torch.tensor(answer, device=after.device)[:, None]).double().sum())

    def reply(self, most: int, stop: Callable[[str], bool] = lambda text: False) -> str:
        """What is said next, greedily: until an end token, `stop`, or so many tokens."""
        said: list[int] = []
        token = int(self.logits.argmax())
        while token not in self.lm.end_ids:
            said.append(token)
            if len(said) >= most or stop(self.lm.tokenizer.decode(said)):
                break
            start = time.perf_counter()
            token = int(self.lm.decode_step([token], self.cache)[0].argmax())  # a number: on a GPU, this waits for it
            self.steps.append(time.perf_counter() - start)
            self.tokens += 1
            self.sample()
        return self.lm.tokenizer.decode(said)


@torch.no_grad()
def read(lm: LM, method: Attention, ids: Sequence[int], more: int = 0, forward: Forward | None = None, inside: bool = False) -> Run:
    """A prompt without its end. more: tokens that will follow. forward: instead of the model. inside: keep what the model thought of each
    token of the prompt, as the cache read it."""
    lm.attn = method
    cache = lm.new_cache(max_tokens=len(ids) + more)
    run = Run(lm, cache, forward or lm.model.hidden, torch.empty(0))
    t = torch.tensor([list(ids)], device=lm.device)
    start, aside = time.perf_counter(), 0.0
    cache.begin_prompt([len(ids)])
    chunk = len(ids) if lm.model.rotary.whole_prompts else CHUNK
    ahead = torch.empty(0)
    for at in range(0, len(ids), chunk):
        for piece, where in cache.split(t[:, at : at + chunk]):
            hidden = run.forward(piece, where, cache)[0]
            aside += run.sample()
            if inside:
                first, end = int(where[0, 0]), int(where[0, -1]) + 1
                logs = lm.model.logits(hidden).log_softmax(-1)
                seen = torch.cat((ahead, logs[:-1])) if first else logs[:-1]
                run.inside.append(seen.gather(1, t[0, max(first, 1) : end, None])[:, 0])
                ahead = logs[-1:]
    run.logits = hidden[-1] if forward else lm.model.logits(hidden[-1])
    finished(lm)
    run.tokens, run.seconds = len(ids), time.perf_counter() - start - aside
    return run


def end(run: Run) -> Run:
    """The prompt is over: compress."""
    start = time.perf_counter()
    run.cache.end_prompt()
    finished(run.lm)
    run.seconds += time.perf_counter() - start
    run.sample()
    return run


def finished(lm: LM) -> None:
    """What was given to a GPU has been done: for the clock."""
    if lm.device.type != "cpu":
        torch.accelerator.synchronize(lm.device)


def adopt(cache: Any, method: Budgeted) -> None:
    """Go on as this method's cache, from a reading that is the same."""
    cache.about = cache.about.replace(str(cache.method), str(method), 1)
    cache.method = method
    for layer in cache:
        layer.method = method


class FullBytes:
    """Bytes of a full cache of so many tokens: measured on two tiny ones, since every token costs the same."""

    def __init__(self, lm: LM) -> None:
        one, two = (end(read(lm, parse("full"), [0] * n)).final() for n in (1, 2))
        self.each, self.base = two - one, 2 * one - two
        self.window = lm.config.sliding_window

    def __call__(self, tokens: int) -> int:
        return self.base + self.each * min(tokens, self.window or tokens)
