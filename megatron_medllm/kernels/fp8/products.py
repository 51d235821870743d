"""The FP8 GEMM: torch's `scaled_mm` on Hopper, the product of the dequantised operands everywhere else.

On an H200 `scaled_mm` reaches 1,160 to 1,230 TFLOP/s at 7B's shapes (docs/benchmarks/h200.md). A Triton GEMM reached
half of it on an H100 PCIe: none is kept here.
"""

import logging
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_medllm.kernels.fp8.blocks import BLOCK, BlockScaled

log = logging.getLogger(__name__)


def scaled_matmul(left: BlockScaled, right: BlockScaled, *, out_dtype: torch.dtype) -> Tensor:
    """left [m, k] @ right [n, k].T -> [m, n] in `out_dtype`, summed in fp32.

    Args:
        left: 1 x 128 blocks.
        right: 1 x 128 or 128 x 128 blocks.
        out_dtype: bf16 or fp32.

    Raises:
        ValueError: axes do not fit, or on Hopper n or k is not a multiple of 16 and 128.
    """
    if left.values.shape[1] != right.values.shape[1] or left.rows_per_scale != 1:
        raise ValueError(
            f"cannot multiply {tuple(left.values.shape)} in {left.rows_per_scale}-row blocks "
            f"by {tuple(right.values.shape)} transposed"
        )
    if _has_fp8_gemm(left.values.device):
        return _multiply_on_hopper(left, right, out_dtype)
    product = left.dequantize() @ right.dequantize().t()
    return product.to(out_dtype)


def _multiply_on_hopper(left: BlockScaled, right: BlockScaled, out_dtype: torch.dtype) -> Tensor:
    (m, k), n = left.values.shape, right.values.shape[0]
    if k % BLOCK or n % 16:
        raise ValueError(f"FP8 on Hopper needs k a multiple of 128 and n of 16, not k {k} and n {n}")
    values, scales = left.values, left.scales
    if m % 16:
        values = F.pad(values.view(torch.uint8), (0, 0, 0, -m % 16)).view(values.dtype)
        scales = F.pad(scales.t(), (0, -m % 16)).t()
    if right.rows_per_scale == BLOCK:
        recipe = F.ScalingType.BlockWise128x128
        # cuBLAS reads 128 x 128 scales with the summed axis contiguous, its length a multiple of 4
        right_scales = F.pad(right.scales, (0, -right.scales.shape[1] % 4)).t()
    else:
        recipe = F.ScalingType.BlockWise1x128
        right_scales = right.scales
    product = F.scaled_mm(
        values,
        right.values.t(),
        scale_a=scales,
        scale_recipe_a=F.ScalingType.BlockWise1x128,
        scale_b=right_scales,
        scale_recipe_b=recipe,
        output_dtype=out_dtype,
    )
    return product[:m]


@lru_cache
def _has_fp8_gemm(device: torch.device) -> bool:
    """Hopper with a torch whose `scaled_mm` knows block scales; said once, with the reason where not."""
    if device.type != "cuda":
        reason = f"the device is a {device.type}"
    elif torch.cuda.get_device_capability(device) != (9, 0):
        reason = f"{torch.cuda.get_device_name(device)} is not Hopper"
    elif tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2]) < (12, 9):
        reason = f"torch is built for CUDA {torch.version.cuda}, block scales need 12.9"
    else:
        log.info("FP8 products: torch scaled_mm on %s", torch.cuda.get_device_name(device))
        return True
    log.info("FP8 products: emulated, exact but slow (%s)", reason)
    return False
