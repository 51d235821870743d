"""Conversion between Hugging Face (HF) directories and Megatron distributed checkpoints, in one CPU process.

Nothing larger than a run of rows is in memory. The model is cut into
parts, one a layer; several threads convert parts side by side, and what they finish is journalled, so a killed
conversion goes on where it stopped and ends with the same bytes.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_medllm.checkpoint.adapter_merge import AdapterMerge
from megatron_medllm.checkpoint.description import describe_checkpoint
from megatron_medllm.checkpoint.hf_source import HFWeights
from megatron_medllm.checkpoint.hf_target import (
    DEFAULT_SHARD_BYTES,
    DIGESTS_NAME,
    HFTarget,
    hf_config,
    partial_dir,
    refuse_existing,
)
from megatron_medllm.checkpoint.journal import Journal
from megatron_medllm.checkpoint.names import (
    Weight,
    cut_pieces,
    hf_shape,
    local_pieces,
    model_weights,
    stacked_name,
)
from megatron_medllm.checkpoint.open_model import open_checkpoint, open_weights
from megatron_medllm.checkpoint.stored import MegatronWeights
from megatron_medllm.checkpoint.torch_dist import (
    FILE_DIGESTS_NAME,
    ITEM_DIGESTS_NAME,
    Item,
    object_keys,
    serialize,
    write_index,
)
from megatron_medllm.checkpoint.weight_source import WeightSource
from megatron_medllm.config.model import ModelShape, shape_from_hf_config
from megatron_medllm.errors import UserError
from megatron_medllm.progress import progress
from megatron_medllm.storage import digest_file, digest_value, full_disk_error, read_json, write_json

DEFAULT_CHUNK_BYTES = 32 * 1024 * 1024
_OBJECTS_PART = "objects"


def import_hf(
    hf_dir: Path,
    ckpt_dir: Path,
    *,
    dtype: torch.dtype | None = None,
    ffn_hidden_size: int | None = None,
    workers: int = 2,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> None:
    """Convert an HF directory to a distributed checkpoint that any Megatron layout loads.

    The vocabulary is stored unpadded; Megatron-Core pads it on loading. Run again after a kill, it goes on.

    Args:
        hf_dir: config.json and safetensors; if it holds digests of ours, every tensor is checked against them.
        ckpt_dir: takes its name only when whole; must not exist.
        dtype: of the checkpoint; default: that of the first HF tensor.
        ffn_hidden_size: the FFN's width in Megatron, padded with zeros; default: the model's own.
        workers: threads.
        chunk_bytes: largest piece of a tensor in memory, per thread (a few copies of it).

    Raises:
        UserError: the source is not exactly a Qwen2.5 model, is damaged, or the disk is full.
    """
    refuse_existing(ckpt_dir)
    shape = shape_from_hf_config(hf_dir)
    source = HFWeights(hf_dir, shape)
    dtype = dtype or source.own_dtype()
    plan = _ImportPlan(source, shape, dtype, ffn_hidden_size or shape.ffn_hidden_size, chunk_bytes)
    identity = {
        "job": "import",
        "source": _source_identity(hf_dir, {path for path, _ in source.place.values()}),
        "dtype": str(dtype),
        "ffn_hidden_size": plan.ffn_hidden_size,
        "chunk_bytes": chunk_bytes,
    }
    partial = partial_dir(ckpt_dir)
    with closing(Journal(partial, identity)) as journal:
        parts: dict[str, Callable[[], Any]] = {
            name: functools.partial(plan.write_part, partial, number, weights)
            for number, (name, weights) in enumerate(_parts(shape).items())
        }
        parts[_OBJECTS_PART] = functools.partial(plan.write_objects, partial)
        _run_parts(parts, journal, workers=workers, title=f"import {hf_dir.name}")
        items = [_item(row) for name in parts for row in journal.done[name]]
        shapes = plan.tensor_shapes()
        write_index(partial, {key: (shape, dtype) for key, shape in shapes.items()}, items)
        describe_checkpoint(partial, shape, dtype=dtype, source_dir=hf_dir)
        digests = [[item.file, item.start, item.sha256] for item in items]
        write_json(partial / ITEM_DIGESTS_NAME, {"algorithm": "sha256", "items": digests})
        journal.finish(ckpt_dir)


def _item(row: list[Any]) -> Item:
    key, offsets, sizes, file, start, length, sha256 = row
    return Item(key, offsets and tuple(offsets), sizes and tuple(sizes), file, start, length, sha256)


def _source_identity(directory: Path, files: set[Path]) -> str:
    """Changes when the source does: names, sizes and times of its files."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]
    return digest_value([str(directory.resolve()), stats])


def _parts(shape: ModelShape) -> dict[str, list[Weight]]:
    """What is converted, and journalled, at once: a layer, or one of the big tensors around the layers."""
    parts: dict[str, list[Weight]] = {}
    for weight in model_weights(shape):
        _, layer = stacked_name(weight)
        name = weight.mcore if layer is None else f"layer {layer}"
        parts.setdefault(name, []).append(weight)
    return parts


def _run_parts(parts: dict[str, Callable[[], Any]], journal: Journal, *, workers: int, title: str) -> None:
    """Run and journal the parts that are not done yet; the first error stops the rest."""
    with progress(title, len(parts)) as bar:
        bar.update(len(journal.done), "resumed" if journal.done else "")

        def run(name: str, work: Callable[[], Any]) -> None:
            journal.record(name, work())
            bar.update(len(journal.done), name)

        pool = ThreadPoolExecutor(workers)
        try:
            futures = [pool.submit(run, name, work) for name, work in parts.items() if name not in journal.done]
            for future in as_completed(futures):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


class _ImportPlan:
    """How the tensors of one HF directory are cut into chunks."""

    def __init__(
        self, source: HFWeights, shape: ModelShape, dtype: torch.dtype, ffn_hidden_size: int, chunk_bytes: int
    ) -> None:
        if ffn_hidden_size < shape.ffn_hidden_size:
            raise UserError(f"the FFN cannot be cut from {shape.ffn_hidden_size} to {ffn_hidden_size}")
        self.source, self.shape, self.dtype = source, shape, dtype
        self.ffn_hidden_size, self.chunk_bytes = ffn_hidden_size, chunk_bytes
        digests = source.hf_dir / DIGESTS_NAME
        self._expected: dict[str, str] = read_json(digests)["tensors"] if digests.exists() else {}

    def megatron_shape(self, weight: Weight) -> tuple[int, ...]:
        """Shape of one layer's weight in Megatron."""
        sizes = list(hf_shape(weight.hf[0], self.shape))
        axis = weight.axis or 0
        sizes[axis] = sum(hf_shape(name, self.shape)[axis] for name in weight.hf)
        if "linear_fc" in weight.mcore and weight.axis is not None:
            sizes[axis] = self.ffn_hidden_size * len(weight.hf)
        return tuple(sizes)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Key and shape of every tensor of the checkpoint, layers stacked."""
        shapes = {}
        for weight in model_weights(self.shape):
            key, layer = stacked_name(weight)
            sizes = self.megatron_shape(weight)
            shapes[key] = sizes if layer is None else (self.shape.num_layers, *sizes)
        return shapes

    def write_part(self, directory: Path, number: int, weights: list[Weight]) -> list[tuple]:
        """Write one `.distcp` file of chunks; returns its items."""
        self._check_digests(weights)
        return [astuple(item) for item in _write_items(directory, number, self._chunks(weights))]

    def write_objects(self, directory: Path) -> list[tuple]:
        """Write the file of empty objects that Megatron's modules look for."""
        objects = ((key, None, [None]) for key in object_keys(self.shape))
        return [astuple(item) for item in _write_items(directory, len(_parts(self.shape)), objects)]

    def _check_digests(self, weights: list[Weight]) -> None:
        for name in (name for weight in weights for name in weight.hf if name in self._expected):
            if self.source.digest(name) != self._expected[name]:
                path, _ = self.source.place[name]
                raise UserError(f"{path}: tensor {name!r} does not match its digest: a damaged file")

    def _chunks(self, weights: list[Weight]) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
        """Runs of rows of each weight: key, offsets in the stacked tensor, and the rows."""
        for weight in weights:
            key, layer = stacked_name(weight)
            sizes = self.megatron_shape(weight)
            row_bytes = torch.Size(sizes[1:]).numel() * self.dtype.itemsize
            step = max(1, self.chunk_bytes // row_bytes)
            for start in range(0, sizes[0], step):
                rows = self._rows(weight, sizes, start, min(start + step, sizes[0])).to(self.dtype)
                offsets = (start, *[0] * (len(sizes) - 1))
                yield (key, offsets, rows) if layer is None else (key, (layer, *offsets), rows[None])

    def _rows(self, weight: Weight, sizes: tuple[int, ...], start: int, stop: int) -> Tensor:
        if weight.axis == 1:
            rows = self.source.read(weight.hf[0], axis=0, start=start, stop=stop)
            return F.pad(rows, (0, sizes[1] - rows.shape[1]))
        pieces = local_pieces(weight, self.shape, local_size=sizes[0], tp_rank=0, tp_size=1)
        return self.source.read_pieces(weight, cut_pieces(pieces, start, stop))


def _write_items(
    directory: Path, number: int, values: Iterator[tuple[str, tuple[int, ...] | None, Any]]
) -> Iterator[Item]:
    """Write values one after the other into one file and flush it to the disk."""
    file_name = f"__0_{number}.distcp"
    path = directory / file_name
    try:
        with open(path, "wb") as stream:
            for key, offsets, value in values:
                start = stream.tell()
                data = serialize(value)
                stream.write(data)
                sizes = tuple(value.shape) if isinstance(value, Tensor) else None
                yield Item(key, offsets, sizes, file_name, start, len(data), hashlib.sha256(data).hexdigest())
            stream.flush()
            os.fdatasync(stream.fileno())
    except OSError as error:
        raise full_disk_error(error, path) from error


def newest_checkpoint(directory: Path) -> Path:
    """`directory` itself, or the newest `step-*` in it when it is a training run's folder of checkpoints."""
    steps = {int(path.name[5:]): path for path in directory.glob("step-*") if path.name[5:].isdecimal()}
    return steps[max(steps)] if steps else directory


def export_checkpoint(
    ckpt_dir: Path,
    hf_dir: Path,
    *,
    source_dir: Path | None = None,
    base_dir: Path | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    workers: int = 2,
) -> None:
    """Convert a Megatron checkpoint, imported, trained here or by another tool, in any layout, to an HF directory.

    Vocabulary and FFN padding are stripped, an adapter is merged into its base. Run again after a kill, it goes on.

    Args:
        ckpt_dir: as `open_checkpoint` takes it; its stored digests are checked as it is read.
        hf_dir: takes its name only when whole; must not exist.
        source_dir: HF directory with the model's config.json and tokenizer; default: what the checkpoint carries.
        base_dir: HF directory that an adapter was trained on; needed for a checkpoint that holds an adapter.
        dtype: default: the checkpoint's, or its base's.
        shard_bytes: a new safetensors file starts where one would grow beyond this.
        workers: threads.

    Raises:
        UserError: the checkpoint is incomplete, damaged, or of another model, or the disk is full.
    """
    refuse_existing(hf_dir)
    opened = open_checkpoint(ckpt_dir, source_dir, base_dir=base_dir)
    place, shape = opened.place, opened.shape
    if opened.adapter is None:
        source: WeightSource = MegatronWeights(opened.tensors, shape)
        write: Callable[[Weight, HFTarget], None] = functools.partial(_copy_weight, source)
    else:
        if base_dir is None:
            raise UserError(f"{ckpt_dir}: holds an adapter; name the HF directory of the base it was trained on")
        source = open_weights(base_dir, shape)
        write = AdapterMerge(opened.adapter_reader(), source, shape).write
    dtype = dtype or source.own_dtype()
    check_files(place.weights)
    source_dir = source_dir or place.tokenizer or base_dir
    partial = partial_dir(hf_dir)
    target = HFTarget(partial, shape, dtype, shard_bytes)
    identity = {
        "job": "export",
        "source": _source_identity(place.weights, set(place.files())),
        "config": hf_config(shape, dtype, source_dir),
        "shard_bytes": shard_bytes,
        "base": str(base_dir),
    }
    with closing(Journal(partial, identity)) as journal:
        if not journal.done:
            target.create_files()
        parts: dict[str, Callable[[], Any]] = {
            name: functools.partial(_export_part, write, weights, target) for name, weights in _parts(shape).items()
        }
        _run_parts(parts, journal, workers=workers, title=f"export {ckpt_dir.name}")
        digests = {name: digest for part in journal.done.values() for name, digest in part.items()}
        target.finish(shape=shape, source_dir=source_dir, digests=digests)
        journal.finish(hf_dir)


def check_files(ckpt_dir: Path) -> None:
    """Training checkpoints record a digest per file: compare them first.

    Raises:
        UserError: a file is missing or is not as it was written.
    """
    path = ckpt_dir / FILE_DIGESTS_NAME
    for name, digest in (read_json(path) if path.exists() else {}).items():
        if not (ckpt_dir / name).exists():
            raise UserError(f"{ckpt_dir / name}: no such file, though {FILE_DIGESTS_NAME} names it")
        if digest_file(ckpt_dir / name) != digest:
            raise UserError(f"{ckpt_dir / name}: does not match its digest: a damaged file")


def _export_part(write: Callable[[Weight, HFTarget], None], weights: list[Weight], target: HFTarget) -> dict[str, str]:
    """Write the HF tensors of one part; returns their digests."""
    for weight in weights:
        write(weight, target)
    names = [name for weight in weights for name in weight.hf]
    target.flush(names)
    return {name: target.digest(name) for name in names}


def _copy_weight(source: WeightSource, weight: Weight, target: HFTarget) -> None:
    for name in weight.hf:
        target.copy(source, name)
