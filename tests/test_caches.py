"""The cache contract, for every method: chunks, batches, exactness, bytes, copies; and what each method itself promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import write_llama
from torch import Tensor

import zoo
from zoo.attention import ATTENTION, Attention, Budget, Sliding, SubGen, parse
from zoo.attention.cache import BLOCK, Caches, SlotStore
from zoo.attention.slots import Slots, slot_attention
from zoo.attention.subgen import SINKS, k_center, layout, nearest
from zoo.errors import ZooError
from zoo.lm import LM

METHODS = ["full", "sliding:window=50", "sliding:window=64", "sliding:window=5000", "subgen", "subgen:budget=300", "subgen:budget=2000"]
EXACT = ["full", "sliding:window=5000", "subgen:budget=2000"]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    return zoo.load(
        str(write_llama(tmp_path_factory.mktemp("caches") / "m", num_hidden_layers=2, hidden_size=32, head_dim=16)), compile="off"
    )


@pytest.fixture(scope="module")
def ids(lm: LM) -> Tensor:
    return torch.randint(0, lm.config.vocab_size, (3, 800), generator=torch.Generator().manual_seed(7))


def new(lm: LM, attn: str, batch: int = 1, **hints: int) -> Caches:
    lm.attn = parse(attn)
    return lm.new_cache(batch, **hints)


@torch.no_grad()
def feed(lm: LM, cache: Caches, ids: Tensor, prompt: int, chunk: int) -> Tensor:
    """Logits (B, T, V) of all ids: the first `prompt` as a prompt, the rest as continuation, `chunk` tokens a call."""
    out = []
    cache.begin_prompt([prompt] * len(ids))
    for start, end in ((0, prompt), (prompt, ids.shape[1])):
        for t in range(start, end, chunk):
            out.append(lm.model(ids[:, t : min(t + chunk, end)], cache))
        if start == 0:
            cache.end_prompt()
    return torch.cat(out, 1)


@pytest.mark.parametrize("attn", METHODS)
@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_chunks_change_nothing(lm: LM, ids: Tensor, attn: str, chunk: int) -> None:
    """Decoding one by one == in chunks == in one pass: past the window, the ring's wrap and block edges, from an odd prompt length."""
    whole, parts = new(lm, attn), new(lm, attn)
    expected = feed(lm, whole, ids[:1, :520], 330, 1000)
    assert (feed(lm, parts, ids[:1, :520], 330, chunk) - expected).abs().max() < 1e-4
    for a, b in zip(whole, parts, strict=True):
        x, y = a.slots(), b.slots()
        assert x.k.shape == y.k.shape
        assert torch.equal(x.pos, y.pos)
        assert ((x.k - y.k).abs().amax(-1) < 1e-4)[x.pos >= 0].all()
    assert whole.tokens_seen.tolist() == parts.tokens_seen.tolist() == [520]


@pytest.mark.parametrize("attn", EXACT)
def test_exact_where_it_says_so(lm: LM, ids: Tensor, attn: str) -> None:
    """exact_when holds: equal to one pass without any cache."""
    got = feed(lm, new(lm, attn), ids[:1], 500, 64)
    assert (got - lm.logits(ids[:1])).abs().max() < 1e-4


def test_exactness_has_an_edge(lm: LM, ids: Tensor) -> None:
    """Just past what exact_when allows, answers differ: the tests above are not vacuous."""
    true = lm.logits(ids[:1])
    assert (feed(lm, new(lm, "sliding:window=799"), ids[:1], 500, 64) - true).abs().max() > 1e-3
    assert (feed(lm, new(lm, "sliding:window=800"), ids[:1], 500, 64) - true).abs().max() < 1e-4
    assert (feed(lm, new(lm, "subgen:budget=700"), ids[:1], 500, 64) - true).abs().max() > 1e-3


@pytest.mark.parametrize("budget", [256, 300, 512, 1000, 1024])
def test_subgen_exact_when(lm: LM, ids: Tensor, budget: int) -> None:
    """budget >= 2 x tokens: every cluster holds one token."""
    n = budget // 2
    for prompt in (1, n // 3, n):
        got = feed(lm, new(lm, f"subgen:budget={budget}"), ids[:1, :n], prompt, 50)
        assert (got - lm.logits(ids[:1, :n])).abs().max() < 1e-4


def test_window_means_the_querys_own_key_too(lm: LM, ids: Tensor) -> None:
    """sliding at window W equals a banded mask of exactly W keys; W +- 1 does not."""
    ids, W = ids[:1, :200], 50
    out = feed(lm, new(lm, f"sliding:window={W}"), ids, 120, 33)
    attend = torch.nn.functional.scaled_dot_product_attention
    for width, same in ((W, True), (W - 1, False), (W + 1, False)):
        i = torch.arange(200)
        band = (i[None] <= i[:, None]) & (i[None] > i[:, None] - width)

        def banded(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, enable_gqa: bool, band: Tensor = band) -> Tensor:
            return attend(q, k, v, attn_mask=band, enable_gqa=enable_gqa)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("zoo.attention.cache.F.scaled_dot_product_attention", banded)
            expected = lm.logits(ids)
        difference = (out - expected).abs().max()
        assert difference < 1e-4 if same else difference > 1e-3


@pytest.mark.parametrize("attn", METHODS)
def test_batch_equals_single(lm: LM, ids: Tensor, attn: str) -> None:
    """Sequences of different lengths in one batch, padded, decoded together, one of them finished early, equal batches of one."""
    lengths, new_tokens, early = [400, 61, 300], 90, 2
    together = new(lm, attn, 3)
    logits = [lm.prefill(ids[:, :400], together, lengths)]
    for t in range(new_tokens):
        step = torch.stack([ids[b, lengths[b] + t] for b in range(3)])
        pos = together.tokens_seen[:, None].clone()
        if t >= 40:
            pos[early] = -1
        logits.append(lm.decode_step(step, together, pos))
    for b in range(3):
        alone = new(lm, attn)
        expected = [lm.prefill(ids[b : b + 1, : lengths[b]], alone)]
        for t in range(40 if b == early else new_tokens):
            expected.append(lm.decode_step(ids[b, lengths[b] + t], alone))
        for x, y in zip(expected, logits[: len(expected)], strict=True):
            assert (x[0] - y[b]).abs().max() < 1e-4
        assert together.tokens_seen[b] == alone.tokens_seen[0] == lengths[b] + (40 if b == early else new_tokens)


@pytest.mark.parametrize("attn", METHODS)
def test_clone_save_load_expand_continue_identically(lm: LM, ids: Tensor, attn: str, tmp_path: Path) -> None:
    """Copies are independent and go on as the original does; a save holds the whole state."""
    cache = new(lm, attn)
    lm.prefill(ids[:1, :300], cache)
    for t in range(300, 340):
        lm.decode_step(ids[:1, t], cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded = new(lm, attn)
    loaded.load(tmp_path / "cache.safetensors")
    copies = [cache.clone(), loaded, cache.expand(3)]
    for t in range(340, 420):
        expected = lm.decode_step(ids[:1, t], cache)
        for copy in copies:
            got = lm.decode_step(ids[:1, t].expand(copy.batch), copy)
            assert (got - expected).abs().max() < 1e-4
    assert [p.name for p in tmp_path.iterdir()] == ["cache.safetensors"]
    assert cache.tokens_seen.tolist() == [420]


def test_load_refuses_another_cache(lm: LM, ids: Tensor, tmp_path: Path) -> None:
    """Another method, another batch, a file that is none: one line, and the cache is as before."""
    cache = new(lm, "full")
    lm.prefill(ids[:1, :20], cache)
    cache.save(tmp_path / "c")
    (tmp_path / "text").write_text("hello")
    for other, path in (
        (new(lm, "sliding:window=50"), "c"),
        (new(lm, "subgen"), "c"),
        (new(lm, "full", 2), "c"),
        (new(lm, "full"), "text"),
        (new(lm, "full"), "missing"),
    ):
        with pytest.raises(ZooError, match=path):
            other.load(tmp_path / path)
        assert other.tokens_seen.sum() == 0
    with pytest.raises(ZooError, match="cannot write"):
        cache.save(tmp_path / "nowhere" / "c")
    with pytest.raises(ZooError, match="batch 1"):
        new(lm, "full", 2).expand(2)


@pytest.mark.parametrize("attn", METHODS)
def test_nbytes_are_the_storages(lm: LM, ids: Tensor, attn: str) -> None:
    """`allocated` is the sum of the storages behind the buffers, a view counting whole; `used` never exceeds it and grows with tokens."""
    cache = new(lm, attn)
    before = cache.nbytes()
    lm.prefill(ids[:1, :300], cache)
    storages = {}
    for module in cache.modules():
        for t in module._buffers.values():
            if t is not None and t.numel():
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    after = cache.nbytes()
    assert after.allocated == sum(storages.values())
    assert before.used < after.used <= after.allocated


def test_full_counts_exactly(lm: LM, ids: Tensor) -> None:
    """300 tokens x 2 layers x (2 kv heads x (key + value) x 16 x 4 bytes + a position), and one count of tokens."""
    cache = new(lm, "full")
    lm.prefill(ids[:1, :300], cache)
    assert cache.nbytes().used == 300 * 2 * (2 * 2 * 16 * 4 + 4) + 8
    assert cache.nbytes().allocated < 1.3 * cache.nbytes().used
    known = new(lm, "full", max_tokens=600)
    lm.prefill(ids[:1, :300], known)
    allocated = known.nbytes().allocated
    for t in range(300, 600):
        lm.decode_step(ids[:1, t], known)
    assert known.nbytes().allocated == allocated  # the hint covers the run


def test_full_doubles(lm: LM, ids: Tensor) -> None:
    """Without a hint the storage is reallocated O(log n) times, and a step reads its true length rounded up to a block."""
    cache = new(lm, "full")
    sizes = set()
    for t in range(600):
        lm.decode_step(ids[:1, t], cache)
        sizes.add(cache.nbytes().allocated)
        assert cache[0].store.rows <= t + 2 + BLOCK
    assert len(sizes) <= 6


@pytest.mark.parametrize("attn", ["sliding:window=100", "subgen:budget=300"])
def test_bytes_stay_under_the_budget_for_10000_tokens(lm: LM, attn: str) -> None:
    """While 10,000 tokens stream through, keys, values and features never exceed the budget's slots, and nothing grows."""
    lm.attn = parse(attn)
    cache = lm.new_cache()
    slots = 100 + 2 if "sliding" in attn else 300
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, lm.config.vocab_size, (1, 10_000), generator=g)
    most = 0
    with torch.no_grad():
        lm.prefill(tokens[:, :400], cache)
        for t in range(400, 10_000, 50):
            lm.model(tokens[:, t : t + 50], cache)
            most = max(most, cache.nbytes().allocated)
    per_layer = 2 * slots * 2 * 16 * 4  # heads x slots x (key and value)
    metadata = (per_layer // (2 * 16 * 4)) * 8 + 64  # position and log-weight of each, and four numbers
    capacity = BLOCK if "sliding" in attn else 0  # a ring's rows are rounded up
    assert most <= 2 * (per_layer + metadata + capacity * 2 * (2 * 16 * 4 + 8)) + 8
    assert cache.tokens_seen.tolist() == [10_000]
    assert most > lm.config.num_hidden_layers * per_layer * 0.6  # the budget is used


def test_two_runs_are_identical(lm: LM, ids: Tensor) -> None:
    """No hidden randomness: bit for bit."""
    a, b = (feed(lm, new(lm, "subgen"), ids[:1], 600, 64) for _ in range(2))
    assert torch.equal(a, b)


def test_positions_are_true_past_the_wrap(lm: LM, ids: Tensor) -> None:
    """The slots of a ring that wrapped hold exactly the last W positions."""
    cache = new(lm, "sliding:window=50")
    feed(lm, cache, ids[:1, :233], 90, 1)
    for layer in cache:
        assert sorted(p for p in layer.slots().pos[0, 1].tolist() if p >= 0) == list(range(183, 233))


def test_maintain_and_end_prompt_are_idempotent(lm: LM, ids: Tensor) -> None:
    """A second call changes nothing that a query could see."""
    cache = new(lm, "subgen:budget=300")
    feed(lm, cache, ids[:1, :704], 410, 64)  # 704 = 11 x 64: maintain has just run
    before = [layer.slots() for layer in cache]
    cache.maintain()
    cache.maintain()
    for x, layer in zip(before, cache, strict=True):
        assert torch.equal(x.pos, layer.slots().pos)
        assert (x.k - layer.slots().k)[x.pos >= 0].abs().max() < 1e-5


def test_chat_turns_compress_what_arrived(lm: LM, ids: Tensor) -> None:
    """A second prompt on the same cache is held exactly until its end, then the budget binds again; the share follows the tokens seen."""
    cache = new(lm, "subgen:budget=300")
    lm.prefill(ids[:1, :400], cache)
    bound = cache.nbytes().allocated
    for t in range(400, 420):
        lm.decode_step(ids[:1, t], cache)
    lm.prefill(ids[:1, 420:800], cache)
    assert cache.nbytes().allocated == bound
    for layer in cache:
        s = layer.slots()
        assert ((s.a.exp() * (s.pos >= 0)).sum(-1) - 800).abs().max() < 1e-2  # type: ignore[union-attr]
    share = new(lm, "subgen:budget=50%")
    lm.prefill(ids[:1, :600], share)
    first = share.nbytes().allocated
    lm.prefill(ids[:1, 600:800], share)
    assert share.nbytes().allocated > first


# SubGen's own promises


def test_nothing_is_dropped(lm: LM, ids: Tensor) -> None:
    """Counts add up to the tokens seen; sinks and recent tokens are exact; each cluster's value is the mean of its tokens' values."""
    full, cache = new(lm, "full"), new(lm, "subgen:budget=300")
    feed(lm, full, ids[:1, :700], 500, 64)
    feed(lm, cache, ids[:1, :700], 500, 64)
    exact, s = full[0].slots(), cache[0].slots()  # layer 0: keys and values do not depend on the method
    order = exact.pos[0, 0].argsort()[-700:]
    k, v = exact.k[0, :, order], exact.v[0, :, order]
    count = s.a.exp() * (s.pos >= 0)  # type: ignore[union-attr]
    assert (count.sum(-1) - 700).abs().max() < 1e-2
    assert ((count[..., None] * s.v).sum(2)[0] - v.sum(1)).abs().max() < 2e-2
    assert ((count[..., None] * s.k).sum(2)[0] - k.sum(1)).abs().max() < 2e-2
    recent, clusters = layout(300)
    for g in range(2):
        kept = {int(p): i for i, p in enumerate(s.pos[0, g]) if p >= 0 and count[0, g, i] == 1}
        for p in [*range(SINKS), *range(700 - recent, 700)]:
            assert torch.equal(s.k[0, g, kept[p]], k[g, p])
    assert (count > 1.5).sum() > 10
    assert int((s.pos[0, 0] >= 0).sum()) <= SINKS + clusters + recent + BLOCK


def test_k_center_recovers_planted_clusters() -> None:
    """Ten well separated groups, ten centres: one label a group; a random labelling or Lloyd from the first ten points would not."""
    g = torch.Generator().manual_seed(0)
    centre = torch.randn(10, 16, generator=g) * 10
    group = torch.randint(0, 10, (500,), generator=g)
    x = (centre[group] + torch.randn(500, 16, generator=g) * 0.1)[None, None]
    label = k_center(x, torch.ones(1, 1, 500, dtype=torch.bool), torch.tensor([10]))[0, 0]
    assert label.unique().tolist() == list(range(10))
    for c in range(10):
        assert label[group == c].unique().numel() == 1


def test_k_center_is_greedy_farthest_point() -> None:
    """Against a plain loop over points, with dead points, different numbers of centres and duplicates."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 40, 5, generator=g)
    x[0, 0, 20:] = x[0, 0, :20]
    alive = torch.rand(2, 3, 40, generator=g) < 0.8
    most = torch.tensor([7, 60])
    label = k_center(x, alive, most)
    for b in range(2):
        for h in range(3):
            points = [i for i in range(40) if alive[b, h, i]]
            centres = [points[0]]
            while len(centres) < min(int(most[b]), len(points)):
                far = lambda i: min(float((x[b, h, i] - x[b, h, c]).norm()) for c in centres)  # noqa: B023, E731
                centres.append(max((i for i in points if i not in centres), key=lambda i: (round(far(i), 2), -i)))
            assert (label[b, h][~alive[b, h]] == -1).all()
            assert sorted(label[b, h][points].unique().tolist()) == list(range(len(centres)))
            radius = max(min(float((x[b, h, i] - x[b, h, c]).norm()) for c in centres) for i in points)
            for c in range(len(centres)):  # the radius of every cluster is at most the greedy radius
                members = [i for i in points if label[b, h, i] == c]
                best = min(max(float((x[b, h, i] - x[b, h, j]).norm()) for i in members) for j in members)
                assert best <= radius + 0.02
    assert label[1].amax(-1).tolist() == [int(alive[1, h].sum()) - 1 for h in range(3)]  # no more points than centres: one each


def test_nearest_prefers_the_first_of_equals() -> None:
    """Equal distances must not be decided by rounding; dead centres do not count."""
    x = torch.tensor([[[[1.0, 0.0]]]])
    centres = torch.tensor([[[[5.0, 0.0], [1.0, 1e-7], [1.0, 0.0]]]])
    assert nearest(x, centres, torch.tensor([[[True, True, True]]])).item() == 1
    assert nearest(x, centres, torch.tensor([[[True, False, True]]])).item() == 2
    assert nearest(x, centres, torch.tensor([[[True, False, False]]])).item() == 0


def test_distances_are_between_unrotated_keys(lm: LM) -> None:
    """The same token repeated has one un-rotated key in layer 0, so it forms one cluster, wherever it stood; rotated, it would not."""
    ids = torch.full((1, 600), 5)
    ids[0, ::3] = 9
    cache = new(lm, "subgen:budget=256")
    lm.prefill(ids, cache)
    s = cache[0].slots()
    old = (s.pos >= 0) & (s.pos < 600 - 64) & (s.pos >= SINKS)
    count = (s.a.exp() * old).round()  # type: ignore[union-attr]
    x = lm.model.rotary.unrotate(s.k[0], s.pos[0].clamp(min=0))
    # k-center opens a centre per kind first and duplicates later: two clusters hold nearly everything
    assert (count[0, 0].topk(2).values.sum() / count[0, 0].sum()) > 0.8
    assert x.isfinite().all()


def test_streaming_joins_by_unrotated_keys_and_uses_its_room(lm: LM) -> None:
    """After the prompt too: a token that leaves the window joins the cluster of its kind, and all clusters with room are opened."""
    g = torch.Generator().manual_seed(2)
    prompt = torch.randperm(300, generator=g)[:150]  # 150 different tokens: at the end of the prompt each old one is its own cluster
    kinds = prompt[4:24]  # twenty of those early tokens come again
    more = kinds[torch.randint(0, 20, (640,), generator=g)]
    cache = new(lm, "subgen:budget=400")
    lm.prefill(prompt[None], cache)
    lm.model(more[None], cache)
    s = cache[0].slots()
    _, clusters = layout(400)
    rows = slice(1 + SINKS, 1 + SINKS + clusters)
    assert (s.pos[0, :, rows] >= 0).all()  # all the room is used
    # In layer 0 equal tokens have equal un-rotated keys and values: a cluster that holds one kind has that kind's value exactly.
    with torch.no_grad():
        attention = lm.model.model.layers[0]
        v = attention.self_attn.v_proj(attention.input_layernorm(lm.model.model.embed_tokens(kinds))).view(20, 2, 16)
    count = s.a[0, 0, rows].exp().round()  # type: ignore[index]
    value = s.v[0, 0, rows]
    pure = ((value[:, None] - v[:, 0]).norm(dim=-1).amin(1) < 1e-4) & (count > 1)
    assert count[pure].sum() / count[count > 1].sum() > 0.9


def test_a_ring_is_never_written_twice_at_once(lm: LM, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk longer than the window writes each row once: which of two writes wins is not defined."""
    append, written = SlotStore.append, list[int]()

    def watch(self: SlotStore, row: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> None:
        rows = row[pos >= 0].tolist()
        assert len(rows) == len(set(rows))
        written.append(len(rows))
        append(self, row, k, v, pos)

    monkeypatch.setattr(SlotStore, "append", watch)
    feed(lm, new(lm, "sliding:window=50"), ids[:1, :300], 200, 200)
    assert max(written) == 50


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


def test_a_cluster_follows_its_tokens_in_bfloat16() -> None:
    """The mean of a cluster that grows to thousands of tokens is their mean, though each step is smaller than bfloat16 can show."""
    from types import SimpleNamespace

    from zoo.models.layers import Rope, Rotary

    config = SimpleNamespace(num_key_value_heads=1, head_dim=16, num_hidden_layers=1, sliding_window=None)
    cache = SubGen(Budget(256)).caches(config, Rotary(16, Rope()), 1, None, None, torch.bfloat16, "cpu")
    cache.end_prompt()
    total = 0.0
    for start in range(0, 20_000, 64):
        value = torch.full((1, 1, 64, 16), 1.0 if start < 5000 else 1.5, dtype=torch.bfloat16)
        pos = torch.arange(start, start + 64)[None]
        cache[0].attend(torch.zeros_like(value), torch.ones_like(value), value, pos)
        cache.advance(pos)
        total += float(value[0, 0, :, 0].sum())
    s = cache[0].slots()
    count = (s.a.exp() * (s.pos >= 0)).round()  # type: ignore[union-attr]
    assert count.sum() == cache.tokens_seen
    mean = (count[..., None] * s.v.float()).sum(2) / count.sum()
    assert (mean - total / int(cache.tokens_seen)).abs().max() < 0.01


def test_loading_another_option_is_refused(lm: LM, ids: Tensor, tmp_path: Path) -> None:
    """A window or budget of another size is another cache."""
    cache = new(lm, "sliding:window=50")
    lm.prefill(ids[:1, :100], cache)
    cache.save(tmp_path / "c")
    with pytest.raises(ZooError, match="window=64"):
        new(lm, "sliding:window=64").load(tmp_path / "c")


def test_decoding_ends_the_prompt(lm: LM, ids: Tensor) -> None:
    """Without a prefill the budget binds as well."""
    cache = new(lm, "subgen:budget=256")
    for t in range(400):
        lm.decode_step(ids[:1, t].tolist(), cache)
    assert cache[0].store.rows <= 256


def test_own_positions_without_a_cache(lm: LM, ids: Tensor) -> None:
    """Left padding (-1) is not seen, with and without a cache."""
    pos = torch.cat((torch.full((1, 5), -1), torch.arange(20)[None]), 1)
    padded = lm.model(ids[:1, :25], pos=pos)
    assert (padded[:, 5:] - lm.logits(ids[:1, 5:25])).abs().max() < 1e-4


# Spelling


def test_spelling_round_trips() -> None:
    """name:option=value is the object, and the object prints as it is spelled."""
    assert parse("sliding:window=77") == Sliding(77)
    assert parse("subgen:budget=12.5%") == SubGen(Budget(12.5, True))
    for spelling in ("full", "sliding:window=77", "subgen:budget=12.5%", "subgen:budget=1024"):
        assert str(parse(spelling)) == spelling
        assert parse(parse(spelling)) == parse(spelling)
    assert str(SubGen()) == "subgen:budget=25%"
    for method in ATTENTION.values():
        assert issubclass(method, Attention)
        assert method.exact_when


@pytest.mark.parametrize(
    ("spelling", "says"),
    [
        ("nonsense", "full, sliding, subgen"),
        ("full:window=3", "none"),
        ("sliding:size=3", "window=1024"),
        ("sliding:window", "window=1024"),
        ("sliding:window=3.5", "whole number"),
        ("sliding:window=0", "between 1"),
        ("sliding:window=-4", "between 1"),
        ("sliding:window=3,window=4", "twice"),
        ("subgen:budget=255", "at least 256"),
        ("subgen:budget=0%", "above 0%"),
        ("subgen:budget=900%", "at most 200%"),
        ("subgen:budget=-3", "1024 or a share"),
        ("subgen:budget=many", "1024 or a share"),
        ("subgen:budget=2.5", "1024 or a share"),
        ("", "full, sliding, subgen"),
    ],
)
def test_bad_spellings_name_the_bound(spelling: str, says: str) -> None:
    """One line that lists what is known or names the bound."""
    with pytest.raises(ZooError, match=says) as e:
        parse(spelling)
    assert "\n" not in str(e.value)


def test_ids_must_fit_the_cache(lm: LM, ids: Tensor) -> None:
    """Another batch is refused before anything is written."""
    cache = new(lm, "full", 2)
    with pytest.raises(ZooError, match="batch 2"):
        lm.model(ids[:1, :4], cache)
    with pytest.raises(ZooError, match="between 0 and"):
        lm.prefill([10**6], new(lm, "full"))
    with pytest.raises(ZooError, match="at least 1"):
        lm.prefill(ids[:2, :4], cache, lengths=[4, 0])
    assert cache.tokens_seen.tolist() == [0, 0]


def test_slots_is_a_copy_that_answers_like_the_cache(lm: LM, ids: Tensor) -> None:
    """What `slots()` shows, put through the formula, is what `attend` computes; changing it changes nothing."""
    cache = new(lm, "subgen:budget=300")
    feed(lm, cache, ids[:1, :700], 500, 64)
    layer, q = cache[0], torch.randn(1, 4, 1, 16, generator=torch.Generator().manual_seed(3))
    k = v = torch.randn(1, 2, 1, 16, generator=torch.Generator().manual_seed(4))
    pos = torch.tensor([[700]])
    out = layer.attend(q, k, v, pos)
    s = layer.slots()
    assert isinstance(s, Slots)
    assert (slot_attention(q, pos, s) - out).abs().max() < 1e-5
    s.k.zero_()
    assert layer.store.k.abs().sum() > 0
