"""`pod`: which keys a query reads, what is stored, how groups are found, and the training for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_checkpoint
from torch import Tensor

import zoo
from zoo import adapt, calibrate, cli, layer_groups
from zoo.adapt import Adaptation, Plan
from zoo.attention import parse
from zoo.attention.pod import Pod, PodCache, group
from zoo.attention.tables import save_table, table_path
from zoo.errors import ZooError
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


def test_what_was_an_own_key_is_overwritten(lm: LM, ids: Tensor) -> None:
    """No buffer of a layer that is not lowest holds the key that a distant token had there."""
    lm.attn = parse("full")
    full = lm.new_cache()
    _, cache = read(lm, "pod:first=5,recent=40", ids[:1])
    with torch.no_grad():
        lm.model(ids[:1], full)
    layer = cache[1]
    assert isinstance(layer, PodCache)
    assert layer.lowest == [1]
    wanted = layer.store.pos[0, 0].tolist()
    assert sorted(p for p in wanted if p >= 0) == [*range(5), *range(344, 400)]
    assert not [name for name, t in layer.named_buffers() if t.shape[-1] == 16 and name not in ("store.k", "store.v", "v", "distant.k")]


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


def test_bad_tables(lm: LM) -> None:
    """One line says how to make one, or what is wrong with it."""
    chained = [[0, 0], [0, 0], [1, 2], [3, 3], [4, 4]]  # layer 2 reads a layer that is not lowest
    above = [[1, 0], [1, 1], [2, 2], [3, 3], [4, 4]]
    for groups in (GROUPS[:4], [[0]] * 5, chained, above, [[-1, 0], *GROUPS[1:]], [[0.0, 0.0], *GROUPS[1:]], "x", 3, [[0], [0, 1]]):
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
    ids = lm.tokenizer.encode(text.read_text())
    true, other = (
        lm.logits(ids[-300:])[0].log_softmax(-1),
        read(lm, "pod:first=4,recent=40", torch.tensor([ids[-300:]]))[0][0].log_softmax(-1),
    )
    kl = (true.exp() * (true - other)).sum(-1)[44:].mean()
    assert layer_groups.cost(lm, Pod(4, 40), [ids[-300:]])["kl"] == pytest.approx(float(kl), rel=1e-3)
    assert cli.run(calibrate.main, [*command, "--threshold", "1"]) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert alone["groups"] == [[i, i] for i in range(5)]
    assert abs(alone["kl"]) < 1e-5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["pod", "--tokens", "5"], "at least 128"),
        (["pod", "--threshold", "2"], "between 0 and 1"),
        (["kvsharer", "--tokens", "5"], "at least 16"),
        (["kvsharer", "--layers", "-1"], "at least 0"),
        (["kvsharer", "--adapt", "x"], "is for pod"),
        (["pod", "--recent", "0"], "between 1"),
        (["pod", "--adapt", "x"], "no table of layer groups"),
        (["pod", "--adapt", "."], "is there already"),
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


def test_adapt_writes_a_checkpoint(
    lm: LM, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command's folder loads as any other, with the same config, so that it finds the same groups; only attention's weights differ."""
    monkeypatch.setattr(adapt, "HELD_OUT", 2)
    command = ["pod", str(folder), "--text", str(words(tmp_path / "t", 900)), "--tokens", "128", "--first", "4", "--recent", "20"]
    command += ["--dtype", "float32", "--adapt", str(tmp_path / "out"), "--minutes", "0.05", "--json"]
    assert cli.run(calibrate.main, command) == 0
    out, err = capsys.readouterr()
    said = json.loads(out.splitlines()[-1])
    assert said["after"] < said["before"]
    assert f"KL {said['before']:.3f} before, {said['after']:.3f} after {said['steps']} steps" in err
    assert json.loads((tmp_path / "out/pod.json").read_text())["groups"] == GROUPS
    assert not (tmp_path / "out.training").exists()
    adapted = zoo.load(str(tmp_path / "out"), attn="pod", compile="off")
    assert adapted.config == lm.config
    assert adapted.generate("Call me", 5)
    for (name, mine), theirs in zip(adapted.model.named_parameters(), lm.model.parameters(), strict=True):
        assert torch.equal(mine, theirs) != ("self_attn" in name), name
