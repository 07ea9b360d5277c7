"""Attention methods by name. One spelling everywhere: `name:option=value,option=value`, such as `subgen:budget=25%`; and `+`, which stores
what a method with a budget keeps as an encoding's codes: `subgen:budget=25%+kivi:bits=4`."""

from __future__ import annotations

import dataclasses
import math
import re
import typing

from zoo.attention.balancekv import BalanceKV
from zoo.attention.budget import Budget
from zoo.attention.budgeted import Budgeted
from zoo.attention.cache import Attention
from zoo.attention.encoding import Encoding
from zoo.attention.full import Full
from zoo.attention.h2o import H2O
from zoo.attention.keydiff import KeyDiff
from zoo.attention.kivi import Kivi
from zoo.attention.kvsharer import KVSharer
from zoo.attention.l2norm import L2Norm
from zoo.attention.pod import Pod
from zoo.attention.qjl import QJL
from zoo.attention.sinks import Sinks
from zoo.attention.sliding import Sliding
from zoo.attention.snapkv import SnapKV
from zoo.attention.subgen import SubGen
from zoo.attention.subgen_kcenter import SubGenKCenter
from zoo.attention.subgen_paper import SubGenPaper
from zoo.attention.tova import Tova
from zoo.attention.turboquant import TurboQuant
from zoo.attention.uniform import Uniform
from zoo.errors import ZooError

ATTENTION: dict[str, type[Attention]] = {
    "full": Full,
    "sliding": Sliding,
    "kvsharer": KVSharer,
    "pod": Pod,
    "subgen": SubGen,
    "subgen_kcenter": SubGenKCenter,
    "subgen_paper": SubGenPaper,
    "sinks": Sinks,
    "uniform": Uniform,
    "h2o": H2O,
    "snapkv": SnapKV,
    "tova": Tova,
    "l2norm": L2Norm,
    "keydiff": KeyDiff,
    "balancekv": BalanceKV,
    "kivi": Kivi,
    "qjl": QJL,
    "turboquant": TurboQuant,
}


def options(method: type[Attention]) -> dict[str, tuple[type, object]]:
    """Option name -> (type, default) of a method."""
    types = typing.get_type_hints(method)
    return {f.name: (types[f.name], f.default) for f in dataclasses.fields(method) if not f.kw_only}


def split(spelling: str) -> list[str]:
    """What stands between `+`, which is a number's in 1e+3."""
    return re.split(r"\+(?!\d)", spelling)


def parse(spelling: str | Attention) -> Attention:
    """`"sliding:window=4096"` -> Sliding(window=4096); an Attention is returned as it is. Raises ZooError for an unknown name or option,
    listing the known ones, and for a value that is out of bounds, naming the bound."""
    if isinstance(spelling, Attention):
        return spelling
    first, *others = split(spelling)
    return stacked(spelling, parse_one(first), [parse_one(other) for other in others]) if others else parse_one(first)


def stacked(spelling: str, method: Attention, encodings: list[Attention]) -> Attention:
    """A method with a budget, its settled slots encoded. Raises ZooError for what cannot be stacked."""
    if isinstance(method, Budgeted) and len(encodings) == 1 and isinstance(encoding := encodings[0], Encoding):
        alone = [name for name in ("residual", "when") if getattr(encoding, name) != getattr(type(encoding), name)]
        if alone:
            raise ZooError(
                f"{spelling}: {alone[0]} is for {str(encoding).partition(':')[0]} alone; stacked, {method} says what stays exact"
            )
        return dataclasses.replace(method, encoding=encoding)
    on, under = (", ".join(n for n, kind in ATTENTION.items() if issubclass(kind, k)) for k in (Budgeted, Encoding))
    raise ZooError(f"{spelling}: + stacks one method with a budget ({on}) on one encoding ({under})")


def parse_one(spelling: str) -> Attention:
    """A method without `+`."""
    name, colon, rest = spelling.strip().partition(":")
    if name not in ATTENTION:
        raise ZooError(f"unknown attention method {name!r}; known: {', '.join(sorted(ATTENTION))}")
    known, chosen = options(ATTENTION[name]), {}
    for part in rest.split(",") if colon else []:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key in known and not equals:
            raise ZooError(f"{name}: option {key!r} has no value; write {key}={known[key][1]}, or another")
        if key not in known:
            listing = ", ".join(f"{k}={str(d).lower() if kind is bool else d}" for k, (kind, d) in known.items()) or "none"
            raise ZooError(f"{name}: unknown option {part.strip()!r}; options and their defaults: {listing}")
        if key in chosen:
            raise ZooError(f"{name}: option {key!r} is given twice")
        chosen[key] = convert(name, key, known[key][0], value)
    return ATTENTION[name](**chosen)


def convert(name: str, key: str, kind: type, value: str) -> object:
    """An option's text as its type. Raises ZooError."""
    if kind is bool and value in ("true", "false"):
        return value == "true"
    try:
        if kind is bool or (kind is float and not math.isfinite(float(value))):
            raise ValueError
        return Budget.parse(value) if kind is Budget else kind(value)
    except ValueError:
        expected = {
            "Budget": "a number of tokens such as 1024, or a share such as 25% or 25%/256",
            "int": "a whole number",
            "float": "a number",
            "bool": "true or false",
        }
        raise ZooError(f"{name}: {key}={value!r} is not {expected[kind.__name__]}") from None


__all__ = ["ATTENTION", "Attention", "Budget", "Full", "Sliding", "SubGen", "options", "parse"]
