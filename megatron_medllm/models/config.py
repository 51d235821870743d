"""A model's shape and layout as Megatron-Core's TransformerConfig."""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import ModelConfig, ModelShape
from megatron_medllm.config.train import Fp8Recipe
from megatron_medllm.errors import UserError
from megatron_medllm.models.fp8_linears import BLOCK

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
        UserError: the layout does not divide the model, or the backend is not there or lacks FP8's recipe or YaRN.
    """
    layout.check_model(shape)
    dtype, family = DTYPES[model.dtype], shape.traits
    te = model.backend == "te"
    if te and shape.yarn is not None:
        raise UserError("model.backend=te: YaRN is computed by model.backend=torch only")
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
        add_qkv_bias=family.qkv_bias,
        # Under tensor parallelism upstream then sums these norms' gradients: each rank's are of its own heads.
        qk_layernorm=family.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=model.init_std,
        cuda_graph_scope=[],  # the default is a spelling that Megatron-Core itself warns of
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
        # Upstream waits for the whole device after every exchange, against a race in torch before 2.0.
        batch_p2p_sync=False,
        # Interleaved stages overlap their sends; freeing an output still being sent corrupts gradients silently.
        deallocate_pipeline_outputs=layout.vpp == 1,
        calculate_per_token_loss=True,
        bias_activation_fusion=compiles_swiglu(model, cuda=torch.cuda.is_available()),
        bias_dropout_fusion=te,
        apply_rope_fusion=te,
        masked_softmax_fusion=False,
        persist_layer_norm=te,
        gradient_accumulation_fusion=False,
        **_recompute(layout),
        **te_fp8_fields(model, fp8),
    )


def compiles_swiglu(model: ModelConfig, *, cuda: bool) -> bool:
    """Whether torch compiles the activation, with or without TE: it reads gate and up once, and keeps nothing but them.

    On a CPU `auto` does not: it needs a C++ compiler there, and seconds at every start.
    """
    return model.swiglu == "compiled" or (model.swiglu == "auto" and cuda)


def _need_transformer_engine() -> None:
    if importlib.util.find_spec("transformer_engine") is None:
        raise UserError("model.backend=te: Transformer Engine is not installed; model.backend=torch does without it")
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if not HAVE_TE:  # Megatron-Core swallows the error and goes on with a mock
        raise UserError(
            "model.backend=te: Transformer Engine is installed, but megatron-core could not import it; see "
            "`python -c 'import transformer_engine.pytorch'`"
        )


def te_fp8_fields(model: ModelConfig, fp8: Fp8Recipe | None) -> dict[str, Any]:
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
