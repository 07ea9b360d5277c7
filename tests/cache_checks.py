"""Checks of the Triton kernels that fill and cluster caches, for Triton's interpreter and for GPUs.

A check takes the module that it looks at, so that mutants go through the very same one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.attention.store import SlotStore
from zoo.models.layers import Rope, Rotary, YarnScaling, turn

# Rotary embedding and write

YARN = YarnScaling(factor=4.0, original_max_position_embeddings=64, attention_factor=1.2)
ROTARY = [  # B, H, G, T, D, share of the dimensions that turn
    (1, 4, 4, 1, 64, 1.0),
    (2, 6, 2, 1, 80, 0.25),
    (2, 4, 1, 19, 128, 1.0),
    (1, 3, 1, 5, 96, 1.0),
    (2, 2, 2, 70, 16, 0.5),
    (1, 2, 1, 3, 256, 1.0),
]


def rotary_matches(
    module: Any, shape: tuple[Any, ...], dtype: torch.dtype, masses: bool, fused_layout: bool = False, device: str = "cpu"
) -> None:
    """The very bits of the eager path, which rotates and then appends; its error against float64; padding writes nothing at all."""
    B, H, G, T, D, share = shape
    g = torch.Generator().manual_seed(T + D)
    if fused_layout:  # GPT-NeoX: q, k and v of a head side by side
        q, k, v = torch.randn(B, T, H, 3, D, generator=g).to(device, dtype).permute(3, 0, 2, 1, 4)
    else:
        q, k, v = (torch.randn(B, T, h, D, generator=g).to(device, dtype).transpose(1, 2) for h in (H, G, G))
    rotary = Rotary(D, Rope(scaling=YARN, partial=share)).to(device)
    pos = torch.randint(0, 1000, (B, T), generator=g)
    if T > 1:
        pos[0, :2] = -1
    row = torch.stack([torch.randperm(T + 20, generator=g)[:T] + 1 for _ in range(B)])  # a ring names a row for padding, too
    pos, row = pos.to(device), row.to(device)
    cos, sin = rotary.tables(pos)
    stores = []
    for _ in range(2):
        s = SlotStore(B, k.shape[1], 2, D, dtype, device, shared=not masses, beside=("mass", "spikes") if masses else ())
        s.resize(T + 21, capacity=T + 40)  # views of longer storages, as in caches
        for t in s.buffers():
            t.copy_(torch.arange(t.numel(), device=device).view(t.shape) % 97)
        stores.append(s)
    mine, other = stores
    before = [t[:, :, 0].clone() for t in mine.buffers()]
    out = module.rotary_store(q, k, v, cos, sin, pos, row, mine.k, mine.v, mine.pos, mine.a, mine.mass, mine.spikes)
    other.append(row, turn(k, cos, sin), v, pos)
    assert torch.equal(out, turn(q, cos, sin)), "rotated queries"
    for (name, t), was, want in zip(mine.named_buffers(), before, other.buffers(), strict=True):
        assert torch.equal(t[:, :, 1:], want[:, :, 1:]), name
        assert torch.equal(t[:, :, 0], was), f"{name}: padding was written"
    true = turn(q.double(), cos.double(), sin.double())
    assert (out.double() - true).abs().max() <= 1.5 * (turn(q, cos, sin).double() - true).abs().max()


# Nearest centres and their sums

NEAREST = [  # A, G, N, F, M, D: one block of points and of centres, or several; one more than a whole number of blocks
    (1, 2, 7, 16, 5, 16),
    (2, 1, 33, 8, 65, 24),
    (1, 1, 97, 5, 33, 80),
    (1, 2, 64, 24, 40, 40),
]


def points(shape: tuple[int, ...], dtype: torch.dtype, device: str, whole: bool) -> dict[str, Any]:
    """Points and centres, of whole numbers where distances shall be exact and ties many; a fifth is not alive, of one head no centre."""
    A, G, N, F, M, D = shape
    g = torch.Generator().manual_seed(N * M)
    draw = lambda *size: torch.randint(-2, 3, size, generator=g).float() if whole else torch.randn(size, generator=g)  # noqa: E731
    x, centres = draw(A, G, N, F), draw(A, G, M, F)
    centres[:, :, M // 2 :] = centres[:, :, : M - M // 2].clone()  # each in another block again
    valid = torch.rand(A, G, M, generator=g) > 0.2
    if A * G > 1:
        valid[-1, -1] = False
    found = {
        "x": x.to(dtype), "centres": centres.to(dtype), "alive": torch.rand(A, G, N, generator=g) > 0.2, "valid": valid,
        "scale": 2.0 ** torch.randint(-1, 3, (A, G, F), generator=g), "tie": torch.full((A, G), 3.0),
        "limit": torch.full((A, G), 12.0), "number": torch.randint(1, 9, (A, G, N), generator=g).float(),
        "weight": torch.rand(A, G, N, generator=g), "k": torch.randn(A, G, N, D, generator=g).to(dtype),
        "v": torch.randn(A, G, N, D + 3, generator=g).to(dtype),
    }  # fmt: skip
    return {name: t.to(device) for name, t in found.items()}


def distances(p: dict[str, Any], scale: bool, wide: torch.dtype = torch.float64) -> Tensor:
    """(A, G, N, M), inf where a centre is not alive."""
    d = (p["x"].to(wide)[:, :, :, None] - p["centres"].to(wide)[:, :, None]).square()
    d = d * p["scale"].to(wide)[:, :, None, None] if scale else d
    return d.sum(-1).masked_fill(~p["valid"][:, :, None], torch.inf)


def nearest_matches(module: Any, shape: tuple[int, ...], dtype: torch.dtype, options: tuple[str, ...], device: str = "cpu") -> None:
    """Labels and distances of whole numbers, exactly, the lowest of equally near centres; of others the distance to rounding."""
    p = points(shape, dtype, device, whole=True)
    given = {name: p[name] for name in options}
    label, dist, *sums = module.nearest(p["x"], p["centres"], p["alive"], p["valid"], **given)
    d = distances(p, "scale" in options)
    least = d.amin(-1)
    bound = least + (p["tie"].double()[..., None] if "tie" in options else 0)
    index = torch.arange(d.shape[-1], device=d.device)
    want = torch.where(d <= bound[..., None], index, 2**40).amin(-1)
    near = p["alive"] & (least < torch.inf)
    near &= (least <= p["limit"][..., None]) if "limit" in options else True
    assert torch.equal(label.long(), torch.where(near, want, -1)), "labels"
    assert torch.equal(dist.double(), least.where(p["alive"], torch.inf)), "distances"
    if "weight" in options:
        sums_match(sums, p, label, {"k", "v"} & set(options))
    else:
        assert all(t.numel() == 0 for t in sums)
    p = points(shape, dtype, device, whole=False)
    label, dist, *_ = module.nearest(p["x"], p["centres"], p["alive"], p["valid"])
    d, eager = distances(p, False), distances(p, False, torch.float32)
    least, some = d.amin(-1), label >= 0
    assert torch.equal(some, p["alive"] & (least < torch.inf))
    if some.any():
        miss = (dist.double() - least)[some].abs().max()
        assert miss <= 1.5 * (eager.double() - d)[d < torch.inf].abs().max() + 2**-22 * least[some].max(), "distances"
        chosen = d.gather(-1, label.long().clamp(min=0)[..., None])[..., 0]
        assert (chosen <= least + 2**-20 * (least + 1))[some].all(), "labels"


def sums_match(sums: Any, p: dict[str, Any], label: Tensor, of: set[str]) -> None:
    """What centres add up to, within 1.5 times the error of float32 sums in another order."""
    M = p["centres"].shape[2]
    own = (label.long()[..., None] == torch.arange(M, device=label.device)).double().mT  # (A, G, M, N)
    number, weight = p["number"].double()[..., None], p["weight"].double()[..., None]
    wanted = [(own @ number)[..., 0], (own @ weight)[..., 0], *((own @ (weight * p[name].double())) for name in ("k", "v"))]
    eager = [None, (own.float() @ weight.float())[..., 0], *(own.float() @ (weight.float() * p[name].float()) for name in ("k", "v"))]
    assert torch.equal(sums[0].double(), wanted[0]), "counts"
    for name, got, want, other in zip(("weight", "k", "v"), sums[1:], wanted[1:], eager[1:], strict=True):
        if name != "weight" and name not in of:
            assert got.numel() == 0, name
            continue
        assert other is not None
        assert got.shape == want.shape, name
        assert torch.isfinite(got).all(), name
        assert (got.double() - want).abs().max() <= 1.5 * (other.double() - want).abs().max() + 2**-22 * want.abs().max(), name


def cluster_sums_match(module: Any, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> None:
    """Sums by labels that are given, keys with values or alone, the same bits each time."""
    p = points(shape, dtype, device, whole=False)
    A, G, N, _, M, _ = shape
    label = torch.randint(-1, M, (A, G, N), generator=torch.Generator().manual_seed(1)).to(device, torch.int32)
    arguments = (label, M, p["number"], p["weight"], p["k"])
    sums = module.cluster_sums(*arguments, p["v"])
    sums_match(sums, p, label, {"k", "v"})
    sums_match(module.cluster_sums(*arguments), p, label, {"k"})
    assert all(torch.equal(x, y) for x, y in zip(sums, module.cluster_sums(*arguments, p["v"]), strict=True))
