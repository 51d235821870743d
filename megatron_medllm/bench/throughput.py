"""`medllm bench throughput`: how fast a stage trains here.

The measured window does what training does: data, forward and backward through the pipeline schedule, gradient
reduction, clipping, optimizer. Checkpoints, validation and logging are left out. The algorithm's own checks are not:
RPO refuses a first step whose margin over its reference is not 0.
"""

from pathlib import Path

import torch.distributed as dist

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
from megatron_medllm.train.one_step import run_step
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


def _measure_training(run: RunConfig, settings: BenchSettings, trainer: Trainer) -> Path:
    require_steps(trainer.step.total_steps, settings)
    ranks = trainer.runtime
    rows = measured_window(lambda index: _step(trainer, index), settings, ranks.device)
    return write_model_result("throughput", run, settings, rows, ranks)


def _step(trainer: Trainer, index: int) -> Measured:
    """One optimizer step, as the loop runs it; a step without an update is no measurement."""
    dist.barrier()
    clock = StepClock()
    done = run_step(trainer, index, clock)
    seconds = clock.seconds()
    if done.problem is not None:
        raise UserError(f"step {index + 1} was not measured: {done.problem}")
    step, ranks = trainer.step, trainer.runtime
    work = total_work([local_work(m, unit=step.unit) for m in done.micro_batches], ranks)
    pairs = {"pairs": done.metrics["pairs"]} if step.unit == "pairs" else {}
    return Measured(
        seconds=seconds,
        parts=clock.parts,
        tokens=work.tokens,
        padding=work.padding,
        counts={"loss_tokens": work.loss_tokens, **pairs},
        flops=both_flops(workload_of(trainer.run), work, forward_only=False),
        loss=done.metrics["loss"],
    )
