"""The Slurm cluster that a recipe is submitted to, and the exit codes that jobs and their supervisor agree on."""

import math
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from megatron_medllm.config.base import Section

# A trainer that saved and stopped because of a signal or the time limit: run it again, it resumes by itself.
REQUEUE_EXIT_CODE = 85
# A node that failed its health check: run the job again, elsewhere.
UNFIT_NODE_EXIT_CODE = 86
# A rank held the others up: its name, and every rank's stack, are in the stage's folder `watch`.
STALLED_EXIT_CODE = 87

_TIME = re.compile(r"(?:(?P<days>[0-9]{1,6})-(?=[0-9]))?(?P<clock>[0-9]{1,9}(?::[0-9]{1,6}){0,2})")


# The sbatch option that a setting becomes, and the environment variable of sbatch's that it takes the place of.
SBATCH_SETTINGS: dict[str, tuple[str, str | None]] = {
    "account": ("account", "SBATCH_ACCOUNT"),
    "partition": ("partition", "SBATCH_PARTITION"),
    "qos": ("qos", "SBATCH_QOS"),
    "reservation": ("reservation", "SBATCH_RESERVATION"),
    "constraint": ("constraint", "SBATCH_CONSTRAINT"),
    "exclusive": ("exclusive", "SBATCH_EXCLUSIVE"),
    "memory": ("mem", "SBATCH_MEM_PER_NODE"),
    "mail_user": ("mail-user", None),
}
# What every script asks for by itself, and what settings of other names become.
_OWN_OPTIONS = frozenset(
    (
        *("job-name", "nodes", "ntasks-per-node", "time", "signal", "requeue", "open-mode", "output", "array"),
        *("dependency", "kill-on-invalid-dep"),
    )
)
_OPTION_OF = {"gpus": "gpus-per-node", "cpus_per_process": "cpus-per-task", "exclude": "exclude"}
_SHORT = {
    "A": "account",
    "C": "constraint",
    "J": "job-name",
    "N": "nodes",
    "a": "array",
    "c": "cpus-per-task",
    "d": "dependency",
    "o": "output",
    "p": "partition",
    "q": "qos",
    "t": "time",
    "x": "exclude",
}
_OPTION = re.compile(r"--(?P<long>[a-z][a-z-]*)(?:[= ].*)?|-(?P<short>[A-Za-z]).*")


def _is_one_word(value: str) -> str:
    if not re.fullmatch(r"[^\s'\"\\]+", value):
        raise ValueError("expected one word without quotes and backslashes, as sbatch takes it")
    return value


def _is_one_line(value: str) -> str:
    if not value.strip() or any(not c.isprintable() for c in value):
        raise ValueError("expected a line of text")
    return value


Word = Annotated[str, AfterValidator(_is_one_word)]
Line = Annotated[str, AfterValidator(_is_one_line)]


class ClusterConfig(Section):
    """What `medllm submit` needs to know. Settings that belong to the site rather than the run are in slurm/env.sh."""

    env_file: Path | None = Field(default=None, description="site settings; default: slurm/env.sh of the checkout")
    max_time: str = Field(
        default="24:00:00",
        description="longest time a job may ask for, as sbatch takes it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S",
    )
    hardware: str = Field(default="h100-sxm", description="hardware description for the planner, or a .json file")
    gpus: bool = Field(default=True, description="ask for GPUs; false for training on CPUs over gloo")
    cpus_per_process: int | None = Field(default=None, gt=0)
    corpus_tasks: int = Field(default=1, gt=0, description="tasks of a job array that share the building of a corpus")
    account: Word | None = Field(
        default=None, description="who pays; this and the next six win over SBATCH_* in env.sh"
    )
    partition: Word | None = Field(default=None, description="one, or several with commas")
    qos: Word | None = None
    reservation: Word | None = None
    constraint: Word | None = Field(default=None, description="node features, such as h100&ib")
    exclusive: bool = Field(default=False, description="whole nodes: no other job beside this one")
    memory: Annotated[str, Field(pattern=r"^[0-9]+[KMGT]?$")] | None = Field(
        default=None, description="host memory per node, such as 500G; 0: all of it"
    )
    container_image: Line | None = Field(
        default=None, description="for pyxis: registry#image:tag or a .sqsh file; takes the place of env.sh's"
    )
    container_mounts: tuple[Line, ...] = Field(default=(), description="SOURCE:TARGET[:FLAGS], for pyxis")
    container_workdir: Line | None = Field(default=None, description="working directory in the container")
    mail_user: Word | None = Field(default=None, description="Slurm mails this address when a job fails or all is done")
    on_end: Line | None = Field(
        default=None,
        description="shell command, run when the whole chain has ended, well or not: docs/slurm.md has its arguments",
    )
    exclude: tuple[str, ...] = Field(default=(), description="nodes never to use")
    max_restarts_without_progress: int = Field(
        default=3, gt=0, description="restarts in a row without a new checkpoint before a job gives up"
    )
    min_free_disk_gib: float = Field(default=50.0, ge=0, description="health check: free space where the run is")
    max_clock_skew_s: float = Field(default=5.0, gt=0, description="health check: difference between the nodes' clocks")
    extra_options: tuple[str, ...] = Field(default=(), description="further sbatch options, such as --comment=x")

    @field_validator("max_time", mode="before")
    @classmethod
    def _is_a_time(cls, value: Any) -> Any:
        text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value  # minutes, as in sbatch
        if isinstance(text, str):
            parse_slurm_time(text)
        return text

    @model_validator(mode="after")
    def _has_a_container(self) -> "ClusterConfig":
        if self.container_image is None and (self.container_mounts or self.container_workdir):
            raise ValueError("container_mounts and container_workdir need container_image")
        return self

    @model_validator(mode="after")
    def _options_are_new(self) -> "ClusterConfig":
        """sbatch takes the last of two equal options without a word: refuse the second one here."""
        seen = dict.fromkeys(_OWN_OPTIONS, "medllm submit sets it")
        set_here = [(name, option) for name, (option, _) in SBATCH_SETTINGS.items() if getattr(self, name)]
        set_here += [(name, option) for name, option in _OPTION_OF.items() if getattr(self, name)]
        if self.mail_user:
            set_here.append(("mail_user", "mail-type"))
        seen |= {option: f"cluster.{name} sets it" for name, option in set_here}
        for text in self.extra_options:
            name = option_name(text)
            if name in seen:
                raise ValueError(f"extra_options: {text!r}: {seen[name]}")
            seen[name] = "it is there twice"
        return self


def option_name(text: str) -> str:
    """The long name of an sbatch option, without dashes: of `-p gpu` it is `partition`.

    Raises:
        ValueError: the text is no option.
    """
    match = _OPTION.fullmatch(text)
    if match is None:
        raise ValueError(f"extra_options: {text!r} is not an option of sbatch, such as --comment=x")
    return match["long"] or _SHORT.get(match["short"], match["short"])


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
