"""Rotary position embedding (RoFormer, arXiv 2104.09864, in the half-split form of GPT-NeoX and Qwen2).

Written in torch it is six element-wise kernels over q and six over k, each reading and writing all of it; in Triton one
each. Both round once, from fp32, where the usual code multiplies by cosines already rounded to bf16.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_medllm.kernels.backend import triton_installed


def rotation_angles(position_ids: Tensor, inverse_frequencies: Tensor, *, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every token's angles.

    Args:
        position_ids: [t], any integers.
        inverse_frequencies: [hn/2] fp32.
        factor: of both; YaRN's sharpens attention by its square.

    Returns:
        two tensors [t, hn/2] fp32.
    """
    angles = torch.outer(position_ids.float(), inverse_frequencies)
    if factor == 1.0:
        return angles.cos(), angles.sin()
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """x [t, n, hn] -> (x1 cos - x2 sin, x2 cos + x1 sin), x1 and x2 the halves of every head.

    Args:
        x: the last axis contiguous; bf16, fp16 or fp32.
        cosines: [t, hn/2] fp32.
        sines: [t, hn/2] fp32.

    Returns:
        [t, n, hn] in x's dtype, contiguous; differentiable in x.
    """
    return _Rotate.apply(x, cosines, sines)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _rotated(x, cosines, sines)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return _rotated(dy, cosines, -sines), None, None  # its transpose turns back, with the same factor


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    if x.is_cuda and triton_installed():
        from megatron_medllm.kernels.rope.rope_triton import rotated
    else:
        from megatron_medllm.kernels.rope.rope_torch import rotated
    return rotated(x, cosines, sines)
