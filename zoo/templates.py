"""Chat templates: Jinja programs that come with a checkpoint, so somebody else's, run with a budget.

Nothing of Python can be reached: attributes are those of data (see METHODS), names are the arguments and a few functions, filters and
tests are those listed here. What is bounded:

- the source: MAX_TEMPLATE characters and MAX_NODES names, constants and operations, which compile in less than a second and 50 MB;
- work and memory: a rendering has `BUDGET` units, more for a longer conversation (see `render`), and every loop turn, call, filter, test
  and operation takes STEP of them, every character that is made, compared or searched one. So a rendering makes at most that many
  characters in all, the output among them, and an endless loop ends. What could be large is paid for before it is made.

Jinja's sandbox alone bounds neither: `'a' * 10**9` is a program of a dozen characters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes as nodes
import jinja2.parser
import jinja2.sandbox
from jinja2.runtime import LoopContext, Macro
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_TEMPLATE, MAX_NODES = 60_000, 5_000
BUDGET, MAX_BUDGET, STEP = 4_000_000, 100_000_000, 20

TEXT = ["capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit", "islower", "isnumeric", "isspace", "istitle"]
TEXT += ["isupper", "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rpartition", "rsplit"]
TEXT += ["rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper"]
METHODS: dict[type, list[str]] = {
    str: TEXT,
    dict: ["get", "items", "keys", "values"],
    list: ["count", "index"],
    LoopContext: ["changed", "cycle", "depth", "depth0", "first", "index", "index0", "last", "length", "nextitem", "previtem"],
    Macro: ["name"],
}
METHODS[LoopContext] += ["revindex", "revindex0"]
# Filters and tests pay for what they are given, through and through; the cheap ones pay a step.
FILTERS = ["capitalize", "dictsort", "escape", "e", "float", "int", "join", "list", "lower", "max", "min", "replace", "sort", "string"]
FILTERS += ["title", "trim", "unique", "upper", "wordcount", "groupby", "map", "select", "reject", "selectattr", "rejectattr", "reverse"]
CHEAP_FILTERS = ["abs", "count", "d", "default", "first", "items", "last", "length", "safe"]
TESTS = ["==", "eq", "equalto", "!=", "ne", "<", "lt", "lessthan", "<=", "le", ">", "gt", "greaterthan", ">=", "ge", "in", "lower", "upper"]
CHEAP_TESTS = [
    "boolean",
    "callable",
    "defined",
    "divisibleby",
    "even",
    "false",
    "float",
    "integer",
    "iterable",
    "mapping",
    "none",
    "number",
]
CHEAP_TESTS += ["odd", "sameas", "sequence", "string", "true", "undefined"]

VIEWS: tuple[Any, ...] = (type({}.items()), type({}.keys()), type({}.values()))

_left: ContextVar[list[int]] = ContextVar("what is left of the budget")


def render(source: str, messages: list[dict[str, Any]], given: dict[str, Any]) -> str:
    """Raises whatever the template does. The budget allows to write the whole conversation anew for every message,
    twice, as long as that is below MAX_BUDGET."""
    if len(source) > MAX_TEMPLATE:
        raise jinja2.TemplateError(f"{len(source):,} characters, and a template has at most {MAX_TEMPLATE:,}")
    account = [MAX_BUDGET]
    token = _left.set(account)
    try:
        size = weigh(messages)
        account[0] = min(BUDGET + 2 * (len(messages) + 16) * size, MAX_BUDGET)
        return _compile(source).render(messages=messages, **given)
    finally:
        _left.reset(token)


def spend(units: int) -> None:
    account = _left.get(None)  # there is none while a template is compiled
    if account is not None:
        account[0] -= units
        if account[0] < 0:
            raise jinja2.TemplateError("it does not end, or makes too much text")


def weigh(value: Any) -> int:
    """The characters and items of a value, through and through. Spends as it counts: a list of itself twice, and so on, is endless."""
    total, todo = 0, [value]
    while todo:
        value = todo.pop()
        weight = STEP + (len(value) if isinstance(value, str) else value.bit_length() // 3 if isinstance(value, int) else 0)
        spend(weight)
        total += weight
        if isinstance(value, dict):
            todo += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            todo += value
        elif isinstance(value, VIEWS):
            todo.extend(value)
        elif not (value is None or isinstance(value, str | int | float | range | Namespace | jinja2.Undefined | LoopContext | Macro)):
            raise jinja2.TemplateError(f"a {type(value).__name__} is no text")  # a function, say
    return total


def product(value: Any, times: int) -> None:
    """Pays for `times` copies before they are made."""
    weight = weigh(value)
    spend(weight * max(times, 0))


def format_percent(form: str, values: Any) -> str:
    """`form % values` without widths of more than two digits: '%1000000000d' is a giant."""
    if jinja2.filters.re.search(r"%[^%a-zA-Z]*(?:\d{3}|\*)", form):
        raise jinja2.TemplateError("a width of more than two digits")
    product(values, form.count("%"))
    spend(len(form) + 100 * form.count("%"))
    return form % values


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])
    intercepted_unops = frozenset(["+", "-"])

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, Namespace):
            return not attr.startswith("_")
        return any(attr in names for kind, names in METHODS.items() if isinstance(obj, kind))

    def wrap_str_format(self, value: Any) -> None:
        """Jinja lets str.format pass before it asks whether it is safe; no chat template needs it, and its widths have no limit."""

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        spend(STEP)
        if operator == "%" and isinstance(left, str):
            return format_percent(left, right)
        if operator == "*" and not isinstance(left, int | float):
            left, right = right, left
        if operator == "*" and isinstance(left, int) and not isinstance(right, int | float):
            product(right, left)
        elif operator == "+" and not isinstance(left, int | float):
            for side in (left, right):
                spend(len(side) if isinstance(side, str) else STEP * len(side) if isinstance(side, list | tuple) else 0)
        elif operator == "**" and not (abs(left) < 1 << 32 and abs(right) < 1 << 6):
            raise jinja2.TemplateError("a number too large")
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > 4096:
            raise jinja2.TemplateError("a number too large")
        return result

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        spend(STEP)
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str):
            if name == "join":
                args = (list(args[0]),)
            weigh([owner, *args, *kwargs.values()])
            if name == "replace":
                old, new = args[:2]
                product(new, owner.count(old))
            elif name == "join":
                product(owner, len(args[0]))
            elif name in ("split", "rsplit", "splitlines"):
                separator = args[0] if args else kwargs.get("sep")
                spend(STEP * (owner.count(separator) if isinstance(separator, str) and separator else len(owner) // 2))
        elif isinstance(owner, list | LoopContext):
            weigh([owner if isinstance(owner, list) else 0, *args])
        elif isinstance(owner, dict):
            weigh(list(args))
            spend(STEP * len(owner) if name != "get" else 0)
        return super().call(context, obj, *args, **kwargs)


def _paid(function: Callable[..., Any], cheap: bool, fixed: Callable[..., None] | None = None) -> Callable[..., Any]:
    """A filter or test that spends. It takes the context, and so it is never run while the template is compiled."""
    wanted = getattr(function, "jinja_pass_arg", None)
    kind = wanted.name if wanted is not None else ""

    @jinja2.pass_context
    def paid(context: Any, value: Any = "", *args: Any, **kwargs: Any) -> Any:
        spend(STEP)
        if not cheap:
            if not isinstance(value, str | list | tuple | dict | range) and isinstance(value, Iterable) and not hasattr(value, "__len__"):
                value = list(value)  # what `map` and its like return
            weigh([value, *args, *kwargs.values()])
            spend(STEP * len(value) if isinstance(value, str | range) else 0)  # a list of its letters or numbers
        if fixed is not None:
            fixed(value, *args, **kwargs)
        first = {"context": (context,), "eval_context": (context.eval_ctx,), "environment": (context.environment,)}.get(kind, ())
        return function(*first, value, *args, **kwargs)

    return paid


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Jinja's own filter escapes HTML."""
    if (indent if isinstance(indent, int) else len(indent or "")) > 16 or len("".join(separators or "")) > 16:
        raise jinja2.TemplateError("an indent of more than 16")
    product(value, 16 if indent else 1)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    product(width if isinstance(width, str) else "", text.count("\n"))
    spend(width * (text.count("\n") + 1) if isinstance(width, int) else 0)
    return jinja2.filters.do_indent(text, width, first, blank)


def _format(form: str, *args: Any, **kwargs: Any) -> str:
    return format_percent(str(form), kwargs or args)


def _concat(parts: list[Any]) -> str:
    return "".join(map(str, parts))


def _pay_join(value: Any, d: str = "", attribute: Any = None) -> None:
    product(d, len(value))


def _pay_replace(text: Any, old: str, new: str, count: int | None = None) -> None:
    product(new, str(text).count(old))


class Meter(NodeTransformer):
    """Puts the spending into the template: where loops turn, and where Jinja's code would make or compare values by itself."""

    def body(self, node: Any) -> Any:
        """A loop or macro pays for each turn, and for the text in it, since text is written without asking."""
        written = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(written + STEP), "zoo_spend"), lineno=node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = body

    def visit_Concat(self, node: Any) -> Any:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes), "zoo_concat")

    def visit_Compare(self, node: Any) -> Any:
        self.generic_visit(node)
        node.expr = _filter(node.expr, "zoo_seen")
        for operand in node.ops:
            operand.expr = _filter(operand.expr, "zoo_searched" if operand.op in ("in", "notin") else "zoo_seen")
        return node

    def visit_Tuple(self, node: Any) -> Any:
        self.generic_visit(node)
        return _filter(node, "zoo_weighed") if node.ctx == "load" else node

    def visit_Getitem(self, node: Any) -> Any:
        self.generic_visit(node)
        return _filter(node, "zoo_made") if isinstance(node.arg, nodes.Slice) else node

    def refuse(self, node: Any) -> Any:
        raise jinja2.TemplateSyntaxError(f"{type(node).__name__.lower()} is not for chat templates", node.lineno)

    visit_Include = visit_Import = visit_FromImport = visit_Extends = visit_Block = visit_ScopedEvalContextModifier = refuse


def _filter(node: Any, name: str) -> Any:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _made(value: Any) -> Any:
    spend(STEP + (len(value) if isinstance(value, str) else STEP * len(value) if isinstance(value, list | tuple) else 0))
    return value


def _seen(value: Any) -> Any:
    """Strings are compared and searched at many characters a step."""
    if isinstance(value, str):
        spend(STEP + len(value) // 16)
    elif isinstance(value, list | tuple | dict):
        weigh(value)
    return value


def _searched(value: Any) -> Any:
    return value if isinstance(value, dict) else _seen(value)


def _weighed(value: Any) -> Any:
    weigh(value)
    return value


def _finalize(value: Any) -> Any:
    weigh(value)
    return value


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here only its body counts."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


@lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    """The environment that chat templates are written for, less what none of them needs."""
    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation], finalize=_finalize, cache_size=0
    )
    known: dict[str, Any] = dict(environment.filters)
    tests: dict[str, Any] = dict(environment.tests)
    fixed: dict[str, Any] = {"join": _pay_join, "replace": _pay_replace}
    filters = {name: _paid(known[name], False, fixed.get(name)) for name in FILTERS}
    filters |= {name: _paid(known[name], True) for name in CHEAP_FILTERS}
    filters |= {"tojson": _paid(_tojson, True), "indent": _paid(_indent, False), "format": _paid(_format, False)}
    own: dict[str, Any] = {"spend": spend, "concat": _concat, "seen": _seen, "searched": _searched, "weighed": _weighed, "made": _made}
    environment.filters = filters | {f"zoo_{name}": _paid(function, name != "concat") for name, function in own.items()}
    environment.tests = {name: _paid(tests[name], False) for name in TESTS} | {name: _paid(tests[name], True) for name in CHEAP_TESTS}
    environment.globals = {name: environment.globals[name] for name in ("range", "dict", "namespace")}
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
    tree = environment.parse(source)
    if sum(1 for _ in tree.find_all(nodes.Expr)) > MAX_NODES:
        raise jinja2.TemplateError(f"more than {MAX_NODES:,} names, constants and operations")
    return environment.from_string(Meter().visit(tree))
