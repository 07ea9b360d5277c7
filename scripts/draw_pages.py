"""Photographs pages of `python -m zoo.eval show` for docs/methods, in a headless Chromium.

    pip install -e '.[browser]'
    python scripts/draw_pages.py kivi turboquant:bits=3.5 qjl balancekv:budget=25%        # docs/methods/kivi-page.png, ...
    ZOO_BROWSER=/usr/bin/chromium-headless-shell python scripts/draw_pages.py ...         # instead of playwright's own

The text is the language reference that comes with Python, 512 tokens of it, the last four of which ask.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from zoo.eval import show
from zoo.eval.__main__ import reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attn", nargs="+")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "methods")
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        (text := Path(name, "reference.txt")).write_text(reference()[20_000:26_000])
        browser = playwright.chromium.launch(executable_path=os.environ.get("ZOO_BROWSER"))
        for attn in args.attn:
            page_file = Path(name, "page.html")
            show.main(["--model", args.model, "--attn", attn, "--file", str(text), "--out", str(page_file)])
            page = browser.new_page(color_scheme="light", viewport={"width": 1300, "height": 900})
            page.goto(page_file.as_uri())
            page.screenshot(path=args.out / f"{attn.partition(':')[0]}-page.png")
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
