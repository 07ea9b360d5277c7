"""Clusters that go on gaining members while they are kept as codes: against the means that they would be without any."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from conftest import feed
from test_caches import lms, new
from test_encoded import double
from torch import Tensor

from zoo.attention.clustering import gathered
from zoo.attention.encoding import EncodedPages
from zoo.attention.subgen_slots import Maker
from zoo.lm import LM

__all__ = ["double", "lms"]
TOKENS = 2400
AFTER = {"one": (1, 1), "several": (2, 15), "many": (16, TOKENS)}  # encodings that a slot has gone through


class Followed:
    """For each layer, head and newest position of a slot: the exact mean of its members' keys and values by the method's own weights, the
    mean square of their lengths, and how often it was encoded."""

    def __init__(self, layers: int, heads: int, size: int) -> None:
        shape = (layers, heads, TOKENS)
        self.mean = {name: torch.zeros(*shape, size, dtype=torch.float64) for name in ("k", "v")}
        self.square = {name: torch.zeros(*shape, dtype=torch.float64) for name in ("k", "v")}
        self.times = torch.zeros(shape)

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        merged = Maker.merged

        def watched(maker: Maker, slots: Any, label: Tensor, u: Tensor, count: Tensor, size: int) -> Any:
            made = merged(maker, slots, label, u, count, size)
            self.follow([layer.index for layer in maker.layers], slots, label, u.double(), size, made["pos"])
            return made

        monkeypatch.setattr(Maker, "merged", watched)

    def follow(self, layers: list[int], slots: dict[str, Tensor], label: Tensor, u: Tensor, size: int, newest: Tensor) -> None:
        layer, head = torch.tensor(layers)[:, None, None], torch.arange(label.shape[1])[:, None]
        old, new = (layer, head, slots["pos"].long().clamp(min=0)), newest >= 0
        held, members = slots["row"] >= 0, gathered(label, torch.ones_like(u), size)
        total, bins = gathered(label, u, size).clamp(min=1e-300), torch.where(label < 0, size, label)
        at = tuple(t.expand(newest.shape)[new] for t in (layer, head, newest.long()))
        for name in self.mean:
            x = torch.where(held[..., None], self.mean[name][old], slots[name].double())
            square = torch.where(held, self.square[name][old], slots[name].double().square().sum(-1))
            self.mean[name][at] = (gathered(label, u[..., None] * x, size) / total[..., None])[new]
            self.square[name][at] = (gathered(label, u * square, size) / total)[new]
        times = torch.where(held, self.times[old], 0)
        most = torch.zeros(*label.shape[:2], size + 1).scatter_reduce_(2, bins, times, "amax")[:, :, :size]
        stays = (members == 1) & (gathered(label, held.double(), size) == 1)
        self.times[at] = torch.where(stays, most, most + 1)[new]

    def errors(self, pages: EncodedPages) -> dict[tuple[str, str], tuple[float, float, float, int]]:
        """Of keys and values that were encoded once, several and many times: the error, in the rms length of members; the greatest length
        in the exact one's; all lengths in the exact ones'; how many there are."""
        found = defaultdict(list)
        for layer in range(len(self.times)):
            slots = pages.read(layer)
            there = slots["pos"][0] >= 0
            head, pos = there.nonzero()[:, 0], slots["pos"][0][there].long()
            for name, mean in self.mean.items():
                x, true, n = slots[name][0][there], mean[layer, head, pos], self.times[layer, head, pos]
                columns = ((x - true).square().sum(-1), self.square[name][layer, head, pos], x.norm(dim=-1), true.norm(dim=-1))
                for after, (low, high) in AFTER.items():
                    found[name, after].append(torch.stack(columns, -1)[(n >= low) & (n <= high)])
        out = {}
        for key, parts in found.items():
            error, square, length, exact = torch.cat(parts).unbind(-1)
            out[key] = (
                float((error.sum() / square.sum()).sqrt()),
                float((length / exact).max()),
                float(length.norm() / exact.norm()),
                len(error),
            )
        return out


@pytest.mark.parametrize(
    ("one", "more", "longest"),
    [  # longest keys and values: a mean of opposite members is short, and 2 bits do not show that
        ("kivi:bits=4", 1.4, (1.4, 1.2)),
        ("kivi:bits=8", 2.0, (1.05, 1.02)),
        ("qjl", 1.05, (1.3, 2.0)),
        ("turboquant:bits=2", 1.1, (1.2, 1.2)),
        ("turboquant:bits=3.5", 1.1, (1.15, 1.15)),
        ("turboquant:bits=3.5,mode=prod", 1.05, (1.2, 1.15)),
    ],
)
def test_means_stay_near_the_exact_ones(
    double: dict[str, LM], one: str, more: float, longest: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """subgen over 2,400 tokens: however many times a cluster has gained members, and was decoded, averaged and encoded again, it is as near
    to the mean of its members as one encoding is to a token (within the factor `more`), in units of a token's length; and it does not grow
    or shrink."""
    lm = double["llama"]
    ids = torch.randint(0, lm.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(7))
    followed = Followed(2, 2, 32)
    followed.patch(monkeypatch)
    cache: Any = new(lm, f"subgen:budget=160,when=stream+{one}")
    feed(lm, cache, ids, 1, 1000)
    assert int(followed.times.max()) > 30
    errors = followed.errors(cache[0].pages)
    for name, most in zip(("k", "v"), longest, strict=True):
        for after in AFTER:
            error, greatest, length, n = errors[name, after]
            assert n > 15
            assert error <= more * errors[name, "one"][0], (name, after, errors)
            assert greatest < most, (name, after, errors)
            assert 0.85 < length < 1.3, (name, after, errors)
