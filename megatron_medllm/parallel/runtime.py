"""Starts the processes' common ground: device, process groups, Megatron-Core's parallel state, random seeds."""

import logging
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.errors import UserError
from megatron_medllm.parallel import adam, alone
from megatron_medllm.parallel.context import ContextSplit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runtime:
    """Where this process stands. Groups are Megatron-Core's; they are passed on, never looked up deep inside."""

    device: torch.device
    rank: int
    world_size: int
    layout: LayoutConfig
    tp_rank: int
    pp_rank: int
    dp_rank: int
    dp_size: int
    cp_rank: int
    tp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    is_last_stage: bool

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes what is written once."""
        return self.rank == 0

    @property
    def split(self) -> ContextSplit:
        """Which part of its replica's streams this process holds."""
        return ContextSplit(self.cp_rank, self.layout.cp)


def launched_world_size() -> int:
    """Processes that an outer torchrun or srun started; 1 when there is none."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(layout: LayoutConfig, *, seed: int, timeout_s: float = 600.0, alone_as: int | None = None) -> Runtime:
    """Join the process group and lay out Megatron-Core's groups over it.

    On a machine without CUDA, `megatron.core` is redirected to the CPU first and gloo carries the communication.

    Args:
        layout: parallel sizes; their product must be the world's size.
        seed: for weights and dropout; tensor-parallel ranks derive their own from it.
        timeout_s: after which a collective without an answer fails.
        alone_as: be this rank of the layout, whose other ranks do not exist (`parallel.alone`).

    Raises:
        UserError: the layout does not fit the number of processes, or needs what this machine lacks.
    """
    world_size = launched_world_size() if alone_as is None else layout.world_size
    if alone_as is not None and not 0 <= alone_as < world_size:
        raise UserError(f"rank {alone_as} is not one of the layout's {world_size} (0 to {world_size - 1})")
    if world_size != layout.world_size:
        raise UserError(f"layout needs {layout.world_size} processes, but {world_size} were started")
    device = local_device(cuda=torch.cuda.is_available(), environment=os.environ)
    if device.type == "cuda":
        for warning in host_settings(layout, os.environ):
            log.warning("%s", warning)
        torch.cuda.set_device(device)
        adam.install("cuda")
    else:
        from megatron_medllm.parallel import cpu

        cpu.install()
    if alone_as is None:
        dist.init_process_group(**group_settings(device, os.environ, world_size=world_size, timeout_s=timeout_s))
    else:
        alone.join(rank=alone_as, world_size=world_size)

    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        distributed_timeout_minutes=timeout_s / 60,  # of every group; upstream's own 30 minutes otherwise
        create_gloo_process_groups=False,  # beside NCCL's, for gathers that we do not make; one would keep 30 minutes
    )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    return Runtime(
        device=device,
        rank=dist.get_rank(),
        world_size=world_size,
        layout=layout,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=pp_rank,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        is_last_stage=pp_rank == layout.pp - 1,
    )


def stop() -> None:
    """Leave the process group, so that another runtime may start in this process."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def local_device(*, cuda: bool, environment: Mapping[str, str]) -> torch.device:
    """The device of this process: its node's GPU number LOCAL_RANK, or the CPU."""
    return torch.device("cuda", int(environment.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")


def host_settings(layout: LayoutConfig, environment: MutableMapping[str, str]) -> list[str]:
    """Set what CUDA and InfiniBand must find in the environment before they start; what is left to the user, in words.

    A process that forks while InfiniBand is in use (a data loader, an asynchronous save) corrupts its registered
    memory, unless the verbs library was told beforehand.
    """
    for name in ("RDMAV_FORK_SAFE", "IBV_FORK_SAFE"):
        environment.setdefault(name, "1")
    connections = environment.get("CUDA_DEVICE_MAX_CONNECTIONS")
    if layout.tp > 1 and connections != "1":
        return [
            f"CUDA_DEVICE_MAX_CONNECTIONS is {connections or 'not set'}: with layout.tp={layout.tp} set it to 1, so "
            "that tensor-parallel exchanges start in the order that they overlap in"
        ]
    return []


def group_settings(
    device: torch.device, environment: Mapping[str, str], *, world_size: int, timeout_s: float
) -> dict[str, Any]:
    """What `init_process_group` is given: NCCL on CUDA, gloo on a CPU; a store of its own for a single process."""
    settings: dict[str, Any] = {"backend": "gloo", "timeout": timedelta(seconds=timeout_s)}
    if device.type == "cuda":
        settings |= {"backend": "nccl", "device_id": device}
    if world_size == 1 and "MASTER_ADDR" not in environment:
        settings |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    return settings
