"""The layers that a pipeline stage builds, as Megatron-Core's specs: torch's parts or Transformer Engine's."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from megatron_medllm.errors import UserError
from megatron_medllm.models.attention import PackedAttention
from megatron_medllm.models.fp8_linears import FP8ColumnParallelLinear, FP8RowParallelLinear
from megatron_medllm.models.mlp import RecomputedSwiGLU
from megatron_medllm.parallel.mcore import mlp_submodule


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) that also works under sequence parallelism.

    There its weight sees a slice of the sequence only, so its gradient is summed over the tensor-parallel group;
    the mark on the weight asks Megatron-Core for that.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron's mark

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def torch_layer_spec(*, qk_norm: bool = False, fp8: bool = False, recompute_swiglu: bool = False) -> ModuleSpec:
    """A transformer layer of Megatron-Core's own linears (or their FP8 form), torch's norm and our packed attention."""
    column = FP8ColumnParallelLinear if fp8 else tensor_parallel.ColumnParallelLinear
    row = FP8RowParallelLinear if fp8 else tensor_parallel.RowParallelLinear
    head_norm = RMSNorm if qk_norm else IdentityOp
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
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp_submodule(
                RecomputedSwiGLU if recompute_swiglu else MLP, MLPSubmodules(linear_fc1=column, linear_fc2=row)
            ),
            mlp_bda=get_bias_dropout_add,
            # Both backends write Transformer Engine's checkpoint keys, so that either loads the other's.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def block_spec(
    config: TransformerConfig,
    backend: str,
    vp_stage: int | None,
    *,
    fp8: bool = False,
    recompute_swiglu: bool = False,
) -> TransformerBlockSubmodules:
    """The layers that this pipeline stage (and virtual stage) builds, and the final norm.

    Raises:
        UserError: recomputing SwiGLU alone under TE, whose MLP is its own.
    """
    if recompute_swiglu and backend == "te":
        raise UserError("layout.recompute=swiglu needs model.backend=torch; with te use selective or full")
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    if backend == "te":
        from megatron.core.extensions.transformer_engine import TENorm
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        if config.context_parallel_size > 1:  # TE's attention would split every document over the ranks evenly
            layer.submodules.self_attention.submodules.core_attention = PackedAttention
        return TransformerBlockSubmodules([layer] * count, TENorm)
    layer = torch_layer_spec(qk_norm=config.qk_layernorm, fp8=fp8, recompute_swiglu=recompute_swiglu)
    return TransformerBlockSubmodules([layer] * count, RMSNorm)
