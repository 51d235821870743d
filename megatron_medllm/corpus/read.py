"""One piece of an input to documents, in bounded memory. What cannot be read becomes a `Loss` with its line."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from megatron_medllm.config.corpus import SourceConfig
from megatron_medllm.corpus.json_values import read_values
from megatron_medllm.corpus.streams import (
    BATCH_BYTES,
    BrokenInputError,
    decode,
    read_blocks,
    read_lines,
    splits_by_bytes,
    to_utf8,
)
from megatron_medllm.corpus.units import InputPiece, load_dataset

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_NAMES_TOLD = 8
_ESCAPED_BYTES = (0xDC80, 0xDCFF)  # what `surrogateescape` makes of bytes that are no UTF-8


@dataclass(frozen=True)
class Loss:
    """What is no document. `kind` is the same for all of its kind, `detail` is not."""

    line: int
    kind: str
    detail: str = ""

    @property
    def reason(self) -> str:
        """Both, for people."""
        return f"{self.kind}: {self.detail}" if self.detail else self.kind


@dataclass
class Documents:
    """A batch in reading order. `lines` are 1-based within the piece; `bad` is what is no document."""

    texts: list[str] = field(default_factory=list)
    ids: list[str | None] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    bad: list[Loss] = field(default_factory=list)
    input_bytes: int = 0
    lines_read: int = 0

    def add(self, text: object, identifier: object, line: int, *, encoding: str = "utf-8") -> None:
        """Append a document, or note why it is none. Bytes (binary columns) are decoded."""
        if isinstance(text, bytes):
            try:
                text = decode(text, encoding)
            except UnicodeDecodeError:
                self.lose(line, f"not {encoding.upper()}")
                return
        if not isinstance(text, str):
            self.lose(line, f"the text is {type(text).__name__}, not a string")
            return
        self.texts.append(text)
        self.ids.append(None if identifier is None else str(identifier))
        self.lines.append(line)

    def add_row(
        self, row: object, line: int, source: SourceConfig, *, encoding: str = "utf-8", is_unicode: bool = False
    ) -> None:
        """Append the document of a JSON object or of a data set's row. `is_unicode`: its strings are known to be."""
        if not isinstance(row, dict):
            self.lose(line, f"expected a JSON object, found {type(row).__name__}")
            return
        try:
            text = pick(row, source.text_field)
        except KeyError:
            self.lose(line, f"no field {source.text_field!r}", _there_are(list(row)))
            return
        try:
            identifier = pick(row, source.id_field)
        except KeyError:
            identifier = None
        if not is_unicode and isinstance(text, str) and not text.isascii() and (problem := _unencodable(text)):
            self.lose(line, problem)
        else:
            self.add(text, identifier, line, encoding=encoding)

    def lose(self, line: int, kind: str, detail: str = "") -> None:
        """Note what is no document."""
        self.bad.append(Loss(line, kind, detail))


def pick(row: dict, name: str) -> object:
    """A field of a row; `doc.text` is also `text` within `doc`, where no field has that very name.

    Raises:
        KeyError: there is none.
    """
    if name in row:
        return row[name]
    value: object = row
    for part in name.split("."):
        if not isinstance(value, dict):
            raise KeyError(name)
        value = value[part]
    return value


def _there_are(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_TOLD} more" if len(names) > _NAMES_TOLD else ""
    return f"there are {', '.join(map(str, names[:_NAMES_TOLD])) or 'none'}{more}"


def _unencodable(text: str) -> str:
    """Why a text is no Unicode; "" where it is."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        first, last = _ESCAPED_BYTES
        return "not UTF-8" if first <= ord(text[error.start]) <= last else "an escaped lone surrogate"
    return ""


def read_piece(piece: InputPiece, source: SourceConfig) -> Iterator[Documents]:
    """Yield the documents of a piece in batches of some 4 MB of input."""
    if piece.format == "parquet":
        yield from _read_parquet(piece, source)
    elif piece.format == "dataset":
        yield from _read_dataset(piece, source)
    elif piece.format == "text":
        yield _read_text(piece, source)
    elif piece.format == "json":
        yield from _read_json(piece, source)
    else:
        yield from _read_lines(piece, source)


def _read_lines(piece: InputPiece, source: SourceConfig) -> Iterator[Documents]:
    blocks, encoding = _blocks(piece, source), piece.encoding
    if not splits_by_bytes(encoding):
        blocks, encoding = to_utf8(blocks, encoding), "utf-8"
    parse = _parse_json_line if piece.format == "jsonl" else _parse_text_line
    number = 0
    try:
        for lines, problem in read_lines(blocks, limit=source.max_document_bytes):
            batch = Documents(input_bytes=sum(map(len, lines)) + len(lines), lines_read=len(lines) + bool(problem))
            for line in lines:
                number += 1
                if number == 1 and piece.start == 0:
                    line = line.removeprefix(_BYTE_ORDER_MARK)
                if line and not line.isspace():
                    parse(batch, line, number, source, encoding)
            if problem:
                number += 1
                batch.lose(number, problem, "raise max_document_mb")
            yield batch
    except BrokenInputError as broken:
        yield Documents(bad=[Loss(number + 1, broken.kind, broken.detail)])


def _parse_json_line(batch: Documents, line: bytes, number: int, source: SourceConfig, encoding: str) -> None:
    try:
        if encoding != "utf-8":
            line = decode(line, encoding).encode()
        row = orjson.loads(line)
    except UnicodeDecodeError:
        batch.lose(number, f"not {encoding.upper()}")
        return
    except orjson.JSONDecodeError:
        try:  # the standard library takes what Megatron takes, such as NaN; marks are left within joined files
            row = json.loads(line.removeprefix(_BYTE_ORDER_MARK))
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            batch.lose(number, "an escaped lone surrogate")
            return
        except UnicodeDecodeError:
            batch.lose(number, "not UTF-8")
            return
        except (ValueError, RecursionError) as error:
            batch.lose(number, "not JSON", str(error))
            return
    batch.add_row(row, number, source, is_unicode=True)  # orjson takes no lone surrogate, and json's were looked at


def _parse_text_line(batch: Documents, line: bytes, number: int, source: SourceConfig, encoding: str) -> None:
    try:
        text = decode(line, encoding)
    except UnicodeDecodeError:
        batch.lose(number, f"not {encoding.upper()}")
        return
    for part in text.split("\r"):  # \r\n, or the \r alone of old Macs
        if part and not part.isspace():
            batch.add(part, None, number)


def _blocks(piece: InputPiece, source: SourceConfig) -> Iterator[bytes]:
    """A plain range with whole lines at both ends, or a whole file unpacked.

    Raises:
        BrokenInputError: the packed stream is damaged.
    """
    with open(piece.path, "rb") as stream:
        if piece.compression or piece.format in ("json", "text") or not splits_by_bytes(piece.encoding):
            yield from read_blocks(stream, piece.compression, window_bytes=source.window_bytes)
            return
        position = piece.start
        if position:
            stream.seek(position - 1)
            while not (line := stream.readline(BATCH_BYTES)).endswith(b"\n") and line:
                position += len(line)
            position += len(line) - 1
        stream.seek(position)
        while position < piece.stop:
            block = stream.read(min(BATCH_BYTES, piece.stop - position))
            if not block:
                return
            position += len(block)
            yield block
            while position >= piece.stop and not block.endswith(b"\n") and (block := stream.readline(BATCH_BYTES)):
                position += len(block)
                yield block


def _read_text(piece: InputPiece, source: SourceConfig) -> Documents:
    batch = Documents(lines_read=1)
    parts: list[bytes] = []
    try:
        for block in _blocks(piece, source):
            batch.input_bytes += len(block)
            if batch.input_bytes > source.max_document_bytes:
                batch.lose(1, f"a document longer than {source.max_document_mb:g} MB", "raise max_document_mb")
                return batch
            parts.append(block)
        text = decode(b"".join(parts), piece.encoding).removeprefix("\ufeff")
    except BrokenInputError as broken:
        batch.lose(1, broken.kind, broken.detail)
    except UnicodeDecodeError:
        batch.lose(1, f"not {piece.encoding.upper()}")
    else:
        batch.add(text, None, 1)
    return batch


def _read_json(piece: InputPiece, source: SourceConfig) -> Iterator[Documents]:
    blocks = _blocks(piece, source)
    if piece.encoding != "utf-8":
        blocks = to_utf8(blocks, piece.encoding)
    batch, last = Documents(), 0
    counted = _Counted(blocks)
    try:
        for line, row in read_values(counted, limit=source.max_document_bytes):
            batch.add_row(row, line, source)
            last = line
            if counted.bytes > BATCH_BYTES:
                batch.input_bytes, counted.bytes = counted.bytes, 0
                yield batch
                batch = Documents()
    except BrokenInputError as broken:
        batch.lose(broken.line or last + 1, broken.kind, broken.detail)
    batch.input_bytes = counted.bytes
    batch.lines_read = 1
    yield batch


class _Counted:
    """An iterator of blocks that knows how much it has given."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self.bytes = blocks, 0

    def __iter__(self) -> "_Counted":
        return self

    def __next__(self) -> bytes:
        block = next(self._blocks)
        self.bytes += len(block)
        return block


def _read_parquet(piece: InputPiece, source: SourceConfig) -> Iterator[Documents]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        file = pyarrow.parquet.ParquetFile(piece.path)
        schema = file.schema_arrow
        if not _has_column(schema, source.text_field):
            problem = Loss(1, f"no column {source.text_field!r}", _there_are(schema.names))
            yield Documents(bad=[problem], lines_read=1)
            return
        columns = [name for name in (source.text_field, source.id_field) if _has_column(schema, name)]
        groups = list(range(piece.start, piece.stop))
        for table in file.iter_batches(batch_size=512, row_groups=groups, columns=columns, use_threads=False):
            batch = Documents(input_bytes=table.nbytes, lines_read=table.num_rows)
            texts, are_strings = _column(table, source.text_field)
            ids = _column(table, source.id_field)[0] if source.id_field in columns else [None] * len(texts)
            encoding = "utf-8" if are_strings else piece.encoding
            for text, identifier in zip(texts, ids, strict=True):
                row += 1
                if isinstance(identifier, bytes):
                    identifier = identifier.decode("utf-8", "replace")
                batch.add(text, identifier, row, encoding=encoding)
            yield batch
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # the last one: a damaged name
        yield Documents(bad=[Loss(row + 1, "broken Parquet", str(error).splitlines()[0])], lines_read=1)


def _has_column(schema: Any, name: str) -> bool:
    """Whether a Parquet schema has a column of this name, or a path into nested columns."""
    import pyarrow

    if name in schema.names:
        return True
    root, *path = name.split(".")
    if root not in schema.names:
        return False
    kind = schema.field(root).type
    for part in path:
        if not pyarrow.types.is_struct(kind) or kind.get_field_index(part) < 0:
            return False
        kind = kind.field(part).type
    return True


def _column(table: Any, name: str) -> tuple[list[object], bool]:
    """A column's values, and whether it holds strings: these come as bytes, for a broken one to spoil its row only."""
    import pyarrow
    import pyarrow.compute

    if name in table.schema.names:
        column = table.column(name)
    else:
        root, *path = name.split(".")
        column = pyarrow.compute.struct_field(table.column(root), path)
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    are_strings = (
        pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)
    )
    if are_strings:
        column = column.cast(pyarrow.large_binary())
    return column.to_pylist(), are_strings


def _read_dataset(piece: InputPiece, source: SourceConfig) -> Iterator[Documents]:
    import datasets
    import pyarrow

    batch, number = Documents(), 0
    try:
        rows = load_dataset(source).shard(num_shards=piece.stop, index=piece.start)
        for number, row in enumerate(rows, start=1):
            had = len(batch.texts)
            batch.add_row(row, number, source, encoding=piece.encoding)
            batch.input_bytes += 3 * sum(map(len, batch.texts[had:]))
            batch.lines_read += 1
            if batch.input_bytes > BATCH_BYTES:
                yield batch
                batch = Documents()
    except (OSError, ValueError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        batch.lose(number + 1, "the data set breaks off", str(error).splitlines()[0])
    yield batch


def count_lines(path: Path, stop: int) -> int:
    """Lines that begin before byte `stop`: what turns a line number within a piece into one within its file."""
    count, left = int(stop > 0), stop - 1
    with open(path, "rb") as stream:
        while left > 0 and (block := stream.read(min(BATCH_BYTES, left))):
            count += block.count(b"\n")
            left -= len(block)
    return count
