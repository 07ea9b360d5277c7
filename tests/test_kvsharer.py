"""`kvsharer`: what layers read, which pairs calibration finds, and that the document that tells how it was written is about this code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import write_checkpoint
from torch import Tensor

import zoo
from zoo import calibrate, cli, layer_pairs
from zoo.attention import parse
from zoo.attention.kvsharer import share
from zoo.attention.tables import save_table, table_path
from zoo.errors import ZooError
from zoo.lm import LM

CLOSE = 1e-4
PAIRS = [(3, 1), (4, 1), (2, 0)]
DOCUMENT = Path(__file__).parents[1] / "docs/adding-a-method.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("kvsharer") / "m", num_hidden_layers=5, hidden_size=32, head_dim=16)


@pytest.fixture
def lm(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LM:
    """With a table of PAIRS."""
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    lm = zoo.load(str(folder), attn="kvsharer", compile="off")
    save_table("kvsharer", lm.config, {"pairs": PAIRS})
    return lm


def test_compiling_is_refused_in_one_line(lm: LM, ids: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    """Layers differ: where compiling was asked for, that is said, once; `auto` says nothing."""
    for mode, lines in (("auto", 0), ("on", 1)):
        lm.step.mode = mode
        cache = lm.new_cache()
        lm.prefill(ids[:1, :5], cache)
        for _ in range(3):
            lm.decode_step(ids[0, :1], cache)
        assert caplog.text.count("decoding runs eagerly") == lines
    assert lm.step.ran == {"compiled": 0, "eager": 6}


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 300, (2, 300), generator=torch.Generator().manual_seed(5))


class Plain:
    """A layer of one causal pass over whole sequences that takes keys and values from the layer it is paired with."""

    def __init__(self, index: int, pairs: dict[int, int], made: dict[int, tuple[Tensor, Tensor]], window: int | None) -> None:
        self.index, self.pairs, self.made, self.window = index, pairs, made, window

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
        self.made[self.index] = (k, v)
        k, v = self.made[self.pairs.get(self.index, self.index)]
        i = torch.arange(q.shape[2])
        seen = (i <= i[:, None]) & (i > i[:, None] - (self.window or 10**9))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


@torch.no_grad()
def plain(lm: LM, ids: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
    made: dict[int, tuple[Tensor, Tensor]] = {}
    layers: Any = [Plain(i, dict(pairs), made, lm.config.sliding_window) for i in range(lm.config.num_hidden_layers)]
    return lm.model.logits(lm.model.hidden(ids, None, layers))


@torch.no_grad()
@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_a_layer_reads_what_another_keeps(lm: LM, ids: Tensor, layers: int) -> None:
    """Equal to a plain pass that hands keys and values on; the first `layers` pairs of the table are used, all with 0."""
    lm.attn = parse(f"kvsharer:layers={layers}")
    cache = lm.new_cache(2)
    got = torch.cat([lm.model(ids[:, t : t + 70], cache) for t in range(0, 300, 70)], 1)
    assert (got - plain(lm, ids, PAIRS[: layers or 3])).abs().max() < CLOSE
    assert (got - plain(lm, ids, PAIRS[: (layers or 3) - 1])).abs().max() > 1e-2


@torch.no_grad()
def test_a_models_own_window(ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring: a call's early queries still see what its late tokens would overwrite; bytes stay."""
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    changes: dict[str, Any] = {"num_hidden_layers": 5, "hidden_size": 32, "head_dim": 16, "sliding_window": 40}
    lm = zoo.load(str(write_checkpoint(tmp_path / "m", "mistral", **changes)), attn="kvsharer", compile="off")
    save_table("kvsharer", lm.config, {"pairs": PAIRS})
    cache = lm.new_cache(2)
    got = torch.cat([lm.model(ids[:, t : t + 150], cache) for t in range(0, 300, 150)], 1)
    assert (got - plain(lm, ids, PAIRS)).abs().max() < CLOSE
    assert cache[0].store.rows == 1 + 40 + 64


def test_a_reading_layer_keeps_nothing(lm: LM, ids: Tensor) -> None:
    """Two of five layers are left; each storage is counted once."""
    lm.prefill(ids[:1], cache := lm.new_cache())
    lm.attn = parse("full")
    lm.prefill(ids[:1], full := lm.new_cache())
    assert not list(cache[3].buffers())
    assert cache[3].used() == 0
    for kept, whole in zip(cache.nbytes(), full.nbytes(), strict=True):
        assert (kept - 8) * 5 == (whole - 8) * 2  # but for the count of tokens


def test_bad_tables(lm: LM, tmp_path: Path) -> None:
    """One line says how to make one, or what is wrong with it."""
    for pairs in ([[1, 1]], [[0, 1]], [[5, 1]], [[2, 1], [2, 0]], [[3, 2], [2, 0]], [[1]], "x", [[1, None]], 3):
        save_table("kvsharer", lm.config, {"pairs": pairs})
        with pytest.raises(ZooError, match=r"another model.*zoo\.calibrate kvsharer"):
            lm.new_cache()
    table_path("kvsharer", lm.config).write_text("{")
    with pytest.raises(ZooError, match=r"cannot be read.*zoo\.calibrate kvsharer"):
        lm.new_cache()
    table_path("kvsharer", lm.config).unlink()
    with pytest.raises(ZooError, match=r"no table of layer pairs.*zoo\.calibrate kvsharer MODEL --text FILE"):
        lm.new_cache()
    save_table("kvsharer", lm.config, {"pairs": PAIRS})
    lm.attn = parse("kvsharer:layers=4")
    with pytest.raises(ZooError, match="found only 3"):
        lm.new_cache()
    with pytest.raises(ZooError, match="at least 0"):
        parse("kvsharer:layers=-1")


@torch.no_grad()
def test_load_refuses_a_cache_of_other_pairs(lm: LM, ids: Tensor, tmp_path: Path) -> None:
    """All shapes are the same; the same pairs in another order are the same cache, and so are as many of a longer table."""
    lm.prefill(ids[:1], cache := lm.new_cache())
    cache.save(tmp_path / "c")
    save_table("kvsharer", lm.config, {"pairs": [(3, 0), (4, 1), (2, 1)]})
    fresh = lm.new_cache()
    with pytest.raises(ZooError, match=r"c holds another cache.*by table"):
        fresh.load(tmp_path / "c")
    assert fresh.tokens_seen.sum() == 0
    save_table("kvsharer", lm.config, {"pairs": PAIRS[::-1]})
    lm.new_cache().load(tmp_path / "c")


# Calibration


def test_distances_are_of_averages(lm: LM, ids: Tensor) -> None:
    """Euclidean, of keys and values averaged over passages at each place."""
    _, caches = layer_pairs.read(lm, ids[:, :32], [])
    found = layer_pairs.distances(caches)
    slots = [cache.slots() for cache in caches]
    for i in range(5):
        for j in range(5):
            square = 0.0
            for x, y in ((slots[i].k, slots[j].k), (slots[i].v, slots[j].v)):
                square += float((x[:, :, 1:33].double().mean(0) - y[:, :, 1:33].double().mean(0)).square().sum())
            assert float(found[i, j]) == pytest.approx(square**0.5, rel=1e-4, abs=1e-4)


@torch.no_grad()
def test_pairs_are_found_greedily(lm: LM, ids: Tensor) -> None:
    """Against the rule as a plain loop, at a threshold that refuses some pairs."""
    passages, wanted = ids[:, :48], 3
    _, caches = layer_pairs.read(lm, passages, [])
    apart = layer_pairs.distances(caches)
    true = lm.model.hidden(passages, None)

    def like(pairs: list[tuple[int, int]]) -> float:
        made: dict[int, tuple[Tensor, Tensor]] = {}
        layers: Any = [Plain(i, dict(pairs), made, None) for i in range(5)]
        return float(F.cosine_similarity(lm.model.hidden(passages, None, layers), true, dim=-1).mean())

    threshold = sorted(like([(deeper, shallower)]) for deeper in range(5) for shallower in range(deeper))[5]
    pairs: list[tuple[int, int]] = []
    refused = tried = 0
    every = [(deeper, shallower) for deeper in range(5) for shallower in range(deeper)]
    for d, s in sorted(every, key=lambda pair: -float(apart[pair])):
        free = all(d not in pair and s != pair[0] for pair in pairs)
        if free and len(pairs) < wanted:
            good, tried = like([*pairs, (d, s)]) > threshold, tried + 1
            pairs, refused = ([*pairs, (d, s)] if good else pairs), refused + (not good)
    assert refused
    assert pairs
    table = layer_pairs.calibrate(lm, passages.tolist(), wanted, threshold)
    assert table["pairs"] == pairs
    assert table["tried"] == tried
    assert all(cosine > threshold for cosine in table["cosines"])
    assert len(layer_pairs.calibrate(lm, passages.tolist(), 1, -1.0)["pairs"]) == 1
    assert share(pairs, lm.config, 1, None, torch.float32, "cpu").nbytes().used == 8


def test_calibrate_makes_the_table(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command writes it, says what it found, and the method then runs."""
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(i * 7919 % 1000) for i in range(900)))
    command = ["kvsharer", str(folder), "--text", str(text), "--passages", "3", "--layers", "2", "--threshold", "0", "--json"]
    assert cli.run(calibrate.main, command) == 0
    out, err = capsys.readouterr()
    said = json.loads(out.splitlines()[-1])
    assert len(said["pairs"]) == 2
    assert "2 of 5 layers keep nothing: 40.0% of the bytes saved" in err
    lm = zoo.load(str(folder), attn="kvsharer", compile="off")
    assert lm.generate("Call me", 5)
    assert lm.cache is not None
    assert [cache.used() == 0 for cache in lm.cache].count(True) == 2


# The document


def test_the_document_is_about_this_code() -> None:
    """Every block of Python in docs/adding-a-method.md stands, line by line, in the file that it names."""
    blocks = re.findall(r"```python (\S+)\n(.*?)```", DOCUMENT.read_text(), re.S)
    assert len(blocks) >= 5
    for name, code in blocks:
        source = (DOCUMENT.parents[1] / name).read_text()
        for part in re.split(r"^ *\.\.\.\n", code, flags=re.M):
            assert part.strip("\n") in source, f"{name}: {part}"
