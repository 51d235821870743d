"""Gradients of one step of continued pretraining: float64 autograd's on documents alone, and any micro-batch's.

Limits as in test_rpo_gradients.py: fp32 is within 2e-6 of float64 over all parameters, and orders of summation are
within 1e-6 of each other.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_medllm.bench.synthetic import write_documents
from megatron_medllm.checkpoint.hf_source import HFWeights
from megatron_medllm.checkpoint.names import weight_of_parameter
from megatron_medllm.config.model import ModelConfig
from megatron_medllm.config.run import RunConfig
from megatron_medllm.corpus.index import read_index
from megatron_medllm.parallel import runtime
from tests.worlds.first_step import first_step
from tests.worlds.pairs import write_model
from tests.worlds.run import run_config

ROWS, LENGTH, WORDS = 8, 64, 96
Z_LOSS = 1e-2


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model and documents of 20 tokens on average: every row holds several."""
    directory = tmp_path_factory.mktemp("cpt_gradients")
    write_model(directory / "hf", seed=3)
    write_documents(directory / "corpus", tokens=2 * ROWS * LENGTH, document_length=20, vocab_size=WORDS, seed=1)
    return directory


def settings(place: Path, name: str, **cpt) -> RunConfig:
    training = {
        "data": [{"path": str(place / "corpus")}],
        "train_tokens": ROWS * LENGTH,
        "sequence_length": LENGTH,
        "global_batch_size": ROWS,
        "optimizer": {"lr": 1e-3},
    }
    model = {"path": str(place / "hf"), "dtype": "float32"}
    return run_config({"run_dir": str(place / name), "seed": 2, "model": model, "cpt": training | cpt})


def rows_of(run: RunConfig) -> list[tuple[list[int], list[int]]]:
    """Documents of the first step's rows: inputs, and labels one token on, which run into the next row."""
    from megatron_medllm.train.setup import build_trainer

    ranks = runtime.start(run.layout, seed=run.seed)
    try:
        batches = build_trainer(run, ranks).step.micro_batches(0)
    finally:
        runtime.stop()
    return [
        (batch.tokens[s.start : s.end].tolist(), batch.labels[s.start : s.end].tolist())
        for batch in batches
        for s in batch.segments
    ]


@pytest.fixture(scope="module", params=[0.0, Z_LOSS], ids=["cross entropy", "z-loss"])
def truth(place, request) -> tuple[float, float, HFWeights]:
    """z-loss coefficient, loss and gradients by autograd in float64, every document on its own."""
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(place / "hf", dtype=torch.float64)
    documents = rows_of(settings(place, "documents"))
    assert len(documents) > 2 * ROWS
    total, count = torch.zeros((), dtype=torch.float64), 0
    for tokens, labels in documents:
        logits = model(input_ids=torch.tensor([tokens])).logits[0]
        kept = [i for i, label in enumerate(labels) if label != -100]
        z = logits[kept].logsumexp(-1)
        total = total + (z - logits[kept, [labels[i] for i in kept]] + request.param * z.square()).sum()
        count += len(kept)
    loss = total / count
    loss.backward()
    folder = shutil.copytree(place / "hf", place / f"gradients-{request.param}")
    gradients = {name: p.grad.float().contiguous() for name, p in model.named_parameters()}
    save_file(gradients, folder / "model.safetensors", metadata={"format": "pt"})
    return request.param, loss.item(), HFWeights(folder, ModelConfig(path=folder).resolve_shape())


def test_loss_and_gradients_are_those_of_documents_alone(place, truth):
    z_loss, loss, gradients = truth
    ours = first_step(settings(place, f"z{z_loss}", z_loss=z_loss))
    assert ours["metrics"]["loss"] == pytest.approx(loss, rel=1e-6)
    expected = {}
    for name, gradient in ours["gradients"].items():
        weight = weight_of_parameter(name, gradients.shape)
        local = len(gradient) if weight.axis == 0 else gradient.shape[-1]
        expected[name] = gradients.read_local(weight, local_size=local, tp_rank=0, tp_size=1)
        assert (gradient - expected[name]).norm() < 4e-6 * expected[name].norm(), name
    assert difference(ours["gradients"], expected) < 2e-6


def test_every_step_trains_on_what_its_ledger_line_says(place):
    """Three steps: the tokens of a step are those of the documents that `consumed` names, and no row comes twice."""
    from megatron_medllm.train.setup import build_trainer

    run = settings(place, "ledger", train_tokens=3 * 4 * LENGTH, global_batch_size=4)
    (prefix,) = [path.with_suffix("") for path in (place / "corpus").glob("*.bin")]
    index = read_index(prefix)
    tokens = np.fromfile(prefix.with_suffix(".bin"), dtype=index.dtype)
    starts = np.cumsum([0, *index.lengths])
    ranks = runtime.start(run.layout, seed=run.seed)
    try:
        step_object = build_trainer(run, ranks).step
        seen = []
        for step in range(step_object.total_steps):
            batches, rows = step_object.micro_batches(step), step_object.consumed(step)
            for batch, spans in zip(batches, rows, strict=True):
                parts = [tokens[starts[d] + offset : starts[d] + offset + n] for _, d, offset, n in spans]
                assert np.concatenate(parts)[:LENGTH].tolist() == batch.tokens.tolist()
                seen.append(tuple(spans))
    finally:
        runtime.stop()
    assert len(seen) == len(set(seen)) == 12


@pytest.mark.parametrize("size", [2, 8])
def test_gradients_are_the_same_in_any_micro_batch(place, size):
    one, other = (first_step(settings(place, str(n), micro_batch_size=n)) for n in (1, size))
    assert other["metrics"]["loss"] == pytest.approx(one["metrics"]["loss"], rel=1e-6)
    assert difference(other["gradients"], one["gradients"]) < 1e-6


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of all gradients together, relative."""
    a, b = (torch.cat([part[name].flatten() for name in expected]) for part in (found, expected))
    return float((a - b).norm() / b.norm())
