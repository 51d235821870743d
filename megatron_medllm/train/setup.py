"""Builds what a training run is made of, from its configuration."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from megatron_medllm.checkpoint.description import describe_checkpoint
from megatron_medllm.checkpoint.hf_reader import load_hf_weights
from megatron_medllm.checkpoint.peft_adapter import load_adapter, read_peft
from megatron_medllm.config.model import ModelShape
from megatron_medllm.config.run import RunConfig
from megatron_medllm.config.train import AdapterConfig, CptConfig, Fp8Recipe, RpoConfig
from megatron_medllm.corpus.blend import read_blend
from megatron_medllm.corpus.tokenizer import describe_tokenizer
from megatron_medllm.errors import UserError
from megatron_medllm.models.adapters import add_adapters
from megatron_medllm.models.qwen25 import DTYPES, build_model, initialize_weights, unwrap
from megatron_medllm.parallel import mcore
from megatron_medllm.parallel.runtime import Runtime
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


def build_chunks(
    run: RunConfig, runtime: Runtime, *, adapter: AdapterConfig | None, fp8: Fp8Recipe | None
) -> list[nn.Module]:
    """This rank's model chunks with their starting weights: read from `model.path`, or random.

    A base that will be held in FP8 or NF4 is built and read on the CPU, as it may fit the device only quantized.
    Random numbers are drawn on the device.
    """
    base = "bf16" if adapter is None else adapter.base
    chunks = build_model(
        run.model,
        run.layout,
        device=runtime.device if base == "bf16" else torch.device("cpu"),
        fp8=fp8,
        fp8_weights=base == "fp8",
    )
    tp = {"tp_rank": runtime.tp_rank, "tp_size": run.layout.tp}
    if run.model.path is not None:
        load_hf_weights(chunks, run.model.path, run.model.resolve_shape(), **tp)
    else:
        initialize_weights(chunks, seed=run.seed, device=runtime.device, **tp)
    if adapter is not None:
        _add_adapter(chunks, run, adapter, device=runtime.device, **tp)
    return chunks


def _add_adapter(
    chunks: list[nn.Module], run: RunConfig, config: AdapterConfig, *, device: torch.device, tp_rank: int, tp_size: int
) -> None:
    start = read_peft(config.path, run.model.resolve_shape()) if config.path is not None else None
    bare = [unwrap(chunk) for chunk in chunks]
    add_adapters(bare, config, seed=run.seed, tp_rank=tp_rank, tp_size=tp_size, device=device)
    if start is not None:
        load_adapter(chunks, start, tp_rank=tp_rank, tp_size=tp_size)


def resolve_adapter(config: AdapterConfig | None, shape: ModelShape) -> AdapterConfig | None:
    """The adapter as it will be: rank, alpha and targets are those of the PEFT adapter it starts from, if any.

    Raises:
        UserError: that is not a plain LoRA adapter of this model.
    """
    if config is None or config.path is None:
        return config
    start = read_peft(config.path, shape).config
    return config.model_copy(update={"rank": start.rank, "alpha": start.alpha, "targets": start.targets})


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


def refuse_random_reference(run: RunConfig) -> None:
    """Raises UserError where the reference would be random weights: right for a benchmark, no model to stay near."""
    if run.model.path is None:
        raise UserError("model.path: the reference must be a model directory, not random weights")


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
        from megatron_medllm.train.rpo_step import RpoStep

        step = RpoStep(run, config, runtime)
    else:
        from megatron_medllm.train.cpt_step import CptStep

        step = CptStep(run, config, runtime, output_dir=output_dir)
        identity["rows"] = step.rows_digest
    identity["total_steps"] = step.total_steps
    chunks = build_chunks(run, runtime, adapter=adapter, fp8=config.fp8_gemms)
    mcore_config = unwrap(chunks[0]).config
    identity["ffn_hidden_size"] = mcore_config.ffn_hidden_size  # as padded for FP8: with tp, unless ffn_multiple is set
    chunks = mcore.wrap_ddp(chunks, mcore_config, run.layout)
    optimizer = mcore.build_optimizer(chunks, mcore_config, config.optimizer, run.layout)

    def describe(checkpoint: Path) -> None:
        stored = adapter and adapter.model_copy(update={"path": None})
        source_dir = run.tokenizer_dir()
        describe_checkpoint(checkpoint, shape, dtype=DTYPES[run.model.dtype], source_dir=source_dir, adapter=stored)

    return Trainer(
        run=run,
        config=config,
        runtime=runtime,
        chunks=chunks,
        optimizer=optimizer,
        step=step,
        checkpoints=Checkpoints(
            output_dir / "checkpoints", config.checkpoint, runtime, identity=identity, describe=describe
        ),
    )
