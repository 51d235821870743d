"""`medllm status` and `medllm cancel`: where a submitted run stands, and how to end that run only."""

import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from megatron_medllm.errors import UserError
from megatron_medllm.launch.jobs import RunFiles, read_specification
from megatron_medllm.storage import read_json, read_jsonl

# A metrics line is far shorter; the end of a long file is enough.
TAIL_BYTES = 65536
# The states in which a job has ended for good (slurm.h: above JOB_SUSPENDED; REVOKED: another cluster started it).
OVER = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    }
)


@dataclass(frozen=True)
class StageStatus:
    """One stage of a run. `state` is Slurm's while the job is known to it, else how it ended.

    `step` of `total_steps` counts a training's steps, and what another stage counts (questions, pairs, MB) elsewhere;
    `note` is that stage's own short word. `slowest_rank` had `slowest_ratio` x the median rank's own time in the last
    logged step.
    """

    stage: str
    job_id: str
    state: str
    step: int | None
    total_steps: int | None
    tokens_per_s: float | None
    eta_s: float | None
    restarts: int
    reason: str
    loss: float | None = None
    slowest_rank: int | None = None
    slowest_ratio: float | None = None
    note: str = ""

    @property
    def is_alive(self) -> bool:
        """Whether it runs or will. Words of our own, for how a stage has ended, are in small letters."""
        return self.state.isupper() and is_active(self.state)

    @property
    def is_finished(self) -> bool:
        """Whether it ended well."""
        return self.state in ("finished", "COMPLETED")


def submitted_jobs(files: RunFiles) -> dict[str, str]:
    """Job ids by stage.

    Raises:
        UserError: the run was never submitted.
    """
    if not files.submission.is_file():
        raise UserError(f"{files.run}: not submitted (no {files.submission.name}); see medllm submit")
    return read_json(files.submission)["jobs"]


def queue_states(job_ids: list[str]) -> dict[str, tuple[str, str]]:
    """(state, reason) of the jobs that Slurm still has in its queue; of an array, the first unfinished task."""
    if shutil.which("squeue") is None:
        raise UserError("squeue not found: run this where Slurm is")
    if not job_ids:
        return {}
    command = ["squeue", "--noheader", f"--jobs={','.join(job_ids)}", "--format=%A|%F|%T|%r", "--states=all"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and "Invalid job id" not in done.stderr:
        raise UserError(f"squeue failed: {done.stderr.strip()}")
    states: dict[str, tuple[str, str]] = {}
    for line in done.stdout.splitlines():
        _, array_id, state, reason = line.split("|", 3)
        if array_id not in states or is_active(state):
            states[array_id] = (state, reason)
    return states


def is_active(state: str) -> bool:
    """Whether a job in this Slurm state will still run or is running; all that Slurm does not call over is.

    Args:
        state: as squeue or sacct spell it ("CANCELLED by 1000", "COMPLETED+"); empty for a job that is in no queue.
    """
    words = state.upper().replace("+", " ").split()
    return bool(words) and words[0] not in OVER


def active_jobs(files: RunFiles) -> list[str]:
    """Ids of this run's jobs that are queued or running; none if it was never submitted."""
    if not files.submission.is_file():
        return []
    states = queue_states(list(submitted_jobs(files).values()))
    return [job for job, (state, _) in states.items() if is_active(state)]


def refuse_queued(run: Path) -> None:
    """Refuse to work on a run whose jobs are queued or running, as far as this machine can tell.

    Raises:
        UserError: names the jobs.
    """
    active = active_jobs(RunFiles(run.resolve())) if shutil.which("squeue") else []
    if active:
        raise UserError(f"{run}: jobs of this run are still queued ({', '.join(active)}); see medllm status or cancel")


def run_status(run: Path) -> list[StageStatus]:
    """Where every submitted stage of a run stands.

    Raises:
        UserError: the run was never submitted, or Slurm does not answer.
    """
    files = RunFiles(run.resolve())
    jobs = submitted_jobs(files)
    states = queue_states(list(jobs.values()))
    return [stage_status(files, stage, job_id, states.get(job_id)) for stage, job_id in jobs.items()]


def stage_status(files: RunFiles, stage: str, job_id: str, queued: tuple[str, str] | None) -> StageStatus:
    """One stage, from Slurm's queue, its history and its metrics."""
    spec = read_specification(files, stage)
    if spec["array_size"]:
        return array_status(files, stage, job_id, queued, size=spec["array_size"])
    ended = read_json(files.ended(stage)) if files.ended(stage).is_file() else {}
    history = list(read_jsonl(files.history(stage))) if files.history(stage).is_file() else []
    starts = [row for row in history if row["event"] == "start" and row["job_id"] == job_id]
    state, reason = queued or ("", "")
    if not is_active(state):
        ours = ended.get("job_id") == job_id
        state, reason = (ended.get("outcome", state), ended.get("reason", "")) if ours else (state or "gone", reason)
    elif ended.get("job_id") == job_id and ended.get("outcome") == "requeued":
        reason = f"last ended: {ended['reason']}"
    elif reason == "None":  # Slurm's word for a job that waits for nothing
        reason = ""
    row = StageStatus(stage, job_id, state, None, None, None, None, max(0, len(starts) - 1), reason)
    if spec["metrics"]:
        return with_metrics(row, last_metrics(files.run / spec["metrics"]), total_steps(files, spec))
    return with_progress(row, [files.progress(stage)]) if row.is_alive else row


def with_metrics(row: StageStatus, metrics: dict[str, Any], total: int | None) -> StageStatus:
    """The stage with a training's numbers, as the last logged step has them."""
    step, step_time = metrics.get("step"), metrics.get("step_time_s")
    slowest, median = metrics.get("slowest_rank"), metrics.get("own_time_median_s")
    return replace(
        row,
        step=step,
        total_steps=total,
        tokens_per_s=metrics.get("tokens_per_s"),
        eta_s=(total - step) * step_time if total and step is not None and step_time else None,
        loss=metrics.get("loss"),
        slowest_rank=None if slowest is None else int(slowest),
        slowest_ratio=metrics["own_time_max_s"] / median if median else None,
    )


def with_progress(row: StageStatus, paths: list[Path]) -> StageStatus:
    """The stage with what its command, or the tasks of its array, say of their progress; as it is where none does."""
    found = []
    for path in paths:
        with suppress(FileNotFoundError):  # not there yet, or gone this moment
            found.append(orjson.loads(path.read_bytes()))
    if not found:
        return row
    totals = [progress["total"] for progress in found]
    total = None if None in totals or len(found) < len(paths) else round(sum(totals))
    return replace(row, step=int(sum(p["done"] for p in found)), total_steps=total, note=found[0]["note"])


def array_status(files: RunFiles, stage: str, job_id: str, queued: tuple[str, str] | None, *, size: int) -> StageStatus:
    """An array as one stage; a task that did not end well is named.

    Its steps are what its tasks count together (answers) while they run, where they tell, else the finished tasks.
    """
    tasks = [files.task(stage, index) for index in range(size)]
    ends = [read_json(files.ended(task)) if files.ended(task).is_file() else {} for task in tasks]
    ends = [end if end.get("array_id") == job_id else {} for end in ends]  # not of an earlier submission
    starts = [
        row
        for task in tasks
        if files.history(task).is_file()
        for row in read_jsonl(files.history(task))
        if row["event"] == "start" and row.get("array_id") == job_id
    ]
    finished = sum(end.get("outcome") == "finished" for end in ends)
    state, reason = queued or ("", "")
    bad = next((n for n, end in enumerate(ends) if end and end["outcome"] not in ("finished", "requeued")), None)
    if not is_active(state):
        state = "finished" if finished == size else ends[bad]["outcome"] if bad is not None else state or "gone"
    if bad is not None:
        reason = f"shard {bad + 1}/{size}: {ends[bad]['reason']}"
    elif reason == "None" or state == "finished":
        reason = ""
    restarts = sum(row["restart"] > 0 for row in starts)
    row = StageStatus(stage, job_id, state, finished, size, None, None, restarts, reason)
    return with_progress(row, [files.progress(task) for task in tasks]) if row.is_alive else row


def total_steps(files: RunFiles, spec: dict[str, Any]) -> int | None:
    """As the trainer counted them once it had seen its data; before that, as planned."""
    counted = (files.run / spec["metrics"]).with_name("progress.json") if spec["metrics"] else None
    if counted is not None and counted.is_file():
        return read_json(counted)["total_steps"]
    return spec["total_steps"]


def last_metrics(path: Path, *, having: str = "step_time_s") -> dict:
    """The last complete line of a metrics file that has a number called `having`; empty without one."""
    if not path.is_file():
        return {}
    with open(path, "rb") as stream:
        stream.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = stream.read().split(b"\n")[:-1]
    for line in reversed(lines):
        if f'"{having}"'.encode() in line and line.startswith(b"{"):
            return orjson.loads(line)
    return {}


def last_save_time_s(path: Path) -> float | None:
    """Seconds of the newest save that a metrics file (`save_s`) knows of."""
    return last_metrics(path, having="save_s").get("save_s")


STATUS_COLUMNS = ("stage", "job", "state", "step", "loss", "tokens/s", "ETA", "slowest", "restarts", "why")


def status_cells(s: StageStatus) -> tuple[str, ...]:
    """A stage's row of the table; `slowest` is the rank, and its own time over the median rank's."""
    slowest = "-" if s.slowest_rank is None else f"rank {s.slowest_rank}"
    return (
        s.stage,
        s.job_id,
        s.state.lower() or "-",
        "-" if s.step is None else f"{s.step}/{s.total_steps}" if s.total_steps else str(s.step),
        "-" if s.loss is None else f"{s.loss:.4g}",
        "-" if s.tokens_per_s is None else f"{s.tokens_per_s:,.0f}",
        "-" if s.eta_s is None or not s.is_alive else _clock(s.eta_s),
        slowest if s.slowest_ratio is None else f"{slowest} ({s.slowest_ratio:.2f}x)",
        str(s.restarts),
        s.reason or s.note,
    )


def status_report(stages: list[StageStatus]) -> str:
    """The status as a plain table."""
    rows = [STATUS_COLUMNS, *map(status_cells, stages)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def cancel(run: Path) -> list[str]:
    """Cancel this run's jobs and nothing else; returns the ids that were still active.

    Raises:
        UserError: the run was never submitted, or Slurm refused.
    """
    files = RunFiles(run.resolve())
    submitted_jobs(files)
    active = active_jobs(files)
    if active:
        files.cancelled.touch()
        done = subprocess.run(["scancel", *active], capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"scancel failed: {done.stderr.strip()}")
    return active
