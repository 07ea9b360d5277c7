"""Write a Llama-family model as GGUF, for llama.cpp to run the same weights: 16 bits a number, or 8 (q8_0, blocks of 32).

    python scripts/write_gguf.py smollm2-135m model.gguf --kind bf16

The file has no vocabulary: it takes and gives token ids.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from zoo import cli, embedded
from zoo.errors import ZooError

KINDS = ("f16", "bf16", "q8_0")
PARTS = {ours: theirs for theirs, ours in embedded.PARTS.items()}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write(model: Any, path: Path, kind: str = "bf16") -> None:
    """Raises ZooError for a model that llama.cpp's `llama` architecture does not describe, or where `gguf` is not installed."""
    try:
        import gguf
    except ImportError:
        raise ZooError("writing GGUF needs the package gguf: pip install gguf") from None
    c = model.config
    scaled = getattr(c, "rope", None) is None or c.rope.scaling is not None
    if type(model).__name__ not in ("Llama", "Mistral") or scaled or c.sliding_window is not None:
        raise ZooError("only Llama and Mistral models without a window and without stretched rotary frequencies are written as GGUF")
    types = gguf.GGMLQuantizationType
    low = {"f16": types.F16, "bf16": types.BF16, "q8_0": types.Q8_0}[kind]
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(c.max_position_embeddings)
    out.add_embedding_length(c.hidden_size)
    out.add_block_count(c.num_hidden_layers)
    out.add_feed_forward_length(c.intermediate_size)
    out.add_head_count(c.num_attention_heads)
    out.add_head_count_kv(c.num_key_value_heads)
    out.add_key_length(c.head_dim)
    out.add_value_length(c.head_dim)
    out.add_rope_dimension_count(c.head_dim)
    out.add_rope_freq_base(c.rope.theta)
    out.add_layer_norm_rms_eps(c.rms_norm_eps)
    out.add_vocab_size(c.vocab_size)
    out.add_tokenizer_model("no_vocab")
    heads = {"self_attn.q_proj": c.num_attention_heads, "self_attn.k_proj": c.num_key_value_heads}
    for name, p in model.named_parameters():
        stem, _, leaf = name.rpartition(".")
        weight = p.detach().float()
        if stem in OUTER:
            target = f"{OUTER[stem]}.{leaf}"
        else:
            _, _, layer, part = stem.split(".", 3)
            target = f"blk.{layer}.{PARTS[part]}.{leaf}"
            if part in heads:  # rows of a head (0, 1, 2, ...) -> (0, D/2, 1, D/2 + 1, ...): llama.cpp turns neighbours
                weight = weight.unflatten(0, (heads[part], 2, -1)).transpose(1, 2).flatten(0, 2)
        kind_of = low if p.dim() == 2 else types.F32
        data = gguf.quants.quantize(weight.contiguous().numpy(), kind_of)
        out.add_tensor(target, data, raw_dtype=kind_of)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def main(argv: list[str] | None = None) -> None:
    import zoo

    p = cli.Parser(prog="scripts/write_gguf.py", description="Write a Llama-family model as GGUF.")
    p.add_argument("model")
    p.add_argument("out", type=Path)
    p.add_argument("--kind", choices=KINDS, default="bf16")
    args = p.parse_args(argv)
    write(zoo.load(args.model, compile="off").model, args.out, args.kind)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(cli.run(main))
