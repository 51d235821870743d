"""The tensors of a `torch.save` file, found without running anything that is in it.

Such a file is a zip archive: a pickle, `data.pkl`, and one uncompressed entry for every tensor's numbers. Training
frameworks pickle more than tensors: argument namespaces, enums, signals, numpy arrays, whole optimizers. Unpickling
those needs the frameworks' classes, and a pickle may name any function to be called. Here every name outside a short
list becomes a stand-in that takes what the pickle gives it and does nothing. Tensors are not loaded but located, so
that a few rows of one can be read from a file of any size.

What `torch.load(weights_only=True)` accepts depends on what was imported before (Megatron-Core extends its list); what
is accepted here does not.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_medllm.checkpoint.safetensors_file import DTYPE_NAMES, Entry
from megatron_medllm.errors import UserError

_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_LOCAL_HEADER_BYTES = 30
# What a damaged or hostile pickle makes the unpickler raise.
_DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    EOFError,
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
    NotImplementedError,
)


class Inert:
    """Stands in for an object of a class that is not known here: it takes what it is given and does nothing."""

    stands_for = ""

    def __new__(cls, *_args: Any, **_settings: Any) -> "Inert":
        """Whatever the arguments."""
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_settings: Any) -> None:
        """Takes any arguments, as `__new__` does."""

    def __setstate__(self, state: Any) -> None:
        """Pickled attributes are dropped."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """So are entries."""

    def append(self, value: Any) -> None:
        """So are elements."""

    extend = add = append


class Settings(Inert):
    """Stands in for a namespace of arguments: its attributes are kept as plain data."""

    def __setstate__(self, state: Any) -> None:
        """Keep the attributes."""
        self.values: dict[str, Any] = {k: v for k, v in state.items() if isinstance(k, str)}


@dataclass(frozen=True)
class StoredTensor:
    """Where the numbers of one tensor lie."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # bytes, in the file
    is_contiguous: bool

    def entry(self, what: str) -> Entry:
        """The same as `read_slice` takes it.

        Args:
            what: the tensor's name, for messages.

        Raises:
            UserError: not a float of 16 or 32 bits, or not stored row by row.
        """
        if self.dtype not in DTYPE_NAMES:
            raise UserError(f"{self.path}: {what!r} is stored as {self.dtype}, expected a float of 16 or 32 bits")
        if not self.is_contiguous:
            raise UserError(f"{self.path}: {what!r} is not stored row by row")
        size = torch.Size(self.shape).numel() * self.dtype.itemsize
        return Entry(DTYPE_NAMES[self.dtype], self.shape, self.offset, size)


@dataclass(frozen=True)
class _Storage:
    offset: int
    size: int  # bytes
    dtype: torch.dtype


def read_archive(path: Path, *, start: int = 0, length: int | None = None) -> Any:
    """What a file of `torch.save`, or one inside another file, holds: tensors located, unknown objects inert.

    Args:
        path: the file.
        start: where the archive begins, in bytes.
        length: of the archive, in bytes; default: to the end of the file.

    Raises:
        UserError: not such a file, or damaged.
    """
    try:
        with open(path, "rb") as stream:
            size = stream.seek(0, io.SEEK_END) - start if length is None else length
            window = _Window(stream, start, size)
            if window.read(4) != b"PK\x03\x04":
                raise UserError(f"{path}: not a file that torch.save wrote (since PyTorch 1.6)")
            window.seek(0)
            with zipfile.ZipFile(window) as archive:
                return _Unpickler(_Archive(path, window, archive)).load()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except _DAMAGE as error:
        raise UserError(f"{path}: damaged, or no file of torch.save ({type(error).__name__})") from None


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, stream: io.BufferedReader, start: int, size: int) -> None:
        self._stream, self.start, self._size, self._at = stream, start, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("before the start")
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        self._stream.seek(self.start + self._at)
        data = self._stream.read(left if size is None or size < 0 else min(size, left))
        self._at += len(data)
        return data


class _Archive:
    """The entries of one archive."""

    def __init__(self, path: Path, window: _Window, archive: zipfile.ZipFile) -> None:
        self.path, self._window, self._zip = path, window, archive
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise pickle.UnpicklingError("no data.pkl")
        self._root = pickles[0].removesuffix("data.pkl")
        byteorder = f"{self._root}byteorder"
        if byteorder in archive.namelist() and self.stored(byteorder) != b"little":
            raise UserError(f"{path}: written on a big-endian machine")

    def stored(self, name: str) -> bytes:
        """The bytes of an entry, which must not be compressed: torch never does."""
        self._info(name)
        return self._zip.read(name)

    def pickle(self) -> bytes:
        return self.stored(f"{self._root}data.pkl")

    def _info(self, name: str) -> zipfile.ZipInfo:
        info = self._zip.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{self.path}: entry {name!r} is compressed, as torch.save never writes it")
        return info

    def storage(self, key: str, dtype: torch.dtype) -> _Storage:
        """Where the numbers of one storage lie in the file."""
        info = self._info(f"{self._root}data/{key}")
        self._window.seek(info.header_offset)
        header = self._window.read(_LOCAL_HEADER_BYTES)
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
        at = info.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
        return _Storage(self._window.start + at, info.file_size, dtype)


class _Unpickler(pickle.Unpickler):
    """Builds containers, plain values, `StoredTensor`s and stand-ins, and nothing else."""

    def __init__(self, archive: _Archive) -> None:
        super().__init__(io.BytesIO(archive.pickle()))
        self._archive = archive
        self._known: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v3"): self._tensor_of_type,
            ("torch._utils", "_rebuild_parameter"): _first,
            ("torch._utils", "_rebuild_parameter_with_state"): _first,
        }

    def find_class(self, module: str, name: str) -> Any:
        """A name in the pickle: known, or a stand-in."""
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) in (("argparse", "Namespace"), ("types", "SimpleNamespace")):
            return Settings
        known = self._known.get((module, name))
        return known or type("Inert", (Inert,), {"stands_for": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        """A reference to an entry of the archive."""
        kind, dtype, key = pid[:3]
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            return Inert()
        return self._archive.storage(key, dtype)

    def _tensor(self, storage: Any, offset: int, shape: Any, stride: Any, *_rest: Any) -> Any:
        return self._located(storage, None, offset, shape, stride)

    def _tensor_of_type(self, storage: Any, offset: int, shape: Any, stride: Any, *rest: Any) -> Any:
        return self._located(storage, rest[2], offset, shape, stride)  # requires_grad, hooks, dtype

    def _located(self, storage: Any, dtype: torch.dtype | None, offset: int, shape: Any, stride: Any) -> Any:
        if not isinstance(storage, _Storage):
            return Inert()
        dtype = dtype or storage.dtype
        shape, stride = tuple(map(int, shape)), tuple(map(int, stride))
        span = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if all(shape) else 0
        if min((offset, *shape, *stride)) < 0 or (offset + span) * dtype.itemsize > storage.size:
            raise pickle.UnpicklingError("a tensor beyond its storage")
        expected, in_order = 1, True
        for size, step in zip(reversed(shape), reversed(stride), strict=True):
            in_order &= size <= 1 or step == expected
            expected *= size
        at = storage.offset + offset * dtype.itemsize
        return StoredTensor(self._archive.path, dtype, shape, at, in_order)


def _first(data: Any, *_rest: Any) -> Any:
    """A parameter is its tensor."""
    return data
