"""Runs in the batch script, before and after `srun`: is it worth starting, why did it end, should it run again?

Called by path (`python3 RUN/code/megatron_medllm/launch/supervisor.py begin|end RUN STAGE [EXIT_CODE]`) on the node's
own Python, outside any container, so it is one file on the standard library (3.8 or newer) and imports nothing of
the package.

`begin` refuses to start when the last restarts brought no new checkpoint. `end` writes RUN/launch/STAGE.ended.json
and requeues the job when the trainer asked for it, or when a node failed its health check (then without that node).
"""

from __future__ import annotations  # the node's Python may be 3.8

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any, Dict  # noqa: UP035 # for Python 3.8

Row = Dict[str, Any]  # noqa: UP006 # evaluated by Python 3.8

GIVE_UP_EXIT_CODE = 3
UNMET_EXIT_CODE = 1  # what medllm eval exits with when a requirement is not met, and Python for any error
USER_ERROR_EXIT_CODE = 2  # what medllm exits with when the input is wrong: running again would not help
LAST_LINES = 15
FAILED = "the command failed with exit code"


def main(arguments: list[str]) -> int:
    """Entry point; returns the exit status for the batch script."""
    action, run, stage = arguments[0], pathlib.Path(arguments[1]), arguments[2]
    spec = json.loads((run / "launch" / (stage + ".json")).read_text())
    stage = task_name(stage)  # every task of an array has its own history
    if action == "begin":
        return begin(run, stage, spec)
    return end(run, stage, spec, int(arguments[3]))


def begin(run: pathlib.Path, stage: str, spec: Row) -> int:
    """Record the start. Gives up after too many starts in a row that found the same newest checkpoint."""
    step = newest_step(run, spec)
    starts = [row for row in read_history(run, stage) if row["event"] == "start" and row["job_id"] == job_id()]
    fruitless = 0
    for row in reversed(starts):
        if row["step"] != step:
            break
        fruitless += 1
    if fruitless > spec["max_restarts_without_progress"]:
        reason = f"gave up: {fruitless} starts in a row without a new checkpoint (newest: step {step})"
        write_ended(run, stage, {"outcome": "gave-up", "reason": reason, "exit_code": GIVE_UP_EXIT_CODE})
        print("supervisor: " + reason, file=sys.stderr)
        return GIVE_UP_EXIT_CODE
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    append_history(run, stage, {"event": "start", "step": step, "restart": restart_count(), "nodes": nodes})
    return 0


def end(run: pathlib.Path, stage: str, spec: Row, exit_code: int) -> int:
    """Write why the job ended; requeue it where another start can help. Returns the job's exit status."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a requeue ends this script; let it finish its sentence
    exit_code = verdict_of_nodes(exit_code, node_statuses(run, stage), spec["requeue_exit_code"])
    report = dict({"exit_code": exit_code, "step": newest_step(run, spec)}, **verdicts(run, spec))
    if exit_code == 0:
        write_ended(run, stage, dict(report, outcome="finished", reason="finished"))
        return 0
    if (run / "launch" / "cancelled").exists():
        write_ended(run, stage, dict(report, outcome="cancelled", reason="cancelled by medllm cancel"))
        return exit_code
    if exit_code == spec["requeue_exit_code"]:
        return requeue(run, stage, dict(report, reason="saved and stopped on a signal or the time limit"), exclude=[])
    if exit_code == spec["unfit_node_exit_code"]:
        unfit = unfit_nodes(run)
        reason = "health check failed: " + "; ".join(f"{node}: {why}" for node, why in sorted(unfit.items()))
        return requeue(run, stage, dict(report, reason=reason), exclude=sorted(unfit) + list(spec["exclude"]))
    reason = f"{FAILED} {exit_code}"
    if "stall" in report:
        reason = "stalled: " + report["stall"]["reason"]
    if exit_code == UNMET_EXIT_CODE and spec.get("exam"):
        reason = unmet_requirements(run / spec["exam"], since=last_start(run, stage)) or reason
    lines = last_error_lines(run, stage)
    if reason.startswith(FAILED) and lines:
        reason += ": " + lines[-1].strip()
    report.update(reason=reason, last_lines=lines)
    if spec["checkpoints"] and exit_code != USER_ERROR_EXIT_CODE:
        return requeue(run, stage, report, exclude=[])  # a crash may be the machine's; `begin` counts them
    write_ended(run, stage, dict(report, outcome="failed"))
    return exit_code


def node_statuses(run: pathlib.Path, stage: str) -> list[int]:
    """What the nodes of this start ended with, as far as they came to write it down (launch/node.py)."""
    return [json.loads(path.read_text()) for path in log_directory(run, stage).glob("node*/exit-status.json")]


def verdict_of_nodes(exit_code: int, statuses: list[int], requeue_exit_code: int) -> int:
    """The exit status that counts: srun passes on the highest, and 137 of a killed node would hide another's 2.

    A wrong input wins, since no other start mends it; then any real failure, over a request to run again.
    """
    if USER_ERROR_EXIT_CODE in statuses:
        return USER_ERROR_EXIT_CODE
    interrupted = (0, requeue_exit_code, 128 + signal.SIGUSR1, 128 + signal.SIGTERM)
    real = [status for status in statuses if status not in interrupted]
    if exit_code == 128 + signal.SIGUSR1:  # Slurm's, to a node that did not listen yet
        exit_code = requeue_exit_code
    return max(real) if real and exit_code == requeue_exit_code else exit_code


def unmet_requirements(summary: pathlib.Path, since: float) -> str:
    """The requirements that an exam did not meet, with what it reached; empty where none was judged after `since`."""
    if not summary.exists() or summary.stat().st_mtime < since:
        return ""
    unmet = [row for row in json.loads(summary.read_text())["requirements"] if not row["met"]]
    return "; ".join(f"requirement not met: {row['expression']} (found {row['value']:.4g})" for row in unmet)


def last_start(run: pathlib.Path, stage: str) -> float:
    """When this start began, in seconds since the epoch; a shared file system may round down to whole ones."""
    starts = [row for row in read_history(run, stage) if row["event"] == "start"]
    return time.mktime(time.strptime(starts[-1]["time"][:19], "%Y-%m-%dT%H:%M:%S")) - 1 if starts else 0.0


def requeue(run: pathlib.Path, stage: str, report: Row, exclude: list[str]) -> int:
    """Put the job back into the queue, off the nodes in `exclude`; it keeps its id, so the chain behind it waits."""
    write_ended(run, stage, dict(report, outcome="requeued"))
    identity = scontrol_id()
    done = subprocess.run(["scontrol", "requeuehold", identity], capture_output=True, text=True)
    if done.returncode:
        reason = f"{report['reason']}; not requeued: {done.stderr.strip()}"
        write_ended(run, stage, dict(report, outcome="stopped", reason=reason))
        return report["exit_code"]
    if exclude:
        scontrol_until_accepted(["update", "JobId=" + identity, "ExcNodeList=" + ",".join(exclude)])
    scontrol_until_accepted(["release", identity])
    return report["exit_code"]


def scontrol_until_accepted(arguments: list[str], attempts: int = 20) -> None:
    """Slurm refuses changes while the old run is still being cleaned up: try again for a while."""
    for _ in range(attempts):
        if subprocess.run(["scontrol", *arguments], capture_output=True).returncode == 0:
            return
        time.sleep(0.5)
    print(f"supervisor: scontrol {' '.join(arguments)} was refused", file=sys.stderr)


def verdicts(run: pathlib.Path, spec: Row) -> Row:
    """What the trainer's watch found in this start: who stalled it, and which ranks were slow."""
    found = {}
    for name in ("stall", "slow"):
        path = (run / spec["checkpoints"]).parent / "watch" / (name + ".json") if spec.get("checkpoints") else None
        row = json.loads(path.read_text()) if path is not None and path.exists() else {}
        if row.get("job_id") == os.environ.get("SLURM_JOB_ID") and row.get("restart") == restart_count():
            found[name] = row
    return found


def newest_step(run: pathlib.Path, spec: Row) -> int:
    """Step of the newest whole checkpoint, -1 without one; elsewhere how many answers or parts of a corpus are kept."""
    if spec.get("answers"):
        return sum(path.read_bytes().count(b"\n") for path in (run / spec["answers"]).glob("*answers*.jsonl"))
    if spec.get("parts"):
        return len(list((run / spec["parts"]).glob("[0-9]*.json")))
    if not spec.get("checkpoints"):
        return -1
    names = [path.name for path in (run / spec["checkpoints"]).glob("step-*")]
    return max([int(name[5:]) for name in names if name[5:].isdigit()], default=-1)


def unfit_nodes(run: pathlib.Path) -> dict[str, str]:
    """Reasons by node, from the files that failed health checks leave."""
    return {p.stem: json.loads(p.read_text())["reason"] for p in (run / "launch" / "unfit-nodes").glob("*.json")}


def last_error_lines(run: pathlib.Path, stage: str) -> list[str]:
    """The end of the longest standard-error log of this start: where the first failing rank says why."""
    logs = sorted(log_directory(run, stage).rglob("stderr.log"), key=lambda path: path.stat().st_size)
    lines = logs[-1].read_text(errors="replace").splitlines() if logs else []
    return [line for line in lines if line.strip()][-LAST_LINES:]


def log_directory(run: pathlib.Path, task: str) -> pathlib.Path:
    """Where this start's logs are, a folder per node."""
    return run / "launch" / "logs" / task / start_name()


def task_name(stage: str) -> str:
    """What this job's files are called: the stage, with the number of an array's task."""
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{stage}.{task}" if task else stage


def start_name() -> str:
    """What this start of this job is called."""
    return f"job{job_id()}-restart{restart_count()}"


def job_id() -> str:
    """This job's id; an array task's own."""
    return os.environ.get("SLURM_JOB_ID", "0")


def array_id() -> str | None:
    """The id of the array that this job is a task of."""
    return os.environ.get("SLURM_ARRAY_JOB_ID")


def scontrol_id() -> str:
    """This job as scontrol takes it: the last task's own id is the array's too, and there means all of its tasks."""
    array, task = array_id(), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else job_id()


def restart_count() -> int:
    """How often Slurm has restarted this job."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def read_history(run: pathlib.Path, stage: str) -> list[Row]:
    """All recorded starts and ends."""
    path = run / "launch" / (stage + ".history.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_history(run: pathlib.Path, stage: str, row: Row) -> None:
    """Add one line; short appends by one writer need no temporary file."""
    stamped = dict(row, job_id=job_id(), array_id=array_id(), time=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    with open(str(run / "launch" / (stage + ".history.jsonl")), "a") as stream:
        stream.write(json.dumps(stamped) + "\n")


def write_ended(run: pathlib.Path, stage: str, report: Row) -> None:
    """Replace STAGE.ended.json, and keep the line in the history."""
    report = dict(report, restart=restart_count(), logs=str(log_directory(run, stage)))
    path = run / "launch" / (stage + ".ended.json")
    partial = path.with_name("." + path.name + ".partial")
    partial.write_text(json.dumps(dict(report, job_id=job_id(), array_id=array_id()), indent=2) + "\n")
    os.replace(str(partial), str(path))
    append_history(run, stage, dict(report, event="end"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
