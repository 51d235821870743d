"""`medllm plan`: what a run needs on every GPU, how fast it goes, and how long and how much it takes."""

from dataclasses import dataclass

from megatron_medllm.errors import UserError
from megatron_medllm.planner.flops import model_flops_per_token
from megatron_medllm.planner.hardware import Hardware, load_hardware
from megatron_medllm.planner.host_memory import save_host_bytes
from megatron_medllm.planner.memory import StageMemory, stage_memory
from megatron_medllm.planner.parameters import chunk_weights, total_parameters
from megatron_medllm.planner.reliability import Reliability, reliability
from megatron_medllm.planner.step_time import StepTime, step_time
from megatron_medllm.planner.workload import Workload


@dataclass(frozen=True)
class Checkpoint:
    """Bytes of one save, and the seconds it takes."""

    weights_bytes: int
    optimizer_bytes: int
    save_time_s: float
    hf_export_bytes: int
    host_bytes: int  # that a save adds to a process's host memory, one tensor at a time
    background_host_bytes: int  # likewise with `async_save`

    @property
    def total_bytes(self) -> int:
        """What a training checkpoint occupies."""
        return self.weights_bytes + self.optimizer_bytes


@dataclass(frozen=True)
class Plan:
    """The answer, with what it was computed from."""

    workload: Workload
    hardware: Hardware
    stages: tuple[StageMemory, ...]
    step: StepTime
    checkpoint: Checkpoint
    reliability: Reliability

    @property
    def peak_stage(self) -> StageMemory:
        """The stage that needs the most memory."""
        return max(self.stages, key=lambda s: s.total_bytes)

    @property
    def cpu_stage(self) -> StageMemory:
        """The stage whose processes need the most memory on a machine without GPUs."""
        stages = range(self.workload.layout.pp)
        return max((stage_memory(self.workload, stage=s, on_cpu=True) for s in stages), key=lambda s: s.total_bytes)

    @property
    def fits(self) -> bool:
        """Whether the fullest GPU has room."""
        return self.peak_stage.total_bytes <= self.hardware.memory_bytes

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Tokens per second and GPU, padding included."""
        return self.workload.tokens_per_step / self.step.total_s / self.workload.layout.world_size

    @property
    def peak_flops(self) -> float:
        """The peak that MFU is measured against: the precision's of the layers."""
        hardware = self.hardware
        fp8 = self.workload.fp8_products and hardware.peak_fp8_flops
        return fp8 or hardware.peak_bf16_flops

    def mfu(self, *, causal: bool = True) -> float:
        """Model FLOP utilisation, 0 to 1."""
        return self.tokens_per_s_per_gpu * model_flops_per_token(self.workload, causal=causal) / self.peak_flops

    @property
    def training_time_s(self) -> float | None:
        """Seconds of training without failures for the token budget; None without a budget."""
        return None if self.total_steps is None else self.total_steps * self.step.total_s

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps for the token budget; None without a budget."""
        budget = self.workload.token_budget
        return None if budget is None else -(-budget // self.workload.tokens_per_step)


def plan(workload: Workload, hardware: Hardware | str = "h100-sxm") -> Plan:
    """Compute the plan of one workload.

    Raises:
        UserError: unknown hardware, or a precision that it lacks.
    """
    machine = load_hardware(hardware) if isinstance(hardware, str) else hardware
    stages = tuple(
        stage_memory(workload, stage=s, reserved_bytes=machine.reserved_bytes) for s in range(workload.layout.pp)
    )
    checkpoint = plan_checkpoint(workload, machine)
    nodes = -(-workload.layout.world_size // machine.gpus_per_node)
    failures = reliability(
        gpus=workload.layout.world_size,
        mtbf_gpu_hours=machine.mtbf_gpu_hours,
        save_time_s=checkpoint.save_time_s,
        restart_time_s=RESTART_TIME_S + checkpoint.total_bytes / storage_bandwidth(machine, nodes),
    )
    return Plan(workload, machine, stages, step_time(workload, machine), checkpoint, failures)


# Requeue, container start, imports, NCCL set-up: an assumption, overwritten by what `medllm status` measures.
RESTART_TIME_S = 300.0


def storage_bandwidth(hardware: Hardware, nodes: int) -> float:
    """Bytes/s that `nodes` nodes write together."""
    return min(hardware.storage_bandwidth_per_node * nodes, hardware.storage_bandwidth_total)


def plan_checkpoint(workload: Workload, hardware: Hardware) -> Checkpoint:
    """Size and save time of a training checkpoint: what is trained, its fp32 copy and both moments, each once."""
    trained = 0
    for stage in range(workload.layout.pp):
        for chunk in range(workload.layout.vpp):
            weights = chunk_weights(workload, stage=stage, chunk=chunk)
            trained += sum(w.numel for w in weights if w.adapter or not workload.frozen_base)
    trained *= workload.layout.tp
    # The distributed optimizer stores an fp32 copy even of fp32 weights.
    main = 0 if workload.precision == "fp32" and not workload.layout.distributed_optimizer else 4
    weights_bytes, optimizer = trained * workload.compute_bytes, trained * (main + 8)
    nodes = -(-workload.layout.world_size // hardware.gpus_per_node)
    save = (weights_bytes + optimizer) / storage_bandwidth(hardware, nodes)
    return Checkpoint(
        weights_bytes,
        optimizer,
        save,
        2 * total_parameters(workload.shape),
        host_bytes=save_host_bytes(workload, in_background=False),
        background_host_bytes=save_host_bytes(workload, in_background=True),
    )


def require_fit(found: Plan) -> None:
    """Refuse a plan that cannot fit.

    Raises:
        UserError: names the stage, what it needs, what the GPU has, and the largest part.
    """
    if found.fits:
        return
    stage = found.peak_stage
    part, size = max(stage.parts.items(), key=lambda item: item[1])
    raise UserError(
        f"stage {stage.stage} needs {stage.total_bytes / 2**30:.1f} GiB per GPU, {found.hardware.name} has "
        f"{found.hardware.memory_bytes / 2**30:.1f}; the largest part is {part} with {size / 2**30:.1f} GiB "
        "(see `medllm plan CONFIG --search` for layouts that fit, or --force)"
    )
