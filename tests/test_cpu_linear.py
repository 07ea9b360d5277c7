"""Linear layers of a few rows by the CPU kernels: against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import write_llama
from kernel_checks import require_cpu_kernels, well_behaved
from zoo.kernels import cpu

import zoo
from zoo.models.layers import Linear

require_cpu_kernels()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 64, 16), (1, 49, 576), (3, 1000, 48), (16, 65, 128), (7, 3, 64)])
def test_linear_matches_float64(M: int, N: int, K: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(M * N)
    x, w = torch.randn(M, K, generator=g).to(dtype), torch.randn(N, K, generator=g).to(dtype)
    true = x.double() @ w.double().T
    got, library = torch.ops.zoo.linear(x, w), torch.nn.functional.linear(x, w)
    assert (got.double() - true).abs().max() <= 1.5 * (library.double() - true).abs().max() + 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 64, 16), (1, 49, 576), (3, 1000, 48), (16, 65, 320), (7, 3, 64), (2, 130, 14336)])
def test_int8_linear_matches_float64(M: int, N: int, K: int, dtype: torch.dtype) -> None:
    """Also with columns whose numbers are a thousand times larger than the others', and rows that are 0."""
    g = torch.Generator().manual_seed(M * N)
    x = torch.randn(M, K, generator=g)
    x[:, 5] = 1000.0
    x[M - 1 :] *= M == 1
    x = x.to(dtype)
    w, scale = torch.randint(-128, 128, (N, K), generator=g, dtype=torch.int8), torch.rand(N, generator=g) / 100 + 1e-3
    got, true = torch.ops.zoo.linear_int8(x, w, scale), x.double() @ (w.double() * scale.double()[:, None]).T
    bound = 1e-6 * (x.double().abs() @ w.double().abs().T * scale)  # float32 sums
    if dtype == torch.bfloat16:
        # A unit of 1000 / 32639 beside the large number: five standard deviations of its rounding, summed with weights of rms 74.
        bound = 5 * 1000 / 32639 / 12**0.5 * 74 * min(K, 256) ** 0.5 * scale.double() + bound + true.abs() * 2**-8
    assert ((got.double() - true).abs() <= bound).all()
    if M > 1:
        assert (got[M - 1] == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_int8_rows_that_are_not_finite_stay_so(bad: float) -> None:
    x, w = torch.ones(2, 128, dtype=torch.bfloat16), torch.ones(5, 128, dtype=torch.int8)
    x[0, 70] = bad
    got = torch.ops.zoo.linear_int8(x, w, torch.ones(5))
    assert not torch.isfinite(got[0]).any()
    assert (got[1] == 128).all()
    tiny = torch.full((1, 128), 1e-37, dtype=torch.bfloat16)
    assert (torch.ops.zoo.linear_int8(tiny, w, torch.ones(5)) - 128 * float(tiny[0, 0])).abs().max() < 2e-36


def test_operators_are_well_behaved() -> None:
    """Schemas, fake tensors and tracing, by PyTorch's own checks; and what is wrong says so."""
    ops, int8 = torch.ops.zoo, torch.randint(-127, 128, (5, 32), dtype=torch.int8)
    well_behaved(ops.linear, torch.randn(2, 32), torch.randn(5, 32))
    well_behaved(ops.linear_int8, torch.randn(2, 32), int8, torch.rand(5))
    with pytest.raises(RuntimeError, match="int8, its scales"):
        ops.linear_int8(torch.randn(2, 32), int8, torch.rand(4))
    with pytest.raises(RuntimeError, match="multiple of 16"):
        ops.linear(torch.randn(2, 20), torch.randn(5, 20))
    with pytest.raises(RuntimeError, match="same dtype"):
        ops.linear(torch.randn(2, 32), torch.randn(5, 32).bfloat16())


def test_linear_goes_back_to_the_library_when_cast(tmp_path: Path) -> None:
    """A model that is cast after loading still runs."""
    lm = zoo.load(str(write_llama(tmp_path / "m")), dtype="float32", compile="off")
    assert all(m.few == cpu.FEW for m in lm.model.modules() if type(m) is Linear and m.in_features % 16 == 0)
    lm.model.double()
    assert lm.logits([[1, 2]]).shape[:2] == (1, 2)
