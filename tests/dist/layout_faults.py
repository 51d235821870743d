"""Faults of tensor, data, pipeline and context parallelism."""

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from itertools import chain
from typing import Any
from unittest.mock import patch

from tests.dist.fault_table import CP, DP, LORA, PP, SP, TP, fault, wrap

# ---- tensor parallelism


@fault("a row-parallel layer's output is not summed over the ranks", TP, "losses")
def no_row_all_reduce():
    from megatron.core.tensor_parallel import layers

    return patch.object(layers, "reduce_from_tensor_model_parallel_region", lambda x, group=None: x)


@fault("the head's d hidden is not summed over the vocabulary's slices", TP, "gradients, step 1")
def no_head_all_reduce():
    from megatron_medllm.models.gpt import tensor_parallel

    return patch.object(tensor_parallel, "copy_to_tensor_model_parallel_region", lambda x, group=None: x)


@fault("q, k and v are laid out whole behind one another, not group by group", {}, "transformers: losses")
def qkv_order():
    from megatron_medllm.checkpoint import names

    def whole(weight: Any, shape: Any) -> list:
        axis = weight.axis or 0
        return [names.HFSlice(hf, 0, names.hf_shape(hf, shape)[axis]) for hf in weight.hf]

    return patch.object(names, "_qkv_block", whole)


@fault("gate and up are split as one block over the ranks", TP, "losses")
def gate_up_order():
    from megatron_medllm.checkpoint import names

    return wrap(
        names,
        "_blocks",
        lambda original: (
            lambda weight, shape: (
                [list(chain.from_iterable(original(weight, shape)))]
                if weight.fuse == "gate_up"
                else original(weight, shape)
            )
        ),
    )


@fault("norms are not marked as sequence-parallel", SP, "gradients, step 1")
def unmarked_norm():
    from megatron_medllm.models.layer_spec import RMSNorm

    def make(original: Callable) -> Callable:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            self.weight.sequence_parallel = False

        return init

    return wrap(RMSNorm, "__init__", make)


@fault("a head norm's gradient is of each rank's own heads", TP, "gradients, step 1", family="qwen3")
def head_norms_not_reduced():
    from importlib import import_module

    module = import_module("megatron.core.distributed.finalize_model_grads")  # the package shows its function
    return patch.object(module, "_allreduce_non_tensor_model_parallel_grads", lambda *args, **kwargs: None)


@fault("the second rank's slice of the vocabulary starts one word early", TP, "losses")
def vocabulary_offset():
    from megatron_medllm.models import gpt

    def make(original: Callable) -> Callable:
        return lambda *args, vocab_start, **more: original(*args, vocab_start=max(vocab_start - 1, 0), **more)

    return wrap(gpt, "fused_linear_logprob", make)


@fault("split weights are not marked: the norm counts the first rank's slice", TP, "gradient norms")
def unmarked_split():
    from megatron_medllm.models import gpt

    return patch.object(gpt, "_mark_split_weights", lambda model: None)


@fault("an adapter's replicated half is not reduced over the ranks' slices of the sequence", SP, "gradients, step 3",
       section=LORA)  # fmt: skip
def lora_half_not_reduced():
    from megatron_medllm.models.adapters import AdaptedLinear

    def make(original: Callable) -> Callable:
        def half(self: Any, *args: Any, **kwargs: Any) -> Any:
            made = original(self, *args, **kwargs)
            made.sequence_parallel = False
            return made

        return half

    return wrap(AdaptedLinear, "_half", make)


# ---- data parallelism


@fault("gradients are not summed over the replicas", DP, "gradients, step 1")
def no_gradient_all_reduce():
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

    nothing = {"start_grad_sync": lambda self, *_, **__: None, "finish_grad_sync": lambda self, *_, **__: None}
    return patch.multiple(_ParamAndGradBucketGroup, **nothing)


@fault("gradients are divided by the number of replicas once more", DP, "gradients, step 1")
def factor_of_dp():
    from megatron_medllm.parallel import mcore

    def make(original: Callable) -> Callable:
        def finalize(model: list, *args: Any, **kwargs: Any) -> None:
            original(model, *args, **kwargs)
            for chunk in model:
                chunk.scale_gradients(1 / chunk.dp_cp_group.size())

        return finalize

    return wrap(mcore, "finalize_model_grads", make)


@fault("gradients are divided by each replica's own count of tokens", DP, "gradients, step 1")
def local_counts():
    from megatron_medllm.parallel import mcore

    def make(original: Callable) -> Callable:
        def finalize(model: list, num_tokens: Any, *args: Any, **kwargs: Any) -> None:
            for chunk in model:
                chunk.scale_gradients(1.0 / (num_tokens * chunk.dp_cp_group.size()))
            original(model, None, *args, **kwargs)

        return finalize

    return wrap(mcore, "finalize_model_grads", make)


@fault("saves and exports do not wait for updated weights", DP, "copies of a weight on several ranks")
def stale_gather():
    from megatron.core.distributed import DistributedDataParallel

    return patch.object(DistributedDataParallel, "start_param_sync", lambda self, *args, **kwargs: None)


@fault("every replica leaves out its last micro-batch", DP, "transformers: losses")
def dropped_micro_batch():
    from megatron_medllm.data.microbatch import blank
    from megatron_medllm.train.cpt_step import CptStep

    def make(original: Callable) -> Callable:
        def micro_batches(self: Any, step: int) -> list:
            found = original(self, step)
            return [*found[:-1], blank(len(found[-1].tokens))]

        return micro_batches

    return wrap(CptStep, "micro_batches", make)


@fault("adapters are drawn from another seed on every replica", DP, "gradients, step 1",
       section=LORA)  # fmt: skip
def seeds_differ():
    from megatron_medllm.models import adapters

    def make(original: Callable) -> Callable:
        return lambda *args, seed, **more: original(*args, seed=seed + int(os.environ["RANK"]), **more)

    return wrap(adapters, "_draw_a", make)


# ---- pipeline parallelism


@fault("the tied embedding's two gradients are not summed", PP, "gradients, step 1", tied=True)
def tied_embedding():
    from megatron.core.distributed import finalize_model_grads as module

    return patch.object(sys.modules[module.__module__], "_allreduce_word_embedding_grads", lambda *_, **__: None)


@fault("the norm counts the tied embedding on both stages", PP, "gradient norms", tied=True)
def tied_counted_twice():
    from megatron.core.optimizer import optimizer

    return patch.object(optimizer, "param_is_not_shared", lambda parameter: True)


@fault("a stage's chunks hold each other's layers", {"pp": 2, "vpp": 2}, "losses")
def chunk_order():
    from megatron.core.transformer import transformer_block as block
    from megatron.core.transformer import transformer_layer as layer

    def make(original: Callable) -> Callable:
        return lambda config, vp_stage=None, pp_rank=None: original(
            config, 1 - vp_stage if vp_stage is not None else None, pp_rank
        )

    stack = ExitStack()
    stack.enter_context(wrap(layer, "get_transformer_layer_offset", make))
    stack.enter_context(wrap(block, "get_transformer_layer_offset", make))
    return stack


# ---- context parallelism


@fault("late chunks of the gathered keys lie in the ranks' order, not the stream's", CP, "losses")
def chunk_order_cp():
    from megatron_medllm.models import attention

    def gather(local: Any, group: Any) -> Any:
        import torch
        from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

        parts = gather_from_sequence_parallel_region(local, group=group)
        early, late = parts.unflatten(0, (group.size(), 2, -1)).unbind(1)
        return torch.cat((early, late)).flatten(0, 1)

    return patch.object(attention, "gather_stream", gather)


@fault("the gradients of gathered keys and values are not summed over the ranks", CP, "gradients, step 1")
def keys_not_summed():
    from megatron.core.tensor_parallel import mappings

    from megatron_medllm.models import attention

    original = attention.gather_stream

    def gather(local: Any, group: Any) -> Any:
        plain = mappings.gather_from_sequence_parallel_region

        def without(x: Any, group: Any) -> Any:
            return plain(x, tensor_parallel_output_grad=False, group=group)

        with patch.object(mappings, "gather_from_sequence_parallel_region", without):
            return original(local, group)

    return patch.object(attention, "gather_stream", gather)


@fault("the gradient of a response's sum is summed over the context ranks again", CP, "gradients, step 1", stage="rpo")
def response_sum_twice():
    from megatron_medllm.train import response_sums

    def summed(part: Any, group: Any) -> Any:
        from megatron.core.tensor_parallel.mappings import (
            copy_to_tensor_model_parallel_region,
            reduce_from_tensor_model_parallel_region,
        )

        whole = reduce_from_tensor_model_parallel_region(part, group=group)
        return copy_to_tensor_model_parallel_region(whole, group=group)

    return patch.object(response_sums, "sum_over_context", summed)


@fault("positions of a rank's second chunk are off by one", CP, "transformers: losses")
def positions_off_by_one():
    from megatron_medllm.parallel.packed import PackedSequences

    def make(original: Callable) -> Callable:
        def from_segments(segments: Any, position_ids: Any, **more: Any) -> Any:
            position_ids[len(position_ids) // 2 :] += 1
            return original(segments, position_ids, **more)

        return from_segments

    return wrap(PackedSequences, "from_segments", make)
