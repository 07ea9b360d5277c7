"""Means with intervals, and differences paired by sample.

Rows of two methods with the same task, variant, protocol, question, length and sample were asked the same prompt. Prompts differ far more
than methods do, so a method is compared by the differences on each prompt, not by two means. Intervals are bootstrap percentiles: the mean
of n rows drawn with replacement, 10,000 times. Those of few rows would be too narrow (of 8, one true tie in ten would be called distinct),
so the percentiles are expanded to what Student's t has there (Hesterberg, 2015, arXiv 1411.5279). Skewed scores still need more rows.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import torch

DRAWS = 10_000
Row = dict[str, Any]
CELL = ("task", "group", "attn", "protocol", "question", "length")


def interval(values: Sequence[float], draws: int = DRAWS) -> tuple[float, float] | None:
    """95 % bootstrap interval of the mean; the same values give the same interval. None of fewer than two."""
    if len(values) < 2:
        return None
    means = torch.tensor(values, dtype=torch.float64)[picks(len(values), draws)].mean(1)
    low, high = means.quantile(torch.tensor([tail(len(values)), 1 - tail(len(values))], dtype=torch.float64)).tolist()
    return low, high


@functools.cache
def tail(n: int) -> float:
    """The share of bootstrap means of n rows that lies below a 95 % interval: Phi(-sqrt(n / (n - 1)) t), t the 97.5 % point of Student's t
    with n - 1 degrees of freedom; 0.025 for many."""
    below, above, free = 0.0, 100.0, n - 1
    scale = math.exp(math.lgamma((free + 1) / 2) - math.lgamma(free / 2)) / math.sqrt(free * math.pi)
    while above - below > 1e-9:  # the area between 0 and t is 0.475
        t = (below + above) / 2
        x = torch.linspace(0, t, 20_001, dtype=torch.float64)
        area = float(torch.trapezoid(scale * (1 + x * x / free) ** (-(free + 1) / 2), x))
        below, above = (t, above) if area < 0.475 else (below, t)
    return statistics.NormalDist().cdf(-math.sqrt(n / free) * below)


@functools.lru_cache(maxsize=4)
def picks(n: int, draws: int) -> torch.Tensor:
    """(draws, n): which of n rows each draw takes."""
    return torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(0))


def group(variant: str) -> str:
    """A variant without its grid: "multikey,depth=0.25" belongs to "multikey"."""
    return ",".join(part for part in variant.split(",") if "=" not in part)


def cell_of(row: Row) -> tuple[Any, ...]:
    return (row["task"], group(row["variant"]), row["attn"], row["protocol"], row["question"], row["length"])


def prompt_of(row: Row) -> tuple[Any, ...]:
    """What rows that were asked the same have in common, their method aside."""
    return (row["task"], row["variant"], row["protocol"], row["question"], row["length"], row["sample"], row["seed"])


def estimate(values: Sequence[float]) -> dict[str, Any]:
    low_high = interval(values)
    mean = sum(values) / len(values)
    return rounded({"mean": mean, "low": low_high and low_high[0], "high": low_high and low_high[1], "n": len(values)})


def difference(rows: Iterable[Row], others: dict[tuple[Any, ...], Row], score: str) -> dict[str, Any] | None:
    """Mean of score minus the other's score at the same prompts. `distinct`: whether the interval leaves out 0."""
    pairs = [(row["scores"][score], other["scores"].get(score)) for row in rows if (other := others.get(prompt_of(row)))]
    values = [a - b for a, b in pairs if a is not None and b is not None]
    if not values:
        return None
    out = estimate(values)
    out["distinct"] = None if out["low"] is None else not out["low"] <= 0 <= out["high"]
    return out


def summary(rows: Sequence[Row], baseline: str | None = None) -> list[dict[str, Any]]:
    """One dict for each cell, in the order in which they first come: CELL; scores: name -> mean, low, high, n, to_full and to_baseline (the
    mean difference, low, high, n, distinct; None for itself, or where nothing pairs); bytes: means, and `share` of the full cache."""
    cells: dict[tuple[Any, ...], list[Row]] = {}
    by_method: dict[str, dict[tuple[Any, ...], Row]] = {}
    for row in rows:
        cells.setdefault(cell_of(row), []).append(row)
        by_method.setdefault(row["attn"], {})[prompt_of(row)] = row
    out = []
    for key, some in cells.items():
        cell: dict[str, Any] = dict(zip(CELL, key, strict=True)) | {"n": len(some), "scores": {}}
        for score in some[0]["scores"]:
            values = [v for row in some if (v := row["scores"].get(score)) is not None]
            if not values:
                continue
            cell["scores"][score] = estimate(values)
            for name, attn in (("to_full", "full"), ("to_baseline", baseline)):
                same = attn is None or attn == cell["attn"]
                cell["scores"][score][name] = None if same else difference(some, by_method.get(attn or "", {}), score)
        tokens = sum(row["tokens"] for row in some) / len(some)
        nbytes = {name: sum(row["bytes"][name] for row in some) / len(some) for name in ("peak", "final", "full", "tokens")}
        cell["tokens"] = round(tokens, 1)
        cell["bytes"] = {name: round(nbytes[name]) for name in ("peak", "final", "full")}
        if all("allocated" in row["bytes"] for row in some):  # older records have it not
            cell["bytes"]["allocated"] = round(sum(row["bytes"]["allocated"] for row in some) / len(some))
        cell["bytes"]["per_token"] = round(nbytes["final"] / nbytes["tokens"], 1)
        cell["bytes"]["share"] = round(nbytes["final"] / nbytes["full"], 4)
        cell["bytes"]["peak_share"] = round(nbytes["peak"] / nbytes["full"], 4)
        out.append(cell)
    return out


def rounded(x: Any) -> Any:
    """Floats to 6 significant digits; what is not finite becomes None: JSON has no word for it."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(value) for value in x]
    if isinstance(x, float):
        return float(f"{x:.6g}") if abs(x) < float("inf") else None
    return x
