"""The report's plots, as SVG that takes its colours from the page: light or dark, without a second rendering.

Matplotlib is given colours that mean nothing; in the SVG they become CSS variables (--c0, --c1, ... for series) and currentColor. Text
stays text, in the page's font.

    frontier    a score against the bytes that it costs       curves      a score against the prompt's length
    heat        a score against depth and length              bytes_used  bytes of the cache against tokens
    times       milliseconds a token against length
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from zoo.attention import split
from zoo.eval import stats
from zoo.eval.metrics import BETTER
from zoo.eval.report import Cell, Part, counted, main_score

INK, COLOURS = "#010101", 10  # of text and axes; so many series have a colour of their own
BLACK = "#000100"  # on a ground of its own: of plain black nothing is written, as if it were to follow the page
MARKERS = "osD^vP*X<>"
BUDGET = re.compile(r"[:,](budget|window|delta)=((?:[^,+]|\+(?=\d))*)")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "zoo",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
Line = tuple[list[float], list[float], list[tuple[float, float]] | None]  # x, y, and what stands around y


def family(attn: str) -> str:
    """A method without its budget: what one line of a plot is."""
    name, *encoding = split(BUDGET.sub("", attn))
    return "+".join((name if ":" in name or "," not in name else name.replace(",", ":", 1), *encoding))


def budget(attn: str) -> str:
    """`budget=25%`, whatever a method calls it: what one panel of a plot has in common; "" without one."""
    found = BUDGET.search(attn)
    return "" if found is None else found[2] if found[1] != "delta" else f"delta={found[2]}"


def colour(i: int) -> str:
    return f"#0000{i % COLOURS:02x}" if i % COLOURS else "#00000a"


def svg(figure: Figure, title: str) -> str:
    """The figure as an element for a page."""
    out = io.StringIO()
    FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    width = re.search(r'viewBox="0 0 ([\d.]+)', text)
    assert width is not None
    # Smaller: no metadata, no ids but those referred to, no font (the page's), coordinates to a tenth of a point.
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    used = set(re.findall(r"#([\w.]+)", text))
    number = f"p{zlib.crc32(text.encode()):08x}-"  # ids are those of one file; a page holds many
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{number}{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{number}", text)
    text = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", text, count=1)
    text = re.sub(r" font-family: [^;\"]*;?| transform=\"rotate\(-0[^\"]*\"", "", text)
    text = re.sub(r"<[^>]*>", lambda m: re.sub(r"(\d\.\d)\d+", r"\1", m[0]), text)
    text = re.sub(r"\s*\n\s*", " ", text).replace("> <", "><")
    text = re.sub(r"#0000(0[1-9a])", lambda m: f"var(--c{int(m[1], 16) % COLOURS})", text).replace(INK, "currentColor")
    head = f'<svg role="img" aria-label="{escape(title)}" style="width: {1.35 * float(width[1]):.0f}px"'
    return text.replace("<svg", head, 1)


def alone(text: str, theme: str) -> str:
    """A page's plot as a file of its own: with the page's variables, in light and dark, and a ground."""
    style = f"<style>{theme} svg {{ color: var(--ink); background: var(--panel); font-family: system-ui, sans-serif; }}</style>"
    return re.sub(r"(<svg[^>]*>)", rf"\g<1>{style}", text, count=1)


def panels(
    titles: Sequence[str], each: Callable[[Any, int], None], names: Sequence[str], used: Sequence[str], title: str, xlabel: str, ylabel: str
) -> str:
    """Plots side by side, at most four in a row, with one legend of the names used: each(axes, i) draws the i-th."""
    with rc_context(STYLE):
        legend = 0.55 + 0.075 * max(map(len, used), default=0)  # inches, about
        figure, panes = laid_out(len(titles), (2.6, 2.1), (0.22, 0.4), right=legend)
        for i, axes in enumerate(panes):
            each(axes, i)
            axes.set_title(titles[i])
        low, high = min(axes.dataLim.y0 for axes in panes), max(axes.dataLim.y1 for axes in panes)
        if high - low < 1e-9 and panes[0].get_yscale() == "linear":  # else numbers all alike get a scale of 1e-17
            panes[0].set_ylim(low - 0.5, high + 0.5)
        below(figure, xlabel, ylabel)
        marks = [panes[0].plot([], [], label=name, **look(i))[0] for i, name in enumerate(names) if name in used]
        figure.legend(handles=marks, loc="upper right")
        return svg(figure, title)


def laid_out(count: int, size: tuple[float, float], gap: tuple[float, float], right: float = 0.1) -> tuple[Figure, list[Any]]:
    """A figure with so many panes of this size and gap (inches), at most four in a row, and room for labels around them. Matplotlib's own
    layout engines take longer than the drawing."""
    across, down = min(4, count), -(-count // 4)
    left, top, bottom = 0.8, 0.3, 0.55
    width = left + across * size[0] + (across - 1) * gap[0] + right
    height = top + down * size[1] + (down - 1) * gap[1] + bottom
    figure = Figure(figsize=(width, height))
    panes: Any = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height, gap[0] / size[0], gap[1] / size[1])
    for axes in panes.flat[count:]:
        axes.remove()
    for axes in panes.flat[max(0, count - across) : count]:
        axes.tick_params(labelbottom=True)  # also where a row below has nothing
    return figure, list(panes.flat[:count])


def below(figure: Figure, xlabel: str, ylabel: str) -> None:
    width, height = figure.get_size_inches()
    figure.text(0.5, 0.1 / height, xlabel, ha="center")
    figure.text(0.1 / width, 0.5, ylabel, va="center", rotation="vertical")


def look(i: int) -> dict[str, Any]:
    """Of the i-th method, the same in all plots: no two differ by colour alone."""
    dashes = ("-", "--", ":", "-.")[i // COLOURS % 4]
    return {"color": colour(i), "marker": MARKERS[i % len(MARKERS)], "linestyle": dashes, "markersize": 5, "linewidth": 1.4}


def draw(axes: Any, lines: dict[str, Line], names: Sequence[str]) -> None:
    for name, (x, y, around) in lines.items():
        i = list(names).index(name)
        axes.plot(x, y, **look(i))
        if around:
            axes.vlines(x, [low for low, _ in around], [high for _, high in around], color=colour(i), linewidth=1.2)


def ticks(axis: Any, values: Sequence[float], name: Callable[[float], str]) -> None:
    axis.set_ticks(sorted(set(values)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: name(value)))
    axis.set_minor_locator(NullLocator())


def shares(values: Sequence[float]) -> list[float]:
    """Ticks of percentages: halves of halves, or round numbers where fewer than two of those lie among the values."""
    low, high = min(values), max(values)
    halves = [t for t in (3.125, 6.25, 12.5, 25, 50, 100) if low <= t <= high]
    return halves if len(halves) > 1 else [float(t) for t in MaxNLocator(4).tick_values(low, high) if low <= t <= high]


def short(tokens: float) -> str:
    return f"{tokens / 1024:g}k" if tokens >= 1024 else f"{tokens:g}"


def around(e: dict[str, Any]) -> tuple[float, float]:
    return (e["mean"], e["mean"]) if e["low"] is None else (e["low"], e["high"])


def logarithmic(cells: Sequence[Cell], score: str) -> bool:
    """Whether a score is shown on a logarithmic axis: less is better, and it spans more than a factor of ten. Where it is 0, as that of
    `full` often is, it is then left out."""
    values = [v for cell in cells if (v := cell["scores"].get(score, {}).get("mean"))]
    return BETTER.get(score) == "lower" and bool(values) and min(values) > 0 and max(values) > 10 * min(values)


def scale(axes: Any, log: bool) -> None:
    if log:
        axes.set_yscale("log")
        axes.minorticks_off()  # they take most of a plot's time
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def points(cells: Sequence[Cell], score: str, x: Callable[[Cell], float]) -> Line:
    some = sorted((cell for cell in cells if score in cell["scores"]), key=x)
    return [x(c) for c in some], [c["scores"][score]["mean"] for c in some], [around(c["scores"][score]) for c in some]


def meant(score: str) -> str:
    return f"{score} ({'more' if BETTER.get(score) == 'higher' else 'less'} is better)"


def with_score(cells: Sequence[Cell], score: str, log: bool) -> list[Cell]:
    return [cell for cell in cells if score in cell["scores"] and (cell["scores"][score]["mean"] > 0 or not log)]


def families(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(family(cell["attn"]) for cell in cells))


def frontier(cells: Sequence[Cell], names: Sequence[str], score: str, title: str) -> str:
    """One panel for each length: the score against the share of the full cache's bytes, one line for each method."""
    log, lengths = logarithmic(cells, score), sorted({cell["length"] for cell in cells})
    cells = with_score(cells, score, log)

    def each(axes: Any, i: int) -> None:
        here = [cell for cell in cells if cell["length"] == lengths[i]]
        share = lambda cell: 100 * counted(cell) / cell["bytes"]["full"]  # noqa: E731
        draw(axes, {name: points([c for c in here if family(c["attn"]) == name], score, share) for name in families(here)}, names)
        axes.set_xscale("log")
        ticks(axes.xaxis, shares(list(map(share, here))), lambda value: f"{value:g}%")
        scale(axes, log)

    across = "bytes of the cache, of the full one's (logarithmic)"
    return panels([f"{n:,} tokens" for n in lengths], each, names, families(cells), title, across, meant(score))


def by_budget(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Cells of one budget, those without one with each."""
    budgets = list(dict.fromkeys(b for cell in cells if (b := budget(cell["attn"])))) or [""]
    return {b: [cell for cell in cells if budget(cell["attn"]) in ("", b)] for b in budgets}


def against_length(
    cells: Sequence[Cell], names: Sequence[str], y: Callable[[list[Cell]], Line], title: str, ylabel: str, log: bool = False
) -> str:
    """One panel for each budget, one line for each method."""
    some = by_budget(cells)
    lengths = sorted({cell["length"] for cell in cells})

    def each(axes: Any, i: int) -> None:
        here = list(some.values())[i]
        lines = {name: y([c for c in here if family(c["attn"]) == name]) for name in families(here)}
        draw(axes, {name: line for name, line in lines.items() if line[0]}, names)
        axes.set_xscale("log", base=2)
        ticks(axes.xaxis, lengths, short)
        scale(axes, log)

    return panels([b and f"budget {b}" for b in some], each, names, families(cells), title, "tokens", ylabel)


def curves(cells: Sequence[Cell], names: Sequence[str], score: str, title: str) -> str:
    log = logarithmic(cells, score)
    line = lambda some: points(some, score, lambda cell: cell["length"])  # noqa: E731
    return against_length(with_score(cells, score, log), names, line, title, meant(score), log)


def bytes_used(cells: Sequence[Cell], names: Sequence[str], title: str) -> str:
    def line(some: list[Cell]) -> Line:
        some = sorted(some, key=lambda c: c["tokens"])
        return [c["tokens"] for c in some], [counted(c) / 2**20 for c in some], None

    return against_length(cells, names, line, title, "MiB of cache", log=True)


def times(cells: Sequence[Cell], names: Sequence[str], which: str, title: str) -> str:
    def line(some: list[Cell]) -> Line:
        some = sorted((c for c in some if c["rate"][which]), key=lambda c: c["length"])
        return [c["length"] for c in some], [1e3 / c["rate"][which] for c in some], None

    return against_length(cells, names, line, title, f"milliseconds a token, {which}")


def depth(variant: str) -> float | None:
    found = re.search(r"(?:^|,)depth=([\d.]+)", variant)
    return None if found is None else float(found[1])


def grids(part: Part, cells: Sequence[Cell], score: str) -> dict[str, dict[tuple[float, int], float]]:
    """Of cells that differ in method and length only: method -> (depth, length) -> the mean of a score. Empty where no depths are."""
    found: dict[str, dict[tuple[float, int], list[float]]] = {}
    for cell in cells:
        for row in part.of(cell):
            at, value = depth(row["variant"]), row["scores"].get(score)
            if at is not None and value is not None:
                found.setdefault(cell["attn"], {}).setdefault((at, cell["length"]), []).append(value)
    return {attn: {at: sum(v) / len(v) for at, v in grid.items()} for attn, grid in found.items()}


def luminance(rgb: Sequence[float]) -> float:
    """Relative luminance (WCAG 2) of red, green and blue, 0 to 1."""
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in rgb[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def heat(score: str, grid: dict[str, dict[tuple[float, int], float]], title: str) -> str:
    """Depth down, length across, a panel for each method; each field says its number, so that no colour has to be read."""
    from matplotlib import colormaps

    depths, lengths = (sorted({at[i] for one in grid.values() for at in one}) for i in (0, 1))
    values = [x for one in grid.values() for x in one.values()]
    low, high = (0.0, 1.0) if min(values) >= 0 and max(values) <= 1 else (min(values), max(values))
    colours = colormaps["viridis"] if BETTER.get(score) == "higher" else colormaps["viridis_r"]
    with rc_context({**STYLE, "axes.grid": False}):
        figure, panes = laid_out(len(grid), (max(0.55 * len(lengths), 2.3), 0.28 * len(depths)), (0.15, 0.4))
        for axes, (attn, one) in zip(panes, grid.items(), strict=True):
            axes.set(title=attn, xlim=(-0.5, len(lengths) - 0.5), ylim=(len(depths) - 0.5, -0.5))
            axes.set_xticks(range(len(lengths)), [short(n) for n in lengths])
            axes.set_yticks(range(len(depths)), [f"{100 * d:g}%" for d in depths])
            axes.tick_params(length=0)
            for (at, length), value in one.items():
                x, y = lengths.index(length), depths.index(at)
                shade = colours((value - low) / ((high - low) or 1))
                axes.fill([x - 0.5, x + 0.5, x + 0.5, x - 0.5], [y - 0.5, y - 0.5, y + 0.5, y + 0.5], color=shade, linewidth=0)
                ink = BLACK if luminance(shade) > 0.179 else "#ffffff"  # where both have the same contrast, 4.6
                axes.text(x, y, f"{value:.2g}", ha="center", va="center", color=ink, fontsize=8)
        below(figure, "tokens", "depth")
        return svg(figure, title)


def heads(part: Part, cells: Sequence[Cell], title: str) -> str:
    """Of rows that say it, the error of each layer (across) and head (down) at the longest length, a panel for each method; "" of none."""
    longest = max(cell["length"] for cell in cells)
    means = {}
    for cell in cells:
        found = [row["heads"] for row in part.of(cell) if cell["length"] == longest and row.get("heads")]
        if found and cell["scores"][main_score(cell) or ""]["mean"]:
            mean = [[sum(x) / len(found) for x in zip(*layer, strict=True)] for layer in zip(*found, strict=True)]
            means[cell["attn"]] = list(zip(*mean, strict=True))  # head by head
    if not means:
        return ""
    most = max(max(map(max, one)) for one in means.values())
    with rc_context({**STYLE, "axes.grid": False}):
        figure, panes = laid_out(len(means), (2.6, 0.9), (0.15, 0.4))
        for axes, (attn, one) in zip(panes, means.items(), strict=True):
            axes.imshow(one, aspect="auto", interpolation="nearest", cmap="viridis_r", vmin=0, vmax=most)
            axes.set(title=f"{attn}: {min(map(min, one)):.2g} to {max(map(max, one)):.2g}")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.yaxis.get_major_locator().set_params(integer=True, nbins=3)
        below(figure, f"layer; yellow: 0, darkest: {most:.2g}; {longest:,} tokens", "head")
        return svg(figure, title)


def alike(cells: Sequence[Cell]) -> dict[tuple[Any, ...], list[Cell]]:
    """Cells of one task, variant, protocol and question: what one plot shows."""
    found: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        found.setdefault(tuple(cell[name] for name in stats.CELL if name not in ("attn", "length")), []).append(cell)
    return found
