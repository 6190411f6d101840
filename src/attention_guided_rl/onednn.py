"""oneDNN: frozen linear layers in float32 on a CPU, by a library that is faster than the one PyTorch takes.

In: a model. Out: the same functions up to rounding. For float32 PyTorch takes MKL's matrix product; on an AMD EPYC that
reads the weights at a fraction of the memory's rate where few rows meet many weights, as in writing. oneDNN is part of
PyTorch, too, and `torch.compile` computes with the operations below; what reaches them publicly copies every input.
Where they are missing, nothing changes.
"""

import platform
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_reordered: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
MIN_WEIGHTS = 2**16
"""Of a layer. Below, what a call costs is more than is saved."""
_ALONE: Any = "none", [], ""  # nothing is computed of the product at once


class OneDnnLinear(nn.Linear):
    """A linear layer that passes gradients on and has none of its own.

    `packed`: weights to compute with in place of its own while nothing is trained, from `pack`.
    """

    packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b."""
        if torch.is_grad_enabled() and x.requires_grad:
            flat = x.reshape(-1, self.in_features)
            output = _Product.apply(flat, self.weight, self.bias)  # type: ignore[no-untyped-call]
            # what is added in place to a view costs copies of the whole gradient on the way back
            return output if x.dim() == 2 else output.view(*x.shape[:-1], self.out_features)
        return _linear(x, self.weight if self.packed is None else self.packed, self.bias, *_ALONE)


def available() -> bool:
    """Return whether this machine and this PyTorch have what it takes."""
    x86 = platform.machine() in ("x86_64", "AMD64")  # nothing was measured elsewhere
    return x86 and torch.backends.mkldnn.is_available() and None not in (_linear, _reordered)


def use_onednn(model: nn.Module) -> None:
    """Make every frozen linear layer of some size one of the kind above, if it is in float32 on an x86 CPU.

    Its class is all that changes: names, weights and what is saved stay.
    """
    if not available():
        return
    for module in model.modules():
        if type(module) is nn.Linear and _fits(module.weight):
            module.__class__ = OneDnnLinear


def pack(weight: Tensor) -> Tensor:
    """Return a copy of weights (out, in), ordered as they are fastest read; for `OneDnnLinear.packed` alone."""
    return _reordered(weight)


class _Product(torch.autograd.Function):
    """x Wᵀ + b with the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _linear(x, weight, bias, *_ALONE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _linear(gradient, weight.t(), None, *_ALONE), None, None


def _fits(weight: Tensor) -> bool:
    frozen_32_bits = weight.dtype == torch.float32 and not weight.requires_grad
    return frozen_32_bits and weight.device.type == "cpu" and weight.numel() >= MIN_WEIGHTS
