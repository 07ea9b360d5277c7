"""Speed: python -m zoo.bench."""

from zoo.bench.__main__ import main

__all__ = ["main"]
