"""Tensors put together from all ranks' slices, under Hugging Face's names."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_medllm.checkpoint.hf_writer import assemble
from megatron_medllm.checkpoint.names import EMBEDDING, OUTPUT, Weight, local_pieces, weight_of_parameter
from megatron_medllm.config.model import ModelShape
from megatron_medllm.models.adapters import LINEARS

Recorded = dict[str, Any]  # what `probe.train_and_record` left of one rank
Slices = Callable[[Recorded], dict[str, Tensor]]
LAST_STAGE = " (the last stage's copy)"


def whole_tensors(ranks: list[Recorded], slices: Slices, shape: ModelShape) -> dict[str, Tensor]:
    """Assemble one copy of every tensor.

    Args:
        ranks: what every rank recorded; the first data- and context-parallel replica is taken.
        slices: which of a rank's tensors.
        shape: of the model, unpadded.

    Returns:
        tensors under HF's names. Halves of an adapter: `MCORE.lora_a`, and `MCORE|HF.lora_b` for each HF weight.
    """
    found: dict[str, Tensor] = {}
    first = [rank for rank in ranks if rank["place"][2:] == (0, 0)]
    names = {name for rank in first for name in slices(rank)}
    for name in sorted(names):
        parts = sorted((rank["place"][0], rank["place"][1], i) for i, rank in enumerate(first) if name in slices(rank))
        found |= _named(name, [slices(first[i])[name] for _, _, i in parts], shape)
    return found


def _named(name: str, parts: list[Tensor], shape: ModelShape) -> dict[str, Tensor]:
    if name.endswith((".lora_a", ".lora_b")):
        return _adapter_half(name, parts, shape)
    weight = weight_of_parameter(name, shape)
    if weight is None:
        raise ValueError(f"{name} is no part of an HF model")
    suffix = LAST_STAGE if name == OUTPUT.mcore and weight.hf == EMBEDDING.hf else ""
    return {f"{hf}{suffix}": tensor for hf, tensor in assemble(parts, weight, shape).items()}


def _adapter_half(name: str, parts: list[Tensor], shape: ModelShape) -> dict[str, Tensor]:
    layer, half = name.rsplit(".", 1)
    split = LINEARS[layer.rsplit(".", 1)[1]][1]
    weight = weight_of_parameter(f"{layer}.weight", shape)
    assert weight is not None
    if half == "lora_a":
        if split == "column":
            return {name: parts[0]}
        width = shape.ffn_hidden_size if "linear_fc2" in layer else shape.query_width
        return {name: torch.cat(parts, dim=1)[:, :width]}
    if split == "row":
        return {f"{layer}|{weight.hf[0]}.lora_b": parts[0]}
    rows: dict[str, list[Tensor]] = {hf: [] for hf in weight.hf}
    for hf, tensor in _pieces(weight, parts, shape):
        rows[hf].append(tensor)
    return {f"{layer}|{hf}.lora_b": torch.cat(tensors) for hf, tensors in rows.items()}


def _pieces(weight: Weight, parts: list[Tensor], shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """The HF rows in the slices of a column-parallel tensor, rank after rank; padding left out."""
    for tp_rank, part in enumerate(parts):
        at = 0
        for piece in local_pieces(weight, shape, local_size=len(part), tp_rank=tp_rank, tp_size=len(parts)):
            if piece.hf is not None:
                yield piece.hf, part[at : at + len(piece)]
            at += len(piece)


def copies(ranks: list[Recorded], slices: Slices, shape: ModelShape) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, one copy, another) of everything that several ranks hold: over replicas, ranks of a group, tied stages."""
    first: dict[tuple[str, int], Tensor] = {}
    for rank in ranks:
        for name, tensor in slices(rank).items():
            shared = EMBEDDING.mcore if name == OUTPUT.mcore and shape.tie_embeddings else name
            key = (shared, rank["place"][0] if _is_split(name, shape) else 0)
            if key in first:
                yield name, first[key], tensor
            first.setdefault(key, tensor)


def _is_split(name: str, shape: ModelShape) -> bool:
    if name.endswith((".lora_a", ".lora_b")):
        split = LINEARS[name.split(".")[-2]][1]
        return (split == "column") == name.endswith("lora_b")
    weight = weight_of_parameter(name, shape)
    return weight is not None and weight.axis is not None
