"""Context parallelism (CP): a packed stream shared by several ranks, whose attention sees all of it.

The stream is cut into 2*cp equal chunks, and rank r holds chunks r and 2*cp-1-r, one behind the other: an early chunk
has few keys and a late one many, so the two together are the same work on every rank where documents are long. For
attention the ranks gather each other's K and V, as Llama 3 does it (arXiv 2407.21783, section 3.3.2): with few KV heads
that is little, and a mask of documents needs no care, as every rank has all keys. Everything else is token by token.

t: tokens of the whole stream.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ContextSplit:
    """Which part of a stream a rank holds: all of it by default."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> "ContextSplit":
        """This process's part in a context-parallel group."""
        return cls(group.rank(), group.size())

    def chunks(self, length: int) -> tuple[tuple[int, int], ...]:
        """Bounds of this rank's chunks in a stream of `length` tokens, in ascending order.

        Raises:
            ValueError: `length` is not a multiple of 2 * size.
        """
        if self.size == 1:
            return ((0, length),)
        if length % (2 * self.size):
            raise ValueError(f"a stream of {length} tokens does not make {2 * self.size} equal chunks")
        chunk = length // (2 * self.size)
        return tuple((i * chunk, (i + 1) * chunk) for i in (self.rank, 2 * self.size - 1 - self.rank))

    def take(self, whole: np.ndarray) -> np.ndarray:
        """This rank's part [t/cp, ...] of an array [t, ...]; the array itself where that is all of it."""
        if self.size == 1:
            return whole
        return np.concatenate([whole[start:end] for start, end in self.chunks(len(whole))])


WHOLE = ContextSplit()


def gather_stream(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' parts in the stream's order, [t/cp, ...] to [t, ...]; gradients are summed and go back in parts."""
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    parts = gather_from_sequence_parallel_region(local, group=group)
    early, late = parts.unflatten(0, (group.size(), 2, -1)).unbind(1)  # [cp, t/(2*cp), ...]
    return torch.cat((early, late.flip(0))).flatten(0, 1)


def sum_over_context(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of all ranks' parts, on every rank, which then computes the same loss from it.

    Backward hands each rank the sum's gradient as it is. Together the ranks' parameters then have the whole gradient
    once, since each rank's part of the graph holds its own tokens only.
    """
    from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region

    return reduce_from_tensor_model_parallel_region(part, group=group)
