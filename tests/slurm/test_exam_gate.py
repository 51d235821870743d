"""What an exam that goes wrong does to the chain behind it, on a real Slurm: a crashed shard, then a failing gate."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from megatron_medllm.cli.app import app
from megatron_medllm.config.exam import DecodingConfig, EngineConfig, EvalConfig, ExamConfig, MaxNewTokens
from megatron_medllm.launch.jobs import RunFiles
from megatron_medllm.storage import read_json
from tests.slurm.local_slurm import LocalSlurm, ended, medllm_submit, output, starts


@pytest.fixture
def recipe(slurm: LocalSlurm, exam_dir: Path, tiny_model: Path, tmp_path: Path) -> Path:
    """An exam in two shards whose requirement nothing meets, and a training behind it."""
    exam = ExamConfig(name="invented", data=(exam_dir,))
    tokens = MaxNewTokens(answer_only=5, explained=20)
    cluster = slurm.cluster(on_end=f'printf "%s|" "$@" >{tmp_path / "told"}')
    settings = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tiny_model)},
        "eval": EvalConfig(
            exam=exam,
            engine=EngineConfig(device="cpu", unit_requests=2, replicas=2),
            decoding=DecodingConfig(max_new_tokens=tokens),
            resamples=200,
            require=("malformed_rate <= 1", "accuracy >= 0.99"),
        ).model_dump(mode="json"),
        "pairs": {"questions": exam.model_dump(mode="json"), "contamination": "allow"},
        "rpo": {"pairs": "none", "sequence_length": 512, "global_batch_size": 4, "optimizer": {"lr": 1e-6}},
        "cluster": cluster.model_dump(mode="json"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_crashed_shard_and_then_a_failing_gate_stop_the_chain_and_say_why(
    slurm: LocalSlurm, recipe: Path, tmp_path: Path
) -> None:
    run_dir, told = tmp_path / "run", tmp_path / "told"
    block = run_dir / "eval" / "base" / "timing.2-of-2.json"
    block.mkdir(parents=True)  # what shard 2 wants to write at its end: it crashes, as with a traceback of its own

    jobs = medllm_submit(recipe)
    slurm.wait_for_state(jobs["on-end"], "COMPLETED")
    crash = "shard 2/2: the command failed with exit code 1: IsADirectoryError: "
    assert told.read_text().startswith(f"{run_dir}|failed|eval-base-shards|{crash}")
    assert len(starts(run_dir, "eval-base-shards.1")) == 1  # a crash that another start would only repeat
    assert ended(run_dir, "eval-base-shards.0")["outcome"] == "finished"  # and the other shard's work is kept
    found = status(run_dir, exit_code=1)
    assert found["eval-base-shards"]["state"] == "failed"
    assert found["eval-base-shards"]["reason"].startswith(crash)
    others = set(jobs) - {"eval-base-shards", "on-end"}
    assert {slurm.job_state(jobs[stage]) for stage in others} == {"CANCELLED"}
    logs = [path.read_bytes() for path in answer_logs(run_dir)]
    assert len(logs) == 2 and sum(log.count(b"\n") for log in logs) == 12

    block.rmdir()
    jobs = medllm_submit(recipe)
    slurm.wait_for_state(jobs["on-end"], "COMPLETED")
    assert [path.read_bytes() for path in answer_logs(run_dir)] == logs  # nothing was asked twice
    summary = read_json(run_dir / "eval" / "base" / "summary.json")
    assert [row["met"] for row in summary["requirements"]] == [True, False]
    gate = "requirement not met: accuracy >= 0.99 (found "
    assert told.read_text().startswith(f"{run_dir}|failed|eval-base|{gate}")
    assert "ExitCode=1:0" in output("scontrol", "show", "job", jobs["eval-base"])
    found = status(run_dir, exit_code=1)
    assert found["eval-base-shards"]["state"] == "finished"
    assert found["eval-base"]["state"] == "failed" and found["eval-base"]["reason"].startswith(gate)
    others = {"pairs", "score", "rpo", "eval-rpo-shards", "eval-rpo"}
    assert others < set(jobs) and {slurm.job_state(jobs[stage]) for stage in others} == {"CANCELLED"}
    assert not any(RunFiles(run_dir).history(stage).exists() for stage in others)  # none of them was ever started


def status(run_dir: Path, *, exit_code: int) -> dict[str, dict]:
    """What `medllm status --json` says of every stage."""
    done = CliRunner().invoke(app, ["status", str(run_dir), "--json"])
    assert done.exit_code == exit_code, done.output
    return {row["stage"]: row for row in json.loads(done.stdout)["stages"]}


def answer_logs(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "eval" / "base").glob("answers.*-of-2.jsonl"))
