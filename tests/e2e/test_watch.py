"""A rank that stops, hangs or is slow, over gloo: named, with every rank's stack, before the job dies."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from megatron_medllm.config.cluster import STALLED_EXIT_CODE
from megatron_medllm.config.run import load
from megatron_medllm.train.loop import train
from tests.worlds.ranks import run_ranks
from tests.worlds.run import cpt_settings, medllm, metrics, write_recipe

TIMEOUT_S = 5.0


def recipe(world: Path, directory: Path, *, layout: dict, steps: int, **watch: float) -> Path:
    changes = {"train_tokens": steps * 8 * 64, "watch": watch, "checkpoint": {}}
    return write_recipe(cpt_settings(world, directory, layout=layout, cpt=changes), directory / "recipe.yaml")


def rank_processes(launcher: int) -> list[int]:
    """The ranks that `medllm train` has started, in their order."""
    return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def wait_for_steps(directory: Path, process, steps: int) -> None:
    while not (directory / "metrics.jsonl").is_file() or len(metrics(directory)) < steps:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_with_every_ranks_stack(tiny_world, tmp_path, stopped):
    path = recipe(tiny_world, tmp_path, layout={"dp": 2}, steps=2000, stall_timeout_s=TIMEOUT_S)
    process = medllm("train", path, env={"TORCH_FR_BUFFER_SIZE": "100"})
    try:
        wait_for_steps(tmp_path / "cpt", process, 2)
        victim = rank_processes(process.pid)[stopped]
        os.kill(victim, signal.SIGSTOP)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == STALLED_EXIT_CODE, output
    watch = tmp_path / "cpt" / "watch"
    verdict = json.loads((watch / "stall.json").read_text())
    assert verdict["kind"] == "silent"
    assert [(row["rank"], row["pid"]) for row in verdict["ranks"]] == [(stopped, victim)]
    assert f"stalled: rank {stopped} (process {victim} on " in output
    for rank in (0, 1):
        stack = (watch / f"rank-{rank:05d}.stack.txt").read_text()
        assert "train/loop.py" in stack and "in _fit" in stack, stack
    assert not Path(f"/proc/{victim}").exists()


def test_a_rank_that_hangs_outside_a_collective_is_named(tiny_world, tmp_path):
    path = recipe(tiny_world, tmp_path, layout={"tp": 2}, steps=20, stall_timeout_s=TIMEOUT_S)
    with pytest.raises(AssertionError, match="of 2 failed"):
        run_ranks(2, "tests.dist.troubled_ranks", str(path), "1", "hang", timeout_s=120)
    watch = tmp_path / "cpt" / "watch"
    verdict = json.loads((watch / "stall.json").read_text())
    assert (verdict["kind"], [row["rank"] for row in verdict["ranks"]]) == ("stuck", [1])
    assert "slow_forward" in (watch / "rank-00001.stack.txt").read_text()
    assert "slow_forward" not in (watch / "rank-00000.stack.txt").read_text()
    assert (watch / "rank-00000.flight-recorder.pickle").stat().st_size > 0


def test_without_a_timeout_one_process_trains_and_leaves_no_verdict(tiny_world, tmp_path):
    path = recipe(tiny_world, tmp_path, layout={}, steps=2, stall_timeout_s=0)
    assert train(load(path, [])) == 0
    assert [file.name for file in (tmp_path / "cpt" / "watch").iterdir()] == ["rank-00000.json"]
    assert "slowest_rank" not in (tmp_path / "cpt" / "metrics.jsonl").read_text()  # of one


@pytest.mark.parametrize("layout", [{"dp": 2}, {"tp": 2}], ids=["dp2", "tp2"])
def test_a_slow_rank_is_named(tiny_world, tmp_path, layout):
    path = recipe(tiny_world, tmp_path, layout=layout, steps=5, slow_steps=3)
    run_ranks(2, "tests.dist.troubled_ranks", str(path), "1", "slow", timeout_s=180)
    watch = tmp_path / "cpt" / "watch"
    found = json.loads((watch / "slow.json").read_text())
    assert [row["rank"] for row in found["ranks"]] == [1]
    assert "rank 1 (process" in found["ranks"][0]["reason"] and "is slow" in found["ranks"][0]["reason"]
    slowest = metrics(tmp_path / "cpt", "slowest_rank")
    assert len(slowest) == 5 and slowest.count(1.0) >= 4
    own, whole = metrics(tmp_path / "cpt", "own_time_min_s"), metrics(tmp_path / "cpt", "forward_backward_min_s")
    assert sum(own[1:]) < 0.7 * sum(whole[1:])  # the fast rank has waited, and that is not counted as its own
    assert not list(watch.glob("*.stack.txt")) and not (watch / "stall.json").exists()
