"""The whole laptop recipe, made small, as a chain of jobs on a real Slurm, submitted by an installed wheel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_medllm.launch.jobs import RunFiles
from megatron_medllm.launch.status import run_status, submitted_jobs
from megatron_medllm.storage import read_json
from tests.slurm.local_slurm import ROOT, LocalSlurm, ended, starts
from tests.worlds.run import small_recipe, write_recipe

STAGES = [
    *("world", "corpus-base", "corpus-medical", "base", "eval-base", "cpt", "eval-cpt"),
    *("pairs", "score", "rpo", "eval-rpo", "export", "report"),
]


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with the package as its wheel brings it, without the checkout: batch scripts and recipes included."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path / "dist"), str(ROOT)], check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True)
    return tmp_path / "site"


def test_the_recipe_goes_from_text_to_report(slurm: LocalSlurm, tmp_path: Path, installed: Path) -> None:
    run_dir = tmp_path / "run"
    settings = small_recipe(run_dir)
    settings["cluster"] = yaml.safe_load(yaml.safe_dump(slurm.cluster().model_dump(mode="json")))
    recipe = write_recipe(settings, tmp_path / "recipe.yaml")
    done = subprocess.run(
        [sys.executable, "-m", "megatron_medllm", "submit", str(recipe)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    jobs = submitted_jobs(RunFiles(run_dir))
    assert list(jobs) == STAGES and all(f"job {job_id}" in done.stdout for job_id in jobs.values())
    frozen = run_dir / "code" / "megatron_medllm"
    assert (frozen / "shipped_files" / "slurm" / "stage.sh").is_file()  # a wheel's: a checkout has them at its top
    slurm.wait_for_chain(run_dir, jobs)
    assert {stage: ended(run_dir, stage)["outcome"] for stage in STAGES} == dict.fromkeys(STAGES, "finished")
    assert [len(starts(run_dir, stage)) for stage in STAGES] == [1] * len(STAGES)
    # Text went in, a report came out, and every model in it was examined in both modes.
    assert set(read_json(run_dir / "summary.json")["models"]) == {"base", "cpt", "rpo"}
    assert (run_dir / "report.html").is_file() and (run_dir / "hf" / "model.safetensors").is_file()
    assert [s.state for s in run_status(run_dir)] == ["finished"] * len(STAGES)
