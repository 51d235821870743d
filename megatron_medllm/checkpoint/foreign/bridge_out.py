"""An HF directory as a checkpoint that Megatron-Bridge's trainers and its `export_ckpt` load.

The tensors are those of `import_hf`, whose keys are Bridge's. Around them lies what Bridge looks for:

| file | what for |
|---|---|
| `latest_checkpointed_iteration.txt`, `latest_train_state.pt` | which iteration is the newest: 0 |
| `iter_0000000/run_config.yaml` | the model, as the settings of Bridge's `GPTModelProvider`; nothing else is saved |
| `iter_0000000/train_state.pt` | nothing was trained yet |
| `iter_0000000/tokenizer/` | the HF directory's tokenizer |

Written against Megatron-Bridge 0.6.2 (`training/checkpointing.py`, `training/model_load_save.py`).
"""

import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_medllm.checkpoint.convert import import_hf
from megatron_medllm.checkpoint.hf_source import HFWeights
from megatron_medllm.checkpoint.hf_target import copy_carried_files, partial_dir, refuse_existing
from megatron_medllm.config.megatron_dirs import RUN_CONFIG_NAME, TRACKER_NAME
from megatron_medllm.config.model import ModelShape, shape_from_hf_config
from megatron_medllm.errors import UserError
from megatron_medllm.storage import atomic_write

_ITERATION = "iter_0000000"
_BRIDGE = "megatron.bridge"
# What every rank has in common: Megatron's version of the format (3: QKV by groups), and how keys are laid out.
_COMMON = {
    "checkpoint_version": 3.0,
    "iteration": 0,
    "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
}


def import_to_bridge(hf_dir: Path, root: Path, *, dtype: torch.dtype | None = None, workers: int = 2) -> None:
    """Convert an HF directory to a Megatron-Bridge checkpoint, tensor by tensor.

    Args:
        hf_dir: config.json, safetensors, and a tokenizer if there is one.
        root: takes its name only when whole; must not exist. Run again after a kill, it goes on.
        dtype: of the tensors; default: that of the first HF tensor.
        workers: threads.

    Raises:
        UserError: as `import_hf`.
    """
    refuse_existing(root)
    shape = shape_from_hf_config(hf_dir)
    if shape.family != "qwen2" or shape.yarn is not None:
        what = "YaRN" if shape.yarn is not None else shape.traits.name
        raise UserError(f"{hf_dir}: {what}; Bridge's settings are written for Qwen2.5 with unscaled RoPE only")
    dtype = dtype or HFWeights(hf_dir, shape).own_dtype()
    partial = partial_dir(root)
    folder = partial / _ITERATION
    shutil.rmtree(folder, ignore_errors=True)  # whole, but of an earlier call: the source may have changed since
    partial.mkdir(parents=True, exist_ok=True)
    import_hf(hf_dir, folder, dtype=dtype, workers=workers)
    (folder / "tokenizer").mkdir()
    copy_carried_files(hf_dir, folder / "tokenizer")
    _save(folder / "common.pt", _COMMON)
    with atomic_write(folder / RUN_CONFIG_NAME) as stream:
        stream.write(yaml.safe_dump(run_config(shape, dtype)).encode())
    for path in (folder / "train_state.pt", partial / "latest_train_state.pt"):
        _save(path, _train_state())
    with atomic_write(partial / TRACKER_NAME) as stream:
        stream.write(b"0")
    partial.rename(root)


def run_config(shape: ModelShape, dtype: torch.dtype) -> dict[str, Any]:
    """The settings from which Bridge builds the model; what is not named is Bridge's default."""
    is_bf16 = dtype is torch.bfloat16
    model = {
        "_target_": f"{_BRIDGE}.models.gpt_provider.GPTModelProvider",
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.kv_channels,
        "vocab_size": shape.vocab_size,
        "should_pad_vocab": False,
        "seq_length": shape.max_position_embeddings,
        "share_embeddings_and_output_weights": shape.tie_embeddings,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.layernorm_epsilon,
        "position_embedding_type": "rope",
        "rotary_base": shape.rotary_base,
        "rotary_percent": 1.0,
        "activation_func": _function("torch.nn.functional.silu"),
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bf16": is_bf16,
        "fp16": False,
        "params_dtype": _function(str(dtype)),
        "autocast_dtype": _function(str(dtype)) if is_bf16 else None,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "sequence_parallel": False,
    }
    checkpoint = {
        "_target_": f"{_BRIDGE}.training.config.CheckpointConfig",
        "ckpt_format": "torch_dist",
        "fully_parallel_save": True,
        "save_optim": False,
        "save_rng": False,
    }
    return {
        "_target_": f"{_BRIDGE}.training.config.ConfigContainer",
        "model": model,
        "checkpoint": checkpoint,
        "peft": None,
        "tokenizer": None,
    }


def _function(name: str) -> dict[str, Any]:
    """A Python object by its name, as Bridge spells it in YAML."""
    return {"_target_": name, "_call_": False}


def _train_state() -> dict[str, torch.Tensor]:
    counts = ("step", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
    state = {name: torch.tensor(0) for name in counts}
    state["floating_point_operations_so_far"] = torch.tensor(0.0)
    return state | {name: torch.tensor(False) for name in ("do_train", "do_valid", "do_test")}


def _save(path: Path, value: Any) -> None:
    with atomic_write(path) as stream:
        torch.save(value, stream)
