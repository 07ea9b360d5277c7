"""Tables that `python -m zoo.calibrate` makes for a model once, and a method can use: small JSON files in zoo's cache folder. A checkpoint
whose weights were trained for a table has it in its own folder, METHOD.json, which is then the only one."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.folders import cache_folder
from zoo.safetensors_header import read_json

KINDS = {"subgen": "head table", "kvsharer": "table of layer pairs", "pod": "table of layer groups"}  # what errors call a method's table


def table_path(method: str, config: Any) -> Path:
    """Where the table of a method for models of this config lies."""
    return cache_folder() / "calibration" / f"{method}-{hashlib.sha256(str(config).encode()).hexdigest()[:16]}.json"


def save_table(method: str, config: Any, table: dict[str, Any]) -> Path:
    """Write a table; the file appears whole or not at all."""
    path = table_path(method, config)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        tmp.write_text(json.dumps(table))
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
    return path


def own_table(method: str, config: Any) -> dict[str, Any] | None:
    """The table in the folder of the checkpoint that this config is of. Raises ZooError where it cannot be read."""
    path = getattr(config, "folder", None) and config.folder / f"{method}.json"
    return read_json(path) if path and path.exists() else None


def digest(table: Any) -> str:
    return hashlib.sha256(json.dumps(table).encode()).hexdigest()[:16]


def load_table(method: str, config: Any, key: str) -> Any:
    """What the method's table for this model holds under `key`: the checkpoint's own, else the one for models of this config. Raises
    ZooError where there is no table, or a broken one."""
    path = table_path(method, config)
    try:
        if (own := own_table(method, config)) is not None:
            return own.get(key)  # None fits no model
        return json.loads(path.read_text())[key]
    except FileNotFoundError:
        raise ZooError(f"{method}: there is no {KINDS[method]} for this model; {again(method)}") from None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ZooError(f"{method}: the {KINDS[method]} {path} cannot be read ({e}); {again(method)}") from None


def alien(method: str, config: Any) -> ZooError:
    """The error for a table whose numbers do not fit the model."""
    if own_table(method, config) is not None:
        return ZooError(f"{method}: the {KINDS[method]} {config.folder / f'{method}.json'} does not fit the model beside it")
    return ZooError(f"{method}: the {KINDS[method]} {table_path(method, config)} is of another model; {again(method)}")


def again(method: str) -> str:
    return f"make it with: python -m zoo.calibrate {method} MODEL --text FILE"


def load_shares(method: str, config: Any) -> Tensor:
    """(L, G) float64: what each head may own, as a multiple of the average. Raises ZooError."""
    try:
        shares = torch.tensor(load_table(method, config, "shares"), dtype=torch.float64)
    except (ValueError, TypeError, RuntimeError):
        raise alien(method, config) from None
    if shares.shape != (config.num_hidden_layers, config.num_key_value_heads) or not bool((shares > 0).all()):
        raise alien(method, config)
    return shares
