"""zoo.eval show: the page that shows a cache. What it says is held to the caches themselves; the page runs in a real browser."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import CONTRAST, open_page
from conftest import CORPUS

import zoo
from zoo import cli
from zoo.attention.slots import Slots, slot_attention
from zoo.eval import show

TOKENS, QUERIES = 400, 3


def picture(folder: Path, attn: str, tokens: int = TOKENS) -> tuple[show.Picture, Any]:
    lm = zoo.load(str(folder), attn=attn)
    ids = lm.tokenizer.encode(CORPUS * 3)[:tokens]
    assert len(ids) == tokens
    return show.look(lm, ids, QUERIES), lm


def close(got: torch.Tensor, want: torch.Tensor, most: float, share: float, least: float) -> None:
    """Probabilities: no error above `most`, and none above that share of a small one (`least` aside); some of them are large."""
    error = (got - want).abs()
    assert got.shape == want.shape
    assert error.max() <= most
    assert (error <= share * want + least).all()
    assert want.max() > 0.5


def prompt_cache(lm: Any, tokens: int = TOKENS) -> Any:
    """The cache as it is at the prompt's end."""
    cache = lm.new_cache(max_tokens=tokens - QUERIES)
    lm.prefill(lm.tokenizer.encode(CORPUS * 3)[: tokens - QUERIES], cache)
    return cache


@pytest.mark.parametrize(
    ("attn", "tokens"),
    [
        ("subgen:budget=160", TOKENS),
        ("subgen:budget=25%,when=prompt", TOKENS),
        ("subgen:budget=160,when=stream", TOKENS),
        ("subgen:heads=uniform,budget=160", TOKENS),
        ("subgen:delta=6", 700),  # exact up to 512
        ("subgen:delta=6,when=stream", 700),
    ],
)
def test_recorded_members_are_those_of_the_clusters(tiny: Path, attn: str, tokens: int) -> None:
    """A cluster knows how many tokens it holds and their mean position: those recorded give both, in every layer and head."""
    shown, lm = picture(tiny, attn, tokens)
    merged = 0
    for layer, cache in enumerate(prompt_cache(lm, tokens)):
        slots = cache.slots()
        for g in range(slots.pos.shape[1]):
            for j in (slots.pos[0, g] >= 0).nonzero()[:, 0].tolist():
                inside = (shown.home[layer, g] == int(slots.pos[0, g, j])).nonzero()[:, 0]
                assert len(inside) == round(float(slots.a[0, g, j].exp()))
                assert float(inside.float().mean()) == pytest.approx(float(slots.middle[0, g, j]), abs=0.01)
                merged += len(inside) > 1
    assert merged > 20
    assert not bool((shown.home == show.GONE).any())  # subgen drops nothing


@pytest.mark.parametrize("attn", ["h2o:budget=128", "sinks:budget=128", "sliding:window=100", "snapkv:budget=25%,when=prompt"])
def test_kept_and_dropped_tokens(tiny: Path, attn: str) -> None:
    shown, lm = picture(tiny, attn)
    own = torch.arange(TOKENS - QUERIES)
    for layer, cache in enumerate(prompt_cache(lm)):
        pos = cache.slots().pos[0]
        for g in range(pos.shape[0]):
            kept = torch.isin(own, pos[g])
            assert 60 < int(kept.sum()) < TOKENS - QUERIES
            assert torch.equal(shown.home[layer, g], torch.where(kept, own, show.GONE))
            assert torch.equal(shown.weight[layer, g] > 0, kept)


def test_weights_of_a_sample(tiny: Path) -> None:
    """`uniform`: what is kept of the sample stands for the whole."""
    shown, _ = picture(tiny, "uniform:budget=128")
    assert float(shown.weight.max()) > 2
    torch.testing.assert_close(shown.weight.sum(-1), torch.full((3, 2), float(TOKENS - QUERIES)), rtol=0, atol=2e-4)


def test_full_gives_exact_attention(tiny: Path) -> None:
    shown, _ = picture(tiny, "full")
    close(shown.given, shown.exact, most=2e-7, share=1e-4, least=1e-8)
    assert float(shown.error.max()) < 1e-5
    assert shown.used == shown.full
    assert torch.equal(shown.home, torch.arange(TOKENS - QUERIES).expand_as(shown.home))


def test_exact_attention_is_that_of_the_model(tiny: Path) -> None:
    """By hand: queries and keys of one pass without any cache, softmax over all positions up to the query's own."""
    shown, lm = picture(tiny, "subgen:budget=160")
    ids = lm.tokenizer.encode(CORPUS * 3)[:TOKENS]
    seen = []

    class Watched:
        def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
            seen.append((q, k))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    lm.model.hidden(torch.tensor([ids]), None, [Watched()] * 3)
    assert len(seen) == 3
    for layer, (q, k) in enumerate(seen):
        score = q[0, :, -QUERIES:] @ k[0].repeat_interleave(2, 0).mT / q.shape[-1] ** 0.5
        late = torch.arange(TOKENS) > torch.arange(TOKENS - QUERIES, TOKENS)[:, None]
        close(shown.exact[layer], score.masked_fill(late, -torch.inf).softmax(-1), most=1e-5, share=2e-3, least=2e-6)
    torch.testing.assert_close(shown.given.sum(-1), torch.ones(3, 4, QUERIES))
    assert float(shown.error.min()) > 1e-4


def test_attention_weighs_slots() -> None:
    """Two slots of one position count together, a log-weight counts as so many slots, an empty slot not at all."""
    g = torch.Generator().manual_seed(0)
    k, v, q = (torch.randn(1, 1, n, 16, generator=g) for n in (3, 3, 1))
    pos, a = torch.tensor([[[0, 2, 2]]]), torch.tensor([[[0.0, 0.0, 3.0]]]).log1p()
    twice = Slots(k[:, :, [0, 1, 2, 2, 2, 2, 0]], v[:, :, [0, 1, 2, 2, 2, 2, 0]], torch.tensor([[[0, 2, 2, 2, 2, 2, -1]]]))
    found = show.attention(q, torch.tensor([[5]]), Slots(k, v, pos, a, a), 4)
    torch.testing.assert_close(found, show.attention(q, torch.tensor([[5]]), twice, 4))
    _, mass = slot_attention(q, torch.tensor([[5]]), Slots(k, v, pos, a, a), mass=True)
    torch.testing.assert_close(found[0, 0], torch.tensor([mass[0, 0, 0], 0, mass[0, 0, 1] + mass[0, 0, 2], 0]))


# The page


def data_of(text: str) -> dict[str, Any]:
    return json.loads(text.partition('id="data">')[2].partition("</script>")[0])


def array(data: dict[str, Any], name: str, kind: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(data[name])), dtype=kind)


def test_page_holds_the_picture(tiny: Path) -> None:
    shown, _ = picture(tiny, "subgen:budget=160")
    text = show.page(shown, {"attn": "subgen", "model": "tiny", "source": "a.txt"})
    data = data_of(text)
    assert "".join(data["pieces"]) == "".join(shown.pieces)
    assert np.array_equal(array(data, "home", "<u2").reshape(shown.home.shape), shown.home.numpy())
    for name, t in (("exact", shown.exact), ("given", shown.given)):
        code = array(data, name, "u1").reshape(t.shape).astype(float)
        value = np.where(code > 0, 2 ** ((code - 255) / data["octave"]), 0)
        assert np.abs(value - t.numpy()).max() < 0.03
        assert np.all(np.abs(value - t.numpy()) <= 0.03 * t.numpy() + 5e-7)
    assert np.abs(array(data, "error", "<u2").reshape(shown.error.shape) / 1e4 - shown.error.numpy()).max() <= 5.1e-5
    weight = array(data, "weight", "<u2").reshape(shown.weight.shape) / data["unit"]
    assert np.abs(weight - shown.weight.numpy()).max() <= 0.51 / data["unit"]
    assert text == show.page(shown, {"attn": "subgen", "model": "tiny", "source": "a.txt"})
    assert len(text) < 150_000


def test_text_cannot_leave_its_script(tiny: Path) -> None:
    shown, _ = picture(tiny, "full", 20)
    shown.pieces[3] = "</script><script>alert(1)</script><!--"
    text = show.page(shown, {"attn": "full", "model": "tiny", "source": "<b>"})
    assert data_of(text)["pieces"][3] == shown.pieces[3]
    assert text.count("<script") == 2


def run(*argv: str) -> int:
    return cli.run(show.main, list(argv))


def test_command(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(CORPUS * 3)
    out = tmp_path / "page.html"
    common = ["--model", str(tiny), "--file", str(tmp_path / "text.txt"), "--out", str(out), "--threads", "1", "--device", "cpu"]
    assert run(*common, "--attn", "h2o:budget=128", "--tokens", "300", "--queries", "2", "--dtype", "float32", "--backend", "eager") == 0
    data = data_of(out.read_text())
    assert (data["T"], data["N"], data["attn"], data["model"], data["source"]) == (298, 2, "h2o:budget=128", tiny.name, "text.txt")
    assert capsys.readouterr().out.startswith(f"{out}: ")
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--tokens", "3"], "too short for 4 queries"),
        (["--queries", "0"], "too short for 0 queries"),
        (["--tokens", "9000"], "too many"),
        (["--attn", "nothing"], "unknown attention method"),
        (["--file", "/nowhere.txt"], "cannot read /nowhere.txt"),
        (["--out", "/nowhere/page.html"], "cannot write /nowhere/page.html"),
        (["--threads", "0"], "--threads 0"),
    ],
)
def test_bad_input_is_one_line(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str) -> None:
    (tmp_path / "text.txt").write_text(CORPUS * 30)
    out = ["--out", str(tmp_path / "page.html")]
    assert run("--model", str(tiny), "--file", str(tmp_path / "text.txt"), "--tokens", "60", *out, *more) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


# In a browser


@pytest.fixture(scope="module")
def page_file(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, show.Picture]:
    shown, lm = picture(tiny, "subgen:budget=224,when=stream")
    path = tmp_path_factory.mktemp("show") / "page.html"
    path.write_text(show.page(shown, {"attn": str(lm.attn), "model": "tiny", "source": "a.txt"}))
    return path, shown


@pytest.fixture(params=["light", "dark"])
def opened(request: pytest.FixtureRequest, chromium: Any, page_file: tuple[Path, show.Picture]) -> Iterator[Any]:
    with open_page(chromium, page_file[0], request.param) as page:
        page.wait_for_selector("html[data-ready]")
        yield page


def focused(page: Any) -> str:
    return page.evaluate("document.activeElement.getAttribute('aria-label') ?? document.activeElement.id")


def test_what_the_page_says(opened: Any, page_file: tuple[Path, show.Picture]) -> None:
    shown = page_file[1]
    layer, T = shown.home.shape[0] // 2, TOKENS - QUERIES
    sizes = torch.bincount(shown.home[layer, 0], minlength=T)
    kept = int((sizes == 1).sum())
    merged, clusters = int(sizes[sizes > 1].sum()), int((sizes > 1).sum())
    assert opened.inner_text("#legend").split("\n") == [
        f"kept: {kept}",
        f"merged: {merged}, into {clusters} clusters",
        f"queries: {QUERIES}",
    ]
    assert opened.locator("#slots button").count() == clusters
    assert f"{shown.used:,} bytes" in opened.inner_text("#about")
    error = 100 * float(shown.error[layer, 0, QUERIES - 1])
    digits = 0 if error >= 9.95 else 1
    assert f"is {error:.{digits}f} % off" in opened.inner_text("#outcome").replace("\xa0", " ")
    for t in (0, T - 1, T // 2):
        home = int(shown.home[layer, 0, t])
        others = int(sizes[home]) - 1
        label = opened.locator("#text [role=option]").nth(t).get_attribute("aria-label")
        assert ("is kept" if others == 0 else f"is merged with {others} other") in label


def test_keyboard(opened: Any, page_file: tuple[Path, show.Picture]) -> None:
    """No mouse: from control to control with Tab, in the text and the map with arrows."""
    shown = page_file[1]
    press = opened.keyboard.press
    order = []
    for _ in range(8):
        press("Tab")
        order.append(focused(opened))
        outline = opened.evaluate(
            "getComputedStyle(document.activeElement).outlineStyle + getComputedStyle(document.activeElement).outlineWidth"
        )
        assert outline == "solid3px"
    assert order[:6] == ["layer", "head", "r", "query", "colour", "shade"]
    assert order[6].startswith("Token 0 ")
    assert order[7].startswith("Layer 1, head 0: ")
    press("ArrowRight")  # in the map
    press("ArrowDown")
    assert focused(opened).startswith("Layer 2, head 1: ")
    assert (opened.input_value("#layer"), opened.input_value("#head")) == ("2", "1")
    press("Home")
    press("ArrowUp")
    assert (opened.input_value("#layer"), opened.input_value("#head")) == ("0", "0")
    press("Shift+Tab")  # back to the text
    big = int(torch.bincount(shown.home[0, 0]).argmax())
    tokens = (shown.home[0, 0] == big).nonzero()[:, 0].tolist()
    assert len(tokens) > 2
    for _ in range(tokens[0]):
        press("ArrowRight")
    press("Enter")
    assert opened.locator("#text [aria-selected=true]").count() == len(tokens)
    assert opened.locator("#links path").count() == len(tokens) - 1
    assert opened.locator("#members button").count() == len(tokens)
    assert f"is merged with {len(tokens) - 1} other" in opened.inner_text("#slot")
    for there in (tokens[1], tokens[2], tokens[1]):
        press("p" if there == tokens[1] and focused(opened).startswith(f"Token {tokens[2]} ") else "n")
        assert focused(opened).startswith(f"Token {there} ")
    press("ArrowDown")
    below = focused(opened)
    assert not below.startswith(f"Token {tokens[1]} ")
    press("ArrowUp")
    press("End")
    assert focused(opened).startswith(f"Token {TOKENS - 1} ")
    press("ArrowLeft")
    press("Enter")  # a query token asks
    assert opened.input_value("#query") == str(QUERIES - 2)
    press("Escape")
    assert opened.locator("#text [aria-selected=true]").count() == 0


def test_choices(opened: Any, page_file: tuple[Path, show.Picture]) -> None:
    """Every control changes what is shown."""
    before = opened.inner_text("#outcome")
    opened.select_option("#query", "0")
    asked = opened.inner_text("#outcome")
    assert asked.startswith(f"Token {TOKENS - QUERIES} ")
    assert asked != before
    opened.select_option("#r", "1")
    other = opened.inner_text("#outcome")
    assert other != asked
    opened.select_option("#head", "1")
    assert opened.inner_text("#outcome") != other
    state = opened.evaluate("getComputedStyle(document.querySelector('#text .merged')).backgroundColor")
    looks = {state}
    for colour in ("clusters", "exact", "given", "difference"):
        opened.select_option("#colour", colour)
        looks.add(opened.evaluate("[...document.querySelectorAll('#text span')].map(e => getComputedStyle(e).backgroundColor).join()"))
    assert len(looks) == 5
    note = opened.inner_text("#map-note")
    opened.select_option("#shade", "slots")
    assert opened.inner_text("#map-note") != note
    opened.locator("#attention button").first.click()
    assert opened.inner_text("#slot").startswith("Token ")


def test_readable_in_both_themes(opened: Any) -> None:
    """In every colouring."""
    opened.locator("#text .merged").first.click()
    for colour in ("state", "clusters", "exact", "given", "difference"):
        opened.select_option("#colour", colour)
        assert opened.evaluate(CONTRAST) == [], colour
