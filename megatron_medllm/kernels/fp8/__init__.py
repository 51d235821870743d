"""Block-scaled FP8 (e4m3): casts, products and linear layers, exact emulation on a CPU."""

from megatron_medllm.kernels.fp8.blocks import BlockScaled
from megatron_medllm.kernels.fp8.linear import fp8_frozen_linear, fp8_input_gradient, fp8_linear
from megatron_medllm.kernels.fp8.products import scaled_matmul
from megatron_medllm.kernels.fp8.quantize import quantize_activation, quantize_weight, transpose_fp8

__all__ = [
    "BlockScaled",
    "fp8_frozen_linear",
    "fp8_input_gradient",
    "fp8_linear",
    "quantize_activation",
    "quantize_weight",
    "scaled_matmul",
    "transpose_fp8",
]
