"""The whole recipe on a very small invented world: from nothing to the report, again, changed, broken, interrupted."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.worlds.run import cpt_settings, medllm, run_medllm, small_recipe, write_recipe
from tests.worlds.shapes import SHAPE


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
    status, output = run_medllm("pipeline", path)
    assert status == 0
    assert stages(run_dir) == before  # with the times at which they finished: no stage ran
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


def interruptible(directory: Path, *, steps: int = 60) -> Path:
    """A recipe that trains for a while."""
    settings = small_recipe(directory / "run")
    settings["base"] |= {"train_tokens": steps * 512, "checkpoint": {"every_steps": 10}}
    settings |= {"cpt": None, "pairs": None, "rpo": None, "eval": None}
    return write_recipe(settings, directory / "recipe.yaml")


def hear_signals() -> None:
    """In a child: the terminal's signals, which a test run in the background (nohup, &) would inherit as ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def wait_for(path: Path, process) -> None:
    while process.poll() is None and not path.is_file():
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_interrupted_in_training_it_goes_on(tmp_path, number):
    path, metrics = interruptible(tmp_path), tmp_path / "run" / "base" / "metrics.jsonl"
    process = medllm("pipeline", path, preexec_fn=hear_signals)
    wait_for(metrics, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number, output
    if number != signal.SIGHUP:  # then there is no terminal to tell
        assert "run the same command again" in output
    assert "Traceback" not in output and not (tmp_path / "run" / "owner.json").exists()
    status, output = run_medllm("pipeline", path)
    assert status == 0, output
    log = (tmp_path / "run" / "logs" / "base.log").read_text()
    assert "resuming from" in log
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if '"loss"' in line]
    assert steps == list(range(1, 61))


def test_a_second_pipeline_is_refused_by_name(tmp_path):
    path = interruptible(tmp_path, steps=5000)
    first = medllm("pipeline", path)
    wait_for(tmp_path / "run" / "owner.json", first)
    try:
        status, output = run_medllm("pipeline", path)
        assert status == 2 and "Traceback" not in output
        assert f"medllm pipeline (process {first.pid} on " in output and first.poll() is None
    finally:
        first.terminate()
        first.communicate(timeout=120)
    assert first.returncode == 128 + signal.SIGTERM


def test_a_killed_pipelines_training_is_ended_before_the_next_one_begins(tmp_path):
    path, metrics = interruptible(tmp_path), tmp_path / "run" / "base" / "metrics.jsonl"
    process = medllm("pipeline", path)
    wait_for(metrics, process)
    process.kill()
    process.wait()
    status, output = run_medllm("pipeline", path)
    assert status == 0, output
    assert "stage base (process" in output and "has outlived its pipeline" in output
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if '"loss"' in line]
    assert steps == list(range(1, 61))  # one trainer at a time wrote them


def test_a_changed_exam_is_sat_again_and_the_training_stays(tiny_world, exam_dir, tmp_path):
    """The inputs of a real run: an exam, a model and a corpus that no stage makes."""
    exam = shutil.copytree(exam_dir, tmp_path / "exam")
    settings = cpt_settings(tiny_world, tmp_path / "run")
    settings["cpt"] |= {"train_tokens": 2 * 8 * 64}
    settings["eval"] = {"exam": {"name": "mine", "data": [str(exam)]}, "engine": {"dtype": "float32"}}
    settings["eval"]["decoding"] = {"max_new_tokens": {"answer_only": 2, "explained": 4}}
    settings["base"] = settings["cpt"]  # from random weights; the base is examined too
    settings.pop("cpt")
    path = write_recipe(settings, tmp_path / "recipe.yaml")
    status, output = run_medllm("pipeline", path)
    assert status == 0, output
    before = stages(tmp_path / "run")
    changed = next(file for file in sorted(exam.rglob("*.jsonl")) if "fewshot" not in file.name)
    changed.write_text(changed.read_text() + "\n")
    status, output = run_medllm("pipeline", path)
    assert status == 0, output
    after = stages(tmp_path / "run")
    assert {name for name in after if after[name] != before[name]} == {"eval-base", "report"}
    assert f"eval-base: {changed} changed" in output and "report: stage eval-base was redone" in output
