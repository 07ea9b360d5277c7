"""`pod`: which keys a query reads, what is stored, how groups are found, and the training for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_checkpoint
from torch import Tensor

import zoo
from zoo import adapt, calibrate, chat, cli, generate, layer_groups
from zoo.adapt import Adaptation, Plan
from zoo.attention import parse
from zoo.attention.pod import Pod, PodCache, group, load_groups
from zoo.attention.tables import save_table, table_path
from zoo.bench import __main__ as bench
from zoo.errors import ZooError
from zoo.eval import __main__ as evaluation
from zoo.lm import LM

CLOSE = 1e-4
GROUPS = [[0, 0], [0, 1], [0, 1], [3, 1], [3, 4]]  # 5 layers, 2 kv heads: 5 of 10 are lowest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("pod") / "m", num_hidden_layers=5, hidden_size=32, head_dim=16)


@pytest.fixture
def lm(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LM:
    """With a table of GROUPS."""
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    lm = zoo.load(str(folder), attn="pod:first=5,recent=40", compile="off")
    save_table("pod", lm.config, {"groups": GROUPS})
    return lm


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 300, (2, 400), generator=torch.Generator().manual_seed(5))


class Plain:
    """A layer of one pass in float64 that goes through queries and keys one by one."""

    def __init__(self, index: int, first: int, recent: int, made: list[Tensor], window: int = 10**9) -> None:
        self.index, self.first, self.recent, self.made, self.window = index, first, recent, made, window

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
        self.made.append(k)
        out = torch.zeros_like(q)
        for h in range(q.shape[1]):
            g = h * k.shape[1] // q.shape[1]
            lowest = self.made[GROUPS[self.index][g]]
            for p in range(q.shape[2]):
                full_blocks = p - p % 64
                oldest = max(0, p - self.window + 1)
                keys = torch.stack(
                    [(lowest if self.first <= j < full_blocks - self.recent else k)[:, g, j] for j in range(oldest, p + 1)], 1
                )
                weight = (keys @ q[:, h, p, :, None] / q.shape[3] ** 0.5).softmax(1)
                out[:, h, p] = (weight * v[:, g, oldest : p + 1]).sum(1)
        return out


@torch.no_grad()
def plain(lm: LM, ids: Tensor, first: int, recent: int, window: int = 10**9) -> Tensor:
    made: list[Tensor] = []
    layers: Any = [Plain(i, first, recent, made, window) for i in range(5)]
    return lm.model.logits(lm.model.hidden(ids, None, layers))


def read(lm: LM, attn: str, ids: Tensor, chunk: int = 150) -> tuple[Tensor, Any]:
    lm.attn = parse(attn)
    cache = lm.new_cache(len(ids))
    with torch.no_grad():
        return torch.cat([lm.model(ids[:, t : t + chunk], cache) for t in range(0, ids.shape[1], chunk)], 1), cache


@pytest.mark.parametrize(("first", "recent"), [(5, 40), (0, 1), (16, 64), (70, 130)])
def test_distant_tokens_have_the_lowest_layers_keys(lm: LM, ids: Tensor, first: int, recent: int) -> None:
    """The cache, and the dense form that is trained, against a loop; another number of near tokens differs."""
    ids = ids[:, :260]
    got, _ = read(lm, f"pod:first={first},recent={recent}", ids)
    with torch.no_grad():
        dense = lm.model.logits(lm.model.hidden(ids, None, Pod(first, recent).dense(torch.tensor(GROUPS), None)))
    true = plain(lm, ids, first, recent)
    assert (got - true).abs().max() < CLOSE
    assert (dense - true).abs().max() < CLOSE
    for other in ((first + 1, recent), (first, recent + 1)):
        assert (plain(lm, ids, *other) - true).abs().max() > 1e-2


def test_a_models_own_window(ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing older counts, first tokens neither, and distant ones lie in a ring."""
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    changes: dict[str, Any] = {"num_hidden_layers": 5, "hidden_size": 32, "head_dim": 16, "sliding_window": 100}
    lm = zoo.load(str(write_checkpoint(tmp_path / "m", "mistral", **changes)), compile="off")
    save_table("pod", lm.config, {"groups": GROUPS})
    got, cache = read(lm, "pod:first=5,recent=20", ids)
    true = plain(lm, ids, 5, 20, window=100)
    assert (got - true).abs().max() < CLOSE
    with torch.no_grad():
        dense = lm.model.logits(lm.model.hidden(ids, None, Pod(5, 20).dense(torch.tensor(GROUPS), 100)))
    assert (dense - true).abs().max() < CLOSE
    assert cache[0].distant.rows == cache[0].v.shape[2] == 192  # 1 + 100 + 64, in blocks
    more = cache.clone()
    with torch.no_grad():
        lm.model(ids.repeat(1, 3), more)
    assert more[0].distant.rows == 192


def test_exact_when(lm: LM, ids: Tensor) -> None:
    """As many tokens as are near, or groups of one layer; one near token fewer is not, once a block has ended."""
    ids = ids[:, :256]
    true = lm.logits(ids)
    assert Pod.exact_when == "first + recent >= tokens"
    assert (read(lm, "pod:first=56,recent=200", ids)[0] - true).abs().max() < CLOSE
    with torch.no_grad():
        cache = read(lm, "pod:first=55,recent=200", ids)[1]
        true = lm.logits(torch.cat((ids, ids[:, :1]), 1))[:, -1]
        assert (lm.model(ids[:, :1], cache)[:, 0] - true).abs().max() > 1e-3
        cache = read(lm, "pod:first=56,recent=200", ids)[1]
        assert (lm.model(ids[:, :1], cache)[:, 0] - true).abs().max() < CLOSE
    save_table("pod", lm.config, {"groups": [[i, i] for i in range(5)]})
    assert (read(lm, "pod:first=1,recent=1", ids)[0] - lm.logits(ids)).abs().max() < CLOSE


# Bytes


@torch.no_grad()
def test_bytes_are_shared_and_freed(lm: LM, ids: Tensor) -> None:
    """To the number: near tokens twice 16 floats a head and layer, distant ones 16 for the value, and 16 for the key of a lowest pair."""
    _, cache = read(lm, "pod:first=5,recent=40", ids[:1])
    distant = 384 - 40 - 5
    near = 400 - distant
    values, keys, positions = 5 * 2 * distant * 64, 5 * distant * 64, 4 * distant
    own = 5 * near * (2 * 2 * 64 + 4)
    assert cache.nbytes().used == values + keys + positions + own + 5 * 2 * 8 + 8
    assert cache[0].distant is cache[4].distant
    rows = 384  # 1 + 339, in blocks
    assert cache[0].distant.k.shape == (1, 5, rows, 16)
    assert all(layer.v.shape == (1, 2, rows, 16) for layer in cache)
    assert all(layer.store.rows == 1 + 5 + 40 + 64 for layer in cache)
    known = cache.nbytes().allocated - sum(t.untyped_storage().nbytes() for t in cache[0].distant.buffers())
    assert known == sum(t.untyped_storage().nbytes() for layer in cache for t in (layer.v, layer.source, *layer.store.buffers())) + 8


@torch.no_grad()
def test_a_third_of_the_bytes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 7 of 10 pairs not lowest and most tokens distant, 35 % are saved, allocated ones too."""
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    lm = zoo.load(str(folder), compile="off")
    save_table("pod", lm.config, {"groups": [[0, 0], [0, 0], [0, 0], [0, 3], [0, 3]]})
    ids, caches = torch.randint(0, 300, (1, 4000)), {}
    for attn in ("full", "pod:first=16,recent=64"):
        lm.attn = parse(attn)
        caches[attn] = lm.new_cache(max_tokens=4000)
        lm.prefill(ids, caches[attn])
    full, pod = (cache.nbytes() for cache in caches.values())
    assert 0.32 < 1 - pod.used / full.used < 0.35
    assert 0.30 < 1 - pod.allocated / full.allocated < 0.35


@torch.no_grad()
def test_what_was_an_own_key_is_overwritten(lm: LM, ids: Tensor) -> None:
    """A distant token's own key in a layer that is not lowest is free at once, and gone from every buffer when the ring has come round;
    nothing else holds it. Layer 1 is looked at: what it makes is the full cache's, since layer 0 reads its own keys."""
    lm.attn = parse("full")
    lm.model(ids[:1], full := lm.new_cache())
    _, cache = read(lm, "pod:first=5,recent=40", ids[:1])
    layer = cache[1]
    assert isinstance(layer, PodCache)
    assert layer.lowest == [1]
    assert sorted(p for p in layer.store.pos[0, 0].tolist() if p >= 0) == [*range(5), *range(344, 400)]
    held = torch.cat([t.reshape(-1, 16) for t in cache.buffers() if t.shape[-1] == 16])
    slots = full[1].slots()
    for head, gone in ((0, range(5, 296)), (1, range(0))):  # the ring has 104 rows behind the first 5
        own = {int(p): k for p, k in zip(slots.pos[0, head], slots.k[0, head], strict=True) if p >= 0}
        found = {p for p, k in own.items() if ((held - k).abs().amax(1) < 1e-5).any()}
        assert found == set(range(400)) - set(gone)


# Compiled


@pytest.mark.slow
def test_compiled_equals_eager(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for 150 steps from a prompt without a distant token, through its first ones and on; in float64."""
    from torch._dynamo.utils import counters

    from zoo.compiled import missing_tool

    if missing_tool():
        pytest.skip(f"torch.compile needs {missing_tool()}")
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    lm = zoo.load(str(folder), attn="pod:first=5,recent=40", compile="on")
    save_table("pod", lm.config, {"groups": GROUPS})
    lm.model.double()
    ids = torch.randint(0, 300, (2, 250), generator=torch.Generator().manual_seed(1))
    caches = [lm.new_cache(2, max_tokens=250) for _ in range(2)]
    for cache in caches:
        lm.prefill(ids[:, :100], cache, [100, 70])
    counters.clear()
    for t in range(100, 250):
        outs = []
        for mode, cache in zip(("on", "off"), caches, strict=True):
            lm.step.mode = mode
            outs.append(lm.decode_step(ids[:, t], cache))
        assert (outs[0] - outs[1]).abs().max() < 1e-5
    assert lm.step.ran == {"compiled": 150, "eager": 150}
    assert counters["stats"]["unique_graphs"] <= 2
    assert not counters["graph_break"]


# Tables and groups


def test_load_refuses_a_cache_of_other_groups(lm: LM, ids: Tensor, tmp_path: Path) -> None:
    """As many pairs are lowest, so all shapes are the same; the same table is taken."""
    _, cache = read(lm, "pod:first=5,recent=40", ids[:1])
    cache.save(tmp_path / "c")
    other = [[0, 0], [1, 0], [1, 0], [1, 3], [1, 4]]
    assert sum(a == i for groups in (GROUPS, other) for i, row in enumerate(groups) for a in row) == 10
    save_table("pod", lm.config, {"groups": other})
    fresh = lm.new_cache()
    with pytest.raises(ZooError, match=r"c holds another cache.*by table"):
        fresh.load(tmp_path / "c")
    assert fresh.tokens_seen.sum() == 0
    save_table("pod", lm.config, {"groups": GROUPS, "threshold": 0.7})
    lm.new_cache().load(tmp_path / "c")


def test_a_checkpoints_own_table_is_the_only_one(
    lm: LM, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """pod.json beside the weights: read in place of the cache folder's, also after a calibration, which it refuses."""
    shutil.copytree(folder, tmp_path / "own")
    own = [[0, 0], [0, 0], [2, 2], [2, 2], [2, 2]]
    (tmp_path / "own/pod.json").write_text(json.dumps({"groups": own, "attn": "pod:recent=40"}))
    adapted = zoo.load(str(tmp_path / "own"), attn="pod:recent=40", compile="off")
    assert adapted.config == lm.config
    assert load_groups(adapted.config).tolist() == own
    assert load_groups(lm.config).tolist() == GROUPS
    text = ["--text", str(words(tmp_path / "t", 600))]
    for more in ([], ["--adapt", str(tmp_path / "out")]):
        assert cli.run(calibrate.main, ["pod", str(tmp_path / "own"), *text, *more]) == 2
        assert "original" in capsys.readouterr().err
    for broken, says in (("{", "pod.json"), ("{}", "does not fit the model beside it"), (json.dumps({"groups": [[0]]}), "does not fit")):
        (tmp_path / "own/pod.json").write_text(broken)
        with pytest.raises(ZooError, match=says):
            adapted.new_cache()


def test_notes(lm: LM, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command lines say where weights were not made for `pod`, or for other options of it; nothing where they were."""
    shutil.copytree(folder, tmp_path / "own")
    (tmp_path / "own/pod.json").write_text(json.dumps({"groups": GROUPS, "attn": "pod:recent=40"}))
    for model, attn, says in (
        (folder, "pod:recent=40", "note: pod is training-free here"),
        (tmp_path / "own", "pod:recent=41", "note: these weights were trained for pod:recent=40, not for pod:recent=41"),
        (tmp_path / "own", "pod:recent=40", ""),
        (folder, "full", ""),
    ):
        assert cli.run(generate.main, ["hello", "--model", str(model), "--attn", attn, "--max-new-tokens", "2", "--compile", "off"]) == 0
        notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
        assert len(notes) == bool(says)
        assert not says or notes[0].startswith(says)
    more = ["--model", str(folder), "--dtype", "float32", "--compile", "off"]
    (tmp_path / "text").write_text("All happy families are alike. " * 100)
    argv = ["--lengths", "150", "--samples", "1", "--text", str(tmp_path / "text"), "--out", str(tmp_path / "out")]
    evaluation.main([*more, "--attn", "full", "pod:recent=40", *argv])
    assert capsys.readouterr().err.count("note: pod is training-free here") == 1
    bench.main(["prefill", *more, "--attn", "full", "--attn", "pod", "--contexts", "8", "--repeats", "1", "--steps", "1"])
    assert capsys.readouterr().err.count("note: pod is training-free here") == 1
    chat.command("/attn pod", chat.Conversation(lm, None, 5, {}), None)
    assert "training-free" in capsys.readouterr().err


def test_bad_tables(lm: LM) -> None:
    """One line says how to make one, or what is wrong with it."""
    chained = [[0, 0], [0, 0], [1, 2], [3, 3], [4, 4]]  # layer 2 reads a layer that is not lowest
    above = [[1, 0], [1, 1], [2, 2], [3, 3], [4, 4]]
    for groups in (None, GROUPS[:4], [[0]] * 5, chained, above, [[-1, 0], *GROUPS[1:]], [[0.0, 0.0], *GROUPS[1:]], "x", 3, [[0], [0, 1]]):
        save_table("pod", lm.config, {"groups": groups})
        with pytest.raises(ZooError, match=r"another model.*zoo\.calibrate pod"):
            lm.new_cache()
    table_path("pod", lm.config).write_text("{}")
    with pytest.raises(ZooError, match=r"cannot be read.*zoo\.calibrate pod"):
        lm.new_cache()
    table_path("pod", lm.config).unlink()
    with pytest.raises(ZooError, match=r"no table of layer groups.*zoo\.calibrate pod MODEL --text FILE"):
        lm.new_cache()


@pytest.mark.parametrize(("options", "says"), [("first=-1", "between 0"), ("recent=0", "between 1"), ("window=3", "first=16, recent=256")])
def test_bad_options(options: str, says: str) -> None:
    with pytest.raises(ZooError, match=says):
        parse(f"pod:{options}")


def test_similarity_by_hand(lm: LM, ids: Tensor) -> None:
    """1 - JS divergence in bits of mean attention of a kv head's query heads, over the last queries of all passages."""
    passages = [row[:50].tolist() for row in ids]
    found = layer_groups.similarity(lm, passages, last=7)
    seen: list[Tensor] = []

    class Scores:
        def attend(self, q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
            score = q.double() @ k.double().repeat_interleave(2, 1).mT / 4
            prob = score.masked_fill(~torch.ones(50, 50).tril().bool(), -torch.inf).softmax(-1)
            seen.append(prob[:, :, -7:])
            return (prob @ v.double().repeat_interleave(2, 1)).to(q.dtype)

    layers: Any = [Scores() for _ in range(5)]
    with torch.no_grad():
        lm.model.hidden(torch.tensor(passages), None, layers)

    def bits(x: Tensor, y: Tensor) -> Tensor:
        return torch.where(x > 0, x * (x / y).log2(), 0).sum(-1)

    for i in range(5):
        for j in range(i):
            x, y = (p.unflatten(1, (2, 2)).mean(2) for p in (seen[i], seen[j]))
            divergence = (bits(x, (x + y) / 2) + bits(y, (x + y) / 2)) / 2
            assert (found[i, j] - (1 - divergence.mean((0, 2)))).abs().max() < 1e-4
    assert 0 < found[4, 0].min() < found[4, 0].max() < 1
    assert (found[0, 0] == 1).all()


def test_groups_are_merged_from_the_bottom() -> None:
    """A layer joins while it is like the lowest one; being like the one below is not enough."""
    like = torch.zeros(4, 4, 2)
    like[1, 0], like[2, 0], like[2, 1], like[3, 2] = torch.tensor([0.5, 0.4]), torch.tensor([0.6, 0.9]), torch.tensor([0.9, 0.5]), 0.8
    like[3, 0] = torch.tensor([0.49, 0.9])
    like[3, 1] = torch.tensor([0.9, 0.49])
    assert group(like, 0.5).tolist() == [[0, 0], [0, 1], [0, 1], [3, 3]]
    assert group(like, 0.91).tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert group(like, 0.0).tolist() == [[0, 0]] * 4


def words(path: Path, count: int) -> Path:
    path.write_text(" ".join(str(i * 7919 % 1000) for i in range(count)))
    return path


def test_calibrate_reports_groups(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command writes groups, and says how alike layers are, what is saved, and what it costs in KL on other passages."""
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    text = words(tmp_path / "text.txt", 900)
    command = ["pod", str(folder), "--text", str(text), "--tokens", "300", "--passages", "2", "--first", "4", "--recent", "40", "--json"]
    assert cli.run(calibrate.main, [*command, "--threshold", "0.05"]) == 0
    out, err = capsys.readouterr()
    said = json.loads(out.splitlines()[-1])
    assert "training-free" in err
    assert "kv head 1: layers" in err
    assert f"{said['saved']:.1%} of the bytes saved after 300 tokens; KL from full {said['kl']:.3f} nats, 4 other passages" in err
    assert said["kl"] > 0.01
    lm = zoo.load(str(folder), attn="pod:first=4,recent=40", compile="off")
    ids = torch.tensor([lm.tokenizer.encode(text.read_text())[-300:]])
    (other, cache), (true, full) = (read(lm, attn, ids) for attn in ("pod:first=4,recent=40", "full"))
    true, other = true[0].log_softmax(-1), other[0].log_softmax(-1)
    far = [p for p in range(300) if any(4 <= j < p // 64 * 64 - 40 for j in range(p))]
    assert far == [*range(64, 300)]
    found = layer_groups.cost(lm, Pod(4, 40), ids.tolist())
    assert found["kl"] == pytest.approx(float((true[far].exp() * (true[far] - other[far])).sum(-1).mean()), rel=1e-3)
    assert found["saved"] == pytest.approx(1 - cache.nbytes().used / full.nbytes().used)
    assert str(lm.attn) == "full"
    assert cli.run(calibrate.main, [*command, "--threshold", "1"]) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert alone["groups"] == [[i, i] for i in range(5)]
    assert abs(alone["kl"]) < 1e-5
    few = words(tmp_path / "few.txt", 150)
    assert cli.run(calibrate.main, [*command, "--text", str(few), "--passages", "9"]) == 0
    out, err = capsys.readouterr()
    assert "the text has no other passage of 300 tokens" in err
    assert "kl" not in json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("window", [None, 30, 100])
def test_which_queries_reach_something_distant(window: int | None) -> None:
    """Against the rule as a loop; `check` names the fewest tokens."""
    for first, recent in ((5, 40), (0, 64), (16, 112), (1, 1)):
        m, at = Pod(first, recent), torch.arange(300)
        oldest = [0 if window is None else max(0, p - window + 1) for p in range(300)]
        far = [any(first <= j < p // 64 * 64 - recent for j in range(oldest[p], p)) for p in range(300)]
        assert m.reaches(at, window).tolist() == far
        least = far.index(True) + 1 if any(far) else 301
        with pytest.raises(ZooError, match=f"--tokens {least} at least" if any(far) else "own window shows"):
            layer_groups.check(m, least - 1, window)
        if any(far):
            layer_groups.check(m, least, window)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["pod", "--tokens", "5"], "at least 128"),
        (["pod", "--threshold", "2"], "between 0 and 1"),
        (["kvsharer", "--tokens", "5"], "at least 16"),
        (["kvsharer", "--layers", "-1"], "at least 0"),
        (["pod", "--recent", "0"], "between 1"),
        (["pod", "--adapt", "x"], "no table of layer groups"),
        (["pod", "--adapt", "."], "is there already"),
        (["pod", "--tokens", "200"], "nothing is distant in 200 tokens: --tokens 321 at least"),
        (["pod", "--adapt", "x", "--threshold", "0.5"], "groups that are there already"),
        (["pod", "--adapt", "x", "--passages", "3"], "groups that are there already"),
        (["pod", "--adapt", "x", "--lr", "-1"], "--lr above 0"),
        (["pod", "--adapt", "x", "--lr", "inf"], "--lr above 0"),
        (["pod", "--adapt", "x", "--steps", "0"], "--steps at least 1"),
        (["pod", "--against", "x", "--adapt", "y"], "without --adapt"),
        (["kvsharer", "--against", "x"], "are for pod"),
        (["kvsharer", "--adapt", "x"], "are for pod"),
    ],
)
def test_bad_input(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: list[str], says: str
) -> None:
    """One line, exit code 2."""
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert cli.run(calibrate.main, [change[0], str(folder), "--text", str(words(tmp_path / "t", 600)), *change[1:]]) == 2
    err = capsys.readouterr().err.strip()
    assert says in err
    assert len(err.splitlines()) == 1


# Adaptation


@pytest.fixture
def work(lm: LM, folder: Path) -> Adaptation:
    return Adaptation(lm, zoo.load(str(folder), compile="off"), Pod(4, 20), torch.tensor(GROUPS))


TEXT = [x % 40 for x in range(1500)]


def test_adaptation_lowers_kl(work: Adaptation) -> None:
    """On the text that is trained on: random weights have nothing in common with other texts. The teacher stays as it is."""
    true = {name: p.clone() for name, p in work.teacher.model.named_parameters()}
    passages = [TEXT[7:135]]
    before = work.held_out(passages)
    work.train(TEXT, Plan(steps=100, tokens=128), Path())
    assert work.held_out(passages) < 0.7 * before
    for name, p in work.teacher.model.named_parameters():
        assert torch.equal(p, true[name]), name
        assert p.grad is None, name


def test_what_is_trained_of_gpt_neox(tmp_path: Path) -> None:
    """Attention's four tensors a layer, by this family's names; not the norm that is called after it."""
    lm, teacher = (zoo.load(str(write_checkpoint(tmp_path / "m", "gpt_neox", hidden_size=64)), compile="off") for _ in range(2))
    c = lm.config
    work = Adaptation(lm, teacher, Pod(4, 20), torch.zeros(c.num_hidden_layers, c.num_key_value_heads, dtype=torch.int64))
    parts = ("query_key_value.weight", "query_key_value.bias", "dense.weight", "dense.bias")
    wanted = {f"gpt_neox.layers.{i}.attention.{part}" for i in range(c.num_hidden_layers) for part in parts}
    assert set(work.trained) == wanted
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    work.train(TEXT, Plan(steps=2, tokens=128), Path())
    for name, p in lm.model.named_parameters():
        assert torch.equal(p, before[name]) != (name in wanted), name


def test_adaptation_goes_on(work: Adaptation, folder: Path, tmp_path: Path) -> None:
    """A run that was stopped goes on to the same weights, to the last bit; not another run, nor from a broken file."""
    plan = Plan(steps=12, tokens=128)
    work.train(TEXT, plan, tmp_path)

    def begin() -> Adaptation:
        return Adaptation(zoo.load(str(folder), compile="off"), work.teacher, Pod(4, 20), torch.tensor(GROUPS))

    stopped = begin()
    assert not stopped.resume(tmp_path / "run")
    half = stopped.divergence

    def stop(given: Tensor) -> Tensor:
        if stopped.step == 5:
            raise KeyboardInterrupt
        return half(given)

    stopped.divergence = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped.train(TEXT, plan, tmp_path / "run")
    stopped.save(tmp_path / "run")
    again = begin()
    assert again.resume(tmp_path / "run")
    assert again.step == 5
    again.train(TEXT, plan, tmp_path / "run")
    for name, p in work.trained.items():
        assert torch.equal(p, again.trained[name]), name
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["state.safetensors"]
    for recent, source in ((21, ""), (20, "another text")):
        other = Adaptation(zoo.load(str(folder), compile="off"), work.teacher, Pod(4, recent), torch.tensor(GROUPS), source)
        with pytest.raises(ZooError, match="other options"):
            other.resume(tmp_path / "run")
    (tmp_path / "run/state.safetensors").write_text("{")
    with pytest.raises(ZooError, match="cannot read"):
        begin().resume(tmp_path / "run")


def adapting(folder: Path, text: Path, out: Path, *more: str) -> list[str]:
    command = ["pod", str(folder), "--text", str(text), "--tokens", "128", "--first", "4", "--recent", "20", "--json"]
    return [*command, "--dtype", "float32", "--adapt", str(out), "--minutes", "1000", "--steps", "20", *more]


def test_adapt_writes_a_checkpoint(
    lm: LM, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command's folder loads as any other, with the same config, and finds its groups in it; only attention's weights differ.
    `--against` then says, read through caches, what is recorded: bfloat16 products aside."""
    monkeypatch.setattr(adapt, "HELD_OUT", 2)
    for name in ("pytorch_model.bin", "model.gguf", "model.safetensors.index.json.bak", "README.md"):
        (source := tmp_path / "source").mkdir(exist_ok=True)
        (source / name).write_text("x")
    shutil.copytree(folder, source, dirs_exist_ok=True)
    text = words(tmp_path / "t", 900)
    assert cli.run(calibrate.main, adapting(source, text, tmp_path / "out")) == 0
    out, err = capsys.readouterr()
    said = json.loads(out.splitlines()[-1])
    assert said["steps"] == 20
    assert f"KL {said['before']:.3f} before, {said['after']:.3f} after 20 steps" in err
    kept = json.loads((tmp_path / "out/pod.json").read_text())
    assert kept == {name: value for name, value in said.items() if name != "path"}
    assert kept["groups"] == GROUPS
    assert not (tmp_path / "out.training").exists()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in folder.iterdir()} | {"pod.json", "README.md"}
    save_table("pod", lm.config, {"groups": [[0, 0]] * 5})
    adapted = zoo.load(str(tmp_path / "out"), attn="pod", compile="off")
    assert adapted.config == lm.config
    assert adapted.generate("Call me", 5)
    for (name, mine), theirs in zip(adapted.model.named_parameters(), lm.model.parameters(), strict=True):
        assert torch.equal(mine, theirs) != ("self_attn" in name), name
    command = ["pod", str(folder), "--text", str(text), "--tokens", "128", "--passages", "2", "--first", "4", "--recent", "20", "--json"]
    assert cli.run(calibrate.main, [*command, "--against", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])
    assert found["kl_before"] == pytest.approx(said["before"], rel=0.05)
    assert found["kl_after"] == pytest.approx(said["after"], rel=0.05)
    assert 0 < found["kl_full"] != pytest.approx(found["kl_after"], rel=0.05)
    assert f"original {found['kl_before']:.3f}, adapted {found['kl_after']:.3f}" in err
    assert "held out" not in err
    command[command.index("--passages") + 1] = "3"
    assert cli.run(calibrate.main, [*command, "--against", str(tmp_path / "out")]) == 0
    assert "of these 384 tokens the last 256 were held out" in capsys.readouterr().err
    assert cli.run(calibrate.main, [*command, "--against", str(folder)]) == 2
    assert "pod.json" in capsys.readouterr().err


def test_adapt_goes_on_after_ctrl_c(
    lm: LM, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command, interrupted and given again, writes what it would have written at once; a state saved amid a step is not."""
    monkeypatch.setattr(adapt, "HELD_OUT", 1)
    text = words(tmp_path / "t", 900)
    assert cli.run(calibrate.main, adapting(folder, text, tmp_path / "once", "--steps", "6")) == 0
    divergence, calls = Adaptation.divergence, [0]

    def stop(self: Adaptation, ids: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 5:  # one was of the held-out passage
            raise KeyboardInterrupt
        return divergence(self, ids)

    with monkeypatch.context() as patch:
        patch.setattr(Adaptation, "divergence", stop)
        assert cli.run(calibrate.main, adapting(folder, text, tmp_path / "out", "--steps", "6")) == 130
    assert (tmp_path / "out.training/state.safetensors").exists()
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    assert cli.run(calibrate.main, adapting(folder, text, tmp_path / "out", "--steps", "6")) == 0
    assert "going on from" in (err := capsys.readouterr().err)
    assert "step 3" in err
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "once/model.safetensors").read_bytes()
    work = Adaptation(lm, lm, Pod(4, 20), torch.tensor(GROUPS))

    def amid(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(work.optimizer, "step", amid)
    with pytest.raises(KeyboardInterrupt):
        work.train(TEXT, Plan(steps=2, tokens=128), tmp_path / "amid")
    assert not (tmp_path / "amid").exists()


def test_adapt_saves_as_it_goes(work: Adaptation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every SAVE_EVERY seconds; a loss that is no number ends it, and what was saved is from before."""
    monkeypatch.setattr(adapt, "SAVE_EVERY", 0.0)
    whole = work.divergence

    def broken(ids: Tensor) -> Tensor:
        return whole(ids) * (torch.nan if work.step == 3 else 1)

    work.divergence = broken  # type: ignore[method-assign]
    with pytest.raises(ZooError, match=r"loss of step 4 is nan; try a smaller --lr"):
        work.train(TEXT, Plan(steps=6, tokens=128), tmp_path / "run")
    again = Adaptation(work.lm, work.teacher, Pod(4, 20), torch.tensor(GROUPS))
    assert again.resume(tmp_path / "run")
    assert again.step == 3
    assert all(bool(p.isfinite().all()) for p in again.trained.values())


@pytest.mark.parametrize(
    ("groups", "count", "more", "says"),
    [
        ([[i, i] for i in range(5)], 900, [], "no layer shares keys"),
        (GROUPS, 40, [], "two passages of 128 are needed"),
        (GROUPS, 900, ["--recent", "60"], ""),
        (GROUPS, 900, ["--recent", "124"], "--tokens 193 at least"),
    ],
)
def test_adapt_refuses_before_it_loads_weights(
    lm: LM, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    groups: list[list[int]], count: int, more: list[str], says: str,
) -> None:  # fmt: skip
    """With near=64, the query at 128 is the first to have something distant: passages of 128 have none."""
    monkeypatch.setattr(zoo, "load", lambda *_, **__: pytest.fail("loaded"))
    save_table("pod", lm.config, {"groups": groups})
    assert cli.run(calibrate.main, adapting(folder, words(tmp_path / "t", count), tmp_path / "out", *more)) == 2
    assert (says or "--tokens 129 at least") in capsys.readouterr().err
