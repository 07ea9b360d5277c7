"""What queries to come will attend to, judged by those so far (expected attention).

    queries, rotated back by their positions, are taken for Gaussian, with their mean and covariance
    M = average over positions p ahead of R_p (C + mu mu^T) R_p^T,  m = average of R_p mu
    expected attention_j = softmax_j(s m.k_j + s^2/2 k_j (M - m m^T) k_j)
While a prompt is read, every 8th query enters the sums: H (D^2 + D) float32 numbers a layer. Once the prompt has been compressed, only the
means and, for each group of heads, the 8 main directions of its covariance stay: (H + 8 G) D numbers in the model's dtype. Later turns are
added to them; the queries of decoded tokens are not looked at.
Letters: B batch, T queries, H query heads, G key/value heads (R = H/G), N keys of a head, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

EVERY = 8  # of so many queries one enters the sums
RANK = 8  # directions of a group's covariance that outlast the prompt
MEMORY = 256  # counted queries, 2,048 tokens
AHEAD = range(0, 512, 32)  # how far ahead of the newest token the expectation looks


@dataclass(frozen=True)
class Statistics:
    """What is known of the queries of one layer, or of several, whose sequences then follow one another."""

    rotary: Any
    sum: Tensor  # (B, 1, H, D) and square (B, 1, H, D, D): over every 8th query, and over its outer products; float32
    square: Tensor
    count: Tensor  # (B,): how many; -1 = they have been summarised
    known: Tensor  # (B,): how many the summary stands for
    mean: Tensor  # (B, H, D) and factor (B, G, D, RANK): the summary
    factor: Tensor

    @classmethod
    def of(cls, several: Sequence[Queries]) -> Statistics:
        """Those of several layers as one."""
        parts = zip(*((q.sum, q.square, q.count, q.known, q.mean, q.factor) for q in several), strict=True)
        return cls(several[0].rotary[0], *(torch.cat(part) for part in parts))

    def attention(self, k: Tensor, seen: Tensor, count: Tensor) -> Tensor:
        """The attention that queries behind lengths seen (B,) are expected to give to keys k (B, G, N, D), summed over a group's query
        heads (B, G, N), if they are Gaussian: softmax of s mu.k + s^2/2 k.C k + log n. count (B, G, N): the n tokens behind each key; 0 =
        nothing there."""
        mean, cov = self.future(seen)
        B, G, _, D = k.shape
        wide, scale = k.float(), D**-0.5
        k = k if k.dtype == torch.bfloat16 else wide  # float16 would overflow
        mean, cov = mean.view(B, G, -1, D), (0.5 * scale**2 * cov).view(B, G, -1, D, D).to(k.dtype)
        logit = scale * wide @ mean.mT  # (B, G, N, R)
        for r in range(mean.shape[2]):
            logit[..., r] += (k @ cov[:, :, r]).float().mul_(wide).sum(-1)  # `vecdot` took three times as long
        return torch.where(count > 0, (logit + count.log()[..., None]).softmax(2).sum(-1), 0.0)

    def future(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, H, D) and covariance (B, H, D, D) of the queries to come: those so far, turned to the positions ahead."""
        first = (self.count > 0) & (self.known == 0)  # of a first prompt the sums themselves, of later ones what they add to the summary
        ahead = seen[:, None] + torch.tensor(AHEAD, device=seen.device)
        if bool(first.all()):
            mean, second = self.measured(ahead)
        else:
            mean, second = self.summary(ahead)
            if bool(first.any()):
                other = self.measured(ahead)
                mean = torch.where(first[:, None, None], other[0], mean)
                second = torch.where(first[:, None, None, None], other[1], second)
        return mean, second - mean[..., None] * mean[..., None, :]

    def measured(self, ahead: Tensor) -> tuple[Tensor, Tensor]:
        """From the sums: mean (B, H, D) and second moment (B, H, D, D) over the positions ahead (B, P)."""
        n = self.count.clamp(min=1)[:, None, None]
        mean, second = self.sum[:, 0] / n, self.square[:, 0] / n[..., None]
        D, P = mean.shape[-1], ahead.shape[1]
        eye = torch.eye(D, device=ahead.device).expand(len(ahead), P, D, D).transpose(1, 2)
        turn = self.rotary.rotate(eye, ahead).transpose(1, 2)  # (B, P, D, D): x @ turn[p]
        total = torch.zeros_like(second)
        for p in range(P):
            total += turn[:, None, p].mT @ second @ turn[:, None, p]
        return mean @ turn.mean(1), total / P

    def summary(self, ahead: Tensor) -> tuple[Tensor, Tensor]:
        """The same from what `summarize` kept."""
        (B, H, D), G, P = self.mean.shape, self.factor.shape[1], ahead.shape[1]
        each = torch.cat((self.mean, self.factor.mT.flatten(1, 2)), 1).float()  # (B, H + G RANK, D)
        turned = self.rotary.rotate(each[:, :, None].expand(-1, -1, P, -1), ahead)
        means, spread = turned[:, :H], turned[:, H:].reshape(B, G, -1, D)
        second = (means.mT @ means).view(B, G, -1, D, D) + (spread.mT @ spread)[:, :, None]
        return means.mean(2), second.view(B, H, D, D) / P


class Queries(nn.Module):
    """Statistics of one layer's queries."""

    sum: Tensor  # as in Statistics; freed when not needed
    square: Tensor
    count: Tensor  # (B,): how many; -1 = this sequence's have been summarised, and it learns no more before the next prompt
    known: Tensor
    mean: Tensor
    factor: Tensor
    start: Tensor  # (B,): where the prompt or turn began; every 8th query from there on counts, so that each has at least one
    OPEN: ClassVar[dict[str, int]] = {"sum": 1, "square": 1}

    def __init__(self, config: Any, rotary: Any, batch: int, dtype: torch.dtype, device: Any) -> None:
        super().__init__()
        self.rotary = [rotary]  # the model's module, in a list so that it is not part of this state
        G, H, D = config.num_key_value_heads, config.num_attention_heads, config.head_dim
        self.register_buffer("sum", torch.zeros(batch, 1, H, D, device=device))
        self.register_buffer("square", torch.zeros(batch, 1, H, D, D, device=device))
        for name in ("count", "known"):
            self.register_buffer(name, torch.zeros(batch, device=device))
        self.register_buffer("start", torch.zeros(batch, dtype=torch.int64, device=device))
        self.register_buffer("mean", torch.zeros(batch, H, D, dtype=dtype, device=device))
        self.register_buffer("factor", torch.zeros(batch, G, D, RANK, dtype=dtype, device=device))

    @property
    def learning(self) -> bool:
        return self.sum.shape[1] > 0

    def learn(self, q: Tensor, pos: Tensor) -> None:
        """Add every 8th of the queries q (B, H, T, D) at pos (B, T) to the statistics."""
        counts = (pos >= 0) & ((pos - self.start[:, None]) % EVERY == 0) & (self.count >= 0)[:, None]
        columns = counts.any(0).nonzero()[:, 0]
        if len(columns):
            counts = counts[:, columns]
            x = self.rotary[0].unrotate(q[:, :, columns].float(), pos[:, columns].clamp(min=0)) * counts[:, None, :, None]
            self.sum += x.sum(2)[:, None]
            self.square += (x.mT @ x)[:, None]
            self.count += counts.sum(1)

    def forget(self, forget: bool) -> None:
        if forget == (self.sum.shape[1] > 0):
            for name in ("sum", "square"):
                old = getattr(self, name)
                setattr(self, name, old.new_zeros(old.shape[0], 0 if forget else 1, *old.shape[2:]))
            self.count.zero_()

    def summarize(self, which: Tensor) -> None:
        """Add what the sequences that `which` (B,) names have learned to their summary, and empty their sums; they learn no more before the
        next prompt. A summary never counts for more than MEMORY queries, so that it follows the text."""
        which = which & (self.count > 0)
        if not self.sum.shape[1] or not bool(which.any()):
            return
        n = self.count.clamp(min=1)[:, None, None]
        mean, second = self.sum[:, 0] / n, self.square[:, 0] / n[..., None]
        B, G, D, _ = self.factor.shape
        grouped = lambda t: t.view(B, G, -1, D, D).mean(2)  # noqa: E731  a group's heads share a covariance
        cov = grouped(second - mean[..., None] * mean[..., None, :])
        new = self.count.clamp(min=0) / (self.count.clamp(min=0) + self.known).clamp(min=1)
        apart, old, share = mean - self.mean.float(), self.factor.float(), new[:, None, None, None]
        cov = share * cov + (1 - share) * (old @ old.mT + share * grouped(apart[..., None] * apart[..., None, :]))
        mean = torch.lerp(self.mean.float(), mean, new[:, None, None])
        values, vectors = torch.linalg.eigh(cov)
        factor = vectors[..., -RANK:] * values[..., None, -RANK:].clamp(min=0).sqrt()
        self.mean.copy_(torch.where(which[:, None, None], mean.to(self.mean.dtype), self.mean))
        self.factor.copy_(torch.where(which[:, None, None, None], factor.to(self.factor.dtype), self.factor))
        self.known.copy_(torch.where(which, (self.known + self.count).clamp(max=MEMORY), self.known))
        self.count.masked_fill_(which, -1)
        for total in (self.sum, self.square):
            total.masked_fill_(which.view(-1, *[1] * (total.dim() - 1)), 0)
