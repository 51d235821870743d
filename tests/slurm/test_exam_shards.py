"""An exam in shards on three nodes of a real Slurm, one of them lost in the middle, another told to stop."""

import subprocess
from pathlib import Path

import yaml

from megatron_medllm.config.exam import DecodingConfig, EngineConfig, EvalConfig, ExamConfig, MaxNewTokens
from megatron_medllm.config.run import load
from megatron_medllm.evaluation.run import run_exam
from megatron_medllm.launch.jobs import RunFiles
from megatron_medllm.launch.recipe_jobs import submit_recipe
from megatron_medllm.launch.status import run_status, submitted_jobs
from megatron_medllm.shard import Shard
from tests.slurm.local_slurm import LocalSlurm, output, starts


def test_an_exam_in_shards_outlives_a_node_and_equals_one_process(
    slurm: LocalSlurm, exam_dir: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = EvalConfig(
        exam=ExamConfig(name="invented", data=(exam_dir,)),
        # One request at a time and long answers: the crash falls in the middle.
        engine=EngineConfig(device="cpu", unit_requests=1, replicas=3),
        decoding=DecodingConfig(max_new_tokens=MaxNewTokens(answer_only=100, explained=1000)),
        resamples=200,
    )
    run_dir, whole, recipe = tmp_path / "run", tmp_path / "whole", tmp_path / "recipe.yaml"
    settings = {
        "run_dir": str(run_dir),
        "model": {"path": str(tiny_model)},
        "eval": config.model_dump(mode="json"),
        "cluster": slurm.cluster(extra_options=("--exclusive",)).model_dump(mode="json"),
    }
    recipe.write_text(yaml.safe_dump(settings))
    submit_recipe(load(recipe, []), stages=["eval-base"], dry_run=False, force=False)
    jobs = submitted_jobs(RunFiles(run_dir))
    assert list(jobs) == ["eval-base-shards", "eval-base"]
    log = Shard(2, 3).file(run_dir / "eval" / "base" / "answers.jsonl")
    slurm.wait(lambda: log.exists() and log.read_bytes().count(b"\n") >= 1, "an answer of shard 2/3")
    task = f"{jobs['eval-base-shards']}_1"
    victim = output("squeue", "--noheader", "--format=%B", f"--jobs={task}")
    slurm.crash(victim)
    # What Slurm sends when the time limit nears; the array's last task has the array's own job id.
    subprocess.run(["scancel", "--signal=USR1", f"{jobs['eval-base-shards']}_2"], check=True)
    kept = log.read_bytes().count(b"\n")
    try:
        slurm.wait_for_state(jobs["eval-base"], "COMPLETED")
    finally:
        slurm.boot(victim)
    assert 1 <= kept < 4 and log.read_bytes().count(b"\n") == 4  # nothing was asked twice
    lost = starts(run_dir, "eval-base-shards.1")
    assert [row["restart"] for row in lost] == [0, 1] and lost[0]["nodes"] == victim != lost[1]["nodes"]
    restarts = [[row["restart"] for row in starts(run_dir, f"eval-base-shards.{task}")] for task in (0, 2)]
    assert restarts == [[0], [0, 1]]
    assert [(s.state, s.restarts) for s in run_status(run_dir)] == [("finished", 2), ("finished", 0)]
    run_exam(config, tiny_model, whole)
    for name in ("results.jsonl", "summary.json", "report.md"):
        assert (run_dir / "eval" / "base" / name).read_bytes() == (whole / name).read_bytes(), name
