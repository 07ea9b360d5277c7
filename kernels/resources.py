"""python -m zoo.kernels.resources: compile every configuration that the Triton kernels ship in, for four chips, and read off what it takes.

No GPU is needed: the binaries are real (cubin for sm_80, sm_90 and sm_100, hsaco for gfx942), only nobody runs them. Registers, spills
and stack are what ptxas says as it makes the binary, and the metadata in AMD's assembly. Prints a Markdown table, one row a kernel and
tile, of which the worst of its variants (with or without log-weights, dense or in pages) counts. Exit code 1 where a vector register is
spilled, scratch memory is used, or a block wants more shared memory than the chip has.

What was found is on record in kernels/resources.json, under a hash of each configuration and of the kernel's own text: what has not changed
since, under the same Triton, is not compiled again (all of it takes 15 minutes of a core). `--again` compiles it all the same, and says
where the record is wrong; `--write` renews the record, and the table in kernels/README.md.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

MODULES = ("slot_attention", "column_mass", "nearest", "rotary_store")
RECORD = Path(__file__).with_name("resources.json")
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


def text(kernel: Any) -> dict[str, str]:
    """The source of a kernel and of what it calls, and the constants that they name."""
    import triton

    found, wait = {kernel.__name__: kernel.src}, [kernel]
    while wait:
        function = wait.pop().fn
        for name in function.__code__.co_names:
            value = function.__globals__.get(name)
            if isinstance(value, triton.language.constexpr):
                found[name] = str(value.value)
            elif isinstance(value, triton.JITFunction) and name not in found:
                found[name] = value.src
                wait.append(value)
    return found


def key(c: Any) -> str:
    """What a configuration's binaries are a function of, the version of Triton aside."""
    about = (
        text(c.kernel),
        dict(c.signature),
        dict(c.constexprs),
        sorted(c.aligned),
        [c.options.of(chip.backend) for chip in CHIPS.values()],
    )
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def recorded() -> dict[str, dict[str, Used]]:
    """Of the installed Triton: key of a configuration -> chip -> what it takes."""
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if known.get("triton") != triton_version():
        return {}
    return {k: {name: Used(*used) for name, used in zip(CHIPS, each, strict=True)} for k, each in known["binaries"].items()}


def look(index: int, name: str) -> Used:
    """Compile the configuration of that index for a chip. Runs in a process of its own."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    c, chip = configurations()[index], CHIPS[name]
    signature = {a: "constexpr" if a in c.constexprs else c.signature[a] for a in c.kernel.arg_names}
    aligned = [i for i, (a, kind) in enumerate(signature.items()) if kind.startswith("*") or (a in c.aligned and kind != "constexpr")]
    constants = {a: value for a, value in c.constexprs.items() if a in signature}
    source = ASTSource(c.kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        triton.knobs.nvidia.dump_ptxas_log = True
        with contextlib.redirect_stdout(io.StringIO()) as said:
            target = GPUTarget(chip.backend, chip.arch, chip.width)
            binary = triton.compile(source, target=target, options=c.options.of(chip.backend))
    return Used(*(nvidia(said.getvalue()) if chip.backend == "cuda" else amd(binary.asm["amdgcn"])), binary.metadata.shared)


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


def measure(chips: Sequence[str], processes: int, every: int = 1, again: bool = False) -> list[tuple[Any, str, Used]]:
    """(configuration, chip, what it takes) for everything that ships, or every so many of it; what is on record is not compiled."""
    every_one, known = configurations(), {} if again else recorded()
    jobs = [(i, name) for i in range(0, len(every_one), every) for name in chips]
    found = {(i, name): known[k][name] for i, name in jobs if (k := key(every_one[i])) in known}
    if missing := [job for job in jobs if job not in found]:
        with concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            found |= zip(missing, pool.map(look, *zip(*missing, strict=True), chunksize=4), strict=True)
    return [(every_one[i], name, found[i, name]) for i, name in jobs]


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
    """Configurations that spill, do not fit, or are on record as something else."""
    lines, known = [], recorded()
    for c, chip, used in found:
        about = f"{c.kernel.__name__} ({c.name}) on {chip}"
        if (other := known.get(key(c), {}).get(chip, used)) != used:
            lines.append(f"{about}: {tuple(used)}, on record as {tuple(other)}; --again --write renews the record")
        if used.spilled:
            lines.append(f"{about}: {used.spilled} bytes of spills and stack")
        if used.shared > CHIPS[chip].block:
            lines.append(f"{about}: {used.shared} bytes of shared memory, {CHIPS[chip].block} are there")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    from zoo.cli import Parser

    p = Parser(prog="python -m zoo.kernels.resources", description="What the Triton kernels take on four chips.")
    p.add_argument("--chips", nargs="+", default=list(CHIPS), choices=list(CHIPS))
    p.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile at a time")
    p.add_argument("--every", type=int, default=1, metavar="N", help="compile every N-th configuration only")
    p.add_argument("--write", action="store_true", help="renew the record, and the table in kernels/README.md")
    p.add_argument("--again", action="store_true", help="compile also what is on record")
    args = p.parse_args(argv)
    if args.every < 1 or args.processes < 1:
        p.error("--every and --processes must be at least 1")
    if args.write and (args.every > 1 or args.chips != list(CHIPS)):
        p.error("--write needs every configuration for all chips; leave out --every and --chips")
    os.environ.pop("TRITON_INTERPRET", None)  # nothing can be compiled under it
    found = measure(args.chips, args.processes, args.every, args.again)
    lines = wrong(found)
    print(shown(found, args.chips))
    if args.write:
        write(found)
    for line in lines:
        print(line, file=sys.stderr)
    return 1 if lines else 0


def shown(found: Sequence[tuple[Any, str, Used]], chips: Sequence[str]) -> str:
    about = f"Triton {triton_version()}; in each cell registers a thread, KiB of shared memory a block, occupancy."
    return f"{table(found, chips)}\n\n{about}"


def write(found: Sequence[tuple[Any, str, Used]]) -> None:
    """The record, a line a configuration, and the table."""
    each: dict[str, list[Used]] = {}
    for c, _, used in found:
        each.setdefault(key(c), []).append(used)
    binaries = ",\n".join(f'"{k}": {json.dumps(all_chips)}' for k, all_chips in each.items())
    RECORD.write_text(f'{{"triton": "{triton_version()}", "binaries": {{\n{binaries}\n}}}}\n')
    readme = RECORD.with_name("README.md")
    before, after = readme.read_text().partition(START)[0], readme.read_text().partition(END)[2]
    readme.write_text(f"{before}{START}\n{shown(found, list(CHIPS))}\n{END}{after}")


if __name__ == "__main__":
    sys.exit(main())
