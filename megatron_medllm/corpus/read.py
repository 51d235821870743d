"""From inputs to documents: plan units of work, and read one piece of an input in bounded memory.

A unit is what one worker does at a time and what a killed run repeats at most. Plain JSONL and line files are cut into
byte ranges (a line belongs to the range that its first byte lies in), Parquet into row groups; a compressed file or a
data set's shard cannot be cut. The cutting never depends on the number of workers.
"""

import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from megatron_medllm.config.corpus import SourceConfig
from megatron_medllm.errors import UserError
from megatron_medllm.inputs import find_inputs

BATCH_BYTES = 4 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_FORMATS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class Piece:
    """A cut of an input. `start`, `stop`: bytes (jsonl, lines), row groups (parquet), a shard and one past it."""

    path: str
    format: str
    compression: str = ""
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class Unit:
    """Consecutive pieces of one source. `input_bytes` is their size, where known beforehand."""

    source: str
    number: int
    pieces: tuple[Piece, ...]
    input_bytes: int = 0

    @property
    def name(self) -> str:
        """What its part's files are called."""
        return f"{self.number:06d}"


@dataclass
class Documents:
    """A batch in reading order. `lines` are 1-based within the piece; `bad` holds (line, reason)."""

    texts: list[str] = field(default_factory=list)
    ids: list[str | None] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    input_bytes: int = 0
    lines_read: int = 0

    def add(self, text: object, identifier: object, line: int) -> None:
        """Append a document, or note why it is none."""
        if not isinstance(text, str):
            self.bad.append((line, f"the text is {type(text).__name__}, not a string"))
        else:
            self.texts.append(text)
            self.ids.append(None if identifier is None else str(identifier))
            self.lines.append(line)


def plan_units(name: str, source: SourceConfig, *, first_number: int, chunk_bytes: int) -> list[Unit]:
    """Cut a source into units of about `chunk_bytes` of input."""
    if source.dataset is not None:
        return [Unit(name, first_number + i, (piece,)) for i, piece in enumerate(_dataset_pieces(name, source))]
    units: list[Unit] = []
    pending: list[Piece] = []
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


def _file_pieces(name: str, source: SourceConfig, path: str, chunk_bytes: int) -> Iterator[tuple[Piece, int]]:
    stem, suffix = os.path.splitext(path)
    compression = _COMPRESSIONS.get(suffix, "")
    if compression:
        suffix = os.path.splitext(stem)[1]
    kind = source.format if source.format != "auto" else _FORMATS.get(suffix)
    if kind is None:
        raise UserError(f"sources.{name}: cannot tell the format of {path} by its name; set `format`")
    size = os.path.getsize(path)
    if kind == "parquet":
        yield from _parquet_pieces(path, chunk_bytes)
    elif compression or kind == "text":
        yield Piece(path, kind, compression, 0, size), size
    else:
        cuts = max(1, -(-size // chunk_bytes))
        for i in range(cuts):
            start, stop = size * i // cuts, size * (i + 1) // cuts
            yield Piece(path, kind, "", start, stop), stop - start


def _parquet_pieces(path: str, chunk_bytes: int) -> Iterator[tuple[Piece, int]]:
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.ParquetFile(path).metadata
    except (pyarrow.ArrowInvalid, OSError):
        yield Piece(path, "parquet", "", 0, 1), 0  # the worker meets the same error and quarantines the file
        return
    start, size = 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= chunk_bytes or group == metadata.num_row_groups - 1:
            yield Piece(path, "parquet", "", start, group + 1), size
            start, size = group + 1, 0


def _load_dataset(source: SourceConfig):
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


def _dataset_pieces(name: str, source: SourceConfig) -> list[Piece]:
    shards = _load_dataset(source).num_shards
    return [Piece(f"{source.dataset}#{shard}", "dataset", "", shard, shards) for shard in range(shards)]


def read_piece(piece: Piece, source: SourceConfig) -> Iterator[Documents]:
    """Yield the documents of a piece in batches of some 4 MB of input.

    What cannot be read becomes `bad` entries, at the line where reading stopped if the rest is lost.
    """
    if piece.format == "parquet":
        yield from _read_parquet(piece, source)
    elif piece.format == "dataset":
        yield from _read_dataset(piece, source)
    elif piece.format == "text":
        yield _read_text(piece, source)
    else:
        parse = _parse_json_line if piece.format == "jsonl" else _parse_text_line
        line_number = 0
        for lines, error in _read_lines(piece):
            batch = Documents(input_bytes=sum(map(len, lines)) + len(lines), lines_read=len(lines))
            for line in lines:
                line_number += 1
                if line_number == 1 and piece.start == 0:
                    line = line.removeprefix(_BYTE_ORDER_MARK)
                if line and not line.isspace():
                    parse(batch, line, line_number, source)
            if error:
                batch.bad.append((line_number + 1, error))
            yield batch


def _parse_json_line(batch: Documents, line: bytes, number: int, source: SourceConfig) -> None:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:  # the standard library takes what Megatron takes, such as NaN
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            batch.bad.append((number, "an escaped lone surrogate"))
            return
        except UnicodeDecodeError:
            batch.bad.append((number, "not UTF-8"))
            return
        except (ValueError, RecursionError) as error:
            batch.bad.append((number, f"not JSON: {error}"))
            return
    if not isinstance(row, dict):
        batch.bad.append((number, f"expected a JSON object, found {type(row).__name__}"))
    elif source.text_field not in row:
        batch.bad.append((number, f"no field {source.text_field!r}"))
    else:
        batch.add(row[source.text_field], row.get(source.id_field), number)


def _parse_text_line(batch: Documents, line: bytes, number: int, source: SourceConfig) -> None:
    try:
        batch.add(line.decode().rstrip("\r"), None, number)
    except UnicodeDecodeError:
        batch.bad.append((number, "not UTF-8"))


def _read_lines(piece: Piece) -> Iterator[tuple[list[bytes], str]]:
    """Yield (whole lines without their newline, error or "")."""
    tail = b""
    for block, error in _read_blocks(piece):
        head, newline, rest = block.rpartition(b"\n")
        if newline:
            yield (tail + head).split(b"\n"), ""
            tail = rest
        else:
            tail += rest
        if error:
            yield [], error
            return
    if tail:
        yield [tail], ""


def _read_blocks(piece: Piece) -> Iterator[tuple[bytes, str]]:
    """Yield (bytes, error or ""): a plain range with whole lines at both ends, or a decompressed file."""
    with open(piece.path, "rb") as stream:
        if piece.compression:
            yield from _decompress(stream, piece.compression)
            return
        position = piece.start
        if position:
            stream.seek(position - 1)
            position += len(stream.readline()) - 1
        stream.seek(position)
        while position < piece.stop:
            block = stream.read(min(BATCH_BYTES, piece.stop - position))
            if not block:
                return
            if position + len(block) >= piece.stop and not block.endswith(b"\n"):
                block += stream.readline()
            position += len(block)
            yield block, ""


def _decompress(stream, compression: str) -> Iterator[tuple[bytes, str]]:
    import zstandard

    def new_member():
        return zlib.decompressobj(31) if compression == "gzip" else zstandard.ZstdDecompressor().decompressobj()

    member, at_start, block = new_member(), True, b""
    while True:
        block = block or stream.read(1 << 20)
        if not block:
            if not at_start:
                yield b"", f"the {compression} stream is cut short"
            return
        try:
            text = member.decompress(block, BATCH_BYTES) if compression == "gzip" else member.decompress(block)
        except (zlib.error, zstandard.ZstdError) as error:
            yield b"", f"the {compression} stream is broken: {error}"
            return
        at_start, block = False, b""
        yield text, ""
        if compression == "gzip":
            block = member.unconsumed_tail
        if member.eof:
            block = member.unused_data
            member, at_start = new_member(), True


def _read_text(piece: Piece, source: SourceConfig) -> Documents:
    blocks, problem = [], ""
    for block, error in _read_blocks(piece):
        blocks.append(block)
        problem = problem or error
    data = b"".join(blocks)
    batch = Documents(input_bytes=len(data), lines_read=1)
    try:
        if problem:
            batch.bad.append((1, problem))
        else:
            batch.add(data.decode(), None, 1)
    except UnicodeDecodeError:
        batch.bad.append((1, "not UTF-8"))
    return batch


def _read_parquet(piece: Piece, source: SourceConfig) -> Iterator[Documents]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        file = pyarrow.parquet.ParquetFile(piece.path)
        names = file.schema_arrow.names
        if source.text_field not in names:
            yield Documents(bad=[(1, f"no column {source.text_field!r}")], lines_read=1)
            return
        columns = [name for name in (source.text_field, source.id_field) if name in names]
        groups = list(range(piece.start, piece.stop))
        for table in file.iter_batches(batch_size=512, row_groups=groups, columns=columns, use_threads=False):
            batch = Documents(input_bytes=table.nbytes, lines_read=table.num_rows)
            texts = table.column(source.text_field).to_pylist()
            ids = table.column(source.id_field).to_pylist() if source.id_field in columns else [None] * len(texts)
            for text, identifier in zip(texts, ids, strict=True):
                row += 1
                batch.add(text, identifier, row)
            yield batch
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        yield Documents(bad=[(row + 1, f"broken Parquet: {str(error).splitlines()[0]}")], lines_read=1)


def _read_dataset(piece: Piece, source: SourceConfig) -> Iterator[Documents]:
    rows = _load_dataset(source).shard(num_shards=piece.stop, index=piece.start)
    batch = Documents()
    for number, row in enumerate(rows, start=1):
        if source.text_field not in row:
            batch.bad.append((number, f"no field {source.text_field!r}"))
        else:
            batch.add(row[source.text_field], row.get(source.id_field), number)
            batch.input_bytes += len(row[source.text_field] or "") * 3
        batch.lines_read += 1
        if batch.input_bytes > BATCH_BYTES:
            yield batch
            batch = Documents()
    yield batch


def count_lines(path: Path, stop: int) -> int:
    """Lines that begin before byte `stop`: what turns a line number within a piece into one within its file."""
    count, left = int(stop > 0), stop - 1
    with open(path, "rb") as stream:
        while left > 0 and (block := stream.read(min(BATCH_BYTES, left))):
            count += block.count(b"\n")
            left -= len(block)
    return count
