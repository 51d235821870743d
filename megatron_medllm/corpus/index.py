"""Megatron's indexed data set on disk: `PREFIX.bin` (tokens) and `PREFIX.idx` (where each document lies).

The layout is that of `megatron.core.datasets.indexed_dataset` (its tests are our reference), written here without
torch. Index: magic, version 1, dtype code, sequences N, document bounds D; N lengths (int32), N byte offsets (int64),
D bounds (int64, the first is 0). One document is one sequence; an empty document has a bound and no sequence.
"""

import errno
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from megatron_medllm.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_CODES: dict[np.dtype, int] = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
_COPY_BYTES = 1 << 30
_NOT_HERE = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP}  # some network file systems


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype Megatron's `DType.optimal_dtype` picks: uint16 below 65,500 tokens, else int32."""
    return np.dtype(np.uint16) if vocab_size < 65_500 else np.dtype(np.int32)


def bin_path(prefix: Path) -> Path:
    """`PREFIX.bin`."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """`PREFIX.idx`."""
    return prefix.with_name(prefix.name + ".idx")


def write_index(stream: IO[bytes], lengths: np.ndarray, dtype: np.dtype) -> None:
    """Write the index of documents of `lengths` tokens (int32, [documents]); a length of 0 is an empty document."""
    sequences = lengths[lengths > 0].astype(np.int32)
    offsets = np.zeros(len(sequences), np.int64)
    np.cumsum(sequences[:-1], dtype=np.int64, out=offsets[1:])
    offsets *= dtype.itemsize
    bounds = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths > 0, out=bounds[1:])
    stream.write(_HEADER.pack(_MAGIC, 1, _DTYPE_CODES[dtype], len(sequences), len(bounds)))
    for array in (sequences, offsets, bounds):
        stream.write(array.data)


@dataclass(frozen=True)
class Index:
    """An opened `.idx`: `lengths` int32 [sequences], `offsets` int64 [sequences] in bytes, `bounds` int64."""

    dtype: np.dtype
    lengths: np.ndarray
    offsets: np.ndarray
    bounds: np.ndarray


def read_index(prefix: Path) -> Index:
    """Map `PREFIX.idx` and check it against itself and against the size of `PREFIX.bin`.

    Raises:
        UserError: a file is missing, is not an index, is cut short, or the two do not belong together.
    """
    path = idx_path(prefix)
    for needed in (path, bin_path(prefix)):
        if not needed.is_file():
            raise UserError(f"{needed}: no such file")
    size = path.stat().st_size
    if size < _HEADER.size:
        raise UserError(f"{path}: {size} bytes is too short for an index")
    raw = np.memmap(path, mode="r")
    magic, version, code, sequences, bounds = _HEADER.unpack(raw[: _HEADER.size].tobytes())
    dtypes = {code: dtype for dtype, code in _DTYPE_CODES.items()}
    if magic != _MAGIC or version != 1 or code not in dtypes:
        raise UserError(f"{path}: not a Megatron index of int32 or uint16 tokens")
    expected = _HEADER.size + 12 * sequences + 8 * bounds
    if size != expected:
        raise UserError(f"{path}: {size} bytes, but its header promises {expected}")
    at_offsets, at_bounds = _HEADER.size + 4 * sequences, _HEADER.size + 12 * sequences
    index = Index(
        dtype=dtypes[code],
        lengths=np.frombuffer(raw, np.int32, sequences, _HEADER.size),
        offsets=np.frombuffer(raw, np.int64, sequences, at_offsets),
        bounds=np.frombuffer(raw, np.int64, bounds, at_bounds),
    )
    tokens = int(index.lengths.sum(dtype=np.int64))
    bin_bytes = bin_path(prefix).stat().st_size
    if bin_bytes != tokens * index.dtype.itemsize:
        raise UserError(
            f"{bin_path(prefix)}: {bin_bytes} bytes, but the index holds {tokens} {index.dtype.name} tokens"
        )
    ends = index.offsets + index.lengths.astype(np.int64) * index.dtype.itemsize
    if sequences and (index.offsets[0] != 0 or (index.offsets[1:] != ends[:-1]).any()):
        raise UserError(f"{path}: its offsets do not follow from its lengths")
    if not bounds or index.bounds[0] != 0 or index.bounds[-1] != sequences or (np.diff(index.bounds) < 0).any():
        raise UserError(f"{path}: its document bounds do not cover its sequences")
    return index


def copy_kept(target: IO[bytes], part: Path, lengths: np.ndarray, kept: np.ndarray, itemsize: int) -> None:
    """Append to `target` the tokens of the kept documents of `part`, inside the kernel, one run of neighbours a call.

    Args:
        lengths: tokens of each document, int32 [documents].
        kept: bool [documents].
    """
    ends = np.cumsum(lengths, dtype=np.int64) * itemsize
    edges = np.flatnonzero(np.diff(np.concatenate(([False], kept, [False])).astype(np.int8)))
    with open(part, "rb") as source:
        for first, last in edges.reshape(-1, 2):
            start = 0 if first == 0 else int(ends[first - 1])
            _copy_range(source.fileno(), target.fileno(), start, int(ends[last - 1]))


def _copy_range(source: int, target: int, start: int, stop: int) -> None:
    while start < stop:
        size = min(_COPY_BYTES, stop - start)
        try:
            copied = os.copy_file_range(source, target, size, offset_src=start)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            copied = os.sendfile(target, source, start, size)
        if copied == 0:
            raise OSError(f"a part file ended {stop - start} bytes early")
        start += copied
