"""Storage and values for what was built without either, a part at a time.

A model that fits its device only quantized is built on torch's meta device, where tensors have shapes alone. Each layer
then gets storage and values on the device, and is quantized, before the next one: neither the host nor the device ever
holds more than the quantized model and one layer.
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from megatron_medllm.models.gpt import PackedGPTModel, global_parameters, unwrap

# (chunk, global name, parameter): puts the starting values into the parameter
Fill = Callable[[PackedGPTModel, str, nn.Parameter], None]


@torch.no_grad()
def fill_parameters(chunks: Iterable[nn.Module], fill: Fill) -> None:
    """Starting values for every parameter of the chunks, wrapped or not."""
    for chunk in map(unwrap, chunks):
        for name, parameter in global_parameters(chunk):
            fill(chunk, name, parameter)


def parts_beside_layers(chunk: PackedGPTModel) -> list[nn.Module]:
    """What a chunk has beside its layers: embedding, last norm, head. Large, and not quantized."""
    parts = [*chunk.children(), *chunk.decoder.children()]
    return [part for part in parts if part is not chunk.decoder and part is not chunk.decoder.layers]


@torch.no_grad()
def materialize(part: nn.Module, chunk: PackedGPTModel, fill: Fill, *, device: torch.device) -> None:
    """Storage on `device` and starting values for the parameters of `part` that have none; others stay as they are.

    Args:
        part: of `chunk`, or the chunk itself.
        chunk: it knows the parameters' global names.
        fill: where the values come from.
        device: where they are put.
    """
    fresh = set()
    for module in part.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                stored = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
                vars(stored).update(vars(parameter))  # Megatron's marks
                setattr(module, key, stored)
                fresh.add(id(stored))
    for name, parameter in global_parameters(chunk):
        if id(parameter) in fresh:
            fill(chunk, name, parameter)
    # Computed from the shape, not a parameter: built on the CPU, whatever the model's device was.
    chunk.rotary_pos_emb.inv_freq = chunk.rotary_pos_emb.inv_freq.to(device)
