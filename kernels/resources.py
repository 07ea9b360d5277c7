"""python -m zoo.kernels.resources: compile every configuration that the Triton kernels ship in, for four chips, and read off what it takes.

No GPU is needed: the binaries are real (cubin for sm_80, sm_90 and sm_100, hsaco for gfx942), only nobody runs them. Registers, spills
and stack are what ptxas says as it makes the binary, and the metadata in AMD's assembly. Prints a Markdown table, one row a kernel and
tile, of which the worst of its variants (with or without log-weights, dense or in pages) counts. Exit code 1 where a vector register is
spilled, scratch memory is used, or a block wants more shared memory than the chip has.

Results are kept by source, so that a second run takes seconds.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import importlib
import inspect
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zoo.folders import cache_folder

MODULES = ("slot_attention", "column_mass", "nearest", "rotary_store")
START, END = "<!-- resources -->", "<!-- end of resources -->"  # in kernels/README.md


class Chip(NamedTuple):
    """A target, what a block and a multiprocessor (AMD: compute unit) have of shared memory in bytes, and its warps (waves)."""

    backend: str
    arch: Any
    width: int
    block: int
    shared: int
    warps: int


CHIPS = {
    "sm_80": Chip("cuda", 80, 32, 163 * 1024, 164 * 1024, 64),
    "sm_90": Chip("cuda", 90, 32, 227 * 1024, 228 * 1024, 64),
    "sm_100": Chip("cuda", 100, 32, 227 * 1024, 228 * 1024, 64),
    "gfx942": Chip("hip", "gfx942", 64, 64 * 1024, 64 * 1024, 32),
}


class Used(NamedTuple):
    """What a binary takes: vector registers a thread, bytes a thread of spills and stack, bytes of shared memory a block."""

    registers: int
    spilled: int
    shared: int


def configurations() -> list[Any]:
    """What all kernels ship, in a fixed order."""
    return [c for name in MODULES for c in importlib.import_module(f"zoo.kernels.{name}").shipped()]


def occupancy(used: Used, warps: int, chip: Chip) -> float:
    """The share of a multiprocessor's warps that registers and shared memory let be resident. The files are 4 x 16,384 registers of 32 bits
    and 32 lanes (NVIDIA), handed out 8 a thread at a time, or 4 x 512 of 64 lanes (AMD)."""
    each = -(-max(used.registers, 1) // 8) * 8
    resident = 4 * min(chip.warps // 4, (16384 // 32 if chip.backend == "cuda" else 512) // each)
    reserved = 1024 if chip.backend == "cuda" else 0  # by the system, a block
    blocks = min(resident // warps, chip.shared // max(used.shared + reserved, 1), 32)
    return blocks * warps / chip.warps


def look(index: int, name: str) -> Used:
    """Compile the configuration of that index for a chip, or look up what was found before. Runs in a process of its own."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    c, chip = configurations()[index], CHIPS[name]
    signature = {a: "constexpr" if a in c.constexprs else c.signature[a] for a in c.kernel.arg_names}
    aligned = [i for i, (a, kind) in enumerate(signature.items()) if kind.startswith("*") or (a in c.aligned and kind != "constexpr")]
    constants = {a: value for a, value in c.constexprs.items() if a in signature}
    source = ASTSource(c.kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = c.options.of(chip.backend)
    about = f"{source.hash()} {name} {options} {triton.__version__} {inspect.getsource(nvidia)} {inspect.getsource(amd)}"
    kept = cache_folder() / "kernels" / "resources" / f"{hashlib.sha256(about.encode()).hexdigest()[:24]}.json"
    if kept.exists():
        return Used(*json.loads(kept.read_text()))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        triton.knobs.nvidia.dump_ptxas_log = True
        with contextlib.redirect_stdout(io.StringIO()) as said:
            binary = triton.compile(source, target=GPUTarget(chip.backend, chip.arch, chip.width), options=options)
        used = Used(*(nvidia(said.getvalue()) if chip.backend == "cuda" else amd(binary.asm["amdgcn"])), binary.metadata.shared)
    kept.parent.mkdir(parents=True, exist_ok=True)
    part = kept.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(used))
    os.replace(part, kept)
    return used


def nvidia(said: str) -> tuple[int, int]:
    """Registers, and bytes of stack and spills, by what ptxas said when it made the binary."""
    stack, registers = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", said), re.search(r"Used (\d+) registers", said)
    if registers is None or len(stack) != 3:
        raise RuntimeError(f"ptxas does not say what the binary takes: {said!r}")
    return int(registers[1]), sum(map(int, stack))


def amd(assembly: str) -> tuple[int, int]:
    """Vector registers (accumulation registers among them), and bytes of scratch and of spilled vector registers, by the metadata."""

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"the assembly does not say its {name}")
        return int(found[1])

    return number("vgpr_count"), number("private_segment_fixed_size") + 4 * number("vgpr_spill_count")


def measure(chips: Sequence[str], processes: int, every: int = 1) -> Iterator[tuple[Any, str, Used]]:
    """(configuration, chip, what it takes) for everything that ships, or every so many of it."""
    all_of_them = configurations()
    jobs = [(i, name) for i in range(0, len(all_of_them), every) for name in chips]
    with concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for (i, name), used in zip(jobs, pool.map(look, *zip(*jobs, strict=True), chunksize=4), strict=True):
            yield all_of_them[i], name, used


def table(found: Sequence[tuple[Any, str, Used]], chips: Sequence[str]) -> str:
    """Markdown: registers, shared KiB, occupancy; of variants of one kernel and tile the largest and the least."""
    rows: dict[tuple[str, str, int], list[tuple[str, str, Used]]] = {}
    for c, chip, used in found:
        sizes = " ".join(
            f"{name}={value}" for name, value in c.constexprs.items() if value is not None and name.isupper() and name not in ("PAGE", "T")
        )
        kind = next(t for a in c.kernel.arg_names if a not in c.constexprs and (t := c.signature[a]).startswith("*"))  # of the first tensor
        rows.setdefault((c.kernel.__name__, sizes, c.options.warps), []).append((chip, kind.removeprefix("*"), used))
    lines = ["| kernel | types | sizes | warps | variants | " + " | ".join(chips) + " |", "|---|---|---|---|---|" + "---|" * len(chips)]
    for (kernel, sizes, warps), variants in sorted(rows.items()):
        each = {chip: [used for where, _, used in variants if where == chip] for chip in chips}
        types = ", ".join(dict.fromkeys(kind for _, kind, _ in variants))
        cells = [
            f"{max(u.registers for u in each[chip])}, {max(u.shared for u in each[chip]) / 1024:.3g}, "
            f"{min(occupancy(u, warps, CHIPS[chip]) for u in each[chip]):.0%}"
            for chip in chips
        ]
        lines.append(f"| {kernel} | {types} | {sizes} | {warps} | {len(each[chips[0]])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def triton_version() -> str:
    import triton

    return triton.__version__


def wrong(found: Sequence[tuple[Any, str, Used]]) -> list[str]:
    """Configurations that spill or do not fit."""
    lines = []
    for c, chip, used in found:
        about = f"{c.kernel.__name__} ({c.name}) on {chip}"
        if used.spilled:
            lines.append(f"{about}: {used.spilled} bytes of spills and stack")
        if used.shared > CHIPS[chip].block:
            lines.append(f"{about}: {used.shared} bytes of shared memory, {CHIPS[chip].block} are there")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m zoo.kernels.resources", description="What the Triton kernels take on four chips.")
    p.add_argument("--chips", nargs="+", default=list(CHIPS), choices=list(CHIPS))
    p.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile at a time")
    p.add_argument("--every", type=int, default=1, metavar="N", help="compile every N-th configuration only")
    p.add_argument("--write", action="store_true", help="put the table into kernels/README.md")
    args = p.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)  # nothing can be compiled under it
    found = list(measure(args.chips, args.processes, args.every))
    about = f"Triton {triton_version()}; in each cell registers a thread, KiB of shared memory a block, occupancy."
    shown = f"{table(found, args.chips)}\n\n{about}"
    print(shown)
    if args.write:
        readme = Path(__file__).with_name("README.md")
        text = readme.read_text()
        before, after = text.partition(START)[0], text.partition(END)[2]
        readme.write_text(f"{before}{START}\n{shown}\n{END}{after}")
    for line in wrong(found):
        print(line, file=sys.stderr)
    return 1 if wrong(found) else 0


if __name__ == "__main__":
    sys.exit(main())
