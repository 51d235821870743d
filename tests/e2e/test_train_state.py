"""Training state: killed, cut short, out of disk, saved in the background, resumed with adapters, exported."""

import errno
import json
import math
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file

from megatron_medllm.bench.synthetic import write_documents
from megatron_medllm.checkpoint.convert import export_checkpoint
from megatron_medllm.checkpoint.peft_adapter import export_peft
from megatron_medllm.config.cluster import REQUEUE_EXIT_CODE
from megatron_medllm.corpus.tokenizer import describe_tokenizer
from megatron_medllm.errors import UserError
from megatron_medllm.train.loop import train
from megatron_medllm.train.state import verify_checkpoint
from tests.worlds.run import REPOSITORY, cpt_settings, metrics, run_config, write_recipe

OVERLAPS = {"overlap_grad_reduce": "on", "overlap_param_gather": "on"}


@pytest.fixture(autouse=True)
def one_thread():
    """The order of sums, and with it the last bit, depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reference(tiny_world, tmp_path_factory):
    """An uninterrupted run."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("uninterrupted")
    assert train(run_config(cpt_settings(tiny_world, directory))) == 0
    return directory / "cpt"


def same_results(stage_dir, reference):
    assert metrics(stage_dir) == metrics(reference)
    assert (stage_dir / "ledger.jsonl").read_bytes() == (reference / "ledger.jsonl").read_bytes()
    ours, theirs = (load_file(directory / "hf" / "model.safetensors") for directory in (stage_dir, reference))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_twenty_kills_change_nothing(tiny_world, tmp_path):
    settings = {
        "train_tokens": 40 * 2 * 64,
        "global_batch_size": 2,
        "validation_batches": 1,
        "checkpoint": {"every_steps": 2, "keep": 3, "async_save": True},
    }
    recipes = [
        write_recipe(cpt_settings(tiny_world, tmp_path / name, cpt=settings, layout=layout), tmp_path / f"{name}.yaml")
        for name, layout in (("whole", {}), ("killed", OVERLAPS))
    ]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", REPOSITORY / "tests" / "e2e" / "killed_runs.py", *recipes, "20"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "kills 20"
    same_results(tmp_path / "killed" / "cpt", tmp_path / "whole" / "cpt")
    left = sorted(path.name for path in (tmp_path / "killed" / "cpt" / "checkpoints").iterdir())
    assert left == ["step-00000036", "step-00000038", "step-00000040"]


def test_a_resume_without_the_distributed_optimizer_is_bitwise(tiny_world, tmp_path, caplog):
    """There the optimizer's state holds no copy of the weights: they come from the model's part of the checkpoint."""
    run = run_config(cpt_settings(tiny_world, tmp_path, layout={"distributed_optimizer": False}))
    assert train(run) == 0
    before = tmp_path / "before"
    shutil.copytree(tmp_path / "cpt", before)
    for step in (4, 6):
        shutil.rmtree(tmp_path / "cpt" / "checkpoints" / f"step-{step:08d}")
    caplog.set_level("INFO")
    assert train(run) == 0
    assert "step-00000002" in next(message for message in caplog.messages if "resuming from" in message)
    same_results(tmp_path / "cpt", before)
    assert metrics(before, "grad_norm") == metrics(tmp_path / "cpt", "grad_norm")


@pytest.mark.parametrize("distributed", [True, False])
def test_a_resume_with_bf16_moments_is_bitwise(tiny_world, tmp_path, reference, distributed):
    optimizer = {"lr": 3e-3, "warmup_ratio": 0.0, "moments_dtype": "bfloat16"}
    layout = {"distributed_optimizer": distributed}
    run = run_config(cpt_settings(tiny_world, tmp_path, cpt={"optimizer": optimizer}, layout=layout))
    assert train(run) == 0
    before = tmp_path / "before"
    shutil.copytree(tmp_path / "cpt", before)
    for step in (4, 6):
        shutil.rmtree(tmp_path / "cpt" / "checkpoints" / f"step-{step:08d}")
    assert train(run) == 0
    same_results(tmp_path / "cpt", before)
    assert metrics(before, "grad_norm") == metrics(tmp_path / "cpt", "grad_norm")
    ours, theirs = metrics(before), metrics(reference)
    assert ours != theirs  # the moments are rounded
    assert ours[-1] == pytest.approx(theirs[-1], rel=0.02)


def test_the_time_limit_stops_in_time_and_the_resume_is_bitwise(tiny_world, tmp_path, reference, monkeypatch):
    settings = cpt_settings(tiny_world, tmp_path, cpt={"checkpoint": {"every_steps": 0, "async_save": True}})
    settings["cpt"]["guard"] = {"walltime_s": 0.001}
    assert train(run_config(settings)) == REQUEUE_EXIT_CODE
    assert [path.name for path in (tmp_path / "cpt" / "checkpoints").iterdir()] == ["step-00000001"]
    settings["cpt"]["guard"] = {}
    monkeypatch.setenv("MEDLLM_WALLTIME_S", "0.001")
    assert train(run_config(settings)) == REQUEUE_EXIT_CODE
    monkeypatch.delenv("MEDLLM_WALLTIME_S")
    assert train(run_config(settings)) == 0
    same_results(tmp_path / "cpt", reference)


def test_background_saves_are_the_same_checkpoints(tiny_world, tmp_path, reference):
    checkpoint = {"every_steps": 2, "keep": 10, "async_save": True}
    assert train(run_config(cpt_settings(tiny_world, tmp_path, cpt={"checkpoint": checkpoint}))) == 0
    same_results(tmp_path / "cpt", reference)
    names = ["step-00000002", "step-00000004", "step-00000006"]
    assert sorted(path.name for path in (tmp_path / "cpt" / "checkpoints").iterdir()) == names
    for name in names:
        assert verify_checkpoint(tmp_path / "cpt" / "checkpoints" / name) is None
    # What was saved in the middle is the state of the middle: going on from there ends in the same weights.
    shutil.rmtree(tmp_path / "cpt" / "checkpoints" / "step-00000006")
    shutil.rmtree(tmp_path / "cpt" / "checkpoints" / "step-00000004")
    assert train(run_config(cpt_settings(tiny_world, tmp_path, cpt={"checkpoint": checkpoint}))) == 0
    same_results(tmp_path / "cpt", reference)


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_costs_a_checkpoint_only(tiny_world, tmp_path, reference, monkeypatch, caplog, in_background):
    """Once there is no room for the save of step 2, and once its writers fail while writing."""
    usage, asked = shutil.disk_usage, []

    def full_at_first(path):
        asked.append(path)
        return namedtuple("Usage", "free")(0) if len(asked) == 1 else usage(path)

    checkpoint = {"every_steps": 2, "keep": 10, "async_save": in_background}
    run = run_config(cpt_settings(tiny_world, tmp_path, cpt={"checkpoint": checkpoint}, layout=OVERLAPS))
    monkeypatch.setattr(shutil, "disk_usage", full_at_first)
    assert train(run) == 0
    assert "THE CHECKPOINT OF STEP 2 COULD NOT BE WRITTEN: it takes 0.00 GB, more than the disk has left" in caplog.text
    names = sorted(path.name for path in (tmp_path / "cpt" / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000006"]
    same_results(tmp_path / "cpt", reference)


@pytest.mark.parametrize("in_background", [False, True])
def test_writers_that_fail_leave_nothing_and_the_last_save_must_succeed(tiny_world, tmp_path, caplog, in_background):
    checkpoint = {"every_steps": 2, "keep": 10, "async_save": in_background}
    run = run_config(cpt_settings(tiny_world, tmp_path, cpt={"checkpoint": checkpoint}, layout=OVERLAPS))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # a write beyond fails, as on a full disk
    try:
        with pytest.raises(UserError, match="the state after step 6 could not be saved"):
            train(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for step in (2, 4, 6):
        assert f"THE CHECKPOINT OF STEP {step} COULD NOT BE WRITTEN: rank 0 on " in caplog.text
    assert caplog.text.count("__0_0.distcp: File too large") == 3
    assert list((tmp_path / "cpt" / "checkpoints").iterdir()) == []


def test_a_disk_that_is_gone_is_reported_like_a_full_one(tiny_world, tmp_path, monkeypatch, caplog):
    def gone(path):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(shutil, "disk_usage", gone)
    with pytest.raises(UserError, match="the state after step 6 could not be saved"):
        train(run_config(cpt_settings(tiny_world, tmp_path)))
    assert caplog.text.count("Stale file handle (free space unknown: Stale file handle)") == 3


def test_a_checkpoint_exports_to_the_models_weights(reference, tmp_path):
    export_checkpoint(reference / "checkpoints" / "step-00000006", tmp_path / "hf")
    exported, own = (load_file(path / "model.safetensors") for path in (tmp_path / "hf", reference / "hf"))
    assert exported.keys() == own.keys() and all(torch.equal(exported[name], own[name]) for name in own)
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


def test_adapter_runs_resume_export_and_start_from_peft(tiny_world, tmp_path, reference, caplog):
    adapter = {"rank": 4, "alpha": 8.0, "targets": ["linear_qkv", "linear_fc2"], "dropout": 0.1}

    def settings(name, **changes):  # fmt: skip
        found = cpt_settings(tiny_world, tmp_path / name, cpt={"adapter": adapter} | changes)
        return found | {"model": {"path": str(reference / "hf"), "dtype": "float32"}}

    assert train(run_config(settings("whole"))) == 0
    assert metrics(tmp_path / "whole" / "cpt")[0] < metrics(reference)[0]  # it starts from the trained base
    stopped = settings("resumed", guard={"walltime_s": 0.001})
    assert train(run_config(stopped)) == REQUEUE_EXIT_CODE
    assert train(run_config(settings("resumed"))) == 0
    same_results(tmp_path / "resumed" / "cpt", tmp_path / "whole" / "cpt")

    last = tmp_path / "whole" / "cpt" / "checkpoints" / "step-00000006"
    export_checkpoint(last, tmp_path / "merged", base_dir=reference / "hf")
    merged, own = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", tmp_path / "whole/cpt/hf"))
    assert all(torch.allclose(merged[name], own[name], atol=1e-7) for name in own)

    export_peft(last, tmp_path / "peft", base_model=str(reference / "hf"))
    adapter = {"path": str(tmp_path / "peft")}
    assert train(run_config(settings("again", train_tokens=8 * 64))) == 0
    step = json.loads((tmp_path / "again/cpt/checkpoints/step-00000001/model.json").read_text())
    assert step["adapter"]["rank"] % 4 == 0 and step["adapter"]["path"] is None
    assert metrics(tmp_path / "again" / "cpt")[0] < metrics(tmp_path / "whole" / "cpt")[0]
    with pytest.raises(UserError, match="checkpoint of another run: adapter"):
        adapter = {"rank": 8}
        train(run_config(settings("whole")))


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_other_optimizers_state_is_refused_with_what_to_do(tiny_world, tmp_path, before, dtype):
    def settings(distributed):
        found = cpt_settings(tiny_world, tmp_path, cpt={"train_tokens": 8 * 64})
        found["layout"] = {"distributed_optimizer": distributed}
        found["model"]["dtype"] = dtype
        return found

    assert train(run_config(settings(before))) == 0
    written = "with" if before else "without"
    expected = (
        rf"step-00000001: .* {written} the distributed optimizer.* layout.distributed_optimizer={str(before).lower()}"
    )
    with pytest.raises(UserError, match=expected):
        train(run_config(settings(not before)))
    assert train(run_config(settings(before))) == 0


def test_data_in_another_order_or_tokenizer_are_refused(tiny_world, tmp_path):
    assert train(run_config(cpt_settings(tiny_world, tmp_path, cpt={"train_tokens": 8 * 64}))) == 0
    with pytest.raises(UserError, match="checkpoint of another run: seed is 3, here 4"):
        train(run_config(cpt_settings(tiny_world, tmp_path, cpt={"train_tokens": 8 * 64}, seed=4)))
    with pytest.raises(UserError, match="checkpoint of another run: rows"):
        smaller = {"train_tokens": 4 * 64, "global_batch_size": 4}
        train(run_config(cpt_settings(tiny_world, tmp_path, cpt=smaller)))
    other = tmp_path / "tokenizer"
    shutil.copytree(tiny_world / "world" / "tokenizer", other)
    spec = json.loads((other / "tokenizer.json").read_text())
    spec["model"]["merges"] = spec["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="was built with another tokenizer than"):
        train(run_config(cpt_settings(tiny_world, tmp_path / "other", tokenizer=str(other))))


def test_rolling_back_needs_a_checkpoint(tiny_world, tmp_path):
    settings = cpt_settings(tiny_world, tmp_path, cpt={"checkpoint": {"every_steps": 0}})
    settings["cpt"]["optimizer"]["lr"] = 1e30
    settings["cpt"]["guard"] = {"roll_back_after": 2}
    with pytest.raises(UserError, match="there is no checkpoint to go back to"):
        train(run_config(settings))


def test_a_small_corpus_is_learned_by_heart(tiny_world, tmp_path):
    """Random documents, which nothing but memory can predict: the loss starts at log(1280) = 7.15."""
    write_documents(tmp_path / "corpus", tokens=8 * 65, document_length=32, vocab_size=1280, seed=0)
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    manifest["tokenizer"]["digest"] = describe_tokenizer(str(tiny_world / "world" / "tokenizer")).digest
    (tmp_path / "corpus" / "manifest.json").write_text(json.dumps(manifest))
    cpt = {
        "data": [{"path": str(tmp_path / "corpus")}],
        "train_tokens": 100 * 8 * 64,
        "micro_batch_size": 8,
        "loss_after": [],
        "optimizer": {"lr": 1e-2},
        "checkpoint": {},
    }
    assert train(run_config(cpt_settings(tiny_world, tmp_path, cpt=cpt))) == 0
    losses = metrics(tmp_path / "cpt")
    assert losses[0] > 7 and losses[-1] < 0.5


def test_perplexity_is_reported_per_source(reference):
    last = json.loads((reference / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["validation_loss_medical"] == last["validation_loss"]
    assert last["validation_perplexity_medical"] == pytest.approx(math.exp(last["validation_loss"]))


def test_other_files_among_the_checkpoints_are_left_alone(tiny_world, tmp_path, caplog):
    settings = cpt_settings(tiny_world, tmp_path, cpt={"checkpoint": {"every_steps": 2, "keep": 1}})
    checkpoints = tmp_path / "cpt" / "checkpoints"
    others = ["step-00000010.bak", "step-final", "step-7", "step-０００００００９", "step--0000001"]
    for name in others:
        (checkpoints / name).mkdir(parents=True)
    (checkpoints / "step-00000099").write_text("notes of mine")
    for _ in range(2):
        caplog.set_level("INFO")
        assert train(run_config(settings)) == 0
    assert f"resuming from {checkpoints / 'step-00000006'}" in caplog.text
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == sorted([*others, "step-00000006", "step-00000099"])
