"""Inputs for kernels, and the Triton kernels' checks against the formula in float64, for Triton's interpreter and for GPUs.

A check takes the module that it looks at, so that mutants go through the very same one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.attention.backends import Kernels, kernels_ready
from zoo.attention.slots import PagedSlots, Parts, Slots, finish, merge, paged_mass, paged_parts, slot_attention, slot_mass, slot_parts
from zoo.attention.store import PAGE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [  # B, H, G, T, D, S: one split or several, one row tile or several, heads of every shipped size and a tiny one
    (1, 3, 3, 1, 64, 300),
    (2, 3, 1, 1, 80, 70),
    (1, 8, 2, 3, 128, 129),
    (1, 8, 1, 1, 128, 600),
    (1, 4, 2, 16, 96, 100),
    (1, 2, 1, 1, 256, 130),
    (2, 2, 2, 2, 16, 70),
    (1, 9, 3, 20, 64, 150),
    (1, 1, 1, 1, 64, 1),
]


def make(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, weights: bool, window: int | None, big: float = 2.0, device: str = "cpu"
) -> tuple[Tensor, Tensor, Slots]:
    """Queries at the last positions, slots in random order, a fifth of them empty, the first query of longer chunks padding; stores are
    views of longer storages, as they are in caches."""
    B, H, G, T, D, S = shape
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, H, T, D, generator=g).mul(big).to(dtype)
    k, v = (torch.randn(B, G, S + 5, D, generator=g).mul(m).to(dtype)[:, :, :S] for m in (big, 1.0))
    pos = torch.stack([torch.randperm(S + 9, generator=g)[: S + 5] for _ in range(B * (G if weights else 1))])
    pos = pos.view(B, -1, S + 5).to(torch.int32)[:, :, :S]
    pos[torch.rand(pos.shape, generator=g) < 0.2] = -1
    a = torch.randn(B, G, S + 5, generator=g)[:, :, :S] if weights else None
    q_pos = torch.arange(max(0, S - T), max(0, S - T) + T).expand(B, T).clone()
    if T > 1:
        q_pos[0, 0] = -1
    q, q_pos, k, v, pos = (t.to(device) for t in (q, q_pos, k, v, pos))
    return q, q_pos, Slots(k, v, pos, None if a is None else a.to(device), window=window)


def wide(s: Any) -> Any:
    """`Slots` or `PagedSlots` in float64."""
    return replace(s, k=s.k.double(), v=s.v.double(), a=None if s.a is None else s.a.double())


def paged(
    seed: int, dtype: torch.dtype, T: int, D: int = 64, window: int | None = None, device: str = "cpu"
) -> tuple[Tensor, Tensor, PagedSlots, Tensor]:
    """Two sequences of two heads that own 3, 0, 1 and 20 pages, behind and before pages of another layer which any query would prefer."""
    g = torch.Generator().manual_seed(seed)
    counts, before = [3, 0, 1, 20], 2
    P = 1 + before + sum(counts) + 3
    k, v = (torch.randn(P, PAGE, D, generator=g).to(dtype) for _ in range(2))
    pos, a = torch.randint(-1, 40, (P, PAGE), generator=g).to(torch.int32), torch.full((P, PAGE), 30.0)
    pos[0] = -1
    first = [1 + before + sum(counts[:i]) for i in range(4)]
    listed, owner = torch.zeros(sum(counts) + 2, dtype=torch.int32), torch.zeros(sum(counts) + 2, dtype=torch.int32)
    table, spans, at = torch.zeros(4, 20, dtype=torch.int32), torch.zeros(4, 3, dtype=torch.int32), 1
    for head, n in enumerate(counts):
        listed[at : at + n] = torch.arange(first[head], first[head] + n)
        owner[at : at + n] = head
        table[head, :n] = torch.arange(at, at + n)
        spans[head] = torch.tensor([first[head], n, at])
        a[first[head] : first[head] + n] = torch.randn(n, PAGE, generator=g)
        at += n
    q = torch.randn(2, 6, T, D, generator=g).to(dtype)
    q_pos = torch.arange(30, 30 + T).expand(2, T).clone()
    q, q_pos, spans, *slots = (t.to(device) for t in (q, q_pos, spans, k, v, pos, a, listed, owner, table))
    return q, q_pos, PagedSlots(*slots, window=window), spans


def allowed(eager: Tensor, true: Tensor, q: Tensor, slots: Slots | PagedSlots) -> Tensor:
    """1.5 times the error of the formula in the model's own dtype, and what no float32 sum is free of: one rounding of the largest score,
    which exp makes a relative error of, and of the output."""
    largest = float(q.float().norm(dim=-1).max() * slots.k.float().norm(dim=-1).max()) * q.shape[-1] ** -0.5
    return 1.5 * (eager.double() - true).abs().max() + 2**-23 * (largest + 1) * float(true.abs().max() + 1)


def close(got: Tensor, true: Tensor, bound: Tensor | float, about: str) -> None:
    assert torch.isfinite(got).all(), f"{about}: not finite"
    miss = (got.double() - true).abs().max() if got.numel() else torch.zeros(())
    assert miss <= bound, f"{about}: {float(miss):.3g} > {float(bound):.3g}"


def double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


def true_lse(parts: Parts, like: Tensor) -> Tensor:
    return torch.where(parts.den > 0, parts.max_den + parts.den.log(), -torch.inf).view(like.shape)


def attention_matches(
    module: Any, shape: tuple[int, ...], dtype: torch.dtype, weights: bool, window: int | None, big: float, device: str = "cpu"
) -> None:
    """Output, and log-sum-exp to a few roundings of the largest score; 0 and -inf where nothing is seen."""
    q, q_pos, s = make(shape, dtype, sum(shape), weights, window, big, device)
    out, lse = module.slot_attention(q, q_pos, s)
    true, parts = slot_attention(q.double(), q_pos, wide(s)), slot_parts(q.double(), q_pos, wide(s))
    close(out, true, allowed(slot_attention(q, q_pos, s), true, q, s), "output")
    want = true_lse(parts, lse)
    assert torch.equal(lse == -torch.inf, want == -torch.inf)
    close(torch.where(want > -torch.inf, lse, 0), want.where(want > -torch.inf, 0), 1e-5 * big * big + 1e-5, "log-sum-exp")
    assert (out[(lse == -torch.inf)] == 0).all()


def rising_scores_match(module: Any, device: str = "cpu") -> None:
    """Eighteen splits, each of greater scores than those before: every sum so far must shrink, again and again."""
    S, D = 4700, 64
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 1, n, D, generator=g) for n in (1, S, S))
    k = k + q * torch.linspace(0, 2, S)[:, None]
    q, k, v = (t.to(device) for t in (q, k, v))
    s = Slots(k, v, torch.arange(S, dtype=torch.int32, device=device).view(1, 1, S))
    at = torch.tensor([[S]], device=device)
    true = slot_attention(q.double(), at, wide(s))
    close(module.slot_attention(q, at, s)[0], true, allowed(slot_attention(q, at, s), true, q, s), "output of rising scores")


def pages_match(module: Any, dtype: torch.dtype, T: int, D: int, window: int | None, device: str = "cpu") -> None:
    """The same of pages; a head without a page says 0 and -inf."""
    q, q_pos, s, spans = paged(5, dtype, T, D, window, device)
    out, lse = module.page_attention(q, q_pos, s, spans)
    true = paged_parts(q.double(), q_pos, wide(s))
    ratio, eager = finish(true, torch.float64), finish(paged_parts(q, q_pos, s), dtype)
    close(out, ratio, allowed(eager, ratio, q, s), "output")
    assert (lse[0, 3:] == -torch.inf).all()
    seen = lse > -torch.inf
    assert torch.equal(seen, true_lse(true, lse) > -torch.inf)
    close(lse.where(seen, 0), true_lse(true, lse).where(seen, 0), 5e-5, "log-sum-exp")


def as_parts(found: tuple[Tensor, ...], G: int) -> Parts:
    return Parts(*(x.unflatten(1, (G, -1)) for x in found))


def parts_match(module: Any, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> None:
    """Sums apart for numerator and denominator: a and b, either alone, neither; keys without values; two halves merged are the whole."""
    q, q_pos, plain = make(shape, dtype, 3, True, 40, 2.0, device)
    G, cut = plain.k.shape[1], plain.k.shape[2] // 2
    b = torch.randn(plain.pos.shape, generator=torch.Generator().manual_seed(1)).to(device)
    b[:, :, ::5] = -torch.inf  # numerator slots
    a = torch.where(torch.arange(plain.pos.shape[2], device=device) % 7 == 3, -torch.inf, plain.a)  # denominator slots
    for s in (replace(plain, a=a, b=b), replace(plain, a=None, b=b), replace(plain, b=None), replace(plain, a=None)):
        ws = replace(wide(s), b=double(s.b))
        true = slot_attention(q.double(), q_pos, ws)
        bound = allowed(slot_attention(q, q_pos, s), true, q, s)
        close(finish(as_parts(module.slot_parts(q, q_pos, s), G), dtype), true, bound, "output of parts")

        def half(where: slice, s: Slots = s) -> Parts:
            a, b = (None if x is None else x[:, :, where] for x in (s.a, s.b))
            return as_parts(module.slot_parts(q, q_pos, Slots(s.k[:, :, where], s.v[:, :, where], s.pos[:, :, where], a, b, s.window)), G)

        close(finish(merge(half(slice(cut)), half(slice(cut, None))), dtype), true, bound, "output of two halves")
    keys = replace(plain, v=plain.v[..., :0])
    found, want = as_parts(module.slot_parts(q, q_pos, keys), G), slot_parts(q.double(), q_pos, wide(plain))
    assert found.num.shape[-1] == 0
    lse = true_lse(want, found.den)
    close(true_lse(found, found.den).where(lse > -torch.inf, 0), lse.where(lse > -torch.inf, 0), 1e-4, "log-sum-exp of keys")


def rounding(lse: Tensor, power: int, mass: Tensor) -> float:
    """What a mass owes to the statistics that it is given: one rounding of the largest score and of its log-sum-exp."""
    return 2**-23 * power * float(lse.where(lse > -torch.inf, 0).abs().max() + 1) * float(mass.max() + 1)


def mass_matches(module: Any, shape: tuple[int, ...], dtype: torch.dtype, weights: bool, window: int | None, device: str = "cpu") -> None:
    """What each slot received, to the powers 1 and 2, weighted by query; nothing for empty slots, and nothing at all for weights of 0."""
    q, q_pos, s = make(shape, dtype, sum(shape) + 1, weights, window, 2.0, device)
    weight = torch.rand(shape[0], shape[3], generator=torch.Generator().manual_seed(2)).to(device)
    true, eager = slot_parts(q.double(), q_pos, wide(s)), slot_parts(q, q_pos, s)
    lse = true_lse(true, q[..., 0]).float()
    for got, power in zip(module.slot_mass(q, q_pos, s, lse, weight), (1, 2), strict=True):
        want = slot_mass(q.double(), q_pos, wide(s), true, weight.double(), power)
        miss = (slot_mass(q, q_pos, s, eager, weight, power).double() - want).abs().max()
        close(got, want, 1.5 * miss + rounding(lse, power, want), f"mass to the power {power}")
        assert (got[s.pos.expand(got.shape) < 0] == 0).all()
    for got in module.slot_mass(q, q_pos, s, lse, torch.zeros_like(weight)):
        assert (got == 0).all()
    if weights:  # it is the denominator's that count
        apart = replace(s, a=torch.zeros_like(s.a), b=s.a)
        assert torch.equal(
            torch.stack(module.slot_mass(q, q_pos, apart, lse, weight)), torch.stack(module.slot_mass(q, q_pos, s, lse, weight))
        )


def page_mass_matches(module: Any, dtype: torch.dtype, T: int, window: int | None, device: str = "cpu") -> None:
    """The same of the pages in a layer's list."""
    q, q_pos, s, spans = paged(6, dtype, T, 64, window, device)
    w = wide(s)
    true, eager = paged_parts(q.double(), q_pos, w), paged_parts(q, q_pos, s)
    weight = torch.rand(2, T, generator=torch.Generator().manual_seed(2)).to(device)
    lse = true_lse(true, q[..., 0]).float()
    for got, power in zip(module.page_mass(q, q_pos, s, spans, lse, weight), (1, 2), strict=True):
        want = paged_mass(q.double(), q_pos, w, true, weight.double(), power)
        miss = (paged_mass(q, q_pos, s, eager, weight, power).double() - want).abs().max()
        close(got, want, 1.5 * miss + rounding(lse, power, want), f"mass of pages to the power {power}")
        assert want.max() > 0.01


def kernels_match(mine: Kernels, T: int, device: str = "cpu") -> None:
    """Tail and pages in one softmax are the formula of both, with what each received; and so is a tail alone."""
    q, q_pos, p, spans = paged(5, torch.float32, T, device=device)
    _, _, tail = make((2, 6, 2, T, 64, 40), torch.float32, 1, False, None, device=device)
    weight = torch.rand(2, T, generator=torch.Generator().manual_seed(2)).to(device)
    of_tail = slot_parts(q.double(), q_pos, wide(tail))
    for pages, true in ((p, merge(of_tail, paged_parts(q.double(), q_pos, wide(p)))), (None, of_tail)):
        out, (*sums,), (*settled,) = mine.attention_and_mass(q, q_pos, tail, pages, spans, weight)
        assert torch.equal(out, mine.attention(q, q_pos, tail, pages, spans)[0])
        close(out, finish(true, torch.float64), 1e-4, "output")
        for i in range(2):
            close(sums[i], slot_mass(q.double(), q_pos, wide(tail), true, weight.double(), i + 1), 1e-4, "mass of the tail")
            if pages is not None:
                close(settled[i], paged_mass(q.double(), q_pos, wide(p), true, weight.double(), i + 1), 1e-4, "mass of pages")


def sums_repeat(of_slots: Any, of_mass: Any, device: str = "cpu") -> None:
    """The same bits every time. The interpreter knows only one order: what it shows is that this check runs."""
    q, q_pos, s = make((1, 4, 2, 16, 64, 3000 if device == "cuda" else 600), torch.bfloat16, 1, True, None, device=device)
    weight = torch.ones(1, 16, device=device)
    out, lse = of_slots.slot_attention(q, q_pos, s)
    first = of_mass.slot_mass(q, q_pos, s, lse, weight)
    for _ in range(20 if device == "cuda" else 1):
        again = of_slots.slot_attention(q, q_pos, s)
        assert torch.equal(out, again[0])
        assert torch.equal(lse, again[1])
        assert torch.equal(torch.stack(first), torch.stack(of_mass.slot_mass(q, q_pos, s, lse, weight)))


def microseconds(run: Callable[[], Any]) -> float:
    import triton.testing

    return 1000 * triton.testing.do_bench(run, warmup=50, rep=200, return_mode="median")


def graphs(step: Callable[..., Tensor], *args: Any, aot: bool = False) -> tuple[list[torch.fx.GraphModule], Tensor]:
    """The graphs that Dynamo makes of a step, without breaks, and what it returns. aot: taken through AOTAutograd, as by backends that
    compile: it refuses some of them."""
    made: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        made.append(graph)
        return aot_eager(graph, inputs) if aot else graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        return made, torch.compile(step, backend=keep, fullgraph=True)(*args)


def targets(graph: torch.fx.GraphModule) -> list[str]:
    """What a graph calls, nested regions included, in order."""
    modules = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
    return [str(node.target) for m in modules for node in m.graph.nodes if node.op in ("call_function", "call_method")]


def calls(graph: torch.fx.GraphModule) -> set[str]:
    """Names of the operators of zoo among them."""
    return {t.removeprefix("zoo.").partition(".")[0] for t in targets(graph) if t.startswith("zoo.")}


def calls_of_a_step(lm: Any, cache: Any, ids: Tensor) -> set[str]:
    """Those of the compiled step that feeds ids (B,); the cache is another one afterwards."""
    pos = cache.positions(1)
    cache.reserve(pos)
    made, _ = graphs(lm.step.eager, ids[:, None], pos, cache)
    return set().union(*map(calls, made))


def require_cpu_kernels() -> None:
    """Skip the module where they cannot be built."""
    if not kernels_ready():
        pytest.skip("no C++ compiler: the CPU kernels cannot be built", allow_module_level=True)


def well_behaved(operator: Any, *args: Any) -> None:
    """PyTorch's own checks of an operator: schema, fake tensors, tracing."""
    torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"))


class Called(TorchDispatchMode):
    """What operators of zoo run: `with Called() as called`, then called.names."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "zoo":
            self.names.add(func._schema.name.removeprefix("zoo::"))
        return func(*args, **(kwargs or {}))
