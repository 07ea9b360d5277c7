"""Write a full-size checkpoint with random weights, laid out as on the hub: for measuring loading and speed without a download.

    python scripts/make_checkpoint.py mistral-7b OUT                 14.5 GB in three shards
    python scripts/make_checkpoint.py pythia-1.4b OUT --layers 4     a smaller one

Weights are normal with std 0.02 (norms: around one), written as they are drawn, so memory stays small. The answers are nonsense.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also runs where zoo is not installed

from zoo.bpe import LETTERS
from zoo.checkpoint import INDEX, SINGLE
from zoo.cli import Parser, run
from zoo.errors import ZooError
from zoo.tokenizer import Tokenizer

Shapes = dict[str, tuple[int, ...]]
PIECE = 1 << 22  # numbers drawn at a time
SPARE = 64 << 20  # bytes left free on the disk
WIDTHS = ("vocab_size", "hidden_size", "intermediate_size", "head_dim")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

MISTRAL = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "torch_dtype": "bfloat16", "vocab_size": 32768, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "max_position_embeddings": 32768,
    "tie_word_embeddings": False, "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
}  # fmt: skip
PYTHIA = {
    "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "torch_dtype": "float16", "vocab_size": 50304, "hidden_size": 2048,
    "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 16, "rotary_pct": 0.25, "rotary_emb_base": 10000,
    "hidden_act": "gelu", "layer_norm_eps": 1e-5, "use_parallel_residual": True, "max_position_embeddings": 2048,
    "tie_word_embeddings": False, "initializer_range": 0.02, "use_cache": True,
}  # fmt: skip


def mistral(c: dict[str, Any]) -> Shapes:
    C, I, D = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * D, c["num_key_value_heads"] * D
    shapes: Shapes = {"model.embed_tokens.weight": (c["vocab_size"], C)}
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{name}_proj.weight": s for name, s in (("q", (q, C)), ("k", (kv, C)), ("v", (kv, C)), ("o", (C, q)))}
        shapes |= {f"{layer}mlp.{name}_proj.weight": s for name, s in (("gate", (I, C)), ("up", (I, C)), ("down", (C, I)))}
        shapes |= {f"{layer}{name}_layernorm.weight": (C,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (C,), "lm_head.weight": (c["vocab_size"], C)}


def gpt_neox(c: dict[str, Any]) -> Shapes:
    C, I = c["hidden_size"], c["intermediate_size"]
    shapes: Shapes = {"gpt_neox.embed_in.weight": (c["vocab_size"], C)}
    for i in range(c["num_hidden_layers"]):
        layer = f"gpt_neox.layers.{i}."
        matrices = {
            "attention.query_key_value": (3 * C, C),
            "attention.dense": (C, C),
            "mlp.dense_h_to_4h": (I, C),
            "mlp.dense_4h_to_h": (C, I),
        }
        for name, (rows, columns) in matrices.items():
            shapes |= {f"{layer}{name}.weight": (rows, columns), f"{layer}{name}.bias": (rows,)}
        shapes |= {f"{layer}{norm}_layernorm.{leaf}": (C,) for norm in ("input", "post_attention") for leaf in ("weight", "bias")}
    norm = {f"gpt_neox.final_layer_norm.{leaf}": (C,) for leaf in ("weight", "bias")}
    return shapes | norm | {"embed_out.weight": (c["vocab_size"], C)}


# name -> its config, the shapes that follow from it, in how many files the hub keeps it, bos and eos of the small tokenizer
KNOWN = {
    "mistral-7b": (MISTRAL, mistral, 3, ("<s>", "</s>")),
    "pythia-1.4b": (PYTHIA, gpt_neox, 1, ("<|endoftext|>", "<|endoftext|>")),
}


def main(argv: list[str] | None = None) -> None:
    p = Parser(prog="python scripts/make_checkpoint.py", description="A checkpoint of this shape with random weights.")
    p.add_argument("shape", choices=list(KNOWN))
    p.add_argument("out", type=Path, help="a folder that does not exist yet")
    p.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="copy its tokenizer; without it, one token a byte")
    p.add_argument("--layers", type=int, help="so many layers instead of all")
    p.add_argument("--width-divisor", type=int, default=1, choices=[1, 2, 4, 8], help="divide vocabulary, widths and head size by this")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)

    start = time.perf_counter()
    known, shapes_of, files, ends = KNOWN[args.shape]
    config = {key: value // args.width_divisor if key in WIDTHS else value for key, value in known.items()}
    config["num_hidden_layers"] = args.layers if args.layers is not None else known["num_hidden_layers"]
    if not 1 <= config["num_hidden_layers"] <= 100_000:
        raise ZooError(f"--layers {args.layers} must be between 1 and 100000")
    if args.out.exists():
        raise ZooError(f"{args.out} exists already; name a new folder")
    shapes, dtype = shapes_of(config), getattr(torch, config["torch_dtype"])
    total = sum(map(math.prod, shapes.values())) * dtype.itemsize
    args.out.parent.mkdir(parents=True, exist_ok=True)
    room, need = shutil.disk_usage(args.out.parent).free, total + SPARE
    if room < need:
        raise ZooError(f"{args.out.parent} has {room / 1e9:.1f} GB free, and {need / 1e9:.1f} GB are needed: make room, or use --layers")

    work = Path(tempfile.mkdtemp(prefix=f".{args.out.name}.", dir=args.out.parent))
    try:
        tokenizer = write_tokenizer(work, args.tokenizer, ends)
        if tokenizer.vocab_size > config["vocab_size"]:
            raise ZooError(f"the tokenizer has {tokenizer.vocab_size} tokens, and the model only {config['vocab_size']}")
        config |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        (work / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_weights(work, shapes, dtype, total, files, torch.Generator().manual_seed(args.seed))
        work.chmod(0o755)
        work.rename(args.out)
    except BaseException:  # also Ctrl-C: nothing is left behind
        shutil.rmtree(work, ignore_errors=True)
        raise
    if args.tokenizer is None:
        print("its tokenizer has a token for each byte only: most of what random weights say has no letters", file=sys.stderr)
    print(f"{args.out}: {total:,} bytes of weights in {files} file{'s' * (files > 1)}, {time.perf_counter() - start:.1f} s")


def write_weights(folder: Path, shapes: Shapes, dtype: torch.dtype, total: int, files: int, g: torch.Generator) -> None:
    """In `files` parts of about the same size, in order, with an index where there are several."""
    parts: list[Shapes] = [{} for _ in range(files)]
    before = 0
    for name, shape in shapes.items():
        parts[before * files // total][name] = shape
        before += math.prod(shape) * dtype.itemsize
    names = [SINGLE] if files == 1 else [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    for file, part in zip(names, parts, strict=True):
        with open(folder / file, "wb") as f:
            write_safetensors(f, part, dtype, g)
    if files > 1:
        table = {name: file for file, part in zip(names, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_safetensors(f: BinaryIO, shapes: Shapes, dtype: torch.dtype, g: torch.Generator) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    f.write(struct.pack("<Q", len(text)) + text)
    for name, shape in shapes.items():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        for n in pieces(math.prod(shape)):
            f.write(torch.randn(n, generator=g).mul_(0.02).add_(mean).to(dtype).view(torch.uint8).numpy())


def pieces(count: int) -> Iterator[int]:
    for start in range(0, count, PIECE):
        yield min(PIECE, count - start)


def write_tokenizer(folder: Path, source: Path | None, ends: tuple[str, str]) -> Tokenizer:
    """A copy of `source`'s, or a byte-level BPE without merges: a token for each byte after the special ones."""
    if source:
        for file in TOKENIZER:
            if (source / file).is_file():
                shutil.copyfile(source / file, folder / file)
        return Tokenizer.load(folder)
    special = list(dict.fromkeys(["<unk>", *ends]))
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bytewise = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token} | plain for i, token in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "unk_token": None, "vocab": {t: i for i, t in enumerate([*special, *LETTERS])}, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(bytewise, ensure_ascii=False) + "\n", encoding="utf-8")
    settings = {"bos_token": ends[0], "eos_token": ends[1], "add_bos_token": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return Tokenizer.load(folder)


if __name__ == "__main__":
    raise SystemExit(run(main))
