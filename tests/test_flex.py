"""Backend `flex`: FlexAttention against the formula in float64, its block masks, and against mutants of itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_llama
from kernel_checks import allowed, close, kernels_match, make, paged, true_lse, wide
from mutants import is_caught

import zoo
from zoo.attention import flex
from zoo.attention.backends import BACKENDS, choose, composed
from zoo.attention.slots import PagedSlots, Parts, Slots, finish, paged_parts, slot_attention, slot_parts, visible
from zoo.compiled import missing_tool
from zoo.errors import ZooError

if missing_tool():
    pytest.skip(f"FlexAttention is compiled code: {missing_tool()}", allow_module_level=True)

ROUNDED = {torch.float32: 0.0, torch.bfloat16: 2**-8}  # probabilities are rounded before the last product, relative to the values


def matches(module: Any, shape: tuple[int, ...], dtype: torch.dtype, weights: bool, window: int | None) -> None:
    q, q_pos, s = make(shape, dtype, sum(shape), weights, window)
    with torch.no_grad():
        out = module.flex(q, q_pos, s)
    true = slot_attention(q.double(), q_pos, wide(s))
    bound = allowed(slot_attention(q, q_pos, s), true, q, s) + ROUNDED[dtype] * float(true.abs().max())
    close(out, true, bound, "output")
    assert (out.transpose(1, 2)[q_pos < 0] == 0).all()


def pages_match(module: Any, T: int, window: int | None) -> None:
    q, q_pos, s, spans = paged(5, torch.float32, T, window=window)
    with torch.no_grad():
        out = module.flex_pages(q, q_pos, s, spans, lse=False)
    true = finish(paged_parts(q.double(), q_pos, wide(s)), torch.float64)
    close(out, true, allowed(finish(paged_parts(q, q_pos, s), q.dtype), true, q, s), "output of pages")
    assert (out[0, 3:] == 0).all()  # its second head owns nothing


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "window"), [(False, None), (True, 50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 9, 3, 1, 64, 300), (2, 4, 4, 3, 80, 129), (1, 4, 1, 300, 64, 500)])
def test_matches_float64(shape: tuple[int, ...], dtype: torch.dtype, weights: bool, window: int | None) -> None:
    """A step, a short chunk and one of several blocks: empty slots, padding, and slots in any order."""
    matches(flex, shape, dtype, weights, window)


@pytest.mark.parametrize("T", [1, 4])
def test_parts_are_merged(T: int) -> None:
    """What a GPU does with a tail's and with pages' kernel, here by the formula, which gives a log-sum-exp too; masses are flex's own."""

    def answer(parts: Parts, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return finish(parts, q.dtype), true_lse(parts, q[..., 0])

    def of_slots(q: torch.Tensor, q_pos: torch.Tensor, s: Slots) -> tuple[torch.Tensor, torch.Tensor]:
        return answer(slot_parts(q, q_pos, s), q)

    def of_pages(q: torch.Tensor, q_pos: torch.Tensor, s: PagedSlots, spans: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return answer(paged_parts(q, q_pos, s), q)

    kernels_match(composed(of_slots, of_pages, flex.flex_mass, flex.flex_page_mass), T)


@pytest.mark.slow
@pytest.mark.parametrize(("T", "window"), [(1, None), (4, 12)])
def test_pages_match_float64(T: int, window: int | None) -> None:
    """Each head's list of pages is its list of blocks."""
    pages_match(flex, T, window)


@pytest.mark.parametrize("window", [None, 40, 300])
def test_blocks_that_are_left_out_hold_nothing(window: int | None) -> None:
    """Whatever a query sees lies in a block that is looked at; of an ordered store no other block is, and one of padding alone none."""
    q_pos = torch.stack((torch.arange(600, 1000), torch.arange(600, 1000)))
    q_pos[0, :130] = -1
    ordered = torch.arange(1000, dtype=torch.int32).expand(2, 1, 1000).clone()
    ordered[:, :, 200:420] = -1  # a whole block of nothing
    mixed = ordered[:, :, torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    for pos in (ordered, mixed):
        count, which = flex.visible_blocks(*flex.whole_blocks(torch.zeros(2, 1, 400, 1), q_pos)[1:], pos, window)
        assert count.shape == (2, 1, 4)
        assert which.shape == (2, 1, 4, 8)
        looked = torch.zeros(2, 1, 4, 8, dtype=torch.bool)
        for b in range(2):
            for i in range(4):
                looked[b, 0, i, which[b, 0, i, : count[b, 0, i]].long()] = True
        seen = visible(q_pos, Slots(torch.zeros(2, 1, 1000, 1), torch.zeros(2, 1, 1000, 1), pos, window=window))
        seen = torch.nn.functional.pad(seen, (0, 24, 0, 112)).unflatten(3, (8, 128)).unflatten(2, (4, 128)).any(-1).any(3)
        assert not (seen & ~looked).any()
        if pos is ordered:
            assert torch.equal(looked, seen)
            assert count[0, 0, 0] == 0


@pytest.mark.slow
def test_a_growing_store_compiles_once() -> None:
    for S in (200, 264, 328, 1000):
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=S > 200):
            q, q_pos, s = make((1, 4, 2, 1, 64, S), torch.float32, S, False, None)
            assert (flex.flex(q, q_pos, s) - slot_attention(q, q_pos, s)).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("attn", "compile"), [("full", "off"), ("sliding:window=40", "on")])
def test_generation(tmp_path: Path, attn: str, compile: str) -> None:
    """By itself, and inside a compiled step, of which it is a part: the eager path's logits."""
    folder, logits = str(write_llama(tmp_path / "m", head_dim=16, num_hidden_layers=2)), []
    ids = torch.randint(0, 300, (1, 90), generator=torch.Generator().manual_seed(2))
    for backend, how in (("eager", "off"), ("flex", compile)):
        lm = zoo.load(folder, attn=attn, dtype="float32", backend=backend, compile=how)
        cache = lm.new_cache(1, max_tokens=90)
        lm.prefill(ids[:, :70], cache)
        logits.append(torch.stack([lm.decode_step(ids[:, t], cache) for t in range(70, 90)]))
        assert lm.backend == backend
        assert lm.step.ran["compiled"] == (20 if how == "on" else 0)
    assert (logits[0] - logits[1]).abs().max() < 1e-3


def test_what_it_is_not_for() -> None:
    """Separate denominator weights; and no CPU takes it by itself, since it is the slowest form there (docs/log.md)."""
    q, q_pos, s = make((1, 4, 2, 1, 64, 30), torch.float32, 1, True, None)
    with pytest.raises(ZooError, match="cannot weigh numerator and denominator apart"):
        BACKENDS["flex"](q, q_pos, replace(s, b=s.a))
    assert choose("flex", q.device, q.dtype, 64) == "flex"
    assert choose("auto", q.device, q.dtype, 64) != "flex"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(s <= at)", "(s < at)"),  # a query does not see its own token
        ("s > at - window", "s >= at - window"),
        ("(s >= 0) & (s", "(s"),  # empty slots
        ("score if a is None else score + a[b, h // R, j]", "score"),  # log-weights are forgotten
        ("else score + a[b, h // R, j]", "else score - a[b, h // R, j]"),
        ("0 if shared else h // R, j]", "0, j]"),  # positions of the first head
        ("a[b, h // R, j]", "a[b, h % a.shape[1], j]"),  # grouped the wrong way
    ],
)
def test_mutants_fail(old: str, new: str, tmp_path: Path) -> None:
    is_caught(lambda m: matches(m, (1, 4, 2, 3, 64, 130), torch.float32, True, 30), flex, old, new, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return score + a", "return score + 0 * a"),
        ("pos[j // PAGE, j % PAGE]", "pos[j // PAGE, (j + 1) % PAGE]"),
        ("q_pos[b // G, i]", "q_pos[b // G, i] - 1"),
        ("count = owned[:, None, None]", "count = owned[:, None, None] - owned[:, None, None].clamp(max=1)"),  # a page too few
    ],
)
def test_mutants_of_pages_fail(old: str, new: str, tmp_path: Path) -> None:
    is_caught(lambda m: pages_match(m, 4, 12), flex, old, new, tmp_path)
