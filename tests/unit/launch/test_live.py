"""`medllm status`: a whole run as one value, of a pipeline on this machine and of jobs."""

import io
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from megatron_medllm.cli.app import app
from megatron_medllm.config.run import load
from megatron_medllm.errors import UserError
from megatron_medllm.launch import live
from megatron_medllm.launch.jobs import RunFiles, StageJob, write_specification
from megatron_medllm.launch.live import RunStatus, find_status
from megatron_medllm.launch.status import StageStatus, stage_status
from megatron_medllm.processes import ProcessId
from megatron_medllm.recipe.owner import owning
from megatron_medllm.recipe.records import Record
from megatron_medllm.recipe.stages import recipe_stages
from megatron_medllm.storage import write_json

LAPTOP = Path(__file__).parents[3] / "examples" / "laptop.yaml"
METRICS = {
    "step": 30,
    "loss": 2.5,
    "step_time_s": 2.0,
    "tokens_per_s": 640.0,
    "slowest_rank": 3.0,
    "own_time_median_s": 1.0,
    "own_time_max_s": 1.5,
}


def stage(name: str, state: str, **changes: Any) -> StageStatus:
    numbers = {"step": None, "total_steps": None, "tokens_per_s": None, "eta_s": None, "restarts": 0, "reason": ""}
    return StageStatus(stage=name, job_id="7", state=state, **{**numbers, **changes})


@pytest.mark.parametrize(
    ("states", "state", "exit_status"),
    [
        (["finished", "COMPLETED"], "finished", 0),
        (["finished", "RUNNING", "PENDING"], "running", 3),
        (["finished", "PENDING"], "queued", 3),
        (["failed", "CANCELLED"], "failed", 1),
        (["failed", "RUNNING"], "running", 3),
        (["gave-up", "CANCELLED"], "failed", 1),
        (["finished", "OUT_OF_MEMORY", "CANCELLED"], "failed", 1),
        (["finished", "gone"], "failed", 1),
        (["finished", "requeued"], "failed", 1),
        (["cancelled", "CANCELLED"], "stopped", 1),
        (["finished", "interrupted", "waiting"], "stopped", 1),
    ],
)
def test_the_runs_state_is_that_of_its_stages(states: list[str], state: str, exit_status: int) -> None:
    found = RunStatus("run", "slurm", tuple(stage(f"s{number}", word) for number, word in enumerate(states)))
    assert (found.state, found.exit_status) == (state, exit_status)


def pipeline(run: Path) -> None:
    """What `medllm pipeline` leaves while it trains `cpt`: the stages before it are done."""
    recipe = load(LAPTOP, [f"run_dir={run}"])
    run.mkdir()
    (run / "run.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    for found in recipe_stages(recipe, run / "run.yaml"):
        record = Record(run / "stages" / f"{found.name}.json")
        if found.name == "cpt":
            record.write({}, "begun", 1.0)
            return
        record.write({}, "done", 1.0, exit_status=0)


def by_name(found: RunStatus) -> dict[str, StageStatus]:
    return {row.stage: row for row in found.stages}


def test_a_local_pipeline_shows_its_training_and_what_waits(tmp_path: Path) -> None:
    run = tmp_path / "run"
    pipeline(run)
    write_json(run / "cpt" / "progress.json", {"total_steps": 90})
    (run / "cpt" / "metrics.jsonl").write_bytes(json.dumps(METRICS).encode() + b"\n")
    with owning(run, "medllm pipeline") as owner:
        owner.write("cpt", ProcessId.own())
        found = find_status(run)
        rows = by_name(found)
        assert (found.where, found.state, found.exit_status) == ("local", "running", 3)
        cpt = rows["cpt"]
        assert (cpt.state, cpt.step, cpt.total_steps, cpt.eta_s, cpt.loss) == ("RUNNING", 30, 90, 120.0, 2.5)
        assert (cpt.slowest_rank, cpt.slowest_ratio) == (3, 1.5)
        assert rows["base"].state == "finished" and rows["rpo"].state == "PENDING"
        line = next(line for line in found.report().splitlines() if line.startswith("cpt "))
        assert line.split()[2:] == ["running", "30/90", "2.5", "640", "0:02:00", "rank", "3", "(1.50x)", "0"]
        (run / "logs").mkdir()
        owner.write("pairs", ProcessId.own())
        progress = {"title": "pairs", "done": 3.0, "total": 8, "note": "3 kept"}
        (run / "logs" / "pairs.progress").write_text(json.dumps(progress))
        pairs = by_name(find_status(run))["pairs"]
        assert (pairs.step, pairs.total_steps, pairs.note) == (3, 8, "3 kept")
    stopped = find_status(run)  # its process is gone without a word
    assert (stopped.state, by_name(stopped)["cpt"].state, by_name(stopped)["rpo"].state) == (
        *("stopped", "interrupted", "waiting"),
    )


def test_a_local_failure_gives_the_last_line_or_the_requirement(tmp_path: Path) -> None:
    run = tmp_path / "run"
    pipeline(run)
    (run / "logs").mkdir()
    (run / "logs" / "cpt.log").write_text("step 1\nerror: the reactor is on fire\n\n")
    Record(run / "stages" / "cpt.json").write({}, "begun", 1.0, exit_status=2)
    found = find_status(run)
    assert found.state == "failed" and found.failing is not None
    assert found.failing.reason == "exit status 2: error: the reactor is on fire"
    Record(run / "stages" / "cpt.json").write({}, "begun", 1.0, exit_status=143)
    assert find_status(run).state == "stopped"
    Record(run / "stages" / "cpt.json").write({}, "done", 1.0, exit_status=0)
    Record(run / "stages" / "eval-cpt.json").write({}, "begun", 1.0, exit_status=1)
    rows = [{"expression": "accuracy >= 0.85", "value": 0.5, "met": False}]
    write_json(run / "eval" / "cpt" / "summary.json", {"requirements": rows})
    assert find_status(run).headline.endswith("; eval-cpt failed: requirement not met: accuracy >= 0.85 (found 0.5)")


def test_the_last_of_submit_and_pipeline_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError, match="no run here"):
        find_status(run)
    pipeline(run)
    monkeypatch.setattr(live, "run_status", lambda _: [stage("cpt", "RUNNING")])
    write_json(RunFiles(run).submission, {"jobs": {}})
    os.utime(run / "run.yaml", (1e9, 1e9))
    assert find_status(run).where == "slurm"
    os.utime(run / "run.yaml", (time.time() + 9,) * 2)
    assert find_status(run).where == "local"


def test_watching_ends_with_the_run_and_scripts_get_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [RunStatus("r", "slurm", (stage("cpt", word, loss=2.5),)) for word in ("PENDING", "RUNNING", "finished")]
    monkeypatch.setattr(live, "find_status", lambda _: answers.pop(0))
    waits: list[float] = []
    shown = io.StringIO()
    last = live.watch(tmp_path, Console(file=shown, width=120), sleep=waits.append)
    assert (last.state, waits) == ("finished", [5.0, 5.0])
    assert "finished, 1 of 1 stages done" in shown.getvalue() and "2.5" in shown.getvalue()
    assert "loss" in shown.getvalue() and "tokens/s" not in shown.getvalue()  # no stage has one

    answers[:] = [RunStatus("r", "slurm", (stage("cpt", "failed", reason="why"),))]
    done = CliRunner().invoke(app, ["status", str(tmp_path), "--json"])
    found = json.loads(done.stdout)
    assert (done.exit_code, found["state"], found["failing"], found["exit_status"]) == (1, "failed", "cpt", 1)
    assert found["stages"][0]["reason"] == "why"


def test_an_array_shows_all_its_tasks(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    write_specification(files, StageJob(name="pairs", script="eval", command=("-c", ""), array_size=2), {})
    for number in range(2):
        progress = {"title": "pairs", "done": 3, "total": 8, "note": ""}
        files.progress(f"pairs.{number}").write_text(json.dumps(progress))
    running = stage_status(files, "pairs", "7", ("RUNNING", "None"))
    assert (running.step, running.total_steps) == (6, 16)
    for number, outcome in enumerate(("finished", "failed")):
        ended = {"outcome": outcome, "reason": f"why {number}", "array_id": "7"}
        write_json(files.launch / f"pairs.{number}.ended.json", ended)
    over = stage_status(files, "pairs", "7", None)
    assert (over.state, over.reason) == ("failed", "shard 2/2: why 1")
