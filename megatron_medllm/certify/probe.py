"""What every process of a certificate does: train a few steps as the trainer does, and leave what it saw."""

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_medllm.certify.shrink import SAVED_AFTER, STEPS
from megatron_medllm.checkpoint.hf_writer import export_hf
from megatron_medllm.config.run import RunConfig
from megatron_medllm.config.train import RpoConfig
from megatron_medllm.data.reference import ReferenceCache
from megatron_medllm.models.qwen25 import global_parameters, unwrap
from megatron_medllm.parallel import mcore, runtime
from megatron_medllm.parallel.gradients import reduced_gradients
from megatron_medllm.parallel.reduce import sum_metrics
from megatron_medllm.train.schedule import learning_rate
from megatron_medllm.train.scoring import load_run_pairs, reference_key, score_run_pairs
from megatron_medllm.train.setup import Trainer, build_trainer

TIMEOUT_S = 60.0


def train_and_record(run: RunConfig, out: Path, *, resume_from: Path | None) -> None:
    """Train STEPS steps, save after SAVED_AFTER of them, export; or load such a save and take the last step alone.

    Leaves OUT/rank-R.pt, and as the main process the checkpoint and the export in the run's folder.
    """
    logging.getLogger("megatron").setLevel(logging.ERROR)
    ranks = runtime.start(run.layout, seed=run.seed, timeout_s=TIMEOUT_S)
    config = run.stage_config()
    found: dict[str, Any] = {"place": (ranks.tp_rank, ranks.pp_rank, ranks.dp_rank, ranks.cp_rank)}
    if isinstance(config, RpoConfig) and config.loss.needs_reference:
        score_run_pairs(run, config, ranks)
        dist.barrier()  # the main process writes the cache
        pairs = load_run_pairs(run, config)
        cache = ReferenceCache(config.reference or run.run_dir / "reference")
        found["reference"] = cache.load(reference_key(run, config, pairs), [pair.row for pair in pairs.pairs])
    trainer = build_trainer(run, ranks)
    first = 0
    if resume_from is not None:
        first = trainer.checkpoints.load(resume_from, trainer.chunks, trainer.optimizer)
    found["first"], found["initial"] = first, parameters(trainer)
    found["steps"] = []
    for step in range(first, STEPS):
        found["steps"].append(_step(trainer, step))
        if step + 1 == SAVED_AFTER:
            trainer.checkpoints.save(SAVED_AFTER, trainer.chunks, trainer.optimizer, wait=False)
        trainer.checkpoints.poll()
    if not trainer.checkpoints.finish():
        raise RuntimeError("the checkpoint could not be written")
    if resume_from is None:
        export_hf(
            trainer.chunks,
            run.model.resolve_shape(),
            run.output_dir() / "hf",
            runtime=ranks,
            source_dir=run.tokenizer_dir(),
            dtype=torch.float32,
        )
    torch.save(found, out / f"rank-{ranks.rank}.pt")
    dist.barrier()


def _step(trainer: Trainer, step: int) -> dict[str, Any]:
    """One step of training; its metrics, gradients before clipping, and weights behind it."""
    config, step_object = trainer.config, trainer.step
    for group in trainer.optimizer.param_groups:
        group["lr"] = learning_rate(step, total_steps=step_object.total_steps, config=config.optimizer)
    torch.manual_seed(trainer.run.seed * 1_000_003 + step)
    for chunk in trainer.chunks:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    parts = mcore.run_micro_batches(
        step_object.forward,
        trainer.chunks,
        step_object.micro_batches(step),
        stream_length=step_object.stream_length,
    )
    metrics = step_object.summarize(sum_metrics(parts, step_object.metric_names, trainer.runtime))
    gradients = reduced_gradients(trainer.chunks)
    _, metrics["grad_norm"] = mcore.clip_and_step(trainer.optimizer, clip_grad=config.optimizer.clip_grad)
    step_object.check(step, metrics)
    names = {id(p): name for chunk in trainer.chunks for name, p in global_parameters(unwrap(chunk))}
    return {
        "metrics": metrics,
        "consumed": step_object.consumed(step),
        "gradients": {names[id(parameter)]: gradient for parameter, gradient in gradients.items()},
        "weights": parameters(trainer),
    }


def parameters(trainer: Trainer) -> dict[str, Tensor]:
    """This rank's slices of what trains, under global names. Collective where gathers overlap."""
    return {
        name: parameter.detach().float().clone()
        for chunk in trainer.chunks
        for name, parameter in global_parameters(unwrap(chunk))
        if parameter.requires_grad
    }
