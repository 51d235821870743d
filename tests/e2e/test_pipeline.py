"""The whole recipe on a very small invented world: from nothing to the report, again, changed, broken, interrupted."""

import json
import signal
import time
from pathlib import Path

import pytest
from tiny_run import SHAPE, medllm, run_medllm, small_recipe, write_recipe


def stages(run_dir: Path) -> dict[str, tuple[str, float]]:
    records = {path.stem: json.loads(path.read_text()) for path in (run_dir / "stages").glob("*.json")}
    return {name: (record["key"], record["finished_at"]) for name, record in records.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: its recipe, its directory and what it printed."""
    directory = tmp_path_factory.mktemp("pipeline")
    path = write_recipe(small_recipe(directory / "run"), directory / "recipe.yaml")
    status, output = run_medllm("pipeline", path, timeout_s=500)
    assert status == 0, output
    return path, directory / "run", output


def test_the_run_ends_in_a_table_a_report_and_a_model(finished):
    _, run_dir, output = finished
    summary = json.loads((run_dir / "summary.json").read_text())
    assert set(summary["models"]) == {"base", "cpt", "rpo"}
    for model in summary["models"].values():
        for mode in ("answer_only", "explained"):
            assert model[mode]["n"] == 12
            low, high = model[mode]["ci95"]
            assert 0 <= low <= model[mode]["accuracy"] <= high <= 1
        expected = model["explained"]["accuracy"] - model["answer_only"]["accuracy"]
        assert model["gap"] == pytest.approx(expected)
    assert (run_dir / "report.html").stat().st_size > 10_000
    assert "report.html" in output
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run_dir / "hf")
    assert model.config.num_hidden_layers == SHAPE["num_layers"]


def test_again_it_skips_everything(finished):
    path, run_dir, _ = finished
    before = stages(run_dir)
    started = time.monotonic()
    status, output = run_medllm("pipeline", path)
    assert status == 0 and time.monotonic() - started < 20
    assert stages(run_dir) == before
    assert output.count("done before") == len(before)


def test_a_changed_setting_redoes_what_depends_on_it_and_nothing_else(finished):
    path, run_dir, _ = finished
    before = stages(run_dir)
    status, output = run_medllm("pipeline", path, "rpo.optimizer.lr=1e-4")
    assert status == 0, output
    after = stages(run_dir)
    assert {name for name in after if after[name] != before[name]} == {"rpo", "eval-rpo", "export", "report"}


def test_a_failing_stage_names_its_log(finished, tmp_path):
    _, run_dir, _ = finished
    broken = write_recipe(small_recipe(run_dir, tokenizer=str(tmp_path)), tmp_path / "broken.yaml")
    status, output = run_medllm("pipeline", broken)
    assert status == 2
    assert "stage base failed" in output and "base.log" in output
    assert f"{tmp_path}/tokenizer.json: no such file" in output
    assert "Traceback" not in output


def test_interrupted_in_training_it_goes_on(tmp_path):
    settings = small_recipe(tmp_path / "run")
    settings["base"] |= {"train_tokens": 60 * 512, "checkpoint": {"every_steps": 10}}
    settings |= {"cpt": None, "pairs": None, "rpo": None, "eval": None}
    path = write_recipe(settings, tmp_path / "recipe.yaml")
    process = medllm("pipeline", path)
    metrics = tmp_path / "run" / "base" / "metrics.jsonl"
    while process.poll() is None and not metrics.is_file():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "run the same command again" in output
    status, output = run_medllm("pipeline", path)
    assert status == 0, output
    log = (tmp_path / "run" / "logs" / "base.log").read_text()
    assert "resuming from" in log
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if '"loss"' in line]
    assert steps == list(range(1, 61))
