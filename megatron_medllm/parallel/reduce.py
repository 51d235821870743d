"""Sums of metrics over the whole run's processes."""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_medllm.parallel.runtime import Runtime
from megatron_medllm.parallel.staging import to_device


def sum_metrics(parts: list[dict[str, Tensor]], names: tuple[str, ...], runtime: Runtime) -> dict[str, float]:
    """Add up named scalars over micro-batches and replicas, and give every process the result.

    Args:
        parts: one dict a micro-batch; empty except on the last pipeline stage.
        names: what to add up, the same on every process.
        runtime: where this process stands; of each tensor-parallel group one member counts. Context-parallel ranks all
            count: of what they know together, all but one must have left zeros.
    """
    return start_sum(parts, names, runtime)()


def start_sum(
    parts: list[dict[str, Tensor]], names: tuple[str, ...], runtime: Runtime
) -> Callable[[], dict[str, float]]:
    """The same without waiting for the device: what is returned waits, and gives the result."""
    total = torch.zeros(len(names), dtype=torch.float64, device=runtime.device)
    if runtime.is_last_stage and runtime.tp_rank == 0 and parts:
        for row in _in_one_place([part[name].detach() for part in parts for name in names], runtime).view(
            len(parts), -1
        ):
            total += row
    dist.all_reduce(total)
    return lambda: dict(zip(names, total.tolist(), strict=True))


def _in_one_place(scalars: list[Tensor], runtime: Runtime) -> Tensor:
    """Scalars [] of any dtypes, some on the host, as one fp64 tensor on the device; nothing is waited for."""
    device = runtime.device
    near = [i for i, scalar in enumerate(scalars) if scalar.device.type == "cpu"]
    on_host = np.array([float(scalars[i]) for i in near], np.float64)
    (moved,) = to_device([on_host], device, ahead=device.type == "cuda") if near else (None,)
    places = {i: moved[at] for at, i in enumerate(near)} if moved is not None else {}
    return torch.stack([places[i] if i in places else scalar.double() for i, scalar in enumerate(scalars)])
