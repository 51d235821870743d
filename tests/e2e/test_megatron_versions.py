"""One training on every Megatron-Core: the same losses, and checkpoints that move between versions.

The suite runs on one version at a time, so the losses are literals that every version has to meet. Where
MEDLLM_OTHER_PYTHON names the interpreter of an environment with another version (`make test-mcore-new` does), a run is
also handed back and forth between the two.
"""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_medllm.versions import TESTED
from tests.worlds.run import REPOSITORY, cpt_settings, metrics, run_config, write_recipe
from tests.worlds.steps import steps_of

STEPS = 10
LOSSES = {
    "full": [
        7.28319926,
        6.9480855,
        6.82791841,
        6.56300551,
        6.6111629,
        6.68493142,
        6.19653198,
        6.07647793,
        6.33718934,
        6.10631958,
    ],
    "adapter": [
        7.28319926,
        7.13542794,
        7.12009452,
        6.93557482,
        7.05740864,
        7.06320103,
        6.7547851,
        6.63801085,
        6.81413271,
        6.72711707,
    ],
}
GRAD_NORMS = {
    "full": [
        2.54891465,
        2.52459766,
        2.54232644,
        1.765138,
        2.09022613,
        1.71822571,
        1.80163971,
        2.41260452,
        2.03761772,
        1.87221995,
    ],
    "adapter": [
        3.49912578,
        3.9764812,
        3.01512355,
        3.13579039,
        3.5121326,
        2.47983958,
        3.13394639,
        3.60066394,
        2.94921859,
        2.93423264,
    ],
}


def settings_of(kind: str, world: Path, directory: Path) -> dict:
    settings = cpt_settings(world, directory, cpt={"train_tokens": STEPS * 8 * 64})
    if kind == "adapter":
        settings["cpt"]["adapter"] = {"rank": 4}
    return settings


@pytest.mark.parametrize("kind", LOSSES)
def test_the_losses_are_those_of_every_version(tiny_world: Path, tmp_path: Path, kind: str) -> None:
    with steps_of(run_config(settings_of(kind, tiny_world, tmp_path))) as take:
        results = [take(step).metrics for step in range(STEPS)]
    assert [row["loss"] for row in results] == pytest.approx(LOSSES[kind], rel=2e-6)
    assert [row["grad_norm"] for row in results] == pytest.approx(GRAD_NORMS[kind], rel=2e-5)


@pytest.fixture(scope="module")
def other_python() -> str:
    found = os.environ.get("MEDLLM_OTHER_PYTHON")
    if not found:
        pytest.skip("MEDLLM_OTHER_PYTHON names no environment with another Megatron-Core")
    return found


def train_with(python: str, settings: dict) -> Path:
    """Train in an environment until the end, from the newest checkpoint that is there; the stage's directory."""
    recipe = write_recipe(settings, Path(settings["run_dir"]) / "recipe.yaml")
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [python, "-W", "ignore", "-m", "megatron_medllm", "train", str(recipe)],
        cwd=REPOSITORY,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return recipe.parent / "cpt"


@pytest.mark.parametrize("layout", [{}, {"distributed_optimizer": False}], ids=["distributed", "plain"])
@pytest.mark.parametrize("direction", ["there", "back"])
def test_a_run_goes_on_in_another_version(
    tiny_world: Path, tmp_path: Path, other_python: str, direction: str, layout: dict
) -> None:
    """From step 4 of 6 on, to the same losses, weights and ledger as where it began."""
    first, second = (sys.executable, other_python) if direction == "there" else (other_python, sys.executable)
    settings = cpt_settings(tiny_world, tmp_path / "first", layout=layout)
    whole = train_with(first, settings)
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    for late in ("checkpoints/step-00000006", "hf"):
        shutil.rmtree(tmp_path / "second" / "cpt" / late)
    moved = train_with(second, settings | {"run_dir": str(tmp_path / "second")})
    assert len(metrics(moved)) == 6 and metrics(moved) == pytest.approx(metrics(whole), rel=2e-6)
    log = (moved / "metrics.jsonl").read_text().splitlines()
    assert log[:4] == (whole / "metrics.jsonl").read_text().splitlines()[:4] and log[4:] != log[:2]
    assert (moved / "ledger.jsonl").read_bytes() == (whole / "ledger.jsonl").read_bytes()
    expected, found = (load_file(stage / "hf" / "model.safetensors") for stage in (whole, moved))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-6, msg=name)


def test_the_other_environment_has_another_megatron(other_python: str) -> None:
    code = "from importlib.metadata import version; print(version('megatron-core'))"
    other = subprocess.run([other_python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert {other, version("megatron-core")} == set(TESTED)
