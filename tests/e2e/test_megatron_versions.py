"""One training on every Megatron-Core: the same losses, and checkpoints that move between versions.

The suite runs on one version at a time, so the losses are literals that every version has to meet. Where
MEDLLM_OTHER_PYTHON names the interpreter of an environment with another version (`make test-mcore-new` does), a run is
also handed back and forth between the two.
"""

import os
import subprocess
from pathlib import Path

import pytest

from tests.worlds.run import REPOSITORY, cpt_settings, metrics, run_config, run_medllm, write_recipe
from tests.worlds.steps import steps_of

STEPS = 10
LOSSES = {
    "full": [0.0] * STEPS,
    "adapter": [0.0] * STEPS,
}
GRAD_NORMS = {
    "full": [0.0] * STEPS,
    "adapter": [0.0] * STEPS,
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
