"""The first step of a run, taken apart before any update."""

from typing import Any

from torch import Tensor

from megatron_medllm.config.run import RunConfig


def first_step(run: RunConfig) -> dict[str, Any]:
    """Metrics and gradients of the first step, before any update; gradients are this rank's slices."""
    from megatron_medllm.models.gpt import global_parameters, unwrap
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
