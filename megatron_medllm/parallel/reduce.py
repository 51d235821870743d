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
    if runtime.is_last_stage and runtime.tp_rank == 0 and parts:
        for row in _on_host([part[name].detach() for part in parts for name in names]).view(len(parts), -1):
            total += row
    total = total.to(runtime.device)
    dist.all_reduce(total)
    return dict(zip(names, total.tolist(), strict=True))


def _on_host(scalars: list[torch.Tensor]) -> torch.Tensor:
    """Scalars [] of any dtypes, some on the device, as one fp64 tensor: one copy, which waits once for the device."""
    values = torch.empty(len(scalars), dtype=torch.float64)
    far = [i for i, scalar in enumerate(scalars) if scalar.device.type != "cpu"]
    near = [i for i, scalar in enumerate(scalars) if scalar.device.type == "cpu"]
    for places in (near, far):
        if places:
            values[places] = torch.stack([scalars[i].double() for i in places]).cpu()
    return values
