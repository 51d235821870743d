"""What this process writes of a checkpoint, without a copy of what it does not own.

Megatron-Core's movable format of the distributed optimizer (`fully_reshardable`) stores one tensor of the parameter's
shape for the parameter's fp32 copy and for each moment. Upstream first gathers them, whole, in every data-parallel
rank's host memory. A rank owns a contiguous range of each flattened parameter, though, and such a range is at most a
few boxes (part of a row, whole rows, part of a row). A chunk of a stored tensor may be any box, so each rank writes its
own boxes under the same keys, and any layout reads them as before.
"""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes


@dataclass(frozen=True)
class StatePiece:
    """A box of a stored tensor, or (`offsets` None) a small object's bytes, that this process writes."""

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...] | None
    data: Tensor | bytes


@dataclass(frozen=True)
class LocalState:
    """What this process writes, and what the main process writes for all: settings that every process agrees in."""

    pieces: list[StatePiece]
    common: dict[str, Any]


def boxes(shape: tuple[int, ...], start: int, end: int) -> Iterator[Box]:
    """The fewest boxes, in order, that make up the elements [start, end) of a flattened tensor."""
    if start >= end:
        return
    if len(shape) <= 1:
        yield (start,) * len(shape), (end - start,) * len(shape)
        return
    row = math.prod(shape[1:])
    whole_start, whole_end = -(-start // row), end // row
    if whole_start > whole_end:  # inside one row
        yield from _in_row(shape, whole_end, start, end)
        return
    yield from _in_row(shape, whole_start - 1, start, whole_start * row)
    if whole_start < whole_end:
        yield (whole_start, *(0,) * (len(shape) - 1)), (whole_end - whole_start, *shape[1:])
    yield from _in_row(shape, whole_end, whole_end * row, end)


def _in_row(shape: tuple[int, ...], index: int, start: int, end: int) -> Iterator[Box]:
    first = index * math.prod(shape[1:])
    for offsets, sizes in boxes(shape[1:], start - first, end - first):
        yield (index, *offsets), (1, *sizes)


def optimizer_state(optimizer: MegatronOptimizer, model_state: dict[str, Any], metadata: dict[str, Any]) -> Any:
    """An optimizer's sharded state for saving, in which this process has its own share alone.

    Args:
        optimizer: of the model whose state is given.
        model_state: its sharded state dict.
        metadata: Megatron-Core's, with `distrib_optim_sharding_type`.
    """
    leaf = optimizer
    if isinstance(optimizer, ChainedOptimizer) and len(optimizer.chained_optimizers) == 1:
        leaf = optimizer.chained_optimizers[0]
    if not isinstance(leaf, DistributedOptimizer):
        return optimizer.sharded_state_dict(model_state, metadata=metadata)
    owned = list(_owned_parameters(leaf, model_state))
    return leaf.state_dict() | {"param_state": owned, "param_state_sharding_type": "fully_reshardable"}


def _owned_parameters(optimizer: DistributedOptimizer, model_state: dict[str, Any]) -> Iterator[ShardedTensor]:
    """The boxes of this rank's part of each parameter's fp32 copy and moments."""
    entries = {
        entry.data: entry
        for entry in nested_values(model_state)
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }
    for buffers in optimizer.gbuf_ranges:
        for buckets in buffers.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    tensors = optimizer._get_main_param_and_optimizer_states(parameter)
                    for name, flat in tensors.items():
                        if name != "step":  # of all parameters together, kept in the parameter groups
                            # As upstream does, bf16 moments are stored in fp32.
                            own = flat.detach().float()
                            yield from _owned_boxes(
                                entries[parameter], f"optimizer.state.{name}", own, ranges["param"].start
                            )


def _owned_boxes(
    entry: ShardedTensor | ShardedTensorFactory, prefix: str, flat: Tensor, first: int
) -> Iterator[ShardedTensor]:
    """Elements [first, first + len(flat)) of a parameter as boxes of the stored tensors that the parameter makes up."""
    parameter = entry.data
    parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]  # gate and up are stored apart
    for part in parts:
        assert part.data.is_contiguous() and len(part.replica_id) == 3, part
        begin = part.data.storage_offset() - parameter.storage_offset()
        shape, numel = tuple(part.local_shape), part.data.numel()
        low, high = max(first, begin), min(first + len(flat), begin + numel)
        for offsets, sizes in boxes(shape, low - begin, high - begin):
            place = begin + sum(o * math.prod(shape[i + 1 :]) for i, o in enumerate(offsets)) - first
            stacked = part.prepend_axis_num
            yield replace(
                part,
                key=f"{prefix}.{part.key}",
                data=flat[place : place + math.prod(sizes)].view((1,) * stacked + sizes),
                dtype=flat.dtype,
                local_shape=(1,) * stacked + sizes,
                global_offset=(
                    *part.global_offset[:stacked],
                    *(a + b for a, b in zip(part.global_offset[stacked:], offsets, strict=True)),
                ),
                axis_fragmentations=None,
                prepend_axis_num=0,
                replica_id=(*part.replica_id[:2], 0),  # no data-parallel rank has it but this one
            )


def divide_state(state: dict[str, Any], group: torch.distributed.ProcessGroup) -> LocalState:
    """Divide what several ranks of `group` hold evenly among them, and list what this process writes. Collective.

    The pieces' tensors are the state's own: nothing is copied.
    """
    sharded, common = save_preprocess(state)
    shares = determine_main_replica_uniform_distribution(sharded, group)
    distribute_main_replicas_with_precomputed_distribution(sharded, group, shares)
    pieces: list[StatePiece] = []
    objects: dict[str, list[Any]] = {}
    for entry in nested_values(sharded):
        if not is_written_here(entry):
            continue
        if isinstance(entry, ShardedObject):
            objects.setdefault(entry.unique_key, []).append(entry.data)
        else:
            data = entry.data.detach().reshape((1,) * entry.prepend_axis_num + tuple(entry.local_shape))
            pieces.append(StatePiece(entry.key, tuple(entry.global_shape), tuple(entry.global_offset), data))
    for key, values in objects.items():
        stream = io.BytesIO()
        torch.save(values, stream)
        pieces.append(StatePiece(key, (), None, stream.getvalue()))
    return LocalState(pieces, common)


def is_written_here(entry: ShardedTensor | ShardedTensorFactory | ShardedObject) -> bool:
    """Whether this process, of all that hold it, writes an entry."""
    replica = entry.replica_id
    return not any(replica) if isinstance(replica, tuple) else replica == 0
