"""The model that a run starts from: its chunks on this rank, with weights and adapters."""

import torch
from torch import nn

from megatron_medllm.checkpoint.hf_reader import load_hf_weights
from megatron_medllm.checkpoint.peft_adapter import load_adapter, read_peft
from megatron_medllm.config.model import ModelShape
from megatron_medllm.config.run import RunConfig
from megatron_medllm.config.train import AdapterConfig, Fp8Recipe
from megatron_medllm.errors import UserError
from megatron_medllm.models.adapters import add_adapters
from megatron_medllm.models.initialize import initialize_weights
from megatron_medllm.models.qwen25 import build_model, unwrap
from megatron_medllm.parallel.runtime import Runtime


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
    tp = {"tp_rank": tp_rank, "tp_size": tp_size}
    add_adapters(bare, config, seed=run.seed, device=device, products=run.kernels.lora, **tp)
    if start is not None:
        load_adapter(chunks, start, **tp)


def resolve_adapter(config: AdapterConfig | None, shape: ModelShape) -> AdapterConfig | None:
    """The adapter as it will be: rank, alpha and targets are those of the PEFT adapter it starts from, if any.

    Raises:
        UserError: that is not a plain LoRA adapter of this model.
    """
    if config is None or config.path is None:
        return config
    start = read_peft(config.path, shape).config
    return config.model_copy(update={"rank": start.rank, "alpha": start.alpha, "targets": start.targets})


def refuse_random_reference(run: RunConfig) -> None:
    """Raises UserError where the reference would be random weights: right for a benchmark, no model to stay near."""
    if run.model.path is None:
        raise UserError("model.path: the reference must be a model directory, not random weights")
