"""Beyond one cluster: the same job on more and more GPUs, with the failures that come with them."""

import dataclasses
from dataclasses import dataclass

from megatron_medllm.errors import UserError
from megatron_medllm.planner.hardware import Hardware, load_hardware
from megatron_medllm.planner.plan import plan
from megatron_medllm.planner.workload import Workload


@dataclass(frozen=True)
class ScalePoint:
    """One world size. `tokens_per_s` is the whole job's over wall time, failures and saves included."""

    gpus: int
    tokens_per_s_per_gpu: float
    failure_efficiency: float
    save_every_s: float
    num_microbatches: int

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of wall time, of the whole job."""
        return self.gpus * self.tokens_per_s_per_gpu * self.failure_efficiency


def scaling_curve(workload: Workload, hardware: Hardware | str, *, gpus: list[int]) -> list[ScalePoint]:
    """Strong scaling: model parallelism and global batch stay, data parallelism grows with `gpus`.

    The batch grows only where there would be less than one micro-batch for each pipeline stage of every replica.

    Raises:
        UserError: a number of GPUs that the workload's tp x pp x cp does not divide.
    """
    machine = load_hardware(hardware) if isinstance(hardware, str) else hardware
    return [_point(workload, machine, count) for count in gpus]


def doublings(workload: Workload, *, largest: int) -> list[int]:
    """The workload's own number of GPUs, doubled as long as it stays within `largest`.

    Raises:
        UserError: the workload has more already.
    """
    gpus = workload.layout.world_size
    if largest < gpus:
        raise UserError(f"a curve up to {largest} GPUs: the recipe has {gpus} already")
    return [gpus << i for i in range((largest // gpus).bit_length())]


def _point(workload: Workload, machine: Hardware, gpus: int) -> ScalePoint:
    layout = workload.layout
    replica = layout.tp * layout.pp * layout.cp
    per_node = min(machine.gpus_per_node, gpus)
    if gpus % replica or gpus % per_node:
        raise UserError(f"{gpus} GPUs are not a multiple of tp*pp*cp = {replica} and of {per_node} a node")
    scaled = layout.model_copy(update={"nodes": gpus // per_node, "gpus_per_node": per_node, "dp": None})
    fewest = gpus // replica * workload.micro_batch_size * layout.pp
    batch = -(-max(workload.global_batch_size, fewest) // fewest) * fewest
    found = plan(dataclasses.replace(workload, layout=scaled, global_batch_size=batch), machine)
    return ScalePoint(
        gpus=gpus,
        tokens_per_s_per_gpu=found.tokens_per_s_per_gpu,
        failure_efficiency=found.reliability.efficiency,
        save_every_s=found.reliability.daly_interval_s,
        num_microbatches=found.workload.num_microbatches,
    )
