"""Ragged attention by cuDNN: documents of any lengths in one stream, forward and backward, on Hopper."""

from megatron_medllm.kernels.attention.cudnn_ragged import (
    CUDNN_ERRORS,
    PlanCache,
    described,
    missing_front_end,
    ragged_attention,
)
from megatron_medllm.kernels.attention.ragged import RaggedBatch, plan_key

__all__ = [
    "CUDNN_ERRORS",
    "PlanCache",
    "RaggedBatch",
    "described",
    "missing_front_end",
    "plan_key",
    "ragged_attention",
]
