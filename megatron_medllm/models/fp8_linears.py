"""Megatron-Core's column- and row-parallel linears with all three products in block-scaled FP8, for full training.

The weights stay bf16 or fp32 parameters under their own names, with the optimizer's fp32 main weights behind them:
each use casts them anew, so checkpoints, DDP and the distributed optimizer see nothing of FP8. Under tensor
parallelism every rank casts its own slice. Blocks of 128 lie within a slice, so the values are those of one process;
that is also why a slice that is not whole blocks is refused, on a CPU too, where it could be emulated.

Under sequence parallelism a column layer keeps this rank's part of its input and gathers it again in the backward
pass, as Megatron-Core's own does: the whole input in FP8 would take tp/2 times the memory.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_medllm.errors import UserError
from megatron_medllm.kernels.fp8 import (
    fp8_linear,
    quantize_activation,
    quantize_weight,
    scaled_matmul,
    transpose_fp8,
)
from megatron_medllm.kernels.fp8.blocks import BLOCK


class FP8ColumnParallelLinear(ColumnParallelLinear):
    """Y = X W^T + b, with W and b split by outputs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _refuse_part_blocks(self.weight, kwargs.get("tp_comm_buffer_name"))

    def forward(self, input_: Tensor, *_: Any) -> tuple[Tensor, Tensor | None]:
        """[t, 1, k] ([t/tp, 1, k] under sequence parallelism) -> [t, 1, n/tp], and the bias if it is left to others."""
        bias, left = (None, self.bias) if self.skip_bias_add else (self.bias, None)
        if self.sequence_parallel:
            return _GatheredLinear.apply(input_, self.weight, bias, self.tp_group), left
        return fp8_linear(copy_to_tensor_model_parallel_region(input_, group=self.tp_group), self.weight, bias), left


class FP8RowParallelLinear(RowParallelLinear):
    """Y = X W^T + b, with X and W split by inputs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _refuse_part_blocks(self.weight, kwargs.get("tp_comm_buffer_name"))

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[t, 1, k/tp] -> [t, 1, n] ([t/tp, 1, n] under sequence parallelism), and the bias if it is left to others."""
        leave = (
            reduce_scatter_to_sequence_parallel_region
            if self.sequence_parallel
            else reduce_from_tensor_model_parallel_region
        )
        y = leave(fp8_linear(input_, self.weight), group=self.tp_group)
        if self.bias is None or self.skip_bias_add:
            return y, self.bias
        return y + self.bias, None


class _GatheredLinear(torch.autograd.Function):
    """`fp8_linear` on the input gathered from all ranks; its gradient is summed over them and scattered."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(part, weight)
        ctx.group, ctx.bias_dtype = group, None if bias is None else bias.dtype
        return fp8_linear(gather_from_sequence_parallel_region(part, group=group), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        part, weight = ctx.saved_tensors
        dy_rows, dy_columns = quantize_activation(dy.flatten(0, 1), columns=True)
        dx = scaled_matmul(dy_rows, transpose_fp8(quantize_weight(weight)), out_dtype=dy.dtype)
        dx = reduce_scatter_to_sequence_parallel_region(dx.view(*dy.shape[:-1], -1), group=ctx.group)
        x = gather_from_sequence_parallel_region(part, group=ctx.group)
        _, x_columns = quantize_activation(x.flatten(0, 1), columns=True)
        dw = scaled_matmul(dy_columns, x_columns, out_dtype=torch.float32).to(weight.dtype)
        dbias = None if ctx.bias_dtype is None else dy.float().sum((0, 1)).to(ctx.bias_dtype)
        return dx, dw, dbias, None


def _refuse_part_blocks(weight: nn.Parameter, name: str | None) -> None:
    if any(size % BLOCK for size in weight.shape):
        raise UserError(
            f"fp8=hybrid: linear {name} is {' x '.join(map(str, weight.shape))} on each rank; both sizes must be "
            f"multiples of {BLOCK}: change layout.tp or train in bf16"
        )
