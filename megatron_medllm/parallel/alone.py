"""One rank of a layout without the others: process groups whose collectives move nothing.

torch's fake process group does the same, but leaves what a rank would receive as the memory happened to be: a NaN in it
would skip the optimizer's step. Here a received tensor is random, a gathered one repeats this rank's part, a sum is
this rank's own part. The numbers mean nothing; shapes, memory and this rank's work are real.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future
from torch.futures import Future

BACKEND = "alone"


def _done() -> dist.Work:
    future: Future = Future()
    future.set_result(None)
    return _create_work_from_future(future)


class AloneGroup(dist.ProcessGroup):
    """A process group in which this rank hears nobody."""

    def getBackendName(self) -> str:  # noqa: N802 (torch's name)
        return BACKEND

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> dist.Work:
        return _done()

    def allreduce_coalesced(self, tensors: list[Tensor], options: Any = None) -> dist.Work:
        return _done()

    def broadcast(self, tensors: list[Tensor], options: Any = None) -> dist.Work:
        return _done()

    def barrier(self, options: Any = None) -> dist.Work:
        return _done()

    def send(self, tensors: list[Tensor], destination: int, tag: int) -> dist.Work:
        return _done()

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> dist.Work:
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.detach().normal_()
            else:
                tensor.zero_()
        return _done()

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any = None) -> dist.Work:
        for parts, own in zip(outputs, inputs, strict=True):
            for part in parts:
                part.copy_(own)
        return _done()

    def _allgather_base(self, output: Tensor, own: Tensor, options: Any = None) -> dist.Work:
        parts = output.view(-1).chunk(self.size())
        if any(part.data_ptr() == own.data_ptr() for part in parts):
            return _done()  # parameters are gathered in place: the others' shares stay as they were
        for part in parts:
            part.copy_(own.view(-1))
        return _done()

    all_gather_single = _allgather_base  # torch 2.13's name

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], options: Any = None) -> dist.Work:
        for output, parts in zip(outputs, inputs, strict=True):
            output.copy_(parts[self.rank()])
        return _done()

    def _reduce_scatter_base(self, output: Tensor, whole: Tensor, options: Any = None) -> dist.Work:
        own = whole.view(-1).chunk(self.size())[self.rank()]
        if own.data_ptr() != output.data_ptr():
            output.copy_(own.view_as(output))
        return _done()

    reduce_scatter_single = _reduce_scatter_base  # torch 2.13's name

    def allgather_into_tensor_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], options: Any = None
    ) -> dist.Work:
        for output, own in zip(outputs, inputs, strict=True):
            self._allgather_base(output, own)
        return _done()

    all_gather_single_coalesced = allgather_into_tensor_coalesced

    def reduce_scatter_tensor_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], options: Any = None
    ) -> dist.Work:
        for output, whole in zip(outputs, inputs, strict=True):
            self._reduce_scatter_base(output, whole)
        return _done()

    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced


def _create(store: Any, rank: int, world_size: int, timeout: Any) -> AloneGroup:
    return AloneGroup(rank, world_size)


def join(*, rank: int, world_size: int) -> None:
    """Start the default process group as one rank of many; groups made after it are of the same kind."""
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, _create, devices=["cpu", "cuda"])
    dist.init_process_group(BACKEND, store=dist.HashStore(), rank=rank, world_size=world_size)
