"""One rank of the model's layout tests: trains a tiny model, all of it, in the layouts that a job file lists."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import ModelConfig, ModelShape
from megatron_medllm.config.train import OptimizerConfig
from megatron_medllm.parallel import mcore, runtime
from megatron_medllm.parallel.reduce import sum_metrics
from tests.dist.adapter_ranks import STREAM, forward, micro_batches
from tests.worlds.ranks import next_rendezvous
from tests.worlds.shapes import tiny_shape

FFN = 320  # on two ranks padded to 512: the second rank's slice is a quarter model, three quarters zeros
SHAPE = tiny_shape(num_layers=3, hidden_size=256, ffn_hidden_size=FFN, vocab_size=128)


def train(job: dict[str, Any]) -> None:
    """Take three steps and leave the losses; what pads the FFN must still be zero."""
    from megatron_medllm.models.initialize import initialize_weights
    from megatron_medllm.models.gpt import build_model, unwrap
    from megatron_medllm.train.one_step import forward_backward

    layout = LayoutConfig(**job["layout"])
    ranks = runtime.start(layout, seed=7, timeout_s=60)
    model = ModelConfig(shape=SHAPE, dtype="float32", init_std=0.05)
    built = {"fp8": job.get("fp8"), "fp8_weights": job.get("fp8_weights", False)}
    chunks = build_model(model, layout, device=ranks.device, **built)
    initialize_weights(chunks, seed=1, tp_rank=ranks.tp_rank, tp_size=layout.tp)
    config = unwrap(chunks[0]).config
    chunks = mcore.wrap_ddp(chunks, config, layout)
    optimizer = mcore.build_optimizer(chunks, config, OptimizerConfig(lr=2e-3, weight_decay=0.1), layout)
    losses, norms = [], []
    for step in range(3):
        batches = micro_batches(step, ranks)
        parts = forward_backward(partial(forward, ranks), chunks, optimizer, batches, stream_length=STREAM)
        sums = sum_metrics(parts, ("loss", "count"), ranks)
        losses.append(sums["loss"] / sums["count"])
        norms.append(mcore.gradient_norm(optimizer))
        mcore.clip_and_step(optimizer, norm=norms[-1], clip_grad=1.0)
    layers = unwrap(chunks[0]).decoder.layers
    left = {
        "losses": losses,
        "grad_norms": norms,
        "layers": len(layers),
        "ffn": config.ffn_hidden_size,
        "padding_is_zero": all(_padding_is_zero(layer, ranks.tp_rank, layout.tp) for layer in layers),
    }
    Path(job["out"], f"{job['name']}.{ranks.rank}.json").write_text(json.dumps(left))
    runtime.stop()


def _padding_is_zero(layer: Any, tp_rank: int, tp_size: int) -> bool:
    width = layer.mlp.linear_fc2.weight.shape[1]
    real = min(max(FFN - tp_rank * width, 0), width)
    gate, up = layer.mlp.linear_fc1.weight.chunk(2)
    return gate[:real].any() and not any(
        part.any() for part in (gate[real:], up[real:], layer.mlp.linear_fc2.weight[:, real:])
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for listed_job in json.loads(Path(sys.argv[1]).read_text()):
        next_rendezvous()
        train(listed_job)
