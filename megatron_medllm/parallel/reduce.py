"""Sums of metrics over the whole run's processes."""

import torch
import torch.distributed as dist

from megatron_medllm.parallel.runtime import Runtime


def sum_metrics(parts: list[dict[str, torch.Tensor]], names: tuple[str, ...], runtime: Runtime) -> dict[str, float]:
    """Add up named scalars over micro-batches and replicas, and give every process the result.

    Args:
        parts: one dict a micro-batch; empty except on the last pipeline stage.
        names: what to add up, the same on every process.
        runtime: where this process stands; of each tensor-parallel group one member counts. Context-parallel ranks all
            count: of what they know together, all but one must have left zeros.
    """
    total = torch.zeros(len(names), dtype=torch.float64)
    if runtime.is_last_stage and runtime.tp_rank == 0:
        for part in parts:
            total += torch.stack([part[name].detach().double().cpu() for name in names])
    total = total.to(runtime.device)
    dist.all_reduce(total)
    return dict(zip(names, total.tolist(), strict=True))
