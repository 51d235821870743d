"""Jobs on a real Slurm: saved and requeued on a signal, restarted after a crash, stopped when restarts are in vain.

The trainer is `fake_trainer.py`; everything around it (scripts, supervisor, node agent, health check) is real.
"""

import subprocess
from datetime import datetime
from pathlib import Path

import pytest

from megatron_medllm.errors import UserError
from megatron_medllm.launch.jobs import RunFiles, StageJob
from megatron_medllm.launch.node import RENDEZVOUS_TIMEOUT_S
from megatron_medllm.launch.status import cancel, run_status
from megatron_medllm.storage import read_jsonl
from tests.slurm.local_slurm import LocalSlurm, ended, output, starts

FAKE = str(Path(__file__).parent / "fake_trainer.py")


def training(run: Path, *arguments: object, **changes: object) -> StageJob:
    settings = {
        "name": "cpt",
        "script": "cpt",
        "command": (FAKE, str(run), *map(str, arguments)),
        "nodes": 2,
        "processes_per_node": 2,
        "checkpoints": "cpt/checkpoints",
        "metrics": "cpt/metrics.jsonl",
        "save_time_s": 1.0,
    }
    return StageJob(**{**settings, **changes})


def follow_up(name: str, *command: str, **changes: object) -> StageJob:
    return StageJob(name=name, script="export", command=command, **{"after": ("cpt",), **changes})


def steps(run: Path) -> list[int]:
    path = run / "cpt" / "metrics.jsonl"
    return [row["step"] for row in read_jsonl(path)] if path.exists() else []


def test_a_signal_saves_requeues_and_resumes_and_the_chain_goes_on(slurm: LocalSlurm, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = tmp_path / "exported"
    export = follow_up("export", "-c", f"open({str(done)!r}, 'w').close()")
    jobs = [training(run, 60, "wait-at", 30, total_steps=60), export]
    ids = slurm.submit(run, jobs)
    slurm.wait(lambda: len(steps(run)) >= 30, "30 steps")
    training_status, waiting = run_status(run)
    assert (training_status.state, waiting.state) == ("RUNNING", "PENDING")
    assert training_status.total_steps == 60 and training_status.eta_s is not None
    subprocess.run(["scancel", "--signal=USR1", ids["cpt"]], check=True)
    slurm.wait_for_state(ids["export"], "COMPLETED")
    assert done.exists()
    # Every step exactly once: nothing was lost, nothing was done again.
    assert steps(run) == list(range(1, 61))
    first, second = starts(run, "cpt")
    assert (first["step"], second["restart"]) == (-1, 1)
    assert second["step"] >= 30
    assert ended(run, "cpt")["outcome"] == "finished"
    assert [(s.state, s.restarts) for s in run_status(run)] == [("finished", 1), ("finished", 0)]
    logs = RunFiles(run).launch / "logs" / "cpt" / f"job{ids['cpt']}-restart1"
    assert len(list(logs.glob("node[01]/*/attempt_0/[01]/stderr.log"))) == 4


def test_a_crashed_node_is_left_behind(slurm: LocalSlurm, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ids = slurm.submit(run, [training(run, 60, "wait-at", 25, processes_per_node=1)])
    slurm.wait(lambda: len(steps(run)) >= 25, "a checkpoint")
    victim = output("squeue", "--noheader", "--format=%B", f"--jobs={ids['cpt']}")
    slurm.crash(victim)
    (run / "go").touch()
    try:
        slurm.wait_for_state(ids["cpt"], "COMPLETED")
    finally:
        slurm.boot(victim)
    assert sorted(set(steps(run))) == list(range(1, 61))
    restarted_on = output("scontrol", "show", "hostnames", starts(run, "cpt")[-1]["nodes"]).split()
    assert victim not in restarted_on
    assert starts(run, "cpt")[-1]["step"] >= 20


def test_restarts_without_progress_end_and_cancel_what_waits(slurm: LocalSlurm, tmp_path: Path) -> None:
    run = tmp_path / "run"
    jobs = [training(run, 50, "crash-at", 5, nodes=1, processes_per_node=1), follow_up("export", "-c", "pass")]
    told = tmp_path / "told"
    ids = slurm.submit(run, jobs, max_restarts_without_progress=1, on_end=f'printf "%s|" "$@" >{told}')
    slurm.wait_for_state(ids["cpt"], "FAILED")
    slurm.wait_for_state(ids["export"], "CANCELLED")
    slurm.wait_for_state(ids["on-end"], "COMPLETED")
    assert told.read_text().startswith(f"{run}|failed|cpt|gave up: 2 starts in a row")
    report = ended(run, "cpt")
    assert report["outcome"] == "gave-up" and "2 starts in a row without a new checkpoint" in report["reason"]
    crash = [row for row in read_jsonl(RunFiles(run).history("cpt")) if row.get("last_lines")][-1]
    assert "the reactor is on fire" in crash["last_lines"][-1]


def test_a_wrong_input_fails_at_once(slurm: LocalSlurm, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "cpt").mkdir(parents=True)
    jobs = [training(run, 5, nodes=1, processes_per_node=0, command=("-c", "import sys; sys.exit(2)"))]
    ids = slurm.submit(run, jobs)
    slurm.wait_for_state(ids["cpt"], "FAILED")
    assert ended(run, "cpt")["reason"] == "the command failed with exit code 2"
    assert len(starts(run, "cpt")) == 1


def test_an_unfit_node_is_excluded(slurm: LocalSlurm, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = training(run, 10, nodes=1, processes_per_node=1, gpus_per_node=1)
    ids = slurm.submit(run, [job], gpus=True, max_restarts_without_progress=1)
    # No GPU answers here: the first node is found unfit, then the second, and then the guard ends it.
    slurm.wait_for_state(ids["cpt"], "FAILED")
    first, second = starts(run, "cpt")
    assert first["nodes"] != second["nodes"]
    unfit = {path.stem for path in RunFiles(run).unfit_nodes.glob("*.json")}
    assert unfit == {first["nodes"], second["nodes"]}
    excluded = next(row for row in read_jsonl(RunFiles(run).history("cpt")) if row["event"] == "end")
    assert "0 usable GPUs, 1 expected" in excluded["reason"]


def test_an_unfit_node_among_several_is_excluded_at_once(slurm: LocalSlurm, tmp_path: Path) -> None:
    """The fit nodes leave with it: nobody waits in a rendezvous, and the restart is on the others."""
    driver, broken = tmp_path / "bin" / "nvidia-smi", tmp_path / "broken-node"
    driver.parent.mkdir()
    driver.write_text(f'#!/bin/sh\n[ "$SLURMD_NODENAME" = "$(cat {broken})" ] || echo "GPU 0: made up"\n')
    driver.chmod(0o755)
    site = tmp_path / "env.sh"
    site.write_text(f"export PATH={driver.parent}:$PATH\n" + slurm.environment_file.read_text())
    broken.write_text("n2")
    run = tmp_path / "run"
    job = training(run, 10, processes_per_node=1, gpus_per_node=1)
    ids = slurm.submit(run, [job], gpus=True, env_file=site)
    slurm.wait_for_state(ids["cpt"], "COMPLETED")
    history = list(read_jsonl(RunFiles(run).history("cpt")))
    assert [row["event"] for row in history] == ["start", "end", "start", "end"]
    assert history[1]["reason"] == "health check failed: n2: 0 usable GPUs, 1 expected"
    began, found = (datetime.fromisoformat(row["time"]) for row in history[:2])
    assert (found - began).total_seconds() < RENDEZVOUS_TIMEOUT_S  # nobody waits for the unfit node
    assert output("scontrol", "show", "hostnames", history[2]["nodes"]).split() == ["n1", "n3"]
    assert {path.stem for path in RunFiles(run).unfit_nodes.glob("*.json")} == {"n2"}


def test_cancel_ends_this_run_only(slurm: LocalSlurm, tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    held = training(mine, 9, "wait-at", 3, nodes=1, processes_per_node=1)
    ids = slurm.submit(mine, [held, follow_up("export", "-c", "pass")])
    others = slurm.submit(other, [training(other, 20, nodes=1, processes_per_node=1)])
    slurm.wait(lambda: len(steps(mine)) >= 3, "a few steps")
    with pytest.raises(UserError, match="still queued"):
        slurm.submit(mine, [training(mine, 9)])
    assert set(cancel(mine)) == set(ids.values())
    slurm.wait_for_state(ids["cpt"], "CANCELLED")
    slurm.wait_for_state(others["cpt"], "COMPLETED")
    assert cancel(mine) == []
    slurm.wait(lambda: RunFiles(mine).ended("cpt").exists(), "the reason")
    assert ended(mine, "cpt")["outcome"] == "cancelled"


def test_array_tasks_all_run_before_what_waits_for_them(slurm: LocalSlurm, tmp_path: Path) -> None:
    run = tmp_path / "run"
    count = f"import os; open({str(tmp_path)!r} + '/part' + os.environ['SLURM_ARRAY_TASK_ID'], 'w').close()"
    check = f"import glob; assert len(glob.glob({str(tmp_path)!r} + '/part*')) == 3"
    parts = StageJob(name="cpt", script="corpus", command=("-c", count), array_size=3)
    ids = slurm.submit(run, [parts, follow_up("export", "-c", check)])
    slurm.wait_for_state(ids["export"], "COMPLETED")
    assert {p.name for p in RunFiles(run).launch.glob("*.ended.json")} == {
        "cpt.0.ended.json",
        "cpt.1.ended.json",
        "cpt.2.ended.json",
        "export.ended.json",
    }


def test_a_refused_job_leaves_nothing_queued(slurm: LocalSlurm, tmp_path: Path) -> None:
    run = tmp_path / "run"
    too_many = follow_up("export", "-c", "pass", array_size=10_000_000)
    with pytest.raises(UserError, match="sbatch refused"):
        slurm.submit(run, [training(run, 5), too_many])
    queued = output("squeue", "--noheader", "--format=%j", "--states=PENDING,RUNNING")
    assert "medllm-cpt-run" not in queued.split()
