"""The throughput harness on a tiny model, its reports, comparisons and sweeps."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megatron_medllm.bench import sweep as sweep_module
from megatron_medllm.bench.environment import environment_facts
from megatron_medllm.bench.harness import BenchSettings, Work, local_work
from megatron_medllm.bench.report import compare_report
from megatron_medllm.bench.sweep import grid, sweep, sweep_report
from megatron_medllm.bench.synthetic import SyntheticData
from megatron_medllm.bench.throughput import measure
from megatron_medllm.config.run import RunConfig, load
from megatron_medllm.data.microbatch import IGNORED, MicroBatch
from megatron_medllm.errors import UserError
from megatron_medllm.parallel.packed import Segment

RECIPE: dict[str, Any] = {
    "run_dir": "unused",
    "model": {
        "shape": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_query_groups": 1,
            "ffn_hidden_size": 64,
            "vocab_size": 128,
            "tie_embeddings": True,
        },
        "dtype": "float32",
    },
    "base": {
        "data": [{"path": "nowhere"}],
        "train_tokens": 1,
        "sequence_length": 64,
        "global_batch_size": 2,
        "optimizer": {"lr": 0.001},
    },
    "stage": "base",
}


def recipe(directory: Path, **changes: object) -> RunConfig:
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, **changes}))
    return load(path, [])


@pytest.mark.filterwarnings("ignore::UserWarning:megatron")
def test_a_tiny_model_is_measured_on_random_data(tmp_path: Path) -> None:
    settings = BenchSettings(
        output=tmp_path / "a",
        warmup_steps=1,
        steps=3,
        synthetic=SyntheticData(document_length=20),
        hardware="h100-sxm",
    )
    path = measure(recipe(tmp_path), settings)
    found = json.loads(path.read_text())
    assert found["steps"] == 3 and len(found["losses"]) == 3
    assert found["padding_share"] == 0
    window = 3 * 2 * 64 / found["tokens_per_s"]
    assert found["step_time_s"]["min"] * 3 <= window * 1.0001 <= found["step_time_s"]["max"] * 3 * 1.001
    # Documents are shorter than the row: what was attended is less than Megatron's full square.
    assert 0 < found["mfu"]["packed"] < found["mfu"]["megatron"]
    assert set(found["parts_s"]) == {"data", "forward_backward", "gradient_norm", "optimizer"}
    assert "| tokens/s/GPU |" in path.with_suffix(".md").read_text()
    other = tmp_path / "b.json"
    changed = {**found, "tokens_per_s_per_gpu": 2 * found["tokens_per_s_per_gpu"], "world_size": 7}
    other.write_text(json.dumps(changed))
    text = compare_report(path, other)
    assert "+100.0 %" in text and "| world_size | 1 | 7 | |" in text


@pytest.mark.filterwarnings("ignore::UserWarning:megatron")
def test_a_profile_is_one_step_more_and_names_what_the_time_went_to(tmp_path: Path) -> None:
    settings = BenchSettings(
        output=tmp_path, warmup_steps=0, steps=1, synthetic=SyntheticData(document_length=20), profile=True
    )
    found = json.loads(measure(recipe(tmp_path), settings).read_text())
    assert found["steps"] == 1
    lines = (tmp_path / "profile.md").read_text().splitlines()
    kinds = [line.split(" | ")[0].removeprefix("| ") for line in lines[2 : lines.index("")]]
    assert {"matrix products", "attention", "element-wise and reductions"} <= set(kinds)
    assert any(line.startswith("| aten::mm |") for line in lines)
    profiled = json.loads((tmp_path / "profile.json").read_text())
    assert profiled["wall_s"] > 0 and "gap_s" not in profiled  # no device whose waiting could be told


@pytest.mark.filterwarnings("ignore::UserWarning:megatron")
def test_a_recipe_that_validates_is_measured_on_random_data(tmp_path: Path) -> None:
    """Nothing of random data is held out; the examples all validate."""
    base = RECIPE["base"] | {"validate_every_steps": 1}
    settings = BenchSettings(output=tmp_path, warmup_steps=0, steps=1, synthetic=SyntheticData(document_length=20))
    assert json.loads(measure(recipe(tmp_path, base=base), settings).read_text())["steps"] == 1


def test_work_of_shared_prompts_and_padding() -> None:
    labels = np.array([IGNORED, IGNORED, 5, 6, 7, IGNORED, IGNORED])
    segments = (Segment(0, 2), Segment(2, 4, 0, 2), Segment(4, 5, 0, 2), Segment(5, 7))
    batch = MicroBatch(np.zeros(7, np.int64), labels, np.arange(7), segments)
    # Prompt 3 pairs; chosen 2x2 + 3; rejected 1x2 + 1. The last segment teaches nothing: padding.
    assert local_work(batch, unit="pairs") == Work(tokens=5, padding=2, loss_tokens=3, attended=3 + 7 + 3)
    assert local_work(batch, unit="rows").padding == 0


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that a sweep runs; each is as fast as the number of its call."""
    calls: list[list[str]] = []
    really_run = subprocess.run

    def run(command: list[str], **settings: Any) -> subprocess.CompletedProcess:
        if command[0] != sys.executable:  # git and uname, for what the measurement depends on
            return really_run(command, **settings)
        calls.append(command)
        if "layout.tp=2" in command:
            return subprocess.CompletedProcess(command, 1, "", "Traceback\ntorch.OutOfMemoryError: CUDA out of memory")
        if "layout.tp=4" in command:
            return subprocess.CompletedProcess(command, 2, "", "error: layout.tp=4 does not divide")
        output = Path(command[command.index("--output") + 1])
        output.mkdir(parents=True)
        values = {"tokens_per_s_per_gpu": float(len(calls)), "peak_memory_bytes": 2**30, "padding_share": 0.0}
        (output / f"{command[4]}.json").write_text(json.dumps(values))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sweep_module.subprocess, "run", run)
    monkeypatch.setattr(sweep_module.shutil, "which", lambda _: None)  # no nvidia-smi among the calls
    return calls


def test_a_sweep_records_failures_and_goes_on_where_it_stopped(tmp_path: Path, measured: list[list[str]]) -> None:
    recipe(tmp_path)
    config, axes = tmp_path / "recipe.yaml", ["layout.tp=1,2,4"]
    results = sweep(config, [], axes, tmp_path, what="throughput", options=["--synthetic"])
    assert [r.get("failed") for r in results] == [None, "out of memory", "error: layout.tp=4 does not divide"]
    assert sweep_report(results).splitlines()[2] == "| layout.tp=1 | 1.0 | 1.00 |"
    assert sweep(config, [], axes, tmp_path, what="throughput", options=["--synthetic"]) == results
    assert len(measured) == 3
    assert grid(["a=1,2", "b=3"]) == [("a=1", "b=3"), ("a=2", "b=3")]
    with pytest.raises(UserError, match="expected key=value"):
        grid(["tp"])


def test_a_measurement_is_kept_under_all_that_it_depends_on(
    tmp_path: Path, measured: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe(tmp_path)
    config = tmp_path / "recipe.yaml"

    def speed(overrides: Sequence[str] = (), what: str = "throughput", options: Sequence[str] = ()) -> float:
        (row,) = sweep(config, list(overrides), ["seed=1"], tmp_path, what=what, options=list(options))
        assert row["settings"] == "seed=1"
        return row["tokens_per_s_per_gpu"]

    assert speed() == speed() == 1
    assert speed(what="scoring") == 2
    assert speed(options=["--steps", "5"]) == 3
    assert speed(overrides=["base.sequence_length=32"]) == 4
    recipe(tmp_path, base={**RECIPE["base"], "global_batch_size": 4})
    assert speed() == 5
    facts = environment_facts(torch.device("cpu"))
    changed = {**facts, "packages": {**facts["packages"], "torch": "9.0"}}
    with monkeypatch.context() as other:
        other.setattr(sweep_module, "environment_facts", lambda _: changed)
        assert speed() == 6
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("1")
    with monkeypatch.context() as other:
        other.setattr(sweep_module, "PACKAGE", package)
        assert speed() == 7
        (package / "a.py").write_text("2")
        assert speed() == 8
    assert speed() == 5
    assert speed(what="scoring", overrides=[]) == 9  # of the changed recipe
