"""RPO end to end: TRL's numbers, the same numbers in any micro-batch, stale references refused, bitwise resumes."""

import json
import math
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_medllm.data.reference import ReferenceCache, ReferenceKey
from megatron_medllm.errors import UserError
from megatron_medllm.storage import read_json
from megatron_medllm.train import scoring
from megatron_medllm.train.loop import train
from megatron_medllm.train.scoring import score
from tests.worlds.pairs import WORDS, random_pairs, rpo_settings, write_model, write_pairs
from tests.worlds.run import medllm, metrics, run_config, run_medllm, write_recipe

ALPHA = 0.7
OPTIMIZER = {"lr": 1e-3, "warmup_ratio": 0.0, "schedule": "constant", "weight_decay": 0.1, "betas": [0.9, 0.95]}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The subprocesses run on one thread; bitwise comparisons need the same here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def scored(model, tmp_path_factory) -> Path:
    """A folder with 40 pairs of mixed lengths and their reference log-probs."""
    directory = tmp_path_factory.mktemp("scored")
    write_pairs(directory / "pairs.jsonl", random_pairs(40))
    score(run_config(settings(model, directory, directory)))
    return directory


@pytest.fixture(scope="module")
def uninterrupted(model, scored, tmp_path_factory) -> Path:
    """Five steps on the scored pairs."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    assert train(run_config(settings(model, scored, directory))) == 0
    return directory / "rpo"


def settings(model: Path, scored: Path, run_dir: Path, **rpo) -> dict:
    return rpo_settings(model, scored / "pairs.jsonl", run_dir, **({"reference": str(scored / "reference")} | rpo))


def relative_difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))


# --- against TRL


def test_five_steps_are_those_of_trl(model, tmp_path):
    pairs = random_pairs(40, seed=1, chosen_words=9)  # chosen of one length: TRL's NLL is then the mean over pairs too
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    run = run_config(
        settings(model, tmp_path, tmp_path, loss={"beta": 0.1, "alpha": ALPHA}, optimizer=OPTIMIZER, epochs=1)
    )
    score(run)
    assert train(run) == 0
    steps = [json.loads(line) for line in (tmp_path / "rpo" / "ledger.jsonl").read_text().splitlines()]
    assert len(steps) == 5
    order = [pairs[row] for step in steps for row in step["consumed"]]
    losses, weights = train_with_trl(model, order, tmp_path / "trl")
    assert metrics(tmp_path / "rpo") == pytest.approx(losses, abs=1e-5)
    ours = load_file(tmp_path / "rpo" / "hf" / "model.safetensors")
    start = load_file(model / "model.safetensors")
    for name, expected in weights.items():
        assert (expected - start[name]).norm() > 1e-3 * expected.norm(), f"{name} did not train"
        assert (ours[name] - expected).norm() < 1e-5 * expected.norm(), name


def train_with_trl(model: Path, pairs: list[dict], output: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights of TRL's DPOTrainer over the pairs in this order."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM
    from trl import DPOConfig, DPOTrainer

    losses = []

    class Recording(DPOTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())
            return loss

        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    arguments = DPOConfig(
        output_dir=str(output), use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True,
        loss_type=["sigmoid", "sft"], loss_weights=[1.0, ALPHA], beta=0.1, max_length=None,
        per_device_train_batch_size=8, num_train_epochs=1, gradient_checkpointing=False,
        learning_rate=OPTIMIZER["lr"], lr_scheduler_type="constant", weight_decay=OPTIMIZER["weight_decay"],
        adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8, max_grad_norm=1.0,
    )  # fmt: skip
    policy, reference = (Qwen2ForCausalLM.from_pretrained(model, dtype=torch.float32) for _ in range(2))
    trainer = Recording(
        model=policy, ref_model=reference, args=arguments, train_dataset=Dataset.from_list(pairs),
        processing_class=PreTrainedTokenizerFast.from_pretrained(model),
    )  # fmt: skip
    trainer.train()
    weights = {name: p.detach() for name, p in policy.named_parameters() if name != "lm_head.weight"}
    return losses, weights


# --- the same numbers, however they are packed


def test_the_first_step_is_ln_2_plus_the_nll_and_everything_is_logged(uninterrupted):
    first = json.loads((uninterrupted / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2) + first["nll"], abs=1e-6)
    assert first["preference_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(first["margin"]) < 1e-5 and first["abs_margin"] < 1e-5
    assert first["kl"] < 1e-9
    assert first["chosen_logprob"] == pytest.approx(first["reference_chosen_logprob"], abs=1e-4)
    assert first["tokens_saved"] > 0.2 * first["unshared_tokens"]
    last = json.loads((uninterrupted / "metrics.jsonl").read_text().splitlines()[4])
    assert last["margin"] > 0 and last["kl"] > 1e-6 and last["chosen_logprob"] != last["reference_chosen_logprob"]
    report = json.loads((uninterrupted / "pairs-report.json").read_text())
    assert report["pairs"] == 40 and report["dropped"] == {} and 0.2 < report["saved_by_sharing"] < 0.5


def test_an_epoch_uses_every_pair_once_and_the_next_in_another_order(model, scored, uninterrupted, tmp_path):
    (first,) = epochs_of(uninterrupted, pairs=40)
    assert sorted(first) == list(range(40)) and first != sorted(first)
    assert train(run_config(settings(model, scored, tmp_path, epochs=2))) == 0
    again, second = epochs_of(tmp_path / "rpo", pairs=40)
    assert again == first and sorted(second) == sorted(first) and second != first


def epochs_of(output: Path, *, pairs: int) -> list[list[int]]:
    """The rows that the steps consumed, an epoch a list."""
    steps = [json.loads(line) for line in (output / "ledger.jsonl").read_text().splitlines()]
    rows = [row for step in steps for row in step["consumed"]]
    return [rows[start : start + pairs] for start in range(0, len(rows), pairs)]


@pytest.mark.parametrize(
    "packing",
    [
        {"micro_batch_size": 1},
        {"micro_batch_size": 16},
        {"sequence_length": 48, "micro_batch_size": 1},
        {"share_prompt": False},
        {"share_prompt": False, "micro_batch_size": 16},
    ],
    ids=str,
)
def test_packing_does_not_change_losses_and_gradients(model, scored, uninterrupted, tmp_path, packing):
    assert train(run_config(settings(model, scored, tmp_path, **packing))) == 0
    assert relative_difference(metrics(uninterrupted), metrics(tmp_path / "rpo")) < 1e-6
    assert relative_difference(metrics(uninterrupted, "grad_norm"), metrics(tmp_path / "rpo", "grad_norm")) < 5e-6
    assert metrics(uninterrupted, "pairs") == metrics(tmp_path / "rpo", "pairs")


# --- the reference


def test_another_input_is_refused_and_named(model, scored, tmp_path):
    def refused(difference: str, changed: dict, **top) -> None:
        with pytest.raises(UserError, match=f"stale reference .* other {difference};"):
            train(run_config(changed | top))

    same = settings(model, scored, tmp_path)
    weights = shutil.copytree(model, tmp_path / "weights")
    tensors = load_file(weights / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, weights / "model.safetensors", metadata={"format": "pt"})
    refused("weights", same, model={"path": str(weights), "dtype": "float32"})

    tokenizer = shutil.copytree(model, tmp_path / "tokenizer")
    text = (tokenizer / "tokenizer.json").read_text()
    (tokenizer / "tokenizer.json").write_text(text.replace('"w93"', '"unheard"'))
    refused("pairs, tokenizer", same, model={"path": str(tokenizer), "dtype": "float32"})

    lines = (scored / "pairs.jsonl").read_text().splitlines()
    row = json.loads(lines[3])
    row["rejected"] += " w1"
    changed_pairs = tmp_path / "pairs.jsonl"
    changed_pairs.write_text("\n".join([*lines[:3], json.dumps(row), *lines[4:]]))
    refused("pairs", rpo_settings(model, changed_pairs, tmp_path, reference=str(scored / "reference")))
    refused("pairs", settings(model, scored, tmp_path, add_eos=False))
    refused("pairs, template", settings(model, scored, tmp_path, template="chat"))
    refused("dtype", same, model={"path": str(model), "dtype": "bfloat16"})
    refused("base", settings(model, scored, tmp_path, adapter={"rank": 2, "base": "fp8"}))
    refused("base", settings(model, scored, tmp_path, adapter={"rank": 2, "base": "nf4"}))


def test_scoring_goes_on_where_it_was_interrupted(model, scored, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "PAIRS_PER_PART", 12)
    write_part, written = ReferenceCache.write_part, []

    def until_the_third(self, number, columns):
        if number == 2 and written == [0, 1]:
            raise KeyboardInterrupt
        written.append(number)
        write_part(self, number, columns)

    monkeypatch.setattr(ReferenceCache, "write_part", until_the_third)
    run = run_config(rpo_settings(model, scored / "pairs.jsonl", tmp_path))
    with pytest.raises(KeyboardInterrupt):
        score(run)
    with pytest.raises(UserError, match="16 of 40 pairs have no reference"):
        train(run)
    written.append(-1)
    score(run)
    assert written == [0, 1, -1, 2, 3]
    key = ReferenceKey(**read_json(scored / "reference" / "key.json"))
    ours, theirs = (ReferenceCache(d / "reference").load(key, list(range(40))) for d in (tmp_path, scored))
    assert ours.keys() == theirs.keys()
    for row in ours:
        assert ours[row] == pytest.approx(theirs[row], abs=1e-4)


def test_an_adapter_starts_as_its_base(model, scored, uninterrupted, tmp_path):
    """LoRA's reference is the full model's own cache; its first loss is the same."""
    adapter = {"rank": 4, "alpha": 8.0}
    assert train(run_config(settings(model, scored, tmp_path, adapter=adapter))) == 0
    first, last = metrics(tmp_path / "rpo")[0], metrics(tmp_path / "rpo", "margin")[-1]
    assert first == pytest.approx(metrics(uninterrupted)[0], abs=1e-6)
    assert metrics(tmp_path / "rpo", "abs_margin")[0] < 1e-5 and last > 1e-3


@pytest.mark.parametrize("base", ["fp8", "nf4"])
def test_a_quantized_base_is_its_own_reference(tmp_path, base):
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    model = write_model(tmp_path / "hf", layers=2, hidden=128, ffn=128)
    pairs = write_pairs(tmp_path / "pairs.jsonl", random_pairs(8))
    rpo = {"adapter": {"rank": 4, "base": base}, "epochs": 2}
    run = run_config(rpo_settings(model, pairs, tmp_path, **rpo))
    dense = run_config(rpo_settings(model, pairs, tmp_path / "dense"))
    quantized_logprobs, dense_logprobs = (
        parquet.read_table(score(r) / "part-00000.parquet")["chosen_logprob"].to_numpy() for r in (run, dense)
    )
    assert np.abs(quantized_logprobs - dense_logprobs).max() > 0.01
    assert train(run) == 0
    assert metrics(tmp_path / "rpo", "abs_margin")[0] < 1e-3 < metrics(tmp_path / "rpo", "abs_margin")[1]


# --- what preference training does, and its guards


def test_dpo_lowers_the_chosen_logprob_where_rpo_raises_it(tmp_path):
    """The published effect (arXiv 2404.19733, figure 3), from a model that was trained on both answers first."""
    start = write_model(tmp_path / "hf", layers=2)
    pairs = random_pairs(16, seed=2)
    swapped = [pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
    write_pairs(tmp_path / "both.jsonl", pairs + swapped)
    constant = {"warmup_ratio": 0.0, "schedule": "constant", "weight_decay": 0.0}
    both_answers = rpo_settings(
        start, tmp_path / "both.jsonl", tmp_path / "sft", epochs=25, global_batch_size=32, micro_batch_size=16,
        loss={"kind": "sft"}, optimizer={"lr": 1e-2, **constant},
    )  # fmt: skip
    assert train(run_config(both_answers)) == 0
    assert metrics(tmp_path / "sft" / "rpo", "nll")[-1] < 0.6
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    chosen = {}
    for alpha in (0.0, 1.0):
        run_dir = tmp_path / str(alpha)
        run = run_config(
            rpo_settings(
                tmp_path / "sft" / "rpo" / "hf", tmp_path / "pairs.jsonl", run_dir, epochs=10, global_batch_size=16,
                micro_batch_size=8, reference=str(tmp_path / "reference"), loss={"alpha": alpha},
                optimizer={"lr": 3e-3, **constant}, guard={"chosen_fall_steps": 6},
            )
        )  # fmt: skip
        if alpha == 0.0:
            score(run)
        assert train(run) == 0
        assert metrics(run_dir / "rpo", "margin")[-1] > 5 and metrics(run_dir / "rpo", "accuracy")[-1] == 1.0
        chosen[alpha] = metrics(run_dir / "rpo", "chosen_logprob")
    assert chosen[0.0][0] == pytest.approx(chosen[1.0][0], abs=1e-4)
    assert chosen[0.0][-1] < chosen[0.0][0] - 1.0
    assert chosen[1.0][-1] > chosen[1.0][0] + 0.5


def test_a_run_that_blows_up_is_stopped(model, scored, tmp_path):
    def stopped(message: str, **rpo) -> None:
        with pytest.raises(UserError, match=message):
            train(run_config(settings(model, scored, tmp_path / message[:8], **rpo)))

    stopped("gradient norm is .* beyond guard.max_grad_norm=0.1", guard={"max_grad_norm": 0.1})
    stopped("mean margin is .* beyond guard.max_margin=1e-05", guard={"max_margin": 1e-5})


def test_a_wrong_reference_is_noticed_at_the_first_step(model, scored, tmp_path):
    """Another model's numbers under the right key: nothing but the margin can tell."""
    shutil.copytree(scored / "reference", tmp_path / "reference")
    path = tmp_path / "reference" / "part-00000.parquet"
    table = parquet.read_table(path)
    column = table.column_names.index("chosen_logprob")
    parquet.write_table(table.set_column(column, "chosen_logprob", pc.add(table["chosen_logprob"], 0.5)), path)
    with pytest.raises(UserError, match=r"margin. before the first update is 0\.5"):
        train(run_config(settings(model, scored, tmp_path, reference=str(tmp_path / "reference"))))


def test_what_is_dropped_and_nearly_identical_is_reported(model, tmp_path, caplog):
    pairs = random_pairs(8, seed=3)
    words = " ".join(WORDS[:30])
    pairs += [
        {"prompt": "w1 ", "chosen": words, "rejected": words},
        {"prompt": "w1 ", "chosen": words, "rejected": words + " w0"},
        {"prompt": "w1 ", "chosen": " ".join(WORDS), "rejected": "w0 " * 60},
    ]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    caplog.set_level("INFO")
    assert train(run_config(rpo_settings(model, tmp_path / "pairs.jsonl", tmp_path, loss={"kind": "sft"}))) == 0
    report = json.loads((tmp_path / "rpo" / "pairs-report.json").read_text())
    assert report["pairs"] == 9
    assert report["dropped"] == {"answers identical": 1, "longer than 128 tokens": 1}
    assert report["dropped_rows"] == [
        {"row": 8, "reason": "answers identical"},
        {"row": 10, "reason": "longer than 128 tokens"},
    ]
    assert report["near_identical_rows"] == [
        {"row": 8, "edit_distance": 0.0},
        {"row": 9, "edit_distance": pytest.approx(1 / 32, abs=1e-4)},
    ]
    assert "dropped 1 pairs: answers identical" in caplog.text and "2 pairs have nearly identical" in caplog.text


# --- kill and resume


def test_a_killed_run_resumes_bitwise(model, scored, tmp_path, uninterrupted):
    recipe = write_recipe(settings(model, scored, tmp_path, checkpoint={"every_steps": 2}), tmp_path / "recipe.yaml")
    process = medllm("train", recipe)
    while process.poll() is None:
        if (tmp_path / "rpo" / "metrics.jsonl").is_file() and len(metrics(tmp_path / "rpo")) >= 3:
            process.kill()
        time.sleep(0.002)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    status, output = run_medllm("train", recipe)
    assert status == 0, output
    assert "resuming from" in output
    assert metrics(tmp_path / "rpo") == metrics(uninterrupted)
    assert metrics(tmp_path / "rpo", "grad_norm") == metrics(uninterrupted, "grad_norm")
    for name in ("ledger.jsonl", "hf/model.safetensors"):
        assert (tmp_path / "rpo" / name).read_bytes() == (uninterrupted / name).read_bytes()
