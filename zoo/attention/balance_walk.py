"""The self-balancing walk of BalanceKV (arXiv 2502.07861): signs that make sum_i eta_i exp(s q.k_i) v_i small for every query q at once.

Token by token: y = sum over tokens before it of G_ij eta_j; it gets +1 with probability 1/2 - c y, so that it rather pulls the sum back.
G_ij is the inner product of what tokens i and j put into the sum: exp(s k_i.k_j) <v_i, v_j>, as exp(s q.k) is an inner product of
functions of q and of k. The tokens of one sign, twice, then stand for all.

Letters: X any dimensions in front, n tokens of a set, D head size. A set's tokens come first; behind them may be rows that do not count.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 60.0  # of an exponent: n numbers of this size add up in float32. Such tokens decide each other's signs anyway


def kernel(
    k: Tensor, v: Tensor | None, valid: Tensor, temp: float = 1.0, beta: float = 0.0, plus: float = 0.0, centred: bool = True
) -> Tensor:
    """G (X, n, n), at least float32, of keys and values (X, n, D): exp(temp s <k_i, k_j> - beta) (<v_i, v_j> + plus), with the set's mean
    key subtracted where `centred`; v None: all values are 1. Rows and columns that are not `valid` (X, n) are 0."""
    k = k.to(torch.promote_types(k.dtype, torch.float32))
    if centred:
        k = k - (k * valid[..., None]).sum(-2, keepdim=True) / valid.sum(-1)[..., None, None].clamp(min=1)
    G = (k @ k.mT * (temp * k.shape[-1] ** -0.5) - beta).clamp(max=LARGEST).exp_()
    if v is not None:
        v = v.to(k.dtype)
        G *= v @ v.mT + plus
    return G * (valid[..., None] & valid[..., None, :])


def walk(G: Tensor, u: Tensor, c: Tensor | float) -> Tensor:
    """Signs eta (X, n), +1 or -1, for G (X, n, n) and u (X, n) uniform in (0, 1): eta_i = +1 where u_i < 1/2 - c sum_(j<i) G_ij eta_j.
    c: a number, or (X,). The n steps are one after the other; sets are walked side by side."""
    signs = torch.empty_like(G[..., 0])
    y = torch.zeros_like(signs)
    for i in range(G.shape[-1]):
        sign = torch.where(u[..., i] < 0.5 - c * y[..., i], 1.0, -1.0).to(G.dtype)
        signs[..., i] = sign
        y.addcmul_(G[..., i, :], sign[..., None])  # G is symmetric: a row is read faster than a column
    return signs


def halve(signs: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Exactly half of each set of n tokens, n even: which stay (X, n) bool, and their weights w, 1 or 2. With c the first token at which
    one sign has n/2 of them, those of the other sign up to c stay, with w = 2, and all behind c, with w = 1."""
    half = valid.sum(-1, keepdim=True) // 2
    plus, minus = ((signs == s) & valid for s in (1, -1))
    reached = (plus.cumsum(-1) >= half) | (minus.cumsum(-1) >= half)
    c = reached.int().argmax(-1, keepdim=True)
    other = torch.where(plus.cumsum(-1).gather(-1, c) >= half, minus, plus)
    before = torch.arange(signs.shape[-1], device=signs.device) <= c
    return valid & (other | ~before), torch.where(before, 2.0, 1.0)
