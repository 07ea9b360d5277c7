"""Where checkpoints are found: the known names, folders, the cache, and the hub, played by a small server on this machine."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import llama_shapes
from test_checkpoint import INDEX, load, python, write

from zoo import embedded, hub
from zoo.errors import ZooError

# The known names


def llama(C: int, I: int, L: int, H: int, G: int, V: int, D: int | None = None, tied: bool = False) -> int:
    """Bytes of the weights in 16 bits, from the sizes in config.json."""
    config = {"hidden_size": C, "intermediate_size": I, "num_hidden_layers": L, "num_attention_heads": H, "num_key_value_heads": G}
    shapes = llama_shapes({**config, "vocab_size": V, "head_dim": D, "tie_word_embeddings": tied})
    return 2 * sum(math.prod(shape) for shape in shapes.values())


def neox(C: int, L: int, V: int) -> int:
    """The same for GPT-NeoX. Its files hold each layer's causal mask over 2048 positions, too, a byte an entry."""
    layer = (3 * C * C + 3 * C) + (C * C + C) + (4 * C * C + 4 * C) + (4 * C * C + C) + 4 * C  # qkv, out, up, down, two norms
    return 2 * (2 * V * C + L * layer + 2 * C) + L * 2048**2


SIZES = {
    "smollm2-135m": llama(576, 1536, 30, 9, 3, 49152, tied=True),
    "smollm2-360m": llama(960, 2560, 32, 15, 5, 49152, tied=True),
    "smollm2-1.7b": llama(2048, 8192, 24, 32, 32, 49152, tied=True),
    "tinyllama-1.1b": llama(2048, 5632, 22, 32, 4, 32000),
    "llama-2-7b": llama(4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b": llama(5120, 13824, 40, 40, 40, 32000),
    "llama-3-8b": llama(4096, 14336, 32, 32, 8, 128256),
    "llama-3.1-8b": llama(4096, 14336, 32, 32, 8, 128256),
    "llama-3.2-1b": llama(2048, 8192, 16, 32, 8, 128256, tied=True),
    "llama-3.2-3b": llama(3072, 8192, 28, 24, 8, 128256, D=128, tied=True),
    "llama-3.3-70b": llama(8192, 28672, 80, 64, 8, 128256),
    "mistral-7b": llama(4096, 14336, 32, 32, 8, 32768),
    "mistral-7b-v0.1": llama(4096, 14336, 32, 32, 8, 32000),
    "mistral-7b-v0.2": llama(4096, 14336, 32, 32, 8, 32000),
    "mistral-nemo": llama(5120, 14336, 40, 32, 8, 131072, D=128),
    "pythia-70m": neox(512, 6, 50304),
    "pythia-160m": neox(768, 12, 50304),
    "pythia-410m": neox(1024, 24, 50304),
    "pythia-1b": neox(2048, 16, 50304),
    "pythia-1.4b": neox(2048, 24, 50304),
    "pythia-2.8b": neox(2560, 32, 50304),
    "pythia-6.9b": neox(4096, 32, 50432),
    "pythia-12b": neox(5120, 36, 50688),
    "gpt-neox-20b": neox(6144, 44, 50432),
}


@pytest.mark.parametrize("name", hub.KNOWN)
def test_a_known_name(name: str) -> None:
    known = hub.KNOWN[name]
    assert f"{SIZES[re.sub('-(chat|instruct)', '', name)] / 1e9:.3g}" == f"{known.gigabytes:.3g}"
    assert hub.HUB_ID.fullmatch(known.hub_id)
    assert re.fullmatch("[0-9a-f]{40}", known.revision)
    assert known.family == ("llama" if "llama" in name or "smol" in name else "mistral" if "mistral" in name else "gpt_neox")
    assert known.gated == known.licence.startswith("llama")
    tuned = re.search("chat|instruct", known.hub_id.lower()) is not None
    assert tuned == bool(re.search("chat|instruct|smollm2|tinyllama", name))
    version = re.search(r"v0\.\d", name)
    assert version is None or version[0] in known.hub_id


def test_no_two_names_are_one_checkpoint() -> None:
    assert len({k.hub_id for k in hub.KNOWN.values()}) == len({k.revision for k in hub.KNOWN.values()}) == len(hub.KNOWN) == 33


# Folders and the cache

FIND = """
import json, sys
from zoo import embedded, hub
from zoo.errors import ZooError
embedded.package = lambda: None
for name, revision in json.loads(sys.argv[1]):
    try:
        print(json.dumps([True, str(hub.find(name, revision))]))
    except ZooError as e:
        print(json.dumps([False, str(e)]))
"""


def finds(env: dict[str, str], *names: str | tuple[str, str]) -> list[tuple[bool, str]]:
    pairs = [(n, None) if isinstance(n, str) else n for n in names]
    lines = [json.loads(line) for line in python(FIND, json.dumps(pairs), env=env).splitlines()]
    assert len(lines) == len(pairs), "something else was written to standard output"
    assert all(line.isprintable() for _, line in lines), "more than one line"
    return [(found, line) for found, line in lines]


def in_cache(home: Path, hub_id: str, sha: str = "a" * 40, ref: str = "main", shards: int = 0) -> Path:
    """A snapshot as the hub's client lays it out."""
    repo = home / "hub" / f"models--{hub_id.replace('/', '--')}"
    folder = write(repo / "snapshots" / sha, shards=shards)
    (folder / "tokenizer.json").write_text("{}")
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / ref).write_text(sha)
    return folder


@pytest.fixture
def lonely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing to be found anywhere, no network, and an empty working directory, which is returned."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(hub, "ROOT", tmp_path / "root")
    monkeypatch.setattr(embedded, "package", lambda: None)
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_the_order_of_places(lonely: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, top = embedded.NAME, lonely.parent
    assert hub.available(name) is None
    wheel, made = top / "x.gguf", top / "cache" / name
    monkeypatch.setattr(embedded, "package", lambda: wheel)
    monkeypatch.setattr(embedded, "folder", lambda: made)
    assert (hub.find(name), hub.available(name)) == (made, "embedded (package)")
    write(made)
    for file in embedded.FILES:
        (made / file).touch()
    assert (hub.find(name), hub.available(name)) == (made, "embedded (converted)")
    cached = in_cache(top / "hf", hub.KNOWN[name].hub_id)
    assert (hub.find(name), hub.available(name)) == (cached, "hub cache")
    here = write(lonely / "weights" / name)
    assert hub.find(name).samefile(here)
    assert hub.available(name) == f"weights/{name}"
    root = write(top / "root" / "weights" / name)
    assert hub.find(name).samefile(root)
    named = write(lonely / name)
    assert hub.find(name).samefile(named)
    assert hub.find(f"./weights/{name}").samefile(here)
    assert hub.find(str(cached)) == cached
    with pytest.raises(ZooError, match="revision"):
        hub.find(name, revision="main")
    (lonely / name / "config.json").rename(lonely / "config.json")
    with pytest.raises(ZooError, match=r"no config\.json"):
        hub.find(name)
    (lonely / name).rename(lonely / "away")
    assert hub.find(name, revision="main") == cached, "a revision is the hub's"


def test_a_home_folder_is_expanded(lonely: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(lonely))
    mine = write(lonely / "mine")
    assert hub.find("~/mine").samefile(mine)


def test_hub_ids_are_found_in_the_cache(lonely: Path) -> None:
    home = lonely.parent / "hf"
    folder = in_cache(home, "Some-Body/My_model.v1-2")
    assert hub.find("Some-Body/My_model.v1-2") == folder
    other = in_cache(home, "Some-Body/My_model.v1-2", sha="b" * 40, ref="v2", shards=2)
    assert hub.find("Some-Body/My_model.v1-2", revision="v2") == other
    assert hub.find("Some-Body/My_model.v1-2") == folder


@pytest.mark.parametrize("lost", ["config.json", "model-00002-of-00002.safetensors", "tokenizer.json", INDEX])
def test_an_interrupted_download_does_not_count(lonely: Path, lost: str) -> None:
    folder = in_cache(lonely.parent / "hf", "a/b", shards=2)
    assert hub.find("a/b") == folder
    (folder / lost).unlink()
    assert hub._cached("a/b", None) is None
    name = next(iter(hub.KNOWN))
    assert hub.available(name) is None


@pytest.mark.parametrize(
    "name", ["", "nonsense", "a/b/c", "a//b", "../x", "/nowhere/x", "~nobody/x", ".", "bad\nname", "nul\0", "x" * 5000, "a/" + "é" * 9]
)
def test_names_that_lead_nowhere(lonely: Path, name: str) -> None:
    with pytest.raises(ZooError) as e:
        hub.find(name)
    assert str(e.value).isprintable()
    if name in ("", "nonsense"):
        assert embedded.NAME in str(e.value)
        assert "--list" in str(e.value)
    assert hub.available(name) is None


def test_a_folder_without_a_checkpoint(lonely: Path) -> None:
    (lonely / "results").mkdir()
    (lonely / "file").touch()
    for name, word in (("results", "no config.json"), ("./results", "no config.json"), ("./file", "no folder"), ("./none", "no folder")):
        with pytest.raises(ZooError, match=word):
            hub.find(name)
    (lonely / "weights" / "tinyllama-1.1b").mkdir(parents=True)
    with pytest.raises(ZooError, match=r"weights/tinyllama-1\.1b.*no config\.json"):
        hub.find("tinyllama-1.1b")
    with pytest.raises(ZooError, match="revision"):
        hub.find(str(write(lonely / "good")), revision="main")


def test_offline_says_so(tmp_path: Path) -> None:
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "ZOO_CACHE": str(tmp_path / "zoo")}
    half = in_cache(tmp_path, "a/half", shards=2)
    (half / "model-00001-of-00002.safetensors").unlink()
    whole = in_cache(tmp_path, hub.KNOWN["tinyllama-1.1b"].hub_id)
    llama, smol, part, tiny = finds(env, "llama-3.2-1b", embedded.NAME, "a/half", "tinyllama-1.1b")
    assert not llama[0]
    assert "HF_HUB_OFFLINE" in llama[1]
    assert "weights/llama-3.2-1b/" in llama[1]
    assert not smol[0]
    assert embedded.INSTALL in smol[1]
    assert not part[0]
    assert "model-00001-of-00002.safetensors" in part[1] or "HF_HUB_OFFLINE" in part[1]
    assert tiny == (True, str(whole))


# The hub


@dataclass
class Server:
    """As much of the hub as its client asks for, what it keeps of the requests, and what is to go wrong."""

    repos: dict[str, Path] = field(default_factory=dict)
    seen: list[SimpleNamespace] = field(default_factory=list)  # .command .path .file .range .token .cdn
    sha: str = "c" * 40
    gated: set[str] = field(default_factory=set)
    renamed: dict[str, str] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)  # file -> bytes after which the connection breaks, once
    stall: dict[str, int] = field(default_factory=dict)  # file -> bytes after which nothing more comes, once
    damaged: set[str] = field(default_factory=set)  # one bit of these is wrong, the length is right
    short: set[str] = field(default_factory=set)  # these end early and say that this is their length
    ignore_ranges: bool = False
    status: int = 0  # of every answer
    gate: threading.Event | None = None  # weights wait for it
    env: dict[str, str] = field(default_factory=dict)

    def got(self) -> list[str]:
        """The files whose bytes were asked for, in alphabetical order."""
        return sorted(r.file for r in self.seen if r.command == "GET" and r.file and not (large(r.file) and not r.cdn))


def large(file: str) -> bool:
    """Whether the hub keeps it outside git: such files come from another host, and their ETag is the SHA-256."""
    return file.endswith((".safetensors", "tokenizer.json"))


def handler(server: Server, cdn: str | None) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", file: str = "", **headers: str) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command == "HEAD":
                return
            for fault in (server.cut, server.stall):
                if file in fault:
                    self.wfile.write(body[: fault.pop(file)])
                    self.wfile.flush()
                    if fault is server.stall:
                        self.rfile.read(1)  # until the other side hangs up
                    self.connection.close()
                    return
            self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].strip("/").split("/")
            api = path[0] == "api"
            repo, rest = ("/".join(path[2:4]), path[4:]) if api else ("/".join(path[:2]), path[2:])
            file = "" if api else "/".join(rest[2:])
            ask = self.headers.get("Range"), self.headers.get("Authorization")
            server.seen.append(
                SimpleNamespace(command=self.command, path=self.path, file=file, range=ask[0], token=ask[1], cdn=cdn is None)
            )
            if server.status:
                return self.answer(server.status)
            if new := server.renamed.get(repo):
                return self.answer(307, Location=self.path.replace(repo, new))
            if repo not in server.repos:
                return self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            if ask[1] == "Bearer expired":
                return self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
            folder = server.repos[repo]
            if rest[1:] and rest[1] not in ("main", server.sha):
                return self.answer(404, X_Error_Code="RevisionNotFound")
            if api:
                return self.answer(200, json.dumps(self.listing(repo, rest[:1] == ["tree"])).encode(), Content_Type="application/json")
            if cdn and repo in server.gated and ask[1] != "Bearer admitted":
                return self.answer(403 if ask[1] else 401, X_Error_Code="GatedRepo", X_Error_Message="Access to this model is restricted")
            if not (folder / file).is_file():
                return self.answer(404, X_Error_Code="EntryNotFound")
            return self.send_file(folder, file)

        do_HEAD = do_GET

        def listing(self, repo: str, tree: bool) -> Any:
            if not tree:
                return {"id": repo, "sha": server.sha, "siblings": []}
            folder, found = server.repos[repo], []
            for f in sorted(f for f in folder.rglob("*") if f.is_file()):
                entry = {"type": "file", "path": str(f.relative_to(folder)), "size": f.stat().st_size, "oid": git(f.read_bytes())}
                if large(f.name):
                    entry["lfs"] = {"oid": sha256(f), "size": f.stat().st_size, "pointerSize": 134}
                found.append(entry)
            return found

        def send_file(self, folder: Path, file: str) -> None:
            body = (folder / file).read_bytes()
            if large(file) and cdn:
                linked = {"X-Linked-Etag": f'"{sha256(folder / file)}"', "X-Linked-Size": str(len(body))}
                return self.answer(302, Location=cdn + self.path, X_Repo_Commit=server.sha, **linked)
            if server.gate and file.endswith(".safetensors"):
                assert server.gate.wait(200)
            if file in server.damaged:
                body = body[:-1] + bytes([body[-1] ^ 1])
            if file in server.short:
                body = body[:-7]
            if large(file) and (span := self.headers.get("Range")) and not server.ignore_ranges:
                start = int(re.fullmatch(r"bytes=(\d+)-", span)[1])  # type: ignore[index]
                if start >= len(body):
                    return self.answer(416)
                return self.answer(206, body[start:], file, Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")
            return self.answer(200, body, file, ETag=f'"{git(body)}"', X_Repo_Commit=server.sha)

    return Handler


def git(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A hub on this machine: for this process, and by `env` for others. Its large files come from a second port."""
    from huggingface_hub import constants

    server = Server()
    cdn = ThreadingHTTPServer(("127.0.0.1", 0), handler(server, None))
    front = ThreadingHTTPServer(("127.0.0.1", 0), handler(server, f"http://127.0.0.1:{cdn.server_port}"))
    for one in (cdn, front):
        one.daemon_threads = True
        threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    url = f"http://127.0.0.1:{front.server_port}"
    server.env = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "ZOO_CACHE": str(tmp_path / "zoo")}
    # The client's 10 s would be over, on a busy machine, before a test has done what its server waits for.
    server.env |= {"HF_HUB_DOWNLOAD_TIMEOUT": "200", "HF_HUB_ETAG_TIMEOUT": "200"}
    server.env["PYTHONPATH"] = str(Path(hub.__file__).parents[1])
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    # A chunk is 10 MB, more than a test's file: a broken connection would leave none of it.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(hub, "ROOT", tmp_path / "root")
    monkeypatch.setattr(embedded, "package", lambda: None)
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "zoo"))
    yield server
    for one in (cdn, front):
        one.shutdown()
        one.server_close()


def publish(server: Server, repo: str, shards: int = 0) -> Path:
    """A checkpoint on the hub, with a tokenizer."""
    folder = server.repos[repo] = write(server_folder(server) / repo, shards=shards)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def server_folder(server: Server) -> Path:
    return Path(server.env["HF_HOME"]).parent / "there"


def same(got: Path, there: Path) -> bool:
    """Whether every file of `got` is the hub's, and the checkpoint can be read."""
    load(got)
    return all(f.read_bytes() == (there / f.name).read_bytes() for f in got.iterdir())


def fails(name: str, *words: str, revision: str | None = None) -> str:
    with pytest.raises(ZooError) as e:
        hub.find(name, revision)
    line = str(e.value)
    assert line.isprintable(), f"not one plain line: {line!r}"
    assert not [w for w in words if w not in line], line
    return line


SECOND = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("shards", [0, 2])
def test_only_the_needed_files_are_fetched(server: Server, shards: int) -> None:
    there = publish(server, "some/one", shards)
    noise = ["README.md", "pytorch_model.bin", "consolidated.safetensors", "consolidated.00.pth", "original/consolidated.00.pth", "m.gguf"]
    noise += ["original/tokenizer.model", "original/config.json", "onnx/model.onnx", "model-extra.safetensors", "tokenizer.model.v3"]
    noise += ["vocab.json", "merges.txt", "added_tokens.json", "onnx/config.json", "weights.onnx", "w.pt", "tf_model.h5"]
    noise += ["x/model.safetensors", *["model.safetensors"] * bool(shards)]
    for file in noise:
        (there / file).parent.mkdir(exist_ok=True)
        (there / file).write_text(file)
    wanted = {"config.json", "tokenizer.json", *([INDEX, SECOND, SECOND.replace("2-", "1-", 1)] if shards else ["model.safetensors"])}
    for file in ("generation_config.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json", "tekken.json"):
        (there / file).write_text(json.dumps(file))  # equal files would be one blob, fetched once
        wanted.add(file)
    folder = hub.find("some/one")
    assert server.got() == sorted(wanted)
    assert sorted(f.name for f in folder.iterdir()) == sorted(wanted)
    assert same(folder, there)
    server.seen.clear()
    assert hub.find("some/one") == folder
    assert not server.seen, "the cache is looked at before the hub"


def test_one_lost_shard_is_all_that_is_fetched_again(server: Server) -> None:
    there = publish(server, "some/one", shards=2)
    folder = hub.find("some/one")
    (folder / SECOND).resolve().unlink()
    server.seen.clear()
    assert hub.find("some/one") == folder
    assert server.got() == [SECOND]
    assert same(folder, there)


def test_a_known_name_means_its_commit(server: Server) -> None:
    known = hub.KNOWN["llama-3.2-1b"]
    there = publish(server, known.hub_id)
    server.sha = known.revision
    folder = hub.find("llama-3.2-1b")
    assert folder.name == known.revision
    assert same(folder, there)
    assert not [r.path for r in server.seen if "/main" in r.path]
    assert hub.available("llama-3.2-1b") == "hub cache"
    server.sha = "d" * 40
    assert hub.find("llama-3.2-1b", "main").name == "d" * 40
    assert hub.find("llama-3.2-1b") == folder
    assert hub.find(known.hub_id).name == "d" * 40, "a hub id means main"


def test_where_the_cache_holds_another_commit_of_a_known_name(server: Server) -> None:
    known = hub.KNOWN["llama-3.2-1b"]
    publish(server, known.hub_id)
    folder = hub.find(known.hub_id)
    server.seen.clear()
    assert hub.find("llama-3.2-1b") == folder
    assert not server.seen
    fails("llama-3.2-1b", "no revision 'v9'", revision="v9")
    fails("mistral-7b", "no model at https://huggingface.co/mistralai/Mistral-7B-v0.3")
    publish(server, hub.KNOWN["mistral-7b"].hub_id)
    fails("mistral-7b", f"no revision {hub.KNOWN['mistral-7b'].revision!r}", "--model mistralai/Mistral-7B-v0.3")


# What breaks off goes on


@pytest.mark.parametrize("ignored", [False, True])
def test_a_connection_that_breaks_is_taken_up(server: Server, ignored: bool) -> None:
    there = publish(server, "some/one", shards=2)
    server.cut[SECOND], server.ignore_ranges = 5000, ignored
    folder = hub.find("some/one")
    assert [r.range for r in server.seen if r.file == SECOND and r.command == "GET" and r.cdn] == [None, "bytes=5000-"]
    assert same(folder, there)


INTERRUPTED = """
import signal, sys
from huggingface_hub import constants
from zoo import cli, hub
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that it is ignored
constants.DOWNLOAD_CHUNK_SIZE = 1000
sys.exit(cli.run(lambda argv: print(hub.find("some/one"))))
"""


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_download_goes_on_in_the_next_run(server: Server, sign: signal.Signals) -> None:
    there = publish(server, "some/one", shards=2)
    server.stall[SECOND] = 30_000
    plain = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    env = plain | server.env
    blobs = Path(server.env["HF_HOME"]) / "hub" / "models--some--one" / "blobs"
    part = blobs / f"{sha256(there / SECOND)}.incomplete"
    with subprocess.Popen([sys.executable, "-c", INTERRUPTED], env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        wait(lambda: run.poll() is not None or (part.exists() and part.stat().st_size > 20_000))
        run.send_signal(sign)
        out, err = run.communicate(timeout=200)
    assert out == ""
    if sign == signal.SIGINT:
        assert run.returncode == 130
        assert err.splitlines()[-1].endswith("interrupted")
        assert "Traceback" not in err
    kept = part.stat().st_size
    assert 20_000 < kept <= 30_000
    assert hub._cached("some/one", None) is None, "half a checkpoint passes for a whole one"
    server.seen.clear()
    folder = hub.find("some/one")
    assert server.got() == [SECOND]
    assert [r.range for r in server.seen if r.file == SECOND and r.command == "GET"] == [f"bytes={kept}-"] * 2  # the hub's port, the other
    assert same(folder, there)
    assert not list(blobs.glob("*incomplete*"))


def wait(condition: Any) -> None:
    """Only a failure takes this long: a busy machine needs half a minute to start an interpreter."""
    end = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < end, "nothing happened in 200 s"
        time.sleep(0.01)


def test_a_full_disk(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    there = publish(server, hub.KNOWN["pythia-70m"].hub_id)
    server.sha = hub.KNOWN["pythia-70m"].revision

    from huggingface_hub.file_download import http_get

    def fill(url: str, file: Any, **options: Any) -> None:
        if not url.endswith("model.safetensors"):
            return http_get(url, file, **options)
        file.write((there / "model.safetensors").read_bytes()[:7000])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr("huggingface_hub.file_download.http_get", fill)
        fails("pythia-70m", "no space left", "0.166 GB", "HF_HOME", str(Path(server.env["HF_HOME"]) / "hub"))
    server.seen.clear()
    assert same(hub.find("pythia-70m"), there)
    assert [r.range for r in server.seen if r.file == "model.safetensors" and r.command == "GET" and r.cdn] == ["bytes=7000-"]


@pytest.mark.parametrize("left", ["longer", "whole", "another file's"])
def test_what_an_earlier_run_left_is_not_trusted(server: Server, left: str) -> None:
    there = publish(server, "some/one")
    body, digest = (there / "model.safetensors").read_bytes(), sha256(there / "model.safetensors")
    part = Path(server.env["HF_HOME"]) / "hub" / "models--some--one" / "blobs" / f"{digest}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes({"longer": body + b"x", "whole": body, "another file's": b"x" * 5000}[left])
    if left == "another file's":
        fails("some/one", "model.safetensors", "damaged", "run again")
    assert same(hub.find("some/one"), there)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_damaged_bytes_are_found_and_dropped(server: Server, file: str) -> None:
    there = publish(server, "some/one")
    server.damaged.add(file)
    for _ in range(2):
        fails("some/one", file, "some/one", "SHA-256", "run again")
        assert hub._cached("some/one", None) is None
    assert server.got().count(file) == 2, "the damaged file was kept"
    server.damaged.clear()
    assert same(hub.find("some/one"), there)


def test_a_file_of_the_wrong_length(server: Server) -> None:
    there = publish(server, "some/one")
    size = (there / "model.safetensors").stat().st_size
    server.short.add("model.safetensors")
    fails("some/one", f"should be of size {size}", f"has size {size - 7}", "run again")
    assert hub._cached("some/one", None) is None
    server.short.clear()
    assert same(hub.find("some/one"), there)


def test_two_processes_at_once(server: Server) -> None:
    there = publish(server, "some/one", shards=2)
    server.gate, said = threading.Event(), []
    threads = [threading.Thread(target=lambda: said.append(finds(server.env, "some/one"))) for _ in range(2)]
    for t in threads:
        t.start()
    wait(lambda: len([r for r in server.seen if r.command == "HEAD" and r.file.startswith("model-00001")]) == 2)
    server.gate.set()
    for t in threads:
        t.join()
    ((found, folder),) = said[0]
    assert found, folder
    assert said[0] == said[1]
    assert same(Path(folder), there)
    for file in (SECOND, SECOND.replace("2-", "1-", 1)):
        assert server.got().count(file) == 1, "both have fetched it"


# Checksums


def test_checksums_come_from_the_cache_alone(server: Server) -> None:
    there = publish(server, "some/one", shards=2)
    folder = hub.find("some/one")
    server.seen.clear()
    said = hub.checksums(folder)
    assert said == {file.name: (file.stat().st_size, sha256(file) if large(file.name) else None) for file in there.iterdir()}
    assert not server.seen
    assert hub.checksums(there) == {file.name: (file.stat().st_size, None) for file in there.iterdir()}
    assert hub.checksums(there / "none") == {}
    (folder / SECOND).resolve().write_bytes(b"damaged")
    said[SECOND] = 7, said[SECOND][1]
    assert hub.checksums(folder) == said, "the hash is what it should be, not what it is"
    blob = (folder / SECOND).resolve()
    store = folder.parents[2] / "blobs" / "ab" / ("ab" * 32)
    store.parent.mkdir(parents=True)
    blob.rename(store)
    blob.symlink_to(store)
    assert hub.checksums(folder) == said, "a blob that is itself a link keeps its own name"
    store.unlink()
    del said[SECOND]
    assert hub.checksums(folder) == said, "a link to nothing"


# Refusals


def test_what_the_hub_refuses(server: Server) -> None:
    publish(server, "org/fine")
    pickles = publish(server, "org/pickles")
    (pickles / "model.safetensors").rename(pickles / "pytorch_model.bin")
    climbs = publish(server, "org/climbs", shards=1)
    (climbs / INDEX).write_text(json.dumps({"weight_map": {"a": "../../x.safetensors"}}))
    fails("org/nobody", "no folder 'org/nobody' here and no model at https://huggingface.co/org/nobody", "HF_TOKEN")
    fails("org/fine", "no revision 'v9'", revision="v9")
    fails("org/pickles", "no model.safetensors", "without safetensors")
    fails("org/climbs", INDEX, "../../x.safetensors")


def test_gated_models_and_tokens(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    there = publish(server, "org/gated")
    server.gated.add("org/gated")
    fails("org/gated", "accept its licence at https://huggingface.co/org/gated", "HF_TOKEN")
    assert {r.token for r in server.seen} == {None}
    server.seen.clear()
    monkeypatch.setenv("HF_TOKEN", "outsider")
    fails("org/gated", "accept its licence at https://huggingface.co/org/gated", "HF_TOKEN")
    assert {r.token for r in server.seen} == {"Bearer outsider"}
    monkeypatch.setenv("HF_TOKEN", "expired")
    fails("org/gated", "token in HF_TOKEN", "/settings/tokens")
    server.seen.clear()
    monkeypatch.setenv("HF_TOKEN", "admitted")
    assert same(hub.find("org/gated"), there)
    assert {r.token for r in server.seen if not r.cdn} == {"Bearer admitted"}
    assert {r.token for r in server.seen if r.cdn} == {None}, "the token went to another host"


def test_a_renamed_repository(server: Server) -> None:
    there = publish(server, "new/name")
    server.renamed["old/name"] = "new/name"
    assert same(hub.find("old/name"), there)


def test_the_hub_is_ill(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    there = publish(server, "some/one")
    server.status = 500
    fails("some/one", "the hub answered 500 for some/one", "weights/some/one/")
    server.status = 0
    folder = hub.find("some/one")
    assert same(folder, there)
    server.status = 500
    assert hub.find("some/one") == folder


def test_offline(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(server, "some/one", shards=2)
    publish(server, "some/other")
    env = server.env | {"HF_HUB_OFFLINE": "1"}
    folder = hub.find("some/one")
    server.seen.clear()
    assert finds(env, "some/one") == [(True, str(folder))]
    (folder / SECOND).unlink()
    for found, line in finds(env, "some/one", "some/other"):
        assert not found
        assert "HF_HUB_OFFLINE" in line
        assert "weights/some/o" in line
    assert not server.seen


@pytest.mark.parametrize("xet", ["0", "1"])
def test_by_its_environment(server: Server, xet: str) -> None:
    """As a program is run: nothing patched, hf-xet switched off or, where it is installed, left on."""
    there = publish(server, "some/one", shards=2)
    server.gated.add("some/one")
    ((found, folder),) = finds(server.env | {"HF_TOKEN": "admitted", "HF_HUB_DISABLE_XET": xet}, "some/one")
    assert found, folder
    assert folder.startswith(server.env["HF_HOME"])
    assert not [r.path for r in server.seen if "xet" in r.path]
    assert same(Path(folder), there)


def test_no_connection_says_so(tmp_path: Path) -> None:
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "ZOO_CACHE": str(tmp_path / "zoo")}
    plain, smol = finds(env, "tinyllama-1.1b", embedded.NAME)
    assert not plain[0]
    assert "cannot be reached" in plain[1]
    assert "weights/tinyllama-1.1b/" in plain[1]
    assert not smol[0]
    assert embedded.INSTALL in smol[1]
