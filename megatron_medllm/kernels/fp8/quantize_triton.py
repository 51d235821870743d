"""Triton kernels of `quantize`: each reads its input once and writes FP8 values and scales.

Divisions are IEEE (`div_rn`): Triton's plain `/` on CUDA is off by up to two units in the last place, which would move
values across an e4m3 rounding border now and then and break byte equality with the CPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_medllm.kernels.fp8.blocks import BLOCK, E4M3, BlockScaled

_ROW_TILE = 32
_TRANSPOSE_TILE = 128


@triton.jit
def _block_scale(amax, POWER_OF_TWO: tl.constexpr):
    scale = tl.div_rn(tl.maximum(amax, 1e-12), tl.full(amax.shape, 448.0, tl.float32))
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        exponent = bits & 0x7F800000
        exponent = tl.where((bits & 0x007FFFFF) != 0, exponent + 0x00800000, exponent)
        scale = exponent.to(tl.float32, bitcast=True)
    return scale


@triton.jit
def _cast(x, scale):
    scaled = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    return tl.minimum(tl.maximum(scaled, -448.0), 448.0).to(tl.float8e4nv)


@triton.jit
def _store_rows(x, q_ptr, s_ptr, rows, m, k, first_column, q_stride, s_stride, POWER_OF_TWO: tl.constexpr):
    """Cast a tile [R, 128] by rows; scales are stored m-contiguous, s_stride apart from block to block."""
    columns = first_column + tl.arange(0, 128)
    scale = _block_scale(tl.max(tl.abs(x), 1), POWER_OF_TWO)
    q = _cast(x, scale[:, None])
    inside = (rows[:, None] < m) & (columns[None, :] < k)
    tl.store(q_ptr + rows[:, None].to(tl.int64) * q_stride + columns[None, :], q, mask=inside)
    tl.store(s_ptr + (first_column // 128) * s_stride + rows, scale, mask=rows < m)


@triton.jit
def _store_columns(x, q_ptr, s_ptr, first_row, columns, k, q_stride, s_stride, POWER_OF_TWO: tl.constexpr):
    """Cast a tile [128, C] by columns into the transpose [k, m filled up]; rows beyond m are zeros in x."""
    rows = first_row + tl.arange(0, 128)
    scale = _block_scale(tl.max(tl.abs(x), 0), POWER_OF_TWO)
    q = tl.trans(_cast(x, scale[None, :]))
    inside = columns[:, None] < k
    tl.store(q_ptr + columns[:, None].to(tl.int64) * q_stride + rows[None, :], q, mask=inside)
    tl.store(s_ptr + (first_row // 128) * s_stride + columns, scale, mask=columns < k)


@triton.jit
def quantize_activation_kernel(
    x_ptr,  # [m, k]
    q_ptr,  # [m, k] e4m3
    s_ptr,  # [k / 128, m]
    qt_ptr,  # [k, m filled up] e4m3
    st_ptr,  # [m / 128, k]
    m,
    k,
    x_stride,
    q_stride,
    qt_stride,
    COLUMNS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    ROWS: tl.constexpr,
):
    first_row = tl.program_id(0) * ROWS
    first_column = tl.program_id(1) * 128
    rows = first_row + tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, 128)
    inside = (rows[:, None] < m) & (columns[None, :] < k)
    x = tl.load(x_ptr + rows[:, None].to(tl.int64) * x_stride + columns[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    _store_rows(x, q_ptr, s_ptr, rows, m, k, first_column, q_stride, m, POWER_OF_TWO)
    if COLUMNS:
        _store_columns(x, qt_ptr, st_ptr, first_row, columns, k, qt_stride, k, POWER_OF_TWO)


@triton.jit
def quantize_weight_kernel(
    w_ptr,  # [n, k]
    q_ptr,  # [n, k] e4m3
    s_ptr,  # [n / 128, k / 128]
    n,
    k,
    w_stride,
    q_stride,
    s_stride,
    POWER_OF_TWO: tl.constexpr,
):
    rows = tl.program_id(0) * 128 + tl.arange(0, 128)
    columns = tl.program_id(1) * 128 + tl.arange(0, 128)
    inside = (rows[:, None] < n) & (columns[None, :] < k)
    w = tl.load(w_ptr + rows[:, None].to(tl.int64) * w_stride + columns[None, :], mask=inside, other=0.0)
    w = w.to(tl.float32)
    largest = tl.max(tl.max(tl.abs(w), 1), 0)
    scale = _block_scale(tl.full((1, 1), 0.0, tl.float32) + largest, POWER_OF_TWO)
    tl.store(q_ptr + rows[:, None].to(tl.int64) * q_stride + columns[None, :], _cast(w, scale), mask=inside)
    tl.store(s_ptr + tl.program_id(0) * s_stride + tl.program_id(1), tl.sum(scale))


@triton.jit
def transpose_kernel(
    q_ptr,  # [n, k] bytes
    out_ptr,  # [k, n] bytes
    n,
    k,
    TILE: tl.constexpr,
):
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    at = q_ptr + rows[:, None].to(tl.int64) * k + columns[None, :]
    tile = tl.load(at, mask=(rows[:, None] < n) & (columns[None, :] < k), other=0)
    at = out_ptr + columns[:, None].to(tl.int64) * n + rows[None, :]
    tl.store(at, tl.trans(tile), mask=(columns[:, None] < k) & (rows[None, :] < n))


def quantize_activation(x: Tensor, *, columns: bool, power_of_two: bool) -> tuple[BlockScaled, BlockScaled | None]:
    """As `quantize.quantize_activation`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    (m, width), filled = x.shape, triton.cdiv(x.shape[0], BLOCK) * BLOCK
    values = torch.empty(m, width, dtype=E4M3, device=x.device)
    scales = torch.empty(triton.cdiv(width, BLOCK), m, dtype=torch.float32, device=x.device)
    values_t, scales_t = values, scales
    if columns:
        values_t = torch.empty(width, filled, dtype=E4M3, device=x.device)
        scales_t = torch.empty(filled // BLOCK, width, dtype=torch.float32, device=x.device)
    rows_a_tile = BLOCK if columns else _ROW_TILE
    quantize_activation_kernel[(triton.cdiv(m, rows_a_tile), triton.cdiv(width, BLOCK))](
        x,
        values,
        scales,
        values_t,
        scales_t,
        m,
        width,
        x.stride(0),
        values.stride(0),
        values_t.stride(0),
        COLUMNS=columns,
        POWER_OF_TWO=power_of_two,
        ROWS=rows_a_tile,
        num_warps=8 if columns else 4,
    )
    return BlockScaled(values, scales.t(), 1), BlockScaled(values_t, scales_t.t(), 1) if columns else None


def quantize_weight(weight: Tensor, *, power_of_two: bool) -> BlockScaled:
    """As `quantize.quantize_weight`."""
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    n, k = weight.shape
    values = torch.empty(n, k, dtype=E4M3, device=weight.device)
    scales = torch.empty(triton.cdiv(n, BLOCK), triton.cdiv(k, BLOCK), dtype=torch.float32, device=weight.device)
    quantize_weight_kernel[tuple(scales.shape)](
        weight,
        values,
        scales,
        n,
        k,
        weight.stride(0),
        values.stride(0),
        scales.stride(0),
        POWER_OF_TWO=power_of_two,
        num_warps=8,
    )
    return BlockScaled(values, scales, BLOCK)


def transpose_fp8(weight: BlockScaled) -> BlockScaled:
    """As `quantize.transpose_fp8`."""
    n, k = weight.values.shape
    out = torch.empty(k, n, dtype=torch.uint8, device=weight.values.device)
    grid = (triton.cdiv(n, _TRANSPOSE_TILE), triton.cdiv(k, _TRANSPOSE_TILE))
    bytes_ = weight.values.contiguous().view(torch.uint8)
    transpose_kernel[grid](bytes_, out, n, k, TILE=_TRANSPOSE_TILE, num_warps=8)
    return BlockScaled(out.view(E4M3), weight.scales.t().contiguous(), BLOCK)
