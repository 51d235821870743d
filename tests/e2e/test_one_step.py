"""The optimizer step exists once: what a benchmark measures is what the loop trains, to the last bit."""

import json
from pathlib import Path

from megatron_medllm.bench.harness import BenchSettings
from megatron_medllm.bench.throughput import measure
from megatron_medllm.train.loop import train
from tests.worlds.run import cpt_settings, metrics, run_config


def test_a_benchmark_trains_as_the_loop_does(tiny_world: Path, tmp_path: Path):
    """Warm-up and decay of the learning rate and the adapter's dropout show in the losses."""
    settings = cpt_settings(tiny_world, tmp_path)
    settings["cpt"]["optimizer"] |= {"warmup_ratio": 0.5, "schedule": "linear"}
    settings["cpt"]["adapter"] = {"rank": 4, "dropout": 0.2}
    assert train(run_config(settings)) == 0
    measured = measure(run_config(settings), BenchSettings(output=tmp_path / "bench", warmup_steps=0, steps=6))
    losses = json.loads(measured.read_text())["losses"]
    assert len(losses) == 6 and losses == metrics(tmp_path / "cpt")
    assert len(set(losses)) == 6
