"""A module with one thing wrong: what a kernel's checks must catch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def mutant(module: Any, old: str, new: str, folder: Path) -> Any:
    """The module with `old` replaced, its operators under names of their own. Raises ValueError where `old` is not in its source: an
    AssertionError would look like a mutant that was caught."""
    source = Path(module.__file__).read_text()
    if old not in source:
        raise ValueError(f"not in the source any more: {old}")
    file = folder / f"{Path(module.__file__).stem}_{len(list(folder.iterdir()))}.py"
    file.write_text(source.replace(old, new).replace("_triton", f"_{folder.name.replace('-', '_')}"))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {file}")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def is_caught(check: Callable[[Any], None], module: Any, old: str, new: str, folder: Path) -> None:
    """The check must fail for the mutant; that it passes for the module itself is for the caller to show."""
    wrong = mutant(module, old, new, folder)
    with pytest.raises(AssertionError):
        check(wrong)
