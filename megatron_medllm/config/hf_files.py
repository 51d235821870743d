"""Which files of a Hugging Face (HF) directory hold the model; a directory that leaves a choice is refused."""

import re
from pathlib import Path

from megatron_medllm.errors import UserError
from megatron_medllm.storage import read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ADAPTER_NAME = "adapter_config.json"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
# Weights in other formats, by the ends of their names.
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".npz")


def weight_files(hf_dir: Path) -> dict[Path, set[str]]:
    """The safetensors files of a directory, with the tensors that the index promises in each (none without index).

    Other programs choose otherwise where there is a choice (transformers takes the single file before the index, and an
    adapter's base before the model beside it), so a choice is refused.

    Raises:
        UserError: there are no safetensors, more than one model could be meant, or the index is malformed.
    """
    index, single = hf_dir / INDEX_NAME, hf_dir / SINGLE_NAME
    there = sorted(path.name for path in hf_dir.iterdir()) if hf_dir.is_dir() else []
    numbered = [name for name in there if _SHARD.fullmatch(name)]
    if index.exists():
        shards = _indexed(index)
        strays = [name for name in [SINGLE_NAME, *numbered] if name in there and hf_dir / name not in shards]
        if strays:
            raise UserError(
                f"{hf_dir / strays[0]}: lies beside {INDEX_NAME}, which does not name it; "
                "remove whichever of the two is not the model"
            )
    elif single.exists():
        shards = {single: set()}
        if numbered:
            raise UserError(
                f"{single}: lies beside {numbered[0]}, and no {INDEX_NAME} names either; "
                "remove whichever of the two is not the model"
            )
    else:
        raise UserError(f"{hf_dir}: {_why_none(there, numbered)}")
    if ADAPTER_NAME in there:
        raise UserError(
            f"{hf_dir / ADAPTER_NAME}: lies beside a model's weights; transformers would load the adapter's base "
            "instead: put the adapter into a directory of its own"
        )
    return shards


def digested_files(hf_dir: Path) -> list[str]:
    """The files by whose digests a model is told from another: its tensors and its shape."""
    return [*sorted(path.name for path in hf_dir.glob("*.safetensors")), "config.json"]


def _indexed(index: Path) -> dict[Path, set[str]]:
    """The files that an index names, with the tensors it promises in each."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: no 'weight_map'")
    if not weight_map:
        raise UserError(f"{index}: 'weight_map' is empty")
    shards: dict[Path, set[str]] = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str):
            raise UserError(f"{index}: {name!r}: expected a file's name, found {type(file_name).__name__}")
        if Path(file_name).name != file_name:
            raise UserError(f"{index}: {name!r} points outside the directory: {file_name!r}")
        shards.setdefault(index.parent / file_name, set()).add(name)
    return shards


def _why_none(there: list[str], numbered: list[str]) -> str:
    if numbered:
        return f"{INDEX_NAME} is missing, though {numbered[0]} is there; copy the index along"
    other = next((name for name in there if name.endswith(_OTHER_FORMATS)), None)
    way = f"; {other} is there: load it with transformers and save_pretrained() it" if other else ""
    return f"neither {INDEX_NAME} nor {SINGLE_NAME} is there (only safetensors are read{way})"
