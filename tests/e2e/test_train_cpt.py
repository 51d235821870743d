"""CPT end to end: the same losses in every layout and batch, bitwise resumes, and a ledger that adds up."""

import json
import signal
import time
from collections import Counter

import pytest

from megatron_medllm.config.cluster import REQUEUE_EXIT_CODE
from megatron_medllm.errors import UserError
from megatron_medllm.train.loop import train
from megatron_medllm.train.state import verify_checkpoint
from tests.worlds.ranks import run_ranks
from tests.worlds.run import cpt_settings, medllm, metrics, run_config, run_medllm, write_recipe


@pytest.fixture(scope="module")
def reference(tiny_world, tmp_path_factory):
    """An uninterrupted run in one process, on as many threads as the others."""
    directory = tmp_path_factory.mktemp("reference")
    recipe = write_recipe(cpt_settings(tiny_world, directory), directory / "recipe.yaml")
    status, output = run_medllm("train", recipe)
    assert status == 0, output
    return directory / "cpt"


def relative_difference(a, b):
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))


def test_the_loss_falls_and_everything_is_written(reference):
    losses = metrics(reference)
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.3
    assert all(value > 0 for value in metrics(reference, "tokens_per_s"))
    assert len(metrics(reference, "validation_loss")) == 2  # before the first step and behind the last
    assert (reference / "hf" / "model.safetensors").is_file()
    assert json.loads((reference / "hf" / "generation_config.json").read_text()) == {"eos_token_id": 1}
    assert list((reference / "tensorboard").iterdir())
    steps = sorted(path.name for path in (reference / "checkpoints").iterdir())
    assert steps == ["step-00000002", "step-00000004", "step-00000006"]


def test_micro_batches_do_not_change_the_loss(tiny_world, tmp_path, reference):
    for size in (2, 8):
        run = run_config(cpt_settings(tiny_world, tmp_path / str(size), cpt={"micro_batch_size": size}))
        assert train(run) == 0
        assert relative_difference(metrics(reference), metrics(tmp_path / str(size) / "cpt")) < 1e-6
        assert relative_difference(
            metrics(reference, "grad_norm"), metrics(tmp_path / str(size) / "cpt", "grad_norm")
        ) < 3e-6  # fmt: skip


TWO_RANKS = {
    "tp2": {"tp": 2},
    "tp2-sp": {"tp": 2, "sp": True, "recompute": "full"},
    "pp2": {"pp": 2},
    "pp2-vpp2": {"pp": 2, "vpp": 2},
    "dp2": {"dp": 2},
}
FOUR_RANKS = {"tp2-pp2-sp": {"tp": 2, "pp": 2, "sp": True}}


@pytest.mark.parametrize(("ranks", "layouts"), [(2, TWO_RANKS), (4, FOUR_RANKS)], ids=["two-ranks", "four-ranks"])
def test_layouts_give_the_same_losses(tiny_world, tmp_path, reference, ranks, layouts):
    recipes = [
        write_recipe(cpt_settings(tiny_world, tmp_path / name, layout=layout), tmp_path / name / "recipe.yaml")
        for name, layout in layouts.items()
    ]
    run_ranks(ranks, "tests.dist.train_ranks", *map(str, recipes), timeout_s=300, runtimes=len(recipes))
    for key, limit in {"loss": 1e-6, "grad_norm": 3e-6}.items():
        expected = metrics(reference, key)
        worst = {name: relative_difference(expected, metrics(tmp_path / name / "cpt", key)) for name in layouts}
        assert max(worst.values()) < limit, (key, worst)


def test_resumes_in_other_layouts_skip_and_repeat_nothing(tiny_world, tmp_path, reference):
    """One process to step 2, two replicas to step 4, tensor parallel to the end."""
    stops = ({}, 2), ({"dp": 2}, 4), ({"tp": 2}, 6)
    for layout, last in stops:
        settings = cpt_settings(tiny_world, tmp_path, layout=layout)
        recipe = write_recipe(settings, tmp_path / "recipe.yaml")
        status, output = run_until(recipe, tmp_path / "cpt", last)
        assert status == (0 if last == 6 else REQUEUE_EXIT_CODE), output
    assert relative_difference(metrics(reference), metrics(tmp_path / "cpt")) < 1e-6
    assert (tmp_path / "cpt" / "ledger.jsonl").read_bytes() == (reference / "ledger.jsonl").read_bytes()


def run_until(recipe, stage_dir, step):
    """Train until `step` is logged, then ask it to stop (unless it is the last)."""
    process = medllm("train", recipe)
    while process.poll() is None:
        if step < 6 and (stage_dir / "metrics.jsonl").is_file() and len(metrics(stage_dir)) >= step:
            process.send_signal(signal.SIGUSR1)
            break
        time.sleep(0.01)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def test_the_ledger_uses_every_token_of_an_epoch_once(tiny_world, tmp_path):
    settings = cpt_settings(tiny_world, tmp_path, cpt={"train_tokens": None, "epochs": 1.0, "global_batch_size": 4})
    assert train(run_config(settings)) == 0
    rows = [json.loads(line) for line in (tmp_path / "cpt" / "ledger.jsonl").read_text().splitlines()]
    used = Counter()
    for row in rows:
        for spans in row["consumed"]:
            for _, document, offset, length in spans:
                used.update((document, token) for token in range(offset, offset + length))
    # A row's last token is the next row's first, as a label here and as an input there.
    repeated = sum(count > 1 for count in used.values())
    assert max(used.values()) == 2 and repeated <= 4 * len(rows)
    tokens = json.loads((tiny_world / "corpus" / "medical" / "manifest.json").read_text())["sources"]["medical"][
        "tokens"
    ]
    assert len(used) > 0.9 * tokens - 4 * 64


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_save_and_the_resume_is_bitwise(tiny_world, tmp_path, reference, number):
    recipe = write_recipe(cpt_settings(tiny_world, tmp_path), tmp_path / "recipe.yaml")
    process = medllm("train", recipe)
    while not (tmp_path / "cpt" / "metrics.jsonl").is_file():
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == REQUEUE_EXIT_CODE, output
    status, output = run_medllm("train", recipe)
    assert status == 0, output
    assert metrics(tmp_path / "cpt") == metrics(reference)
    assert (tmp_path / "cpt" / "hf" / "model.safetensors").read_bytes() == (
        reference / "hf" / "model.safetensors"
    ).read_bytes()


def test_a_killed_run_resumes_bitwise(tiny_world, tmp_path, reference):
    recipe = write_recipe(cpt_settings(tiny_world, tmp_path), tmp_path / "recipe.yaml")
    for step in (3, 5):
        process = medllm("train", recipe)
        while process.poll() is None:
            if (tmp_path / "cpt" / "metrics.jsonl").is_file() and len(metrics(tmp_path / "cpt")) >= step:
                process.kill()
            time.sleep(0.005)
        process.communicate()
    status, output = run_medllm("train", recipe)
    assert status == 0, output
    assert metrics(tmp_path / "cpt") == metrics(reference)
    assert (tmp_path / "cpt" / "ledger.jsonl").read_bytes() == (reference / "ledger.jsonl").read_bytes()


def test_a_damaged_checkpoint_is_passed_over(tiny_world, tmp_path, reference, caplog):
    run = run_config(cpt_settings(tiny_world, tmp_path))
    assert train(run) == 0
    newest = tmp_path / "cpt" / "checkpoints" / "step-00000006"
    shard = next(newest.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert verify_checkpoint(newest) == f"{shard.name} does not match its digest"
    assert train(run) == 0
    assert f"passing over {newest}" in caplog.text
    assert relative_difference(metrics(reference), metrics(tmp_path / "cpt")) < 1e-6


def test_bad_input_is_told_before_any_step(tiny_world, tmp_path):
    def refused(message, **changes):
        with pytest.raises(UserError, match=message):
            train(run_config(cpt_settings(tiny_world, tmp_path, **changes)))

    refused("global_batch_size=9 is not a multiple", cpt={"global_batch_size": 9, "micro_batch_size": 2})
    refused("no such file", cpt={"data": [{"path": str(tmp_path / "nothing")}]})
    refused("do not fill one batch", cpt={"train_tokens": 64})
    small = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 64,
             "vocab_size": 512, "tie_embeddings": True}  # fmt: skip
    refused("but the model's vocabulary has 512", model={"shape": small, "dtype": "float32"})
    assert not (tmp_path / "cpt" / "checkpoints").exists()


def test_a_checkpoint_of_another_model_is_refused(tiny_world, tmp_path):
    assert train(run_config(cpt_settings(tiny_world, tmp_path))) == 0
    other = cpt_settings(tiny_world, tmp_path)
    other["model"] = {"shape": {**other["model"]["shape"], "ffn_hidden_size": 96}, "dtype": "float32"}
    with pytest.raises(UserError, match="checkpoint of another run: shape"):
        train(run_config(other))


def test_nan_steps_are_skipped_and_end_the_run_when_there_are_too_many(tiny_world, tmp_path):
    settings = cpt_settings(tiny_world, tmp_path)
    settings["cpt"]["optimizer"]["lr"] = 1e30
    settings["cpt"]["guard"] = {"stop_after": 3, "roll_back_after": 10}
    with pytest.raises(UserError, match="3 steps had to be skipped"):
        train(run_config(settings))
    assert sum(metrics(tmp_path / "cpt", "skipped")) >= 2


def test_markers_that_match_nothing_stop_the_run(tiny_world, tmp_path):
    recipe = write_recipe(cpt_settings(tiny_world, tmp_path, cpt={"loss_after": ["解答欄:"]}), tmp_path / "r.yaml")
    status, output = run_medllm("train", recipe)
    assert status == 2 and "none of" in output and "holds a marker" in output, output
