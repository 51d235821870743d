"""A Hugging Face (HF) directory written out of a running Megatron layout, every rank its part.

All shapes are known before the first byte is written, so the main process lays out the files at their full size and
every rank writes whole tensors at their places. The slices of a tensor meet on one rank of their tensor-parallel (TP)
group; which rank, and which data-parallel copy of it, rotates from tensor to tensor. The directory carries another
name until every process has finished, so it is either whole or absent.
"""

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_medllm.checkpoint.hf_target import DEFAULT_SHARD_BYTES, HFTarget, partial_dir, refuse_existing
from megatron_medllm.checkpoint.names import EMBEDDING, OUTPUT, Weight, hf_shape, local_pieces, weight_of_parameter
from megatron_medllm.checkpoint.safetensors_file import byte_view
from megatron_medllm.config.model import ModelShape
from megatron_medllm.errors import UserError
from megatron_medllm.models.adapters import merged_parameters
from megatron_medllm.models.gpt import unwrap
from megatron_medllm.parallel.overlap import gather_parameters
from megatron_medllm.parallel.runtime import Runtime
from megatron_medllm.storage import full_disk_error


@torch.no_grad()
def export_hf(
    model_chunks: Sequence[nn.Module],
    shape: ModelShape,
    hf_dir: Path,
    *,
    runtime: Runtime,
    source_dir: Path | None,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write the running model as an HF directory; every process of the run must call this.

    Vocabulary and FFN padding are stripped, adapters are merged into their base, and a tied head is written once, as
    the embedding.

    Args:
        model_chunks: this rank's chunks, wrapped or not.
        shape: the model's shape as HF says it (unpadded).
        hf_dir: takes its name only when all is written.
        runtime: where this process stands.
        source_dir: HF directory whose tokenizer, generation settings and special token ids are carried along.
        dtype: of all tensors written.
        shard_bytes: a new file starts where a file would grow beyond this.

    Raises:
        UserError: `hf_dir` exists or the disk is full; raised on every process, and nothing is left behind.
    """
    gather_parameters(model_chunks)
    partial = partial_dir(hf_dir)
    target = HFTarget(partial, shape, dtype, shard_bytes)
    failure = _create_on_main(target, hf_dir, runtime)
    digests: dict[str, str] = {}
    if failure is None:
        digests, failure = _write_part(model_chunks, shape, target, runtime)
    everyone: list[Any] = [None] * runtime.world_size
    dist.all_gather_object(everyone, (digests, failure))
    failure = next((text for _, text in everyone if text is not None), None)
    if failure is None and runtime.is_main:
        failure = _finish_on_main([part for part, _ in everyone], target, hf_dir, shape, source_dir)
    failure = _tell_everyone(failure)
    if failure is not None:
        if runtime.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(failure)


def _tell_everyone(failure: str | None) -> str | None:
    """The main process's failure, on every process."""
    box = [failure]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _create_on_main(target: HFTarget, hf_dir: Path, runtime: Runtime) -> str | None:
    failure = None
    if runtime.is_main:
        try:
            refuse_existing(hf_dir)
            shutil.rmtree(target.hf_dir, ignore_errors=True)  # of a run that was killed
            target.create_files()
        except UserError as error:
            failure = str(error)
    return _tell_everyone(failure)


def _finish_on_main(
    parts: list[dict[str, str]], target: HFTarget, hf_dir: Path, shape: ModelShape, source_dir: Path | None
) -> str | None:
    digests = {name: digest for part in parts for name, digest in part.items()}
    missing = sorted(target.place.keys() - digests.keys())
    if missing:
        raise RuntimeError(f"no process wrote {missing[0]!r} (and {len(missing) - 1} more)")
    try:
        target.finish(shape=shape, source_dir=source_dir, digests=digests)
        os.replace(target.hf_dir, hf_dir)
    except UserError as error:
        return str(error)
    except OSError as error:
        return str(full_disk_error(error, hf_dir))
    return None


def _write_part(
    model_chunks: Sequence[nn.Module], shape: ModelShape, target: HFTarget, runtime: Runtime
) -> tuple[dict[str, str], str | None]:
    """Write the tensors that fall to this rank; after a failure go on meeting the others, but write no more."""
    digests: dict[str, str] = {}
    failure = None
    number = 0
    copies = runtime.dp_size * runtime.layout.cp
    copy = runtime.dp_rank * runtime.layout.cp + runtime.cp_rank
    for chunk in model_chunks:
        for name, tensor in merged_parameters(unwrap(chunk)):
            weight = weight_of_parameter(name, shape)
            if weight is None:
                raise ValueError(f"{name} is no part of an HF model")
            if weight.mcore == OUTPUT.mcore and weight.hf == EMBEDDING.hf:
                continue  # the tied copy on the last stage
            number += 1
            if number % copies != copy:
                continue  # another copy of the model writes this one
            owner = (number // copies) % runtime.layout.tp
            slices = _gather_slices(tensor.to(target.dtype), weight, owner=owner, runtime=runtime)
            if slices is None or failure is not None:
                continue
            try:
                for hf_name, whole in assemble(slices, weight, shape).items():
                    target.write(hf_name, whole)
                    digests[hf_name] = hashlib.sha256(byte_view(whole)).hexdigest()
            except UserError as error:
                failure = str(error)
    return digests, failure


def _gather_slices(local: Tensor, weight: Weight, *, owner: int, runtime: Runtime) -> list[Tensor] | None:
    """The slices of all TP ranks on rank `owner` of the group, on the CPU; None on the others."""
    local = local.detach().contiguous()
    is_owner = runtime.tp_rank == owner
    if weight.axis is None or runtime.layout.tp == 1:
        return [local.cpu()] if is_owner else None
    slices = [torch.empty_like(local) for _ in range(runtime.layout.tp)] if is_owner else None
    dist.gather(local, slices, dst=dist.get_global_rank(runtime.tp_group, owner), group=runtime.tp_group)
    return [part.cpu() for part in slices] if slices is not None else None


def assemble(slices: list[Tensor], weight: Weight, shape: ModelShape) -> dict[str, Tensor]:
    """The HF tensors inside one Megatron tensor, from its slices on all TP ranks in rank order; padding dropped."""
    axis = weight.axis or 0
    tensors = {name: slices[0].new_empty(hf_shape(name, shape)) for name in weight.hf}
    for tp_rank, local in enumerate(slices):
        at = 0
        for piece in local_pieces(weight, shape, local_size=local.shape[axis], tp_rank=tp_rank, tp_size=len(slices)):
            if piece.hf is not None:
                place = tensors[piece.hf].narrow(axis, piece.start, len(piece))
                place.copy_(local.narrow(axis, at, len(piece)))
            at += len(piece)
    return tensors
