"""report.html: the tables of report.md and the plots, in one file that needs nothing else."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from zoo.eval import pages, plots
from zoo.eval.report import LEGEND, Cell, Part, Table, about, main_score, place_name, places, table


def page(parts: Sequence[Part], baseline: str | None) -> tuple[str, dict[str, str]]:
    """The page, and of its plots those of main scores against bytes: file name -> SVG that stands alone."""
    pictures: dict[str, str] = {}
    body = ["<header><h1>What the caches cost</h1>", f"<p class=dim>{marked(LEGEND)}</p></header>", contents(parts), "<main>"]
    for i, part in enumerate(parts):
        body += [f'<section aria-labelledby="part{i}"><h2 id="part{i}">{escaped(part.name())}</h2>', "<ul>"]
        body += [*(f"<li>{marked(line)}</li>" for line in about(part)), "</ul>"]
        if part.twice:
            body.append(f"<p>{part.twice} rows stood in several folders; the first folder's count.</p>")
        body += [f'<h3 id="plots{i}">Plots</h3>', *drawn(part, pictures, str(i + 1) if i else ""), f'<h3 id="tables{i}">Tables</h3>']
        body += [tabular(table(place, cells, baseline), f"table{i}-{n}") for n, (place, cells) in enumerate(places(part.cells).items())]
        body.append("</section>")
    whole = pages.page("report.html")
    themes = re.findall(r":root \{.*?\}\n@media .*?\} \}", whole, re.DOTALL)  # what pages have in common, and the colours of series
    alone = {name: plots.alone(svg, "\n".join(themes)) for name, svg in pictures.items()}
    return whole.replace("{{body}}", "\n".join([*body, "</main>"])), alone


def contents(parts: Sequence[Part]) -> str:
    lines = ['<nav aria-label="Contents"><ul>']
    for i, part in enumerate(parts):
        lines += [f'<li><a href="#part{i}">{escaped(part.name())}</a></li>', f'<li><a href="#plots{i}">Plots</a></li>']
        lines += [f'<li><a href="#table{i}-{n}">{escaped(place_name(place))}</a></li>' for n, place in enumerate(places(part.cells))]
    return "\n".join([*lines, "</ul></nav>"])


def drawn(part: Part, pictures: dict[str, str], number: str) -> Iterator[str]:
    """The plots of a part; those of further scores are folded away."""
    names = plots.families(part.cells)
    for place, cells in plots.alike(part.cells).items():
        name = place_name((*place, 0)).rpartition(", ")[0]
        first = next((score for cell in cells if (score := main_score(cell))), None)
        for score in dict.fromkeys(score for cell in cells for score in cell["scores"]):
            title = f"{name}: {score} against the cache's bytes"
            svg = plots.frontier(cells, names, score, title)
            found = [framed(title, svg)]
            if score == first:
                file = re.sub(r"[^a-z0-9]+", "-", " ".join(str(x) for x in place if x).lower()).strip("-")
                pictures[f"frontier{number}-{file}.svg"] = svg
            if len({cell["length"] for cell in cells}) > 1:
                found.append(figure(f"{name}: {score} against length", plots.curves, cells, names, score))
            if grid := plots.grids(part, cells, score):
                found.append(figure(f"{name}: {score} by depth and length", plots.heat, score, grid))
            yield from found if score == first else folded(f"{name}: {score}", found)
        title = f"{name}: {first} of each layer and head"
        if svg := plots.heads(part, cells, title):
            yield framed(title, svg)
    yield from costs(part, names)


def costs(part: Part, names: Sequence[str]) -> Iterator[str]:
    """Bytes and milliseconds, of the task that has most lengths: they hardly depend on what is asked."""
    for protocol in dict.fromkeys(cell["protocol"] for cell in part.cells):
        some = [cells for place, cells in plots.alike(part.cells).items() if protocol in place]
        what = "at the most" if protocol == "stream" else "at the end"
        chosen = widest(some)
        yield figure(f"{named(chosen)}: the cache's bytes {what} against tokens", plots.bytes_used, chosen, names)
        for which in ("prefill", "decode"):
            timed = [cells for cells in some if any(cell["rate"][which] for cell in cells)]
            if timed:
                chosen = widest(timed)
                yield figure(f"{named(chosen)}: milliseconds a token against length, {which}", plots.times, chosen, names, which)


def widest(some: Sequence[Sequence[Cell]]) -> Sequence[Cell]:
    return max(some, key=lambda cells: (len({cell["length"] for cell in cells}), len(cells)))


def named(cells: Sequence[Cell]) -> str:
    return f"{cells[0]['task']}, {cells[0]['protocol']}"


def figure(caption: str, plot: Callable[..., str], *args: Any) -> str:
    return framed(caption, plot(*args, caption))


def framed(caption: str, svg: str) -> str:
    return f"<figure><figcaption>{escaped(caption)}</figcaption>{svg}</figure>"


def folded(title: str, inside: list[str]) -> Iterator[str]:
    yield f"<details><summary>{escaped(title)}</summary>"
    yield from inside
    yield "</details>"


def tabular(t: Table, name: str) -> str:
    """A table that scrolls on its own, by keyboard too."""
    why = t.head.index("rank")
    lines = [
        f'<div class="table" tabindex="0" role="region" aria-labelledby="{name}"><table><caption id="{name}">{escaped(t.caption)}</caption>'
    ]
    lines.append("<thead><tr>" + "".join(f'<th scope="col">{escaped(x)}</th>' for x in t.head) + "</tr></thead><tbody>")
    for row in t.body:
        cells = [f'<td class="why">{escaped(x)}</td>' if i == why else f"<td>{escaped(x)}</td>" for i, x in enumerate(row)]
        lines.append(f'<tr><th scope="row">{marked(row[0])}</th>' + "".join(cells[1:]) + "</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def marked(text: str) -> str:
    """Markdown's `code`."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escaped(text))


def escaped(text: Any) -> str:
    return html.escape(str(text))
