"""Bytes on the fullest GPU of each pipeline stage, part by part."""

from dataclasses import dataclass
from functools import lru_cache

from megatron_medllm.planner.activations import (
    head_activations,
    head_workspace_bytes,
    saved_per_layer,
    working_set_per_token,
)
from megatron_medllm.planner.optimizer_state import BufferLayout, buffer_layout, default_bucket_size
from megatron_medllm.planner.parameters import PlannedWeight, chunk_layers, chunk_weights, stored_bytes
from megatron_medllm.planner.schedule import Pass, stage_order
from megatron_medllm.planner.workload import Workload

GRADIENT_BYTES = 4  # gradients are accumulated and reduced in fp32
MAIN_WEIGHT_BYTES = 4
# Share of the activations' bytes that the caching allocator cannot reuse (expandable segments keep it small).
FRAGMENTATION = 0.05
# The interpreter, torch and Megatron-Core once imported, measured on a CPU: 428 MB.
CPU_PROCESS_BYTES = 428_000_000


@dataclass(frozen=True)
class StageMemory:
    """One stage's GPU: bytes by part."""

    stage: int
    parts: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


def stage_memory(workload: Workload, *, stage: int, reserved_bytes: int = 0, on_cpu: bool = False) -> StageMemory:
    """Bytes on the fullest rank of `stage`. `reserved_bytes`: CUDA context, cuBLAS and NCCL, from the hardware.

    With `on_cpu` it is a process's memory where there is no GPU: its layers save more, for little is fused there.
    """
    chunks = stage_chunks(workload, stage=stage)
    parts = {
        **weight_bytes(workload, stage=stage),
        **optimizer_bytes(workload, stage=stage, dp_rank=0),
        "fp8 copies": fp8_copy_bytes(workload, chunks),
        "activations": activation_bytes(workload, stage=stage, on_cpu=on_cpu),
        "working set": working_set_per_token(workload) * workload.local_tokens + largest_weight_bytes(workload, chunks),
        "head workspace": head_workspace_bytes(workload) if stage == workload.layout.pp - 1 else 0,
        "communication": communication_bytes(workload),
    }
    dynamic = parts["activations"] + parts["working set"] + parts["head workspace"]
    parts["fragmentation"] = int(FRAGMENTATION * dynamic)
    parts["process" if on_cpu else "context and NCCL"] = CPU_PROCESS_BYTES if on_cpu else reserved_bytes
    return StageMemory(stage, {name: size for name, size in parts.items() if size})


def peak_bytes(workload: Workload, *, reserved_bytes: int) -> int:
    """Bytes on the fullest GPU: the first stage, the last, or (when those are cut short) the second."""
    stages = {0, min(1, workload.layout.pp - 1), workload.layout.pp - 1}
    return max(stage_memory(workload, stage=s, reserved_bytes=reserved_bytes).total_bytes for s in stages)


@lru_cache(maxsize=8)  # a stage's parts all ask for it; the search asks for thousands of stages
def stage_chunks(workload: Workload, *, stage: int) -> list[list[PlannedWeight]]:
    """The tensors of each model chunk of a stage."""
    return [chunk_weights(workload, stage=stage, chunk=v) for v in range(workload.layout.vpp)]


def weight_bytes(workload: Workload, *, stage: int) -> dict[str, int]:
    """What the forward pass reads. The distributed optimizer moves trainable weights into padded buffers."""
    weights = [w for chunk in stage_chunks(workload, stage=stage) for w in chunk]
    if workload.layout.distributed_optimizer:
        trained = workload.compute_bytes * sum(b.numel for b in trainable_buffers(workload, stage=stage))
    else:
        trained = sum(stored_bytes(w, workload) for w in weights if w.adapter or not workload.frozen_base)
    if not workload.frozen_base:
        return {"weights": trained}
    return {"weights": sum(stored_bytes(w, workload) for w in weights if not w.adapter), "adapters": trained}


@lru_cache(maxsize=8)
def trainable_buffers(workload: Workload, *, stage: int) -> list[BufferLayout]:
    """One parameter-and-gradient buffer per model chunk, as Megatron-Core's DDP allocates them."""
    layout = workload.layout
    dp_size = layout.data_parallel_size * layout.cp
    buffers = []
    for index, weights in enumerate(stage_chunks(workload, stage=stage)):
        # Later stages and chunks reduce off the critical path, so Megatron-Core does not split their buffers.
        bucketed = workload.overlap_grad_reduce and stage == 0 and index == 0
        trainable = [w for w in weights if w.adapter or not workload.frozen_base]
        buffers.append(
            buffer_layout(
                trainable,
                dp_size=dp_size,
                distributed_optimizer=layout.distributed_optimizer,
                bucket_size=default_bucket_size(dp_size) if bucketed else None,
            )
        )
    return buffers


def optimizer_bytes(workload: Workload, *, stage: int, dp_rank: int) -> dict[str, int]:
    """Gradients, fp32 main weights and Adam's moments of one rank."""
    layout = workload.layout
    dp_size = layout.data_parallel_size * layout.cp
    buffers = trainable_buffers(workload, stage=stage)
    if layout.distributed_optimizer:
        owned = sum(b.owned_numel(dp_rank=dp_rank, dp_size=dp_size) for b in buffers)
    else:
        owned = sum(end - start for b in buffers for start, end in b.parameters)
    main = 0 if workload.precision == "fp32" else MAIN_WEIGHT_BYTES  # fp32 weights are their own main weights
    return {
        "gradients": GRADIENT_BYTES * sum(b.numel for b in buffers),
        "main weights": main * owned,
        "optimizer moments": workload.moments_bytes * owned,
    }


def fp8_copy_bytes(workload: Workload, chunks: list[list[PlannedWeight]]) -> int:
    """FP8 copies beside bf16 weights in FP8 training: TE keeps the weight and its transpose, our kernels one copy."""
    if workload.precision != "fp8" or workload.mode == "fp8-lora":
        return 0
    copies = 2 if workload.backend == "te" else 1
    return copies * sum(w.numel for c in chunks for w in c if w.quantisable)


def largest_weight_bytes(workload: Workload, chunks: list[list[PlannedWeight]]) -> int:
    """One weight-sized transient: a layer's weight gradient before it is added to the fp32 buffer, or (QLoRA) a
    dequantised weight."""
    if workload.mode in ("lora", "fp8-lora"):
        return 0
    return max((w.numel * workload.compute_bytes for c in chunks for w in c if w.quantisable), default=0)


def in_flight_layers(workload: Workload, *, stage: int) -> int:
    """The most (micro-batch, layer) pairs whose activations are alive at once on a stage, from its schedule."""
    layout = workload.layout
    layers = chunk_layers(layout, workload.shape.num_layers)[stage]
    order = stage_order(stage=stage, pp=layout.pp, vpp=layout.vpp, num_microbatches=workload.num_microbatches)
    return _peak(order, layers)


def _peak(order: list[Pass], layers: list[int]) -> int:
    alive = peak = 0
    for work in order:
        alive += layers[work.chunk] if work.forward else -layers[work.chunk]
        peak = max(peak, alive)
    return peak


def activation_bytes(workload: Workload, *, stage: int, on_cpu: bool = False) -> int:
    """Bytes of saved activations at the stage's peak."""
    tokens = workload.local_tokens
    total = in_flight_layers(workload, stage=stage) * saved_per_layer(workload, on_cpu=on_cpu) * tokens
    if stage == workload.layout.pp - 1:
        total += sum(head_activations(workload, on_cpu=on_cpu).values()) * tokens
    return total


def communication_bytes(workload: Workload) -> int:
    """Transient buffers: the pipeline's receive and send tensors, and the gathered sequence of sequence parallelism."""
    layout, token_bytes = workload.layout, workload.shape.hidden_size * workload.compute_bytes
    tensor = workload.local_tokens * token_bytes
    pipeline = 4 * tensor // (layout.tp if layout.sp else 1) if layout.pp > 1 else 0
    return pipeline + (2 * tensor if layout.sp else 0)
