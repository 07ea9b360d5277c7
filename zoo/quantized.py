"""Weight-only int8: every linear layer's weight as int8 numbers and one float32 scale a row, chosen by torchao.

    y = scale * (W x)        W (out, in) int8, scale (out,) float32, symmetric: the largest of a row becomes 127

Half the bytes of bfloat16, so that decode, which is bound by reading weights, takes less time. Products and sums are as before, but for 2
to 16 bfloat16 rows (and one uncompiled): kernels/linear.cpp multiplies them as 16-bit whole numbers, in units of a 32,639th of the largest
of 256 columns.
The embedding keeps its numbers; where it is also the output head, the head gets an int8 copy of its own. torchao (extra `quant`) is
imported when a model is quantised, not when it runs: what runs is a plain tensor.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.models.layers import Linear

WEIGHTS = ("int8",)
FEW = 16  # rows up to which PyTorch's own int8 product is fastest; beyond, the weight is converted for a whole prompt chunk


class Int8Linear(Linear):
    """`Linear` with an int8 weight and its rows' scales."""

    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        """Moves with the model; the scales stay float32 whatever it is cast to."""
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.scale.device)
        return self

    def row(self, x: Tensor) -> Tensor:
        return super().row(x) * self.scale

    def few_rows(self, x: Tensor) -> Tensor:
        return torch.ops.zoo.linear_int8(x, self.weight, self.scale)

    def many_rows(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16:  # sums of products with numbers up to 127 exceed its range
            return F.linear(x, (self.weight * self.scale[:, None]).to(x.dtype), self.bias)
        rows = x.numel() // x.shape[-1]
        compiling = torch.compiler.is_compiling()  # Inductor cannot lower this product for several rows
        if rows <= FEW and x.device.type == "cpu" and not (compiling or x.requires_grad):  # nor has it a gradient
            y = torch.ops.aten._weight_int8pack_mm(x.reshape(rows, -1), self.weight, torch.ones_like(self.scale, dtype=x.dtype))
            y = y.view(*x.shape[:-1], -1)
        else:
            y = F.linear(x, self.weight.to(x.dtype))
        y = (y.to(torch.promote_types(x.dtype, torch.float32)) * self.scale).to(x.dtype)
        return y if self.bias is None else y + self.bias


def check(weights: str | None) -> None:
    """Raises ZooError for an unknown format, or where torchao is not installed."""
    if weights is not None and weights not in WEIGHTS:
        raise ZooError(f"weights={weights!r} is unknown; choose {', '.join(WEIGHTS)}, or leave it out")
    if weights is not None and importlib.util.find_spec("torchao") is None:
        raise ZooError(f"weights={weights} needs torchao: pip install 'torchao>=0.18'")


def quantize(model: nn.Module, weights: str | None) -> None:
    """Replace the linear layers of a loaded model, one after the other. Raises ZooError as `check` does."""
    check(weights)
    if weights is None:
        return
    torchao_log = logging.getLogger("torchao")
    level = torchao_log.level
    torchao_log.setLevel(logging.ERROR)  # it warns of its own GPU extensions, which nothing here needs
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except Exception as e:
        raise ZooError(f"torchao cannot be imported ({str(e).partition(chr(10))[0]}); pip install --upgrade torchao") from e
    finally:
        torchao_log.setLevel(level)
    for name in [name for name, module in model.named_modules() if isinstance(module, Linear)]:  # names: each weight is freed at once
        parent, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(name)
        one = nn.Sequential(nn.Linear(1, 1, bias=False, device="meta"))
        one[0].weight = nn.Parameter(module.weight.detach(), requires_grad=False)
        quantize_(one, Int8WeightOnlyConfig(set_inductor_config=False))
        made: Any = one[0].weight
        setattr(model.get_submodule(parent), leaf, Int8Linear(made.qdata, made.scale.flatten().float(), module.bias))
