"""A model of any family over packed sequences: Megatron-Core's GPTModel with our positions and our head.

t: tokens of the packed stream, h: hidden size, hn: width of a head, v: padded vocabulary.

The model differs from Megatron-Core's in two places. RoPE angles come from the stream's own position ids, so packed
documents restart and a response continues from a shared prompt. And the last stage returns token log-probabilities
from a fused head instead of logits, which are never made.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_medllm.config.layout import LayoutConfig, padded_vocab_size
from megatron_medllm.config.model import ModelConfig, ModelShape
from megatron_medllm.config.train import Fp8Recipe
from megatron_medllm.kernels.logprob import fused_linear_logprob
from megatron_medllm.kernels.rope import rotation_angles
from megatron_medllm.models.config import transformer_config
from megatron_medllm.models.layer_spec import block_spec
from megatron_medllm.models.yarn import yarn_frequencies
from megatron_medllm.parallel.mcore import hush_known_warnings
from megatron_medllm.parallel.overlap import await_parameters
from megatron_medllm.parallel.packed import PackedSequences


class PackedGPTModel(GPTModel):
    """One pipeline stage over packed sequences."""

    def __init__(
        self,
        config: TransformerConfig,
        shape: ModelShape,
        *,
        backend: str,
        vp_stage: int | None,
        fp8: bool = False,
        recompute_swiglu: bool = False,
    ) -> None:
        tp_size = config.tensor_model_parallel_size
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(config, backend, vp_stage, fp8=fp8, recompute_swiglu=recompute_swiglu),
            vocab_size=padded_vocab_size(shape.vocab_size, 128 * tp_size),
            max_sequence_length=shape.max_position_embeddings,
            position_embedding_type="rope",
            rotary_base=shape.rotary_base,
            share_embeddings_and_output_weights=shape.tie_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            vp_stage=vp_stage,
        )
        self.shape, self.rotation_factor = shape, 1.0
        if shape.yarn is not None:
            self.rotary_pos_emb.inv_freq, self.rotation_factor = yarn_frequencies(
                shape.yarn, width=shape.kv_channels, base=shape.rotary_base
            )
        _mark_split_weights(self)

    def _is_in_embd_group(self) -> bool:
        """Whether upstream's constructor makes two stages' tied weights equal: not where they have no values yet."""
        return torch.get_default_device().type != "meta" and super()._is_in_embd_group()

    def _preprocess(
        self,
        input_ids: Tensor,  # [1, t]
        position_ids: Tensor,  # [1, t]
        decoder_input: Tensor | None = None,
        inference_context: None = None,
        packed_seq_params: PackedSequences | None = None,
        padding_mask: None = None,
    ) -> tuple:
        if packed_seq_params is None or packed_seq_params.qkv_format == "thd":
            return super()._preprocess(
                input_ids, position_ids, decoder_input, inference_context, packed_seq_params, padding_mask
            )
        if self.pre_process and decoder_input is None:
            decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids)
            if self.training and torch.is_grad_enabled() and not decoder_input.requires_grad:
                # Recomputing a layer whose input needs no gradient gives its adapters none, silently.
                decoder_input.requires_grad_()
        frequencies = self.rotary_pos_emb.inv_freq
        if frequencies.device != position_ids.device:  # no buffer of Megatron's module: it stayed where it was made
            self.rotary_pos_emb.inv_freq = frequencies = frequencies.to(position_ids.device)
        # Not handed to Megatron's layers: the core attention rotates, in one kernel a tensor.
        packed_seq_params.rotation = rotation_angles(position_ids[0], frequencies, factor=self.rotation_factor)
        return decoder_input, None, None, None, None, padding_mask

    def _postprocess(
        self,
        hidden_states: Tensor,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor | None,
        *args: Any,
        packed_seq_params: PackedSequences | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Hidden states of an inner stage; log-probs [t] and log-sum-exps [t] with labels; logits without."""
        if self.post_process and labels is not None and packed_seq_params is not None:
            return self._token_logprobs(hidden_states, labels, packed_seq_params)
        return super()._postprocess(
            hidden_states, input_ids, position_ids, labels, *args, packed_seq_params=packed_seq_params, **kwargs
        )

    def _token_logprobs(self, hidden: Tensor, labels: Tensor, packed: PackedSequences) -> tuple[Tensor, Tensor]:
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=group)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=group)
        tied = self.share_embeddings_and_output_weights
        await_parameters(self.output_layer)  # whose forward pass this replaces
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return fused_linear_logprob(
            hidden[:, 0],
            weight,
            labels[0],
            tp_group=group if group.size() > 1 else None,
            vocab_start=group.rank() * weight.shape[0],
            valid_vocab=self.shape.vocab_size,
            uniform_grad=packed.uniform_grad,
            kept_rows=packed.counted_rows,
        )


def _mark_split_weights(model: nn.Module) -> None:
    """Mark what tensor parallelism splits: of an unmarked weight the gradient norm counts the first rank's slice only.

    Megatron-Core does so where it draws the weights, which it does not do here, and from 0.18 on in any case; TE's
    linears do it themselves.
    """
    for module in model.modules():
        if isinstance(module, tensor_parallel.ColumnParallelLinear | tensor_parallel.VocabParallelEmbedding):
            axis = 0
        elif isinstance(module, tensor_parallel.RowParallelLinear):
            axis = 1
        else:
            continue
        # A head that is the embedding has no weight of its own.
        if module.weight is not None and not getattr(module.weight, "tensor_model_parallel", False):
            tensor_parallel.set_tensor_model_parallel_attributes(module.weight, True, axis, 1)


def build_model(
    model: ModelConfig,
    layout: LayoutConfig,
    *,
    device: torch.device,
    fp8: Fp8Recipe | None = None,
    fp8_weights: bool = False,
) -> list[nn.Module]:
    """This rank's model chunks: one, or `layout.vpp` of them. bf16 chunks are wrapped in Float16Module.

    Args:
        model: what is built.
        layout: how it is spread.
        device: where it is put; "meta": nowhere, to be given storage by `materialize`.
        fp8: recipe of the layers' products in full training (forward, d input and d weight); None: none in FP8.
        fp8_weights: pad the FFN for weights that will be held in FP8 (under an adapter); `fp8` implies it.

    Raises:
        UserError: the layout does not divide the model, the backend does not know the FP8 recipe, or on some rank a
            linear is not whole FP8 blocks.
    """
    shape = model.resolve_shape()
    config = transformer_config(shape, layout, model, fp8=fp8, fp8_weights=fp8_weights)
    config.use_cpu_initialization = device.type != "cuda"
    hush_known_warnings()
    stages = range(layout.vpp) if layout.vpp > 1 else [None]
    with device if device.type == "meta" else nullcontext():
        chunks: list[nn.Module] = [
            PackedGPTModel(
                config,
                shape,
                backend=model.backend,
                vp_stage=stage,
                fp8=fp8 is not None,
                recompute_swiglu=layout.recompute == "swiglu",
            ).to(device)
            for stage in stages
        ]
    return [Float16Module(config, chunk) for chunk in chunks] if config.bf16 else chunks


def unwrap(module: nn.Module) -> PackedGPTModel:
    """The PackedGPTModel inside DDP and Float16Module."""
    inner: Any = module
    while not isinstance(inner, PackedGPTModel):
        inner = inner.module
    return inner


def global_parameters(chunk: PackedGPTModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters under names that hold in every layout: layers are numbered from 0 over the whole model."""
    first = chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0
    for name, parameter in chunk.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(int(parts[2]) + first)
        yield ".".join(parts), parameter
