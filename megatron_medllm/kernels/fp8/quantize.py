"""Casts into block-scaled FP8: Triton on CUDA, plain torch elsewhere."""

from typing import Literal, overload

import torch
from torch import Tensor

from megatron_medllm.kernels.backend import triton_installed
from megatron_medllm.kernels.fp8 import blocks
from megatron_medllm.kernels.fp8.blocks import BLOCK, BlockScaled

Backend = Literal["auto", "torch", "triton"]


@overload
def quantize_activation(
    x: Tensor, *, columns: Literal[True], power_of_two: bool = False, backend: Backend = "auto"
) -> tuple[BlockScaled, BlockScaled]: ...


@overload
def quantize_activation(
    x: Tensor, *, columns: bool = False, power_of_two: bool = False, backend: Backend = "auto"
) -> tuple[BlockScaled, BlockScaled | None]: ...


def quantize_activation(
    x: Tensor, *, columns: bool = False, power_of_two: bool = False, backend: Backend = "auto"
) -> tuple[BlockScaled, BlockScaled | None]:
    """Cast an activation or a gradient.

    Args:
        x: [m, k] of any float dtype.
        columns: also cast x.t() along m, which a weight gradient sums over; read from memory once.
        power_of_two: round scales up to powers of two.
        backend: `auto` takes triton on CUDA where installed.

    Returns:
        x in 1 x 128 blocks [m, k], and x.t() in 1 x 128 blocks [k, m filled up to a multiple of 128] or None.
    """
    if _takes_triton(backend, x):
        from megatron_medllm.kernels.fp8 import quantize_triton

        return quantize_triton.quantize_activation(x, columns=columns, power_of_two=power_of_two)
    rows = blocks.quantize_rows_torch(x, power_of_two=power_of_two)
    return rows, blocks.quantize_columns_torch(x, power_of_two=power_of_two) if columns else None


def quantize_weight(weight: Tensor, *, power_of_two: bool = False, backend: Backend = "auto") -> BlockScaled:
    """Cast a weight [n, k] in 128 x 128 blocks, so that one copy serves both the product and its transpose."""
    if _takes_triton(backend, weight):
        from megatron_medllm.kernels.fp8 import quantize_triton

        return quantize_triton.quantize_weight(weight, power_of_two=power_of_two)
    return blocks.quantize_blocks_torch(weight, power_of_two=power_of_two)


def transpose_fp8(weight: BlockScaled, *, backend: Backend = "auto") -> BlockScaled:
    """The transpose of a 128 x 128-scaled weight, exact: bytes and scales are moved, nothing is rounded.

    Hopper's FP8 GEMM wants both operands with the summed axis contiguous, so d x = d y W needs W transposed. The
    caller drops the result after the product: a frozen base is kept in memory once.

    Raises:
        ValueError: `weight` is not in 128 x 128 blocks.
    """
    if weight.rows_per_scale != BLOCK:
        raise ValueError("only 128 x 128 blocks can be transposed without casting again")
    if _takes_triton(backend, weight.values):
        from megatron_medllm.kernels.fp8 import quantize_triton

        return quantize_triton.transpose_fp8(weight)
    bytes_ = weight.values.view(torch.uint8).t().contiguous()
    return BlockScaled(bytes_.view(blocks.E4M3), weight.scales.t().contiguous(), BLOCK)


def _takes_triton(backend: Backend, x: Tensor) -> bool:
    return backend == "triton" or (backend == "auto" and x.is_cuda and triton_installed())
