"""The configurations that Megatron-Bridge and NeMo 2 keep beside their tensors, read as plain data.

`run_config.yaml` and `context/model.yaml` describe Python objects by name. Nothing is imported or built for them: what
the model computes is read from the numbers, and what Qwen2.5 does not compute is refused by name.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, ValidationError

from megatron_medllm.config.base import first_problem
from megatron_medllm.config.megatron_dirs import MegatronDir
from megatron_medllm.config.shape import ModelShape
from megatron_medllm.errors import UserError

log = logging.getLogger(__name__)

_Count = Annotated[int, Field(strict=True, gt=0, lt=2**31)]
_Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
# Settings that must have one of these values where they are given; the first is Qwen2.5's.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "add_qkv_bias": (True,),
    "add_bias_linear": (False,),
    "normalization": ("RMSNorm",),
    "gated_linear_unit": (True,),
    "num_moe_experts": (None,),
    "multi_latent_attention": (False, None),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "seq_len_interpolation_factor": (None, 1.0),
    "rope_scaling": (False, None),
    "yarn_rotary_scaling_factor": (None,),
    "no_rope_freq": (None,),
    "qk_layernorm": (False,),
    "qk_l2_norm": (False,),
    "window_size": (None,),
    "layernorm_zero_centered_gamma": (False,),
    "attention_output_gate": (False,),
    "apply_query_key_layer_scaling": (False,),
    "softmax_type": ("vanilla",),
    "softmax_scale": (None,),
    "mtp_num_layers": (None, 0),
    "is_hybrid_model": (False,),
    "heterogeneous_block_specs": (False,),
    "experimental_attention_variant": (None,),
    "use_mup": (False,),
    "fp32_residual_connection": (False,),
}


class _Shape(BaseModel):
    """The numbers of the model, in Megatron's spelling. Nothing is converted."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    num_layers: _Count
    hidden_size: _Count
    num_attention_heads: _Count
    num_query_groups: _Count | None = None
    ffn_hidden_size: _Count
    vocab_size: _Count
    share_embeddings_and_output_weights: StrictBool
    layernorm_epsilon: _Positive
    rotary_base: _Positive
    seq_length: _Count


class AdapterSettings(BaseModel):
    """What Bridge and NeMo say about a LoRA adapter."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    kind: StrictStr = Field(alias="_target_")
    dim: _Count
    alpha: _Positive
    dropout: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0


def megatron_shape(place: MegatronDir, source: ModelShape | None = None) -> ModelShape:
    """The shape of the model: `source` where it is given, else as the configuration beside its tensors says it.

    Raises:
        UserError: neither is there; the configuration is no plain data, or not a Qwen2.5 model's, or not of `source`.
    """
    if place.config is None:
        if source is None:
            raise UserError(
                f"{place.weights}: carries no config.json; name the model's HF directory as the source of it"
            )
        return source
    section = "config" if place.writer == "nemo" else "model"
    raw = _read(place.config).get(section)
    if not isinstance(raw, dict):
        raise UserError(f"{place.config}: no section {section!r}")
    if isinstance(nested := raw.get("transformer"), dict):  # Bridge's configurations for model builders
        raw = nested | raw
    where = f"{place.config}: {section}"
    check_computation(where, raw)
    if source is not None:
        check_claims(where, raw, source)
        return source
    if raw.get("vocab_size") is None:
        raise UserError(f"{where}.vocab_size is not given; name the model's HF directory as the source of it")
    try:
        found = _Shape.model_validate(raw)
        return ModelShape(
            num_layers=found.num_layers,
            hidden_size=found.hidden_size,
            num_attention_heads=found.num_attention_heads,
            num_query_groups=found.num_query_groups or found.num_attention_heads,
            ffn_hidden_size=found.ffn_hidden_size,
            vocab_size=found.vocab_size,
            tie_embeddings=found.share_embeddings_and_output_weights,
            layernorm_epsilon=found.layernorm_epsilon,
            rotary_base=found.rotary_base,
            max_position_embeddings=found.seq_length,
        )
    except ValidationError as error:
        raise UserError(f"{where}: {first_problem(error)}") from None


def check_computation(where: str, settings: Mapping[str, Any]) -> None:
    """Refuse settings that make a model compute what Qwen2.5 does not.

    Args:
        where: file and section, for messages.
        settings: in Megatron-Core's spelling; one that is absent is taken as Qwen2.5's.

    Raises:
        UserError: names the setting.
    """
    for name, allowed in _REQUIRED.items():
        value = settings.get(name, allowed[0])
        if value not in allowed:
            kind = str(settings.get("_target_", "")).rpartition(".")[2]
            which = f" ({kind})" if kind else ""
            raise UserError(f"{where}.{name} is {_short(value)}{which}; only dense Qwen2.5 models are read")
    activation = settings.get("activation_func")
    named = str(activation.get("_target_") if isinstance(activation, dict) else activation)
    if named.rpartition(".")[2] not in ("silu", "None"):
        raise UserError(f"{where}.activation_func is {_short(named)}; only dense Qwen2.5 models are read")
    hidden, heads, channels = (settings.get(name) for name in ("hidden_size", "num_attention_heads", "kv_channels"))
    if isinstance(channels, int) and isinstance(hidden, int) and isinstance(heads, int) and channels * heads != hidden:
        raise UserError(f"{where}.kv_channels is {channels}: not the width of Qwen2.5's heads")


def check_claims(where: str, claims: Mapping[str, Any], shape: ModelShape) -> None:
    """Compare what a checkpoint says about its model with the shape that it is to be read with.

    Heads cannot be seen from the tensors: with another number of them, the same weights would be another model.

    Raises:
        UserError: it is another model's.
    """
    for name in ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        claimed, wanted = claims.get(name), getattr(shape, name)
        if claimed is not None and claimed != wanted:
            raise UserError(f"{where}.{name} is {_short(claimed)}, but the source's model has {wanted}")
    for name in ("layernorm_epsilon", "rotary_base"):
        claimed, wanted = claims.get(name), getattr(shape, name)
        if claimed is not None and claimed != wanted:
            log.warning("%s.%s is %s; the source says %s, which is taken", where, name, _short(claimed), wanted)


def megatron_adapter(place: MegatronDir) -> AdapterSettings:
    """Rank and scale of a LoRA adapter, as the configuration beside its tensors says it.

    Raises:
        UserError: it says nothing, or tells of another method than LoRA.
    """
    if place.config is None:
        raise UserError(f"{place.weights}: holds an adapter, but no configuration that says its alpha")
    section = "model_transform" if place.writer == "nemo" else "peft"
    raw = _read(place.config).get(section)
    if not isinstance(raw, dict):
        raise UserError(f"{place.config}: no section {section!r}, which would say the adapter's alpha")
    try:
        found = AdapterSettings.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{place.config}: {section}: {first_problem(error)}") from None
    if found.kind.rpartition(".")[2] != "LoRA":
        raise UserError(f"{place.config}: {section}: {_short(found.kind)}; only LoRA is read")
    return found


def _read(path: Path) -> dict[str, Any]:
    """A YAML file as plain data: a tag that would build an object is refused, not followed."""
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not plain YAML: {' '.join(str(error).split())[:160]}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected sections, found {type(found).__name__}")
    return found


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:80]}…"
