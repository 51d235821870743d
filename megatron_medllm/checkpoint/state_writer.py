"""Writes the state of a training run as a distributed checkpoint: every rank its own share, hashed on the way.

A rank writes one file, `__RANK_0.distcp`, and takes its SHA-256 while it does, so that nothing is read again to seal
the checkpoint. Writing happens in a thread. In the background it works on a copy of the rank's share in host memory,
for training goes on to change the state; otherwise one tensor at a time is copied. No rank raises while others wait: a
problem, a full disk mostly, is carried to the end, where all learn of it.
"""

import hashlib
import os
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_medllm.checkpoint.torch_dist import Item, write_index
from megatron_medllm.errors import UserError
from megatron_medllm.parallel import mcore
from megatron_medllm.parallel.agree import all_say, wait_for_all
from megatron_medllm.parallel.shards import LocalState, StatePiece


class SaveError(Exception):
    """A checkpoint could not be written; names the ranks and the causes."""


@dataclass
class _Written:
    """What one rank wrote."""

    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)  # key -> shape of the whole
    items: list[Item] = field(default_factory=list)
    file: str | None = None
    bytes: int = 0
    sha256: str = ""
    problem: str | None = None


class StateWriter:
    """Writes sharded states, one at a time. Every method is collective."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._job: Future[_Written] | None = None
        self._directory = Path()
        self._common: dict[str, Any] = {}
        self.digests: dict[str, str] = {}  # file -> SHA-256 of what was written last, on the main process

    def start(self, state: dict[str, Any], directory: Path, *, wait: bool) -> None:
        """Write a state of `mcore.sharded_state` into an existing directory; without `wait` until `finished` says so.

        Raises:
            SaveError: on every process, if one could not write.
        """
        local = mcore.local_state(state)
        if not wait:
            local = _copied(local)
        self._directory, self._common = directory, local.common
        self._job = self._thread.submit(write_pieces, local.pieces, directory, dist.get_rank(), are_copies=not wait)
        if wait:
            self.finished(block=True)

    def finished(self, *, block: bool) -> bool:
        """Whether everything that was started is written on all processes.

        Raises:
            SaveError: on every process, if one could not write.
        """
        job = self._job
        if job is None:
            return True
        if block:
            wait_for_all(job.done)
        elif not all_say(job.done()):
            return False
        self._job = None  # and with it the copy
        self._finish(job.result())
        return True

    def _finish(self, written: _Written) -> None:
        rank = dist.get_rank()
        everyone: list[_Written] | None = [_Written()] * dist.get_world_size() if rank == 0 else None
        dist.gather_object(written, everyone, dst=0)
        answer: list[str | None] = [None]
        if everyone is not None:
            problems = [each.problem for each in everyone if each.problem is not None]
            answer = ["; ".join(problems) or self._index(everyone)]
        dist.broadcast_object_list(answer, src=0)
        if answer[0] is not None:
            raise SaveError(answer[0])

    def _index(self, everyone: list[_Written]) -> str | None:
        """Make the ranks' files a checkpoint; what is wrong, if anything."""
        tensors = {key: place for each in everyone for key, place in each.tensors.items()}
        items = [item for each in everyone for item in each.items]
        try:
            for each in everyone:
                if each.file is not None and (self._directory / each.file).stat().st_size != each.bytes:
                    return f"{each.file} is shorter for the main process than its writer left it"
            write_index(self._directory, tensors, items, common=self._common)
        except FileNotFoundError as error:
            return f"the main process does not see {error.filename}: is the run directory on a shared file system?"
        except (OSError, UserError) as error:
            return f"rank 0 on {socket.gethostname()}: {error}"
        self.digests = {each.file: each.sha256 for each in everyone if each.file is not None}
        return None


def _copied(local: LocalState) -> LocalState:
    """The same with the tensors copied to host memory, which training does not change."""
    pieces = [
        replace(piece, data=_host_copy(piece.data)) if isinstance(piece.data, Tensor) else piece
        for piece in local.pieces
    ]
    return replace(local, pieces=pieces)


class _HashedStream:
    """Counts and hashes what is written to a file."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.sha256 = hashlib.sha256()
        self.bytes = 0
        self.problem: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of it; the number of bytes."""
        try:
            self._stream.write(data)
        except OSError as error:
            self.problem = error
            raise
        self.sha256.update(data)
        size = memoryview(data).nbytes
        self.bytes += size
        return size

    def flush(self) -> None:
        """`torch.save` calls it behind every tensor; the file is flushed once, at its end."""


def write_pieces(pieces: list[StatePiece], directory: Path, rank: int, *, are_copies: bool) -> _Written:
    """Write the pieces into this rank's file and flush it to the disk."""
    written = _Written()
    if not pieces:
        return written
    name = f"__{rank}_0.distcp"
    path = directory / name
    stream = None
    try:
        directory.mkdir(exist_ok=True)  # where a network's file system has not yet shown it here
        with open(path, "wb") as file:
            stream = _HashedStream(file)
            for piece in pieces:
                start, sizes = stream.bytes, None
                if isinstance(piece.data, Tensor):
                    sizes = tuple(piece.data.shape)
                    written.tensors[piece.key] = (piece.global_shape, piece.data.dtype)
                    data = piece.data if are_copies else _host_copy(piece.data)
                    torch.save(data, cast(IO[bytes], stream))  # it needs no more than `write` and `flush`
                else:
                    stream.write(piece.data)
                written.items.append(Item(piece.key, piece.offsets, sizes, name, start, stream.bytes - start, None))
            file.flush()
            os.fdatasync(file.fileno())
    except (OSError, RuntimeError) as raised:
        # Where a write fails, `torch.save` closes its archive and raises an error of its own over that.
        error = raised if isinstance(raised, OSError) else stream.problem if stream is not None else None
        if error is None:
            raise
        return _Written(problem=f"rank {rank} on {socket.gethostname()}: {path}: {error.strerror or error}")
    written.file, written.bytes, written.sha256 = name, stream.bytes, stream.sha256.hexdigest()
    return written


def _host_copy(tensor: Tensor) -> Tensor:
    """On the CPU, with a storage of its own: `torch.save` writes the whole of a storage."""
    return tensor.to("cpu", copy=True)
