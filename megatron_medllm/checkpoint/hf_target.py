"""A Hugging Face (HF) directory being written: its files laid out at full size, then filled in any order."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_medllm.checkpoint.names import hf_shape, hf_shapes
from megatron_medllm.checkpoint.safetensors_file import (
    Entry,
    byte_view,
    create_file,
    digest_entry,
    plan_file,
    write_fully,
)
from megatron_medllm.checkpoint.weight_source import WeightSource
from megatron_medllm.config.hf_files import INDEX_NAME, SINGLE_NAME
from megatron_medllm.config.model import ModelShape
from megatron_medllm.config.rope import HFRope
from megatron_medllm.errors import UserError
from megatron_medllm.storage import full_disk_error, read_json, write_json

DEFAULT_SHARD_BYTES = 5_000_000_000
COPIED_BYTES = 32 * 1024 * 1024  # of fp32, in memory at once
DIGESTS_NAME = "medllm_digests.json"
_CARRIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


class HFTarget:
    """The safetensors files of an HF directory that is being filled, in any order and from several processes."""

    def __init__(self, hf_dir: Path, shape: ModelShape, dtype: torch.dtype, shard_bytes: int) -> None:
        """Plan the files: tensors in the model's order, a new file where the next would pass `shard_bytes`."""
        self.hf_dir, self.dtype = hf_dir, dtype
        self.place: dict[str, tuple[str, Entry]] = {}
        self.headers: dict[str, tuple[bytes, dict[str, Entry]]] = {}
        groups = _fill_shards(hf_shapes(shape), dtype.itemsize, shard_bytes)
        for number, group in enumerate(groups, start=1):
            several = len(groups) > 1
            file_name = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if several else SINGLE_NAME
            header, entries = plan_file(group, dtype)
            self.headers[file_name] = (header, entries)
            self.place.update({name: (file_name, entry) for name, entry in entries.items()})

    def create_files(self) -> None:
        """Lay out every file at its full size.

        Raises:
            UserError: the disk is full.
        """
        self.hf_dir.mkdir(parents=True, exist_ok=True)
        for file_name, (header, entries) in self.headers.items():
            create_file(self.hf_dir / file_name, header, entries)

    def write(self, name: str, tensor: Tensor, *, first_row: int = 0) -> None:
        """Write consecutive rows of tensor `name`, in the target's dtype.

        Raises:
            UserError: the disk is full.
        """
        file_name, entry = self.place[name]
        row_bytes = entry.size // entry.shape[0]
        path = self.hf_dir / file_name
        fd = os.open(path, os.O_WRONLY)
        try:
            write_fully(fd, byte_view(tensor), entry.offset + first_row * row_bytes)
        except OSError as error:
            raise full_disk_error(error, path) from error
        finally:
            os.close(fd)

    def copy(self, source: WeightSource, name: str) -> None:
        """Write tensor `name` as it is in `source`, in the target's dtype, a run of rows at a time.

        Raises:
            UserError: the source is damaged, or the disk is full.
        """
        rows, *columns = hf_shape(name, source.shape)
        step = max(1, COPIED_BYTES // (4 * torch.Size(columns).numel()))
        for start in range(0, rows, step):
            part = source.read(name, axis=0, start=start, stop=min(start + step, rows))
            self.write(name, part.to(self.dtype).contiguous(), first_row=start)

    def flush(self, names: Iterable[str]) -> None:
        """Force the files of these tensors to the disk.

        Raises:
            UserError: the disk is full.
        """
        for file_name in {self.place[name][0] for name in names}:
            path = self.hf_dir / file_name
            fd = os.open(path, os.O_WRONLY)
            try:
                os.fdatasync(fd)
            except OSError as error:
                raise full_disk_error(error, path) from error
            finally:
                os.close(fd)

    def digest(self, name: str) -> str:
        """SHA-256 of a tensor's bytes as written, in hex."""
        file_name, entry = self.place[name]
        return digest_entry(self.hf_dir / file_name, entry)

    def finish(self, *, shape: ModelShape, source_dir: Path | None, digests: dict[str, str]) -> None:
        """Flush the files and write what lies beside them: index, digests, config.json, tokenizer."""
        self.flush(self.place)
        if len(self.headers) > 1:
            weight_map = {name: file_name for name, (file_name, _) in self.place.items()}
            total = sum(entry.size for _, entry in self.place.values())
            write_json(self.hf_dir / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_json(self.hf_dir / DIGESTS_NAME, {"algorithm": "sha256", "tensors": dict(sorted(digests.items()))})
        write_json(self.hf_dir / "config.json", hf_config(shape, self.dtype, source_dir))
        if source_dir is not None:
            copy_carried_files(source_dir, self.hf_dir)


def _fill_shards(
    shapes: dict[str, tuple[int, ...]], itemsize: int, shard_bytes: int
) -> list[dict[str, tuple[int, ...]]]:
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * itemsize
        if groups[-1] and filled + size > shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += size
    return groups


def copy_carried_files(source_dir: Path, target_dir: Path) -> None:
    """Copy tokenizer and generation settings, those that are there."""
    for name in _CARRIED_FILES:
        if (source_dir / name).exists():
            shutil.copyfile(source_dir / name, target_dir / name)


def hf_config(shape: ModelShape, dtype: torch.dtype, source_dir: Path | None) -> dict[str, Any]:
    """The family's config.json in transformers 4's spelling, which 5 reads too.

    Settings that do not concern the weights (special token ids and the like) come from `source_dir`/config.json.
    """
    source_path = source_dir / "config.json" if source_dir else None
    config = read_json(source_path) if source_path and source_path.exists() else {}
    source_scaling = config.get("rope_scaling")
    spelled_otherwise = ("rope_parameters", "rope_scaling", "dtype", "layer_types")
    for name in (*spelled_otherwise, "head_dim", "attention_bias"):  # the last two: another family's
        config.pop(name, None)
    if not shape.traits.qkv_bias:
        config["attention_bias"] = False
    if shape.head_dim is not None:
        config["head_dim"] = shape.head_dim
    if shape.yarn is not None:
        config["rope_scaling"] = _rope_scaling(shape, source_scaling)
    return config | {
        "architectures": [shape.traits.architecture],
        "model_type": shape.traits.model_type,
        "hidden_act": "silu",
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "intermediate_size": shape.ffn_hidden_size,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tie_embeddings,
        "rms_norm_eps": shape.layernorm_epsilon,
        "rope_theta": shape.rotary_base,
        "max_position_embeddings": shape.max_position_embeddings,
        "use_sliding_window": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _rope_scaling(shape: ModelShape, source: Any) -> dict[str, Any]:
    """YaRN's settings as the source spells them, where it does and means the same."""
    assert shape.yarn is not None
    if isinstance(source, dict):
        try:
            if HFRope.read(source, context=shape.max_position_embeddings).yarn == shape.yarn:
                return source
        except ValueError:
            pass  # another model's, which the shape does not come from
    return {"rope_type": "yarn", **shape.yarn.model_dump()}


def partial_dir(final: Path) -> Path:
    """Where a directory grows until it is whole."""
    return final.with_name(f".{final.name}.partial")


def refuse_existing(path: Path) -> None:
    """Raises UserError where something already has the name that a result shall take."""
    if path.exists():
        raise UserError(f"{path}: already exists; choose another directory or remove it")
