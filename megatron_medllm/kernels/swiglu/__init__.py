"""SwiGLU (arXiv 2002.05202): silu(gate) * up, the activation of Qwen2's FFN.

The backward pass reads gate, up and dy once and writes the gradients of both halves where they belong. Compiled by
torch, Megatron-Core's has to concatenate them, and on one H200 took twice the time that memory bandwidth asks for.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_medllm.kernels.backend import triton_installed


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2f] -> [..., f]: silu(gate) * up, gate the first half of the last axis and up the second.

    Computed in fp32 (float64 in float64) and rounded once. Kept for the backward pass: `gate_up` alone.

    Args:
        gate_up: the last axis contiguous, or it is copied; bf16, fp16, fp32 or float64.

    Returns:
        [..., f] in the same dtype, contiguous; differentiable once.
    """
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        rows = gate_up.reshape(-1, gate_up.shape[-1])
        return _passes(gate_up).forward(rows).view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        rows, dy = gate_up.reshape(-1, gate_up.shape[-1]), dy.reshape(-1, dy.shape[-1])
        return _passes(gate_up).backward(rows, dy).view(gate_up.shape)


def _passes(x: Tensor) -> Any:
    if x.is_cuda and x.dtype is not torch.float64 and triton_installed():
        from megatron_medllm.kernels.swiglu import swiglu_triton

        return swiglu_triton
    from megatron_medllm.kernels.swiglu import swiglu_torch

    return swiglu_torch
