"""Merging of clusters by the CPU kernels: against zoo/attention/clustering.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kernel_checks import require_cpu_kernels, well_behaved
from torch import Tensor
from zoo.kernels import cpu

from zoo.attention.clustering import TIE, rounded, ward

require_cpu_kernels()


def clusters(B: int, G: int, N: int, F: int, step: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points, weights, what may merge, and how many must go, one at least; step > 0 puts points on a grid, so that many distances are
    equal."""
    g = torch.Generator().manual_seed(B * N + F)
    x = torch.randn(B, G, N, F, generator=g)
    x = (x / step).round() * step if step else x
    weight = torch.rand(B, G, N, generator=g) * 10 + 0.01
    alive = torch.rand(B, G, N, generator=g) < 0.8
    alive[..., :2] = True
    return x, weight, alive, torch.randint(1, max(2, N // 2), (B, G), generator=g)


@pytest.mark.parametrize("shape", [(1, 1, 2, 3), (1, 1, 17, 1), (2, 3, 90, 16), (3, 3, 400, 16), (1, 2, 130, 64)])
def test_ward_is_the_one_of_clustering(shape: tuple[int, int, int, int]) -> None:
    """The same labels, but where rounding decides: never where points differ clearly, as random ones do."""
    x, weight, alive, surplus = clusters(*shape)
    got, own = cpu.ward(x, weight, alive, surplus, TIE), torch.arange(shape[2])
    assert torch.equal(got, ward(x, weight, alive, surplus))
    assert torch.equal((got != own).sum(-1), surplus)
    many = torch.full_like(surplus, shape[2])  # more than can go: one is left
    got = cpu.ward(x, weight, alive, many, TIE)
    assert torch.equal((got != own).sum(-1), alive.sum(-1) - 1)
    assert all(len(into[may].unique()) == 1 for into, may in zip(got.flatten(0, 1), alive.flatten(0, 1), strict=True))


def test_ward_takes_near_points_for_equal() -> None:
    """Within a hundredth of the largest norm the first is the nearest, as in clustering, whatever rounding says."""
    x, weight = torch.tensor([0.0, 0.05, 0.06, 10.0]).view(1, 1, 4, 1), torch.tensor([[[1.0, 1.01, 1.02, 5.0]]])
    alive = torch.ones(1, 1, 4, dtype=torch.bool)
    for merge_by in (ward, partial(cpu.ward, tie=TIE)):
        assert merge_by(x, weight, alive, torch.ones(1, 1, dtype=torch.int64)).tolist() == [[[0, 0, 2, 3]]]


def test_of_equally_cheap_pairs_the_first_merges() -> None:
    """Where points are equally far apart; in clustering, rounding decides which pair that is."""
    x, one = torch.arange(4.0).view(1, 1, 4, 1), torch.ones(1, 1, 4)
    which = (x, one, one > 0, torch.ones(1, 1, dtype=torch.int64))
    assert cpu.ward(*which, TIE).tolist() == [[[0, 0, 2, 3]]]
    assert ward(*which).flatten().tolist() in ([0, 0, 2, 3], [0, 1, 1, 3], [0, 1, 2, 2])


@pytest.mark.parametrize("step", [0.7, 1.5])
def test_ward_with_equal_points(step: float) -> None:
    """Points on a grid: equal ones go first, into the first of them; the cost of what merges is that of clustering's."""
    x, weight, alive, surplus = clusters(2, 2, 150, 2, step)
    weight = weight.round().clamp(min=1)
    got, want = cpu.ward(x, weight, alive, surplus, TIE), ward(x, weight, alive, surplus)
    for labels in (got, want):
        assert torch.equal((labels != torch.arange(150)).sum(-1), surplus)
        assert (labels[~alive] == torch.arange(150).expand(labels.shape)[~alive]).all()

    def spread(labels: Tensor) -> Tensor:
        w = torch.zeros_like(weight).scatter_add_(2, labels, weight)
        mean = torch.zeros_like(x).scatter_add_(2, labels[..., None].expand(x.shape), x * weight[..., None]) / w.clamp(min=1e-9)[..., None]
        return ((x - mean.gather(2, labels[..., None].expand(x.shape))).square().sum(-1) * weight).sum(-1)

    assert (spread(got) <= 1.2 * spread(want) + 1e-3).all()
    assert (spread(want) <= 1.2 * spread(got) + 1e-3).all()


def test_rounding_is_the_one_of_clustering() -> None:
    """Bit for bit: halves, zeros, tiny and negative numbers, numbers that bfloat16 has, and seeds beyond int64."""
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(400, 48, generator=g) * 10.0 ** torch.randint(-42, 30, (400, 1), generator=g)
    mean[:5] = torch.tensor([0.0, -0.0, 1e-41, -1e-41, 1.0])[:, None]
    mean[5:50] = mean[5:50].bfloat16().float()
    where = tuple(torch.randint(-5, 2**40, (400,), generator=g) for _ in range(4))
    for seed in (0, 3, 2**63 + 1):
        got, want = cpu.rounded(mean, torch.bfloat16, seed, *where), rounded(mean, torch.bfloat16, seed, *where)
        assert torch.equal(got, want)
        assert 0.2 < (got != mean.bfloat16())[50:].float().mean() < 0.3  # a quarter goes the other way


def test_operators_are_well_behaved() -> None:
    """Schemas, fake tensors and tracing, by PyTorch's own checks; and what is wrong says so."""
    x, w, alive, surplus = clusters(1, 2, 30, 4)
    well_behaved(torch.ops.zoo.ward, x, w, alive, surplus, 1e-4)
    well_behaved(torch.ops.zoo.rounded, torch.randn(3, 8), 5, torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="weights must be contiguous float32"):
        torch.ops.zoo.ward(x, w[..., 1:].contiguous(), alive, surplus, 1e-4)
