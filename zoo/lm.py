"""LM: a model, its tokenizer and an attention method, ready to use. `zoo.load(...)` makes one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo import checkpoint, hub
from zoo.attention import Attention, parse
from zoo.attention.backends import choose, cpu_kernels
from zoo.attention.cache import Caches
from zoo.compiled import Step
from zoo.errors import ZooError
from zoo.models.layers import use_kernels
from zoo.quantized import check, quantize
from zoo.sampling import Choice, Sampler, sampler
from zoo.tokenizer import StopText, Tokenizer

CHUNK = 512  # prompt tokens a model call: long enough for matrix products near their peak, short enough that scores stay small
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Stats:
    """What one generation did and what it took."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    first_token_seconds: float = 0.0
    cache_peak_bytes: int = 0  # what the cache allocated at most while the prompt was read
    stopped_by: list[str] = field(default_factory=list)  # per sequence: "end token", "stop string" or "length"

    @property
    def prefill_rate(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else math.nan

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first of each sequence, which prefill paid for."""
        decoded = self.new_tokens - len(self.stopped_by)
        return decoded / self.decode_seconds if self.decode_seconds and decoded > 0 else math.nan


class LM:
    """lm.model, lm.config, lm.tokenizer, lm.attn; see zoo.load."""

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        attn: Attention,
        end_ids: frozenset[int],
        compile: str | bool = "auto",
        backend: str = "auto",
    ) -> None:
        self.model, self.config, self.tokenizer = model, model.config, tokenizer
        self.attn, self.end_ids = attn, end_ids
        self.backend = choose(backend, self.device, self.dtype, self.config.head_dim)
        use_kernels(model, cpu_kernels(self.device, self.dtype))
        kinds = sorted({str(p.dtype) for p in model.parameters()})
        self.step = Step(model, compile, f"{type(model).__name__} {model.config} {kinds} {self.backend}")
        self.stats = Stats()
        self.cache: Caches | None = None  # of the last generation, for reading

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    # Tensors in, tensors out

    @torch.no_grad()
    def logits(self, ids: Tensor | Sequence[int]) -> Tensor:
        """ids (B, T) int64, or one list -> logits (B, T, V) float32: one causal pass without any cache."""
        return self.model(self.as_batch(ids))

    def new_cache(self, batch: int = 1, max_tokens: int | None = None, prompt_tokens: int | None = None) -> Caches:
        """An empty cache for `batch` sequences. max_tokens is a hint, not a limit; prompt_tokens is what `%` budgets are a share of."""
        if batch < 1:
            raise ZooError(f"batch={batch} must be at least 1")
        caches = self.attn.caches(self.config, self.model.rotary, batch, max_tokens, prompt_tokens, self.dtype, self.device)
        caches.max_tokens = max_tokens
        caches.about = f"{self.attn} for {self.config} in {self.dtype}"
        for cache in caches:
            cache.backend = self.backend
        return caches

    @torch.no_grad()
    def prefill(
        self,
        ids: Tensor | Sequence[int],
        cache: Caches,
        lengths: Sequence[int] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Feed a prompt, or a chat's next turn: ids (B, T) int64, right-padded where lengths (B,) says so -> logits (B, V) float32 after
        each sequence's last token. Calls progress(done, total) after each chunk. Raises ZooError for an empty prompt."""
        ids = self.as_batch(ids)
        lengths = [ids.shape[1]] * len(ids) if lengths is None else [int(n) for n in lengths]
        if len(lengths) != len(ids) or not all(1 <= n <= ids.shape[1] for n in lengths):
            raise ZooError(f"prompt lengths {lengths} do not fit ids of shape {tuple(ids.shape)}; each must be at least 1")
        T, count = max(lengths), torch.tensor(lengths, device=ids.device)
        column = torch.arange(T, device=ids.device)
        pos = torch.where(column < count[:, None], cache.positions(T), -1)
        cache.begin_prompt(lengths)
        last = ids.new_empty((len(ids), self.config.hidden_size), dtype=self.dtype)
        chunk = T if self.model.rotary.whole_prompts else CHUNK
        for start in range(0, T, chunk):
            for piece, where in cache.split(ids[:, start : min(start + chunk, T)], pos[:, start : start + chunk]):
                hidden = self.model.hidden(piece, where, cache)
                ends = (where == (pos.amax(1, keepdim=True))) & (where >= 0)  # at most one column a sequence
                last[ends.any(1)] = hidden[ends]
            self.stats.cache_peak_bytes = max(self.stats.cache_peak_bytes, cache.nbytes().allocated)
            if progress:
                progress(min(start + chunk, T), T)
        cache.end_prompt()
        return self.model.logits(last)

    @torch.no_grad()
    def decode_step(self, ids: Tensor | Sequence[int], cache: Caches, pos: Tensor | None = None, choice: Choice | None = None) -> Tensor:
        """ids (B,) or (B, 1) int64: the next token of each sequence -> logits (B, V) float32; the compiled form where compile is on.
        pos (B, 1) -1 leaves a sequence as it is. With a choice, the tokens (B,) chosen from these logits, in the same compiled step."""
        ids = self.as_batch(torch.as_tensor(ids).view(-1, 1))
        if cache.prompt_open:  # decoding begins: nothing more is held exactly than the method keeps
            cache.end_prompt()
        to_come = (cache.max_tokens or 0) - int(cache.tokens_seen.min())
        for piece, where in cache.split(ids, pos):
            out = self.step(piece, where, cache, to_come, choice)
        return out

    def as_batch(self, ids: Tensor | Sequence[int]) -> Tensor:
        try:
            ids = torch.as_tensor(ids, dtype=torch.int64, device=self.device)
        except (TypeError, ValueError) as e:
            raise ZooError(f"ids must be a tensor or a list of whole numbers, all rows of one length: {e}") from None
        ids = ids[None] if ids.dim() == 1 else ids
        if ids.dim() != 2 or ids.numel() == 0:
            raise ZooError(f"ids of shape {tuple(ids.shape)} are no batch of tokens; expected (B, T) with at least one token each")
        if int(ids.min()) < 0 or int(ids.max()) >= self.config.vocab_size:
            raise ZooError(f"token ids must be between 0 and {self.config.vocab_size - 1}; got {int(ids.min())} to {int(ids.max())}")
        return ids

    # Text in, text out

    def tokens(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        choose: Sampler,
        seed: int = 0,
        cache: Caches | None = None,
        progress: Callable[[int, int], None] | None = None,
        stopped: Callable[[int], bool] = lambda sequence: False,
        context: Sequence[int] = (),
    ) -> Iterator[list[int | None]]:
        """The loop under generate, stream and chat: for each step the new token of every sequence, None once it has ended.
        `stopped(sequence)` is asked after each token. With a cache, the prompts continue it. Fills self.stats."""
        if max_new_tokens < 1:
            raise ZooError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if not prompts or not all(prompts):
            raise ZooError("the prompt is empty; give at least one token of text")
        B, lengths = len(prompts), [len(p) for p in prompts]
        seen_before = 0 if cache is None else int(cache.tokens_seen.max())
        need, most = seen_before + max(lengths), self.config.max_position_embeddings
        if need >= most:
            raise ZooError(
                f"the prompt is {need} tokens; this model's context holds {most}, answer included: shorten it, or start a new conversation"
            )
        max_new_tokens = min(max_new_tokens, most - need)
        if cache is None:
            cache = self.new_cache(B, max_tokens=need + max_new_tokens)
        cache.max_tokens = need + max_new_tokens
        self.cache, self.stats = cache, Stats(prompt_tokens=sum(lengths))
        self.stats.stopped_by = ["length"] * B

        ids = torch.zeros(B, max(lengths), dtype=torch.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        seen = None
        if choose.needs_seen:
            seen = torch.zeros(B, self.config.vocab_size, dtype=torch.bool, device=self.device)
            for i, prompt in enumerate(prompts):
                seen[i, torch.tensor([*context, *prompt], device=self.device)] = True
        alive = [True] * B

        start = time.perf_counter()
        logits = self.prefill(ids, cache, lengths, progress)
        self.stats.prefill_seconds = time.perf_counter() - start
        decoding = time.perf_counter()
        choice = Choice.of(choose, B, self.device, seed, seen)
        with torch.no_grad():
            new = choice(logits, cache.tokens_seen[:, None] - 1)
        for step in range(max_new_tokens):
            if seen is not None:
                seen[choice.sequence, new] = True
            out: list[int | None] = []
            for i, token in enumerate(new.tolist()):
                out.append(token if alive[i] else None)
                if alive[i]:
                    self.stats.new_tokens += 1
                    if token in self.end_ids:
                        alive[i], self.stats.stopped_by[i] = False, "end token"
            if step == 0:
                self.stats.first_token_seconds = time.perf_counter() - start
            self.stats.decode_seconds = time.perf_counter() - decoding
            yield out
            for i in range(B):
                if alive[i] and stopped(i):
                    alive[i], self.stats.stopped_by[i] = False, "stop string"
            if step + 1 == max_new_tokens or not any(alive):
                return
            pos = torch.where(torch.tensor(alive, device=self.device), cache.tokens_seen, -1)[:, None]
            new = self.decode_step(new, cache, pos, choice)

    def stream(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
        cache: Caches | None = None,
        progress: Callable[[int, int], None] | None = None,
        context: Sequence[int] = (),
        decoder: Any = None,
    ) -> Iterator[str]:
        """The answer to one prompt (text or token ids) in pieces, never half a UTF-8 character. Ends at an end token, before a stop
        string, or after max_new_tokens. With a cache, the prompt continues it, and `context` is what the cache has read, for the repetition
        penalty. `decoder` stands in for the tokenizer's own streaming decoder."""
        choose = sampler(temperature, top_k, top_p, min_p, repetition_penalty)
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        text = StopText(decoder or self.tokenizer.stream(), stop)
        for (token,) in self.tokens([ids], max_new_tokens, choose, seed, cache, progress, lambda _: text.stopped, context):
            if token is not None and token not in self.end_ids:
                yield text.push(token)
        yield text.finish()

    def generate(self, prompt: str | Sequence[str], max_new_tokens: int = 64, **options: Any) -> str | list[str]:
        """The answer to a prompt, or to each of a list of prompts of any lengths in one batch. Options as in `stream`."""
        if isinstance(prompt, str):
            return "".join(self.stream(prompt, max_new_tokens, **options))
        answers: dict[int, list[str]] = {}
        for i, piece in self.stream_batch(prompt, max_new_tokens, **options):
            answers.setdefault(i, []).append(piece)
        return ["".join(answers.get(i, [])) for i in range(len(prompt))]

    def stream_batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_new_tokens: int = 64,
        *,
        seed: int = 0,
        stop: Sequence[str] = (),
        progress: Callable[[int, int], None] | None = None,
        **numbers: Any,
    ) -> Iterator[tuple[int, str]]:
        """(sequence, piece of its answer) as they come; the sampling options of `stream`."""
        choose = sampler(**numbers)
        texts = [StopText(self.tokenizer.stream(), stop) for _ in prompts]
        ids = [self.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
        for new in self.tokens(ids, max_new_tokens, choose, seed, None, progress, lambda i: texts[i].stopped):
            for i, token in enumerate(new):
                if token is not None and token not in self.end_ids:
                    yield i, texts[i].push(token)
        for i, text in enumerate(texts):
            yield i, text.finish()

    def chat(self, messages: list[dict[str, str]], max_new_tokens: int = 512, **options: Any) -> str:
        """The answer to a conversation [{"role": "user", "content": "..."}], by the checkpoint's own chat template. Options as in
        `stream`."""
        return "".join(self.stream(self.tokenizer.chat(messages), max_new_tokens, **options))


def load(
    name: str = "smollm2-135m",
    attn: str | Attention = "full",
    dtype: str | torch.dtype | None = None,
    device: str = "cpu",
    compile: str | bool = "auto",
    backend: str = "auto",
    weights: str | None = None,
) -> LM:
    """A model by name (zoo.models()), hub id or folder, ready to generate.

    attn: `name:option=value,...` (zoo.attentions()). dtype: as in the file unless given (bfloat16, float16, float32). compile: auto, on or
    off. weights: None, as in the file, or int8 (extra `quant`). backend: how attention is computed, `eager`, `sdpa`, `cpp` (CPU kernels),
    `triton` (GPU kernels), `flex` (FlexAttention), or `auto`: cpp on a CPU and triton, else flex, on a GPU, where they can be used. Raises
    ZooError with one line that says what to do.
    """
    method = parse(attn)
    check(weights)
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ZooError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    if str(device) == "meta":
        raise ZooError("device 'meta' holds no numbers; choose cpu or a GPU")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ZooError(f"device {device!r} cannot be used here: {str(e).partition(chr(10))[0]}") from None
    folder: Path = hub.find(name)
    model, ends = checkpoint.lay_out(folder), checkpoint.end_ids(folder)
    tokenizer = Tokenizer.load(folder)
    checkpoint.load_into(model, folder, dtype)
    quantize(model, weights)
    model = model.to(device).eval().requires_grad_(False)
    end_ids = ends if tokenizer.eos_id is None else ends | {tokenizer.eos_id}
    return LM(model, tokenizer, method, frozenset(end_ids), compile, backend)
