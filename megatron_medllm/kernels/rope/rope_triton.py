"""The rotation in Triton: one read and one write of x. The same function as `rope_torch`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_HEADS = 4  # a program's heads: 28 and 4 are multiples, and cosines are read once for all of them
_WARPS = 4


@triton.jit
def rotate_kernel(
    x_ptr,  # [tokens, heads, 2 * half], strides token_stride, head_stride, 1
    out_ptr,  # the same shape, contiguous
    cosines_ptr,  # [tokens, half] fp32, as the next
    sines_ptr,
    heads,
    half,
    token_stride,
    head_stride,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    inside = (head < heads) & (lane < half)
    c = tl.load(cosines_ptr + token * half + lane, mask=lane < half, other=0.0)
    s = tl.load(sines_ptr + token * half + lane, mask=lane < half, other=0.0)
    source = x_ptr + token * token_stride + head * head_stride + lane
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    target = out_ptr + token * heads * half * 2 + head * half * 2 + lane
    tl.store(target, (first * c - second * s).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(target + half, (second * c + first * s).to(out_ptr.dtype.element_ty), mask=inside)


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """As `rope_torch.rotated`."""
    tokens, heads, width = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if tokens:
        rotate_kernel[(tokens, triton.cdiv(heads, _HEADS))](
            x,
            out,
            cosines.contiguous(),
            sines.contiguous(),
            heads,
            width // 2,
            x.stride(0),
            x.stride(1),
            HEADS=_HEADS,
            BLOCK=triton.next_power_of_2(width // 2),
            num_warps=_WARPS,
        )
    return out
