"""Qwen2.5 as a Megatron-Core GPTModel: shape -> TransformerConfig -> layer spec -> model chunks.

t: tokens of the packed stream, h: hidden size, hn: width of a head, v: padded vocabulary.

The model differs from Megatron-Core's in two places. RoPE angles come from the stream's own position ids, so packed
documents restart and a response continues from a shared prompt. And the last stage returns token log-probabilities
from a fused head instead of logits, which are never made.
"""

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from megatron_medllm.config.layout import LayoutConfig, padded_vocab_size
from megatron_medllm.config.model import ModelConfig, ModelShape
from megatron_medllm.config.train import Fp8Recipe
from megatron_medllm.errors import UserError
from megatron_medllm.kernels.logprob import fused_linear_logprob
from megatron_medllm.kernels.rope import rotation_angles
from megatron_medllm.models.attention import PackedAttention
from megatron_medllm.models.fp8_linears import BLOCK, FP8ColumnParallelLinear, FP8RowParallelLinear
from megatron_medllm.parallel.overlap import await_parameters
from megatron_medllm.parallel.packed import PackedSequences

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def padded_ffn_size(shape: ModelShape, layout: LayoutConfig, model: ModelConfig, *, fp8_weights: bool) -> int:
    """The FFN's width as built: zeros fill it up so that every rank's slice is whole FP8 blocks (72B: 29568 -> 29696).

    The zeros stay: silu(0) * 0 = 0, so neither the padded rows of gate and up nor the padded columns behind them ever
    get a gradient. Weights are read without them and exported without them.

    Raises:
        UserError: `model.ffn_multiple` leads to a width that `layout.tp` does not divide.
    """
    multiple = model.ffn_multiple or (BLOCK * layout.tp if fp8_weights else 1)
    size = -(-shape.ffn_hidden_size // multiple) * multiple
    if size % layout.tp:
        raise UserError(f"model.ffn_multiple={multiple}: layout.tp={layout.tp} does not divide the padded FFN, {size}")
    return size


def transformer_config(
    shape: ModelShape,
    layout: LayoutConfig,
    model: ModelConfig,
    *,
    fp8: Fp8Recipe | None = None,
    fp8_weights: bool = False,
) -> TransformerConfig:
    """The one place that builds Megatron-Core's configuration. Arguments as in `build_model`.

    Raises:
        UserError: the layout does not divide the model, the backend does not know the FP8 recipe, or it is not there.
    """
    layout.check_model(shape)
    dtype = DTYPES[model.dtype]
    te = model.backend == "te"
    if te:
        _need_transformer_engine()
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        ffn_hidden_size=padded_ffn_size(shape, layout, model, fp8_weights=fp8_weights or fp8 is not None),
        kv_channels=shape.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=shape.layernorm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=model.init_std,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,  # weights are read, or drawn by `initialize_weights`
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sp,
        num_layers_in_first_pipeline_stage=layout.first_stage_layers,
        num_layers_in_last_pipeline_stage=layout.last_stage_layers,
        # Interleaved stages with the default pair of these two corrupt the loss without an error.
        overlap_p2p_comm=layout.vpp > 1,
        batch_p2p_comm=layout.vpp == 1,
        # Interleaved stages overlap their sends; freeing an output still being sent corrupts gradients silently.
        deallocate_pipeline_outputs=layout.vpp == 1,
        calculate_per_token_loss=True,
        # On CUDA compiled by torch, with or without TE: reads gate and up once, and keeps nothing but them.
        bias_activation_fusion=torch.cuda.is_available(),
        bias_dropout_fusion=te,
        apply_rope_fusion=te,
        masked_softmax_fusion=False,
        persist_layer_norm=te,
        gradient_accumulation_fusion=False,
        **_recompute(layout),
        **_te_fp8(model, fp8),
    )


def _need_transformer_engine() -> None:
    if importlib.util.find_spec("transformer_engine") is None:
        raise UserError("model.backend=te: Transformer Engine is not installed; model.backend=torch does without it")
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if not HAVE_TE:  # Megatron-Core swallows the error and goes on with a mock
        raise UserError(
            "model.backend=te: Transformer Engine is installed, but megatron-core could not import it; see "
            "`python -c 'import transformer_engine.pytorch'`"
        )


def _te_fp8(model: ModelConfig, fp8: Fp8Recipe | None) -> dict[str, Any]:
    """Transformer Engine's settings. The torch backend needs none: its spec holds FP8 linears."""
    if fp8 is None:
        return {}
    if model.backend == "torch":
        if fp8 != "blockwise":
            raise UserError(f"fp8_recipe={fp8} needs model.backend=te; the torch backend's FP8 is blockwise")
        return {}
    # With a scale a block, e4m3's range is enough for gradients too; the others need e5m2's ("hybrid").
    return {"fp8": "e4m3" if fp8 == "blockwise" else "hybrid", "fp8_recipe": fp8}


def _recompute(layout: LayoutConfig) -> dict[str, Any]:
    if layout.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if layout.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) that also works under sequence parallelism.

    There its weight sees a slice of the sequence only, so its gradient is summed over the tensor-parallel group;
    the mark on the weight asks Megatron-Core for that.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def torch_layer_spec(*, fp8: bool = False) -> ModuleSpec:
    """A transformer layer of Megatron-Core's own linears (or their FP8 form), torch's norm and our packed attention."""
    column = FP8ColumnParallelLinear if fp8 else tensor_parallel.ColumnParallelLinear
    row = FP8RowParallelLinear if fp8 else tensor_parallel.RowParallelLinear
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column,
                    core_attention=PackedAttention,
                    linear_proj=row,
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
            mlp_bda=get_bias_dropout_add,
            # Both backends write Transformer Engine's checkpoint keys, so that either loads the other's.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def block_spec(
    config: TransformerConfig, backend: str, vp_stage: int | None, *, fp8: bool = False
) -> TransformerBlockSubmodules:
    """The layers that this pipeline stage (and virtual stage) builds, and the final norm."""
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    if backend == "te":
        from megatron.core.extensions.transformer_engine import TENorm
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        layer = get_gpt_layer_with_transformer_engine_spec()
        if config.context_parallel_size > 1:  # TE's attention would split every document over the ranks evenly
            layer.submodules.self_attention.submodules.core_attention = PackedAttention
        return TransformerBlockSubmodules([layer] * count, TENorm)
    return TransformerBlockSubmodules([torch_layer_spec(fp8=fp8)] * count, RMSNorm)


class Qwen25Model(GPTModel):
    """One pipeline stage of Qwen2.5 over packed sequences."""

    def __init__(
        self, config: TransformerConfig, shape: ModelShape, *, backend: str, vp_stage: int | None, fp8: bool = False
    ) -> None:
        tp_size = config.tensor_model_parallel_size
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(config, backend, vp_stage, fp8=fp8),
            vocab_size=padded_vocab_size(shape.vocab_size, 128 * tp_size),
            max_sequence_length=shape.max_position_embeddings,
            position_embedding_type="rope",
            rotary_base=shape.rotary_base,
            share_embeddings_and_output_weights=shape.tie_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            vp_stage=vp_stage,
        )
        self.shape = shape
        _mark_split_weights(self)

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
        # Not handed to Megatron's layers: the core attention rotates, in one kernel a tensor.
        packed_seq_params.rotation = rotation_angles(
            position_ids[0], self.rotary_pos_emb.inv_freq.to(position_ids.device)
        )
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
            return self._token_logprobs(hidden_states, labels, packed_seq_params.uniform_grad)
        return super()._postprocess(
            hidden_states, input_ids, position_ids, labels, *args, packed_seq_params=packed_seq_params, **kwargs
        )

    def _token_logprobs(self, hidden: Tensor, labels: Tensor, uniform_grad: float | None) -> tuple[Tensor, Tensor]:
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
            uniform_grad=uniform_grad,
        )


def _mark_split_weights(model: nn.Module) -> None:
    """Mark what tensor parallelism splits: of an unmarked weight the gradient norm counts the first rank's slice only.

    Megatron-Core does so where it draws the weights, which it does not do here; TE's linears do it themselves.
    """
    for module in model.modules():
        if isinstance(module, tensor_parallel.ColumnParallelLinear | tensor_parallel.VocabParallelEmbedding):
            axis = 0
        elif isinstance(module, tensor_parallel.RowParallelLinear):
            axis = 1
        else:
            continue
        if module.weight is not None:  # a head that is the embedding has none of its own
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
        device: where it is put.
        fp8: recipe of the layers' products in full training (forward, d input and d weight); None: none in FP8.
        fp8_weights: pad the FFN for weights that will be held in FP8 (under an adapter); `fp8` implies it.

    Raises:
        UserError: the layout does not divide the model, the backend does not know the FP8 recipe, or on some rank a
            linear is not whole FP8 blocks.
    """
    shape = model.resolve_shape()
    config = transformer_config(shape, layout, model, fp8=fp8, fp8_weights=fp8_weights)
    config.use_cpu_initialization = device.type == "cpu"
    stages = range(layout.vpp) if layout.vpp > 1 else [None]
    chunks: list[nn.Module] = [
        Qwen25Model(config, shape, backend=model.backend, vp_stage=stage, fp8=fp8 is not None).to(device)
        for stage in stages
    ]
    return [Float16Module(config, chunk) for chunk in chunks] if config.bf16 else chunks


def unwrap(module: nn.Module) -> Qwen25Model:
    """The Qwen25Model inside DDP and Float16Module."""
    while not isinstance(module, Qwen25Model):
        module = module.module
    return module


def global_parameters(chunk: Qwen25Model) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters under names that hold in every layout: layers are numbered from 0 over the whole model."""
    first = chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0
    for name, parameter in chunk.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(int(parts[2]) + first)
        yield ".".join(parts), parameter
