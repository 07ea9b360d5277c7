"""The CPU kernels read the rows that hold tokens, and none behind the last: there, memory is forbidden, and reading it ends the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from zoo.attention.backends import kernels_ready

CHECK = """
import ctypes, mmap, sys
import torch
from zoo.attention.backends import kernels_ready
from zoo.attention.slots import Slots, slot_attention
from zoo.kernels import cpu

assert kernels_ready()
S, D, held, extra = 4096, 64, 992, int(sys.argv[1])
row, libc = 2 * D, ctypes.CDLL(None, use_errno=True)


def store(seed):
    m = mmap.mmap(-1, S * row)
    t = torch.frombuffer(m, dtype=torch.bfloat16).view(1, 1, S, D)
    t[:, :, :held] = torch.randn(held, D, generator=torch.Generator().manual_seed(seed)).bfloat16()
    assert libc.mprotect(ctypes.c_void_p(t.data_ptr() + held * row), (S - held) * row, 0) == 0, ctypes.get_errno()
    return t


k, v = store(1), store(2)
pos = torch.full((1, 1, S), -1, dtype=torch.int32)
pos[..., : held + extra] = torch.arange(held + extra)
for T in (1, 3, 20):
    q, at = torch.randn(1, 3, T, D).bfloat16(), torch.arange(held - T, held)[None]
    out = cpu.attention(q, at, Slots(k, v, pos))[0]
    true = slot_attention(q, at, Slots(k[:, :, :held], v[:, :, :held], pos[:, :, :held]))
    assert (out - true).abs().max() < 0.02, T
    weight = torch.ones(1, T)
    cpu.attention_and_mass(q, at, Slots(k, v, pos), None, None, weight)
print("read nothing else")
"""


@pytest.mark.skipif(not kernels_ready(), reason="the CPU kernels cannot be built here")
@pytest.mark.parametrize("extra", [0, 1])
def test_no_row_behind_the_last_token_is_read(extra: int) -> None:
    """A quarter of 4,096 rows is held: in decode steps and chunks, with masses and without. One position too many ends the process."""
    done = subprocess.run([sys.executable, "-c", CHECK, str(extra)], capture_output=True, text=True)
    if extra:
        assert done.returncode < 0, done.stderr[-2000:]  # by a signal
    else:
        assert done.stdout == "read nothing else\n", done.stderr[-2000:]
