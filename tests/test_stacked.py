"""Stacks of a method and an encoding: exact where they say so, in low precision, in a model with a window, and subgen's whole contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import test_caches
import torch
from conftest import feed
from test_caches import BUDGETED, CLOSE, WHEN, lms, new, spell
from test_encoded import ENCODINGS, double, ids, lm, pages_of, rms
from torch import Tensor

from zoo.attention import parse
from zoo.attention.slots import Slots, slot_attention
from zoo.attention.subgen_slots import Maker
from zoo.lm import LM

__all__ = ["double", "ids", "lm", "lms"]


@pytest.mark.parametrize("attn", BUDGETED)
def test_a_stack_is_exact_up_to_its_budget(lm: LM, ids: Tensor, attn: str) -> None:
    """exact_when of a stack is its method's: with a slot for each token nothing is encoded, in every mode; with two fewer something is."""
    n = 192
    true = lm.logits(ids[:1, : n + 2])
    for when, one in zip(WHEN, ENCODINGS, strict=True):
        assert parse(f"{attn}+{one}").exact_when == parse(attn).exact_when == "budget >= tokens"
        for budget, exact in ((n + 2, n + 2), (n, n)):
            got = feed(lm, new(lm, f"{spell(attn, budget=budget, when=when)}+{one}"), ids[:1, : n + 2], n + 1, 64)
            assert (got - true)[:, :exact].abs().max() < CLOSE
            assert exact == n + 2 or (got - true)[:, n + 1].abs().max() > 1e-2


@pytest.mark.parametrize("one", ENCODINGS)
@pytest.mark.parametrize("attn", ["h2o", "sinks", "snapkv", "uniform"])
def test_a_stack_in_a_model_with_a_window(double: dict[str, LM], ids: Tensor, attn: str, one: str) -> None:
    """A window of 300: chunks as one pass, past the window, too; nothing that has expired is shown, and with many bits it answers nearly as
    without an encoding."""
    lm = double["windowed"]
    for when in ("decode", "stream"):
        spelling = spell(attn, budget=160, when=when)
        whole = new(lm, f"{spelling}+{one}")
        expected = feed(lm, whole, ids[:1, :600], 331, 1000)
        assert (feed(lm, new(lm, f"{spelling}+{one}"), ids[:1, :600], 331, 64) - expected).abs().max() < CLOSE
        assert pages_of(whole).used(0) > 0
        held = whole[0].slots().pos  # type: ignore[union-attr]
        assert int((held >= 0).sum(-1).max()) <= 160 + 1
        settled: Any = pages_of(whole).pos
        assert int(settled[settled >= 0].min()) >= 600 - 300 - 64
    if attn == "sinks":  # its choice does not follow from answers
        plain = feed(lm, new(lm, spelling), ids[:1, :600], 331, 64)
        fine = feed(lm, new(lm, f"{spelling}+kivi:bits=8"), ids[:1, :600], 331, 64)
        assert 1e-6 < rms(fine - plain) < 0.02 * rms(plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("one", "most"),
    [("kivi:bits=8", 0.0075), ("kivi:bits=4", 0.12), ("turboquant:bits=4", 0.15), ("turboquant:bits=3.5,mode=prod", 0.27), ("qjl", 0.65)],
)
@pytest.mark.parametrize("attn", ["sinks:budget=200,when=stream", "uniform:budget=200", ""])
def test_low_precision(lms: dict[str, LM], attn: str, one: str, most: float, dtype: torch.dtype) -> None:
    """In float32 and bfloat16: answers are those of the formula on what is held, up to the dtype's rounding; and as far from those
    without an encoding as a tenth more than the root of both distortions' squares, of keys (scores have a deviation of 1) and of values."""
    lm, g = lms["llama"], torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, n, 640, 32, generator=g).to(dtype) for n in (4, 2, 2))
    ids, stacked, outs = torch.zeros(1, 640, dtype=torch.int64), f"{attn}+{one}" if attn else spell(one, residual=32, when="stream"), []
    for spelling in (stacked, attn or "full"):
        cache, last = parse(spelling).caches(lm.config, lm.model.rotary, 1, None, None, dtype, "cpu"), []
        cache.begin_prompt([600])
        for t in range(0, 640, 40):
            if t == 600:
                cache.end_prompt()
            for _, pos in cache.split(ids[:, t : t + 40]):
                at = pos[0]
                last = [layer.attend(q[:, :, at], k[:, :, at], v[:, :, at], pos) for layer in cache]
                s = cache[0].slots()
        true = slot_attention(q[:, :, at].double(), pos, Slots(s.k.double(), s.v.double(), s.pos, s.a))
        assert last[0].dtype == dtype
        assert (last[0].double() - true).abs().max() < 8 * torch.finfo(dtype).eps * float(s.v.abs().max())
        outs.append(last[0].double())
    coded, plain = outs
    assert most / 2 < rms(coded - plain) / rms(plain) < most


@pytest.mark.parametrize("attn", [f"{spell('subgen', budget=160, when=when)}+{one}" for when, one in zip(WHEN, ENCODINGS, strict=True)])
def test_subgens_contract(lm: LM, ids: Tensor, attn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches, copies and saves, as of every stack. The weights in a mean are float32 sums, which differ by rounding from batch to batch,
    and a number that lies between two steps may then go to the other: here they are rounded, so that means are equal in float64."""
    weights = Maker.weights

    def rounded(self: Maker, slots: dict[str, Tensor], seen: Tensor, count: Tensor) -> tuple[Tensor, list[Tensor]]:
        u, scores = weights(self, slots, seen, count)
        return torch.where(u > 0, ((u.double().clamp(min=1e-30).log2() * 16).round() / 16).exp2().to(u.dtype), 0.0), scores

    monkeypatch.setattr(Maker, "weights", rounded)
    test_caches.test_batch_equals_single(lm, ids, attn)
    test_caches.test_clone_save_load_expand_continue_identically(lm, ids, attn, tmp_path)
