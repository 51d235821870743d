"""How the frozen weight under an adapter is held, and the product with it: FP8 or NF4, once, in place of bf16.

Both formats cut the weight into blocks that share a scale, and every rank casts its own slice. NF4 (QLoRA, arXiv
2305.14314, section 3) keeps its scales in fp32, without that paper's second quantization: blocks of 64 along a row
then hold the same values in every tensor-parallel layout whose slices are multiples of 64, for 0.37 bit a weight. The
same holds of FP8 for slices that are multiples of 128.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_medllm.errors import UserError
from megatron_medllm.kernels.fp8 import fp8_frozen_linear, fp8_input_gradient, quantize_weight
from megatron_medllm.kernels.fp8.blocks import BLOCK

NF4_BLOCK = 64


class FrozenWeight(Protocol):
    """A weight [n, k] that takes no gradient."""

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., k] -> x W^T + bias [..., n] in x's dtype, differentiable in x."""
        ...

    def input_gradient(self, dy: Tensor) -> Tensor:
        """dy [t, n] -> dy W [t, k] in dy's dtype: what `product` hands back for x."""
        ...

    def dense(self) -> Tensor:
        """The values that `product` multiplies by, [n, k] fp32."""
        ...


class FP8Weight:
    """e4m3 in 128 x 128 blocks; the input is cast too, so that both products run in FP8."""

    def __init__(self, weight: Tensor) -> None:
        if weight.is_cuda and any(size % BLOCK for size in weight.shape):
            raise UserError(
                f"adapter.base=fp8: a linear of {' x '.join(map(str, weight.shape))} on each rank; on a GPU both sizes "
                f"must be multiples of {BLOCK}: change layout.tp"
            )
        self._weight = quantize_weight(weight)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return fp8_frozen_linear(x, self._weight, bias)

    def input_gradient(self, dy: Tensor) -> Tensor:
        return fp8_input_gradient(dy, self._weight)

    def dense(self) -> Tensor:
        return self._weight.dequantize()


class NF4Weight:
    """Four bits in blocks of 64, from bitsandbytes; multiplied in the input's dtype."""

    def __init__(self, weight: Tensor) -> None:
        self._functional = bitsandbytes_functional()
        self.packed, self._state = self._functional.quantize_4bit(
            weight, blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=False
        )

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = _ProductByUnpacked.apply(x, self)
        return y if bias is None else y + bias

    def input_gradient(self, dy: Tensor) -> Tensor:
        return dy @ self.unpack(dy.dtype)

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """[n, k] in `dtype`, to be dropped after one product."""
        return self._functional.dequantize_4bit(self.packed, self._state).to(dtype)

    def dense(self) -> Tensor:
        return self.unpack(torch.float32)


class _ProductByUnpacked(torch.autograd.Function):
    """x W^T that keeps W packed between the passes and saves no activation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Weight) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.unpack(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.weight.input_gradient(dy), None


def bitsandbytes_functional() -> Any:
    """`bitsandbytes.functional`; UserError where it is not installed."""
    try:
        import bitsandbytes.functional
    except ImportError:
        raise UserError("adapter.base=nf4 needs bitsandbytes: pip install 'megatron-medllm[nf4]'") from None
    return bitsandbytes.functional


FORMATS: dict[str, type[FP8Weight] | type[NF4Weight]] = {"fp8": FP8Weight, "nf4": NF4Weight}
