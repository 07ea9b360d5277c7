"""python -m zoo.generate "Once upon a time" --attn subgen: prefill, decode, streaming text.

Text goes to standard output; progress, speed and bytes to standard error. Several prompts are answered in one batch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from zoo import cli
from zoo.errors import ZooError


def read(path: str) -> str:
    """A text file, or standard input for `-`."""
    if path == "-" and sys.stdin is None:
        raise ZooError("standard input is closed")
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode()
    except OSError as e:
        raise ZooError(f"cannot read {path}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise ZooError(f"{'standard input' if path == '-' else path} is not UTF-8 text") from None


def listing() -> str:
    """Models, where they are on this machine, and attention methods with their options."""
    import zoo
    from zoo.attention import ATTENTION
    from zoo.hub import KNOWN, available

    lines = ["models (any hub id or folder of these families works too):"]
    for name, model in KNOWN.items():
        licence, where = model.licence + ", gated" * model.gated, available(name) or "-"
        lines.append(f"  {name:24} {model.family:8} {model.gigabytes:6.3g} GB  {licence:15} {where:20} {model.hub_id}@{model.revision[:7]}")
    lines += ["", "attention methods, their options and defaults:"]
    for name, options in zoo.attentions().items():
        said = (f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in options.items())
        spelling = name + (":" + ",".join(said) if options else "")
        lines.append(f"  {spelling:24} exact when: {ATTENTION[name].exact_when}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    p = cli.parser("zoo.generate", "Continue a prompt, or several at once.")
    p.add_argument("prompt", nargs="*", help="text; - reads standard input")
    p.add_argument("--file", action="append", default=[], help="read a prompt from this file; may be given several times")
    p.add_argument("--max-new-tokens", type=int, default=100)
    p.add_argument("--chat", action="store_true", help="put each prompt through the checkpoint's chat template, as one user message")
    p.add_argument("--template", metavar="FILE", help="a jinja file to use as chat template, with --chat")
    p.add_argument("--list", action="store_true", help="show models and attention methods, and stop")
    args = p.parse_args(argv)
    if args.list:
        print(listing())
        return
    prompts = [read("-") if text == "-" else text for text in args.prompt] + [read(path) for path in args.file]
    if not prompts:
        raise ZooError("no prompt; give some text, - for standard input, or --file")
    if not all(prompts):
        raise ZooError("the prompt is empty; give some text")
    if args.max_new_tokens < 1:
        raise ZooError(f"--max-new-tokens {args.max_new_tokens} must be at least 1")
    options = cli.sampling(args)
    if args.template and not args.chat:
        raise ZooError("--template is for --chat: add that, or leave the template out")
    template = read(args.template) if args.template else None
    lm = cli.load(args)
    lm.tokenizer.chat_template = template or lm.tokenizer.chat_template
    if args.chat and lm.tokenizer.chat_template is None:
        raise ZooError(f"{args.model} has no chat template; pass one with --template FILE (jinja)")
    ids = [lm.tokenizer.chat([{"role": "user", "content": text}]) if args.chat else lm.tokenizer.encode(text) for text in prompts]
    answers = ["" for _ in prompts]
    for i, piece in lm.stream_batch(ids, args.max_new_tokens, progress=cli.Progress(), **options):
        answers[i] += piece
        if len(prompts) == 1:
            print(piece, end="", flush=True)
    print("" if len(prompts) == 1 else "\n".join(f"[{i + 1}] {answer}" for i, answer in enumerate(answers)))
    figures = cli.figures(lm)
    print(cli.show(figures), file=sys.stderr)
    if args.json:
        print(json.dumps({"model": args.model, **figures, "answers": answers}))


if __name__ == "__main__":
    sys.exit(cli.run(main))
