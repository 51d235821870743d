"""The model that a run starts from: its chunks on this rank, with weights and adapters."""

import torch
from torch import nn

from megatron_medllm.checkpoint.hf_reader import hf_values
from megatron_medllm.checkpoint.peft_adapter import load_adapter, read_peft
from megatron_medllm.config.model import ModelShape
from megatron_medllm.config.run import RunConfig
from megatron_medllm.config.train import AdapterConfig, Fp8Recipe
from megatron_medllm.errors import UserError
from megatron_medllm.models.adapters import add_adapters
from megatron_medllm.models.attention_choice import choose_attention
from megatron_medllm.models.gpt import build_model, unwrap
from megatron_medllm.models.initialize import random_values
from megatron_medllm.models.materialize import Fill, fill_parameters
from megatron_medllm.models.mlp import choose_swiglu
from megatron_medllm.parallel.runtime import Runtime


def build_chunks(
    run: RunConfig, runtime: Runtime, *, adapter: AdapterConfig | None, fp8: Fp8Recipe | None
) -> list[nn.Module]:
    """This rank's model chunks with their starting weights: read from `model.path`, or random, drawn on the device.

    A base that will be held in FP8 or NF4 may fit the device, and the host, only so: it is built without storage, and
    each layer is filled on the device and quantized before the next.
    """
    base = "bf16" if adapter is None else adapter.base
    in_parts = base != "bf16"
    chunks = build_model(
        run.model,
        run.layout,
        device=torch.device("meta") if in_parts else runtime.device,
        fp8=fp8,
        fp8_weights=base == "fp8",
    )
    fill = _starting_values(run, runtime, dtype=next(chunks[0].parameters()).dtype)
    if not in_parts:
        fill_parameters(chunks, fill)
    if adapter is not None:
        _add_adapter(chunks, run, runtime, adapter, fill=fill if in_parts else None)
    if in_parts and runtime.device.type == "cuda":
        torch.cuda.empty_cache()  # what the layers' unquantized numbers took
    choose_attention(chunks, run.kernels.attention, runtime.device)
    choose_swiglu(chunks, run.kernels.swiglu, runtime.device, run.model)
    return chunks


def _starting_values(run: RunConfig, runtime: Runtime, *, dtype: torch.dtype) -> Fill:
    if run.model.path is None:
        return random_values(seed=run.seed, tp_rank=runtime.tp_rank, tp_size=run.layout.tp, device=runtime.device)
    shape = run.model.resolve_shape()
    return hf_values(run.model.path, shape, dtype=dtype, tp_rank=runtime.tp_rank, tp_size=run.layout.tp)


def _add_adapter(
    chunks: list[nn.Module], run: RunConfig, runtime: Runtime, config: AdapterConfig, *, fill: Fill | None
) -> None:
    start = read_peft(config.path, run.model.resolve_shape()) if config.path is not None else None
    tp = {"tp_rank": runtime.tp_rank, "tp_size": run.layout.tp}
    add_adapters(
        map(unwrap, chunks), config, seed=run.seed, device=runtime.device, fill=fill, products=run.kernels.lora, **tp
    )
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
