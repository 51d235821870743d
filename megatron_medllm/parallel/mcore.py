"""Every call that depends on Megatron-Core's version: DDP, optimizer, pipeline schedule, distributed checkpoints."""

import functools
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    load_sharded_metadata,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as McoreOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.train import OptimizerConfig
from megatron_medllm.errors import UserError
from megatron_medllm.parallel import foreach
from megatron_medllm.parallel.adam import FusedAdam
from megatron_medllm.parallel.bucket_padding import mend_saved_state
from megatron_medllm.parallel.overlap import gather_parameters, overlaps
from megatron_medllm.parallel.shards import LocalState, divide_state, is_written_here, optimizer_state

# (model chunk, micro-batch) -> (the chunk's output, its loss function)
ForwardStep = Callable[[Iterator[Any], nn.Module], tuple[Tensor, Callable]]


def mlp_submodule(mlp: type[MLP], submodules: MLPSubmodules) -> Any:
    """A layer's MLP as the installed version wants to be told of it.

    From 0.18 on that is the class's own constructor for it. A spec of `MLP` is rewrapped there, with a warning a layer;
    one of a subclass of it is called with arguments that it does not take.
    """
    if hasattr(mlp, "as_mlp_submodule"):
        return functools.partial(mlp.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=mlp, submodules=submodules)


# What 0.19 warns of wherever it is used so; docs/megatron-versions.md says what it means here.
_KNOWN_WARNINGS = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
}


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_KNOWN_WARNINGS[record.name])


def hush_known_warnings() -> None:
    """Keep them out of users' logs; everything else that Megatron-Core says passes."""
    for name in _KNOWN_WARNINGS:
        logging.getLogger(name).addFilter(_is_news)


def wrap_ddp(chunks: list[nn.Module], config: TransformerConfig, layout: LayoutConfig) -> list[nn.Module]:
    """Megatron's data parallelism around each chunk: fp32 gradient buffers, overlapped as the layout says."""
    overlapped = overlaps(layout, next(chunks[0].parameters()).device.type)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlapped.grad_reduce,
        overlap_param_gather=overlapped.param_gather,
        align_param_gather=overlapped.param_gather and layout.vpp > 1,  # the schedule starts those gathers
        bucket_size=layout.bucket_size,
        use_distributed_optimizer=layout.distributed_optimizer,
        check_for_nan_in_grad=False,  # the loop skips such a step; upstream's check would end the process
    )
    return [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def release(chunks: list[nn.Module]) -> None:
    """Empty DDP's wrappers, which must not be used afterwards.

    Autograd holds their gradient hooks, and through them the model and every process group, where the garbage collector
    cannot see it: the groups' threads would outlive their runtime.
    """
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel):
            vars(chunk).clear()


def build_optimizer(
    chunks: list[nn.Module],
    config: TransformerConfig,
    optimizer: OptimizerConfig,
    layout: LayoutConfig,
    *,
    helpers: foreach.Choice = "auto",
) -> MegatronOptimizer:
    """AdamW over the chunks' trainable parameters; hooks Megatron's schedules up with it and with DDP.

    Args:
        chunks: this rank's, inside DDP.
        config: Megatron's, which is given the hooks.
        optimizer: rates and moments.
        layout: whether the optimizer's state is spread, and how it overlaps.
        helpers: `kernels.optimizer`.

    Raises:
        UserError: bf16 moments where apex brings the optimizer.
    """
    ddp_config: DistributedDataParallelConfig = vars(chunks[0])["ddp_config"]
    moments = torch.bfloat16 if optimizer.moments_dtype == "bfloat16" else torch.float32
    te_moments = moments if HAVE_TE and torch.cuda.is_available() else torch.float32
    built = get_megatron_optimizer(
        McoreOptimizerConfig(
            optimizer="adam",
            lr=optimizer.lr,
            min_lr=optimizer.lr * optimizer.min_lr_ratio,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.betas[0],
            adam_beta2=optimizer.betas[1],
            adam_eps=optimizer.eps,
            clip_grad=optimizer.clip_grad,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_param_gather=ddp_config.overlap_param_gather,
            use_precision_aware_optimizer=te_moments is not torch.float32,
            exp_avg_dtype=te_moments,
            exp_avg_sq_dtype=te_moments,
        ),
        chunks,
        use_gloo_process_groups=False,
    )
    if te_moments is not moments:
        _narrow_moments(built, moments)
    mend_saved_state(built)
    foreach.use(built, helpers)
    for group in built.param_groups:  # upstream leaves it to its own scheduler to spare norms and biases
        group["weight_decay"] = optimizer.weight_decay * group["wd_mult"]
    config.finalize_model_grads_func = _finalize_gradients
    config.grad_scale_func = built.scale_loss
    hooks = [(chunk.no_sync, chunk.start_grad_sync, chunk.start_param_sync) for chunk in chunks]
    no_sync, grad_sync, param_sync = zip(*hooks, strict=True)
    config.no_sync_func = list(no_sync) if len(chunks) > 1 else no_sync[0]
    if ddp_config.overlap_grad_reduce:
        config.grad_sync_func = list(grad_sync) if len(chunks) > 1 else grad_sync[0]
    if ddp_config.align_param_gather:  # interleaved stages; elsewhere the forward pre-hooks start every gather
        config.param_sync_func = list(param_sync)
    return built


def _narrow_moments(built: MegatronOptimizer, moments: torch.dtype) -> None:
    """Have our own Adam hold its moments so: of the others only Transformer Engine's can."""
    for leaf in foreach.leaves(built):
        if not isinstance(leaf.optimizer, FusedAdam):
            name = type(leaf.optimizer).__module__
            raise UserError(f"optimizer.moments_dtype=bfloat16: {name} keeps its moments in float32; use float32")
        leaf.optimizer.moments_dtype = moments


def run_micro_batches(
    forward_step: ForwardStep,
    chunks: list[nn.Module],
    micro_batches: list[Any],
    *,
    stream_length: int,
    forward_only: bool = False,
) -> list[dict]:
    """Run the pipeline schedule over one step's micro-batches.

    Gradients end up divided by the global sum of the counts that the loss functions return, whatever the micro-batch
    size, the data-parallel size or the packing.

    Returns:
        the loss functions' metrics, one a micro-batch; empty on all but the last pipeline stage.
    """
    iterators = [iter(micro_batches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=stream_length,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _data_parallel_group() -> torch.distributed.ProcessGroup:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def sharded_state(chunks: list[nn.Module], optimizer: MegatronOptimizer | None, *, is_loading: bool) -> dict[str, Any]:
    """What a checkpoint holds, as Megatron-Core's sharded tensors: any layout can read what any layout wrote.

    Of a partly frozen model (adapters) it holds what trains: the base is read from its own directory again. Collective.
    """
    gather_parameters(chunks)  # what is saved must be current; what is loaded must not be gathered over
    metadata = {"dp_cp_group": _data_parallel_group(), "distrib_optim_sharding_type": "fully_reshardable"}
    names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    state = {name: _chunk_state(chunk, metadata) for name, chunk in zip(names, chunks, strict=True)}
    if optimizer is not None:
        if is_loading:
            state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=True, metadata=metadata)
        else:
            state["optimizer"] = optimizer_state(optimizer, state, metadata)
    return state


def local_state(state: dict[str, Any]) -> LocalState:
    """What this process writes of a sharded state: data-parallel ranks divide it evenly. Collective."""
    return divide_state(state, _data_parallel_group())


def _chunk_state(chunk: nn.Module, metadata: dict[str, Any]) -> dict[str, Any]:
    state = _bare(chunk).sharded_state_dict(metadata=metadata)
    if not _is_partly_frozen(chunk):
        return state
    trained = {id(parameter) for parameter in chunk.parameters() if parameter.requires_grad}
    return {name: entry for name, entry in state.items() if id(entry.data) in trained}


def _bare(chunk: nn.Module) -> MegatronModule:
    """The model without its wrappers, which would put `module.` before every name in a checkpoint."""
    bare: Any = chunk
    while isinstance(bare, DistributedDataParallel | Float16Module):
        bare = bare.module
    return bare


def _is_partly_frozen(chunk: nn.Module) -> bool:
    return not all(parameter.requires_grad for parameter in chunk.parameters())


def written_bytes(state: dict[str, Any]) -> int:
    """Bytes of the tensors that this process will write; replicas count once over all processes."""
    tensors = [value for value in nested_values(state) if isinstance(value, ShardedTensor | ShardedTensorFactory)]
    return sum(entry.data.nbytes for entry in tensors if is_written_here(entry))


def require_same_optimizer(optimizer: MegatronOptimizer, directory: Path) -> None:
    """Refuse a checkpoint of the other optimizer, distributed or not: each stores what the other does not read.

    Raises:
        UserError: says which it was, and what to do.
    """
    leaves = list(foreach.leaves(optimizer))
    here = any(isinstance(leaf, DistributedOptimizer) for leaf in leaves)
    common = dist_checkpointing.load_common_state_dict(str(directory))["optimizer"]
    stored = "param_state_sharding_type" in common  # upstream's word for how the distributed one divided its state
    if len(leaves) == 1 and stored != here:
        raise UserError(
            f"{directory}: saved {'with' if stored else 'without'} the distributed optimizer, here it is "
            f"{'on' if here else 'off'}: resume with layout.distributed_optimizer={str(stored).lower()}, "
            "or begin a new run from its weights (medllm export, then model.path)"
        )


def load_sharded(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Fill a sharded state from a checkpoint, each data-parallel rank reading its part.

    What the checkpoint lacks of modules' `_extra_state` stays as it is: Transformer Engine's final norm has one, empty,
    and a checkpoint of the torch backend does not.
    """
    stored = load_sharded_metadata(str(directory))

    def known(entry: Any) -> Any:
        is_extra = isinstance(entry, ShardedObject) and entry.key.endswith("_extra_state")
        return LocalNonpersistentObject(entry.data) if is_extra and entry.unique_key not in stored else entry

    strategy = FullyParallelLoadStrategyWrapper(
        get_default_load_sharded_strategy(str(directory)), _data_parallel_group()
    )
    return dist_checkpointing.load(dict_list_map_outplace(known, state), str(directory), strategy)


def restore(chunks: list[nn.Module], optimizer: MegatronOptimizer | None, loaded: dict[str, Any]) -> None:
    """Put a loaded state back into model and optimizer."""
    for index, chunk in enumerate(chunks):
        # A frozen base is not in the checkpoint; that all else is there was checked when it was read.
        strict = not _is_partly_frozen(chunk)
        _bare(chunk).load_state_dict(loaded["model" if len(chunks) == 1 else f"model{index}"], strict=strict)
    if optimizer is not None:
        with torch.no_grad():  # upstream copies into fp32 parameters that require gradients
            optimizer.load_state_dict(loaded["optimizer"])


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """The global norm of the gradients, once `run_micro_batches` has reduced them. Waits for the device."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def clip_and_step(optimizer: MegatronOptimizer, *, norm: float, clip_grad: float) -> None:
    """Clip by the global norm and update the weights.

    Args:
        optimizer: as `gradient_norm` left it.
        norm: from there; a norm that is not finite would make every weight NaN.
        clip_grad: the largest norm that is let through; 0: any.

    Raises:
        ValueError: the norm is not finite.
    """
    if not math.isfinite(norm):
        raise ValueError(f"no step by a gradient norm of {norm}")
    for leaf in foreach.leaves(optimizer):
        parameters = leaf.get_parameters()
        if clip_grad > 0 and parameters:
            decoupled = leaf.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            clip_grad_by_total_norm_fp32(parameters, clip_grad, norm, decoupled)
    optimizer.step_with_ready_grads()


def _finalize_gradients(model: list[Any], num_tokens: Tensor | None = None, **settings: Any) -> None:
    """Upstream's, which would wait for the device to ask whether any token counted before it divides by them."""
    finalize_model_grads(model, None, **settings)
    if num_tokens is None:
        return
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    last_stage = torch.distributed.get_process_group_ranks(pipeline)[-1]
    torch.distributed.broadcast(num_tokens, src=last_stage, group=pipeline)
    torch.distributed.all_reduce(num_tokens, group=_data_parallel_group())
    for chunk in model:
        chunk.scale_gradients(1.0 / num_tokens.clamp(min=1))
