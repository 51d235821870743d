"""The adapter's products added inside the base's: y = x W^T + bias + s (x A^T) B^T as one autograd function.

The problem: computed one by one, autograd adds the two gradients of x in a pass of its own over [t, k], and y is read
and written once more. The method: the narrow product goes first and the wide one adds to it (`addmm_`, beta 1), in the
forward pass and for d x. A base in FP8 or NF4 brings its own product, so there the narrow one is added to it.

    forward   z = x A^T;  y = bias + s z B^T;  y += x W^T
    backward  dz = s dy B;  dx = dz A;  dx += dy W;  dA = dz^T x;  dB = s dy^T z

Rounding: the wide product is summed in fp32 and rounded once, with the adapter's share in it; one by one it is rounded
before and after. Where B is zero, `y` is the bias before the wide product is added, as it is in the base layer alone.
Held between the passes: x, z and the parameters, as before.

t: tokens, k and n: inputs and outputs, r: rank.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_medllm.models.frozen_base import FrozenWeight


def folded_linear(
    x: Tensor, base: Tensor | FrozenWeight, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, *, scale: float
) -> Tensor:
    """x W^T + bias + scale * (x A^T) B^T, differentiable in x, A and B.

    Args:
        x: [t, k].
        base: W [n, k], or what holds it in FP8 or NF4. It takes no gradient, nor does the bias.
        bias: [n] or None.
        lora_a: [r, k].
        lora_b: [n, r].
        scale: of the adapter, alpha / r.

    Returns:
        [t, n] in x's dtype.

    Raises:
        ValueError: the base or the bias is trained.
    """
    if (isinstance(base, Tensor) and base.requires_grad) or (bias is not None and bias.requires_grad):
        raise ValueError("folded LoRA stands on a frozen base: weight and bias take no gradient")
    return _FoldedLinear.apply(x, lora_a, lora_b, base, bias, scale)


class _FoldedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        base: Tensor | FrozenWeight,
        bias: Tensor | None,
        scale: float,
    ) -> Tensor:
        z = x @ lora_a.t()
        if isinstance(base, Tensor):
            y = _scaled_product(z, lora_b.t(), scale) if bias is None else torch.addmm(bias, z, lora_b.t(), alpha=scale)
            y.addmm_(x, base.t())
        else:
            y = base.product(x, bias)
            y.addmm_(z, lora_b.t(), alpha=scale)
        ctx.save_for_backward(x, z, lora_a, lora_b)
        ctx.base, ctx.scale = base, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        x, z, lora_a, lora_b = ctx.saved_tensors
        wants_x, wants_a, wants_b = ctx.needs_input_grad[:3]
        dx = da = db = None
        if wants_x or wants_a:
            dz = _scaled_product(dy, lora_b, ctx.scale)
            if wants_a:
                da = dz.t() @ x
            if wants_x and isinstance(ctx.base, Tensor):
                dx = (dz @ lora_a).addmm_(dy, ctx.base)
            elif wants_x:
                dx = ctx.base.input_gradient(dy).addmm_(dz, lora_a)
        if wants_b:
            db = _scaled_product(dy.t(), z, ctx.scale)
        return dx, da, db, None, None, None


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left right, rounded once and in one kernel."""
    return left.new_empty(left.shape[0], right.shape[1]).addmm_(left, right, beta=0, alpha=scale)
