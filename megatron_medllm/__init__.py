"""Qwen2.5 and Qwen3 on Megatron-Core: Japanese medical continued pretraining, then preference optimization (RPO)."""

import warnings

__version__ = "0.2.0"

# What Megatron-Core and torch say of themselves, in every process: packages that this one does without (`medllm doctor`
# tells what is here), and calls inside Megatron-Core that torch has renamed.
for _message in (
    r"(Transformer Engine and )?Apex (is|are) not installed",
    r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
):
    warnings.filterwarnings("ignore", message=_message)
