"""What the command lines share: their common options, one-line errors, the figures printed at the end."""

from __future__ import annotations

import argparse
import os
import resource
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from zoo.attention.backends import NAMES
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.attention import Attention
    from zoo.lm import LM


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, exit code 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (--help lists the options)\n")


def parser(module: str, description: str) -> Parser:
    p = Parser(prog=f"python -m {module}", description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    loading(p)
    p.add_argument("--attn", default="full", help="attention method, such as full, sliding:window=1024, subgen:budget=25%%")
    p.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    p.add_argument("--top-k", type=int, help="draw from the k likeliest tokens")
    p.add_argument("--top-p", type=float, help="draw from the likeliest tokens that hold this probability")
    p.add_argument("--min-p", type=float, help="draw from tokens at least this share as likely as the likeliest")
    p.add_argument("--repetition-penalty", type=float, help="1 = none")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    p.add_argument("--json", action="store_true", help="print the figures as one JSON object, the last line of standard output")
    return p


def loading(p: argparse.ArgumentParser) -> None:
    """The options that say which model runs, and how; its attention aside."""
    p.add_argument("--model", default="smollm2-135m", help="a name from --list, a hub id, or a folder")
    p.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="the file's own unless given")
    p.add_argument("--device", default="cpu")
    p.add_argument("--compile", default="auto", choices=["auto", "on", "off"], help="torch.compile the decode step; auto: where it pays")
    p.add_argument("--weights", metavar="FORMAT", help="int8: linear layers in another format than the file's (needs the extra `quant`)")
    p.add_argument("--backend", default="auto", help=f"how attention is computed: {', '.join(NAMES)}")
    p.add_argument("--threads", type=int, help="CPU threads; PyTorch's choice unless given")


def count(text: str) -> int:
    """A number of tokens: `4k` is 4096, `7.5k` 7680."""
    try:
        number = int(float(text[:-1]) * 1024) if text[-1:] in ("k", "K") else int(text)
    except (ValueError, OverflowError):
        raise ZooError(f"a context of {text!r} tokens is no number; write 256 or 4k") from None
    if number < 1:
        raise ZooError(f"a context of {text} tokens is too short; at least 1")
    return number


def load(args: argparse.Namespace) -> LM:
    import zoo

    set_threads(args.threads)
    lm = zoo.load(
        args.model,
        attn=args.attn,
        dtype=args.dtype,
        device=args.device,
        compile=args.compile,
        backend=args.backend,
        weights=args.weights,
    )
    tell([lm.attn], lm.config)
    return lm


def tell(methods: Sequence[Attention], config: Any) -> None:
    """What must be known of methods that were chosen, on standard error."""
    for note in dict.fromkeys(note for method in methods if (note := method.note(config))):
        print(f"note: {note}", file=sys.stderr)


def set_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        if not 1 <= threads <= 1024:
            raise ZooError(f"--threads {threads} must be between 1 and 1024")
        torch.set_num_threads(threads)


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The options of LM.stream that the command line gave; checked before a model is loaded."""
    from zoo.sampling import sampler

    numbers = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
    sampler(**numbers)
    if not all(args.stop):
        raise ZooError("--stop '' is empty; leave it out instead")
    return {**numbers, "seed": args.seed, "stop": args.stop}


class Progress:
    """A bar on standard error for prompts that take over a second."""

    def __init__(self) -> None:
        self.bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(total=total, delay=1, leave=False, unit="token", desc="reading the prompt", file=sys.stderr)
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.bar.close()
            self.bar = None


def figures(lm: LM) -> dict[str, Any]:
    """What the last generation did: tokens, speeds (per second), seconds, bytes."""
    s, cache = lm.stats, lm.cache
    nbytes = cache.nbytes() if cache is not None else (0, 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "attn": str(lm.attn),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "backend": lm.backend,
        "compiled_steps": lm.step.ran["compiled"],
        "prompt_tokens": s.prompt_tokens,
        "new_tokens": s.new_tokens,
        "stopped_by": s.stopped_by,
        "prefill_tokens_per_second": finite(s.prefill_rate),
        "decode_tokens_per_second": finite(s.decode_rate),
        "first_token_seconds": round(s.first_token_seconds, 3),
        "cache_bytes_used": nbytes[0],
        "cache_bytes_allocated": nbytes[1],
        "cache_bytes_peak": max(s.cache_peak_bytes, nbytes[1]),
        "peak_memory_bytes": peak,
    }


def finite(x: float) -> float | None:
    return round(x, 1) if x == x else None


def show(f: dict[str, Any]) -> str:
    """The figures for people, two lines."""
    speed = f["decode_tokens_per_second"]
    return (
        f"prompt {f['prompt_tokens']} tokens at {f['prefill_tokens_per_second']} tokens/s; new {f['new_tokens']} tokens"
        f"{f' at {speed} tokens/s' if speed else ''}; first token after {f['first_token_seconds']} s\n"
        f"{f['attn']} cache {mib(f['cache_bytes_used'])} used, {mib(f['cache_bytes_allocated'])} allocated, "
        f"{mib(f['cache_bytes_peak'])} at its peak; "
        f"{f['dtype']}{', compiled' if f['compiled_steps'] else ''}; peak memory {mib(f['peak_memory_bytes'])}"
    )


def mib(n: int) -> str:
    return f"{n / 2**20:.1f} MiB"


def run(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> int:
    """Exit codes: 0; 2 for what the user can mend, one line on standard error; 130 for Ctrl-C."""
    try:
        main(argv)
        print(end="", flush=True)  # unlike sys.stdout.flush(), right where standard output is closed
        return 0
    except ZooError as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on: the interpreter's own flush must not fail too
        return 0
    except OSError as e:
        print(f"error: {e.strerror or e}{f': {e.filename}' if e.filename else ''}", file=sys.stderr)
        if e.errno == 28:  # a full disk behind standard output: the same flush again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UnicodeEncodeError as e:
        print(f"error: standard output takes only {e.encoding} text; set PYTHONIOENCODING=utf-8", file=sys.stderr)
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, MemoryError) and "out of memory" not in str(e) and "can't allocate memory" not in str(e):
            raise
        print("error: out of memory; a smaller model, dtype or --attn budget needs less", file=sys.stderr)
    return 2
