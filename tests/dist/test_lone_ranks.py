"""`medllm bench rank`: one rank without the others holds what it holds among them, and what the plan says."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.worlds.run import run_medllm

from tests.worlds.ranks import run_ranks
from tests.worlds.shapes import ODD_SHAPE

LAYOUT = {"tp": 2, "pp": 2, "dp": 2}
HELD = ("weights", "gradients", "main weights", "optimizer moments")


def write_recipe(directory: Path) -> Path:
    """A recipe whose data are never read."""
    settings = {
        "run_dir": str(directory / "run"),
        "stage": "cpt",
        "model": {"shape": ODD_SHAPE, "dtype": "bfloat16"},
        "layout": LAYOUT,
        "tokenizer": str(directory / "no-tokenizer"),
        "cpt": {
            "data": [{"path": str(directory / "no-corpus")}],
            "train_tokens": 64 * 8,
            "sequence_length": 64,
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "optimizer": {"lr": 1e-3},
        },
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank, run alone, reports."""
    directory = tmp_path_factory.mktemp("alone")
    recipe = write_recipe(directory)
    run_ranks(1, "tests.dist.lone_ranks", str(recipe), str(directory / "out"), timeout_s=300)
    return [json.loads((directory / "out" / f"rank-{rank}.json").read_text()) for rank in range(8)]


def test_a_lone_rank_holds_what_it_holds_among_the_others(alone: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    case = {"layout": LAYOUT, "shape": ODD_SHAPE, "dtype": "bfloat16", "lora_rank": 0}
    (tmp_path / "cases.json").write_text(json.dumps([case]))
    arguments = (str(tmp_path / "cases.json"), str(tmp_path / "out"))
    run_ranks(8, "tests.dist.planner_ranks", *arguments, timeout_s=500)
    for rank, found in enumerate(alone):
        among = json.loads((tmp_path / "out" / f"{rank}.json").read_text())[0]
        assert found["held_bytes"] == {name: among[name] for name in HELD}, f"rank {rank}"
        assert (found["place"]["pp"], found["place"]["dp"]) == (among["stage"], among["dp_rank"])


def test_a_lone_rank_holds_what_is_planned_and_steps(alone: list[dict[str, Any]]) -> None:
    assert len({(r["place"]["tp"], r["place"]["pp"], r["place"]["dp"]) for r in alone}) == 8
    for found in alone:
        assert found["held_bytes"] == found["planned_bytes"]
        assert min(found["held_bytes"].values()) > 0  # moments: the step was taken, so no NaN came in
        assert found["micro_batches"] == 2 and found["forward_backward_s"] > 0


def test_the_command_reports_a_rank_and_refuses_one_that_is_not_there(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    status, output = run_medllm("bench", "rank", recipe, "--rank", "5", "--steps", "1")
    assert status == 0 and "# Rank 5 (tp 1, pp 1, dp 0, cp 0) alone" in output, output
    assert "| optimizer moments |" in output
    assert re.search(
        r"rank 5: peak [\d.]+ GiB \(planned [\d.]+, [-+][\d.]+ %\); .* \(no plan for this device\)", output
    )
    status, output = run_medllm("bench", "rank", recipe, "--rank", "8")
    assert status == 2 and "rank 8 is not one of the layout's 8 (0 to 7)" in output


def test_the_time_of_a_lone_rank_is_planned_from_its_own_layers(tmp_path: Path) -> None:
    """The stages' computing times, without exchanges and waiting, are what the plan of the whole layout is made of."""
    from megatron_medllm.bench.rank import planned_compute_s
    from megatron_medllm.config.run import load
    from megatron_medllm.planner.from_config import workload_of
    from megatron_medllm.planner.hardware import load_hardware
    from megatron_medllm.planner.step_time import step_time

    run = load(write_recipe(tmp_path), [])
    workload = workload_of(run)
    parts = step_time(workload, load_hardware("h200")).parts_s
    last = planned_compute_s(run, "h200", 1, micro_batches=workload.num_microbatches)
    assert last == pytest.approx(parts["matrix products"] + parts["attention"] + parts["memory-bound kernels"])
    assert planned_compute_s(run, "h200", 0, micro_batches=2) < planned_compute_s(run, "h200", 1, micro_batches=2)
