"""python -m zoo.chat: a conversation that keeps its cache between turns, so that only the new turn is read.

Commands: /reset forgets the conversation, /stats shows the last turn's figures, /attn NAME switches the attention method, /help, /exit.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from zoo import cli
from zoo.attention import parse
from zoo.attention.cache import Caches
from zoo.errors import ZooError
from zoo.lm import LM

HELP = "commands: /reset /stats /attn NAME:OPTION=VALUE /help /exit"


class Conversation:
    """Messages, and a cache that has read them as far as `text`."""

    def __init__(self, lm: LM, system: str | None, max_new_tokens: int, options: dict[str, Any]) -> None:
        self.lm, self.system, self.max_new_tokens, self.options = lm, system, max_new_tokens, options
        self.reset()

    def reset(self) -> None:
        self.messages: list[dict[str, str]] = [{"role": "system", "content": self.system}] if self.system else []
        self.forget()

    def forget(self) -> None:
        """Drop the cache; the next turn reads the conversation again."""
        self.cache: Caches | None = None
        self.text = ""  # what the cache stands for, as the template renders it
        self.read: list[int] = []  # the tokens behind `text`, for the repetition penalty
        self.unread: list[int] = []  # the last answer's final token, when it was cut before the cache had seen it

    def say(self, message: str) -> Iterator[str]:
        """The answer to one more user message, in pieces. On any error or interruption the message is taken back."""
        tokenizer = self.lm.tokenizer
        before = list(self.messages)
        self.messages.append({"role": "user", "content": message})
        try:
            text = tokenizer.render(self.messages)
            if self.cache is None or not text.startswith(self.text):
                self.forget()
            ids = self.unread + tokenizer.encode(text[len(self.text) :], bos=False, special=True)
            if self.cache is None:
                self.cache = self.lm.new_cache()
            answer, tokens = "", Recorder(tokenizer.stream())
            kept: dict[str, Any] = {"cache": self.cache, "context": self.read, "decoder": tokens, "progress": cli.Progress()}
            for piece in self.lm.stream(ids, self.max_new_tokens, **kept, **self.options):
                answer += piece
                yield piece
        except BaseException:
            self.messages = before
            self.forget()
            raise
        self.messages.append({"role": "assistant", "content": answer})
        self.text, self.read = text + answer, [*self.read, *ids, *tokens.ids]
        # The last new token was never fed: an end token stands in the next turn's text, any other must be read then.
        self.unread = tokens.ids[-1:] if self.lm.stats.stopped_by != ["end token"] else []
        if self.lm.stats.stopped_by == ["stop string"]:
            self.forget()  # the cache has read past what the conversation keeps


class Recorder:
    """A streaming decoder that remembers its tokens."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.ids = stream, list[int]()

    def push(self, token: int) -> str:
        self.ids.append(token)
        return self.stream.push(token)

    def finish(self) -> str:
        return self.stream.finish()


def command(line: str, talk: Conversation, figures: dict[str, Any] | None) -> None:
    """Carry out /reset, /stats, /attn or /help; answers go to standard error."""
    name, _, rest = line.partition(" ")
    if name == "/reset":
        talk.reset()
        print("forgotten", file=sys.stderr)
    elif name == "/stats":
        print(cli.show(figures) if figures else "nothing has been said yet", file=sys.stderr)
    elif name == "/attn" and not rest.strip():
        print(f"attention is {talk.lm.attn}", file=sys.stderr)
    elif name == "/attn":
        talk.lm.attn = parse(rest.strip())
        cli.tell([talk.lm.attn], talk.lm.config)
        talk.forget()
        print(f"attention is {talk.lm.attn}; the conversation is read again", file=sys.stderr)
    else:
        print(HELP, file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    p = cli.parser("zoo.chat", "Talk with a model. " + HELP)
    p.add_argument("--system", help="a system message; the template's own unless given")
    p.add_argument("--max-new-tokens", type=int, default=512, help="per answer")
    p.add_argument("--template", help="a jinja file to use as chat template")
    args = p.parse_args(argv)
    if args.max_new_tokens < 1:
        raise ZooError(f"--max-new-tokens {args.max_new_tokens} must be at least 1")
    if sys.stdin is None:
        raise ZooError("standard input is closed")
    options = cli.sampling(args)
    lm = cli.load(args)
    if args.template:
        from zoo.generate import read

        lm.tokenizer.chat_template = read(args.template)
    if lm.tokenizer.chat_template is None:
        raise ZooError(f"{args.model} has no chat template; pass one with --template FILE (jinja)")
    talk = Conversation(lm, args.system, args.max_new_tokens, options)
    figures: dict[str, Any] | None = None
    turns: list[dict[str, Any]] = []
    if sys.stdin.isatty():
        print(HELP, file=sys.stderr)
    while True:
        try:
            print("> ", end="", file=sys.stderr, flush=True)
            line = input().strip()
        except EOFError:
            break
        except UnicodeDecodeError:
            raise ZooError("standard input is not UTF-8 text") from None
        if not line:
            continue
        try:
            if line in ("/exit", "/quit"):
                break
            if line.startswith("/"):
                command(line, talk, figures)
                continue
            for piece in talk.say(line):
                print(piece, end="", flush=True)
            print()
            figures = cli.figures(lm)
            turns.append({**figures, "answer": talk.messages[-1]["content"]})
        except ZooError as e:
            print(f"error: {e}", file=sys.stderr)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print("\n(answer dropped)", file=sys.stderr)
    print(file=sys.stderr)
    if args.json:
        print(json.dumps({"model": args.model, "turns": turns}))


if __name__ == "__main__":
    sys.exit(cli.run(main))
