"""Every command and example of the README and of CONTRIBUTING runs, on a tiny checkpoint."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import zoo
from zoo import attention, calibrate, chat, cli, generate, inspection, models
from zoo.attention.cache import Bytes
from zoo.bench import __main__ as bench
from zoo.errors import ZooError
from zoo.eval import __main__ as evaluation

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
COMMANDS = re.findall(r"^ {4}(?:echo .*\| )?(python -m zoo.*?)(?:\s+#.*)?$", README, re.M)


def test_the_commands_were_found() -> None:
    """The pattern above still matches the README."""
    assert len(COMMANDS) >= 9
    assert any("zoo.chat" in c for c in COMMANDS)
    assert any("zoo.bench" in c for c in COMMANDS)
    assert any(c.endswith(" -") for c in COMMANDS)


@pytest.mark.parametrize(
    ("family", "command"),  # transformers beside it takes a quarter of a minute
    [(f, c) for f in ("tiny", "tiny_mistral", "tiny_neox") for c in COMMANDS if f == "tiny" or "--peer" not in c],
)
def test_readme_command(
    command: str,
    family: str,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Runs as written on each family, but for the model and the length of the answer."""
    folder = request.getfixturevalue(family)
    monkeypatch.chdir(ROOT)
    stdin = SimpleNamespace(buffer=io.BytesIO(b"from standard input"), isatty=lambda: False, readline=iter(["hello\n", ""]).__next__)
    monkeypatch.setattr(sys, "stdin", stdin)
    lines = iter(["hello", "/stats", "/exit"])
    monkeypatch.setattr("builtins.input", lambda: next(lines))
    module, argv = shlex.split(command)[2], shlex.split(command)[3:]
    extra = ["--model", str(folder)]
    if module == "zoo.checkpoint":
        extra, argv = [], [argv[0], str(folder)]
    elif module == "zoo.calibrate":
        monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
        extra, argv = [], [argv[0], str(folder), *argv[2:]]
    elif module == "zoo.bench":
        extra += ["--steps", "2", "--repeats", "1", "--compile", "off"]
        argv = [x for x in argv if not x[:1].isdigit() and x != "--contexts"] + ["--contexts", "6"]
    elif module == "zoo.eval":
        argv = [*argv[: argv.index("--out")], "--out", str(tmp_path / "out"), "--lengths", "400", "--samples", "1"]
    elif "--list" not in argv:
        extra += ["--max-new-tokens", "5"]
    mains = {
        "zoo.eval": evaluation,
        "zoo.generate": generate,
        "zoo.chat": chat,
        "zoo.bench": bench,
        "zoo.checkpoint": inspection,
        "zoo.calibrate": calibrate,
    }
    main = mains[module].main
    assert cli.run(main, extra + argv) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert "Traceback" not in err


def test_readme_python(tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python example runs on a tiny model and prints an answer, a chat answer and bytes."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    load = zoo.load
    monkeypatch.setattr(zoo, "load", lambda name, **options: load(str(tiny), **options))
    names: dict[str, object] = {}
    exec(code, names)
    assert names["logits"].shape == (1, names["lm"].config.vocab_size)  # type: ignore[attr-defined]
    assert isinstance(names["cache"].nbytes(), Bytes)  # type: ignore[attr-defined]
    assert "Bytes(used=" in capsys.readouterr().out


def test_readme_tables_are_complete() -> None:
    """Every model and method stands in its table."""
    for name in [*zoo.models(), *zoo.attentions()]:
        assert re.search(rf"^\|.*`{re.escape(name)}[:`]", README, re.M), name


def test_every_flag_is_somewhere_in_help(capsys: pytest.CaptureFixture[str]) -> None:
    """--help works for each command line and exits with 0."""
    for main in (generate.main, chat.main, bench.main, evaluation.main):
        with pytest.raises(SystemExit) as e:
            main(["--help"])
        assert e.value.code == 0
    assert "--attn" in capsys.readouterr().out


def test_hacking_one_line_changes_the_answer(tiny: Path, tmp_path: Path) -> None:
    """The README's change, made in a copy of the package, changes the text; the untouched copy does not."""
    line, other = "F.silu(self.gate_proj(x))", "F.gelu(self.gate_proj(x))"
    answers = []
    for change in (False, True):
        copy = tmp_path / str(change)
        shutil.copytree(ROOT / "zoo", copy / "zoo")
        path = copy / "zoo/models/llama.py"
        assert path.read_text().count(line) == 1
        assert README.count(line) == 1
        if change:
            path.write_text(path.read_text().replace(line, other))
        command = [sys.executable, "-m", "zoo.generate", "--model", str(tiny), "--dtype", "float32", "--max-new-tokens", "12", "Call me"]
        answers.append(subprocess.run(command, cwd=copy, check=True, capture_output=True, text=True).stdout)
    lm = zoo.load(str(tiny), dtype="float32")
    assert answers[0] == str(lm.generate("Call me", 12)) + "\n"
    assert answers[1] != answers[0]


def block(label: str) -> str:
    """The code block of that label in CONTRIBUTING, dedented."""
    (code,) = re.findall(rf"^   ```python {label}\n(.*?)^   ```", CONTRIBUTING, re.S | re.M)
    return "\n".join(line[3:] for line in code.splitlines())


def test_contributing_method(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The method of CONTRIBUTING, written and registered as it says, generates, halves the bytes, and is near `full` but not equal."""
    module = ModuleType("half")
    monkeypatch.setitem(sys.modules, "half", module)
    names = vars(module)
    exec(block("method"), names)
    assert 'ATTENTION["half"] = Half' in CONTRIBUTING
    monkeypatch.setitem(attention.ATTENTION, "half", names["Half"])  # type: ignore[arg-type]
    ids = list(range(3, 203))
    out = {}
    for name in ("full", "half"):
        lm = zoo.load(str(tiny), attn=name, dtype="float32", compile="off")
        cache = lm.new_cache()
        out[name] = (lm.prefill(ids, cache), cache.nbytes().allocated)
        assert lm.generate("Call me", 5)
    assert "half" in generate.listing()
    assert 1e-4 < (out["full"][0] - out["half"][0]).abs().max() < 1.0
    assert out["half"][1] < 0.55 * out["full"][1]
    assert str(zoo.load(str(tiny), attn="half").attn) == "half"


def test_contributing_model(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The family of CONTRIBUTING loads by its model_type, and differs from Llama by its one layer."""
    names: dict[str, object] = {}
    exec(block("model"), names)
    assert 'FAMILIES["gelu_llama"] = GeluLlama' in CONTRIBUTING
    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"model_type": "llama"', '"model_type": "gelu_llama"'))
    with pytest.raises(ZooError, match="gelu_llama"):
        zoo.load(str(folder))
    monkeypatch.setitem(models.FAMILIES, "gelu_llama", names["GeluLlama"])  # type: ignore[arg-type]
    ids = torch.arange(3, 40)
    theirs, ours = zoo.load(str(folder)).logits(ids), zoo.load(str(tiny)).logits(ids)
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().max() > 0.1


def test_a_peer_that_cannot_be_used_is_one_line(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is not there, or is no peer, or imports what is not installed."""
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "lacking.py").write_text("import nowhere_to_be_found")
    short = ["--model", str(tiny), "--contexts", "4", "--steps", "2", "--repeats", "1", "--compile", "off"]
    for name, says in (("none.py", "none.py"), ("empty.py", "PEERS"), ("lacking.py", "nowhere_to_be_found")):
        assert cli.run(bench.main, [*short, "--peer", str(tmp_path / name)]) == 2
        err = capsys.readouterr().err.strip()
        assert says in err
        assert len(err.splitlines()) == 1
