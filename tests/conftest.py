"""Tiny checkpoints that tests write themselves: random weights with std 0.3, so that wrong code cannot hide in small logits."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from zoo.attention.cache import Caches
from zoo.lm import LM

# Of processes that tests start: see `one_thread`.
os.environ["OMP_NUM_THREADS"] = "1"

CORPUS = (
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, and nothing particular to "
    "interest me on shore, I thought I would sail about a little and see the watery part of the world. It is a way I have of driving off "
    "the spleen and regulating the circulation. 12 345 6789 naïve café — “quotes” 漢字 \U0001f40b "
) * 4

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}

MISTRAL: dict[str, Any] = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 16}

NEOX: dict[str, Any] = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "hidden_act": "gelu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "layer_norm_eps": 1e-5,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "use_parallel_residual": True,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first, so that no process is left alone with them at the end: `slow`, with its seconds where they are many."""

    def seconds(item: pytest.Item) -> float:
        marker = item.get_closest_marker("slow")
        return 0 if marker is None else marker.args[0] if marker.args else 10

    items.sort(key=seconds, reverse=True)


def llama_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a Llama checkpoint with this config.json."""
    C, I, V = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    H, G = c["num_attention_heads"], c.get("num_key_value_heads") or c["num_attention_heads"]
    D = c.get("head_dim") or C // H
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, C), "model.norm.weight": (C,)}
    if not c.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (V, C)
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": (C,), p + "post_attention_layernorm.weight": (C,)}
        for name, o, n in (("q", H * D, C), ("k", G * D, C), ("v", G * D, C), ("o", C, H * D)):
            shapes[f"{p}self_attn.{name}_proj.weight"] = (o, n)
            if c.get("attention_bias"):
                shapes[f"{p}self_attn.{name}_proj.bias"] = (o,)
        for name, o, n in (("gate", I, C), ("up", I, C), ("down", C, I)):
            shapes[f"{p}mlp.{name}_proj.weight"] = (o, n)
            if c.get("mlp_bias"):
                shapes[f"{p}mlp.{name}_proj.bias"] = (o,)
    return shapes


def mistral_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """As Llama's, but for the key/value heads of a config that does not say."""
    return llama_shapes({"num_key_value_heads": 8, **c})


def neox_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a GPT-NeoX checkpoint with this config.json."""
    C, I, V = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"gpt_neox.embed_in.weight": (V, C)}
    shapes |= {"gpt_neox.final_layer_norm.weight": (C,), "gpt_neox.final_layer_norm.bias": (C,)}
    if not c.get("tie_word_embeddings"):
        shapes["embed_out.weight"] = (V, C)
    for i in range(c["num_hidden_layers"]):
        p = f"gpt_neox.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{p}{norm}.weight": (C,), f"{p}{norm}.bias": (C,)}
        for name, o, n in (("query_key_value", 3 * C, C), ("dense", C, C)):
            shapes[f"{p}attention.{name}.weight"] = (o, n)
            if c.get("attention_bias", True):
                shapes[f"{p}attention.{name}.bias"] = (o,)
        for name, o, n in (("dense_h_to_4h", I, C), ("dense_4h_to_h", C, I)):
            shapes |= {f"{p}mlp.{name}.weight": (o, n), f"{p}mlp.{name}.bias": (o,)}
    return shapes


# model_type -> config.json but for the vocabulary's size, and the tensors of such a config
FAMILIES: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, tuple[int, ...]]]]] = {
    "llama": (LLAMA, llama_shapes),
    "mistral": (MISTRAL, mistral_shapes),
    "gpt_neox": (NEOX, neox_shapes),
}


def write_tokenizer(folder: Path, chat: bool = True) -> int:
    """A byte-level BPE trained on CORPUS, in tokenizer.json and tokenizer_config.json; returns the vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    t.train_from_iterator([CORPUS], trainer)
    t.save(str(folder / "tokenizer.json"))
    about: dict[str, Any] = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_bos_token": False}
    if chat:
        about["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return t.get_vocab_size()


def write_checkpoint(
    folder: Path,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    chat: bool = True,
    embeddings: float = 0.3,
    **changes: Any,
) -> Path:
    """A whole checkpoint in `folder`: config with `changes` (a key that is ... is left out), random weights, tokenizer. `embeddings` is
    their standard deviation; all other weights have 0.3, those of norms around 1."""
    folder.mkdir(parents=True, exist_ok=True)
    right, shapes = FAMILIES[family]
    config = {**right, "vocab_size": write_tokenizer(folder, chat), **changes}
    config = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2]}))
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes(config).items():
        t = torch.randn(shape, generator=g) * (embeddings if "embed_tokens" in name or "embed_in" in name else 0.3)
        tensors[name] = (t + 1 if name.endswith("norm.weight") else t).to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_llama(folder: Path, **options: Any) -> Path:
    """`write_checkpoint` of a Llama."""
    return write_checkpoint(folder, "llama", **options)


# Triton's interpreter is chosen when Python starts; tests/test_triton.py starts one for these.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreter"]


@pytest.fixture
def nan_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN, so that what a kernel leaves unwritten fails."""
    empty = torch.empty

    def filled(*size: Any, **options: Any) -> torch.Tensor:
        t = empty(*size, **options)
        return t.fill_(torch.nan) if t.is_floating_point() else t

    monkeypatch.setattr(torch, "empty", filled)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Where cores are shared, tiny operations on two threads take forty times as long: each waits for the other's turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint folder, float32, grouped heads, with a chat template."""
    return write_llama(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of Mistral, with a window of 16 tokens."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny-mistral", "mistral")


@pytest.fixture(scope="session")
def tiny_neox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of GPT-NeoX: a quarter of each head turns, attention and mlp side by side."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny-neox", "gpt_neox")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder with the long text and the real NeoX tokenizer."""
    where = os.environ.get("ZOO_TEST_DATA")
    if not where or not Path(where).is_dir():
        pytest.skip("ZOO_TEST_DATA names no folder with the long text")
    return Path(where)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The embedded SmolLM2-135M-Instruct, converted."""
    from zoo import embedded
    from zoo.errors import ZooError

    try:
        return embedded.folder()
    except ZooError as e:
        pytest.skip(f"the embedded model is not here: {e}")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless Chromium: ZOO_BROWSER names its program, else one that is installed or playwright's own (extra `browser`)."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="a browser needs playwright: pip install -e '.[browser]'")
    names = (os.environ.get("ZOO_BROWSER", ""), "chromium-headless-shell", "chromium", "google-chrome")
    program = next(filter(None, map(shutil.which, filter(None, names))), None)
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=program)
        except sync_api.Error as e:
            pytest.skip(f"no Chromium here (playwright install chromium, or ZOO_BROWSER): {str(e).splitlines()[0]}")
        yield browser
        browser.close()


@torch.no_grad()
def feed(lm: LM, cache: Caches, ids: Tensor, prompt: int, chunk: int, inside: int | None = None) -> Tensor:
    """Logits (B, T, V) of all ids: the first `prompt` as a prompt, the rest as continuation, `chunk` tokens a call; `inside` the prompt
    another number."""
    out = []
    cache.begin_prompt([prompt] * len(ids))
    for start, end, n in ((0, prompt, inside or chunk), (prompt, ids.shape[1], chunk)):
        out += [lm.model(ids[:, t : min(t + n, end)], cache) for t in range(start, end, n)]
        if start == 0:
            cache.end_prompt()
    return torch.cat(out, 1)
