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
from megatron_medllm.models.gpt import global_parameters, unwrap
from megatron_medllm.parallel import runtime
from megatron_medllm.parallel.gradients import reduced_gradients
from megatron_medllm.parallel.overlap import gather_parameters
from megatron_medllm.train.one_step import run_step
from megatron_medllm.train.scoring import load_run_pairs, reference_key, score_run_pairs
from megatron_medllm.train.setup import Trainer, build_trainer
from megatron_medllm.train.throughput import StepClock

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
    # Weights are read behind the save and the export, which must see to current ones by themselves.
    found["initial"], found["steps"], found["weights"] = parameters(trainer), [], {}
    for step in range(first, STEPS):
        found["steps"].append(_step(trainer, step))
        if step + 1 == SAVED_AFTER:
            trainer.checkpoints.save(SAVED_AFTER, trainer.chunks, trainer.optimizer, wait=False)
            found["weights"][SAVED_AFTER] = parameters(trainer)
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
    found["weights"][STEPS] = parameters(trainer)
    torch.save(found, out / f"rank-{ranks.rank}.pt")
    dist.barrier()


def _step(trainer: Trainer, step: int) -> dict[str, Any]:
    """One step of training: its metrics, what it consumed, and its gradients before clipping."""
    gradients: dict[torch.nn.Parameter, Tensor] = {}

    def look(step: int, loss: float) -> None:
        gradients.update(reduced_gradients(trainer.chunks))

    result = run_step(trainer, step, StepClock(), veto=look)
    if result.problem is not None:
        raise RuntimeError(f"step {step + 1} did not update the weights: {result.problem}")
    names = {id(p): name for chunk in trainer.chunks for name, p in global_parameters(unwrap(chunk))}
    return {
        "metrics": result.metrics,
        "consumed": trainer.step.consumed(step),
        "gradients": {names[id(parameter)]: gradient for parameter, gradient in gradients.items()},
    }


def parameters(trainer: Trainer) -> dict[str, Tensor]:
    """This rank's slices of what trains, under global names. Collective where gathers overlap."""
    gather_parameters(trainer.chunks)
    return {
        name: parameter.detach().float().clone()
        for chunk in trainer.chunks
        for name, parameter in global_parameters(unwrap(chunk))
        if parameter.requires_grad
    }
