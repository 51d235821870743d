"""The whole laptop recipe, made small, as a chain of jobs on a real Slurm: from text to report."""

from pathlib import Path

import yaml

from megatron_medllm.config.run import load
from megatron_medllm.launch.jobs import RunFiles
from megatron_medllm.launch.recipe_jobs import submit_recipe
from megatron_medllm.launch.status import run_status, submitted_jobs
from megatron_medllm.storage import read_json
from tests.slurm.local_slurm import LocalSlurm, ended, starts
from tests.worlds.run import small_recipe, write_recipe

STAGES = [
    *("world", "corpus-base", "corpus-medical", "base", "eval-base", "cpt", "eval-cpt"),
    *("pairs", "score", "rpo", "eval-rpo", "export", "report"),
]


def test_the_recipe_goes_from_text_to_report(slurm: LocalSlurm, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = small_recipe(run_dir)
    settings["cluster"] = yaml.safe_load(yaml.safe_dump(slurm.cluster().model_dump(mode="json")))
    run = load(write_recipe(settings, tmp_path / "recipe.yaml"), [])
    printed = submit_recipe(run, stages=None, dry_run=False, force=False)
    jobs = submitted_jobs(RunFiles(run_dir))
    assert list(jobs) == STAGES and all(f"job {job_id}" in printed for job_id in jobs.values())
    slurm.wait_for_chain(run_dir, jobs)
    assert {stage: ended(run_dir, stage)["outcome"] for stage in STAGES} == dict.fromkeys(STAGES, "finished")
    assert [len(starts(run_dir, stage)) for stage in STAGES] == [1] * len(STAGES)
    # Text went in, a report came out, and every model in it was examined in both modes.
    assert set(read_json(run_dir / "summary.json")["models"]) == {"base", "cpt", "rpo"}
    assert (run_dir / "report.html").is_file() and (run_dir / "hf" / "model.safetensors").is_file()
    assert [s.state for s in run_status(run_dir)] == ["finished"] * len(STAGES)
