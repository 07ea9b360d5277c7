"""What tests of HTML pages share: a page opened in Chromium, and whether its text can be read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GROUND = {"light": "rgb(251, 250, 248)", "dark": "rgb(23, 23, 23)"}
OUTLINE = "(({ outlineStyle, outlineWidth }) => `${outlineStyle} ${outlineWidth}`)(getComputedStyle(document.activeElement))"

# Of text: what has less than 4.5 : 1, what WCAG asks, against its background; at most ten.
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  const light = c => [0.2126, 0.7152, 0.0722].reduce((sum, part, i) => sum + part * linear(c[i] / 255), 0);
  const ground = e => {
    const layers = [];
    for (; e; e = e.parentElement) layers.unshift(rgba(getComputedStyle(e).backgroundColor));
    return layers.reduce((under, c) => under.map((x, i) => (c[i] * c[3] + x * (255 - c[3])) / 255), [255, 255, 255]);
  };
  const low = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || !e.getClientRects().length || e.closest("noscript, script")) continue;
    const style = getComputedStyle(e), svg = e instanceof SVGElement;
    if (svg && /fill: #/.test(e.getAttribute("style"))) continue;  // numbers of a heat map, on their own ground
    const [a, b] = [light(rgba(svg ? style.fill : style.color)), light(ground(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(`${e.tagName} ${e.getAttribute("class")} ${e.textContent.slice(0, 20)}: ${ratio.toFixed(2)}`);
  }
  return low.slice(0, 10);
}"""


@contextlib.contextmanager
def open_page(chromium: Any, path: Path, theme: str) -> Iterator[Any]:
    """The page in a light or dark theme. It fails if it asks for anything beside itself, or if anything goes wrong in it."""
    page = chromium.new_page(color_scheme=theme, viewport={"width": 1300, "height": 900})
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else asked.append(r.url))
    page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.goto(path.as_uri())
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == GROUND[theme]
    yield page
    assert asked == []
    assert wrong == []
    page.close()
