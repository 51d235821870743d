"""The optimizer step, once: what the loop, the benchmarks and the tests run is the same code."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from megatron_medllm.parallel import mcore
from megatron_medllm.parallel.reduce import start_sum
from megatron_medllm.train.schedule import learning_rate
from megatron_medllm.train.setup import Trainer
from megatron_medllm.train.throughput import StepClock

# (step, loss over the global batch) -> why the weights must not be updated, None if they may
Veto = Callable[[int, float], str | None]


@dataclass(frozen=True)
class StepResult:
    """What one step did."""

    metrics: dict[str, float]  # over the global batch; grad_norm and lr are among them
    problem: str | None  # why the weights were not updated
    micro_batches: list[Any]  # this replica's


def no_veto(step: int, loss: float) -> str | None:
    """Every loss may update the weights."""
    return None


def run_step(trainer: Trainer, step: int, clock: StepClock, *, veto: Veto = no_veto) -> StepResult:
    """Data, forward, backward and, unless the numbers are not to be trusted, the update. Collective.

    Args:
        trainer: what is trained.
        step: from 0; decides data, learning rate and dropout, so that a resumed run repeats an uninterrupted one.
        clock: its parts `data`, `forward_backward`, `gradient_norm` and, after an update, `optimizer` are set.
        veto: asked before the update.

    Raises:
        UserError: the algorithm's own check refuses to go on (the weights have been updated by then).
    """
    config, algorithm = trainer.config, trainer.step
    rate = learning_rate(step, total_steps=algorithm.total_steps, config=config.optimizer)
    for group in trainer.optimizer.param_groups:
        group["lr"] = rate
    torch.manual_seed(trainer.run.seed * 1_000_003 + step)  # dropout repeats after a resume
    with clock.part("data"):
        micro_batches = algorithm.micro_batches(step)
    with clock.part("forward_backward"):
        parts = forward_backward(
            algorithm.forward,
            trainer.chunks,
            trainer.optimizer,
            micro_batches,
            stream_length=algorithm.stream_length,
        )
        sums = start_sum(parts, algorithm.metric_names, trainer.runtime)
    with clock.part("gradient_norm"):  # the one wait for the device in a step
        norm = mcore.gradient_norm(trainer.optimizer)
    metrics = algorithm.summarize(sums())
    problem = veto(step, metrics["loss"])
    if problem is None and not math.isfinite(norm):
        problem = f"the gradient norm is {norm}"
    if problem is None:
        with clock.part("optimizer"):
            mcore.clip_and_step(trainer.optimizer, norm=norm, clip_grad=config.optimizer.clip_grad)
    metrics |= {"grad_norm": norm, "lr": rate}
    algorithm.check(step, metrics)
    return StepResult(metrics, problem, micro_batches)


def forward_backward(
    forward_step: mcore.ForwardStep,
    chunks: list[nn.Module],
    optimizer: MegatronOptimizer,
    micro_batches: list[Any],
    *,
    stream_length: int,
) -> list[dict]:
    """Zeroed gradients, then those of one step, reduced over all ranks. Collective.

    Args:
        forward_step: Megatron's forward_step_func.
        chunks: this rank's, wrapped by `mcore.wrap_ddp`.
        optimizer: over their parameters.
        micro_batches: this replica's.
        stream_length: tokens of each of them.

    Returns:
        the loss functions' metrics, one a micro-batch; empty on all but the last pipeline stage.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()  # type: ignore[operator]  # of Megatron's wrapper, an nn.Module by type
    optimizer.zero_grad()
    return mcore.run_micro_batches(forward_step, chunks, micro_batches, stream_length=stream_length)
