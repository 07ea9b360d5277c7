"""The cache contract, for every method: chunks, batches, exactness, bytes, copies, chat turns; and how methods are spelled."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from conftest import feed, write_checkpoint
from torch import Tensor

import zoo
from zoo.attention import ATTENTION, Attention, Budget, Sliding, parse
from zoo.attention.budgeted import SINKS, Budgeted, BudgetedCaches
from zoo.attention.cache import BLOCK, Caches, round_up
from zoo.attention.h2o import H2O
from zoo.attention.sinks import Sinks
from zoo.attention.slots import PAGE, Slots, slot_attention
from zoo.attention.snapkv import SnapKV
from zoo.attention.store import SlotStore
from zoo.attention.subgen import SubGen
from zoo.attention.tables import save_table
from zoo.errors import ZooError
from zoo.lm import LM

# Every method with a budget: a new one is added here. `budget` and `when` are set by each test.
BUDGETED = [
    "subgen",
    "subgen_kcenter",
    "sinks",
    "sinks:positions=cache",
    "uniform",
    "h2o",
    "h2o:age=true,block=16",
    "snapkv",
    "tova",
    "l2norm",
    "keydiff",
    "balancekv",
]
WHEN = ["prompt", "decode", "stream"]
VARIANTS = {  # options that change what happens to tokens: in some of the modes, on one family
    "subgen:scores=expected": WHEN,
    "subgen:heads=uniform": ["prompt", "stream"],
    "subgen:heads=table": ["decode"],
    "subgen_kcenter:weight=true": ["prompt", "stream"],
    "balancekv:weights=both,walk=16": ["prompt", "stream"],
}
DELTA = ["subgen:delta=6,when=prompt", "subgen:delta=4,when=decode", "subgen:delta=6,when=stream"]  # no budget; with 4 it soon grows
# Those whose slots are tokens, unchanged.
TOKENS = ["sinks", "uniform", "h2o", "h2o:age=true,block=16", "snapkv", "tova", "l2norm", "keydiff", "subgen_kcenter:weight=true"]
UNBOUNDED = ["full", "sliding:window=50", "sliding:window=64", "sliding:window=5000", "pod:recent=40", "pod:first=3,recent=129", "kvsharer"]
SHARING = ["pod:recent=40", "kvsharer"]  # state of one layer is another's
CLOSE = 1e-4  # logits are of size 10
FAMILIES = {
    "llama": ("llama", {"num_key_value_heads": 2, "head_dim": 32}),  # more than the 16 coordinates that subgen keeps of a key
    "windowed": ("mistral", {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": 300}),
    "mistral": ("mistral", {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": None}),
    "gpt_neox": ("gpt_neox", {"hidden_size": 64}),
}


def spell(attn: str, **options: object) -> str:
    """`spell("h2o:block=4", budget=200)` -> "h2o:block=4,budget=200"."""
    return attn + ":,"[":" in attn] + ",".join(f"{key}={value}" for key, value in options.items())


MODES = [(attn, when) for attn, modes in {**dict.fromkeys(BUDGETED, WHEN), **VARIANTS}.items() for when in modes]
FIXED = [spell(attn, budget=160, when=when) for attn, when in MODES]
GRID = UNBOUNDED + FIXED + DELTA
BINDING = [attn for attn in FIXED + DELTA if "when=prompt" not in attn]


@pytest.fixture(scope="module")
def lms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, LM]]:
    folder = tmp_path_factory.mktemp("caches")
    small = {"num_hidden_layers": 2, "hidden_size": 32}
    lms = {
        name: zoo.load(str(write_checkpoint(folder / name, family, **{**small, **options})), compile="off")
        for name, (family, options) in FAMILIES.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_CACHE", str(folder))
        save_table("subgen", lms["llama"].config, {"shares": [[1.6, 0.7], [0.4, 1.3]]})  # for heads=table
        for lm in lms.values():
            save_table("kvsharer", lm.config, {"pairs": [[1, 0]]})
            alone = lm.config.num_key_value_heads - 1
            save_table("pod", lm.config, {"groups": [[0] * (alone + 1), [0] + [1] * alone]})  # the first head of both layers is a group
        yield lms


@pytest.fixture(autouse=True)
def clusters_begin_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """By delta, clustering begins at 512 tokens; here at 160, as by budget."""
    slots = SubGen.slots
    monkeypatch.setattr(SubGen, "slots", lambda self, tokens: 160 if self.delta else slots(self, tokens))


@pytest.fixture(scope="module")
def lm(lms: dict[str, LM]) -> LM:
    return lms["llama"]


@pytest.fixture(scope="module")
def ids(lm: LM) -> Tensor:
    return torch.randint(0, lm.config.vocab_size, (3, 800), generator=torch.Generator().manual_seed(7))


def new(lm: LM, attn: str, batch: int = 1, **hints: int | None) -> Caches:
    lm.attn = parse(attn)
    return lm.new_cache(batch, **hints)


def same_state(x: Caches, y: Caches) -> None:
    """Every head holds the same tokens, with the same keys, values and log-weights, in whatever order."""
    for one, other in zip(x, y, strict=True):
        a, b = one.slots(), other.slots()
        order = [s.pos.long().argsort(-1, descending=True) for s in (a, b)]
        n = max(1, int((a.pos >= 0).sum(-1).max()), int((b.pos >= 0).sum(-1).max()))
        (ak, av, ap, aa), (bk, bv, bp, ba) = (
            [t.gather(2, i.view(*i.shape, *[1] * (t.dim() - 3)).expand(t.shape[: t.dim()]))[:, :, :n] for t in (s.k, s.v, s.pos, s.a)]  # type: ignore[union-attr]
            for s, i in zip((a, b), order, strict=True)
        )
        assert torch.equal(ap, bp)
        there = ap >= 0
        assert (ak - bk)[there].abs().max() < CLOSE
        assert (av - bv)[there].abs().max() < CLOSE
        assert (aa - ba)[there].abs().max() < CLOSE
    assert x.tokens_seen.tolist() == y.tokens_seen.tolist()


def owned(cache: Caches) -> float:
    """Slots a layer and head, on average over both, of the sequence that has most."""
    return float(torch.stack([(layer.slots().pos >= 0).sum(-1).float().mean(1) for layer in cache]).mean(0).max())


def test_every_method_is_tested() -> None:
    """A method in the registry is in the lists above."""
    apart = {"subgen_paper", "kivi", "qjl", "turboquant"}  # have no budget: tests/test_subgen_paper.py, test_encoded.py
    assert {attn.partition(":")[0] for attn in GRID} >= set(ATTENTION) - apart
    for attn in GRID:
        assert parse(attn).exact_when


# Chunks


@pytest.mark.parametrize("attn", GRID)
def test_chunks_change_nothing(lm: LM, ids: Tensor, attn: str) -> None:
    """Decoding one by one == in chunks == in one pass: past the window, the ring's wrap and block edges, from an odd prompt length."""
    whole = new(lm, attn)
    expected = feed(lm, whole, ids[:1, :400], 231, 1000)
    for chunk in (1, 7, 64):
        parts = new(lm, attn)
        inside = 7 if "when=prompt" in attn or "when=decode" in attn else 1  # where nothing but the prompt's end changes what is held
        assert (feed(lm, parts, ids[:1, :400], 231, chunk, max(chunk, inside)) - expected).abs().max() < CLOSE
        same_state(whole, parts)
    assert whole.tokens_seen.tolist() == [400]


@pytest.mark.parametrize("family", ["windowed", "mistral", "gpt_neox"])
@pytest.mark.parametrize("attn", [*BUDGETED, *SHARING])
def test_chunks_change_nothing_in_other_families(lms: dict[str, LM], ids: Tensor, family: str, attn: str) -> None:
    """The same, past the model's own window of 300 where it has one, and where a quarter of each head turns. In float64: in float32 these
    weights blow rounding up to 2e-4 of a logit, by PyTorch's kernels as by zoo's, held against float64."""
    one, attn = lms[family], attn if attn in SHARING else spell(attn, budget=160)
    lm = LM(deepcopy(one.model).double(), one.tokenizer, one.attn, one.end_ids, compile="off")
    prompt, end = (331, 500) if family == "windowed" else (231, 330)
    whole, parts = new(lm, attn), new(lm, attn)
    expected = feed(lm, whole, ids[:1, :end], prompt, 1000)
    assert (feed(lm, parts, ids[:1, :end], prompt, 7) - expected).abs().max() < CLOSE
    same_state(whole, parts)
    assert (expected[:, prompt:] - lm.logits(ids[:1, :end])[:, prompt:]).abs().max() > 1e-2


@pytest.mark.parametrize("period", [12, 20])
@pytest.mark.parametrize("attn", ["subgen:budget=200,when=prompt", "subgen:budget=200,when=stream", "subgen_kcenter:budget=200", DELTA[1]])
def test_repeated_text_changes_nothing(lm: LM, attn: str, period: int) -> None:
    """Where a text repeats itself keys are equal, and rounding must not choose among them: in chunks, in one pass, in a batch."""
    ids = torch.arange(640)[None] % period
    whole = new(lm, attn)
    expected = feed(lm, whole, ids[:, :360], 300, 1000)
    for chunk in (1, 7):
        parts = new(lm, attn)
        assert (feed(lm, parts, ids[:, :360], 300, chunk) - expected).abs().max() < CLOSE
    together = new(lm, attn, 2)
    lm.prefill(ids.expand(2, 640), together, [640, 300])
    for t in range(300, 360):
        step = lm.decode_step(ids[0, t].expand(2), together)
    assert (step[1] - expected[0, -1]).abs().max() < CLOSE


# Exactness


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("attn", ["full", "sliding:window=5000", *BUDGETED])
def test_exact_where_it_says_so(lms: dict[str, LM], ids: Tensor, family: str, attn: str) -> None:
    """exact_when, at its bound: as many tokens as the budget, in every mode, equal to one pass without any cache."""
    lm = lms[family]
    n = 340 if family == "windowed" else 230
    modes = [spell(attn, budget=n, when=when) for when in (WHEN if family == "llama" else ["decode"])] if attn in BUDGETED else [attn]
    for mode in modes:
        assert parse(mode).exact_when in ("always", "window >= tokens", "budget >= tokens")
        for prompt in (1, 111, n) if family == "llama" else (n - 30,):
            assert (feed(lm, new(lm, mode), ids[:1, :n], prompt, 64) - lm.logits(ids[:1, :n])).abs().max() < CLOSE


@pytest.mark.parametrize(("attn", "when"), MODES)
def test_exactness_has_an_edge(lm: LM, ids: Tensor, attn: str, when: str) -> None:
    """Just past what exact_when allows, answers differ: the tests above are not vacuous."""
    n = 192
    true = lm.logits(ids[:1, : n + 2])
    got = feed(lm, new(lm, spell(attn, budget=n, when=when)), ids[:1, : n + 2], n + 1, 64)
    assert (got - true)[:, :n].abs().max() < CLOSE
    assert (got - true)[:, n + 1].abs().max() > 1e-3
    more = feed(lm, new(lm, spell(attn, budget=n + 2, when=when)), ids[:1, : n + 2], n + 1, 64)
    assert (more - true).abs().max() < CLOSE


@pytest.mark.parametrize("window", [20, 64, 300])
@pytest.mark.parametrize(
    "attn", ["subgen:delta=6", "subgen:delta=6,when=stream", "subgen:budget=160,scores=expected", "subgen:budget=160,heads=uniform"]
)
def test_a_model_window_of_any_size(lm: LM, ids: Tensor, attn: str, window: int) -> None:
    """Where a model's own window is shorter than what stays recent, everything that could settle has expired: nothing fails, and what the
    window shows is exact."""
    cache = new(lm, attn)
    for layer in cache:
        layer.window = window
    feed(lm, cache, ids[:1, :500], 331, 64)
    exact = new(lm, f"sliding:window={window}")
    feed(lm, exact, ids[:1, :500], 331, 64)
    if window <= 160 // 8:
        got, true = lm.decode_step(ids[0, 500], cache), lm.decode_step(ids[0, 500], exact)
        assert (got - true).abs().max() < CLOSE


@pytest.mark.parametrize("attn", BUDGETED)
def test_a_prompt_of_exactly_the_budget(lm: LM, ids: Tensor, attn: str) -> None:
    """It is answered exactly, and leaves room for the next token: decode and stream do the same from there on."""
    caches, outs = [], []
    for when in ("decode", "stream"):
        cache = new(lm, spell(attn, budget=160, when=when))
        outs.append(feed(lm, cache, ids[:1, :200], 160, 7))
        caches.append(cache)
    assert (outs[0] - outs[1]).abs().max() < CLOSE
    assert (outs[0][:, :160] - lm.logits(ids[:1, :160])).abs().max() < CLOSE
    same_state(*caches)


def test_a_windows_exactness_has_an_edge(lm: LM, ids: Tensor) -> None:
    true = lm.logits(ids[:1])
    assert (feed(lm, new(lm, "sliding:window=799"), ids[:1], 500, 64) - true).abs().max() > 1e-3
    assert (feed(lm, new(lm, "sliding:window=800"), ids[:1], 500, 64) - true).abs().max() < CLOSE


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
        assert difference < CLOSE if same else difference > 1e-3


# Batches


@pytest.mark.parametrize("attn", [*GRID, "uniform:budget=60%", "h2o:budget=60%,when=stream", "snapkv:budget=60%"])
def test_batch_equals_single(lm: LM, ids: Tensor, attn: str) -> None:
    """Sequences of different lengths in one batch, padded, decoded together, one of them finished early, and a second turn for all, equal
    batches of one. The second sequence reaches its budget in the middle of the answer, the others at the end of their prompts."""
    lengths, new_tokens, early, turns = [231, 120, 190], 50, 2, [60, 25, 41]
    together, end = new(lm, attn, 3), [0, 0, 0]
    logits = [lm.prefill(ids[:, : max(lengths)], together, lengths)]
    for t in range(new_tokens):
        step = torch.stack([ids[b, lengths[b] + t] for b in range(3)])
        pos = together.tokens_seen[:, None].clone()
        if t >= 30:
            pos[early] = -1
        logits.append(lm.decode_step(step, together, pos))
    for b in range(3):
        end[b] = lengths[b] + (30 if b == early else new_tokens)
    assert together.tokens_seen.tolist() == end
    turn = torch.stack([ids[b, end[b] : end[b] + max(turns)] for b in range(3)])
    logits.append(lm.prefill(turn, together, turns))
    logits.append(lm.decode_step(ids[:, 700], together))
    for b in range(3):
        alone = new(lm, attn)
        expected = {0: lm.prefill(ids[b : b + 1, : lengths[b]], alone)}
        for t in range(end[b] - lengths[b]):
            expected[1 + t] = lm.decode_step(ids[b, lengths[b] + t], alone)
        expected[1 + new_tokens] = lm.prefill(turn[b : b + 1, : turns[b]], alone)
        expected[2 + new_tokens] = lm.decode_step(ids[b, 700], alone)
        for i, x in expected.items():
            assert (x[0] - logits[i][b]).abs().max() < CLOSE


@pytest.mark.parametrize("when", ["prompt", "decode"])
def test_a_short_sequence_beside_a_long_one(lm: LM, ids: Tensor, when: str) -> None:
    """What a tail allocates follows from what its own sequence may still need, not from its longest neighbour's length."""
    cache = new(lm, spell("sinks", budget=160, when=when), 2)
    lm.prefill(ids[:2, :700], cache, [700, 20])
    for t in range(10):
        lm.decode_step(ids[:2, 20 + t], cache)
    assert cache[0].store.k.untyped_storage().nbytes() <= 2 * 2 * (160 + 2) * lm.config.head_dim * 4
    assert cache.pages[0].share.sum((0, 2)).tolist()[1] == 0  # type: ignore[attr-defined]


# Copies


@pytest.mark.parametrize("attn", GRID)
def test_clone_save_load_expand_continue_identically(lm: LM, ids: Tensor, attn: str, tmp_path: Path) -> None:
    """Copies are independent and go on as the original does, through a second turn, too; a save holds the whole state."""
    cache = new(lm, attn)
    lm.prefill(ids[:1, :161], cache)
    pages = cache.pages[0].share.sum() if isinstance(cache, BudgetedCaches) else 0
    with torch.no_grad():
        lm.model(ids[:1, 161:236], cache)
    for t in range(236, 241):
        lm.decode_step(ids[:1, t], cache)
    assert "delta=4" not in attn or cache.pages[0].share.sum() > pages  # type: ignore[index, union-attr]
    cache.save(tmp_path / "cache.safetensors")
    loaded, used = new(lm, attn), new(lm, attn)
    lm.prefill(ids[1:2, :190], used)  # what it held will be gone
    for other in (loaded, used):
        other.load(tmp_path / "cache.safetensors")
        same_state(cache, other)
    copies = [used.clone(), loaded, cache.expand(3)]
    for copy in copies:
        assert copy.nbytes().allocated == sum_of_storages(copy)
    for t in range(241, 261):
        expected = lm.decode_step(ids[:1, t], cache)
        for copy in copies:
            got = lm.decode_step(ids[:1, t].expand(copy.batch), copy)
            assert (got - expected).abs().max() < CLOSE
    expected = lm.prefill(ids[:1, 261:331], cache)
    for copy in copies:
        assert (lm.prefill(ids[:1, 261:331].expand(copy.batch, 70), copy) - expected).abs().max() < CLOSE
    expected = lm.decode_step(ids[:1, 331], cache)
    for copy in copies:
        assert (lm.decode_step(ids[:1, 331].expand(copy.batch), copy) - expected).abs().max() < CLOSE
    assert [p.name for p in tmp_path.iterdir()] == ["cache.safetensors"]
    assert cache.tokens_seen.tolist() == [332]


@pytest.mark.parametrize("attn", BINDING)
def test_a_copy_inside_a_prompt(lm: LM, ids: Tensor, attn: str, tmp_path: Path) -> None:
    """Saved half way through the second turn's prompt: the rest of it and its end come out the same."""
    cache = new(lm, attn)
    lm.prefill(ids[:1, :201], cache)
    with torch.no_grad():
        cache.begin_prompt([100])
        lm.model(ids[:1, 201:250], cache)
        cache.save(tmp_path / "c")
        loaded = new(lm, attn)
        loaded.load(tmp_path / "c")
        for copy in (cache.clone(), loaded):
            outs = []
            for one in (cache.clone(), copy):
                x = lm.model(ids[:1, 250:301], one)
                one.end_prompt()
                outs.append(torch.cat((x, lm.model(ids[:1, 301:340], one)), 1))
            assert (outs[0] - outs[1]).abs().max() < CLOSE


def test_load_refuses_another_cache(lm: LM, ids: Tensor, tmp_path: Path) -> None:
    """Another method, another option, another batch, a file that is none: one line, and the cache is as before."""
    for attn, others in (
        ("full", ["sliding:window=50", "sinks", "h2o"]),
        ("sliding:window=50", ["sliding:window=64", "full"]),
        ("h2o:budget=200", ["h2o:budget=201", "h2o:budget=200,age=true", "h2o:budget=200,when=stream", "tova:budget=200", "full"]),
    ):
        cache = new(lm, attn)
        lm.prefill(ids[:1, :20], cache)
        cache.save(tmp_path / "c")
        (tmp_path / "text").write_text("hello")
        for other, path in (
            *((new(lm, o), "c") for o in others),
            (new(lm, attn, 2), "c"),
            (new(lm, attn), "text"),
            (new(lm, attn), "missing"),
        ):
            with pytest.raises(ZooError, match=path) as e:
                other.load(tmp_path / path)
            assert "\n" not in str(e.value)
            assert other.tokens_seen.sum() == 0
    for hint, other in ((None, 700), (700, None), (700, 701)):  # what a share is of
        with pytest.raises(ZooError, match=f"prompt_tokens={hint or other}"):
            new(lm, "h2o:budget=25%", prompt_tokens=other).load(saved(lm, "h2o:budget=25%", ids, tmp_path, prompt_tokens=hint))
    new(lm, "h2o:budget=200", prompt_tokens=700).load(saved(lm, "h2o:budget=200", ids, tmp_path))
    with pytest.raises(ZooError, match="window=64"):
        new(lm, "sliding:window=64").load(saved(lm, "sliding:window=50", ids, tmp_path))
    with pytest.raises(ZooError, match="cannot write"):
        cache.save(tmp_path / "nowhere" / "c")
    with pytest.raises(ZooError, match="batch 1"):
        new(lm, "full", 2).expand(2)


def saved(lm: LM, attn: str, ids: Tensor, folder: Path, **hints: int | None) -> Path:
    cache = new(lm, attn, **hints)
    lm.prefill(ids[:1, :100], cache)
    cache.save(folder / "other")
    return folder / "other"


# Bytes


def sum_of_storages(cache: Caches) -> int:
    """Bytes of the storages behind all buffers, a view counting whole, each once."""
    storages = {}
    for module in cache.modules():
        for t in module._buffers.values():
            if t is not None and t.numel():
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("attn", GRID)
def test_nbytes_are_the_storages(lm: LM, ids: Tensor, attn: str) -> None:
    """`allocated` is the sum of the storages behind the buffers; `used` never exceeds it and grows with tokens. A cache has no other
    tensors."""
    cache = new(lm, attn)
    before = cache.nbytes()
    lm.prefill(ids[:1, :300], cache)
    after = cache.nbytes()
    assert after.allocated == sum_of_storages(cache)
    assert before.used < after.used <= after.allocated
    for layer in cache:
        for module in layer.modules():
            assert not [name for name, value in vars(module).items() if isinstance(value, Tensor) and value.numel() > 3]


def test_full_counts_exactly(lm: LM, ids: Tensor) -> None:
    """300 tokens x 2 layers x (2 kv heads x (key + value) x 32 x 4 bytes + a position), and one count of tokens."""
    cache = new(lm, "full")
    lm.prefill(ids[:1, :300], cache)
    assert cache.nbytes().used == 300 * 2 * (2 * 2 * 32 * 4 + 4) + 8
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


def most_bytes(lm: LM, method: Attention) -> int:
    """What a float32 cache of batch 1 may allocate, spelled out."""
    c = lm.config
    layers, heads, query_heads, size = c.num_hidden_layers, c.num_key_value_heads, c.num_attention_heads, c.head_dim
    slot = 2 * size * 4 + 4 + 4  # key and value, a position and a log-weight
    if isinstance(method, Sliding):
        return layers * (heads * slot * (method.window + 2) + 64)  # row 0, and a spare one
    assert isinstance(method, Budgeted)
    slot += sum(max(n, 1) * kind.itemsize for n, kind in method.fields(c, torch.float32).values())  # what a method keeps beside a slot
    tail, settled = method.budget.tokens(0) - method.settled(method.budget.tokens(0)), method.settled(method.budget.tokens(0)) // PAGE
    listed = max(2, heads * settled) + 5  # pages of a layer; padded, so that no two sizes of a compiled step agree by chance
    beside = listed * (4 + 4) + heads * max(2, settled) * 4 + heads * 4  # the lists: pages, their owners, the table, and the heads' shares
    if "mass" in method.extra:
        beside += listed * PAGE * 4  # attention that slots got since the last block, for each page in the list
    if queries := getattr(method, "queries", 0):
        beside += (queries + 1) * (query_heads * size * 4 + 8)  # the last queries
    if isinstance(method, Sinks) and method.positions == "cache":
        beside += heads * SINKS * size * 4  # their keys without a position
    exact = heads * slot * (method.budget.tokens(0) + 2)  # before there are too many tokens: row 0, and a spare one
    bounded = heads * slot * (tail + 1 + settled * PAGE)  # afterwards: a ring with row 0, and pages
    empty = 2 * PAGE * slot  # page 0, which stays empty, and where there are none yet, a second one
    return layers * (max(exact, bounded) + beside + 3 * 8) + empty + 3 * 8


@pytest.mark.parametrize("attn", ["subgen", "subgen:scores=expected", "subgen:heads=uniform"])
@pytest.mark.parametrize("budget", [128, 160, 200, 256, 510])
def test_features_are_paid_for(lm: LM, ids: Tensor, attn: str, budget: int) -> None:
    """Keys, values, coordinates, their directions and what is kept of queries: no more numbers than the budget's keys and values have. Only
    the least budget may be exceeded, by heads of one page: they cannot own less."""
    cache = new(lm, spell(attn, budget=budget))
    feed(lm, cache, ids[:1], 700, 100)
    c, numbers = lm.config, 0
    for layer in cache:
        numbers += layer.basis.numel() + layer.queries.mean.numel() + layer.queries.factor.numel()  # type: ignore[attr-defined]
        numbers += 2 * c.num_key_value_heads * c.head_dim * int(layer.ring)  # type: ignore[attr-defined]
    pages = cache.pages[0]  # type: ignore[attr-defined]
    numbers += int(pages.share.sum()) * PAGE * (2 * c.head_dim + pages.x.shape[-1])
    paid = budget * 2 * c.head_dim * c.num_key_value_heads * c.num_hidden_layers
    assert numbers <= paid or (budget == 128 and int(pages.share.max()) == 1)
    assert numbers > 0.8 * paid


@pytest.mark.parametrize(
    "attn", ["sliding:window=100", *(attn for attn in BINDING if not any(x in attn for x in ("age", "cache", "weight", "table", "delta")))]
)
def test_bytes_stay_under_the_budget_for_10000_tokens(lm: LM, attn: str) -> None:
    """While 10,000 tokens stream through, in the prompt too where when=stream, what is allocated never exceeds the budget's slots with what
    stands beside them; and the budget is used, but for the rest of a page."""
    method = parse(attn)
    cache = new(lm, attn)
    tokens = torch.randint(0, lm.config.vocab_size, (1, 10_000), generator=torch.Generator().manual_seed(1))
    peak = [0]
    maintain = cache.maintain

    def watch() -> None:  # before and after each time that tokens are absorbed
        peak[0] = max(peak[0], sum_of_storages(cache))
        maintain()
        peak[0] = max(peak[0], sum_of_storages(cache))

    prompt = 10_000 - 150 if "stream" in attn else 150 if "sliding" not in attn else 90
    with torch.no_grad():
        cache.maintain = watch  # type: ignore[method-assign]
        lm.prefill(tokens[:, :prompt], cache)
        for t in range(prompt, 10_000, 200):
            lm.model(tokens[:, t : min(t + 200, 10_000)], cache)
    assert cache.tokens_seen.tolist() == [10_000]
    held = method.window if isinstance(method, Sliding) else 160
    assert peak[0] <= most_bytes(lm, method)
    assert peak[0] > 2 * 2 * (held - PAGE) * 2 * 16 * 4
    assert owned(cache) <= held
    assert owned(cache) >= held - PAGE - getattr(method, "block", 0)  # 10,000 is no multiple of a block: some pending tokens are there


@pytest.mark.parametrize("attn", BUDGETED)
def test_a_prompts_end_frees_what_it_held(lm: LM, ids: Tensor, attn: str) -> None:
    """when=prompt: at the end of the prompt, the budget's bytes are left; decoded tokens are kept on top of them, all of them."""
    cache = new(lm, spell(attn, budget=160, when="prompt"))
    lm.prefill(ids[:1, :700], cache)
    assert cache.nbytes().allocated <= most_bytes(lm, cache.method)  # type: ignore[attr-defined]
    if isinstance(parse(attn), SnapKV):
        assert cache[0].asked.numel() == 0  # type: ignore[attr-defined]
    lm.model(ids[:1, 700:790], cache)
    for layer in cache:
        pos = layer.slots().pos
        for g in range(2):
            assert set(range(700, 790)) <= set(pos[0, g].tolist())
    assert owned(cache) <= 160 + 90


# What a cache is


@pytest.mark.parametrize("attn", GRID)
def test_two_runs_are_identical(lm: LM, ids: Tensor, attn: str) -> None:
    """No hidden randomness: bit for bit."""
    a, b = (feed(lm, new(lm, attn), ids[:1, :300], 200, 64) for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize("attn", [*UNBOUNDED, *(spell(attn, budget=160, when=when) for attn in TOKENS for when in WHEN)])
def test_slots_are_tokens_at_their_true_positions(lm: LM, ids: Tensor, attn: str) -> None:
    """Past every wrap, a slot at position p holds the key and value that `full` has there, once a head, and the newest tokens are among
    them. (In layer 0: keys and values of later ones follow from what was attended to.)"""
    full, cache = new(lm, "full"), new(lm, attn)
    feed(lm, full, ids[:1, :437], 231, 64)
    feed(lm, cache, ids[:1, :437], 231, 64)
    true, s = full[0].slots(), cache[0].slots()
    row = true.pos[0, 0].long().argsort()[-437:]
    for g in range(2):
        alive = s.pos[0, g] >= 0
        pos = s.pos[0, g][alive].long()
        assert pos.unique().numel() == pos.numel()
        assert pos.max() == 436
        assert (s.k[0, g, alive] - true.k[0, g, row[pos]]).abs().max() < 1e-5
        assert (s.v[0, g, alive] - true.v[0, g, row[pos]]).abs().max() < 1e-5
    if "sliding" in attn:
        W = parse(attn).window  # type: ignore[attr-defined]
        for layer in cache:
            assert sorted(p for p in layer.slots().pos[0, 1].tolist() if p >= 0) == list(range(max(0, 437 - W), 437))


@pytest.mark.parametrize("attn", [attn for attn in BINDING if attn not in DELTA])
def test_a_full_caches_tensors_stay_where_they_are(lm: LM, ids: Tensor, attn: str) -> None:
    """Once the budget is reached, absorbing writes in place: nothing is reallocated, and a compiled step is not compiled again."""
    cache = new(lm, attn)
    feed(lm, cache, ids[:1, :200], 190, 200)
    before = {name: (t.data_ptr(), t.shape, t.stride()) for name, t in cache.named_buffers()}
    lm.model(ids[:1, 200:400], cache)
    assert {name: (t.data_ptr(), t.shape, t.stride()) for name, t in cache.named_buffers()} == before


@pytest.mark.parametrize("attn", BINDING)
def test_maintain_and_end_prompt_are_idempotent(lm: LM, ids: Tensor, attn: str) -> None:
    """A second call changes nothing that a query could see."""
    cache = new(lm, attn)
    feed(lm, cache, ids[:1, :384], 231, 64)  # 384 = 6 x 64: maintain has just run
    before = cache.clone()
    cache.maintain()
    cache.maintain()
    same_state(before, cache)
    cache.end_prompt()
    lm.model(ids[:1, 384:390], cache)
    lm.model(ids[:1, 384:390], before)
    if "when=stream" in attn:
        same_state(before, cache)


@pytest.mark.parametrize("attn", [attn for attn in FIXED + DELTA if attn not in BINDING])
def test_a_turn_may_end_that_nobody_began(lm: LM, ids: Tensor, attn: str) -> None:
    """Tokens that came without `begin_prompt` are compressed by `end_prompt`, too."""
    cache = new(lm, attn)
    feed(lm, cache, ids[:1, :500], 331, 64)
    before = owned(cache)
    cache.end_prompt()
    assert owned(cache) <= before
    if attn in FIXED:
        assert owned(cache) <= 160 + 1
    assert lm.decode_step(ids[0, 500], cache).isfinite().all()


@pytest.mark.parametrize("attn", GRID)
def test_slots_is_a_copy_that_answers_like_the_cache(lm: LM, ids: Tensor, attn: str) -> None:
    """What `slots()` shows, put through the formula, is what `attend` computes; changing it changes nothing."""
    cache = new(lm, attn)
    feed(lm, cache, ids[:1, :400], 231, 64)
    cache.reserve(torch.tensor([[400]]))
    layer, q = cache[1], torch.randn(1, 4, 1, 32, generator=torch.Generator().manual_seed(3))
    k = v = torch.randn(1, 2, 1, 32, generator=torch.Generator().manual_seed(4))
    pos = torch.tensor([[400]])
    out = layer.attend(q, k, v, pos)
    s = layer.slots()
    assert isinstance(s, Slots)
    assert (slot_attention(q, pos, s) - out).abs().max() < 1e-5
    s.k.zero_()
    assert layer.slots().k.abs().sum() > 0


@pytest.mark.parametrize("attn", [*UNBOUNDED, *BINDING])
def test_backends_agree(lm: LM, ids: Tensor, attn: str) -> None:
    """The formula as it is written and the fused kernels: the same logits and the same slots."""
    auto, eager = new(lm, attn), new(lm, attn)
    for layer in eager:
        layer.backend = "eager"
    x, y = (feed(lm, cache, ids[:1, :300], 231, 100) for cache in (auto, eager))
    assert (x - y).abs().max() < CLOSE
    same_state(auto, eager)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attn", [*BINDING, *SHARING])
def test_low_precision(lms: dict[str, LM], ids: Tensor, attn: str, dtype: torch.dtype) -> None:
    """Keys and values take half the bytes; outputs are the model's dtype and are those of the formula in float32, on what is held."""
    lm = lms["llama"]
    config, rotary = lm.config, lm.model.rotary
    cache = parse(attn).caches(config, rotary, 1, None, None, dtype, "cpu")
    g = torch.Generator().manual_seed(1)
    cache.begin_prompt([231])
    for t in range(0, 300, 100):
        for _, pos in cache.split(ids[:1, t : t + 100]):
            q, k, v = (torch.randn(1, n, pos.shape[1], 32, generator=g).to(dtype) for n in (4, 2, 2))
            for layer in cache:
                out = layer.attend(q, k, v, pos)
                assert out.dtype == dtype
            s = layer.slots()
            true = slot_attention(q.double(), pos, Slots(s.k.double(), s.v.double(), s.pos, s.a))
            assert (out.double() - true).abs().max() < 8 * torch.finfo(dtype).eps * float(s.v.abs().max())
        if t == 200:
            cache.end_prompt()
    assert {t.dtype for name, t in cache.named_buffers() if name.endswith((".k", ".v", ".asked", ".first"))} == {dtype}
    assert {t.dtype for name, t in cache.named_buffers() if name.endswith((".a", "mass"))} == (
        {torch.float32} if attn in BINDING else set()
    )


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
    for when in ("decode", "stream"):  # nor does a chunk overwrite what its own early queries still need
        feed(lm, new(lm, spell("snapkv", budget=160, when=when)), ids[:1, :400], 231, 400)


# Turns and budgets


@pytest.mark.parametrize("attn", FIXED)
def test_chat_turns_compress_what_arrived(lm: LM, ids: Tensor, attn: str) -> None:
    """A second prompt on the same cache is held exactly until its end (unless when=stream), then the budget binds again; it does not
    matter in which chunks it comes."""
    outs, caches = [], []
    for chunk in (1000, 7):
        cache = new(lm, attn)
        feed(lm, cache, ids[:1, :331], 301, chunk)
        with torch.no_grad():
            cache.begin_prompt([211])
            assert cache[0].store.rows <= 160 + 211 + 2
            x = [lm.model(ids[:1, t : min(t + chunk, 542)], cache) for t in range(331, 542, chunk)]
            for layer in cache:
                turn = [p for p in layer.slots().pos[0, 0].tolist() if p >= 331]
                assert (len(turn) == 211) == ("stream" not in attn)
            cache.end_prompt()
            assert cache.nbytes().allocated <= most_bytes(lm, parse(attn))
            assert owned(cache) <= 160
            x.append(lm.model(ids[:1, 542:600], cache))
        outs.append(torch.cat(x, 1))
        caches.append(cache)
    assert (outs[0] - outs[1]).abs().max() < CLOSE
    same_state(*caches)


def held(cache: Caches) -> list[int]:
    assert isinstance(cache, BudgetedCaches)
    return cache.held.tolist()


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("attn", ["uniform", "h2o"])
def test_shares_of_the_prompt(lm: LM, ids: Tensor, attn: str, when: str) -> None:
    """25% is a share of the tokens at the prompt's end, each sequence's own, and follows the turns; 25%/256 never means fewer than 256; a
    share below what a mode needs means that; prompt_tokens fixes what it is a share of."""
    needs = 64 if when == "prompt" else 128

    def after(budget: str, *lengths: int, **hints: int) -> list[list[int]]:
        cache, found = new(lm, spell(attn, budget=budget, when=when), **hints), []
        for n in lengths:
            seen = int(cache.tokens_seen)
            lm.prefill(ids[:1, seen : seen + n], cache)
            found.append(held(cache))
            assert owned(cache) <= found[-1][0]
        return found

    assert after("25%", 600, 200) == [[150], [200]]
    assert after("24.99%", 600) == [[150]]  # rounded up
    assert after("25%/256", 600, 200) == [[256], [256]]
    assert after("50%/256", 600, 200) == [[300], [400]]
    assert after("1%", 600) == [[needs]]
    assert after("100%", 300, 100) == [[300], [400]]
    assert after("25%", 300, 300, prompt_tokens=700) == [[175], [175]]
    cache = new(lm, spell(attn, budget="50%", when=when), 3)
    lm.prefill(ids[:, :700], cache, [700, 300, 20])
    assert held(cache) == [350, 150, needs]
    exact = feed(lm, new(lm, spell(attn, budget="100%", when=when)), ids[:1, :300], 300, 64)
    assert (exact - lm.logits(ids[:1, :300])).abs().max() < CLOSE


@pytest.mark.parametrize("attn", BUDGETED)
def test_a_share_binds_when_the_prompt_was_not_announced(lm: LM, ids: Tensor, attn: str) -> None:
    """when=stream: tokens that came before any prompt was announced are held exactly; the announcement says how many may stay."""
    outs = []
    for chunk in (500, 7):
        cache = new(lm, spell(attn, budget="25%", when="stream"))
        with torch.no_grad():
            for t in range(0, 211, chunk):
                lm.model(ids[:1, t : min(t + chunk, 211)], cache)
            assert owned(cache) == 211
            cache.begin_prompt([189])
            assert held(cache) == [128]
            outs.append(torch.cat([lm.model(ids[:1, t : min(t + chunk, 400)], cache) for t in range(211, 400, chunk)], 1))
        assert owned(cache) <= 128
    assert (outs[0] - outs[1]).abs().max() < CLOSE


@pytest.mark.parametrize("attn", BUDGETED)
def test_decoding_ends_the_prompt(lm: LM, ids: Tensor, attn: str) -> None:
    """Without a prefill the budget binds as well."""
    cache = new(lm, spell(attn, budget=128, when="decode"))
    for t in range(200):
        lm.decode_step(ids[:1, t].tolist(), cache)
        assert owned(cache) <= 128


def test_own_positions_without_a_cache(lm: LM, ids: Tensor) -> None:
    """Left padding (-1) is not seen, with and without a cache."""
    pos = torch.cat((torch.full((1, 5), -1), torch.arange(20)[None]), 1)
    padded = lm.model(ids[:1, :25], pos=pos)
    assert (padded[:, 5:] - lm.logits(ids[:1, 5:25])).abs().max() < CLOSE


def test_ids_must_fit_the_cache(lm: LM, ids: Tensor) -> None:
    """Another batch is refused before anything is written."""
    for attn in ("full", "h2o"):
        cache = new(lm, attn, 2)
        with pytest.raises(ZooError, match="batch 2"):
            lm.model(ids[:1, :4], cache)
        with pytest.raises(ZooError, match="between 0 and"):
            lm.prefill([10**6], new(lm, attn))
        with pytest.raises(ZooError, match="at least 1"):
            lm.prefill(ids[:2, :4], cache, lengths=[4, 0])
        assert cache.tokens_seen.tolist() == [0, 0]


# Spelling


def test_spelling_round_trips() -> None:
    """name:option=value is the object, and the object prints as it is spelled."""
    assert parse("sliding:window=77") == Sliding(77)
    assert parse("h2o:budget=12.5%,age=true") == H2O(Budget(12.5, True), age=True)
    for spelling in (
        "full",
        "sliding:window=77",
        "h2o:budget=12.5%",
        "h2o:budget=1024,when=stream,age=true,block=1",
        "tova:budget=25%/512",
        "sinks:budget=300,positions=cache",
        "uniform:budget=300,seed=-3",
        "snapkv:budget=64",
        "l2norm:budget=2147483648",
        "keydiff:budget=33.333333333333%",
        "keydiff:budget=0.1%",
        "keydiff:budget=0.00001%",
        "keydiff:budget=1234567",
    ):
        assert str(parse(spelling)) == spelling
        assert parse(parse(spelling)) == parse(spelling)
    assert str(H2O()) == "h2o:budget=25%/256"
    assert parse("snapkv").when == "prompt"  # type: ignore[attr-defined]
    for name, method in ATTENTION.items():
        assert issubclass(method, Attention)
        assert method.exact_when
        assert parse(str(method())) == parse(name) == method()


@pytest.mark.parametrize(
    ("spelling", "says"),
    [
        ("nonsense", "full, h2o, keydiff"),
        ("full:window=3", "none"),
        ("sliding:size=3", "window=1024"),
        ("sliding:window", "window=1024"),
        ("sliding:window=3.5", "whole number"),
        ("sliding:window=0", "between 1"),
        ("sliding:window=-4", "between 1"),
        ("sliding:window=3,window=4", "twice"),
        ("h2o:size=3", "budget=25%/256, when=decode, age=false, block=64"),
        ("h2o:budget=127", "at least 128 slots with when=decode"),
        ("h2o:budget=63,when=prompt", "at least 64 slots with when=prompt"),
        ("h2o:budget=2147483649", "at most 2147483648"),
        ("h2o:budget=" + "9" * 400, "at most 2147483648"),
        ("h2o:budget=0%", "above 0%"),
        ("h2o:budget=900%", "at most 200%"),
        ("h2o:budget=-3", "1024, or a share"),
        ("h2o:budget=many", "1024, or a share"),
        ("h2o:budget=2.5", "1024, or a share"),
        ("h2o:budget=25/256", "1024, or a share"),
        ("h2o:budget=25%/-1", "1024, or a share"),
        ("h2o:budget=", "1024, or a share"),
        ("h2o:when=later", "one of prompt, decode, stream"),
        ("h2o:when=", "one of prompt, decode, stream"),
        ("h2o:age=1", "true or false"),
        ("h2o:block=0", "between 1 and 64"),
        ("h2o:block=65", "between 1 and 64"),
        ("tova:block=65", "between 1 and 64"),
        ("sinks:positions=new", "one of true, cache"),
        ("uniform:seed=x", "whole number"),
        ("snapkv:block=3", "budget=25%/256, when=prompt"),
        ("", "full, h2o, keydiff"),
    ],
)
def test_bad_spellings_name_the_bound(spelling: str, says: str) -> None:
    """One line that lists what is known or names the bound."""
    with pytest.raises(ZooError, match=says) as e:
        parse(spelling)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 800


def test_budgets_in_tokens() -> None:
    """A share is rounded up, and never below its least; a number of tokens is itself."""
    assert [Budget.parse(s).tokens(1001) for s in ("25%", "25%/256", "100%", "0.01%", "300", "10%/99")] == [251, 256, 1001, 1, 300, 101]
    assert math.isinf(Budget.parse("9" * 400).number)
    assert round_up(65) == 128
