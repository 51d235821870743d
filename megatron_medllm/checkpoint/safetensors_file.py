"""Reading and writing slices of safetensors files by plain positioned I/O.

The format is eight bytes of header length, a JSON header (name -> dtype, shape, byte range), then the bytes. The
safetensors library maps files into memory, so a process that walks through a 15 GB model ends up with 15 GB resident,
and it writes only whole files at once. Here a reader touches just the bytes it asks for, into memory the caller owns,
and several processes can fill one file, each at its own place.
"""

import errno
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch

from megatron_medllm.errors import UserError
from megatron_medllm.storage import full_disk_error

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_BLOCK_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in a file; `offset` in bytes from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int  # bytes


def read_header(path: Path) -> dict[str, Entry]:
    """Read the names, types, shapes and places of a file's tensors.

    Raises:
        UserError: the file is missing, is not safetensors, or is shorter than its header says.
    """
    try:
        with open(path, "rb") as stream:
            file_size = os.fstat(stream.fileno()).st_size
            first = stream.read(8)
            if first == b"version ":  # of the text that git-lfs leaves in a file's place
                raise UserError(f"{path}: a git-lfs pointer, not the file itself; run `git lfs pull` there")
            length = int.from_bytes(first, "little")
            if not 2 <= length <= min(file_size - 8, _MAX_HEADER_BYTES):
                raise UserError(f"{path}: not a safetensors file, or truncated inside its header")
            header = orjson.loads(stream.read(length))
    except OSError as error:
        raise UserError(f"{path}: {'no such file' if error.errno == errno.ENOENT else error.strerror}") from None
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}: the header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: the header is no JSON object")
    header.pop("__metadata__", None)
    return {
        name: _entry(path, name, value, data_start=8 + length, file_size=file_size) for name, value in header.items()
    }


def _entry(path: Path, name: str, value: Any, *, data_start: int, file_size: int) -> Entry:
    try:
        dtype, shape = value["dtype"], tuple(int(n) for n in value["shape"])
        start, stop = (data_start + int(n) for n in value["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: tensor {name!r} has a malformed header entry") from None
    if start < data_start or stop < start or min(shape, default=0) < 0:
        raise UserError(f"{path}: tensor {name!r} has a malformed header entry")
    if stop > file_size:
        raise UserError(f"{path}: truncated: tensor {name!r} ends at byte {stop}, the file at {file_size}")
    if dtype in DTYPES and stop - start != _num_bytes(dtype, shape):
        raise UserError(f"{path}: tensor {name!r} has {stop - start} bytes, which does not fit {dtype} {list(shape)}")
    return Entry(dtype, shape, start, stop - start)


def _num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    count = DTYPES[dtype].itemsize
    for size in shape:
        count *= size
    return count


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as writable bytes."""
    return tensor.view(-1).view(torch.uint8).numpy().data


@contextmanager
def open_descriptor(path: Path) -> Iterator[int]:
    """A file open for `read_slice`.

    Raises:
        UserError: there is none.
    """
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    try:
        yield fd
    finally:
        os.close(fd)


def read_slice(fd: int, entry: Entry, *, axis: int, start: int, stop: int) -> torch.Tensor:
    """Read entries [start, stop) along `axis` (0 or 1) of a tensor, in its own dtype, contiguous, on the CPU.

    Raises:
        EOFError: the file ended early.
    """
    shape = list(entry.shape)
    shape[axis] = stop - start
    out = torch.empty(shape, dtype=DTYPES[entry.dtype])
    if not out.numel():
        return out
    into = byte_view(out)
    if axis == 0:
        row_bytes = entry.size // entry.shape[0]
        _read_fully(fd, into, entry.offset + start * row_bytes)
        return out
    row_bytes = entry.size // entry.shape[0]
    cell_bytes = row_bytes // entry.shape[1]
    width = len(into) // entry.shape[0]
    for row in range(entry.shape[0]):
        at = entry.offset + row * row_bytes + start * cell_bytes
        _read_fully(fd, into[row * width : (row + 1) * width], at)
    return out


def _read_fully(fd: int, into: memoryview, offset: int) -> None:
    done = 0
    while done < len(into):  # one call returns at most 2 GiB
        count = os.preadv(fd, [into[done:]], offset + done)
        if count == 0:
            raise EOFError
        done += count


def digest_entry(path: Path, entry: Entry) -> str:
    """SHA-256 of one tensor's bytes, in hex."""
    return digest_part(path, entry.offset, entry.size)


def digest_part(path: Path, offset: int, size: int) -> str:
    """SHA-256 of `size` bytes of a file from byte `offset` on, in hex.

    Raises:
        EOFError: the file is shorter.
    """
    digest = hashlib.sha256()
    block = memoryview(bytearray(min(size, _BLOCK_BYTES)))
    with open(path, "rb") as stream:
        for start in range(0, size, _BLOCK_BYTES):
            part = block[: min(_BLOCK_BYTES, size - start)]
            _read_fully(stream.fileno(), part, offset + start)
            digest.update(part)
    return digest.hexdigest()


def digest_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of a CPU tensor's bytes, in hex."""
    return hashlib.sha256(byte_view(tensor.contiguous())).hexdigest()


def write_fully(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at byte `offset`."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def plan_file(tensors: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> tuple[bytes, dict[str, Entry]]:
    """The header bytes and the places of a file that will hold `tensors` (name -> shape), one after the other."""
    dtype_name = DTYPE_NAMES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in tensors.items():
        size = _num_bytes(dtype_name, shape)
        header[name] = {"dtype": dtype_name, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = orjson.dumps(header)
    text += b" " * (-len(text) % 8)  # the data starts aligned
    data_start = 8 + len(text)
    entries = {
        name: Entry(dtype_name, tuple(tensors[name]), data_start + value["data_offsets"][0], _span(value))
        for name, value in header.items()
        if name != "__metadata__"
    }
    return len(text).to_bytes(8, "little") + text, entries


def _span(value: dict[str, Any]) -> int:
    start, stop = value["data_offsets"]
    return stop - start


def create_file(path: Path, header: bytes, entries: dict[str, Entry]) -> None:
    """Create a file of its full size with its header, the data still zeros (blocks are reserved where possible).

    Raises:
        UserError: the disk is full.
    """
    size = max([len(header), *(entry.offset + entry.size for entry in entries.values())])
    try:
        with open(path, "wb") as stream:
            stream.write(header)
            stream.flush()
            os.posix_fallocate(stream.fileno(), 0, size)
    except OSError as error:
        raise full_disk_error(error, path) from error
