"""The linear layer of every block: nn.Linear, with a faster float32 product on CPUs where MKL is slow.

On AMD processors with AVX-512, MKL (behind torch's float32 matmul) keeps to AVX2 code, while oneDNN, which torch
carries too, uses the whole width: twice the rate, forward and backward, at the same precision. Anywhere else this is
F.linear.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

MIN_PRODUCTS = 1_500_000  # rows * inputs * outputs; below it oneDNN's fixed cost of some 10 microseconds shows


class Linear(nn.Linear):
    """nn.Linear with the same parameters, names and numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., in], weight [out, in], bias [out] -> [..., out], as F.linear."""
    if not _takes_onednn(x, weight):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    return _OneDnnLinear.apply(rows, weight, bias).view(*x.shape[:-1], len(weight))


def for_products(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype that autocast, where it is on, gives every product that takes it: turned once for all of them, and
    remembered once. Their gradients of x are added up in that dtype, too."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # the meta device has none
    return x.to(torch.get_autocast_dtype(kind)) if on else x


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _product(grad, weight.t()) if needs_x else None,
            _weight_gradient(grad, x) if needs_weight else None,
            grad.sum(dim=0) if needs_bias else None,
        )


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # x @ weight.T + bias


def _weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    # grad.T @ x [out, in]. The product turns its first operand round in memory, so that is the smaller one.
    return _product(grad.t(), x.t()) if grad.shape[1] <= x.shape[1] else _product(x.t(), grad.t()).t()


def _takes_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * len(weight) >= MIN_PRODUCTS
        and onednn_is_faster()
        and not torch.is_autocast_enabled("cpu")
    )


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is an AMD processor with AVX-512, and torch has oneDNN."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and "AuthenticAMD" in cpuinfo()
    )


def cpuinfo() -> str:
    """What Linux says of the processor; nothing on other systems."""
    path = Path("/proc/cpuinfo")
    return path.read_text(errors="replace") if path.exists() else ""
