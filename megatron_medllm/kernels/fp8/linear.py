"""Linear layers on block-scaled FP8: `fp8_frozen_linear` for a frozen base, `fp8_linear` for full training.

Casts, with x [T, k], W [n, k], d y [T, n]:

    product      sums over  operands                                 frozen  trained
    y = x W^T    k          x in 1 x 128, W in 128 x 128             FP8     FP8
    d x = d y W  n          d y in 1 x 128, W transposed on the fly  FP8     FP8
    d W = d y^T x  T        both transposed, in 1 x 128 along T      -       FP8

All casts are e4m3, gradients included: with a scale per 128 values its range is enough, and it has a bit more
precision than e5m2 (DeepSeek-V3, arXiv 2412.19437, section 3.3.2). What leaves a layer has the dtype of its input.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_medllm.kernels.fp8.blocks import BLOCK, BlockScaled
from megatron_medllm.kernels.fp8.products import scaled_matmul
from megatron_medllm.kernels.fp8.quantize import quantize_activation, quantize_weight, transpose_fp8


def fp8_frozen_linear(x: Tensor, weight: BlockScaled, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, where W is frozen FP8 held once; the adapter beside it is the caller's.

    Tensor parallelism as in Megatron's column and row layers, whose mappings stay with the caller.

    Args:
        x: [..., k], bf16 or fp32.
        weight: [n, k] in 128 x 128 blocks, from `quantize_weight`.
        bias: [n] or None; takes a gradient if it requires one.

    Returns:
        [..., n] in x's dtype.

    Raises:
        ValueError: shapes that do not fit, a weight in other blocks.
    """
    if weight.rows_per_scale != BLOCK or x.shape[-1] != weight.values.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} does not fit weight {tuple(weight.values.shape)} in {weight.rows_per_scale}-row blocks"
        )
    y = _FrozenLinear.apply(x.reshape(-1, x.shape[-1]), bias, weight)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])  # autograd lets a caller add to y, not to a view


def fp8_input_gradient(dy: Tensor, weight: BlockScaled) -> Tensor:
    """dy [T, n] -> dy W [T, k] in dy's dtype: the gradient that `fp8_frozen_linear` gives its input."""
    return scaled_matmul(quantize_activation(dy)[0], transpose_fp8(weight), out_dtype=dy.dtype)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: BlockScaled) -> Tensor:
        y = scaled_matmul(quantize_activation(x)[0], weight, out_dtype=x.dtype)
        if bias is not None:
            y.add_(bias)
        ctx.weight, ctx.bias_dtype = weight, None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        wants_x, wants_bias, _ = ctx.needs_input_grad
        dx = None
        if wants_x:
            dx = fp8_input_gradient(dy, ctx.weight)
        return dx, dy.float().sum(0).to(ctx.bias_dtype) if wants_bias else None, None


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, power_of_two: bool = False) -> Tensor:
    """x W^T + bias with all three products in FP8; W is cast anew from its bf16 or fp32 master at every use.

    Between the passes only x in FP8 is held (the copy that d W needs), half of what a bf16 layer holds; W is cast
    again in the backward pass rather than held. Under tensor parallelism the gradient of x is this rank's part of the
    sum, as with any Megatron linear: the caller's mapping reduces it.

    Args:
        x: [..., k], bf16 or fp32. On Hopper k, n must be multiples of 128.
        weight: [n, k].
        bias: [n] or None.
        power_of_two: round scales up to powers of two.

    Returns:
        [..., n] in x's dtype; the gradient of the weight is summed in fp32 and has the weight's dtype.
    """
    flat = x.reshape(-1, x.shape[-1])
    y = _TrainedLinear.apply(flat, weight, bias, power_of_two)
    return y.view(*x.shape[:-1], y.shape[-1])


class _TrainedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, power_of_two: bool) -> Tensor:
        wants_weight = ctx.needs_input_grad[1]
        rows, columns = quantize_activation(x, columns=wants_weight, power_of_two=power_of_two)
        y = scaled_matmul(rows, quantize_weight(weight, power_of_two=power_of_two), out_dtype=x.dtype)
        if bias is not None:
            y.add_(bias)
        ctx.save_for_backward(weight, *((columns.values, columns.scales) if columns is not None else ()))
        ctx.power_of_two, ctx.bias_dtype = power_of_two, None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        weight, *held = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        rows, columns = quantize_activation(dy, columns=wants_weight, power_of_two=ctx.power_of_two)
        dx = dw = None
        if wants_x:
            across = transpose_fp8(quantize_weight(weight, power_of_two=ctx.power_of_two))
            dx = scaled_matmul(rows, across, out_dtype=dy.dtype)
        if wants_weight and columns is not None:
            x_columns = BlockScaled(held[0], held[1], 1)
            dw = scaled_matmul(columns, x_columns, out_dtype=torch.float32).to(weight.dtype)
        dbias = dy.float().sum(0).to(ctx.bias_dtype) if wants_bias else None
        return dx, dw, dbias, None
