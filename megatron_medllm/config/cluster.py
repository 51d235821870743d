"""The Slurm cluster that a recipe is submitted to, and the exit codes that jobs and their supervisor agree on."""

import math
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from megatron_medllm.config.base import Section

# A trainer that saved and stopped because of a signal or the time limit: run it again, it resumes by itself.
REQUEUE_EXIT_CODE = 85
# A node that failed its health check: run the job again, elsewhere.
UNFIT_NODE_EXIT_CODE = 86
# A rank held the others up: its name, and every rank's stack, are in the stage's folder `watch`.
STALLED_EXIT_CODE = 87

_TIME = re.compile(r"(?:(?P<days>[0-9]{1,6})-(?=[0-9]))?(?P<clock>[0-9]{1,9}(?::[0-9]{1,6}){0,2})")


class ClusterConfig(Section):
    """What `medllm submit` needs to know. Site settings (account, container, NCCL) are in slurm/env.sh."""

    env_file: Path | None = Field(default=None, description="site settings; default: slurm/env.sh of the checkout")
    max_time: str = Field(
        default="24:00:00",
        description="longest time a job may ask for, as sbatch takes it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S",
    )
    hardware: str = Field(default="h100-sxm", description="hardware description for the planner, or a .json file")
    gpus: bool = Field(default=True, description="ask for GPUs; false for training on CPUs over gloo")
    cpus_per_process: int | None = Field(default=None, gt=0)
    corpus_tasks: int = Field(default=1, gt=0, description="tasks of a job array that share the building of a corpus")
    exclude: tuple[str, ...] = Field(default=(), description="nodes never to use")
    max_restarts_without_progress: int = Field(
        default=3, gt=0, description="restarts in a row without a new checkpoint before a job gives up"
    )
    min_free_disk_gib: float = Field(default=50.0, ge=0, description="health check: free space where the run is")
    max_clock_skew_s: float = Field(default=5.0, gt=0, description="health check: difference between the nodes' clocks")
    extra_options: tuple[str, ...] = Field(default=(), description="further sbatch options, such as --reservation=x")

    @field_validator("max_time", mode="before")
    @classmethod
    def _is_a_time(cls, value: Any) -> Any:
        text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value  # minutes, as in sbatch
        if isinstance(text, str):
            parse_slurm_time(text)
        return text


def parse_slurm_time(text: str) -> int:
    """Seconds of a time as sbatch takes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
        ValueError: the text is not such a time, or it is none at all (0 and UNLIMITED set no limit).
    """
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a time as sbatch takes it, such as 90 (minutes), 24:00:00 or 2-00:00:00")
    days, fields = match["days"], [int(field) for field in match["clock"].split(":")]
    if days is not None:
        hours, minutes, seconds = (*fields, 0, 0)[:3]
    elif len(fields) == 3:
        hours, minutes, seconds = fields
    else:
        hours, (minutes, seconds) = 0, (*fields, 0)[:2]
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise ValueError(f"{text!r} is no time limit (Slurm takes it for none); give one")
    return total


def seconds_of(value: Any) -> Any:
    """Seconds of a clock such as 12:00:00 or 1-12; what is no clock is left for the field to judge."""
    is_clock = isinstance(value, str) and (":" in value or re.fullmatch(r"[0-9]+-[0-9]+", value) is not None)
    return parse_slurm_time(value) if is_clock else value


Seconds = Annotated[float, BeforeValidator(seconds_of)]


def format_slurm_time(seconds: float) -> str:
    """`[D-]HH:MM:SS`, rounded up to a minute."""
    minutes = max(1, math.ceil(seconds / 60))
    days, minutes = divmod(minutes, 1440)
    clock = f"{minutes // 60:02d}:{minutes % 60:02d}:00"
    return f"{days}-{clock}" if days else clock
