"""Builds what a training run is made of, from its configuration."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from megatron_medllm.checkpoint.description import describe_checkpoint
from megatron_medllm.checkpoint.torch_dist import CARRIED_DIR
from megatron_medllm.config.run import RunConfig
from megatron_medllm.config.train import CptConfig, RpoConfig
from megatron_medllm.corpus.blend import read_blend
from megatron_medllm.corpus.tokenizer import describe_tokenizer
from megatron_medllm.errors import UserError
from megatron_medllm.models.config import DTYPES
from megatron_medllm.models.gpt import unwrap
from megatron_medllm.parallel import mcore
from megatron_medllm.parallel.runtime import Runtime
from megatron_medllm.storage import write_json
from megatron_medllm.train.best import build_best
from megatron_medllm.train.cpt_step import CptStep
from megatron_medllm.train.model import build_chunks, refuse_random_reference, resolve_adapter
from megatron_medllm.train.rpo_step import RpoStep
from megatron_medllm.train.state import Checkpoints
from megatron_medllm.train.step import Step


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


def check_inputs(run: RunConfig) -> None:
    """Refuse what training would only trip over later: no tokenizer, data made with another one, no reference.

    Raises:
        UserError: names the two that do not go together.
    """
    config, tokenizer = run.stage_config(), run.tokenizer_file()
    if isinstance(config, RpoConfig):
        if config.loss.needs_reference:
            refuse_random_reference(run)
        return
    digest = describe_tokenizer(str(tokenizer)).digest
    for source in config.data:
        if read_blend(source.path).tokenizer_digest != digest:
            raise UserError(f"{source.path} was built with another tokenizer than {tokenizer}")


def write_end_token(hf_dir: Path, run: RunConfig, step: Step) -> None:
    """Add the generation settings of a model born here: its documents say how a text ends."""
    if run.model.path is None:
        write_json(hf_dir / "generation_config.json", {"eos_token_id": step.end_token_id})


def build_trainer(run: RunConfig, runtime: Runtime) -> Trainer:
    """Model, optimizer, data and state of `run.stage`. Collective.

    Raises:
        UserError: data, model, layout and batch do not fit each other; told before any step.
    """
    config, shape, output_dir = run.stage_config(), run.model.resolve_shape(), run.output_dir()
    adapter = resolve_adapter(config.adapter, shape)
    # What a checkpoint must agree in with the run that resumes from it; paths may differ.
    identity: dict[str, Any] = {
        "stage": run.stage,
        "seed": run.seed,
        "shape": shape.model_dump(),
        "adapter": adapter and adapter.model_dump(exclude={"path"}, mode="json"),
    }
    step: Step
    if isinstance(config, RpoConfig):
        step = rpo = RpoStep(run, config, runtime)
        identity["held_out"] = rpo.held_out_digest
    else:
        step = cpt = CptStep(run, config, runtime, output_dir=output_dir)
        identity["rows"] = cpt.rows_digest
    identity["total_steps"] = step.total_steps
    best = build_best(config, step)
    chunks = build_chunks(run, runtime, adapter=adapter, fp8=config.fp8_gemms)
    mcore_config = unwrap(chunks[0]).config
    identity["ffn_hidden_size"] = mcore_config.ffn_hidden_size  # as padded for FP8: with tp, unless ffn_multiple is set
    chunks = mcore.wrap_ddp(chunks, mcore_config, run.layout)
    optimizer = mcore.build_optimizer(chunks, mcore_config, config.optimizer, run.layout, helpers=run.kernels.optimizer)

    def describe(checkpoint: Path) -> None:
        stored = adapter and adapter.model_copy(update={"path": None})
        source_dir = run.tokenizer_dir()
        describe_checkpoint(checkpoint, shape, dtype=DTYPES[run.model.dtype], source_dir=source_dir, adapter=stored)
        write_end_token(checkpoint / CARRIED_DIR, run, step)

    return Trainer(
        run=run,
        config=config,
        runtime=runtime,
        chunks=chunks,
        optimizer=optimizer,
        step=step,
        checkpoints=Checkpoints(
            output_dir / "checkpoints", config.checkpoint, runtime, identity=identity, best=best, describe=describe
        ),
    )
