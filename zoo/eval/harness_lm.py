"""ZooLM: lm-evaluation-harness asks, a model with any attention method answers.

What is measured. Every score goes through the method's cache, also with `full`:

    loglikelihood           the context but for its last token is read as a prompt and compressed at its end, as the method does it. Its
                            last token and the continuation's are then fed to the compressed cache, so that also answers of one token are
                            scored by what the method kept. Contexts that several continuations share are read once. A question that the
                            task puts into the context is seen while compressing.
    loglikelihood_rolling   each window (of the model's context, but for one token without overlap) is fed behind its first token, so what
                            is compressed is compressed while scoring: a streaming perplexity. `%` budgets are a share of the window.
                            With when=prompt nothing is ever compressed there (a warning says so).
    generate_until          the whole context is the prompt, then decoding: as zoo.generate answers.

A `%` budget is a share of each prompt. Texts become tokens as with lm_eval's HFLM: BOS where the tokenizer adds it unless the text begins
with it, the names of special tokens are those tokens, a continuation is what the whole has beyond the context, too long contexts lose
their beginning, and an empty context is BOS (or the end token). With `full` the numbers are HFLM's, up to rounding.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from torch import Tensor
from tqdm import tqdm

import zoo
from zoo import cli
from zoo.attention import ATTENTION, parse
from zoo.attention.cache import Caches
from zoo.errors import ZooError
from zoo.lm import CHUNK
from zoo.sampling import sampler
from zoo.tokenizer import StopText

log = logging.getLogger(__name__)
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
Score = tuple[float, bool]  # log-probability; whether greedy decoding would have written the same
Row = tuple[list[int], list[tuple[int, list[int]]]]  # a context, and its continuations, each with the number of its request


class ZooLM(TemplateLM):
    """Model arguments: model, dtype, device, compile, backend, weights, threads as on zoo's command lines; attn, whose options may also
    stand beside it (`attn=subgen,budget=25%,when=prompt`, since lm_eval splits at commas); batch_size, a number; max_length (tokens; the
    model's context unless given); max_gen_toks; add_bos_token (as the tokenizer does unless given); prefix_token_id (what an empty context
    is). max_batch_size is taken, and not used. Raises ZooError in one line for arguments that do not fit."""

    def __init__(
        self,
        model: str = "smollm2-135m",
        attn: str = "full",
        dtype: str | None = None,
        device: str = "cpu",
        compile: str = "auto",
        backend: str = "auto",
        weights: str | None = None,
        threads: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        method = parse(with_options(str(attn), options))
        self.batch_size = whole("batch_size", batch_size)
        cli.set_threads(None if threads is None else whole("threads", threads))
        if device.startswith("cuda") and not torch.cuda.is_available():  # lm_eval's command line says cuda:0 where nobody said anything
            log.warning("%s is not here: using the CPU", device)
            device = "cpu"
        self.lm = zoo.load(str(model), method, dtype, device, compile, backend, weights)
        self.name, self.tokenizer, self._device = str(model), self.lm.tokenizer, self.lm.device
        self.max_length = whole("max_length", self.lm.config.max_position_embeddings if max_length is None else max_length)
        self.max_gen_toks = whole("max_gen_toks", max_gen_toks)
        self.add_bos_token, self._prefix = add_bos_token, prefix_token_id
        if add_bos_token and self.tokenizer.bos_id is None:
            raise ZooError(f"add_bos_token=True, but {model} has no BOS token")
        if prefix_token_id is not None:
            self.lm.as_batch([prefix_token_id])  # raises where the vocabulary has no such token
        self.draws = 0  # batches that were sampled: each draws anew

    # Texts and tokens

    @property
    def eot_token_id(self) -> int:
        ends = [self.tokenizer.eos_id] if self.tokenizer.eos_id is not None else sorted(self.lm.end_ids)
        if not ends:
            raise ZooError(f"{self.name} names neither BOS nor an end token; say prefix_token_id=N")
        return ends[0]

    @property
    def prefix_token_id(self) -> int:
        known = [i for i in (self._prefix, self.tokenizer.bos_id) if i is not None]
        return known[0] if known else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        add = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id], skip_special=False)):
            add = False
        ids = self.tokenizer.encode(string, bos=add is not False, special=True)
        start = self.tokenizer.bos_id
        return [start, *ids] if self.add_bos_token and add and start is not None and ids[:1] != [start] else ids

    @property
    def tokenizer_name(self) -> str:
        return self.name.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text. Without add_generation_prompt it ends inside the last message, which the model is to continue."""
        try:
            text = self.tokenizer.render(chat_history, add_generation_prompt)
        except ZooError:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            log.warning("the chat template failed; once more without the system message")
            return self.apply_chat_template(rest, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes beside its results."""
        return {
            "model_num_parameters": sum(p.numel() for p in self.lm.model.parameters()),
            "model_dtype": str(self.lm.dtype),
            "zoo_attn": str(self.lm.attn),
            "zoo_backend": self.lm.backend,
        }

    # Scores

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, rolling: bool = False, **kwargs: Any
    ) -> list[Score]:
        """(texts, context, continuation) of each request -> its score. rolling: `%` budgets are a share of both together."""
        rows: dict[tuple[Any, ...], Row] = {}
        for i, (_, context, new) in enumerate(requests):
            if not context or not 1 <= len(new) <= self.max_length:
                raise ZooError(f"a continuation of {len(new)} tokens behind {len(context)} does not fit max_length={self.max_length}")
            context = (context + new)[-(self.max_length + 1) : -len(new)]  # the last token is scored, but never fed
            rows.setdefault((*context, i if rolling else None), (context, []))[1].append((i, new))
        scores: list[Score] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="zoo: loglikelihood") as bar:
            for batch in self.batches(rows.values(), alike=rolling):
                for i, score in self.read(batch, rolling):
                    scores[i] = score
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], score)
                    bar.update()
        return scores

    def batches(self, rows: Iterable[Row], alike: bool) -> Iterator[list[Row]]:
        """Long ones first, so that a batch pads little and what does not fit into memory fails at once. alike: only of one length. A
        context with as many continuations as a batch has sequences is read alone."""

        def tokens(row: Row) -> int:
            return len(row[0]) + max(len(new) for _, new in row[1])

        few = sorted((row for row in rows if len(row[1]) < self.batch_size or self.batch_size == 1), key=tokens, reverse=True)
        for _, some in groupby(few, tokens if alike else lambda row: None):
            yield from chunks(list(some), self.batch_size)
        yield from ([row] for row in rows if len(row[1]) >= self.batch_size > 1)

    @torch.no_grad()
    def read(self, batch: list[Row], rolling: bool) -> Iterator[tuple[int, Score]]:
        """Read the contexts, then score each continuation on a copy of the cache that they left."""
        longest = max(len(context) + len(new) for context, news in batch for _, new in news) - 1
        cache = self.lm.new_cache(len(batch), max_tokens=longest, prompt_tokens=longest + 1 if rolling else None)
        prompts = [context[:-1] or context for context, _ in batch]
        logits = self.lm.prefill(padded(prompts, 0), cache, [len(prompt) for prompt in prompts])
        last = torch.tensor([[context[-1]] for context, _ in batch], device=logits.device)
        more = torch.tensor([[len(context) > 1] for context, _ in batch], device=logits.device)
        if more.any():
            for piece, where in cache.split(last, torch.where(more, cache.positions(1), -1)):  # one piece
                logits = torch.where(more, self.lm.model.logits(self.lm.model.hidden(piece, where, cache))[:, 0], logits)
        if len(batch) == 1:
            turns = list(chunks(batch[0][1], self.batch_size))
        else:
            most = max(len(news) for _, news in batch)
            turns = [[news[turn] if turn < len(news) else (-1, []) for _, news in batch] for turn in range(most)]
        for turn in turns:
            news = [new for _, new in turn]
            feeds = any(len(new) > 1 for new in news)  # else all is known already
            copy = cache if not feeds else cache.clone() if len(batch) > 1 else cache.expand(len(turn))
            found = self.score(copy, logits.expand(len(turn), -1), news)
            yield from ((i, score) for (i, _), score in zip(turn, found, strict=True) if i >= 0)

    def score(self, cache: Caches, first: Tensor, news: list[list[int]]) -> list[Score]:
        """first (B, V): logits behind what the cache has read; a continuation for each sequence (none: []). Feeds the cache."""
        target = padded(news, -1).to(first.device)
        logprob, greedy = first.new_zeros(len(news), dtype=torch.float64), torch.ones_like(target[:, 0], dtype=torch.bool)

        def judge(logits: Tensor, target: Tensor) -> None:
            valid = target >= 0
            at = logits.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
            logprob.add_(at.double().where(valid, 0).sum(-1))
            greedy.logical_and_(((logits.argmax(-1) == target) | ~valid).all(-1))

        judge(first[:, None], target[:, :1])
        ids, pos = target[:, :-1].clamp(min=0), torch.where(target[:, 1:] >= 0, cache.positions(target.shape[1] - 1), -1)
        step, done = ids.shape[1] if self.lm.model.rotary.whole_prompts else CHUNK, 1
        for start in range(0, ids.shape[1], step):  # in pieces: all logits of a long continuation at once would be gigabytes
            for piece, where in cache.split(ids[:, start : start + step], pos[:, start : start + step]):
                judge(self.lm.model.logits(self.lm.model.hidden(piece, where, cache)), target[:, done : done + piece.shape[1]])
                done += piece.shape[1]
        return list(zip(logprob.tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text."""
        if getattr(self.lm.attn, "when", None) == "prompt":
            log.warning("attn=%s: whole texts are scored without compressing anything; use when=decode or when=stream", self.lm.attn)
        windows, owner = [], []
        for n, (text,) in enumerate(request.args for request in requests):
            for window in utils.get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *utils.make_disjoint_window(window)))
                owner.append(n)
        total = [0.0] * len(requests)
        for n, (logprob, _) in zip(owner, self._loglikelihood_tokens(windows, disable_tqdm, rolling=True), strict=True):
            total[n] += logprob
        for request, logprob in zip(requests, total, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, logprob)
        return total

    # Answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each context, without its stop string. Of generation arguments: until, max_gen_toks, do_sample and SAMPLING."""
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="zoo: generate_until") as bar:
            for group in groups.values():
                until, new_tokens, numbers = self.wanted(requests[group[0]].args[1])
                room = self.max_length - new_tokens
                if room < 1:
                    raise ZooError(f"max_gen_toks={new_tokens} leaves no room for a context within max_length={self.max_length}")
                ids = {i: (self.tok_encode(requests[i].args[0]) or [self.prefix_token_id])[-room:] for i in group}
                for batch in chunks(sorted(group, key=lambda i: -len(ids[i])), self.batch_size):
                    for i, answer in zip(batch, self.generate([ids[i] for i in batch], new_tokens, until, numbers), strict=True):
                        answers[i] = answer
                        self.cache_hook.add_partial("generate_until", requests[i].args, answer)
                        bar.update()
        return answers

    def wanted(self, arguments: dict[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
        """generation_kwargs of a task -> stop strings, new tokens, sampling numbers."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(arguments, self.max_gen_toks))
        end = self.tokenizer.decode([self.eot_token_id], skip_special=False)
        until = [text for text in handle_stop_sequences(given.pop("until", None), eos=end) if text]
        new_tokens, draw = given.pop("max_gen_toks"), given.pop("do_sample", False)
        if given.pop("num_beams", 1) != 1:
            raise ZooError("num_beams: beam search is not supported; only num_beams=1")
        if unknown := sorted(given.keys() - set(SAMPLING)):
            raise ZooError(f"unknown generation argument {unknown[0]!r}; known: until, max_gen_toks, do_sample, {', '.join(SAMPLING)}")
        if not draw:
            return until, new_tokens, {key: given[key] for key in ("repetition_penalty",) if key in given}
        return until, new_tokens, {"temperature": 1.0, **given}

    def generate(self, prompts: list[list[int]], new_tokens: int, until: list[str], numbers: dict[str, Any]) -> list[str]:
        choose = sampler(**numbers)
        self.draws += choose.draw
        ends = self.lm.end_ids | {self.tokenizer.special[text] for text in until if text in self.tokenizer.special}
        texts, pieces = [StopText(self.tokenizer.stream(), until) for _ in prompts], ["" for _ in prompts]
        ended = [False] * len(prompts)
        for new in self.lm.tokens(prompts, new_tokens, choose, self.draws, stopped=lambda i: ended[i] or texts[i].stopped):
            for i, token in enumerate(new):
                ended[i] = ended[i] or token in ends
                if token is not None and not ended[i]:
                    pieces[i] += texts[i].push(token)
        return [piece + text.finish() for piece, text in zip(pieces, texts, strict=True)]


def with_options(attn: str, options: dict[str, Any]) -> str:
    """attn, and the options that lm_eval cut off it, in one spelling. Raises ZooError for what is no option of the method."""
    for key, value in options.items():
        known = [] if (method := ATTENTION.get(attn.partition(":")[0].strip())) is None else list(zoo.attention.options(method))
        if method is not None and key not in known:
            arguments = ", ".join(list(ZooLM.__init__.__annotations__)[:-2])
            raise ZooError(f"unknown model argument {key!r}; known: {arguments}; and options of attn={attn}: {', '.join(known) or 'none'}")
        attn += f"{',' if ':' in attn else ':'}{key}={str(value).lower() if isinstance(value, bool) else value}"
    return attn


def whole(name: str, value: Any) -> int:
    """A count of at least 1, from a number or its text. Raises ZooError."""
    if not str(value).isdigit() or int(value) < 1:
        raise ZooError(f"{name}={value} must be a whole number of at least 1")
    return int(value)


def chunks(items: Sequence[Any], size: int) -> Iterator[Any]:
    return (items[start : start + size] for start in range(0, len(items), size))


def padded(rows: list[list[int]], fill: int) -> Tensor:
    """(B, T) int64, at least one column."""
    T = max(1, *map(len, rows)) if rows else 1
    return torch.tensor([row + [fill] * (T - len(row)) for row in rows])
