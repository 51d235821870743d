"""What a job's end is put down to, without a Slurm (tests/slurm has one)."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_medllm.config.cluster import STALLED_EXIT_CODE
from megatron_medllm.launch import supervisor
from megatron_medllm.launch.jobs import RunFiles, StageJob, write_specification
from megatron_medllm.storage import read_json, write_json

SETTINGS = {
    "max_restarts_without_progress": 3, "exclude": [], "requeue_exit_code": 85, "unfit_node_exit_code": 86,
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A submitted run with one training; no Slurm answers, so that nothing is requeued."""
    job = StageJob(name="cpt", script="cpt", command=("-c", ""), checkpoints=str(tmp_path / "cpt" / "checkpoints"))
    write_specification(RunFiles(tmp_path), job, SETTINGS)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    refuse = tmp_path / "bin" / "scontrol"
    refuse.parent.mkdir()
    refuse.write_text("#!/bin/sh\necho no >&2\nexit 1\n")
    refuse.chmod(0o755)
    monkeypatch.setenv("PATH", f"{refuse.parent}:/usr/bin:/bin")
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)  # its last sentence is not to be cut short; ours may


def stall(restart: int) -> dict:
    return {"kind": "silent", "ranks": [{"rank": 3}], "reason": "rank 3 is gone", "job_id": "7", "restart": restart}


def test_a_stall_is_the_reason_and_its_verdict_is_kept(run: Path) -> None:
    write_json(run / "cpt" / "watch" / "stall.json", stall(1))
    assert supervisor.main(["end", str(run), "cpt", str(STALLED_EXIT_CODE)]) == STALLED_EXIT_CODE
    ended = read_json(RunFiles(run).ended("cpt"))
    assert ended["reason"].startswith("stalled: rank 3 is gone") and ended["stall"] == stall(1)


def test_an_earlier_starts_verdict_is_not_this_ones(run: Path) -> None:
    write_json(run / "cpt" / "watch" / "stall.json", stall(0))
    supervisor.main(["end", str(run), "cpt", "1"])
    ended = read_json(RunFiles(run).ended("cpt"))
    assert ended["reason"].startswith("the command failed with exit code 1") and "stall" not in ended


@pytest.mark.parametrize("task", [None, "2"])
def test_an_arrays_task_is_requeued_alone(run: Path, monkeypatch: pytest.MonkeyPatch, task: str | None) -> None:
    """The last task has the array's own id: named by that, all tasks would be requeued, finished ones too."""
    told = run / "told"
    (run / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$*" >>{told}\n')
    if task is not None:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
    write_json(RunFiles(run).unfit_nodes / "n3.json", {"reason": "no disk"})
    supervisor.main(["end", str(run), "cpt", "86"])
    name = "7_2" if task else "7"
    assert told.read_text().splitlines() == [
        *(f"requeuehold {name}", f"update JobId={name} ExcNodeList=n3", f"release {name}"),
    ]


def test_a_crash_is_put_down_to_its_last_line(run: Path) -> None:
    log = run / "launch" / "logs" / "cpt" / "job7-restart1" / "node0" / "stderr.log"
    log.parent.mkdir(parents=True)
    log.write_text("Traceback (most recent call last):\n  somewhere\nValueError: 3 of 4\n\n")
    supervisor.main(["end", str(run), "cpt", "1"])
    ended = read_json(RunFiles(run).ended("cpt"))
    assert ended["reason"].startswith("the command failed with exit code 1: ValueError: 3 of 4")


def test_a_slow_rank_is_reported_of_a_training_that_ended_well(run: Path) -> None:
    slow = {"step": 9, "ranks": [{"rank": 1, "reason": "rank 1 is slow"}], "job_id": "7", "restart": 1}
    write_json(run / "cpt" / "watch" / "slow.json", slow)
    assert supervisor.main(["end", str(run), "cpt", "0"]) == 0
    ended = read_json(RunFiles(run).ended("cpt"))
    assert (ended["outcome"], ended["slow"]) == ("finished", slow)


def end(run: Path, exit_code: int, *nodes: int) -> dict:
    """How the job is said to have ended, of what srun passes on and what its nodes ended with."""
    for number, status in enumerate(nodes):
        write_json(run / "launch" / "logs" / "cpt" / "job7-restart1" / f"node{number}" / "exit-status.json", status)
    supervisor.main(["end", str(run), "cpt", str(exit_code)])
    return read_json(RunFiles(run).ended("cpt"))


@pytest.mark.parametrize("killed", [137, 143, 85])
def test_one_nodes_wrong_input_is_not_hidden_by_another_that_was_killed(run: Path, killed: int) -> None:
    ended = end(run, killed, 2, killed)
    assert (ended["outcome"], ended["exit_code"]) == ("failed", 2)  # and not requeued


def test_death_by_usr1_is_a_request_to_run_again_unless_a_node_failed_for_real(run: Path) -> None:
    """Slurm alone sends it: before the node's agent listens, it ends the agent."""
    assert end(run, 128 + signal.SIGUSR1)["reason"].startswith("saved and stopped on a signal or the time limit")
    assert end(run, 128 + signal.SIGUSR1, 1)["reason"].startswith("the command failed with exit code 1")


def test_one_nodes_crash_is_not_taken_for_a_request_to_run_again(run: Path) -> None:
    assert end(run, 85, 1, 85)["reason"].startswith("the command failed with exit code 1")


def test_nodes_that_were_interrupted_beside_one_that_saved_ask_to_run_again(run: Path) -> None:
    assert end(run, 85, 85, 143, 138)["reason"].startswith("saved and stopped")
    assert end(run, 137, 143)["reason"].startswith("the command failed with exit code 137")


@pytest.mark.parametrize(("requirements", "reason"), [
    ([("accuracy >= 0.85", 0.5, False), ("gap >= -0.02", 0.0, True)],
     "requirement not met: accuracy >= 0.85 (found 0.5)"),
    ([("gap >= -0.02", 0.0, True)], "the command failed with exit code 1"),
])  # fmt: skip
def test_a_requirement_that_is_not_met_is_the_reason(run: Path, requirements: list[tuple], reason: str) -> None:
    job = StageJob(name="eval-cpt", script="eval", command=("-c", ""), exam=str(run / "eval" / "summary.json"))
    write_specification(RunFiles(run), job, SETTINGS)
    assert supervisor.main(["begin", str(run), "eval-cpt"]) == 0
    rows = [dict(zip(("expression", "value", "met"), row, strict=True)) for row in requirements]
    write_json(run / "eval" / "summary.json", {"requirements": rows})
    assert supervisor.main(["end", str(run), "eval-cpt", "1"]) == 1
    ended = read_json(RunFiles(run).ended("eval-cpt"))
    assert (ended["outcome"], ended["reason"]) == ("failed", reason)


def test_an_earlier_exams_verdict_is_not_this_ones(run: Path) -> None:
    job = StageJob(name="eval-cpt", script="eval", command=("-c", ""), exam=str(run / "eval" / "summary.json"))
    write_specification(RunFiles(run), job, SETTINGS)
    row = {"expression": "accuracy >= 0.85", "value": 0.5, "met": False}
    write_json(run / "eval" / "summary.json", {"requirements": [row]})
    os.utime(run / "eval" / "summary.json", (1e9, 1e9))
    supervisor.main(["begin", str(run), "eval-cpt"])
    supervisor.main(["end", str(run), "eval-cpt", "1"])  # it crashed, before it judged anything
    assert read_json(RunFiles(run).ended("eval-cpt"))["reason"] == "the command failed with exit code 1"
