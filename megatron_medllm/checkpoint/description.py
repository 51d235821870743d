"""What a checkpoint says about itself, so that export and verify need nothing else: shape, adapter, tokenizer."""

from pathlib import Path

import torch

from megatron_medllm.checkpoint.hf_target import copy_carried_files, hf_config
from megatron_medllm.checkpoint.torch_dist import CARRIED_DIR, MODEL_NAME
from megatron_medllm.config.model import ModelShape
from megatron_medllm.config.train import AdapterConfig
from megatron_medllm.errors import UserError
from megatron_medllm.storage import read_json, write_json


def describe_checkpoint(
    directory: Path,
    shape: ModelShape,
    *,
    dtype: torch.dtype,
    source_dir: Path | None,
    adapter: AdapterConfig | None = None,
) -> None:
    """Write `model.json` and the `hf/` folder into a distributed checkpoint; one process does this.

    Args:
        directory: the checkpoint.
        shape: of the model as Hugging Face says it (unpadded).
        dtype: of its weights.
        source_dir: HF directory whose tokenizer, generation settings and special token ids are carried along.
        adapter: given when the checkpoint holds adapters only.
    """
    (directory / CARRIED_DIR).mkdir(exist_ok=True)
    if source_dir is not None:
        copy_carried_files(source_dir, directory / CARRIED_DIR)
    write_json(directory / CARRIED_DIR / "config.json", hf_config(shape, dtype, source_dir))
    description = {"shape": shape.model_dump(), "adapter": adapter and adapter.model_dump()}
    write_json(directory / MODEL_NAME, description)


def stored_adapter(directory: Path) -> AdapterConfig | None:
    """The adapter that a checkpoint holds in place of the model, if any.

    Raises:
        UserError: `model.json` is not ours.
    """
    path = directory / MODEL_NAME
    found = read_json(path).get("adapter") if path.exists() else None
    try:
        return AdapterConfig.model_validate(found) if found else None
    except ValueError as error:
        raise UserError(f"{path}: 'adapter' cannot be read: {error}") from None
