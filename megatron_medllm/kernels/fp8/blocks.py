"""What a block-scaled FP8 tensor is, and the casts in plain torch that every kernel must reproduce bit for bit.

A block of values shares one fp32 scale: s = max(amax, 1e-12) / 448, q = e4m3(clamp(x / s, -448, 448)), x ~ q s.
Blocks are 1 x 128 along the summed axis for activations and gradients, 128 x 128 for weights (DeepSeek-V3,
arXiv 2412.19437, section 3.3.2). With `power_of_two` the scale is rounded up to a power of two, so that scaling
itself rounds nothing. The last block of an axis may be short: such tensors run in emulation only.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
E4M3_MAX = 448.0
TINIEST_AMAX = 1e-12
E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class BlockScaled:
    """FP8 values with one scale a block.

    Attributes:
        values: [m, k] e4m3, row-major.
        scales: fp32; [m, ceil(k / 128)] for `rows_per_scale` 1, stored with m contiguous as cuBLAS wants it;
            [ceil(m / 128), ceil(k / 128)] row-major for 128.
        rows_per_scale: 1 (activations) or 128 (weights).
    """

    values: Tensor
    scales: Tensor
    rows_per_scale: int

    def __post_init__(self) -> None:
        rows, columns = self.values.shape
        expected = (-(-rows // self.rows_per_scale), -(-columns // BLOCK))
        if self.scales.shape != expected or self.values.dtype != E4M3 or self.rows_per_scale not in (1, BLOCK):
            raise ValueError(
                f"values {tuple(self.values.shape)} {self.values.dtype} in blocks of {self.rows_per_scale} x {BLOCK} "
                f"need scales {expected}, not {tuple(self.scales.shape)}"
            )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[m, k] in `dtype`: values times scales."""
        rows, columns = self.values.shape
        scales = self.scales.repeat_interleave(BLOCK, 1)[:, :columns]
        if self.rows_per_scale == BLOCK:
            scales = scales.repeat_interleave(BLOCK, 0)[:rows]
        return (self.values.float() * scales).to(dtype)


def block_scale(amax: Tensor, *, power_of_two: bool) -> Tensor:
    """The factor that maps a block's largest magnitude to 448, fp32 as `amax`."""
    scale = amax.float().clamp_min(TINIEST_AMAX) / E4M3_MAX
    if not power_of_two:
        return scale
    bits = scale.view(torch.int32)
    exponent = bits & 0x7F800000
    return torch.where((bits & 0x007FFFFF) != 0, exponent + 0x00800000, exponent).view(torch.float32)


def cast_e4m3(scaled: Tensor) -> Tensor:
    """Round to nearest even into e4m3, saturating at 448 (torch's own cast does so only in newer versions)."""
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def quantize_rows_torch(x: Tensor, *, power_of_two: bool) -> BlockScaled:
    """1 x 128 blocks of x [m, k]."""
    rows, columns = x.shape
    blocks = F.pad(x.float(), (0, -columns % BLOCK)).view(rows, -1, BLOCK)
    scales = block_scale(blocks.abs().amax(-1), power_of_two=power_of_two)
    values = cast_e4m3(blocks / scales[..., None]).view(rows, -1)[:, :columns].contiguous()
    return BlockScaled(values, scales.t().contiguous().t(), 1)


def quantize_columns_torch(x: Tensor, *, power_of_two: bool) -> BlockScaled:
    """1 x 128 blocks of x.t(), the rows of x filled up with zeros to a multiple of 128: [k, ceil(m / 128) 128]."""
    return quantize_rows_torch(F.pad(x, (0, 0, 0, -x.shape[0] % BLOCK)).t(), power_of_two=power_of_two)


def quantize_blocks_torch(weight: Tensor, *, power_of_two: bool) -> BlockScaled:
    """128 x 128 blocks of weight [n, k]."""
    rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK)
    scales = block_scale(blocks.abs().amax((1, 3)), power_of_two=power_of_two)
    values = cast_e4m3(blocks / scales[:, None, :, None]).view(padded.shape)[:rows, :columns].contiguous()
    return BlockScaled(values, scales, BLOCK)
