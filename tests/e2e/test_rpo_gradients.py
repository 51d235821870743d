"""Gradients of one RPO step: float64 autograd's, and the same in every packing.

fp32 itself is the limit. Over all parameters together one process is off from float64 by 1.1e-6, the worst parameter (a
bias of layer 0) by 2e-6, and other orders of summation are off by as much. Between two of them the gradient as a whole
differs by less than 1e-6; single small parameters are given half as much again.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from megatron_medllm.checkpoint.hf_source import HFWeights
from megatron_medllm.checkpoint.names import weight_of_parameter
from megatron_medllm.config.model import ModelConfig
from megatron_medllm.train.scoring import score
from tests.worlds.first_step import first_step
from tests.worlds.pairs import random_pairs, rpo_settings, write_model, write_pairs
from tests.worlds.run import run_config

BETA, ALPHA = 0.3, 0.7
PAIRS = [pair | {"weight": [0.5, 1.0, 2.0][i % 3]} for i, pair in enumerate(random_pairs(19, seed=4))]
PACKINGS = {
    "one pair a pass": {"sequence_length": 48, "micro_batch_size": 1},
    "all pairs in one pass": {"micro_batch_size": 16},
    "side by side": {"share_prompt": False},
    "side by side, all in one pass": {"share_prompt": False, "micro_batch_size": 16},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model, pairs and their reference, which is another model: margins are not 0."""
    directory = tmp_path_factory.mktemp("gradients")
    write_model(directory / "hf", seed=1)
    write_model(directory / "reference_hf", seed=2)
    write_pairs(directory / "pairs.jsonl", PAIRS)
    return directory


def reference_logprobs(place: Path) -> list[tuple[float, float]]:
    model, tokenizer = load(place / "reference_hf")
    with torch.no_grad():
        return [tuple(answer_logprob(model, tokenizer, pair, side).item() for side in SIDES) for pair in PAIRS]


SIDES = ("chosen", "rejected")


def load(directory: Path):
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(directory, dtype=torch.float64)
    return model, Tokenizer.from_file(str(directory / "tokenizer.json"))


def answer_logprob(model, tokenizer: Tokenizer, pair: dict, side: str) -> Tensor:
    """Sum over the answer's tokens and its end token."""
    prompt, answer = tokenizer.encode(pair["prompt"]).ids, [*tokenizer.encode(pair[side]).ids, 0]
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()


@pytest.fixture(scope="module")
def found(place, request) -> dict[str, dict]:
    """Metrics and gradients of the first step in every packing, against the other model's log-probs."""
    run = settings(place, "score")
    score(run)
    put_in_reference(place / "reference", reference_logprobs(place))
    return {
        name: first_step(settings(place, name, **packing)) for name, packing in ({"default": {}} | PACKINGS).items()
    }


def settings(place: Path, name: str, **rpo):
    loss = {"beta": BETA, "alpha": ALPHA}
    reference = str(place / "reference")
    return run_config(
        rpo_settings(place / "hf", place / "pairs.jsonl", place / "runs" / name, reference=reference, loss=loss, **rpo)
    )


def put_in_reference(cache: Path, logprobs: list[tuple[float, float]]) -> None:
    """Another model's numbers under this model's key."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    (part,) = cache.glob("part-*.parquet")
    table = parquet.read_table(part)
    rows = table["row"].to_pylist()
    for index, side in enumerate(SIDES):
        column = pa.array([logprobs[row][index] for row in rows])
        table = table.set_column(table.column_names.index(f"{side}_logprob"), f"{side}_logprob", column)
    parquet.write_table(table, part)


@pytest.fixture(scope="module")
def truth(place) -> tuple[float, HFWeights]:
    """Loss and gradients of the same batch by autograd in float64, every answer on its own behind its prompt."""
    model, tokenizer = load(place / "hf")
    reference = reference_logprobs(place)
    batch = np.random.default_rng([5, 0]).permutation(len(PAIRS))[:8]
    total = torch.zeros((), dtype=torch.float64)
    for row in batch:
        chosen, rejected = (answer_logprob(model, tokenizer, PAIRS[row], side) for side in SIDES)
        margin = (chosen - reference[row][0]) - (rejected - reference[row][1])
        tokens = len(tokenizer.encode(PAIRS[row]["chosen"]).ids) + 1
        total = total + PAIRS[row]["weight"] * (-F.logsigmoid(BETA * margin) - ALPHA * chosen / tokens)
    assert len({PAIRS[row]["weight"] for row in batch}) == 3
    loss = total / len(batch)
    loss.backward()
    folder = shutil.copytree(place / "hf", place / "gradients")
    gradients = {name: p.grad.float().contiguous() for name, p in model.named_parameters()}
    save_file(gradients, folder / "model.safetensors", metadata={"format": "pt"})
    return loss.item(), HFWeights(folder, ModelConfig(path=folder).resolve_shape())


def test_loss_and_gradients_are_those_of_float64_autograd(found, truth):
    loss, gradients = truth
    ours = found["default"]
    assert ours["metrics"]["loss"] == pytest.approx(loss, rel=1e-6)
    assert abs(ours["metrics"]["margin"]) > 1.0, "the reference is the policy: the DPO term is not tested"
    squares = {"difference": 0.0, "norm": 0.0}
    for name, gradient in ours["gradients"].items():
        weight = weight_of_parameter(name, gradients.shape)
        local = len(gradient) if weight.axis == 0 else gradient.shape[-1]
        expected = gradients.read_local(weight, local_size=local, tp_rank=0, tp_size=1)
        assert (gradient - expected).norm() < 4e-6 * expected.norm(), name
        squares["difference"] += (gradient - expected).double().square().sum().item()
        squares["norm"] += expected.double().square().sum().item()
    assert squares["norm"] > 0 and squares["difference"] < 2e-6**2 * squares["norm"]


@pytest.mark.parametrize("name", PACKINGS)
def test_gradients_are_the_same_in_every_packing(found, name):
    one, other = found["default"], found[name]
    for key in ("loss", "preference_loss", "nll", "chosen_logprob", "rejected_logprob"):
        assert other["metrics"][key] == pytest.approx(one["metrics"][key], rel=1e-6), key
    differences = {key: other["gradients"][key] - gradient for key, gradient in one["gradients"].items()}
    for key, gradient in one["gradients"].items():
        assert differences[key].norm() < 1.5e-6 * gradient.norm(), key
    whole = torch.cat([gradient.flatten() for gradient in one["gradients"].values()])
    assert torch.cat([difference.flatten() for difference in differences.values()]).norm() < 1e-6 * whole.norm()
