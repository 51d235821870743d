"""Megatron-LM's legacy format: a folder `mp_rank_TT` or `mp_rank_TT_PPP` for every tensor- and pipeline-parallel rank.

Each holds `model_optim_rng.pt`, a pickle of arguments, weights, optimizer and random states. Layers are numbered within
the stage; under interleaving the weights are in `model0`, `model1` and so on, and the layers run through the first
chunk of every stage, then through the second. Tensor parallelism has cut gate and up each on its own.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_medllm.checkpoint.foreign.archive import Settings, StoredTensor, read_archive
from megatron_medllm.checkpoint.foreign.family import other_family
from megatron_medllm.checkpoint.names import LAYER_NAME, LAYER_PREFIX, TORCH_BACKEND_NAMES, split_of
from megatron_medllm.checkpoint.safetensors_file import Entry
from megatron_medllm.checkpoint.stored import Block, StoredWeight
from megatron_medllm.errors import UserError

_FOLDER = re.compile(r"mp_rank_(?P<tp>\d+)(_(?P<pp>\d{3,}))?")
_FILES = ("model_optim_rng.pt", "model_rng.pt")
_CHUNK = re.compile(r"model(?P<chunk>\d*)")
_SKIPPED = re.compile(r".*(_extra_state|inv_freq)(\.|$).*")


@dataclass(frozen=True)
class _Rank:
    """What one file holds: its chunks of the model in order, each name -> tensor, and the arguments."""

    path: Path
    chunks: tuple[Mapping[str, StoredTensor], ...]
    args: Mapping[str, Any]


class LegacyTensors:
    """The tensors of a legacy checkpoint, under the names of the whole model."""

    def __init__(self, directory: Path) -> None:
        """Locate every tensor of every rank; no number is read.

        Raises:
            UserError: a rank is missing, the files do not fit each other, or it is no Qwen2.5 model.
        """
        self.directory = directory
        ranks = _read_ranks(directory)
        first = ranks[0][0]
        self.args, self.args_path = first.args, first.path
        self._tensors: dict[str, list[StoredTensor]] = {}
        offset = 0
        for chunk in range(max(len(stage[0].chunks) for stage in ranks)):
            for stage in ranks:
                if chunk < len(stage[0].chunks):
                    offset += self._take([rank.chunks[chunk] for rank in stage], stage, offset)
        self.names = tuple(self._tensors)
        if (why := other_family(self.names)) is not None:
            raise UserError(f"{directory}: {why}")

    def _take(self, parts: list[Mapping[str, StoredTensor]], stage: list[_Rank], offset: int) -> int:
        """Enter one chunk of one stage, whose first layer is `offset`; the number of its layers."""
        for rank, part in zip(stage, parts, strict=True):
            if part.keys() != parts[0].keys():
                odd = min(part.keys() ^ parts[0].keys())
                raise UserError(f"{rank.path}: tensor {odd!r} is not on every tensor-parallel rank")
        layers = set()
        for name in parts[0]:
            match = LAYER_NAME.fullmatch(name)
            plain = name
            if match is not None:
                layers.add(int(match["layer"]))
                rest = TORCH_BACKEND_NAMES.get(match["rest"], match["rest"])
                plain = f"{LAYER_PREFIX}{int(match['layer']) + offset}.{rest}"
            if plain in self._tensors:
                raise UserError(f"{stage[0].path}: tensor {name!r} is in two stages")
            self._tensors[plain] = [part[name] for part in parts]
        if layers != set(range(len(layers))):
            raise UserError(f"{stage[0].path}: layers {sorted(layers)} are not numbered one by one")
        return len(layers)

    def find(self, mcore: str) -> StoredWeight | None:
        """The weight of this name, all tensor-parallel ranks together.

        Raises:
            UserError: the ranks' parts do not fit each other.
        """
        parts = self._tensors.get(mcore)
        if parts is None:
            return None
        axis, blocks = split_of(mcore)
        if axis is None:
            parts = parts[:1]
        first = parts[0]
        for part in parts:
            if part.shape != first.shape or part.dtype != first.dtype or (axis or 0) >= len(part.shape):
                raise UserError(f"{part.path}: tensor {mcore!r} of shape {list(part.shape)} does not fit the others")
        sizes = list(first.shape)
        along = axis or 0
        if sizes[along] % blocks:
            raise UserError(f"{first.path}: tensor {mcore!r} of shape {sizes} cannot be cut into {blocks}")
        step = sizes[along] // blocks
        found = []
        for number in range(blocks):
            for rank, part in enumerate(parts):
                at = (number * len(parts) + rank) * step
                row, column = (0, at) if along == 1 else (at, 0)
                entry = part.entry(mcore)
                if blocks > 1:
                    entry = _rows(entry, number * step, step)
                found.append(Block(row, column, entry.shape, part.path, partial(_known, entry)))
        sizes[along] *= len(parts)
        return StoredWeight(mcore, tuple(sizes), first.dtype, tuple(found))


def _rows(entry: Entry, start: int, count: int) -> Entry:
    row_bytes = entry.size // entry.shape[0]
    return Entry(entry.dtype, (count, *entry.shape[1:]), entry.offset + start * row_bytes, count * row_bytes)


def _known(entry: Entry) -> Entry:
    return entry


def _read_ranks(directory: Path) -> list[list[_Rank]]:
    """The files by pipeline stage, then tensor-parallel rank."""
    found: dict[tuple[int, int], Path] = {}
    for folder in sorted(directory.glob("mp_rank_*")):
        match = _FOLDER.fullmatch(folder.name)
        if match is None:
            raise UserError(f"{folder}: expected mp_rank_TT or mp_rank_TT_PPP; experts are not read")
        found[int(match["pp"] or 0), int(match["tp"])] = folder
    stages, width = (1 + max(place[axis] for place in found) for axis in (0, 1))
    ranks = []
    for stage in range(stages):
        row = []
        for tp in range(width):
            if (stage, tp) not in found:
                raise UserError(f"{directory}: no folder of tensor-parallel rank {tp}, pipeline stage {stage}")
            row.append(_read_rank(found[stage, tp]))
        ranks.append(row)
    args = ranks[0][0].args
    for name, count in (("tensor_model_parallel_size", width), ("pipeline_model_parallel_size", stages)):
        if isinstance(args.get(name), int) and args[name] != count:
            raise UserError(f"{directory}: {count} of {args[name]} ranks are there ({name})")
    return ranks


def _read_rank(folder: Path) -> _Rank:
    path = next((folder / name for name in _FILES if (folder / name).is_file()), folder / _FILES[0])
    state = read_archive(path)
    if not isinstance(state, dict):
        raise UserError(f"{path}: no checkpoint of Megatron-LM")
    chunks: dict[int, Mapping[str, StoredTensor]] = {}
    for name, value in state.items():
        match = _CHUNK.fullmatch(name) if isinstance(name, str) else None
        if match is not None and isinstance(value, dict):
            chunks[int(match["chunk"] or 0)] = dict(_model_tensors(path, value))
    if not chunks or sorted(chunks) != list(range(len(chunks))):
        raise UserError(f"{path}: no 'model' in it")
    args = state.get("args")
    return _Rank(path, tuple(chunks[n] for n in sorted(chunks)), args.values if isinstance(args, Settings) else {})


def _model_tensors(path: Path, model: Mapping[Any, Any]) -> Iterator[tuple[str, StoredTensor]]:
    for name, value in model.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: 'model' has a key that is no name")
        while name.startswith("module."):
            name = name.removeprefix("module.")
        if isinstance(value, dict):
            raise UserError(f"{path}: {name!r} holds tensors of its own: a model from before Megatron-Core")
        if _SKIPPED.fullmatch(name) or value is None:
            continue
        if not isinstance(value, StoredTensor):
            raise UserError(f"{path}: {name!r} is not a plain tensor (quantized weights are not read)")
        yield name, value
