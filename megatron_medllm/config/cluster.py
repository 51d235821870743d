"""The Slurm cluster that a recipe is submitted to, and the exit codes that jobs and their supervisor agree on."""

import math
from pathlib import Path

from pydantic import Field, field_validator

from megatron_medllm.config.base import Section

# A trainer that saved and stopped because of a signal or the time limit: run it again, it resumes by itself.
REQUEUE_EXIT_CODE = 85
# A node that failed its health check: run the job again, elsewhere.
UNFIT_NODE_EXIT_CODE = 86
# A rank held the others up: its name, and every rank's stack, are in the stage's folder `watch`.
STALLED_EXIT_CODE = 87


class ClusterConfig(Section):
    """What `medllm submit` needs to know. Site settings (account, container, NCCL) are in slurm/env.sh."""

    env_file: Path | None = Field(default=None, description="site settings; default: slurm/env.sh of the checkout")
    max_time: str = Field(default="24:00:00", description="longest time a job may ask for, as [D-]HH:MM:SS")
    hardware: str = Field(default="h100-sxm", description="hardware description for the planner, or a .json file")
    gpus: bool = Field(default=True, description="ask for GPUs; false for training on CPUs over gloo")
    cpus_per_process: int | None = Field(default=None, gt=0)
    exclude: tuple[str, ...] = Field(default=(), description="nodes never to use")
    max_restarts_without_progress: int = Field(
        default=3, gt=0, description="restarts in a row without a new checkpoint before a job gives up"
    )
    min_free_disk_gib: float = Field(default=50.0, ge=0, description="health check: free space where the run is")
    max_clock_skew_s: float = Field(default=5.0, gt=0, description="health check: difference between the nodes' clocks")
    extra_options: tuple[str, ...] = Field(default=(), description="further sbatch options, such as --reservation=x")

    @field_validator("max_time")
    @classmethod
    def _is_a_time(cls, value: str) -> str:
        parse_slurm_time(value)
        return value


def parse_slurm_time(text: str) -> int:
    """Seconds of `[D-]HH:MM:SS`.

    Raises:
        ValueError: the text is not such a time.
    """
    days, dash, clock = text.rpartition("-")
    fields = clock.split(":")
    if len(fields) != 3 or not all(f.isdigit() for f in fields) or (dash and not days.isdigit()):
        raise ValueError(f"{text!r} is not a time such as 24:00:00 or 2-00:00:00")
    hours, minutes, seconds = map(int, fields)
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def format_slurm_time(seconds: float) -> str:
    """`[D-]HH:MM:SS`, rounded up to a minute."""
    minutes = max(1, math.ceil(seconds / 60))
    days, minutes = divmod(minutes, 1440)
    clock = f"{minutes // 60:02d}:{minutes % 60:02d}:00"
    return f"{days}-{clock}" if days else clock
