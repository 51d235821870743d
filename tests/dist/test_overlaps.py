"""Overlapped data parallelism over gloo: every checkpoint and export is that of the run without overlaps, bitwise."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from tests.worlds.pairs import random_pairs, rpo_settings, write_model, write_pairs
from tests.worlds.shapes import SHAPE
from tests.worlds.run import cpt_settings, medllm, metrics, run_medllm, write_recipe

from tests.worlds.ranks import run_ranks

OFF = {"overlap_grad_reduce": "off", "overlap_param_gather": "off"}
ON = {"overlap_grad_reduce": "on", "overlap_param_gather": "on"}
# Small buckets cut the optimizer's parts elsewhere, so the gradient norm is summed in another order.
SMALL = {"bucket_size": 3000, "overlap_grad_reduce": "on"}
SAVES = {"every_steps": 2, "keep": 10, "async_save": True}
STEPS = ("step-00000002", "step-00000004", "step-00000006")


def run_jobs(world_size: int, directory: Path, jobs: list[dict[str, Any]]) -> None:
    (directory / "jobs.json").write_text(json.dumps(jobs))
    arguments = ("tests.dist.overlap_ranks", str(directory / "jobs.json"))
    run_ranks(world_size, *arguments, timeout_s=400, runtimes=len(jobs))


def cpt_job(world: Path, directory: Path, name: str, layout: dict, *, stale: bool = False, **cpt: Any) -> dict:
    cpt = {"checkpoint": SAVES, "validate_every_steps": 3} | cpt
    return {"name": name, "stale": stale, "settings": cpt_settings(world, directory / name, layout=layout, cpt=cpt)}


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by key."""
    reader = dcp.FileSystemReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in stored.items()
        if hasattr(entry, "size")
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def different(found: Path, expected: Path) -> Iterator[str]:
    """Names of what differs between two stage directories in checkpoints, export and losses."""
    for step in STEPS:
        ours, theirs = (tensors(stage / "checkpoints" / step) for stage in (found, expected))
        assert ours.keys() == theirs.keys() and any("exp_avg" in key for key in ours)
        yield from (f"{step}/{key}" for key in ours if not torch.equal(ours[key], theirs[key]))
    ours, theirs = (load_file(stage / "hf" / "model.safetensors") for stage in (found, expected))
    assert ours.keys() == theirs.keys()
    yield from (f"hf/{key}" for key in ours if not torch.equal(ours[key], theirs[key]))
    for name in ("loss", "grad_norm"):
        if metrics(found, name) != metrics(expected, name):
            yield name


def assert_same(directory: Path, pairs: dict[str, str], stage: str = "cpt") -> None:
    for found, expected in pairs.items():
        wrong = list(different(directory / found / stage, directory / expected / stage))
        assert not wrong, f"{found} is not {expected}: {wrong[:5]} and {max(len(wrong) - 5, 0)} more"


def test_two_replicas(tiny_world: Path, tmp_path: Path):
    lora = {"adapter": {"rank": 4, "dropout": 0.1}}
    dp2 = {"dp": 2}
    untied = [
        cpt_job(tiny_world, tmp_path, "untied", dp2 | SMALL | {"overlap_param_gather": "off"}),
        cpt_job(tiny_world, tmp_path, "untied-on", dp2 | SMALL | ON),
    ]
    for job in untied:  # the head has a bucket of its own
        job["settings"]["model"]["shape"] = SHAPE | {"tie_embeddings": False}
    run_jobs(
        2,
        tmp_path,
        [
            *untied,
            cpt_job(tiny_world, tmp_path, "off", dp2 | OFF),
            cpt_job(tiny_world, tmp_path, "on", dp2 | ON),
            cpt_job(tiny_world, tmp_path, "stale", dp2 | ON, stale=True),
            cpt_job(tiny_world, tmp_path, "buckets", dp2 | SMALL | {"overlap_param_gather": "off"}),
            cpt_job(tiny_world, tmp_path, "buckets-on", dp2 | SMALL | ON),
            cpt_job(tiny_world, tmp_path, "lora-off", dp2 | OFF, **lora),
            cpt_job(tiny_world, tmp_path, "lora-on", dp2 | ON, **lora),
            cpt_job(tiny_world, tmp_path, "plain-off", dp2 | OFF | {"distributed_optimizer": False}),
            cpt_job(
                tiny_world, tmp_path, "plain-on", dp2 | {"overlap_grad_reduce": "on", "distributed_optimizer": False}
            ),
        ],
    )
    assert_same(tmp_path, {"on": "off", "buckets-on": "buckets", "lora-on": "lora-off", "plain-on": "plain-off"})
    assert_same(tmp_path, {"untied-on": "untied"})
    stale = list(different(tmp_path / "stale" / "cpt", tmp_path / "off" / "cpt"))
    assert len(stale) > 20 and not any(key in stale for key in ("loss", "grad_norm"))
    assert metrics(tmp_path / "buckets" / "cpt") == pytest.approx(metrics(tmp_path / "off" / "cpt"), rel=1e-6)


def test_four_ranks(tiny_world: Path, tmp_path: Path):
    layouts: dict[str, dict] = {
        "tp": {"dp": 2, "tp": 2, "sp": True},
        "pp": {"dp": 2, "pp": 2},  # tied embeddings: the last stage's copy has a bucket of its own
        "vpp": {"dp": 2, "pp": 2, "vpp": 2},
        "cp": {"dp": 2, "cp": 2},
    }
    lora = {"adapter": {"rank": 4}}  # its tied embedding is frozen on both stages
    jobs = [
        cpt_job(tiny_world, tmp_path, "pp-lora", layouts["pp"] | SMALL | {"overlap_param_gather": "off"}, **lora),
        cpt_job(tiny_world, tmp_path, "pp-lora-on", layouts["pp"] | SMALL | ON, **lora),
    ]
    pairs = {"pp-lora-on": "pp-lora"}
    for name, layout in layouts.items():
        if name == "tp":
            jobs += [cpt_job(tiny_world, tmp_path, f"{name}-off", layout | OFF)]
            jobs += [cpt_job(tiny_world, tmp_path, f"{name}-on", layout | ON)]
            pairs[f"{name}-on"] = f"{name}-off"
        jobs += [cpt_job(tiny_world, tmp_path, f"{name}-buckets", layout | SMALL | {"overlap_param_gather": "off"})]
        jobs += [cpt_job(tiny_world, tmp_path, f"{name}-buckets-on", layout | SMALL | ON)]
        pairs[f"{name}-buckets-on"] = f"{name}-buckets"
    run_jobs(4, tmp_path, jobs)
    assert_same(tmp_path, pairs)


def test_preferences(tmp_path: Path):
    model = write_model(tmp_path / "hf")
    pairs = write_pairs(tmp_path / "pairs.jsonl", random_pairs(48))
    dp2_tp2 = {"dp": 2, "tp": 2}

    def job(name: str, layout: dict, **rpo: Any) -> dict:
        settings = rpo_settings(model, pairs, tmp_path / name, layout=dp2_tp2 | layout, checkpoint=SAVES, **rpo)
        settings["rpo"]["reference"] = str(tmp_path / "reference")
        return {"name": name, "settings": settings}

    lora = {"adapter": {"rank": 4}}
    run_jobs(
        4,
        tmp_path,
        [
            job("off", OFF) | {"score": True},
            job("off", OFF),
            job("on", ON),
            job("on", ON) | {"name": "stale", "stale": True, "settings": job("stale", ON)["settings"]},
            job("buckets", SMALL | {"overlap_param_gather": "off"}),
            job("buckets-on", SMALL | ON),
            job("lora-off", OFF, **lora),
            job("lora-on", ON, **lora),
        ],
    )
    assert_same(tmp_path, {"on": "off", "buckets-on": "buckets", "lora-on": "lora-off"}, "rpo")
    stale = list(different(tmp_path / "stale" / "rpo", tmp_path / "off" / "rpo"))
    assert any(name.startswith("hf/") for name in stale)  # nothing is validated before RPO's export


def test_ranks_killed_together_go_on_bitwise(tiny_world: Path, tmp_path: Path):
    recipes = {
        name: write_recipe(
            cpt_job(tiny_world, tmp_path, name, {"dp": 2} | SMALL | ON)["settings"], tmp_path / f"{name}.yaml"
        )
        for name in ("whole", "killed")
    }
    stage = tmp_path / "killed" / "cpt"
    for step in (3, 5):
        process = medllm("train", recipes["killed"], start_new_session=True)
        while process.poll() is None:
            if (stage / "metrics.jsonl").is_file() and len(metrics(stage)) >= step:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            time.sleep(0.005)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    for recipe in recipes.values():
        status, output = run_medllm("train", recipe)
        assert status == 0, output
    assert_same(tmp_path, {"killed": "whole"})
