"""What a source is made of: its files, how they are packed and encoded, and how they are cut into units of work.

A unit is what one worker does at a time and what a killed run repeats at most. Plain JSONL and line files are cut into
byte ranges (a line belongs to the range that its first byte lies in), Parquet into row groups; a compressed file, one
in UTF-16, a JSON array or a data set's shard cannot be cut. The cutting never depends on the number of workers.
"""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO, Any

from megatron_medllm.config.corpus import SourceConfig
from megatron_medllm.corpus.json_values import is_json_values
from megatron_medllm.corpus.streams import (
    COMPRESSIONS,
    BrokenInputError,
    compression_of,
    marked_encoding,
    normal_encoding,
    read_blocks,
    splits_by_bytes,
)
from megatron_medllm.errors import UserError
from megatron_medllm.inputs import find_inputs
from megatron_medllm.storage import pointer_kind

_FORMATS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "text"}
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
_HEAD_BYTES = 1 << 16


@dataclass(frozen=True)
class InputPiece:
    """A cut of an input. `start`, `stop`: bytes (jsonl, lines), row groups (parquet), a shard and one past it.

    `format` is the source's, or `json` for JSON that is not one object a line.
    """

    path: str
    format: str
    compression: str = ""
    start: int = 0
    stop: int = 0
    encoding: str = "utf-8"


@dataclass(frozen=True)
class Unit:
    """Consecutive pieces of one source. `input_bytes` is their size, where known beforehand."""

    source: str
    number: int
    pieces: tuple[InputPiece, ...]
    input_bytes: int = 0

    @property
    def name(self) -> str:
        """What its part's files are called."""
        return f"{self.number:06d}"


def plan_units(name: str, source: SourceConfig, *, first_number: int, chunk_bytes: int) -> list[Unit]:
    """Cut a source into units of about `chunk_bytes` of input."""
    if source.dataset is not None:
        return [Unit(name, first_number + i, (piece,)) for i, piece in enumerate(_dataset_pieces(name, source))]
    units: list[Unit] = []
    pending: list[InputPiece] = []
    pending_bytes = 0

    def flush() -> None:
        nonlocal pending_bytes
        if pending:
            units.append(Unit(name, first_number + len(units), tuple(pending), pending_bytes))
            pending.clear()
            pending_bytes = 0

    for path in find_inputs(source.paths, field=f"sources.{name}.paths"):
        for piece, size in _file_pieces(name, source, path, chunk_bytes):
            if pending_bytes + size > chunk_bytes:
                flush()
            pending.append(piece)
            pending_bytes += size
    flush()
    return units


def _file_pieces(name: str, source: SourceConfig, path: str, chunk_bytes: int) -> Iterator[tuple[InputPiece, int]]:
    piece, size = _look_into(name, source, path), os.path.getsize(path)
    if piece.format == "parquet":
        yield from _parquet_pieces(path, piece.encoding, chunk_bytes)
    elif piece.compression or piece.format not in ("jsonl", "lines") or not splits_by_bytes(piece.encoding):
        yield replace(piece, stop=size), size
    else:
        cuts = max(1, -(-size // chunk_bytes))
        for i in range(cuts):
            start, stop = size * i // cuts, size * (i + 1) // cuts
            yield replace(piece, start=start, stop=stop), stop - start


def _look_into(name: str, source: SourceConfig, path: str) -> InputPiece:
    """The file as one piece: format, compression and encoding by its name, its first bytes and the source's settings.

    Raises:
        UserError: it cannot be read, is an archive or a pointer, or its format cannot be told.
    """
    try:
        with open(path, "rb") as stream:
            packed = stream.read(_HEAD_BYTES)
    except OSError as error:
        raise UserError(f"sources.{name}: {path} cannot be read ({error.strerror})") from None
    if kind := pointer_kind(packed):
        raise UserError(f"sources.{name}: {path} is a {kind} pointer, not the file itself: fetch it (`{kind} pull`)")
    stem, suffix = os.path.splitext(path.lower())
    compression = compression_of(packed, suffix)
    if suffix in COMPRESSIONS:
        suffix = os.path.splitext(stem)[1]
    head = _unpacked(path, packed, compression) if compression else packed
    if suffix in _ARCHIVES or packed.startswith(b"PK\x03\x04") or head[257:262] == b"ustar":
        raise UserError(f"sources.{name}: {path} is an archive; unpack it, and name the files in it")
    kind = source.format if source.format != "auto" else _FORMATS.get(suffix, "")
    if not kind:
        raise UserError(
            f"sources.{name}: cannot tell the format of {path} by its name (known are {', '.join(_FORMATS)}); "
            "set `format`, or name the files with a glob"
        )
    if kind == "parquet" and compression:
        raise UserError(f"sources.{name}: {path} is a packed Parquet file; unpack it (Parquet is packed within)")
    encoding = marked_encoding(head) or normal_encoding(source.encoding)
    encoding = {"utf-16": "utf-16-le", "utf-32": "utf-32-le"}.get(encoding, encoding)  # as Python, where no mark says
    if kind == "jsonl" and is_json_values(head.decode(encoding, "ignore").encode()):
        kind = "json"
    return InputPiece(path, kind, compression, encoding=encoding)


def _unpacked(path: str, packed: bytes, compression: str) -> bytes:
    """The beginning of what a packed file holds: of as many members or blocks as it takes, `packed` being its own."""
    head = _beginning(io.BytesIO(packed), compression)
    if len(head) < _HEAD_BYTES == len(packed):  # bzip2 and zstd give nothing before a whole block
        with open(path, "rb") as stream:
            head = _beginning(stream, compression)
    return head


def _beginning(stream: IO[bytes], compression: str) -> bytes:
    """The first bytes of a packed stream; less where it is cut or broken, which the worker meets again."""
    head = b""
    try:
        for block in read_blocks(stream, compression, window_bytes=1 << 31):
            head += block[:_HEAD_BYTES]
            if len(head) >= _HEAD_BYTES:
                break
    except BrokenInputError:
        pass
    return head[:_HEAD_BYTES]


def _parquet_pieces(path: str, encoding: str, chunk_bytes: int) -> Iterator[tuple[InputPiece, int]]:
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.ParquetFile(path).metadata
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError):  # the last one: a damaged name
        yield (
            InputPiece(path, "parquet", "", 0, 1, encoding),
            0,
        )  # the worker meets the same error and quarantines the file
        return
    start, size = 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= chunk_bytes or group == metadata.num_row_groups - 1:
            yield InputPiece(path, "parquet", "", start, group + 1, encoding), size
            start, size = group + 1, 0


def load_dataset(source: SourceConfig) -> Any:
    """The data set's split, streamed.

    Raises:
        UserError: there is none, or the hub cannot be reached.
    """
    import datasets

    assert source.dataset is not None
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(source.dataset, source.dataset_config, split=source.dataset_split, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"data set {source.dataset!r}: {str(error).splitlines()[0]}") from None


def dataset_files(source: SourceConfig) -> list[str]:
    """The files that a data set's split is made of; those on the hub name their commit (`hf://…@COMMIT/…`)."""
    import datasets

    assert source.dataset is not None
    builder = datasets.load_dataset_builder(source.dataset, source.dataset_config)
    return list((builder.config.data_files or {}).get(source.dataset_split, []))


def _dataset_pieces(name: str, source: SourceConfig) -> list[InputPiece]:
    shards = load_dataset(source).num_shards
    return [InputPiece(f"{source.dataset}#{shard}", "dataset", "", shard, shards) for shard in range(shards)]
