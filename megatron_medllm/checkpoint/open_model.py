"""One door for every Megatron checkpoint: ours, Megatron-LM's, Megatron-Bridge's and NeMo's.

What the formats differ in ends here. Export, verify, merging and training see a `WeightSource`, as they do for a
Hugging Face (HF) directory.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from megatron_medllm.checkpoint.adapter_merge import SPELLINGS, AdapterReader
from megatron_medllm.checkpoint.description import stored_adapter
from megatron_medllm.checkpoint.foreign.archive import Settings
from megatron_medllm.checkpoint.foreign.dist import DistTensors
from megatron_medllm.checkpoint.foreign.family import has_head_norms
from megatron_medllm.checkpoint.foreign.legacy import LegacyTensors
from megatron_medllm.checkpoint.hf_source import HFWeights
from megatron_medllm.checkpoint.names import EMBEDDING
from megatron_medllm.checkpoint.stored import MegatronTensors, MegatronWeights, has_tied_head
from megatron_medllm.checkpoint.torch_dist import TorchDistReader
from megatron_medllm.checkpoint.weight_source import WeightSource
from megatron_medllm.config.megatron_dirs import MegatronDir, find_megatron
from megatron_medllm.config.megatron_yaml import check_claims, check_computation, megatron_adapter
from megatron_medllm.config.model import ModelShape, shape_of_directory
from megatron_medllm.config.train import AdapterConfig
from megatron_medllm.errors import UserError

log = logging.getLogger(__name__)

# Megatron-LM's arguments under other names than Megatron-Core's settings.
_RENAMED = {
    "norm_epsilon": "layernorm_epsilon",
    "swiglu": "gated_linear_unit",
    "num_experts": "num_moe_experts",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "use_rope_scaling": "rope_scaling",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
}
_SAME_NAME = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "kv_channels"),
    *("rotary_base", "rotary_percent", "rotary_interleaved", "position_embedding_type", "normalization", "window_size"),
    *("add_qkv_bias", "add_bias_linear", "qk_layernorm", "qk_l2_norm", "multi_latent_attention", "softmax_type"),
    *("mtp_num_layers", "attention_output_gate", "is_hybrid_model", "apply_query_key_layer_scaling"),
)


@dataclass(frozen=True)
class OpenCheckpoint:
    """A Megatron checkpoint with the shape of its model. `adapter` is given where it holds an adapter in its place."""

    place: MegatronDir
    shape: ModelShape
    tensors: MegatronTensors
    adapter: AdapterConfig | None

    def adapter_reader(self) -> AdapterReader:
        """The adapter's tensors; only where there is one."""
        assert self.adapter is not None
        return AdapterReader(self.tensors, self.adapter, self.shape, in_every_layer=self.place.writer == "medllm")


def open_checkpoint(path: Path, source_dir: Path | None = None, *, base_dir: Path | None = None) -> OpenCheckpoint:
    """Open a Megatron checkpoint: its root, its iteration's folder or its folder of weights. No number is read.

    A tied configuration beside another head is taken as untied, as NeMo's untied configuration of a tied model is
    taken as tied: the tensors say which it is.

    Args:
        path: the checkpoint.
        source_dir: HF directory with the model's config.json; default: what the checkpoint carries.
        base_dir: of another tool's adapter: its config.json is the source where no other is given.

    Raises:
        UserError: no checkpoint, incomplete, damaged, or of another model than Qwen2.5 or than the source's.
    """
    place = find_megatron(path)
    if place is None:
        TorchDistReader(path)  # says what is missing
        raise UserError(f"{path}: no Megatron checkpoint")
    if (
        source_dir is None
        and place.writer != "medllm"
        and base_dir is not None
        and (base_dir / "config.json").is_file()
    ):
        source_dir = base_dir
    shape = shape_of_directory(path, source_dir)
    tensors = _tensors(place)
    _check_arguments(place, tensors, shape)
    adapter = _adapter(place, tensors)
    if adapter is None:
        _check_family(place, tensors, shape)
        shape = _with_head_as_stored(place, tensors, shape, asked=source_dir is not None)
    return OpenCheckpoint(place, shape, tensors, adapter)


def open_weights(path: Path, shape: ModelShape) -> WeightSource:
    """A model's weights by their HF names, from an HF directory or any Megatron checkpoint.

    Args:
        path: of the directory.
        shape: of the model, unpadded.

    Raises:
        UserError: it does not hold exactly this model.
    """
    place = find_megatron(path)
    if place is None:
        return HFWeights(path, shape)
    tensors = _tensors(place)
    _check_arguments(place, tensors, shape)
    if _adapter(place, tensors) is not None:
        raise UserError(f"{path}: holds an adapter only; export it, merged into its base, and take that")
    _check_family(place, tensors, shape)
    weights = MegatronWeights(tensors, shape)
    weights.refuse_other_head()
    return weights


def _check_family(place: MegatronDir, tensors: MegatronTensors, shape: ModelShape) -> None:
    """Refuse a model whose head norms would be left out, or would be missing."""
    if has_head_norms(tensors.names) != shape.traits.qk_norm:
        has = "has" if has_head_norms(tensors.names) else "lacks"
        raise UserError(f"{place.weights}: {has} norms on queries and keys, unlike the source's {shape.traits.name}")


def _tensors(place: MegatronDir) -> MegatronTensors:
    return (
        LegacyTensors(place.weights)
        if place.is_legacy
        else DistTensors(TorchDistReader(place.weights), ours=place.writer == "medllm")
    )


def _check_arguments(place: MegatronDir, tensors: MegatronTensors, shape: ModelShape) -> None:
    """Megatron-LM keeps its arguments beside the tensors: heads and the like must be the source's."""
    if place.writer != "megatron-lm":
        return
    if isinstance(tensors, LegacyTensors):
        where, args = str(tensors.args_path), tensors.args
    else:
        assert isinstance(tensors, DistTensors)
        common = tensors.reader.common_state()
        found = common.get("args") if isinstance(common, dict) else None
        where, args = str(place.weights), found.values if isinstance(found, Settings) else {}
    claims = _claims(args)
    check_computation(f"{where}: args", claims)
    check_claims(f"{where}: args", claims, shape)


def _claims(args: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron-LM's arguments under Megatron-Core's names; what is not set is left out."""
    named = {core: args.get(name) for name, core in _RENAMED.items()} | {name: args.get(name) for name in _SAME_NAME}
    if not args.get("group_query_attention", True):
        named["num_query_groups"] = args.get("num_attention_heads")
    return {name: value for name, value in named.items() if isinstance(value, bool | int | float | str | list | tuple)}


def _adapter(place: MegatronDir, tensors: MegatronTensors) -> AdapterConfig | None:
    """The adapter that a checkpoint holds in place of the model, if any."""
    if place.writer == "medllm":
        return stored_adapter(place.weights)
    down = f".{SPELLINGS[1][0]}"
    linears = {name.removesuffix(down).rpartition(".")[2] for name in tensors.names if name.endswith(down)}
    if not linears:
        return None
    if EMBEDDING.mcore in tensors.names:
        raise UserError(f"{place.weights}: holds a whole model and an adapter; merge them with the tool that wrote it")
    settings = megatron_adapter(place)
    known = get_args(get_args(AdapterConfig.model_fields["targets"].annotation)[0])
    return AdapterConfig(
        rank=settings.dim,
        alpha=settings.alpha,
        dropout=settings.dropout,
        targets=tuple(name for name in known if name in linears),
    )


def _with_head_as_stored(place: MegatronDir, tensors: MegatronTensors, shape: ModelShape, *, asked: bool) -> ModelShape:
    """The shape, tied or not as the stored head is."""
    if shape.tie_embeddings and not has_tied_head(tensors, shape):
        log.warning("%s: the configuration ties the embeddings, but the head differs: taken as untied", place.weights)
        return shape.model_copy(update={"tie_embeddings": False})
    # NeMo stores a head for every model, and calls every model untied.
    if place.writer == "nemo" and not asked and not shape.tie_embeddings and has_tied_head(tensors, shape):
        log.info("%s: the head is the embedding: taken as tied", place.weights)
        return shape.model_copy(update={"tie_embeddings": True})
    return shape
