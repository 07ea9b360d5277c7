"""Where zoo keeps files between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """ZOO_CACHE, else XDG_CACHE_HOME/zoo, else ~/.cache/zoo."""
    root = os.environ.get("ZOO_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "zoo")
    return Path(root).expanduser()
