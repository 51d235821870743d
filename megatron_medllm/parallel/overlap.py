"""Data parallelism's overlaps: which are on, and current parameters in spite of them.

The problem: with the distributed optimizer every rank updates its part of the weights, and the parts are gathered
afterwards. Overlapped, Megatron-Core gathers a weight only when the next forward pass is about to use it. Until then
(dp - 1) / dp of what a rank holds is one step old. A forward pass through Megatron's modules sees to it by itself, in
hooks. Who reads parameters in any other way (saves, exports, digests) calls `gather_parameters` first; who uses a
module's parameters in a forward pass without calling the module calls `await_parameters` on it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from torch import nn

from megatron_medllm.config.layout import LayoutConfig


@dataclass(frozen=True)
class Overlaps:
    """Which exchanges of data-parallel ranks run beside computation."""

    grad_reduce: bool  # while the backward pass goes on
    param_gather: bool  # during the next forward pass


def overlaps(layout: LayoutConfig, device_type: str) -> Overlaps:
    """What `layout` asks for on this kind of device ("cuda" or "cpu").

    `auto` is on where it pays: on CUDA, whose streams run beside each other, if several ranks hold the same weights.
    """
    pays = device_type == "cuda" and layout.data_parallel_size * layout.cp > 1
    wanted = {"on": True, "off": False, "auto": pays}
    gather = layout.distributed_optimizer and wanted[layout.overlap_param_gather]
    reduce = wanted[layout.overlap_grad_reduce]
    if layout.overlap_grad_reduce == "auto" and layout.overlap_param_gather == "on":
        reduce = True  # Megatron-Core wants gradients overlapped wherever parameters are
    return Overlaps(grad_reduce=reduce, param_gather=gather and reduce)


def gather_parameters(chunks: Iterable[nn.Module]) -> None:
    """Make every parameter current on every rank, whether an overlapped gather is under way, due or done.

    Collective where the gather is overlapped; elsewhere, and on chunks without DDP, parameters are always current.
    """
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def await_parameters(module: nn.Module) -> None:
    """Before its parameters are used without calling it: what a call would wait for (its forward pre-hooks)."""
    for hook in list(module._forward_pre_hooks.values()):
        hook(module, ())
