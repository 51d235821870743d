"""Adapters in PEFT's format into a running model of any layout.

PEFT adapts q, k and v (gate and up) each with an A of its own. Where those differ, the fused layer's A is all of them
stacked and its B is block-diagonal, so it needs the sum of their ranks. Rows of A that are left over keep their
random start and their columns of B stay zero, so they can still be trained.
"""

from functools import partial

import torch
from torch import Tensor, nn

from megatron_medllm.checkpoint.names import Weight, hf_shape, local_pieces
from megatron_medllm.checkpoint.peft import PeftAdapter, linear_weights
from megatron_medllm.config.model import ModelShape
from megatron_medllm.errors import UserError
from megatron_medllm.models.adapters import AdaptedLinear
from megatron_medllm.models.qwen25 import global_parameters, unwrap


@torch.no_grad()
def load_peft(chunks: list[nn.Module], adapter: PeftAdapter, shape: ModelShape, *, tp_rank: int, tp_size: int) -> None:
    """Start a model's adapters from PEFT's; after `add_adapters`, before the optimizer is built.

    Args:
        chunks: this rank's chunks, wrapped or not.
        adapter: from `read_peft`.
        shape: the model's, unpadded.
        tp_rank: this rank within its tensor-parallel group.
        tp_size: size of that group.

    Raises:
        UserError: it adapts a linear that is no target of this run, or needs a higher rank.
    """
    for chunk in map(unwrap, chunks):
        linears = {id(linear.lora_a): linear for linear in chunk.modules() if isinstance(linear, AdaptedLinear)}
        parameters = dict(global_parameters(chunk))
        layers = {layer.layer_number - 1 for layer in chunk.decoder.layers}
        for weight in linear_weights(shape):
            parts = {name: adapter.halves[name] for name in weight.hf if name in adapter.halves}
            if not parts or int(weight.mcore.split(".")[2]) not in layers:
                continue
            module = weight.mcore.removesuffix(".weight")
            linear = linears.get(id(parameters.get(f"{module}.lora_a")))
            if linear is None or linear.lora_a is None or linear.lora_b is None:
                target = module.rpartition(".")[2]
                raise UserError(f"{adapter.directory} adapts {next(iter(parts))!r}: adapter.targets needs {target}")
            fused_a, rows = _fuse(parts, weight, shape)
            rank = linear.lora_a.shape[0]
            if fused_a.shape[0] > rank:
                raise UserError(f"{adapter.directory}: {module} needs adapter.rank >= {len(fused_a)}, not {rank}")
            local_slice = partial(_local_slice, weight=weight, shape=shape, tp_rank=tp_rank, tp_size=tp_size)
            if weight.axis == 0:
                a, b = fused_a, local_slice(rows, local_size=linear.lora_b.shape[0])
            else:
                name = weight.hf[0]
                a, b = local_slice({name: fused_a}, local_size=linear.lora_a.shape[1]), rows[name]
            linear.start_from(a, b.float() * (adapter.scale / linear.scale))


def _fuse(
    parts: dict[str, tuple[Tensor, Tensor]], weight: Weight, shape: ModelShape
) -> tuple[Tensor, dict[str, Tensor]]:
    """A [r', k] of the fused layer, and for each HF weight in it its rows of B [n, r']."""
    first = next(iter(parts.values()))[0]
    shared = all(torch.equal(a, first) for a, _ in parts.values())
    fused_a = first if shared else torch.cat([a for a, _ in parts.values()])
    rows = {name: first.new_zeros(hf_shape(name, shape)[0], fused_a.shape[0]) for name in weight.hf}
    for number, (name, (a, b)) in enumerate(parts.items()):
        start = 0 if shared else number * a.shape[0]
        rows[name][:, start : start + a.shape[0]] = b
    return fused_a, rows


def _local_slice(
    whole: dict[str, Tensor], *, weight: Weight, shape: ModelShape, local_size: int, tp_rank: int, tp_size: int
) -> Tensor:
    """This rank's slice along the weight's axis, from the HF weights' whole tensors; zeros where it is padded."""
    axis = weight.axis or 0
    slices = []
    for piece in local_pieces(weight, shape, local_size=local_size, tp_rank=tp_rank, tp_size=tp_size):
        if piece.hf is None:
            like = next(iter(whole.values())).narrow(axis, 0, 1)
            slices.append(torch.zeros_like(like).repeat_interleave(len(piece), axis))
        else:
            slices.append(whole[piece.hf].narrow(axis, piece.start, len(piece)))
    return torch.cat(slices, dim=axis)
