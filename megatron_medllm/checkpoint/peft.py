"""Adapters in PEFT's format: read, written from a training checkpoint, merged into a Hugging Face (HF) directory.

PEFT adapts HF's seven projections, we adapt four fused ones. Ours become PEFT's exactly: q, k and v (gate and up) get
the same A, and each its rows of B. The way back is in `peft_model`.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_medllm.checkpoint.hf_source import HFWeights
from megatron_medllm.checkpoint.hf_target import DEFAULT_SHARD_BYTES, HFTarget, partial_dir, refuse_existing
from megatron_medllm.checkpoint.names import LAYER_WEIGHTS, Weight, hf_shape, hf_shapes, local_pieces
from megatron_medllm.checkpoint.safetensors_file import DTYPES, byte_view, read_header, read_slice
from megatron_medllm.checkpoint.torch_dist import TorchDistReader
from megatron_medllm.config.model import ModelShape
from megatron_medllm.config.train import AdapterConfig
from megatron_medllm.errors import UserError
from megatron_medllm.storage import full_disk_error, read_json, write_json

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings of PEFT that change what an adapter computes, with the only values that are understood.
_PLAIN = {
    "bias": "none",
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "fan_in_fan_out": False,
    "modules_to_save": None,
}


def linear_weights(shape: ModelShape) -> Iterator[Weight]:
    """The name table's rows of all linears that can carry an adapter, layer by layer."""
    rows = [row for row in LAYER_WEIGHTS if ".linear_" in row.mcore and row.mcore.endswith("weight")]
    rows = [row for row in rows if not row.mcore.endswith("layer_norm_weight")]
    for layer in range(shape.num_layers):
        yield from (row.at_layer(layer) for row in rows)


@dataclass(frozen=True)
class PeftAdapter:
    """The tensors of a PEFT directory, by the HF weight they adapt: (A [r, k], B [n, r]); and the factor on B A."""

    directory: Path
    halves: dict[str, tuple[Tensor, Tensor]]
    scale: float


def read_peft(directory: Path, shape: ModelShape) -> PeftAdapter:
    """Read a LoRA adapter.

    Raises:
        UserError: not a plain LoRA adapter of this model: another method, a setting that is not understood, half an
            adapter, a foreign tensor, a shape that does not fit (names the file and the setting or tensor).
    """
    config_path, path = directory / CONFIG_NAME, directory / WEIGHTS_NAME
    config = read_json(config_path)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{config_path}: peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    for name, plain in _PLAIN.items():
        if (config.get(name) or plain) != plain:
            raise UserError(f"{config_path}: {name} = {config[name]!r} is not supported")
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{config_path}: r and lora_alpha must be numbers") from None
    tensors = _read_tensors(path)
    halves = {}
    for name in (name for weight in linear_weights(shape) for name in weight.hf):
        module = f"{_PREFIX}{name.removesuffix('.weight')}"
        pair = [tensors.pop(f"{module}.lora_{half}.weight", None) for half in "AB"]
        if any(half is not None for half in pair):
            outputs, inputs = hf_shape(name, shape)
            a = _checked(pair[0], path, f"{module}.lora_A.weight", (rank, inputs))
            b = _checked(pair[1], path, f"{module}.lora_B.weight", (outputs, rank))
            halves[name] = (a, b)
    if tensors:
        raise UserError(f"{path}: tensor {min(tensors)!r} belongs to no linear layer of this model")
    return PeftAdapter(directory, halves, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _checked(tensor: Tensor | None, path: Path, name: str, expected: tuple[int, int]) -> Tensor:
    if tensor is None:
        raise UserError(f"{path}: tensor {name!r} is missing, though its other half is there")
    if tensor.shape != expected:
        raise UserError(f"{path}: tensor {name!r} has shape {list(tensor.shape)}, expected {list(expected)}")
    return tensor


def _read_tensors(path: Path) -> dict[str, Tensor]:
    tensors = {}
    header = read_header(path)
    fd = os.open(path, os.O_RDONLY)
    try:
        for name, entry in header.items():
            if entry.dtype not in DTYPES:
                raise UserError(f"{path}: tensor {name!r} has type {entry.dtype}, expected one of {', '.join(DTYPES)}")
            tensors[name] = read_slice(fd, entry, axis=0, start=0, stop=entry.shape[0])
    finally:
        os.close(fd)
    return tensors


def export_peft(
    checkpoint: Path, peft_dir: Path, *, shape: ModelShape, adapter: AdapterConfig, base: str | None
) -> None:
    """Write the adapters of a training checkpoint as a directory that `peft` loads.

    Args:
        checkpoint: a distributed checkpoint of a run with `adapter`, of any layout.
        peft_dir: takes its name only when all is written.
        shape: the model's, unpadded.
        adapter: the run's section.
        base: HF directory or hub name of the base model, for `adapter_config.json`.

    Raises:
        UserError: `peft_dir` exists, the checkpoint lacks an adapter, or the disk is full.
    """
    refuse_existing(peft_dir)
    reader = TorchDistReader(checkpoint)
    tensors: dict[str, Tensor] = {}
    modules: set[str] = set()
    for weight in linear_weights(shape):
        if weight.mcore.split(".")[-2] not in adapter.targets:
            continue
        halves = _stored_half(reader, weight, "lora_a"), _stored_half(reader, weight, "lora_b")
        for name, (a, b) in split_halves(*halves, weight, shape).items():
            module = name.removesuffix(".weight")
            modules.add(module.rpartition(".")[2])
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = a.clone()  # shared by q, k and v: the format wants copies
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = b.contiguous()
    with _growing(peft_dir) as partial:
        save_file(tensors, partial / WEIGHTS_NAME, metadata={"format": "pt"})
        write_json(partial / CONFIG_NAME, _peft_config(adapter, sorted(modules), base))


def _peft_config(adapter: AdapterConfig, modules: list[str], base: str | None) -> dict:
    return _PLAIN | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": modules,
    }


def _stored_half(reader: TorchDistReader, weight: Weight, half: str) -> Tensor:
    """A or B of one linear, whole."""
    named = Weight(f"{weight.mcore.removesuffix('weight')}{half}", weight.hf, weight.axis)
    key, layer = reader.find(named)
    chunks = reader.chunks(key, layer)
    rows = max(chunk.row + chunk.sizes[0] for chunk in chunks)
    columns = max(chunk.column + chunk.sizes[1] for chunk in chunks)
    whole = torch.empty(rows, columns, dtype=reader.dtype_of(key))
    for chunk in chunks:
        height, width = chunk.sizes
        place = whole[chunk.row : chunk.row + height, chunk.column : chunk.column + width]
        place.copy_(reader.load(chunk, layer))
    return whole


def split_halves(a: Tensor, b: Tensor, weight: Weight, shape: ModelShape) -> dict[str, tuple[Tensor, Tensor]]:
    """A fused linear's adapter as one for each HF weight in it; rows and columns of padding are dropped.

    Args:
        a: [r, k], over the whole tensor-parallel group.
        b: [n, r], likewise.
        weight: the linear's row of the name table.
        shape: the model's, unpadded.
    """
    if weight.axis == 1:
        return {weight.hf[0]: (a[:, : hf_shape(weight.hf[0], shape)[1]], b)}
    parts: dict[str, list[Tensor]] = {name: [] for name in weight.hf}
    at = 0
    for piece in local_pieces(weight, shape, local_size=b.shape[0], tp_rank=0, tp_size=1):
        if piece.hf is not None:  # the pieces of one HF weight follow each other in its own order
            parts[piece.hf].append(b[at : at + len(piece)])
        at += len(piece)
    return {name: (a, torch.cat(rows)) for name, rows in parts.items()}


@contextmanager
def _growing(final: Path) -> Iterator[Path]:
    """A directory that takes its name when the block ends without an error, and is gone otherwise."""
    partial = partial_dir(final)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, final)
    except OSError as error:
        raise full_disk_error(error, final) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@torch.no_grad()
def merge_peft(
    base_dir: Path,
    adapter: PeftAdapter,
    hf_dir: Path,
    shape: ModelShape,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write an HF directory with W + scale B A in place of every adapted W, one tensor in memory at a time.

    Sums are in fp32 and rounded once. The base is the one on disk: of a run on an FP8 or NF4 base this is not quite
    the model that was trained; `export_hf` from that run is.

    Raises:
        UserError: `hf_dir` exists, the base is not this model, or the disk is full; nothing is left behind.
    """
    refuse_existing(hf_dir)
    source = HFWeights(base_dir, shape)
    with _growing(hf_dir) as partial:
        target = HFTarget(partial, shape, dtype, shard_bytes)
        target.create_files()
        digests = {}
        for name, size in hf_shapes(shape).items():
            weight = source.read(name, axis=0, start=0, stop=size[0])
            if name in adapter.halves:
                a, b = adapter.halves[name]
                weight = torch.addmm(weight.float(), b.float(), a.float(), alpha=adapter.scale)
            weight = weight.to(dtype)
            target.write(name, weight)
            digests[name] = hashlib.sha256(byte_view(weight)).hexdigest()
        target.finish(shape=shape, source_dir=base_dir, digests=digests)
