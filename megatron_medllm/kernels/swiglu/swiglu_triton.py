"""SwiGLU in Triton: every number is read once and written once. The same functions as `swiglu_torch`.

A program takes a block of columns of one token. Neighbouring programs take neighbouring blocks, and a thread eight
numbers in a row: 16 bytes of bf16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_WARPS = 4


@triton.jit
def swiglu_forward_kernel(
    x_ptr,  # [tokens, 2 * width], strides x_stride, 1
    out_ptr,  # [tokens, width], contiguous
    width,
    x_stride,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    source = x_ptr + token * x_stride + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + token * width + column, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    x_ptr,  # [tokens, 2 * width], strides x_stride, 1
    dy_ptr,  # [tokens, width], strides dy_stride, 1
    out_ptr,  # [tokens, 2 * width], contiguous
    width,
    x_stride,
    dy_stride,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    source = x_ptr + token * x_stride + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + token * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_gate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_up = dy * gate * sigmoid
    target = out_ptr + token * width * 2 + column
    tl.store(target, d_gate.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(target + width, d_up.to(out_ptr.dtype.element_ty), mask=inside)


def forward(gate_up: Tensor) -> Tensor:
    """As `swiglu_torch.forward`."""
    gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        grid = (tokens * triton.cdiv(width, _BLOCK),)
        swiglu_forward_kernel[grid](gate_up, out, width, gate_up.stride(0), BLOCK=_BLOCK, num_warps=_WARPS)
    return out


def backward(gate_up: Tensor, dy: Tensor) -> Tensor:
    """As `swiglu_torch.backward`."""
    gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    tokens, width = dy.shape
    out = torch.empty(tokens, 2 * width, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        grid = (tokens * triton.cdiv(width, _BLOCK),)
        swiglu_backward_kernel[grid](
            gate_up, dy, out, width, gate_up.stride(0), dy.stride(0), BLOCK=_BLOCK, num_warps=_WARPS
        )
    return out
