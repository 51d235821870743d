"""Matrix products with fp32 sums, whatever the operands' dtype.

On CUDA the GEMM itself takes bf16 operands and writes fp32. CPU GEMMs cannot: there low-precision operands are
widened, a tile of the long (vocabulary) axis at a time, so that no fp32 copy of the head's weight ever exists.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_TILE = 8192  # vocabulary rows widened at once; 8192 x 8192 in fp32 is 256 MiB


def tiles(total: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover range(total)."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def project_rows(hidden: Tensor, weight: Tensor, *, out: Tensor) -> None:
    """out [r, v] = hidden [r, h] @ weight [v, h].T, summed in fp32, rounded to out's dtype."""
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif hidden.is_cuda and out.dtype == torch.float32:
        torch.ops.aten.mm.dtype_out(hidden, weight.t(), torch.float32, out=out)
    else:
        wide = hidden.float()
        for tile in tiles(weight.shape[0], _TILE):
            out[:, tile] = wide @ weight[tile].float().t()


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [m, n] fp32 += left [m, k] @ right [k, n]; k may be the vocabulary."""
    if left.dtype == right.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        right = right.to(left.dtype)
        torch.ops.aten.addmm.dtype_out(total, left, right, torch.float32, out=total)
    else:
        for tile in tiles(right.shape[0], _TILE):
            total.addmm_(left[:, tile].float(), right[tile].float())


def operand_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which gradients of logits are handed to a GEMM: the weight's on CUDA, fp32 on a CPU."""
    return weight.dtype if weight.is_cuda else torch.float32
