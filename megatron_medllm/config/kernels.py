"""Which of several equal ways computes a part: `auto` takes the fastest that this machine has."""

from typing import Literal

from pydantic import Field

from megatron_medllm.config.base import Section


class KernelsConfig(Section):
    """One switch a part, so that a benchmark can turn each on and off. No choice changes what is computed."""

    attention: Literal["auto", "flash", "cudnn"] = Field(
        default="auto", description="packed attention on CUDA; cudnn needs Hopper and, for packed rows, its front end"
    )
    lora: Literal["auto", "folded", "separate"] = Field(
        default="auto", description="the adapter's products: added inside the base's, or one by one"
    )
    optimizer: Literal["auto", "foreach", "megatron"] = Field(
        default="auto", description="norm, scaling and copies of many small tensors: in one call each, or one by one"
    )
    swiglu: Literal["auto", "triton", "megatron"] = Field(
        default="auto", description="the FFN's activation: our Triton kernels (CUDA), or Megatron-Core's"
    )
    copies: Literal["auto", "ahead", "blocking"] = Field(
        default="auto", description="a micro-batch's way to the device: prepared while the last one computes, or not"
    )
