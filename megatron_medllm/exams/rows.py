"""Rows of a JSON-lines file, or of one JSON array, each with its place for error messages."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from megatron_medllm.errors import UserError

_BOM = b"\xef\xbb\xbf"
_NOT_TEXT = {
    b"version https://git-lfs": "a git-lfs pointer, not the file itself (fetch it with `git lfs pull`)",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"PAR1": "a Parquet file; expected JSON lines",
}


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file with the place of each: `FILE:LINE`, or `FILE: item N` in a JSON array.

    Raises:
        UserError: the file cannot be read, or a line or item is no JSON object.
    """
    try:
        content = path.read_bytes().removeprefix(_BOM)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    for start, what in _NOT_TEXT.items():
        if content.startswith(start):
            raise UserError(f"{path}: {what}")
    if content.lstrip().startswith(b"["):
        yield from _items(path, content)
        return
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            place = f"{path}:{number}"
            yield place, _object(_decode(line, place), place)


def _items(path: Path, content: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, item in enumerate(_decode(content, str(path)), start=1):
        place = f"{path}: item {number}"
        yield place, _object(item, place)


def _decode(content: bytes, place: str) -> Any:
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON ({error})") from None


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{place}: expected a JSON object, found {type(value).__name__}")
    return value
