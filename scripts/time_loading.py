"""How long loading a checkpoint takes, against reading its files with `cat`, and what memory it peaks at.

    python scripts/time_loading.py FOLDER [--rounds 4]

Rounds are interleaved, each measurement a fresh process. cold: the files were dropped from the page cache before (posix_fadvise, which
needs no privileges). warm: they were read once before; files that do not fit beside the model are partly read again, by either. The time
of a load is that of `zoo.checkpoint.lay_out` and `load_into` and of touching every page of every parameter; importing torch is not in it.
Peak memory is VmHWM of the loading process less what it held before. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

LOAD = """
import json, sys, time
from pathlib import Path
import torch
from zoo import checkpoint

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

folder = Path(sys.argv[1])
torch.zeros(8) @ torch.zeros(8)
before, start = status("VmRSS"), time.perf_counter()
model = checkpoint.lay_out(folder)
checkpoint.load_into(model, folder, None)
loaded = time.perf_counter() - start
for p in model.parameters():
    p.view(-1)[:: 4096 // p.element_size()].float().sum().item()
seconds = time.perf_counter() - start
held = sum({p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}.values())
print(json.dumps({"seconds": seconds, "loaded": loaded, "peak": status("VmHWM") - before, "bytes": held}))
"""


def files(folder: Path) -> list[str]:
    return sorted(str(f) for f in folder.glob("*.safetensors"))


def ready(folder: Path, cache: str) -> None:
    """Before each measurement: for "cold", the files leave the page cache."""
    if cache == "warm":
        return
    os.sync()
    for name in files(folder):
        fd = os.open(name, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def cat(folder: Path) -> float:
    start = time.perf_counter()
    subprocess.run(["cat", *files(folder)], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def load(folder: Path) -> dict[str, float]:
    out = subprocess.run([sys.executable, "-c", LOAD, str(folder)], stdout=subprocess.PIPE, text=True, check=True).stdout
    result: dict[str, float] = json.loads(out)
    return result


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    p.add_argument("--rounds", type=int, default=4, help="measurements of each kind, 4 unless given")
    args = p.parse_args()
    if args.rounds < 1:
        p.error(f"--rounds {args.rounds} must be at least 1")
    if not files(args.folder):
        p.error(f"{args.folder} is no folder with .safetensors files")
    size = sum(os.path.getsize(f) for f in files(args.folder))
    table: dict[str, dict[str, float]] = {}
    for cache in ("cold", "warm"):
        cats: list[float] = []
        loads: list[dict[str, float]] = []
        cat(args.folder)
        for number in range(args.rounds):
            # In turns, one first and then the other: disks with a quota favour whoever comes first.
            for is_cat in (True, False) if number % 2 == 0 else (False, True):
                ready(args.folder, cache)
                if is_cat:
                    cats.append(cat(args.folder))
                else:
                    loads.append(load(args.folder))
        middle = {key: statistics.median(one[key] for one in loads) for key in ("seconds", "loaded", "peak", "bytes")}
        table[cache] = {"cat": statistics.median(cats), **middle, "ratio": middle["seconds"] / statistics.median(cats)}
        row = table[cache]
        print(
            f"{cache}: cat {row['cat']:.2f} s ({size / row['cat'] / 1e9:.2f} GB/s), "
            f"load and touch {row['seconds']:.2f} s: {row['ratio']:.2f} x; "
            f"peak {row['peak'] / 1e9:.2f} GB for {row['bytes'] / 1e9:.2f} GB of parameters: {row['peak'] / row['bytes']:.3f} x"
        )
    print(json.dumps({"folder": str(args.folder), "file_bytes": size, **table}))


if __name__ == "__main__":
    main()
