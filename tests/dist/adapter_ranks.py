"""One rank of the adapter tests: trains a tiny adapted model in the layouts that a job file lists."""

import json
import sys
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_medllm.checkpoint.state_writer import StateWriter
from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import ModelConfig, ModelShape
from megatron_medllm.config.train import AdapterConfig, OptimizerConfig
from megatron_medllm.data.microbatch import MicroBatch
from megatron_medllm.losses.cpt import cpt_loss
from megatron_medllm.parallel import mcore, runtime
from megatron_medllm.parallel.packed import Segment
from megatron_medllm.parallel.reduce import sum_metrics
from tests.worlds.ranks import next_rendezvous
from tests.worlds.shapes import tiny_shape

# Widths are multiples of 128 on each of two ranks, so that FP8 and NF4 blocks are the same in every layout.
SHAPE = tiny_shape(hidden_size=256, ffn_hidden_size=256, vocab_size=128)
STREAM = 32
MICRO_BATCHES = 4


def micro_batches(step: int, ranks: runtime.Runtime) -> list[MicroBatch]:
    """This replica's share of a step's four streams of two documents each."""
    generator = np.random.default_rng(step)
    streams = []
    for _ in range(MICRO_BATCHES):
        tokens = generator.integers(0, SHAPE.vocab_size, STREAM + 1)
        cut = int(generator.integers(8, STREAM - 8))
        positions = np.concatenate([np.arange(cut), np.arange(STREAM - cut)])
        segments = (Segment(0, cut), Segment(cut, STREAM))
        streams.append(MicroBatch(tokens[:-1], tokens[1:].copy(), positions, segments))
    return streams[ranks.dp_rank :: ranks.dp_size]


def forward(ranks: runtime.Runtime, iterator: Any, chunk: Any) -> tuple[Tensor, Any]:
    inputs = next(iterator).model_inputs(ranks.device, backend="torch", uniform_grad=-1.0, split=ranks.split)
    return chunk(**inputs), loss


def loss(output: Tensor) -> tuple[Tensor, Tensor, dict]:
    counted = torch.ones(len(output[0]), dtype=torch.bool)
    total = cpt_loss(output[0], output[1], counted, z_loss=0.0)
    return total, counted.sum().int(), {"loss": total.detach(), "count": counted.sum()}


def train(job: dict[str, Any]) -> None:
    """Build, optionally load, take some steps, optionally save; leave losses and gradients in the job's folder."""
    from megatron_medllm.checkpoint.peft_adapter import load_adapter, read_peft
    from megatron_medllm.models.adapters import add_adapters
    from megatron_medllm.models.initialize import initialize_weights
    from megatron_medllm.models.gpt import build_model, unwrap
    from megatron_medllm.train.one_step import forward_backward

    layout = LayoutConfig(**job["layout"])
    ranks = runtime.start(layout, seed=7, timeout_s=60)
    tp = {"tp_rank": ranks.tp_rank, "tp_size": layout.tp}
    chunks = build_model(ModelConfig(shape=SHAPE, dtype=job.get("dtype", "float32")), layout, device=ranks.device)
    initialize_weights(chunks, seed=1, **tp)
    if job.get("adapted", True):
        add_adapters(map(unwrap, chunks), AdapterConfig(**job["adapter"]), seed=2, **tp)
        if job.get("fill_b"):
            fill_b([unwrap(chunk) for chunk in chunks], **tp)
        if "peft" in job:
            load_adapter(chunks, read_peft(Path(job["peft"]), SHAPE), **tp)
    config = unwrap(chunks[0]).config
    chunks = mcore.wrap_ddp(chunks, config, layout)
    optimizer = mcore.build_optimizer(chunks, config, OptimizerConfig(lr=0.01), layout)
    if "load" in job:
        state = mcore.sharded_state(chunks, optimizer, is_loading=True)
        mcore.restore(chunks, optimizer, mcore.load_sharded(state, Path(job["load"])))
    losses = []
    gradients: dict[str, Tensor] = {}
    for step in job["steps"]:
        torch.manual_seed(step)  # as the training loop does; layouts draw differently while they are built
        batches = micro_batches(step, ranks)
        parts = forward_backward(partial(forward, ranks), chunks, optimizer, batches, stream_length=STREAM)
        sums = sum_metrics(parts, ("loss", "count"), ranks)
        losses.append(sums["loss"] / sums["count"])
        gradients = collect_gradients([unwrap(chunk) for chunk in chunks])
        mcore.clip_and_step(optimizer, norm=mcore.gradient_norm(optimizer), clip_grad=1.0)
    if "save" in job:
        Path(job["save"]).mkdir(exist_ok=True)
        StateWriter().start(mcore.sharded_state(chunks, optimizer, is_loading=False), Path(job["save"]), wait=True)
    torch.save(
        {"losses": losses, "gradients": gradients, "tp_rank": ranks.tp_rank, "dp_rank": ranks.dp_rank},
        Path(job["out"]) / f"{job['name']}.{ranks.rank}.pt",
    )
    runtime.stop()


@torch.no_grad()
def fill_b(models: list[Any], *, tp_rank: int, tp_size: int) -> None:
    """Random B, the same in every layout: with B zero, A would have no gradient."""
    from megatron_medllm.models.adapters import LINEARS
    from megatron_medllm.models.gpt import global_parameters

    for model in models:
        for name, parameter in global_parameters(model):
            if name.endswith("lora_b"):
                linear = name.split(".")[-2]
                split = tp_size if LINEARS[linear][1] == "column" else 1
                blocks = 2 if linear == "linear_fc1" else 1
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                rows, rank = parameter.shape
                whole = 0.02 * torch.randn(blocks, rows * split // blocks, rank, generator=generator)
                parameter.copy_(whole.chunk(split, dim=1)[tp_rank % split].flatten(0, 1))


def collect_gradients(models: list[Any]) -> dict[str, Tensor]:
    """The last step's gradients by global name: this rank's slices."""
    from megatron_medllm.models.gpt import global_parameters

    return {
        name: parameter.main_grad.clone()
        for model in models
        for name, parameter in global_parameters(model)
        if parameter.requires_grad
    }


if __name__ == "__main__":
    for listed_job in json.loads(Path(sys.argv[1]).read_text()):
        next_rendezvous()
        train(listed_job)
