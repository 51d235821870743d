"""One rank of the planner's tests: what Megatron-Core really allocates in some layouts, written as JSON lines."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_medllm.bench import rank
from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import ModelConfig, ModelShape
from megatron_medllm.config.train import AdapterConfig, OptimizerConfig
from megatron_medllm.parallel import mcore, runtime
from tests.worlds.ranks import next_rendezvous


def held_bytes(case: dict[str, Any]) -> dict[str, int]:
    """Bytes of weights, gradients, main weights and moments on this rank, after one optimizer step."""
    from megatron_medllm.models.adapters import add_adapters
    from megatron_medllm.models.initialize import initialize_weights
    from megatron_medllm.models.gpt import build_model, unwrap

    next_rendezvous()
    layout = LayoutConfig(**case["layout"])
    ranks = runtime.start(layout, seed=1, timeout_s=120)
    tp = {"tp_rank": ranks.tp_rank, "tp_size": layout.tp}
    model = ModelConfig(shape=ModelShape(**case["shape"]), dtype=case["dtype"])
    chunks = build_model(model, layout, device=ranks.device)
    initialize_weights(chunks, seed=1, **tp)
    if case["lora_rank"]:
        add_adapters([unwrap(c) for c in chunks], AdapterConfig(rank=case["lora_rank"]), seed=2, **tp)
    config = unwrap(chunks[0]).config
    chunks = mcore.wrap_ddp(chunks, config, layout)
    optimizer = mcore.build_optimizer(chunks, config, OptimizerConfig(lr=0.01), layout)
    for chunk in chunks:
        chunk.zero_grad_buffer()
        chunk.start_grad_sync()
        chunk.finish_grad_sync()
    mcore.clip_and_step(optimizer, norm=mcore.gradient_norm(optimizer), clip_grad=0.0)
    found = {
        "rank": ranks.rank,
        "stage": ranks.pp_rank,
        "dp_rank": ranks.dp_rank,
        **rank.held_bytes(chunks, optimizer),
    }
    runtime.stop()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = json.loads(Path(sys.argv[1]).read_text())
    results = [held_bytes(case) for case in cases]
    Path(sys.argv[2], f"{results[0]['rank']}.json").write_text(json.dumps(results))
