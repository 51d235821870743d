"""Which layouts of a given number of GPUs fit, best first: `medllm plan --search`."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.errors import UserError
from megatron_medllm.planner.hardware import Hardware, load_hardware
from megatron_medllm.planner.memory import peak_bytes
from megatron_medllm.planner.plan import Plan, plan
from megatron_medllm.planner.workload import Workload

RECOMPUTE = ("none", "selective", "full")


def search(workload: Workload, hardware: Hardware | str = "h100-sxm", *, limit: int = 10) -> list[Plan]:
    """Plan every sensible layout of the workload's world and global batch; keep those that fit, fastest first.

    Tensor parallelism stays inside a node and sequence parallelism goes with it; context parallelism is tried where
    the workload itself uses it.

    Raises:
        UserError: nothing fits; names the layout that came closest.
    """
    machine = load_hardware(hardware) if isinstance(hardware, str) else hardware
    needs = [(peak_bytes(c, reserved_bytes=machine.reserved_bytes), c) for c in candidates(workload, machine)]
    plans = [plan(candidate, machine) for need, candidate in needs if need <= machine.memory_bytes]
    if plans:
        return sorted(plans, key=lambda p: -p.tokens_per_s_per_gpu)[:limit]
    world = f"{workload.layout.world_size} x {machine.name}"
    if not needs:
        raise UserError(f"no layout of {world} divides this model and batch")
    need, closest = min(needs, key=lambda pair: pair[0])
    raise UserError(
        f"no layout of {world} fits; closest: {describe_layout(closest)} needs {need / 2**30:.1f} GiB of "
        f"{machine.memory_bytes / 2**30:.1f}"
    )


def candidates(workload: Workload, hardware: Hardware) -> Iterator[Workload]:
    """The workload under every layout that divides its world, model and batch."""
    world, layers = workload.layout.world_size, workload.shape.num_layers
    for tp in divisors(min(hardware.gpus_per_node, world)):
        for pp in divisors(world // tp) if world % tp == 0 else ():
            for vpp in divisors(layers // pp) if pp > 1 and layers % pp == 0 else [1]:
                for recompute in RECOMPUTE:
                    for micro_batch_size in (1, 2, 4, 8):
                        changes = {"tp": tp, "pp": pp, "vpp": vpp, "sp": tp > 1, "recompute": recompute}
                        found = _with_layout(workload, hardware, changes, micro_batch_size)
                        if found is not None:
                            yield found


def _with_layout(
    workload: Workload, hardware: Hardware, changes: dict[str, Any], micro_batch_size: int
) -> Workload | None:
    world = workload.layout.world_size
    gpus = min(world, hardware.gpus_per_node)
    try:
        layout = LayoutConfig(
            nodes=world // gpus,
            gpus_per_node=gpus,
            cp=workload.layout.cp,
            distributed_optimizer=workload.layout.distributed_optimizer,
            **changes,
        )
        return dataclasses.replace(workload, layout=layout, micro_batch_size=micro_batch_size)
    except (UserError, ValidationError):  # does not divide the world, the model or the batch
        return None


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def describe_layout(workload: Workload) -> str:
    """One line: the parallel sizes, micro-batch and recomputation."""
    layout = workload.layout
    sizes = [("tp", layout.tp), ("pp", layout.pp), ("vpp", layout.vpp), ("cp", layout.cp)]
    shown = [f"{name}{size}" for name, size in sizes if size > 1] or ["tp1"]
    shown += [f"dp{layout.data_parallel_size}", f"mbs{workload.micro_batch_size}"]
    return " ".join([*shown, *([] if layout.recompute == "none" else [f"recompute={layout.recompute}"])])
