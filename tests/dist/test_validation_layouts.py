"""Held-out pairs validated in every layout: the numbers, the best step and the ledger of one process."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_medllm.storage import read_json, read_jsonl
from megatron_medllm.train.loop import train
from megatron_medllm.train.scoring import score
from tests.worlds.pairs import random_pairs, rpo_settings, write_model, write_pairs
from tests.worlds.ranks import run_ranks
from tests.worlds.run import run_config

LAYOUTS = {"dp": {"dp": 2}, "cp": {"cp": 2}, "sp": {"tp": 2, "sp": True}, "vpp": {"pp": 2, "vpp": 2}}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every step of an epoch is validated, in every layout."""
    place = tmp_path_factory.mktemp("validation_layouts")
    write_model(place / "hf")
    pairs = [pair | {"problem_id": i // 2} for i, pair in enumerate(random_pairs(30))]
    write_pairs(place / "pairs.jsonl", pairs)

    def settings(name: str, layout: dict[str, Any]) -> dict:
        rpo = {
            "reference": str(place / "reference"),
            "validation_share": 0.3,
            "validate_every_steps": 1,
            "global_batch_size": 4,
            "optimizer": {"lr": 3e-3, "warmup_ratio": 0.0, "schedule": "constant"},
            "checkpoint": {"best": "validation_loss", "keep": 1},
        }
        return rpo_settings(place / "hf", place / "pairs.jsonl", place / name, layout=layout, **rpo)

    score(run_config(settings("one", {})))
    assert train(run_config(settings("one", {}))) == 0
    jobs = [{"do": "train", "settings": settings(name, layout)} for name, layout in LAYOUTS.items()]
    (place / "jobs.json").write_text(json.dumps(jobs))
    run_ranks(2, "tests.dist.rpo_ranks", str(place / "jobs.json"), timeout_s=300, runtimes=len(jobs))
    return place


@pytest.mark.parametrize("name", LAYOUTS)
def test_validation_is_that_of_one_process(directory: Path, name: str) -> None:
    one, two = (
        [row for row in read_jsonl(directory / run / "rpo" / "metrics.jsonl") if "validation_loss" in row]
        for run in ("one", name)
    )
    assert [row["step"] for row in two] == [row["step"] for row in one]
    assert len(one) > 4
    for ours, theirs in zip(two, one, strict=True):
        assert ours["validation_pairs"] == theirs["validation_pairs"] > 4
        for key in ("loss", "nll", "chosen_logprob_per_token", "rejected_logprob_per_token", "margin"):
            assert ours[f"validation_{key}"] == pytest.approx(theirs[f"validation_{key}"], rel=1e-5, abs=1e-4), key
    ledgers, reports = (
        [(directory / run / "rpo" / file).read_bytes() for run in ("one", name)]
        for file in ("ledger.jsonl", "pairs-report.json")
    )
    assert ledgers[0] == ledgers[1] and reports[0] == reports[1]
    steps = [read_json(directory / run / "rpo" / "exported.json")["step"] for run in ("one", name)]
    assert steps[0] == steps[1]
