"""The whole laptop recipe, made small, as a chain of jobs on a real Slurm: from text to report."""

from pathlib import Path

import yaml
from local_slurm import LocalSlurm, ended
from tiny_run import small_recipe, write_recipe

from megatron_medllm.config.run import load
from megatron_medllm.launch.jobs import RunFiles
from megatron_medllm.launch.status import active_jobs, submitted_jobs
from megatron_medllm.recipe import submit_recipe
from megatron_medllm.storage import read_json


def test_the_recipe_goes_from_text_to_report(slurm: LocalSlurm, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = small_recipe(run_dir)
    settings["cluster"] = yaml.safe_load(yaml.safe_dump(slurm.cluster().model_dump(mode="json")))
    run = load(write_recipe(settings, tmp_path / "recipe.yaml"), [])
    printed = submit_recipe(run, stages=None, dry_run=False, force=False)
    assert "report" in printed
    slurm.wait(lambda: (run_dir / "report.html").is_file(), "the report", timeout_s=900)
    assert set(read_json(run_dir / "summary.json")["models"]) == {"base", "cpt", "rpo"}
    slurm.wait(lambda: not active_jobs(RunFiles(run_dir)), "all jobs to be done")
    assert {stage: ended(run_dir, stage)["exit_code"] for stage in submitted_jobs(RunFiles(run_dir))} == dict.fromkeys(
        submitted_jobs(RunFiles(run_dir)), 0
    )
