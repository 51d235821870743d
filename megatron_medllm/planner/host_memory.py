"""Bytes of host memory that a save adds to a process, beside what training holds.

A rank writes its own share: its part of the optimizer's state, and of what data-parallel ranks hold alike a share that
makes them even (checkpoint/state_writer.py). In the background it first copies all of that to host memory; otherwise it
copies one tensor at a time.
"""

from functools import lru_cache

from megatron_medllm.planner.memory import stage_chunks, trainable_buffers
from megatron_medllm.planner.parameters import PlannedWeight
from megatron_medllm.planner.workload import Workload

FP32_BYTES = 4
STATE_TENSORS = 3  # the fp32 copy and two moments


def save_host_bytes(workload: Workload, *, in_background: bool) -> int:
    """Host memory that a save adds to the process that needs most."""
    stages = range(workload.layout.pp)
    if in_background:
        return max(max(saved_share_bytes(workload, stage=stage)) for stage in stages)
    return max(_largest_tensor_bytes(workload, stage=stage) for stage in stages)


@lru_cache(maxsize=8)
def saved_share_bytes(workload: Workload, *, stage: int) -> tuple[int, ...]:
    """What each data-parallel rank of a stage writes; of tensor-parallel ranks the first, which writes the norms too.

    Megatron-Core gives what several ranks hold to the one with the least so far, the largest tensor first.
    """
    layout = workload.layout
    ranks = layout.data_parallel_size * layout.cp
    trained = [w for chunk in stage_chunks(workload, stage=stage) for w in chunk if _is_trained(w, workload)]
    shares = [0] * ranks
    shared = [size for weight in trained for size in _stored(weight, workload.compute_bytes)]
    if layout.distributed_optimizer:
        for rank in range(ranks):
            owned = sum(b.owned_numel(dp_rank=rank, dp_size=ranks) for b in trainable_buffers(workload, stage=stage))
            shares[rank] = STATE_TENSORS * FP32_BYTES * owned
    else:  # fp32 weights are their own fp32 copy
        copies = STATE_TENSORS - (workload.precision == "fp32")
        shared += copies * [size for weight in trained for size in _stored(weight, FP32_BYTES)]
    for size in sorted(shared, reverse=True):
        shares[shares.index(min(shares))] += size
    return tuple(shares)


def _is_trained(weight: PlannedWeight, workload: Workload) -> bool:
    return weight.adapter or not workload.frozen_base


def _stored(weight: PlannedWeight, element_bytes: int) -> list[int]:
    """Sizes of the tensors that a weight is stored as: gate and up apart."""
    size = weight.numel * element_bytes
    return [size // 2, size // 2] if ".linear_fc1." in weight.name and not weight.name.endswith("lora_a") else [size]


def _largest_tensor_bytes(workload: Workload, *, stage: int) -> int:
    sizes = [
        size
        for chunk in stage_chunks(workload, stage=stage)
        for weight in chunk
        if _is_trained(weight, workload)
        for size in _stored(weight, FP32_BYTES)
    ]
    return min(max(sizes, default=0), max(saved_share_bytes(workload, stage=stage)))
