"""Encoded slots: an encoding alone, and stacked under every method with a budget: the contract, what stays, bytes, spelling."""

from __future__ import annotations

import itertools
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import test_caches
import torch
from kernel_checks import well_behaved
from test_caches import BUDGETED, WHEN, feed, lms, new, spell
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.attention import ATTENTION, encoded_slots, parse
from zoo.attention.budgeted import SINKS, Budgeted
from zoo.attention.clustering import row as row_of
from zoo.attention.encoded_slots import ROWS, encoded_mass, encoded_parts
from zoo.attention.encoding import EncodedPages, Encoding
from zoo.attention.slots import PAGE, slot_mass, slot_parts
from zoo.errors import ZooError
from zoo.eval import protocols
from zoo.eval.protocols import method_of, same_reading
from zoo.lm import LM

ENCODINGS = ["kivi:bits=4", "turboquant:bits=3.5,mode=prod", "qjl"]
ALONE = [spell(one, residual=64, when=when) for one in ENCODINGS for when in WHEN]
EVERY = [f"{spell(attn, budget=160, when=when)}+{one}" for attn in BUDGETED for when in WHEN for one in ENCODINGS]
BOTH = "balancekv:weights=both"
# Every pair in one of the modes in which slots come and go.
BINDING = [
    f"{spell(attn, budget=160, when=WHEN[1 + (i + j) % 2])}+{one}"
    for i, attn in enumerate([*BUDGETED, BOTH])
    for j, one in enumerate(ENCODINGS)
]
# Of every pair the whole contract in one mode; of subgen, whose sums are float32, see below and tests/test_stacked.py.
WHOLE = ALONE + [
    f"{spell(attn, budget=160, when=WHEN[(i + j) % 3])}+{one}"
    for i, attn in enumerate([*BUDGETED, BOTH])
    for j, one in enumerate(ENCODINGS)
    if attn != "subgen"
]
OFF = {"kivi:bits=4": (0.1, 0.1), "turboquant:bits=3.5,mode=prod": (0.25, 0.17), "qjl": (0.5, 0.5)}  # at most, of keys and values, relative
FINE = ["kivi:bits=8", "turboquant:bits=8", "turboquant:bits=8,mode=prod"]  # so many bits that little is left to see
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


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def pages_of(cache: Any) -> EncodedPages:
    pages = cache[0].pages
    assert isinstance(pages, EncodedPages)
    return pages


def test_all_are_here() -> None:
    assert {one.partition(":")[0] for one in ENCODINGS} == {name for name, kind in ATTENTION.items() if issubclass(kind, Encoding)}
    assert {one.partition(":")[0] for one in BUDGETED} == {name for name, kind in ATTENTION.items() if issubclass(kind, Budgeted)}


# The contract


@pytest.mark.parametrize("attn", WHOLE)
def test_the_contract(lm: LM, ids: Tensor, attn: str, tmp_path: Path) -> None:
    """Chunks, batches, copies and bytes, as of every method (tests/test_caches.py)."""
    test_caches.test_chunks_change_nothing(lm, ids, attn)
    test_caches.test_batch_equals_single(lm, ids, attn)
    test_caches.test_clone_save_load_expand_continue_identically(lm, ids, attn, tmp_path)
    test_caches.test_nbytes_are_the_storages(lm, ids, attn)


@pytest.mark.parametrize("attn", [one for one in WHOLE if "when=prompt" not in one])
def test_a_copy_inside_a_prompt(lm: LM, ids: Tensor, attn: str, tmp_path: Path) -> None:
    test_caches.test_a_copy_inside_a_prompt(lm, ids, attn, tmp_path)


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("one", ENCODINGS)
def test_clusters_in_chunks(lm: LM, ids: Tensor, when: str, one: str) -> None:
    """A cluster's mean is a float32 sum: now and then one of its numbers goes to the next step. That is a small part of what the encoding
    itself does, in chunks as in copies."""
    attn = spell("subgen", budget=160, when=when)
    plain = feed(lm, new(lm, attn), ids[:1, :400], 231, 1000)
    whole = new(lm, f"{attn}+{one}")
    expected = feed(lm, whole, ids[:1, :400], 231, 1000)
    copy = whole.clone()
    for chunk in (1, 64):
        got = feed(lm, new(lm, f"{attn}+{one}"), ids[:1, :400], 231, chunk)
        assert rms(got - expected) < 0.1 * rms(expected - plain)
    same = [lm.decode_step(ids[:1, 400].expand(cache.batch), cache) for cache in (whole, copy.expand(2), copy)]
    assert all((x[0] - same[0][0]).abs().max() < 1e-9 for x in same)


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("one", ENCODINGS)
def test_exact_up_to_the_residual(lm: LM, ids: Tensor, one: str, when: str) -> None:
    """exact_when, at its bound, and not beyond it (a group of 32 must be full before it is encoded)."""
    attn = spell(one, residual=96, when=when)
    assert parse(attn).exact_when == "residual >= tokens"
    true = lm.logits(ids[:1, :320])
    for n, prompt in ((96, 96), (96, 50), (127, 127)):
        assert (feed(lm, new(lm, attn), ids[:1, :n], prompt, 64) - true[:, :n]).abs().max() < 1e-4
    got = feed(lm, new(lm, attn), ids[:1, :320], 200, 64)
    assert (got - true)[:, 201:].abs().max() > 1e-2
    assert ((got - true)[:, :200].abs().max() < 1e-4) == (when != "stream")  # a prompt is read exactly


@pytest.mark.parametrize("attn", BUDGETED)
def test_every_pair_after_a_prompt(lm: LM, ids: Tensor, attn: str) -> None:
    """Every method x every encoding: the slots are those that the method has settled without one, position, weight and head, and keys and
    values are as far from them as the encoding is from anything."""
    plain = new(lm, attn := spell(attn, budget="40%", when="prompt"))
    lm.prefill(ids[:1, :400], plain)
    for one, (of_k, of_v) in OFF.items():
        cache = new(lm, f"{attn}+{one}")
        lm.prefill(ids[:1, :400], cache)
        for layer in range(len(cache)):
            is_, was = (by_position(c[0].pages.read(layer)) for c in (cache, plain))  # type: ignore[union-attr]
            assert torch.equal(is_["pos"], was["pos"])
            assert (is_["a"] - was["a"]).abs().max() < 1e-6
            assert of_k / 2 < rms(is_["k"] - was["k"]) / rms(was["k"]) < of_k
            assert of_v / 2 < rms(is_["v"] - was["v"]) / rms(was["v"]) < of_v
        assert pages_of(cache).used(0) < 0.6 * plain[0].pages.used(0)  # type: ignore[union-attr]


def by_position(slots: dict[str, Tensor]) -> dict[str, Tensor]:
    """What there is, (N, ...): heads one after the other, each in the order of positions."""
    order = slots["pos"].argsort(-1)
    sorted_ = {
        name: row_of(t, order) if t.dim() == 4 else t.gather(2, order) for name, t in slots.items() if name in ("k", "v", "a", "pos")
    }
    return {name: t[sorted_["pos"] >= 0] for name, t in sorted_.items()}


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("one", FINE)
def test_many_bits_are_nearly_exact(lm: LM, ids: Tensor, one: str, when: str) -> None:
    """At 8 bits a method answers nearly as it does without an encoding: nothing is in another's place. After a prompt all do, clusters
    included; later, those whose choice does not follow from answers."""
    choosing = ["h2o", "subgen", "subgen_kcenter:weight=true", "tova"] if when == "prompt" else []
    for attn in ("", *(spell(a, budget=160, when=when) for a in ("sinks", "sinks:positions=cache", "uniform", *choosing))):
        stacked = f"{attn}+{one}" if attn else spell(one, residual=64, when=when)
        plain = feed(lm, new(lm, attn or "full"), ids[:1, :400], 231, 64)
        off = rms(feed(lm, new(lm, stacked), ids[:1, :400], 231, 64)[:, 231:] - plain[:, 231:])
        assert 1e-6 < off < 0.1 * rms(plain - lm.logits(ids[:1, :400]) if attn else plain), attn


def test_pages_grow_where_there_is_no_budget(lm: LM, ids: Tensor) -> None:
    """subgen by delta takes as many pages as it needs: every token stays counted, in more and more pages of codes."""
    cache, pages, slots = new(lm, "subgen:delta=4,when=stream+kivi:bits=8"), [], []
    for n in range(0, 800, 100):
        feed(lm, cache, ids[:1, n : n + 100], 100, 64) if n == 0 else lm.model(ids[:1, n : n + 100], cache)
        held = cache[1].slots()
        assert held.a is not None
        assert (held.a.exp() * (held.pos >= 0)).sum(-1).round().tolist() == [[n + 100] * 2]
        pages.append(int(pages_of(cache).share.sum()))
        slots.append(int((held.pos >= 0).sum()))
    assert pages == sorted(pages)
    assert 0 == pages[0] < pages[-1]
    assert slots[-1] < 2 * 800


@pytest.mark.parametrize("one", ENCODINGS)
def test_a_models_window(double: dict[str, LM], ids: Tensor, one: str) -> None:
    """Pages are a ring where a model has a window (300): as many as it is long, chunks as one pass, and at 8 bits what `full` says."""
    lm = double["windowed"]
    attn = spell(one, residual=64, when="stream")
    whole = new(lm, attn)
    expected = feed(lm, whole, ids[:1], 500, 1000)
    assert (feed(lm, new(lm, attn), ids[:1], 500, 7) - expected).abs().max() < 1e-4
    assert int(pages_of(whole).share.max()) <= 300 // PAGE + 2
    fine = feed(lm, new(lm, "kivi:bits=8,residual=64,when=stream"), ids[:1], 500, 64)
    assert rms(fine - lm.logits(ids[:1])) < 0.02 * rms(fine)


# What is encoded, and what stays


def coded(cache: Any) -> dict[tuple[int, int, int], tuple[bytes, float, int]]:
    """(layer, head, position) -> the code of what lies there, what its page shares included, its log-weight, and its row."""
    found, pages = {}, pages_of(cache)
    for layer in range(len(cache)):
        for head in range(len(pages.count[layer])):
            pos = pages.head("pos", layer, head)
            a = torch.zeros(len(pos)) if pages.a is None else pages.head("a", layer, head)
            first, n = pages.first[layer][head], pages.count[layer][head]
            for row in (pos >= 0).nonzero()[:, 0].tolist():
                page, i = first + row // PAGE, row % PAGE
                assert row < n * PAGE
                bits = b"".join(
                    (getattr(pages, name)[page] if code.shared else getattr(pages, name)[page, i]).numpy().tobytes()
                    for name, code in pages.codes.items()
                )
                found[layer, head, int(pos[row])] = (bits, float(a[row]), row)
    return found


@pytest.mark.parametrize("attn", BINDING + [one for one in ALONE if "when=prompt" not in one])
def test_what_stays_keeps_its_bits(lm: LM, ids: Tensor, attn: str) -> None:
    """Every method x every encoding: through three blocks of decoding, a slot that a method left as it was (the same position and
    weight) has the very same code, and new ones are there. sinks:positions=cache turns the first tokens' keys, so those do change."""
    cache = new(lm, attn)
    feed(lm, cache, ids[:1, :300], 250, 1000)
    before = coded(cache)
    feed(lm, cache, ids[:1, 300:500], 1, 1000)
    after = coded(cache)
    moved = SINKS if "positions=cache" in attn else 0
    # a cluster may lose members to the window of a model only, so one of the same newest token and count is the same
    # and of heads that got fewer pages at the second prompt, what lay in the others is encoded anew
    own = {(layer, head): PAGE * n for layer, counts in enumerate(pages_of(cache).count) for head, n in enumerate(counts)}
    left = {key for key in before if before[key][2] >= own[key[:2]]}
    stayed = [key for key in before if key in after and after[key][1] == before[key][1] and key[2] >= moved and key not in left]
    assert len(left) < len(before) / 4
    assert all(after[key][0] == before[key][0] and after[key][2] == before[key][2] for key in stayed)
    assert set(after) - set(before)
    assert stayed or attn.startswith(("sinks", "tova"))  # `sinks` and, here, `tova` keep none so long but the first ones


@pytest.mark.parametrize("one", ENCODINGS)
def test_a_second_prompt_keeps_bits(lm: LM, ids: Tensor, one: str) -> None:
    """A chat's next turn lays the pages out anew: what a method keeps has the code that it had."""
    for attn in (f"h2o:budget=50%,when=prompt+{one}", spell(one, residual=64, when="prompt"), spell(one, residual=64, when="decode")):
        cache = new(lm, attn)
        lm.prefill(ids[:1, :300], cache)
        before, pages = coded(cache), int(pages_of(cache).share.sum())
        lm.prefill(ids[:1, 300:600], cache)
        after = coded(cache)
        stayed = [key for key in before if key in after]
        assert all(after[key] == before[key] for key in stayed)
        assert len(stayed) > (0.2 * len(before) if "h2o" in attn else 0.999 * len(before))
        assert int(pages_of(cache).share.sum()) > pages


@pytest.mark.parametrize("one", [*ENCODINGS, "kivi:bits=8"])
def test_what_is_made_is_what_is_held(lm: LM, ids: Tensor, one: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """subgen while it streams: no token is lost; and after each block, what a cluster decodes to is near what merging made, as near as
    after the first, however often it has merged."""
    off: list[float] = []
    replace = EncodedPages.replace

    def watched(self: EncodedPages, layers: Any, slots: Any) -> None:
        replace(self, layers, slots)
        row, pos = slots["row"], slots["pos"]
        made, now = (pos >= 0) & (row < 0), self.read(layers)
        match = (now["pos"][:, :, None] == pos[..., None]) & made[..., None]  # newest tokens of a head's slots differ
        v = torch.where(match[..., None], now["v"][:, :, None], 0).sum(3)
        assert match.sum(-1)[made].eq(1).all()
        off.append(rms((v - slots["v"])[made]) / rms(slots["v"][made]))

    monkeypatch.setattr(EncodedPages, "replace", watched)
    cache = new(lm, f"subgen:budget=160,when=stream+{one}")
    feed(lm, cache, ids[:1], 1, 1000)
    slots = cache[0].slots()
    assert slots.a is not None
    assert (slots.a.exp() * (slots.pos >= 0)).sum(-1).round().tolist() == [[800, 800]]
    assert len(off) >= 10
    bound = {"kivi:bits=4": 0.1, "turboquant:bits=3.5,mode=prod": 0.17, "qjl": 0.5, "kivi:bits=8": 0.006}[one]
    assert bound / 4 < max(off) < bound


@pytest.mark.parametrize("when", ["decode", "stream"])
@pytest.mark.parametrize("one", ENCODINGS)
def test_a_halved_value_keeps_its_code(lm: LM, ids: Tensor, one: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """balancekv multiplies some values that it has settled by 1/2: they decode to just that, and all else of
    their codes stays. Of two sequences, one has nothing to halve where the other does."""
    halved, replace, factor = 0, EncodedPages.replace, parse(one).factor  # type: ignore[attr-defined]

    def bits(pages: EncodedPages, layers: Any) -> list[Tensor]:
        rows = pages.rows(layers)
        return [t.flatten(0, 1)[rows] for name in pages.codes if name != factor and (t := getattr(pages, name)).shape[1:2] == (PAGE,)]

    def watched(self: EncodedPages, layers: Any, slots: Any) -> None:
        nonlocal halved
        layers = [layers] if isinstance(layers, int) else layers
        held, old = self.read(layers, anew=True), bits(self, layers)
        stays = (slots["pos"] >= 0) & (slots["row"] >= 0)
        row = slots["row"].clamp(min=0)
        wanted = torch.where(stays[..., None], slots["v"], 0)
        halved += int((row_of(held["v"], row)[stays] * 0.5 == wanted[stays]).all(-1).sum())
        replace(self, layers, slots)
        assert torch.equal(row_of(self.read(layers, anew=True)["v"], row)[stays], wanted[stays])
        for x, y in zip(old, bits(self, layers), strict=True):
            assert torch.equal(row_of(x, row)[stays], row_of(y, row)[stays])

    monkeypatch.setattr(EncodedPages, "replace", watched)
    cache = new(lm, f"balancekv:budget=160,when={when}+{one}", 2)
    lm.prefill(ids[:2, :300], cache, [300, 170])
    for t in range(300, 600):
        lm.decode_step(ids[:2, t], cache)
    assert halved > 30


@pytest.mark.parametrize("one", ENCODINGS)
def test_a_page_and_its_vacant_rows(one: str) -> None:
    """`replace` with some rows kept: those come first that were there, each where it was; others go to free rows, also where the first
    page is full; what was dropped is gone. A head that has fewer pages than another is not disturbed."""
    pages = EncodedPages(parse(one), 1, 1, 2, 16, torch.float32, "cpu", {"mass": (0, torch.float32)})  # type: ignore[arg-type]
    pages.lay_out(torch.tensor([[[2, 1]]]))
    g = torch.Generator().manual_seed(1)

    def slots(n: int, first: int) -> dict[str, Tensor]:
        new = {name: torch.randn(1, 2, n, 16, generator=g) for name in ("k", "v")}
        pos = (first + torch.arange(n)).expand(1, 2, n).clone()
        return new | {"a": torch.zeros(1, 2, n), "pos": pos, "mass": pos.float(), "row": torch.full((1, 2, n), -1)}

    first = slots(40, 0)
    first["pos"][0, 1, 20:] = -1
    pages.replace(0, first)
    held = pages.read(0)
    assert [held["pos"][0, h][held["pos"][0, h] >= 0].tolist() for h in (0, 1)] == [list(range(40)), list(range(20))]
    more = slots(30, 100)
    more["pos"][0, 1, 12:] = -1
    keep = held["pos"] % 2 == 0
    both = {name: torch.cat((more[name], t), 2) for name, t in held.items()}
    both["pos"] = torch.cat((more["pos"], torch.where(keep, held["pos"], -1)), 2)
    old = {name: t.clone() for name, t in pages.coded(slice(None)).items()}
    pages.replace(0, both)
    after = pages.read(0)
    assert torch.equal(after["pos"].where(keep, -1), held["pos"].where(keep, -1))
    for h, n in ((0, 20 + 30), (1, 10 + 12)):
        there = after["pos"][0, h] >= 0
        assert int(there.sum()) == n
        assert torch.equal(after["mass"][0, h][there], after["pos"][0, h][there].float())
        assert torch.equal(after["k"][0, h][keep[0, h]], held["k"][0, h][keep[0, h]])
        new_ones = there & ~keep[0, h]
        wanted = more["v"][0, h][after["pos"][0, h][new_ones].long() - 100]
        assert rms(after["v"][0, h][new_ones] - wanted) < 0.6 * rms(wanted)
    assert (pages.pos[0] == -1).all()
    assert all(not torch.equal(t, old[name]) for name, t in pages.coded(slice(None)).items() if not pages.codes[name].shared)
    with pytest.raises(AssertionError, match="more slots"):
        pages.replace(0, slots(40, 0))


@pytest.mark.parametrize(("held", "most"), [(1, 0.15), (40, 0.1)])
def test_a_page_that_begins_with_one_slot(held: int, most: float) -> None:
    """One slot comes into an empty page, 31 later: what the page shares is found from the head's other slots as well, where there are any,
    such as that one channel is large; where there are none, later keys are still on a grid that suits them."""
    one = parse("kivi:bits=4")
    assert isinstance(one, Encoding)
    pages = EncodedPages(one, 1, 1, 1, 64, torch.float64, "cpu", {})
    pages.lay_out(torch.tensor([[[2]]]))
    g = torch.Generator().manual_seed(1)
    plain = torch.arange(64) != 3
    for n, first in ((held, 0), (1, 100), (31 if held > 1 else 30, 200)):
        k = torch.randn(1, 1, n, 64, generator=g, dtype=torch.float64)
        if held > 1:
            k[..., 3] = 40 + 10 * k[..., 3]
        slots = {"k": k, "v": k, "a": torch.zeros(1, 1, n), "pos": first + torch.arange(n).view(1, 1, n), "row": torch.full((1, 1, n), -1)}
        old = pages.read(0, anew=True)
        keep = (old["pos"] >= 0) & ((old["pos"] < 32) | (old["pos"] >= 100))  # all of the first page, then the second's only slot
        old["pos"] = torch.where(keep, old["pos"], -1)
        pages.replace(0, {name: torch.cat((old[name], slots[name].to(old[name].dtype)), 2) for name in old})
    got = pages.read(0)
    late = got["k"][0, 0][got["pos"][0, 0] >= 200]
    assert len(late) == n
    assert rms((late - k[0, 0])[:, plain]) < most * rms(k[0, 0][:, plain])


# Reading


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("one", [*ENCODINGS, "turboquant:bits=2"])
@pytest.mark.parametrize("queries", [1, 5])
def test_blocks_add_up(lm: LM, ids: Tensor, one: str, queries: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What blocks of pages say, with their log-weights, is the formula over decoded slots, whatever a block's size; so is the attention
    that slots get. Sequences of different lengths, one of them without pages, and a padded query."""
    cache = new(lm, f"uniform:budget=60%,when=prompt+{one}", 3)
    lm.prefill(ids[:, :700], cache, [700, 400, 9])
    layer: Any = cache[1]
    pages, q = pages_of(cache), torch.randn(3, lm.config.num_attention_heads, queries, 32, dtype=torch.float64)
    at = torch.tensor([[699], [300], [8]]) - torch.arange(queries)
    at[2, -1] = -1
    layer.window = window
    settled, slots = layer.read_settled(), pages.read(1)
    dense = test_caches.Slots(slots["k"], slots["v"], slots["pos"], slots["a"], window=window)
    want = slot_parts(q, at, dense)
    for rows in (ROWS, 128):
        monkeypatch.setattr(encoded_slots, "ROWS", rows)
        got = settled.parts(q, at)
        seen = want.den > 0
        assert torch.equal(got.den > 0, seen)
        for x, y in ((got.num, want.num), (got.den, want.den)):
            scale = (got.max_den - want.max_den).exp().nan_to_num(0.0, 0.0, 0.0)
            assert (x * (scale[..., None] if x.dim() == 5 else scale) - y)[seen].abs().max() < 1e-4
        weight = torch.rand(3, queries, dtype=torch.float64)
        for power in (1, 2):
            mass = settled.mass(q, at, want, weight, power)
            listed = mass[layer.table.long()].view(3, 2, -1)
            there = slots["pos"] >= 0
            assert (listed[:, :, : there.shape[2]] - slot_mass(q, at, dense, want, weight, power))[there].abs().max() < 1e-4


@pytest.mark.parametrize("attn", ["kivi:residual=64,when=prompt", "qjl:residual=64,when=prompt", "h2o:budget=160,when=prompt+kivi"])
def test_operators_are_well_behaved(lm: LM, ids: Tensor, attn: str) -> None:
    cache = new(lm, attn)
    lm.prefill(ids[:1, :300], cache)
    layer: Any = cache[0]
    settled, q = layer.read_settled(), torch.randn(1, lm.config.num_attention_heads, 2, 32)
    pos, top = torch.tensor([[298, 299]]), torch.zeros(2, lm.config.num_attention_heads // 2, 2)
    well_behaved(torch.ops.zoo.encoded_parts.default, q, pos, *settled.arguments())
    well_behaved(torch.ops.zoo.encoded_mass.default, q, pos, top, torch.ones_like(top), 1, *settled.arguments())


@pytest.mark.parametrize("one", [*ENCODINGS, "kivi:bits=2", "turboquant:bits=4"])
def test_nothing_is_decoded_whole(lm: LM, ids: Tensor, one: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks of 256 rows, no tensor made in a decode step behind 2,000 tokens holds more than a block's numbers; here a third of the
    keys."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given:
                    largest = max(largest, t.numel())
            return out

    cache, tokens = new(lm, spell(one, residual=64, when="prompt")), 2000
    monkeypatch.setattr(encoded_slots, "ROWS", 256)
    cache.begin_prompt([tokens])
    with torch.no_grad():
        for start in range(0, tokens, 500):
            for piece, where in cache.split(ids[:1, torch.arange(start, start + 500) % 800]):
                lm.model.hidden(piece, where, cache)
    cache.end_prompt()
    for name, op in (("encoded_parts", encoded_parts), ("encoded_mass", encoded_mass)):
        monkeypatch.setattr(encoded_slots, name, op._init_fn)  # as they are inside the operators, where no mode looks
    q = torch.randn(1, lm.config.num_attention_heads, 1, 32, dtype=torch.float64)
    with Watch():
        settled = cache[1].read_settled()  # type: ignore[attr-defined]
        parts = settled.parts(q, torch.tensor([[tokens]]))
        settled.mass(q, torch.tensor([[tokens]]), parts)
    keys = 2 * (tokens - 64) * 32  # of both heads
    assert int((pages_of(cache).pos >= 0).sum()) == 2 * 2 * ((tokens - 64) // PAGE * PAGE)
    assert 256 * 32 <= largest <= 3 * 256 * 32 < keys / 3  # a block's signs, or its words, are up to three times its numbers


# Bytes


@pytest.mark.parametrize(
    ("one", "row", "page", "tables"),
    [  # D = 32: keys, what is beside them, values, what is beside those
        ("kivi:bits=4", 16 + 16 + 4, 2 * 32 * 2, 0),
        ("kivi:bits=2", 8 + 8 + 4, 2 * 32 * 2, 0),
        ("kivi:bits=8", 32 + 32 + 4, 2 * 32 * 2, 0),
        ("turboquant:bits=4", 16 + 2 + 16 + 2, 0, 4 * (32 * 32 + 16)),
        ("turboquant:bits=3.5", 14 + 2 + 14 + 2, 0, 4 * (32 * 32 + 8 + 16)),
        ("turboquant:bits=3,mode=prod", 8 + 2 + 4 + 2 + 12 + 2, 0, 4 * (2 * 32 * 32 + 4 + 8)),
        ("qjl", 8 + 4 + 4 + 8 + 4, 8, 4 * (64 * 32 + 32 * 8)),
    ],
)
def test_bytes_are_what_arithmetic_says(lm: LM, ids: Tensor, one: str, row: int, page: int, tables: int) -> None:
    """600 tokens, residual 64: 512 of them as codes, 16 pages a head, in 2 layers of 2 heads; 4 bytes of position a row."""
    cache = new(lm, spell(one, residual=64, when="prompt"))
    lm.prefill(ids[:1, :600], cache)
    settled = 2 * 2 * (512 * (row + 4) + 16 * page) + tables
    tail = 2 * 88 * (2 * 2 * 32 * 8 + 4)  # float64
    lists = sum(t.nbytes for layer in cache for name, t in layer.named_buffers(recurse=False))
    own = 8 + 8 + 1 + pages_of(cache).share.nbytes  # tokens_seen, held, bounded
    assert cache.nbytes().used == settled + tail + lists + own
    allocated = sum(t.nbytes for name, t in pages_of(cache).named_buffers())
    assert allocated == settled + pages_of(cache).share.nbytes + PAGE * (row + 4) + page  # and the empty page
    plain = new(lm, "full")
    lm.prefill(ids[:1, :600], plain)
    assert cache.nbytes().used < 0.4 * plain.nbytes().used


@pytest.mark.parametrize("attn", ["h2o:budget=160,when=stream", "subgen:budget=160,when=decode"])
@pytest.mark.parametrize("one", ENCODINGS)
def test_a_stacked_stream_stays_small(lm: LM, ids: Tensor, attn: str, one: str) -> None:
    """As many slots as without an encoding, in fewer bytes, however long the text."""
    sizes = []
    for spelling in (attn, f"{attn}+{one}"):
        cache = new(lm, spelling)
        feed(lm, cache, ids[:1], 300, 100)
        early = cache.nbytes().used
        feed(lm, cache, ids[1:2], 1, 100)
        sizes.append((test_caches.owned(cache), cache.nbytes().used, cache.nbytes().allocated))
        assert cache.nbytes().used <= early * 1.25
    (slots, used, allocated), (stacked, less, small) = sizes
    assert abs(slots - stacked) <= (16 if "subgen" in attn else 0)
    assert less < 0.85 * used
    assert small < 0.85 * allocated


# Spelling, and the evaluation


@pytest.mark.parametrize("attn", [*EVERY, *ALONE, "subgen:delta=4,when=prompt+qjl:sketch=3", "kivi", "h2o+kivi", "subgen:delta=1e+1+qjl"])
def test_spelling_goes_there_and_back(attn: str) -> None:
    method = parse(attn)
    assert parse(str(method)) == method
    assert isinstance(method, Encoding) == ("+" not in attn)
    if isinstance(method, Budgeted):
        assert str(method).endswith(f"+{method.encoding}")
        assert method != parse(str(method).partition("+kivi")[0].partition("+turbo")[0].partition("+qjl")[0])


@pytest.mark.parametrize(
    ("attn", "words"),
    [
        ("full+kivi", ["subgen", "h2o", "sinks", "kivi", "qjl", "turboquant"]),
        ("kivi+h2o", ["budget", "h2o"]),
        ("h2o+tova", ["kivi, qjl, turboquant"]),
        ("h2o+kivi+qjl", ["one encoding"]),
        ("kivi+kivi", ["subgen", "kivi"]),
        ("h2o+", ["unknown attention method ''", "kivi"]),
        ("h2o+kivi:bits=3", ["bits=3", "2, 4 or 8"]),
        ("h2o+kivi:residual=64", ["residual", "kivi alone", "h2o"]),
        ("h2o+qjl:when=stream", ["when", "qjl alone"]),
        ("kivi:residual=50", ["residual=50", "multiple of 32"]),
        ("kivi:when=never", ["when=never", "prompt, decode, stream"]),
        ("turboquant:bits=0.5", ["bits=0.5", "between 1 and 8"]),
        ("turboquant:mode=max", ["mode=max", "mse, prod"]),
        ("qjl:sketch=0", ["sketch=0", "between 1 and 64"]),
        ("balancekv:mode=tree+kivi", ["balancekv", "mode=tree", "kivi:bits=4", "mode=halve"]),
        ("h2o:encoding=kivi", ["unknown option", "budget", "age"]),
    ],
)
def test_what_cannot_be_is_told_in_a_line(attn: str, words: list[str]) -> None:
    with pytest.raises(ZooError) as e:
        parse(attn)
    assert all(word in str(e.value) for word in words), str(e.value)
    assert "\n" not in str(e.value)


def test_the_evaluations_protocols(lm: LM, ids: Tensor) -> None:
    """Both protocols say when to compress, stacked or alone; a reading is shared by other budgets of the same stack, by nothing else."""
    assert method_of("h2o:budget=25%+kivi:bits=4", "prefill", 9) == parse("h2o:budget=25%,when=prompt+kivi:bits=4")
    assert method_of("h2o+kivi", "stream", 9) == parse("h2o:when=stream+kivi")
    assert method_of("kivi:bits=2", "stream", 9) == parse("kivi:bits=2,when=stream")
    assert method_of("qjl", "prefill", 9) == parse("qjl:when=prompt")
    for attn in ("h2o:when=stream+kivi", "kivi:when=prompt"):
        with pytest.raises(ZooError, match="leave `when` out"):
            method_of(attn, "prefill", 9)
    half, eighth, plain = (method_of(f"h2o:budget={b}", "prefill", 700) for b in ("50%+kivi:bits=2", "20%+kivi:bits=2", "50%"))
    assert same_reading(half) == same_reading(eighth) != same_reading(plain)
    assert same_reading(half) != same_reading(method_of("h2o:budget=50%+kivi:bits=4", "prefill", 700))
    prompt = ids[0, :700].tolist()
    run = protocols.read(lm, half, prompt)
    for method in (eighth, half):
        assert isinstance(method, Budgeted)
        copy = run.clone()
        protocols.adopt(copy.cache, method)
        alone = protocols.end(protocols.read(lm, method, prompt))
        assert protocols.end(copy).final() == alone.final()
        assert torch.equal(copy.follow(ids[1, :20].tolist()), alone.follow(ids[1, :20].tolist()))
        assert copy.cache.about == alone.cache.about


def test_a_row_of_each_protocol_is_its_own(lm: LM) -> None:
    """An encoding alone does other things under the two protocols: neither's outcome stands for the other."""
    from zoo.eval.run import Prompt
    from zoo.eval.tasks import TASKS, Material

    material = Material(lm.tokenizer, "a b c d e f g h " * 900)
    task = TASKS["kl"]()
    prompt = Prompt(lm, task, task.sample(material, "", 300, 0), protocols.FullBytes(lm), False)
    rows = [("", protocol, "kivi:bits=2,residual=64") for protocol in protocols.PROTOCOLS]
    outcomes = dict(prompt.outcomes(rows))
    prefill, stream = (outcomes[row] for row in rows)
    assert not torch.equal(prefill.seen, stream.seen)
    assert prefill.nbytes["peak"] > stream.nbytes["peak"]


def test_pairs_are_all_of_them() -> None:
    assert len(EVERY) == len(BUDGETED) * len(ENCODINGS) * len(WHEN)
    assert len(set(itertools.chain(EVERY, ALONE))) == len(EVERY) + len(ALONE)
