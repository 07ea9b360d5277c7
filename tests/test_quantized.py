"""Weight-only int8: the numbers are torchao's, every path computes with them, and the model stays near its own."""

from __future__ import annotations

import importlib.util
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import write_checkpoint
from kernel_checks import Called, calls_of_a_step

import zoo
from zoo import quantized
from zoo.attention.backends import kernels_ready
from zoo.errors import ZooError
from zoo.models.layers import Linear, use_kernels
from zoo.quantized import FEW, Int8Linear

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed (extra `quant`)")


def layer(bias: bool = False) -> Int8Linear:
    g = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (40, 64), generator=g, dtype=torch.int8)
    return Int8Linear(weight, torch.rand(40, generator=g) / 500, torch.randn(40, generator=g) if bias else None)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64), (2, 5, 64), (FEW, 64), (FEW + 1, 64), (3, 30, 64)])
@pytest.mark.parametrize("kernels", [False, True])
def test_every_path_is_the_formula(shape: tuple[int, ...], dtype: torch.dtype, bias: bool, kernels: bool) -> None:
    """Few rows, many rows: scale (W x) + bias, to the dtype's rounding; a missing scale would be off by hundreds."""
    if kernels and not kernels_ready():
        pytest.skip("no C++ compiler: the CPU kernels cannot be built")
    l = layer(bias)
    use_kernels(l, kernels)
    assert (l.few > 0) == kernels
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    if bias:
        l.bias.data = l.bias.data.to(dtype)  # type: ignore[union-attr]
    true = F.linear(x.double(), l.weight.double() * l.scale.double()[:, None], None if l.bias is None else l.bias.double())
    got = l(x)
    assert got.dtype == dtype
    assert got.shape == (*shape[:-1], 40)
    assert (got.double() - true).abs().max() <= (1e-5 if dtype == torch.float32 else 0.02) * float(true.abs().max())
    with Called() as called:
        l(x)
    assert called.names == ({"linear_int8"} if kernels and x.numel() <= FEW * 64 else set())


@pytest.mark.parametrize("rows", [1, FEW, FEW + 1])
@pytest.mark.parametrize("kernels", [False, True])
def test_gradients_of_inputs(rows: int, kernels: bool) -> None:
    """Those of the formula, on both sides of FEW: what has no gradient is not asked."""
    if kernels and not kernels_ready():
        pytest.skip("no C++ compiler: the CPU kernels cannot be built")
    l = layer()
    use_kernels(l, kernels)
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    l(x).square().sum().backward()
    weight = l.weight.double() * l.scale.double()[:, None]
    want = 2 * (x.detach().double() @ weight.T) @ weight
    assert x.grad is not None
    assert (x.grad.double() - want).abs().max() < 1e-5 * float(want.abs().max())


def test_float16_does_not_overflow() -> None:
    """A sum of products with numbers up to 127 does; with scaled weights it does not."""
    l = layer()
    x = torch.full((FEW + 4, 64), 200.0, dtype=torch.float16)
    true = F.linear(x.double(), l.weight.double() * l.scale.double()[:, None])
    assert (l(x).double() - true).abs().max() < 0.01 * true.abs().max()
    assert (l(x[:1]).double() - true[:1]).abs().max() < 0.01 * true.abs().max()


@pytest.mark.slow
def test_a_compiled_row_is_the_formula() -> None:
    l = layer(True)
    x = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1))
    true = F.linear(x.double(), l.weight.double() * l.scale.double()[:, None], l.bias.double())  # type: ignore[union-attr]
    with torch.no_grad():
        assert (torch.compile(l, fullgraph=True)(x).double() - true).abs().max() < 1e-5 * float(true.abs().max())


def test_scales_stay_float32() -> None:
    """bfloat16 scales would be off by 0.4 %; casting the model must not round them."""
    l = layer()
    before = l.scale.clone()
    assert torch.equal(l.bfloat16().scale, before)
    assert l.scale.dtype == torch.float32


@needs_torchao
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox"])
@pytest.mark.parametrize("tied", [False, True])
def test_int8_models(tmp_path: Path, family: str, tied: bool) -> None:
    """All linear layers are int8, rounded to nearest by a row's own scale; embeddings are not; logits are near and not equal; half the
    bytes of bfloat16."""
    folder = str(write_checkpoint(tmp_path / "m", family, tie_word_embeddings=tied))
    plain, lm = zoo.load(folder, dtype="float32", compile="off"), zoo.load(folder, dtype="float32", compile="off", weights="int8")
    linear = {name: m for name, m in plain.model.named_modules() if isinstance(m, Linear)}
    for name, m in linear.items():
        q = lm.model.get_submodule(name)
        assert type(q) is Int8Linear
        restored = q.weight.float() * q.scale[:, None]
        assert (restored - m.weight).abs().amax(1).le(q.scale * 0.51).all(), name
        assert q.weight.abs().amax() == 127 or q.weight.abs().amax() == 128
    assert lm.dtype == torch.float32
    ids = torch.randint(3, plain.config.vocab_size, (2, 50), generator=torch.Generator().manual_seed(3))
    a, b = plain.logits(ids).log_softmax(-1), lm.logits(ids).log_softmax(-1)
    kl = float((a.exp() * (a - b)).sum(-1).mean())
    assert 1e-7 < kl < 0.3
    assert lm.generate("Call me", 5)
    assert sum(m.weight.nbytes for m in lm.model.modules() if isinstance(m, Int8Linear)) * 4 == sum(
        m.weight.nbytes for m in linear.values()
    )


@needs_torchao
def test_weights_are_freed_one_by_one(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer is made, those replaced before it are gone: a model never lies in memory twice."""
    lm = zoo.load(str(tiny), dtype="float32", compile="off")
    gone, alive = [weakref.ref(m) for m in lm.model.modules() if isinstance(m, Linear)], []
    real = Int8Linear.__init__
    monkeypatch.setattr(Int8Linear, "__init__", lambda self, *a: alive.append(sum(r() is not None for r in gone)) or real(self, *a))
    quantized.quantize(lm.model, "int8")
    assert len(alive) == len(gone)
    assert all(n <= len(gone) - i + 1 for i, n in enumerate(alive))


@needs_torchao
@pytest.mark.slow
@pytest.mark.parametrize(  # attention's kernels are made for heads of 16; linear layers' for both
    ("batch", "dtype", "head_dim"), [(1, "float32", 8), (1, "float32", 16), (2, "float32", 8), (2, "bfloat16", 16)]
)
def test_compiled_int8_equals_eager(tmp_path: Path, batch: int, dtype: str, head_dim: int) -> None:
    """A single row is Inductor's, several go to the CPU kernel, inside the graph."""
    folder = str(write_checkpoint(tmp_path / "m", "llama", hidden_size=32, num_hidden_layers=2, head_dim=head_dim))
    lm = zoo.load(folder, dtype=dtype, compile="on", weights="int8")
    assert (lm.backend == "cpp") == (head_dim == 16 and kernels_ready())
    exact = zoo.load(folder, dtype="float32", compile="off", weights="int8", backend="eager")
    ids = torch.randint(3, lm.config.vocab_size, (batch, 30), generator=torch.Generator().manual_seed(3))
    caches = [lm.new_cache(batch, max_tokens=40), lm.new_cache(batch, max_tokens=40), exact.new_cache(batch)]
    for one, cache in zip((lm, lm, exact), caches, strict=True):
        one.prefill(ids, cache)
    apart, eager = [], []
    for t in range(5):
        true = exact.decode_step(ids[:, t], caches[2])
        for mode, cache, missed in (("on", caches[0], apart), ("off", caches[1], eager)):
            lm.step.mode = mode
            missed.append((lm.decode_step(ids[:, t], cache) - true).square().mean())
    assert sum(apart) ** 0.5 <= 1.5 * sum(eager) ** 0.5 + 1e-4  # bfloat16 rounds elsewhere once operations are fused, not more
    assert lm.step.ran["compiled"] == 5
    several = batch > 1 and kernels_ready()
    assert ("linear_int8" in calls_of_a_step(lm, caches[0], ids[:, 5])) == several


def test_what_is_unknown_or_missing_says_so(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZooError, match="weights='int3' is unknown; choose int8"):
        zoo.load(str(tiny), weights="int3")
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ZooError, match="pip install 'torchao"):
        zoo.load(str(tiny), weights="int8")
