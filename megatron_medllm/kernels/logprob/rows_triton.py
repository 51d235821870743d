"""Row-wise passes over a chunk of logits, in Triton: one read for the statistics, one read and write for the gradient.

The same two functions as `rows_torch`, which says what they compute. GEMMs stay with cuBLAS: at 780 TFLOP/s the head is
bound by them, and a hand-written GEMM with these passes as its epilogue would have to match it first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_STATS_BLOCK = 4096
_GRADIENT_BLOCK = 4096
_WARPS = 8


@triton.jit
def row_stats_kernel(
    z_ptr,  # [rows, columns], row stride z_stride
    target_ptr,  # [rows] int64
    stats_ptr,  # [3, rows] fp32
    rows,
    columns,
    z_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    base = z_ptr + row.to(tl.int64) * z_stride
    lanes = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), -1e30, tl.float32)  # finite: -inf - -inf would be nan in lanes that see no column
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + lanes < columns
        z = tl.load(base + start + lanes, mask=inside, other=0.0).to(tl.float32)
        z = tl.where(inside, z, float("-inf"))
        new_largest = tl.maximum(largest, z)
        total = total * tl.exp(largest - new_largest) + tl.exp(z - new_largest)
        largest = new_largest
    row_largest = tl.max(largest, 0)
    row_total = tl.sum(total * tl.exp(largest - row_largest), 0)
    column = tl.load(target_ptr + row)
    here = (column >= 0) & (column < columns)
    picked = tl.load(base + column, mask=here, other=0.0).to(tl.float32)
    tl.store(stats_ptr + row, row_largest)
    tl.store(stats_ptr + rows + row, row_total)
    tl.store(stats_ptr + 2 * rows + row, picked)


@triton.jit
def logits_gradient_kernel(
    z_ptr,  # [rows, columns], row stride z_stride
    out_ptr,  # [rows, columns], row stride out_stride; may be z_ptr
    target_ptr,  # [rows] int64
    lse_ptr,  # [rows] fp32, as the next two
    grad_logprob_ptr,
    grad_lse_ptr,
    columns,
    z_stride,
    out_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    target = tl.load(target_ptr + row)
    lse = tl.load(lse_ptr + row)
    g = tl.load(grad_logprob_ptr + row)
    g_lse = tl.load(grad_lse_ptr + row)
    z = tl.load(z_ptr + row.to(tl.int64) * z_stride + column, mask=inside, other=0.0).to(tl.float32)
    gradient = (g_lse - g) * tl.exp(z - lse) + tl.where(column == target, g, 0.0)
    out = out_ptr + row.to(tl.int64) * out_stride + column
    tl.store(out, gradient.to(out_ptr.dtype.element_ty), mask=inside)


def row_stats(logits: Tensor, local_target: Tensor) -> Tensor:
    """As `rows_torch.row_stats`."""
    rows, columns = logits.shape
    stats = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    row_stats_kernel[(rows,)](
        logits,
        local_target.contiguous(),
        stats,
        rows,
        columns,
        logits.stride(0),
        BLOCK=_STATS_BLOCK,
        num_warps=_WARPS,
    )
    return stats


def logits_gradient(
    logits: Tensor,
    local_target: Tensor,
    *,
    lse: Tensor,
    grad_logprob: Tensor,
    grad_lse: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """As `rows_torch.logits_gradient`."""
    rows, columns = logits.shape
    out = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    logits_gradient_kernel[(rows, triton.cdiv(columns, _GRADIENT_BLOCK))](
        logits,
        out,
        local_target.contiguous(),
        lse.contiguous(),
        grad_logprob.contiguous(),
        grad_lse.contiguous(),
        columns,
        logits.stride(0),
        out.stride(0),
        BLOCK=_GRADIENT_BLOCK,
        num_warps=_WARPS,
    )
    return out
