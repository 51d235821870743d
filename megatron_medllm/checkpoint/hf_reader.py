"""Stored weights straight into a running Megatron layout: every rank reads its own slices only."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from megatron_medllm.checkpoint.names import weight_of_parameter
from megatron_medllm.checkpoint.open_model import open_weights
from megatron_medllm.config.model import ModelShape
from megatron_medllm.models.gpt import PackedGPTModel
from megatron_medllm.models.materialize import Fill, fill_parameters


def load_hf_weights(
    model_chunks: list[nn.Module], model_dir: Path, shape: ModelShape, *, tp_rank: int, tp_size: int
) -> None:
    """Fill the model chunks of this rank from a Hugging Face (HF) directory or a Megatron checkpoint.

    Only this rank's slices are read.

    Any TP, pipeline and interleaved layout: a chunk's layers say which they are, the parameters how wide. Rows that
    pad the vocabulary, and columns that pad the FFN, become zero. Values are cast to each parameter's dtype; lost
    digits are told.

    Args:
        model_chunks: this rank's chunks, wrapped or not, on any device.
        model_dir: directory with config.json and safetensors, or a Megatron checkpoint of any layout.
        shape: the model's shape as HF says it (unpadded).
        tp_rank: this rank within its tensor-parallel group.
        tp_size: size of that group.

    Raises:
        UserError: the directory does not hold exactly this model's tensors (names the file and the tensor).
    """
    dtype = next(model_chunks[0].parameters()).dtype
    fill_parameters(model_chunks, hf_values(model_dir, shape, dtype=dtype, tp_rank=tp_rank, tp_size=tp_size))


def hf_values(model_dir: Path, shape: ModelShape, *, dtype: torch.dtype, tp_rank: int, tp_size: int) -> Fill:
    """Fills one parameter, of type `dtype`; the other arguments and errors are as in `load_hf_weights`.

    Of the file only the parameter's slice is read, so no more than that is in memory at once.
    """
    weights = open_weights(model_dir, shape)
    if not dist.is_initialized() or dist.get_rank() == 0:
        weights.tell_rounding(dtype)

    def fill(chunk: PackedGPTModel, name: str, parameter: nn.Parameter) -> None:
        weight = weight_of_parameter(name, shape)
        if weight is None:
            raise ValueError(f"{name} is no part of an HF model; load the weights before adding adapters")
        local_size = parameter.shape[weight.axis or 0]
        parameter.copy_(weights.read_local(weight, local_size=local_size, tp_rank=tp_rank, tp_size=tp_size))

    return fill
