"""Faults of norm and clipping, documents and pairs, recomputation, saves and exports."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from tests.dist.fault_table import DP, LORA, TP, fault, wrap

# ---- norm, clipping, optimizer


@fault("the gradient norm is each rank's own", TP, "gradient norms")
def local_norm():
    import torch.distributed as dist
    from megatron.core.optimizer import optimizer

    def make(original: Callable) -> Callable:
        def norm(grads: Any, **more: Any) -> float:
            groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
            return original(grads, **more | {"grad_stats_parallel_group": groups[dist.get_rank()]})

        return norm

    return wrap(optimizer, "get_grad_norm_fp32", make)


@fault(
    "gradients are clipped by a norm that leaves out half of their squares", {}, "transformers: weights after step 3"
)
def clipped_by_another_norm():
    from megatron_medllm.parallel import mcore

    return wrap(
        mcore,
        "clip_grad_by_total_norm_fp32",
        lambda original: lambda parameters, most, norm, *rest: original(parameters, most, norm / 2**0.5, *rest),
    )


@fault("norms and biases decay", {}, "transformers: weights after step 3")
def decayed_norms():
    from megatron_medllm.parallel import mcore

    def make(original: Callable) -> Callable:
        def build(chunks: list, config: Any, optimizer: Any, layout: Any) -> Any:
            built = original(chunks, config, optimizer, layout)
            for group in built.param_groups:
                group["weight_decay"] = optimizer.weight_decay
            return built

        return build

    return wrap(mcore, "build_optimizer", make)


# ---- documents and pairs


@fault("documents attend to those before them in the row", {}, "transformers: losses")
def documents_see_each_other():
    from megatron_medllm.data.microbatch import MicroBatch
    from megatron_medllm.parallel.packed import Segment

    def make(original: Callable) -> Callable:
        def model_inputs(self: Any, *args: Any, **kwargs: Any) -> dict:
            return original(replace(self, segments=(Segment(0, len(self.tokens)),)), *args, **kwargs)

        return model_inputs

    return wrap(MicroBatch, "model_inputs", make)


@fault(
    "responses' positions do not continue from their prompt's, but one later", {}, "transformers: losses", stage="rpo"
)
def positions_behind_prompt():
    from megatron_medllm.data import pair_streams

    def make(original: Callable) -> Callable:
        def stream(pair: Any, **more: Any) -> Any:
            made, tails = original(pair, **more)
            positions = made.position_ids.copy()
            positions[len(pair.prompt) - 1 :] += 1
            return replace(made, position_ids=positions), tails

        return stream

    return wrap(pair_streams, "_pair_stream", make)


@fault("the prompt sees a response: attention is not causal", {}, "layout: runs to its end", stage="rpo")
def prompt_sees_response():
    from megatron_medllm.models import attention

    class Functional:
        @staticmethod
        def scaled_dot_product_attention(*args: Any, is_causal: bool, **more: Any) -> Any:
            import torch.nn.functional as F

            return F.scaled_dot_product_attention(*args, is_causal=False, **more)

    return patch.object(attention, "F", Functional)


@fault("the rejected response sees the chosen one", {}, "transformers: losses", stage="rpo")
def rejected_sees_chosen():
    from megatron_medllm.data import pair_streams

    def make(original: Callable) -> Callable:
        def stream(pair: Any, **more: Any) -> Any:
            made, tails = original(pair, **more)
            *before, last = made.segments
            return replace(made, segments=(*before, replace(last, prefix_start=0, prefix_end=last.start))), tails

        return stream

    return wrap(pair_streams, "_pair_stream", make)


@fault("the loss is the mean of the micro-batches' means", {}, "transformers: gradients, step 1")
def mean_of_means():
    from megatron_medllm.models import gpt

    def make(original: Callable) -> Callable:
        def config(*args: Any, **kwargs: Any) -> Any:
            made = original(*args, **kwargs)
            made.calculate_per_token_loss = False
            return made

        return config

    return wrap(gpt, "transformer_config", make)


# ---- recomputation, checkpoints, export


@fault("recomputing drops the first layer's adapter gradients", DP | {"recompute": "full"},
       "gradients, step 1", section=LORA)  # fmt: skip
def recompute_drops():
    from megatron_medllm.models.gpt import PackedGPTModel

    def make(original: Callable) -> Callable:
        def preprocess(self: Any, *args: Any, **kwargs: Any) -> tuple:
            hidden, *rest = original(self, *args, **kwargs)
            return (None if hidden is None else hidden.detach(), *rest)

        return preprocess

    return wrap(PackedGPTModel, "_preprocess", make)


@fault("gate and up are stored as one tensor's slices", TP, "save loaded into one process: weights")
def fc1_in_checkpoint():
    from megatron.core.transformer import mlp

    return patch.object(mlp, "apply_swiglu_sharded_factory", lambda tensor, *_, **__: tensor)


@fault("Adam's moments are not restored", {}, "save loaded into one process: weights")
def moments_lost():
    from megatron_medllm.parallel import mcore

    return wrap(mcore, "restore", lambda original: lambda chunks, optimizer, loaded: original(chunks, None, loaded))


@fault("the export swaps k and v", {}, "export")
def export_swaps():
    from megatron_medllm.checkpoint import hf_writer

    def make(original: Callable) -> Callable:
        def assemble(slices: list, weight: Any, shape: Any) -> dict:
            made = original(slices, weight, shape)
            return {
                n.replace("k_proj", "?").replace("v_proj", "k_proj").replace("?", "v_proj"): t for n, t in made.items()
            }

        return assemble

    return wrap(hf_writer, "assemble", make)
