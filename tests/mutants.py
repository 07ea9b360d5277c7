"""A module with one thing wrong: what a kernel's checks must catch."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any


def mutant(module: Any, old: str, new: str, folder: Path) -> Any:
    """The module with `old` replaced, its operators under names of their own."""
    source = Path(module.__file__).read_text()
    assert old in source, old
    file = folder / f"{Path(module.__file__).stem}_{len(list(folder.iterdir()))}.py"
    file.write_text(source.replace(old, new).replace("_triton", f"_{folder.name.replace('-', '_')}"))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
