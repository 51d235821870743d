"""What one batch job is, where its files lie in the run directory, and the specification its nodes read."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_medllm.storage import read_json, write_json

# The job behind all others that calls `cluster.on_end`.
ON_END = "on-end"


@dataclass(frozen=True, kw_only=True)
class StageJob:
    """One stage of a recipe as a batch job.

    `script` names the file in slurm/ (without .sbatch); `command` follows `python`, as ("-m", "megatron_medllm", ...).
    `processes_per_node` 0 runs the command once per node, otherwise as that many ranks of one distributed job.
    `duration_s` None asks for the cluster's longest time. `save_time_s` is a checkpoint's, measured or planned.
    `checkpoints` is the directory whose `step-*` entries count as progress, `answers` the one whose logged answers do,
    `parts` the one whose facts (`*.json`) do, and `metrics` the file whose last line is shown by `medllm status`; all
    relative to the run. `array_size` n makes n
    independent tasks of it, each with its `--shard I/n` behind the command.
    `exam` is an exam's summary.json, which tells of the requirements that it did not meet. `after_any` starts the job
    when those before it have ended, well or not. `is_last`: no job of the chain waits for it.
    """

    name: str
    script: str
    command: tuple[str, ...]
    nodes: int = 1
    gpus_per_node: int = 0
    processes_per_node: int = 0
    duration_s: float | None = None
    save_time_s: float = 60.0
    checkpoints: str | None = None
    metrics: str | None = None
    answers: str | None = None
    parts: str | None = None
    total_steps: int | None = None
    after: tuple[str, ...] = ()
    array_size: int | None = None
    exam: str | None = None
    after_any: bool = False
    is_last: bool = False


@dataclass(frozen=True)
class RunFiles:
    """Paths of a submitted run."""

    run: Path

    @property
    def launch(self) -> Path:
        """Everything that belongs to the batch jobs."""
        return self.run / "launch"

    @property
    def config(self) -> Path:
        """The frozen configuration that the jobs read."""
        return self.launch / "config.yaml"

    @property
    def cancelled(self) -> Path:
        """There when the user cancelled the run: jobs then end instead of requeueing themselves."""
        return self.launch / "cancelled"

    @property
    def code(self) -> Path:
        """The frozen source tree that the jobs import."""
        return self.run / "code"

    @property
    def submission(self) -> Path:
        """Job ids by stage, in order."""
        return self.launch / "jobs.json"

    @property
    def unfit_nodes(self) -> Path:
        """One file per node that failed a health check."""
        return self.launch / "unfit-nodes"

    def script(self, stage: str) -> Path:
        """The rendered batch script."""
        return self.launch / f"{stage}.sbatch"

    def specification(self, stage: str) -> Path:
        """What the nodes need to know about the job."""
        return self.launch / f"{stage}.json"

    def progress(self, task: str) -> Path:
        """How far a job's command is, where it tells; `task` is the stage, or STAGE.N of an array."""
        return self.launch / f"{task}.progress"

    def history(self, stage: str) -> Path:
        """One line per start and end of the job, restarts included."""
        return self.launch / f"{stage}.history.jsonl"

    def task(self, stage: str, index: int) -> str:
        """What an array's task (from 0) goes by in the files below; written by the supervisor."""
        return f"{stage}.{index}"

    def ended(self, stage: str) -> Path:
        """Why the job ended, the last time it did."""
        return self.launch / f"{stage}.ended.json"


def write_specification(files: RunFiles, job: StageJob, settings: dict[str, Any]) -> None:
    """Write the job with the settings of the cluster that its supervisor needs."""
    write_json(files.specification(job.name), {**asdict(job), **settings})


def read_specification(files: RunFiles, stage: str) -> dict[str, Any]:
    """The specification of a stage.

    Raises:
        UserError: the run was not submitted with this stage.
    """
    return read_json(files.specification(stage))
