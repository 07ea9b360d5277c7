"""The two stores: dense rows, and pages of which every head owns as many as it needs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.attention.slots import PAGE
from zoo.attention.store import EMPTY, Pages, SlotStore

FEW = settings(max_examples=30, deadline=None, derandomize=True)
D = 4


def test_slot_store_verbs() -> None:
    """append, replace, free, read, resize and move, padding included."""
    store = SlotStore(1, 2, 6, 4, torch.float32, "cpu", shared=False)
    k = torch.arange(24.0).view(1, 2, 3, 4)
    store.append(torch.tensor([[1, 2, 3]]), k, -k, torch.tensor([[0, 1, -1]]))
    assert store.pos[0].tolist() == [[-1, 0, 1, -1, -1, -1]] * 2
    assert torch.equal(store.k[:, :, 1:3], k[:, :, :2])
    store.replace(4, k[:, :, :2] + 1, k[:, :, :2], torch.tensor([[[0.5, 1.0]] * 2]), torch.tensor([[[8, -1]] * 2]))
    assert store.read().a[0, 0].tolist() == [0, 0, 0, 0, 0.5, 1.0]  # type: ignore[index]
    store.free(store.pos == 0)
    assert store.pos[0, 0].tolist() == [-1, -1, 1, -1, 8, -1]
    store.resize(9, capacity=20)
    assert store.rows == 9
    assert store.k.untyped_storage().nbytes() == 2 * 20 * 4 * 4
    assert store.pos[0, 1].tolist() == [-1, -1, 1, -1, 8, -1, -1, -1, -1]
    store.move(torch.tensor([[0, 0, 3, 0, 1, 0, 0, 0, 0]]), 5)
    assert store.pos[0, 0].tolist() == [-1, 8, -1, 1, -1]
    assert torch.equal(store.k[0, :, 3], k[0, :, 1])


def test_shared_rows_and_their_mass() -> None:
    """shared=True: one row of positions for all heads and no log-weights. A new token begins with no attention, the others keep theirs,
    also where rows move, each sequence its own way."""
    store = SlotStore(2, 3, 4, D, torch.float32, "cpu", shared=True, beside=["mass"])
    assert store.pos.shape == (2, 1, 4)
    assert store.a is None
    assert store.mass is not None
    k = torch.randn(2, 3, 2, D)
    store.append(torch.tensor([[1, 2], [2, 1]]), k, k + 1, torch.tensor([[5, 6], [7, -1]]))
    assert store.pos.tolist() == [[[-1, 5, 6, -1]], [[-1, -1, 7, -1]]]
    store.mass.fill_(2)
    store.append(torch.tensor([[3], [1]]), k[:, :, :1], k[:, :, :1], torch.tensor([[8], [9]]))
    assert store.mass[:, 0].tolist() == [[2, 2, 2, 0], [2, 0, 2, 2]]
    store.resize(6, capacity=6)
    store.move(torch.tensor([[0, 4, 1, 3, 0, 0], [0, 1, 3, 0, 0, 0]]), 5)
    assert store.pos.tolist() == [[[-1, 6, -1, 8, 5]], [[-1, 9, -1, 7, -1]]]
    assert store.mass[:, 2, 1:].tolist() == [[2, 0, 0, 2], [0, 0, 2, 0]]
    assert torch.equal(store.v[0, :, 4], k[0, :, 0] + 1)
    assert torch.equal(store.v[1, :, 3], k[1, :, 0] + 1)


def test_resize_keeps_what_fits_its_storage() -> None:
    """Rows are shown without reallocating while the storage is long enough, and new ones are empty."""
    store = SlotStore(1, 2, 2, D, torch.float32, "cpu", shared=True)
    store.resize(5, capacity=12)
    where = store.k.data_ptr()
    k = torch.randn(1, 2, 4, D)
    store.append(torch.arange(1, 5)[None], k, k, torch.arange(4)[None])
    store.resize(11, capacity=11)
    assert store.k.data_ptr() == where
    assert store.pos[0, 0].tolist() == [-1, 0, 1, 2, 3, *[-1] * 6]
    store.resize(12, capacity=12)
    assert store.k.data_ptr() != where
    assert torch.equal(store.k[:, :, 1:5], k)
    assert (store.pos[0, 0, 5:] == -1).all()


# Pages


def make(share: list[list[list[int]]], **extra: tuple[int, torch.dtype]) -> Pages:
    """Pages with share[layer][sequence][head] of them."""
    laid = torch.tensor(share)
    pages = Pages(*laid.shape, D, torch.float32, "cpu", extra)
    pages.lay_out(laid)
    return pages


def random_slots(pages: Pages, layer: int, counts: list[int], seed: int) -> dict[str, Tensor]:
    """counts[b G + g] slots a head, padded to the longest, as `read` gives them; padding is nonsense but for its position."""
    g = torch.Generator().manual_seed(seed)
    _, B, G = pages.share.shape
    N = max(1, *counts)
    slots = {name: torch.rand(B, G, N, *([size] if size else []), generator=g).to(dtype) for name, (size, dtype) in pages.fields.items()}
    slots["pos"] = torch.randint(0, 10**6, (B, G, N), generator=g)
    slots["pos"][torch.arange(N) >= torch.tensor(counts).view(B, G, 1)] = -1
    return slots


def fill(pages: Pages, seed: int) -> list[list[int]]:
    """Random slots for every head, up to what its pages hold; -> counts[layer][head]."""
    g = torch.Generator().manual_seed(seed)
    counts = [[int(torch.randint(0, n * PAGE + 1, (), generator=g)) for n in layer] for layer in pages.count]
    for layer, mine in enumerate(counts):
        pages.replace(layer, random_slots(pages, layer, mine, seed + layer))
    return counts


shares = st.lists(
    st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=2, max_size=2), min_size=1, max_size=3
)  # [layer][sequence][head]


@FEW
@given(shares, st.integers(0, 10**6))
def test_what_is_written_is_read(share: list[list[list[int]]], seed: int) -> None:
    """Every layer and head reads what was written for it, extras too, and nothing of another; empty rows weigh nothing."""
    pages = make(share, mass=(0, torch.float32), x=(3, torch.bfloat16))
    counts = fill(pages, seed)
    for layer, mine in enumerate(counts):
        wrote, got = random_slots(pages, layer, mine, seed + layer), pages.read(layer)
        n = wrote["pos"].shape[2]
        assert got["pos"].shape[2] == PAGE * max(1, *pages.count[layer])
        assert (got["pos"][:, :, n:] == -1).all()
        there = wrote["pos"] >= 0
        assert torch.equal(got["pos"][:, :, :n] >= 0, there)
        for name in pages.fields:
            assert torch.equal(got[name][:, :, :n][there], wrote[name][there].to(got[name].dtype))
        assert (got["a"][got["pos"] < 0] == -math.inf).all()
        for head, m in enumerate(mine):
            b, g = divmod(head, 2)
            rows = pages.head("x", layer, head)
            assert rows.shape == (share[layer][b][g] * PAGE, 3)
            assert torch.equal(rows[:m], wrote["x"][b, g, :m])
            assert rows.numel() == 0 or rows.data_ptr() >= pages.x.data_ptr()  # type: ignore[operator]  # a view
        got["k"].zero_()
        assert torch.equal(pages.read(layer)["k"][:, :, :n][there], wrote["k"][there])  # `read` is a copy
    assert pages.used(0) == sum(counts[0]) * (2 * D * 4 + 4 + 4 + 4 + 3 * 2) + pages.share[0].nbytes
    assert len(pages.k) == max(2, 1 + sum(map(sum, pages.count)))  # and one empty page


@FEW
@given(shares, st.integers(0, 10**6), st.integers(2, 20))
def test_lists_say_which_pages_are_whose(share: list[list[list[int]]], seed: int, avoid: int) -> None:
    """By the lists, every head finds its own rows in order; padding is page 0; all layers have lists of one shape, whose length is none of
    the other sizes that a compiled step sees."""
    pages = make(share)
    fill(pages, seed)
    shapes = set()
    for layer in range(len(share)):
        listed, owner, table = pages.lists(layer, avoid)
        assert len(listed) == len(owner) not in (avoid, table.shape[1], len(pages.k))
        assert table.shape[0] == 4
        assert listed[0] == 0
        shapes.add((*listed.shape, *table.shape))
        used = set()
        for head in range(4):
            n = pages.count[layer][head]
            entries = table[head].tolist()
            assert entries[n:] == [0] * (len(entries) - n)
            assert (owner[entries[:n]] == head).all()
            assert torch.equal(pages.pos[listed[entries[:n]].long()].flatten(), pages.head("pos", layer, head))
            used.update(entries[:n])
        assert all(int(p) == 0 for i, p in enumerate(listed) if i not in used)
    assert len(shapes) == 1


@FEW
@given(shares, st.integers(0, 10**6))
def test_page_0_is_never_visible(share: list[list[list[int]]], seed: int) -> None:
    """Whatever is written: short heads beside long ones, more slots than a short head has pages for, fewer than before."""
    pages = make(share)
    for attempt in range(3):
        for layer, mine in enumerate(pages.count):
            full = [max(mine) * PAGE] * 4  # beyond the pages of all but the longest heads
            pages.replace(layer, random_slots(pages, layer, full if attempt == 1 else [n // 2 for n in full], seed + attempt))
            assert (pages.pos[0] == -1).all()
            assert (pages.a[0] == -math.inf).all()
            for head, n in enumerate(mine):
                assert int((pages.head("pos", layer, head) >= 0).sum()) == (
                    n * PAGE if attempt == 1 else min(max(mine) * PAGE // 2, n * PAGE)
                )


def test_replace_forgets_what_was_there() -> None:
    """Fewer slots than before leave no old one behind, and no other layer is touched; more than the longest head holds is a mistake."""
    pages = make([[[2, 1]], [[1, 3]]])
    fill(pages, 1)
    other = pages.read(1)
    pages.replace(0, random_slots(pages, 0, [3, 0], 9))
    assert [int((pages.head("pos", 0, head) >= 0).sum()) for head in (0, 1)] == [3, 0]
    assert all(torch.equal(t, pages.read(1)[name]) for name, t in other.items())
    with pytest.raises(AssertionError, match="more slots"):
        pages.replace(0, random_slots(pages, 0, [2 * PAGE + 1, 0], 9))


def test_laying_out_gives_empty_pages() -> None:
    """New shares: new, empty pages, each row saying so; the arena is no longer than they need."""
    pages = make([[[2, 1]], [[1, 3]]], number=(0, torch.int32))
    fill(pages, 2)
    pages.lay_out(torch.tensor([[[0, 1]], [[1, 0]]]))
    assert len(pages.k) == 3
    assert pages.count == [[0, 1], [1, 0]]
    for layer in (0, 1):
        got = pages.read(layer)
        assert all((got[name] == EMPTY.get(name, 0)).all() for name in pages.fields)
        assert got["number"].dtype == torch.int32
    assert pages.used(0) == pages.share[0].nbytes


def test_a_batch_of_the_same_sequence() -> None:
    """expand_batch: every sequence reads what the one did, from pages of its own."""
    pages = make([[[2, 0]], [[1, 3]]], x=(3, torch.float32))
    fill(pages, 3)
    before = [pages.read(layer) for layer in (0, 1)]
    pages.expand_batch(3)
    assert pages.share.shape == (2, 3, 2)
    assert len(pages.k) == 1 + 3 * 6
    for layer in (0, 1):
        for name, t in pages.read(layer).items():
            there = before[layer]["pos"] >= 0
            for b in range(3):
                assert torch.equal(t[b, there[0]], before[layer][name][there])
                assert (pages.read(layer)["pos"][b, ~there[0]] == -1).all()
    pages.head("k", 1, 0).fill_(7.0)
    assert not (pages.head("k", 1, 2) == 7).any()


def test_a_copy_is_its_own() -> None:
    """A deep copy, and an index made anew from `share`, as after loading."""
    pages = make([[[2, 1]], [[1, 3]]])
    fill(pages, 4)
    other = copy.deepcopy(pages)
    other.first, other.count = [], []
    other.index()
    assert (other.first, other.count) == (pages.first, pages.count)
    other.head("pos", 0, 0).fill_(1)
    assert not torch.equal(other.read(0)["pos"], pages.read(0)["pos"])
