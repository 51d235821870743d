"""Megatron-Core's distributed checkpoint format (`torch_dist`), written and read piece by piece without a model.

A checkpoint directory holds `.distcp` files full of items, each one `torch.save` of a chunk of a tensor (or of a small
object); `.metadata`, a pickle that says which chunk of which tensor lies where; and Megatron's `metadata.json` and
`common.pt`. A tensor may be cut into any grid of chunks and any layout can load it, so a tensor never has to be in
memory as a whole: we cut it into runs of rows.

Pickles can run code. `.metadata` is therefore read by an unpickler that knows nothing but the classes of this format,
tensors are located and read by `foreign.archive`, and objects are loaded with `weights_only`. Megatron-Core's own
loader unpickles all of them without such care: call `refuse_unsafe` first on a checkpoint that somebody else made.
"""

import io
import math
import pickle
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_medllm.checkpoint.foreign.archive import StoredTensor, read_archive
from megatron_medllm.checkpoint.safetensors_file import Entry, digest_part
from megatron_medllm.checkpoint.stored import Block, StoredWeight
from megatron_medllm.config.model import ModelShape
from megatron_medllm.errors import UserError
from megatron_medllm.storage import atomic_write, read_json, write_json

METADATA_NAME = ".metadata"
MODEL_NAME = "model.json"  # what model it is: checkpoint.description
ITEM_DIGESTS_NAME = "tensor_digests.json"  # imported checkpoints: SHA-256 of every stored item
FILE_DIGESTS_NAME = "digests.json"  # training checkpoints: file -> SHA-256
CARRIED_DIR = "hf"  # tokenizer, generation settings and config.json of the model's HF directory
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# Empty here, but Megatron's modules look for theirs on loading: per layer, and of the whole model.
_LAYER_OBJECTS = tuple(
    f"{module}._extra_state"
    for module in (
        "self_attention.core_attention",
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    )
)
_COMMON_OBJECT = "common_state/shard_0_1"  # in place of common.pt, since Megatron-Core 0.19
_CHECKPOINT = "torch.distributed.checkpoint"
_KNOWN_CLASSES = {
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    *((f"{_CHECKPOINT}.planner", name) for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
    *(
        (f"{_CHECKPOINT}.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


@dataclass(frozen=True)
class Item:
    """One item of a `.distcp` file. `offsets` and `sizes` (of the chunk in its tensor) are None for an object."""

    key: str
    offsets: tuple[int, ...] | None
    sizes: tuple[int, ...] | None
    file: str
    start: int  # bytes
    length: int  # bytes
    sha256: str | None


def serialize(value: Any) -> memoryview:
    """The bytes of an item."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getbuffer()


def object_keys(shape: ModelShape) -> list[str]:
    """Keys of the empty objects that Megatron's modules expect to find."""
    layers = shape.num_layers
    keys = [f"decoder.layers.{name}/shard_{n}_{layers}" for n in range(layers) for name in _LAYER_OBJECTS]
    return [*keys, "decoder.final_layernorm._extra_state/shard_0_1"]


def write_index(
    directory: Path,
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]],
    items: list[Item],
    *,
    common: dict[str, Any] | None = None,
) -> None:
    """Write what makes a directory of `.distcp` files a checkpoint.

    Args:
        directory: holds the files that the items name.
        tensors: key -> shape and type of each whole tensor.
        items: every chunk and object.
        common: what is the same for every rank, beside the items.

    Raises:
        UserError: a tensor's chunks do not add up to it.
    """
    # Interned, because a pickle refers back to a string that is the same object: equal content, equal bytes.
    properties = {dtype: TensorProperties(dtype=dtype) for _, dtype in tensors.values()}
    entries: dict[str, Any] = {
        sys.intern(key): TensorStorageMetadata(properties[dtype], torch.Size(shape), [])
        for key, (shape, dtype) in tensors.items()
    }
    storage = {}
    for item in items:
        key, file = sys.intern(item.key), sys.intern(item.file)
        if item.offsets is None or item.sizes is None:
            entries[key] = BytesStorageMetadata()
        else:
            chunk = ChunkStorageMetadata(torch.Size(item.offsets), torch.Size(item.sizes))
            entries[key].chunks.append(chunk)
        storage[MetadataIndex(key, item.offsets)] = _StorageInfo(file, item.start, item.length)
    for key, (shape, _) in tensors.items():
        if sum(chunk.sizes.numel() for chunk in entries[key].chunks) != math.prod(shape):
            raise UserError(f"{directory}: the parts of tensor {key!r} do not make up {list(shape)}")
    with atomic_write(directory / METADATA_NAME) as stream:
        pickle.dump(Metadata(entries, storage_data=storage), stream)
    with atomic_write(directory / "common.pt") as stream:
        torch.save(common or {}, stream)
    write_json(directory / "metadata.json", _FORMAT)


class _MetadataUnpickler(pickle.Unpickler):
    """Builds checkpoint metadata and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN_CLASSES or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"refers to {module}.{name}")


@dataclass(frozen=True)
class Chunk:
    """A stored part of one Megatron tensor: rows from `row`, columns from `column` (0 for vectors)."""

    row: int
    column: int
    sizes: tuple[int, ...]
    item: Item


class TorchDistReader:
    """Reads the tensors of a distributed checkpoint, chunk by chunk."""

    def __init__(self, directory: Path) -> None:
        """Read the metadata; no tensor is read.

        Raises:
            UserError: not a torch_dist checkpoint, or its metadata is damaged or holds foreign code.
        """
        self.directory = directory
        if not (directory / "metadata.json").exists():
            raise UserError(f"{directory}: not a distributed checkpoint (no metadata.json)")
        backend = read_json(directory / "metadata.json").get("sharded_backend")
        if backend != "torch_dist":
            raise UserError(f"{directory / 'metadata.json'}: format {backend!r}; only 'torch_dist' is read")
        self._metadata = _read_metadata(directory / METADATA_NAME)
        self._digests = self._item_digests()
        self._entries: dict[Item, Entry] = {}

    def _item_digests(self) -> dict[tuple[str, int], str]:
        path = self.directory / ITEM_DIGESTS_NAME
        rows = read_json(path)["items"] if path.exists() else []
        return {(file, start): sha256 for file, start, sha256 in rows}

    def shape_of(self, key: str) -> tuple[int, ...] | None:
        """Shape of a stored tensor, None if there is none of this key."""
        entry = self._metadata.state_dict_metadata.get(key)
        return tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None

    def dtype_of(self, key: str) -> torch.dtype:
        """Type of a stored tensor."""
        return self._tensor(key).properties.dtype

    def _tensor(self, key: str) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        return entry

    def tensor_keys(self) -> list[str]:
        """The keys of the stored tensors."""
        entries = self._metadata.state_dict_metadata.items()
        return [key for key, entry in entries if isinstance(entry, TensorStorageMetadata)]

    def common_state(self) -> Any:
        """What is the same for every rank, as `foreign.archive` reads it: unknown objects are inert."""
        path = self.directory / "common.pt"
        if path.is_file():
            return read_archive(path)
        place = self._metadata.storage_data.get(MetadataIndex(_COMMON_OBJECT))
        if place is None:
            return None
        check_item(
            self.directory, Item(_COMMON_OBJECT, None, None, place.relative_path, place.offset, place.length, None)
        )
        found = read_archive(self.directory / place.relative_path, start=place.offset, length=place.length)
        return (
            found[0] if isinstance(found, list) and len(found) == 1 else found
        )  # an object is stored as a list of one

    def stored(self, key: str, layer: int | None) -> StoredWeight:
        """A stored tensor, or one layer of it where all layers are stacked in one.

        Raises:
            UserError: its parts do not add up to it.
        """
        whole = self.shape_of(key) or ()
        blocks = tuple(
            Block(
                chunk.row,
                chunk.column,
                chunk.sizes,
                self.directory / chunk.item.file,
                partial(self._locate, chunk, layer),
            )
            for chunk in self.chunks(key, layer)
        )
        return StoredWeight(key, whole if layer is None else whole[1:], self.dtype_of(key), blocks)

    def chunks(self, key: str, layer: int | None) -> list[Chunk]:
        """The stored parts of one weight, by row, then column.

        Raises:
            UserError: the parts do not add up to the whole tensor.
        """
        entry = self._tensor(key)
        skip = 0 if layer is None else 1
        found = []
        for chunk in entry.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if layer is not None and not offsets[0] <= layer < offsets[0] + sizes[0]:
                continue
            place = self._metadata.storage_data[MetadataIndex(key, offsets)]
            digest = self._digests.get((place.relative_path, place.offset))
            item = Item(key, offsets, sizes, place.relative_path, place.offset, place.length, digest)
            inner = offsets[skip:]
            found.append(Chunk(inner[0], inner[1] if len(inner) > 1 else 0, sizes[skip:], item))
        if sum(torch.Size(c.sizes).numel() for c in found) != torch.Size(entry.size[skip:]).numel():
            raise UserError(f"{self.directory}: tensor {key!r} is stored incompletely")
        return sorted(found, key=lambda chunk: (chunk.row, chunk.column))

    def _locate(self, chunk: Chunk, layer: int | None) -> Entry:
        """Where the numbers of one chunk lie.

        Raises:
            UserError: the file is missing, truncated, or does not match the recorded digest.
        """
        item = chunk.item
        entry = self._entries.get(item)
        if entry is None:
            entry = self._entries[item] = self._open(item)
        if layer is None or item.offsets is None:
            return entry
        size = entry.size // entry.shape[0]
        return Entry(entry.dtype, entry.shape[1:], entry.offset + (layer - item.offsets[0]) * size, size)

    def _open(self, item: Item) -> Entry:
        path = self.directory / item.file
        check_item(self.directory, item)
        found = read_archive(path, start=item.start, length=item.length)
        if not isinstance(found, StoredTensor):
            raise UserError(f"{path}: item {item.key!r} is not a tensor")
        sizes = item.sizes or ()
        if torch.Size(found.shape).numel() != torch.Size(sizes).numel() or found.dtype != self.dtype_of(item.key):
            raise UserError(f"{path}: item {item.key!r} has another shape than recorded")
        return replace(found.entry(item.key), shape=sizes)

    def refuse_unsafe_objects(self) -> None:
        """Load every stored object with `weights_only`.

        Raises:
            UserError: one of them would run code or is damaged.
        """
        for key, entry in self._metadata.state_dict_metadata.items():
            if isinstance(entry, BytesStorageMetadata):
                place = self._metadata.storage_data[MetadataIndex(key)]
                load_item(self.directory, Item(key, None, None, place.relative_path, place.offset, place.length, None))


def check_item(directory: Path, item: Item) -> None:
    """Check that an item is inside the checkpoint, whole, and as its digest says, where one is known.

    Raises:
        UserError: names the file and the item at fault.
    """
    path = directory / item.file
    if path.parent != directory:
        raise UserError(f"{directory / METADATA_NAME}: item {item.key!r} points outside the checkpoint: {item.file!r}")
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, though {METADATA_NAME} names it") from None
    if size < item.start + item.length:
        raise UserError(f"{path}: truncated inside {item.key!r}")
    if item.sha256 is not None and digest_part(path, item.start, item.length) != item.sha256:
        raise UserError(f"{path}: {item.key!r} at {list(item.offsets or ())} does not match its digest: a damaged file")


def load_item(directory: Path, item: Item) -> Any:
    """Read one item, check its digest where one is known, and load it with `weights_only`.

    Raises:
        UserError: names the file and the item at fault.
    """
    check_item(directory, item)
    path = directory / item.file
    with open(path, "rb") as stream:
        stream.seek(item.start)
        data = stream.read(item.length)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{path}: cannot read {item.key!r}: {str(error).splitlines()[0]}") from None


def _read_metadata(path: Path) -> Metadata:
    try:
        with open(path, "rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the checkpoint is incomplete") from None
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: not the metadata of a distributed checkpoint: {error}") from None
    except (EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__})") from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise UserError(f"{path}: not the metadata of a distributed checkpoint")
    return metadata


def refuse_unsafe(directory: Path) -> None:
    """Check that loading this checkpoint with Megatron-Core would run no foreign code.

    Raises:
        UserError: names the file that would, or that is damaged.
    """
    TorchDistReader(directory).refuse_unsafe_objects()
