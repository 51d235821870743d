"""Held-out questions in preference training: training goes up while validation turns, and the best is what is left."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file

from megatron_medllm.checkpoint.convert import export_checkpoint
from megatron_medllm.config.cluster import REQUEUE_EXIT_CODE
from megatron_medllm.errors import UserError
from megatron_medllm.storage import read_json, read_jsonl
from megatron_medllm.train.guard import LossGuard
from megatron_medllm.train.loop import train
from megatron_medllm.train.scoring import score
from tests.worlds.pairs import random_pairs, rpo_settings, write_model, write_pairs
from tests.worlds.run import REPOSITORY, cpt_settings, metrics, run_config, write_recipe

VALIDATED = [3 * i for i in range(11)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Bitwise comparisons with subprocesses need the same number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and two pairs to each of 24 questions with nothing to generalise: their words are random."""
    directory = tmp_path_factory.mktemp("best")
    write_model(directory / "hf", layers=2)
    both = zip(random_pairs(24, seed=1), random_pairs(24, seed=2), strict=True)
    write_pairs(directory / "pairs.jsonl", [p | {"problem_id": f"q{i}"} for i, two in enumerate(both) for p in two])
    score(run_config(settings(directory, directory)))
    return directory


def settings(place: Path, run_dir: Path, *, checkpoint: dict | None = None, **rpo) -> dict:
    """30 steps of 12 pairs; with 9 questions of 24 held out an epoch is 30 pairs."""
    training = {
        "epochs": 12,
        "micro_batch_size": 8,
        "global_batch_size": 12,
        "validation_share": 0.3,
        "validate_every_steps": 3,
        "reference": str(place / "reference"),
        "optimizer": {"lr": 3e-3, "warmup_ratio": 0.0, "schedule": "constant"},
        "checkpoint": {"best": "validation_loss", "keep": 1} | (checkpoint or {}),
    }
    return rpo_settings(place / "hf", place / "pairs.jsonl", run_dir, **training | rpo)


@pytest.fixture(scope="module")
def overfitted(place: Path) -> Path:
    assert train(run_config(settings(place, place / "whole"))) == 0
    return place / "whole" / "rpo"


def rows_of(stage_dir: Path) -> list[dict]:
    return list(read_jsonl(stage_dir / "metrics.jsonl"))


def kept(stage_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (stage_dir / "checkpoints").iterdir())


def best_of(stage_dir: Path) -> int:
    values = {row["step"]: row["validation_loss"] for row in rows_of(stage_dir) if "validation_loss" in row}
    values.pop(0)
    return min(values, key=values.__getitem__)


def same_run(stage_dir: Path, expected: Path) -> None:
    """The numbers, what was used, what is left on the disk and the model, bit for bit."""
    names = ("step", "loss", "grad_norm", "validation_loss", "validation_accuracy")
    ours, theirs = ([[row.get(name) for name in names] for row in rows_of(path)] for path in (stage_dir, expected))
    assert ours == theirs
    assert kept(stage_dir) == kept(expected)
    best = f"checkpoints/step-{best_of(expected):08d}"
    for name in ("ledger.jsonl", "exported.json", "hf/model.safetensors", f"{best}/state.json", f"{best}/digests.json"):
        assert (stage_dir / name).read_bytes() == (expected / name).read_bytes(), name


def test_training_goes_up_while_validation_turns_and_the_best_is_exported(overfitted: Path, tmp_path: Path) -> None:
    assert metrics(overfitted, "accuracy")[-1] == 1.0
    losses, validation = metrics(overfitted), metrics(overfitted, "validation_loss")
    best = best_of(overfitted)
    assert losses[-1] < 0.5 * losses[0]
    assert 0 < best < 30 and validation[-1] > validation[0] > validation[best // 3]
    assert [row["step"] for row in rows_of(overfitted) if "validation_loss" in row] == VALIDATED
    assert kept(overfitted) == [best, 30]
    exported = read_json(overfitted / "exported.json")
    assert exported == {
        "step": best, "ended": 30, "metric": "validation_loss", "value": validation[best // 3]
    }  # fmt: skip
    own = load_file(overfitted / "hf" / "model.safetensors")
    for step, is_same in ((best, True), (30, False)):
        export_checkpoint(overfitted / "checkpoints" / f"step-{step:08d}", tmp_path / str(step))
        weights = load_file(tmp_path / str(step) / "model.safetensors")
        assert all(torch.equal(own[name], weights[name]) for name in own) == is_same


def test_before_the_first_step_the_held_out_pairs_have_the_references_numbers(place: Path, overfitted: Path) -> None:
    held_out = read_json(overfitted / "pairs-report.json")["held_out"]
    table = parquet.read_table(place / "reference" / "part-00000.parquet").to_pylist()
    rows = [row for row in table if row["row"] in held_out["rows"]]
    first = rows_of(overfitted)[0]
    assert first["step"] == 0 and "loss" not in first
    assert first["validation_pairs"] == len(rows) == held_out["pairs"] == 18
    for side in ("chosen", "rejected"):
        mean = sum(row[f"{side}_logprob"] for row in rows) / len(rows)
        per_token = sum(row[f"{side}_logprob"] / row[f"{side}_tokens"] for row in rows) / len(rows)
        assert first[f"validation_{side}_logprob"] == pytest.approx(mean, abs=1e-4)
        assert first[f"validation_{side}_logprob_per_token"] == pytest.approx(per_token, abs=1e-4)
    assert abs(first["validation_margin"]) < 1e-4
    assert first["validation_loss"] == pytest.approx(0.693147 + first["validation_nll"], abs=1e-5)


def test_no_pair_of_a_held_out_question_trains(overfitted: Path) -> None:
    before, *steps = read_jsonl(overfitted / "ledger.jsonl")
    held_out = set(before["held_out"])
    assert before["step"] == 0 and sorted(held_out) == read_json(overfitted / "pairs-report.json")["held_out"]["rows"]
    assert {row // 2 for row in held_out} == {row // 2 for row in range(48)} - {
        row // 2 for step in steps for row in step["consumed"]
    }
    assert {row for step in steps for row in step["consumed"]} == set(range(48)) - held_out


def test_killed_again_and_again_it_is_the_same_best(place: Path, tmp_path: Path) -> None:
    checkpoint = {"every_steps": 4, "keep": 2, "async_save": True}
    recipes = [
        write_recipe(settings(place, tmp_path / name, checkpoint=checkpoint), tmp_path / f"{name}.yaml")
        for name in ("whole", "killed")
    ]
    command = [sys.executable, "-W", "ignore", REPOSITORY / "tests" / "e2e" / "killed_runs.py", *recipes, "6"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "kills 6"
    same_run(tmp_path / "killed" / "rpo", tmp_path / "whole" / "rpo")


def test_stopped_after_every_step_it_is_the_same_best(place: Path, tmp_path: Path, monkeypatch) -> None:
    """A stop saves without validating; whoever resumes there validates first, once."""
    fewer = {"epochs": 4.8, "guard": {}}
    assert train(run_config(settings(place, tmp_path / "whole", **fewer))) == 0
    stopped = run_config(settings(place, tmp_path / "stopped", **fewer))
    monkeypatch.setenv("MEDLLM_WALLTIME_S", "0.001")
    statuses = []
    while not statuses or statuses[-1] == REQUEUE_EXIT_CODE:
        statuses.append(train(stopped))
        assert len(statuses) <= 12
    assert statuses == [REQUEUE_EXIT_CODE] * 11 + [0]
    ours, theirs = ([(row["step"], row.get("validation_loss")) for row in rows_of(tmp_path / name / "rpo")]
                    for name in ("stopped", "whole"))  # fmt: skip
    assert ours == theirs
    for name in ("exported.json", "hf/model.safetensors"):
        files = [(tmp_path / run / "rpo" / name).read_bytes() for run in ("stopped", "whole")]
        assert files[0] == files[1]


def test_it_stops_when_nothing_gets_better_and_stays_stopped(place: Path, tmp_path: Path, overfitted: Path) -> None:
    run = run_config(settings(place, tmp_path, guard={"patience": 2}))
    best = best_of(overfitted)
    for _ in range(2):
        assert train(run) == 0
        assert [row["step"] for row in rows_of(tmp_path / "rpo") if "loss" in row][-1] == best + 6
        assert kept(tmp_path / "rpo") == [best, best + 6]
        assert read_json(tmp_path / "rpo" / "exported.json")["ended"] == best + 6
        weights = [(path / "hf" / "model.safetensors").read_bytes() for path in (tmp_path / "rpo", overfitted)]
        assert weights[0] == weights[1]


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_keeps_the_best_that_is_there(
    place: Path, tmp_path: Path, overfitted: Path, monkeypatch, in_background: bool
) -> None:
    """Nothing but the first save and the last finds room: the first is the best of the two."""
    usage, asked = shutil.disk_usage, []

    def full_in_between(path: Path):
        asked.append(path)
        step = json.loads(Path(tmp_path / "rpo" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        return usage(path) if step in (3, 30) else namedtuple("Usage", "free")(0)

    monkeypatch.setattr(shutil, "disk_usage", full_in_between)
    run = run_config(settings(place, tmp_path, checkpoint={"every_steps": 5, "async_save": in_background}))
    assert train(run) == 0
    assert len(asked) > 6
    assert kept(tmp_path / "rpo") == [3, 30]
    assert read_json(tmp_path / "rpo" / "exported.json")["step"] == 3 != best_of(overfitted)


def test_a_roll_back_keeps_the_best(place: Path, tmp_path: Path, overfitted: Path, monkeypatch, caplog) -> None:
    """Back at step 12, which was validated before its save, nothing is validated twice or forgotten."""
    monkeypatch.setattr(LossGuard, "problem", lambda self, step, loss: "made up" if step in (13, 14) else None)
    run = run_config(settings(place, tmp_path, checkpoint={"every_steps": 4}, guard={"roll_back_after": 2}))
    assert train(run) == 0
    assert "rolling back to" in caplog.text and "step-00000012" in caplog.text
    assert [row["step"] for row in rows_of(tmp_path / "rpo") if "validation_loss" in row] == VALIDATED
    assert kept(tmp_path / "rpo") == [best_of(overfitted), 30]
    weights = [(path / "hf" / "model.safetensors").read_bytes() for path in (tmp_path / "rpo", overfitted)]
    assert weights[0] == weights[1]


def test_a_damaged_best_is_passed_over(place: Path, tmp_path: Path, overfitted: Path, caplog) -> None:
    shutil.copytree(overfitted, tmp_path / "rpo")
    best = best_of(overfitted)
    state = tmp_path / "rpo" / "checkpoints" / f"step-{best:08d}" / "state.json"
    state.write_text(state.read_text() + " ")
    assert train(run_config(settings(place, tmp_path))) == 0
    assert "state.json does not match its digest" in caplog.text
    assert read_json(tmp_path / "rpo" / "exported.json")["step"] == 30


def test_a_damaged_newest_does_not_crowd_out_what_is_saved_after_it(
    place: Path, tmp_path: Path, overfitted: Path, monkeypatch
) -> None:
    shutil.copytree(overfitted, tmp_path / "rpo")
    (tmp_path / "rpo" / "checkpoints" / "step-00000030" / "state.json").write_text("{}")
    monkeypatch.setenv("MEDLLM_WALLTIME_S", "0.001")
    best = best_of(overfitted)
    for step in (best + 1, best + 2):
        assert train(run_config(settings(place, tmp_path))) == REQUEUE_EXIT_CODE
        assert kept(tmp_path / "rpo") == [best, step, 30]


def test_other_questions_held_out_are_another_run(place: Path, tmp_path: Path, overfitted: Path) -> None:
    shutil.copytree(overfitted, tmp_path / "rpo")
    with pytest.raises(UserError, match="checkpoint of another run: held_out"):
        train(run_config(settings(place, tmp_path, validation_share=0.2)))
    with pytest.raises(UserError, match=r"rpo\.validation_share holds nothing out"):
        train(run_config(settings(place, tmp_path / "other", validation_share=0.0)))
    with pytest.raises(UserError, match=r"checkpoint\.best=validation_rejected_logprob: this run can compare"):
        checkpoint = {"best": "validation_rejected_logprob"}
        train(run_config(settings(place, tmp_path / "other", checkpoint=checkpoint)))


def test_continued_pretraining_validates_before_step_1_and_exports_the_best(tiny_world: Path, tmp_path: Path) -> None:
    cpt = {"validate_every_steps": 2, "checkpoint": {"best": "validation_loss_medical", "keep": 1}, "epochs": None}
    cpt |= {"optimizer": {"lr": 0.1, "warmup_ratio": 0.0, "schedule": "constant"}}
    assert train(run_config(cpt_settings(tiny_world, tmp_path, cpt=cpt))) == 0
    rows = {row["step"]: row["validation_loss_medical"] for row in rows_of(tmp_path / "cpt") if "loss" not in row}
    assert list(rows) == [0, 2, 4, 6]
    exported = read_json(tmp_path / "cpt" / "exported.json")
    assert exported["step"] == min((2, 4, 6), key=rows.__getitem__)
    assert train(run_config(cpt_settings(tiny_world, tmp_path / "off", cpt={"validate_at_start": False}))) == 0
    assert [row["step"] for row in rows_of(tmp_path / "off" / "cpt") if "validation_loss" in row] == [6]
