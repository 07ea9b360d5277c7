"""HTML pages of this package: what they have in common, before what is their own."""

from __future__ import annotations

from importlib import resources


def page(name: str, scripts: bool = False) -> str:
    """The page `name`, with head.html in the place of {{head}}: nothing from outside may be loaded, and no script run unless said."""
    head, body = (resources.files("zoo.eval").joinpath(file).read_text(encoding="utf-8") for file in ("head.html", name))
    return body.replace("{{head}}\n", head.replace("{{scripts}}", "script-src 'unsafe-inline'; " if scripts else ""))
