"""Bytes of gradients and optimizer state, by the layout of Megatron-Core's parameter-and-gradient buffers.

The distributed optimizer lays trainable parameters out in reverse order of registration, starts each at a multiple
of 64 elements, ends each bucket at a multiple of lcm(data-parallel size, 128), and gives every data-parallel rank an
equal slice of every bucket (megatron.core 0.16 `distributed/param_and_grad_buffer.py`). A rank keeps state only for
the parameters' elements inside its slices, so ranks differ by the padding.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_medllm.planner.parameters import PlannedWeight

PARAMETER_ALIGNMENT = 64
BUCKET_ALIGNMENT = 128


@dataclass(frozen=True)
class BufferLayout:
    """Where parameters lie: half-open element ranges of the parameters, and of the buckets with their padding."""

    parameters: tuple[tuple[int, int], ...]
    buckets: tuple[tuple[int, int], ...]

    @property
    def numel(self) -> int:
        """Elements of the buffer, padding included."""
        return self.buckets[-1][1] if self.buckets else 0

    def owned_numel(self, *, dp_rank: int, dp_size: int) -> int:
        """Parameter elements whose optimizer state lives on `dp_rank`."""
        owned = 0
        starts = [start for start, _ in self.parameters]
        for start, end in self.buckets:
            shard = (end - start) // dp_size
            low, high = start + dp_rank * shard, start + (dp_rank + 1) * shard
            touching = self.parameters[max(bisect_right(starts, low) - 1, 0) : bisect_left(starts, high)]
            owned += sum(max(0, min(high, b) - max(low, a)) for a, b in touching)
        return owned


def default_bucket_size(dp_size: int) -> int:
    """Megatron-Core's bucket size in elements when gradients are reduced during the backward pass."""
    return max(40_000_000, 1_000_000 * dp_size)


def buffer_layout(
    weights: Sequence[PlannedWeight], *, dp_size: int, distributed_optimizer: bool, bucket_size: int | None
) -> BufferLayout:
    """Lay out the trainable `weights`, given in registration order; `bucket_size` None makes one bucket."""

    def aligned(index: int, multiple: int) -> int:
        return -(-index // multiple) * multiple if distributed_optimizer else index

    bucket_multiple = math.lcm(dp_size, BUCKET_ALIGNMENT)
    parameters: list[tuple[int, int]] = []
    buckets: list[tuple[int, int]] = []
    bucket_start = end = 0
    for weight in reversed(weights):
        alone = weight.shared_embedding and distributed_optimizer
        start = aligned(end, PARAMETER_ALIGNMENT)
        if alone and end > bucket_start:
            start = aligned(start, bucket_multiple)
            buckets.append((bucket_start, start))
            bucket_start = start
        end = start + weight.numel
        parameters.append((start, end))
        if alone or (bucket_size is not None and end - bucket_start >= bucket_size):
            end = aligned(end, bucket_multiple)
            buckets.append((bucket_start, end))
            bucket_start = end
    if end > bucket_start:
        buckets.append((bucket_start, aligned(end, bucket_multiple)))
    return BufferLayout(tuple(parameters), tuple(buckets))
