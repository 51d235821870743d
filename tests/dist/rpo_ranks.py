"""One rank of the RPO layout tests: does the jobs of a file, one runtime after the other."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_medllm.config.run import RunConfig
from tests.dist.launch import next_rendezvous


def first_step(run: RunConfig) -> dict[str, Any]:
    """Metrics and gradients of the first step, before any update; gradients are this rank's slices."""
    from megatron_medllm.models.qwen25 import global_parameters, unwrap
    from megatron_medllm.parallel import runtime
    from megatron_medllm.parallel.reduce import sum_metrics
    from megatron_medllm.train.one_step import forward_backward
    from megatron_medllm.train.setup import build_trainer

    ranks = runtime.start(run.layout, seed=run.seed, timeout_s=60)
    try:
        trainer = build_trainer(run, ranks)
        step = trainer.step
        parts = forward_backward(
            step.forward, trainer.chunks, trainer.optimizer, step.micro_batches(0), stream_length=step.stream_length
        )
        gradients: dict[str, Tensor] = {
            name: parameter.main_grad.clone()
            for chunk in trainer.chunks
            for name, parameter in global_parameters(unwrap(chunk))
        }
        return {"metrics": step.summarize(sum_metrics(parts, step.metric_names, ranks)), "gradients": gradients}
    finally:
        runtime.stop()


def main() -> None:
    from megatron_medllm.train.loop import train
    from megatron_medllm.train.scoring import score

    for job in json.loads(Path(sys.argv[1]).read_text()):
        next_rendezvous()
        run = RunConfig.model_validate(job["settings"])
        if job["do"] == "score":
            score(run)
        elif job["do"] == "train":
            train(run)
        else:
            found = first_step(run)
            torch.save(found, f"{job['out']}.{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
