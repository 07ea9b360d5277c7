"""A folder of results: what was asked, what came out, and going on after an interruption.

    config.json     the command, its arguments, versions, commit, machine       summary.json   cells (zoo/eval/stats.py)
    records.jsonl   a row for each sample and method; the same bytes whenever the same command runs on the same machine
    timings.jsonl   the rows' keys again, with tokens a second: the only thing that differs between two runs

A row is written whole, timings first. What a killed run leaves may end in half a line: it is dropped, and what is missing is run.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.eval.stats import rounded

Row = dict[str, Any]
KEY = ("task", "variant", "attn", "protocol", "question", "length", "sample", "seed")
FREE = ("out", "baseline", "json")  # arguments that may differ when a run is continued


def key_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def rows_of(path: Path) -> list[Row]:
    """The whole lines of a file of rows; none where there is no file."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    try:
        rows = [json.loads(line) for line in lines]
        assert all(set(KEY) <= set(row) for row in rows)
    except (ValueError, TypeError, AssertionError):
        raise ZooError(f"{path} is damaged: not every line is a row; move it away") from None
    return rows


class Records:
    """An open folder. rows: those that are done, in the file's order."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        """Begins or continues `folder`. Raises ZooError when it was made by other arguments, is being written, or cannot be."""
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = os.open(folder, os.O_RDONLY)
            try:
                self.start(folder / "config.json", config)
            except BaseException:
                os.close(self.lock)
                raise
        except BlockingIOError:
            raise ZooError(f"{folder} is being written by another run; wait for it, or choose another --out") from None
        except OSError as e:
            raise ZooError(f"cannot write to {folder}: {e.strerror}") from None

    def start(self, path: Path, config: dict[str, Any]) -> None:
        fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        records, times = self.folder / "records.jsonl", self.folder / "timings.jsonl"
        if path.exists():
            self.check(path, config)
        elif records.exists():
            raise ZooError(f"{self.folder} has records.jsonl but no config.json; choose another --out")
        else:
            write(path, config)
        self.rows = rows_of(records)
        self.done = {key_of(row) for row in self.rows}
        timings = [row for row in rows_of(times) if key_of(row) in self.done]
        self.files = [begin(times, timings), begin(records, self.rows)]

    def check(self, path: Path, config: dict[str, Any]) -> None:
        """Raises ZooError unless the folder was made by these arguments, this model, and this code."""
        try:
            found = json.loads(path.read_text())
            code = {"model": "the model's config", "versions": "versions", "commit": "commit", "sources": "the code's hash"}
            theirs, mine = ({**c["arguments"], **{called: c[name] for name, called in code.items()}} for c in (found, config))
        except (ValueError, KeyError, TypeError):
            raise ZooError(f"{path} is damaged; choose another --out, or move it away") from None
        names = [name for name in {**theirs, **mine} if name not in FREE and theirs.get(name) != mine.get(name)]
        if names:
            name = names[0]
            raise ZooError(
                f"{self.folder} was made with {name} = {short(theirs.get(name))}, not {short(mine.get(name))}; choose another --out"
            )

    def add(self, row: Row, rate: Row) -> None:
        row = rounded(row)
        timing = {name: row[name] for name in KEY} | {"rate": rounded(rate)}
        try:
            for file, what in zip(self.files, (timing, row), strict=True):
                data = json.dumps(what, ensure_ascii=False).encode() + b"\n"
                if os.write(file, data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            raise ZooError(f"cannot write to {self.folder}: {e.strerror}") from None
        self.rows.append(row)
        self.done.add(key_of(row))

    def close(self) -> None:
        for file in (*self.files, self.lock):
            os.close(file)


def begin(path: Path, rows: list[Row]) -> int:
    """Open for appending; a file that has anything but these rows is written anew first. -> a descriptor."""
    data = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    if not path.exists() or path.read_bytes() != data:
        replace(path, data)
    return os.open(path, os.O_WRONLY | os.O_APPEND)


def write(path: Path, value: Any) -> None:
    """As JSON; the file appears whole or not at all."""
    replace(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
