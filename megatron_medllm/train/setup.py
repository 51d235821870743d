"""Builds what a training run is made of, from its configuration."""

import logging
from dataclasses import dataclass
from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from megatron_medllm.checkpoint.hf_reader import load_hf_weights
from megatron_medllm.config.run import RunConfig
from megatron_medllm.config.train import AdapterConfig, CptConfig, RpoConfig
from megatron_medllm.models.qwen25 import build_model, initialize_weights, unwrap
from megatron_medllm.parallel import mcore
from megatron_medllm.parallel.runtime import Runtime
from megatron_medllm.train.state import Checkpoints
from megatron_medllm.train.step import Step

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trainer:
    """A run that is ready to train."""

    run: RunConfig
    config: CptConfig | RpoConfig
    runtime: Runtime
    chunks: list[nn.Module]
    optimizer: MegatronOptimizer
    step: Step
    checkpoints: Checkpoints
    identity: dict[str, Any]


def build_chunks(run: RunConfig, runtime: Runtime, *, adapter: AdapterConfig | None) -> list[nn.Module]:
    """This rank's model chunks with their starting weights: read from `model.path`, or random."""
    chunks = build_model(run.model, run.layout, device=runtime.device)
    tp = {"tp_rank": runtime.tp_rank, "tp_size": run.layout.tp}
    if run.model.path is not None:
        load_hf_weights(chunks, run.model.path, run.model.resolve_shape(), **tp)
    else:
        initialize_weights(chunks, seed=run.seed, **tp)
    if adapter is not None:
        from megatron_medllm.models.adapters import add_adapters

        add_adapters([unwrap(chunk) for chunk in chunks], adapter, seed=run.seed, **tp)
    return chunks


def build_trainer(run: RunConfig, runtime: Runtime) -> Trainer:
    """Model, optimizer, data and state of `run.stage`. Collective.

    Raises:
        UserError: data, model, layout and batch do not fit each other; told before any step.
    """
    config = run.stage_config()
    output_dir = run.output_dir()
    step: Step
    if isinstance(config, RpoConfig):
        from megatron_medllm.train.rpo_step import RpoStep

        step = RpoStep(run, config, runtime)
    else:
        from megatron_medllm.train.cpt_step import CptStep

        step = CptStep(run, config, runtime, output_dir=output_dir)
    chunks = build_chunks(run, runtime, adapter=config.adapter)
    mcore_config = unwrap(chunks[0]).config
    chunks = mcore.wrap_ddp(chunks, mcore_config, run.layout)
    optimizer = mcore.build_optimizer(chunks, mcore_config, config.optimizer, run.layout)
    identity = {"stage": run.stage, "shape": run.model.resolve_shape().model_dump(), "total_steps": step.total_steps}
    return Trainer(
        run=run,
        config=config,
        runtime=runtime,
        chunks=chunks,
        optimizer=optimizer,
        step=step,
        checkpoints=Checkpoints(output_dir / "checkpoints", config.checkpoint, runtime),
        identity=identity,
    )
