"""kernels/rotary_store.py and kernels/nearest.py in Triton's interpreter, and where caches call them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cache_checks as checks
import pytest
import torch
from cache_checks import NEAREST, ROTARY
from conftest import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DTYPES
from mutants import is_caught
from torch import Tensor
from zoo.kernels import launch, nearest, rotary_store

import zoo
from zoo.attention import backends, clustering
from zoo.attention.full import FullCache
from zoo.attention.subgen import SubGen
from zoo.models.layers import Rope, Rotary

pytestmark = pytest.mark.usefixtures("nan_filled")

OPTIONS = [(), ("tie", "limit"), ("scale",), ("number", "weight"), ("tie", "limit", "scale", "number", "weight", "k", "v")]


@pytest.mark.parametrize("masses", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROTARY)
def test_rotary_store(shape: tuple[Any, ...], dtype: torch.dtype, masses: bool) -> None:
    checks.rotary_matches(rotary_store, shape, dtype, masses, fused_layout=shape[1] == shape[2])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", NEAREST)
def test_nearest(shape: tuple[int, ...], options: tuple[str, ...]) -> None:
    checks.nearest_matches(nearest, shape, torch.float32, options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", NEAREST)
def test_cluster_sums(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    checks.cluster_sums_match(nearest, shape, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nearest_of_short_numbers(dtype: torch.dtype) -> None:
    checks.nearest_matches(nearest, NEAREST[1], dtype, OPTIONS[-1])


few = st.integers(1, 2)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    few,
    st.sampled_from([1, 2, 4]),
    few,
    st.integers(1, 40),
    st.sampled_from([16, 40, 64, 80]),
    st.sampled_from([0.25, 0.5, 1.0]),
    st.booleans(),
)
def test_rotary_store_of_any_shape(B: int, R: int, G: int, T: int, D: int, share: float, masses: bool) -> None:
    checks.rotary_matches(rotary_store, (B, G * R, G, T, D, share), torch.bfloat16, masses)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(few, few, st.integers(1, 50), st.integers(1, 20), st.integers(1, 70), st.integers(1, 40), st.sampled_from(OPTIONS))
def test_nearest_of_any_shape(A: int, G: int, N: int, F: int, M: int, D: int, options: tuple[str, ...]) -> None:
    checks.nearest_matches(nearest, (A, G, N, F, M, D), torch.float32, options)
    checks.cluster_sums_match(nearest, (A, G, N, F, M, D), torch.float32)


def test_no_points_and_no_centres() -> None:
    p = checks.points((1, 2, 7, 4, 5, 6), torch.float32, "cpu", True)
    label, dist, *_ = nearest.nearest(p["x"], p["centres"][:, :, :0], p["alive"], p["valid"][:, :, :0])
    assert (label == -1).all()
    assert (dist == torch.inf).all()
    sums = nearest.cluster_sums(label, 5, p["number"], p["weight"], p["k"], p["v"])
    assert all((t == 0).all() for t in sums)
    label, dist, *_ = nearest.nearest(p["x"][:, :, :0].contiguous(), p["centres"], p["alive"][:, :, :0].contiguous(), p["valid"])
    assert label.shape == dist.shape == (1, 2, 0)


# Operators


def test_operators_are_well_behaved() -> None:
    """Schemas, fake tensors and tracing, by PyTorch's own checks; and what they refuse."""
    p, ops = checks.points((1, 2, 7, 4, 5, 6), torch.float32, "cpu", True), torch.ops.zoo
    whole = [p[n] for n in ("x", "centres", "alive", "valid", "scale", "tie", "limit", "number", "weight", "k", "v")]
    for arguments in (whole[:4], whole, [*whole[:4], None, None, None, *whole[7:9]]):
        torch.library.opcheck(ops.nearest_triton.default, tuple(arguments))
    label = torch.zeros(1, 2, 7, dtype=torch.int32)
    for rest in ((p["k"],), (p["k"], p["v"])):
        torch.library.opcheck(ops.cluster_sums_triton.default, (label, 5, p["number"], p["weight"], *rest))
    with pytest.raises(RuntimeError, match="centres must be a contiguous float32 of shape"):
        nearest.nearest(p["x"], p["centres"][..., :2], p["alive"], p["valid"])
    with pytest.raises(RuntimeError, match="alive must be a contiguous bool"):
        nearest.nearest(p["x"], p["centres"], p["alive"].int(), p["valid"])
    with pytest.raises(RuntimeError, match="label must be a contiguous int32"):
        nearest.cluster_sums(label.long(), 5, p["number"], p["weight"])

    q, k, v = (torch.randn(1, h, 3, 16) for h in (4, 2, 2))
    pos, row = torch.arange(3)[None], torch.arange(1, 4)[None]
    store = [torch.zeros(1, 2, 9, 16), torch.zeros(1, 2, 9, 16), torch.full((1, 1, 9), -1, dtype=torch.int32)]
    cos, sin = Rotary(16, Rope()).tables(pos)
    masses = [torch.ones(1, 2, 9) for _ in range(3)]
    for beside in ([None] * 3, masses):
        torch.library.opcheck(ops.rotary_store_triton.default, (q, k, v, cos, sin, pos, row, *store, *beside))
    assert torch.Tag.flexible_layout in ops.rotary_store_triton.default.tags, "a compiled step would copy the cache before each call"
    for wrong, says in (
        ((q, k, v, cos, sin, pos[:, :2], row, *store), "do not fit one another"),
        ((q, k.half(), v, cos, sin, pos, row, *store), "must have one dtype"),
        ((q, k, v, cos, sin, pos.int(), row, *store), "int64"),
        ((q, k, v, cos, sin, pos, row, store[0].mT.contiguous().mT, *store[1:]), "one after the other"),
        ((q, k, v, cos, sin, pos, row, store[0][:, :1], *store[1:]), "store"),
    ):
        with pytest.raises(RuntimeError, match=says):
            rotary_store.rotary_store(*wrong)


# Mutants


def rotary_check(m: Any) -> None:
    for shape, dtype, masses in ((ROTARY[2], torch.float32, True), (ROTARY[1], torch.bfloat16, False), (ROTARY[4], torch.bfloat16, True)):
        checks.rotary_matches(m, shape, dtype, masses)


def nearest_check(m: Any) -> None:
    for options in OPTIONS:
        checks.nearest_matches(m, NEAREST[1], torch.float32, options)
    checks.nearest_matches(m, NEAREST[2], torch.float32, ())
    checks.cluster_sums_match(m, NEAREST[2], torch.float32)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("left * c - right * s", "left * c + right * s"),
        ("right * c + left * s", "right * c - left * s"),
        ("+ pair[None, :] + N, mask=both).to", "+ pair[None, :] + N // 2, mask=both).to"),  # the wrong partner
        ("(b * angle_b + t * angle_t)", "(b * angle_b + t * 0)"),  # every token turns like the first
        ("if D > 2 * N:", "if D > 32 * N:"),  # what does not turn is left out
        ("rounded(left * c - right * s, dtype)", "(left * c - right * s).to(dtype)"),  # cut off, here, in place of rounded
        ("keep = live & (at >= 0)", "keep = live"),  # padding is written
        ("tl.load(v + (b * v_b", "tl.load(k + (b * v_b"),
        ("g = (head - H).to(tl.int64)", "g = (head - H).to(tl.int64) * 0"),  # all heads write the first one's rows
        ("if g < pos_heads:", "if g < 1:"),  # positions of the first head only
        ("tl.store(mass + b * mass_b", "tl.store(spikes + b * mass_b"),
        ("live, t = t < T,", "live, t = t < T - 1,"),
    ],
)
def test_mutants_of_rotary_store_fail(old: str, new: str, tmp_path: Path) -> None:
    is_caught(rotary_check, rotary_store, old, new, tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("apart * apart if scale is None", "apart if scale is None"),  # no square
        ("tl.load(scale + head * F + f) * apart", "1.0 * apart"),  # the scale is forgotten
        ("low < least, first", "low <= least, first"),  # of equally near centres the last block's
        ("d <= bound[:, None]", "d < bound[:, None]"),
        ("least <= tl.load(limit + head)", "least < tl.load(limit + head)"),
        ("near = here & (least", "near = (least"),  # points that are not alive
        ("(tl.load(valid + head * M + j, mask=j < M, other=0) != 0)[None, :]", "(j < M)[None, :]"),  # centres that are not
        ("range(0, M, BLOCK_J)", "range(0, M - 1, BLOCK_J)"),  # the one centre of the last block
        ("range(0, N, BLOCK_I)", "range(0, N - 1, BLOCK_I)"),
        ("tl.dot(w, key", "tl.dot(own.to(tl.float32), key"),  # keys without their weights
        ("own, tl.load(number", "own, tl.load(weight"),  # counts and weights swapped
        ("tl.dot(w, value", "tl.dot(w, 2 * value"),
        ("part * BLOCK_D + tl.arange", "0 * BLOCK_D + tl.arange"),  # only the first dimensions
    ],
)
def test_mutants_of_nearest_fail(old: str, new: str, tmp_path: Path) -> None:
    is_caught(nearest_check, nearest, old, new, tmp_path)


def test_the_checks_pass_what_is_right() -> None:
    rotary_check(rotary_store)
    nearest_check(nearest)


# Where they are called


def test_clusterings_agree() -> None:
    """Centres, labels and radii by the kernel are those without it, for heads of different numbers and points that are not alive."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2, 2, 90, 6, generator=g)
    x[:, :, 40:50] = x[:, :, :10]  # equal points
    alive, most = torch.rand(2, 2, 90, generator=g) > 0.2, torch.tensor([[9, 20], [1, 14]])
    by_kernel = backends.clustering("triton", torch.device("cpu"), torch.float32)
    calls: list[Any] = [
        lambda by: clustering.coverage(x, alive, most, x[..., 0], most // 4, by),
        lambda by: clustering.cover(x, alive, 2.0, most, by),
        lambda by: clustering.k_center(x, alive, most, by),
    ]
    for call in calls:
        launch.launches.clear()
        both = [out if isinstance(out, tuple) else (out,) for out in (call(None), call(by_kernel))]
        assert launch.launches["assign"] > 0
        assert all(torch.equal(mine, kernel) for mine, kernel in zip(*both, strict=True))
    (counts, found), (counts_k, found_k) = (clustering.radii(x, alive, most, by) for by in (None, by_kernel))
    assert torch.equal(counts, counts_k)
    assert (found - found_k).abs().max() < 1e-4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two layers of a Llama and of a GPT-NeoX, a quarter of whose dimensions turn."""
    made = tmp_path_factory.mktemp("models")
    size = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
    return {
        "llama": str(write_checkpoint(made / "llama", "llama", **size, num_key_value_heads=1, head_dim=16)),
        "gpt_neox": str(write_checkpoint(made / "neox", "gpt_neox", **size)),
    }


def logits(folder: str, attn: str, backend: str, prompt: int, steps: int, first: str | None = None) -> Tensor:
    """Of a prompt and of steps, two sequences. `first`: the prompt's backend, if it is another one."""
    lm = zoo.load(folder, attn=attn, dtype="float32", backend=first or backend, compile="off")
    ids = torch.randint(0, lm.config.vocab_size, (2, prompt + steps), generator=torch.Generator().manual_seed(2))
    cache = lm.new_cache(2)
    out = [lm.prefill(ids[:, :prompt], cache, [prompt, prompt - 5])]
    for layer in cache:
        layer.backend = backend
    return torch.stack([*out, *(lm.decode_step(ids[:, t], cache) for t in range(prompt, prompt + steps))])


@pytest.mark.parametrize(
    ("family", "attn", "prompt", "steps", "kernels"),
    [
        ("llama", "full", 20, 4, {"rotate_and_store"}),
        ("gpt_neox", "full", 20, 4, {"rotate_and_store"}),
        ("llama", "sliding:window=12", 20, 4, {"rotate_and_store"}),
        ("llama", "subgen:budget=128", 190, 3, {"rotate_and_store", "add_up"}),
        ("llama", "subgen:delta=9", 126, 3, {"rotate_and_store", "assign", "add_up"}),
        ("llama", "subgen_kcenter:budget=64,weight=true", 67, 2, {"rotate_and_store", "assign"}),
        ("llama", "subgen_paper:delta=4,t=2,s=16", 70, 4, {"rotate_and_store", "assign"}),
    ],
)
def test_generation(
    folders: dict[str, str], family: str, attn: str, prompt: int, steps: int, kernels: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The eager path's logits, and the kernels ran: the rotary one in every layer of every call whose rows it may write at once. What is
    clustered while decoding is clustered of both layers at once, here the first sequence's; long prompts by these kernels are too slow."""
    monkeypatch.setattr(SubGen, "slots", lambda self, tokens: 64)  # by delta, clustering begins after so many tokens, not 512
    launch.launches.clear()
    mine = logits(folders[family], attn, "triton", prompt, steps, "eager" if prompt > 100 else None)
    assert all(launch.launches[name] for name in kernels), launch.launches
    whole = 0 if attn.startswith("sliding") else 1
    if prompt < 64:
        assert launch.launches["rotate_and_store"] == 2 * (steps + whole)
    assert (mine - logits(folders[family], attn, "eager", prompt, steps)).abs().max() < 1e-3


def test_a_method_with_its_own_attend_gets_rotated_tensors(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    want, seen = logits(folders["llama"], "full", "triton", 20, 3), []

    def attend(self: FullCache, q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
        seen.append(k)
        return super(FullCache, self).attend(q, k, v, pos)

    monkeypatch.setattr(FullCache, "attend", attend, raising=False)
    launch.launches.clear()
    assert torch.equal(logits(folders["llama"], "full", "triton", 20, 3), want)
    assert len(seen) == 8
    assert not launch.launches["rotate_and_store"]
