"""`medllm bench throughput`: how fast a stage trains here.

The measured window does what training does: data, forward and backward through the pipeline schedule, gradient
reduction, clipping, optimizer. Checkpoints, validation and logging are left out. The algorithm's own checks are not:
RPO refuses a first step whose margin over its reference is not 0.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_medllm.bench.harness import (
    BenchSettings,
    Measured,
    both_flops,
    free_device_memory,
    local_work,
    measured_window,
    require_steps,
    total_work,
    write_model_result,
)
from megatron_medllm.bench.synthetic import with_synthetic_data
from megatron_medllm.config.run import RunConfig
from megatron_medllm.config.train import RpoConfig
from megatron_medllm.errors import UserError
from megatron_medllm.parallel import mcore, runtime
from megatron_medllm.planner.from_config import workload_of
from megatron_medllm.train.one_step import StepResult, run_step
from megatron_medllm.train.scoring import score_run_pairs
from megatron_medllm.train.setup import Trainer, build_trainer
from megatron_medllm.train.throughput import StepClock


def measure(run: RunConfig, settings: BenchSettings) -> Path:
    """Measure `run.stage` on the ranks that are here, and write OUTPUT/throughput.json. Collective.

    Returns:
        the path of the JSON file.

    Raises:
        UserError: too little data for the steps asked for, or synthetic data that do not fit the rows.
    """
    ranks = runtime.start(run.layout, seed=run.seed)
    try:
        if settings.synthetic is not None:
            run = with_synthetic_data(
                run, settings.output / "synthetic", settings.synthetic, steps=settings.all_steps, ranks=ranks
            )
            config = run.stage_config()
            if isinstance(config, RpoConfig) and config.loss.needs_reference:
                score_run_pairs(run, config, ranks)
                free_device_memory()  # of the reference
        trainer = build_trainer(run.model_copy(update={"output": settings.output / "work"}), ranks)
        try:
            return _measure_training(run, settings, trainer)
        finally:
            mcore.release(trainer.chunks)
    finally:
        runtime.stop()


@dataclass(frozen=True)
class _Step:
    """One optimizer step, as the loop runs it."""

    clock: StepClock
    seconds: float
    result: StepResult


def _measure_training(run: RunConfig, settings: BenchSettings, trainer: Trainer) -> Path:
    require_steps(trainer.step.total_steps, settings)
    window_ends = settings.warmup_steps + settings.steps
    steps = measured_window(
        lambda index: _run(trainer, index, wait=index + 1 >= window_ends), settings, trainer.runtime.device
    )
    return write_model_result(
        "throughput", run, settings, [_measured(trainer, step) for step in steps], trainer.runtime
    )


def _run(trainer: Trainer, index: int, *, wait: bool) -> _Step:
    """A step right behind the one before, as in training: only the window's last, and a profiled one, is waited for."""
    clock = StepClock()
    result = run_step(trainer, index, clock)
    if wait and trainer.runtime.device.type == "cuda":
        torch.cuda.synchronize()
    return _Step(clock, clock.seconds(), result)


def _measured(trainer: Trainer, done: _Step) -> Measured:
    """A step's figures; one without an update is no measurement."""
    if done.result.problem is not None:
        raise UserError(f"a step was not measured: {done.result.problem}")
    step, metrics = trainer.step, done.result.metrics
    work = total_work([local_work(m, unit=step.unit) for m in done.result.micro_batches], trainer.runtime)
    pairs = {"pairs": metrics["pairs"]} if step.unit == "pairs" else {}
    return Measured(
        seconds=done.seconds,
        parts=done.clock.parts,
        tokens=work.tokens,
        padding=work.padding,
        counts={"loss_tokens": work.loss_tokens, **pairs},
        flops=both_flops(workload_of(trainer.run), work, forward_only=False),
        loss=metrics["loss"],
    )
