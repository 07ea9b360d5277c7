"""Encoded slots: an encoding alone, and stacked under every method with a budget."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import test_caches
import torch
from test_caches import BUDGETED, WHEN, lms, spell
from torch import Tensor

from zoo.lm import LM

ENCODINGS = ["kivi:bits=4"]
ALONE = [spell(encoding, residual=64, when=when) for encoding in ENCODINGS for when in WHEN]
STACKED = [spell(attn, budget=160, when=when) + f"+{encoding}" for attn in BUDGETED for when in WHEN for encoding in ENCODINGS]
STACKED += [f"subgen:delta=4,when=decode+{encoding}" for encoding in ENCODINGS]
__all__ = ["lms"]


@pytest.fixture(scope="module")
def double(lms: dict[str, LM]) -> dict[str, LM]:
    """In float64: where rounding differs in float32, a number may go to another step of its grid, and what follows is no rounding error."""
    return {name: LM(deepcopy(one.model).double(), one.tokenizer, one.attn, one.end_ids, compile="off") for name, one in lms.items()}


@pytest.fixture(scope="module")
def lm(double: dict[str, LM]) -> LM:
    return double["llama"]


@pytest.fixture(scope="module")
def ids(lm: LM) -> Tensor:
    return torch.randint(0, lm.config.vocab_size, (3, 800), generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True)
def clusters_begin_early(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = test_caches.SubGen.slots
    monkeypatch.setattr(test_caches.SubGen, "slots", lambda self, tokens: 160 if self.delta else slots(self, tokens))


@pytest.mark.parametrize("attn", ALONE + STACKED)
def test_the_contract(lm: LM, ids: Tensor, attn: str, tmp_path: Path) -> None:
    """Chunks, batches, copies and bytes, as of every method (tests/test_caches.py)."""
    test_caches.test_chunks_change_nothing(lm, ids, attn)
    test_caches.test_batch_equals_single(lm, ids, attn)
    test_caches.test_clone_save_load_expand_continue_identically(lm, ids, attn, tmp_path)
    test_caches.test_nbytes_are_the_storages(lm, ids, attn)
