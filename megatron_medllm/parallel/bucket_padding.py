"""Saved optimizer states of models with several gradient buckets: a mend of Megatron-Core 0.16 to 0.19.

The problem: for a checkpoint that any layout can load, the distributed optimizer puts its buckets behind one another
without the padding at their ends, and then looks parameters up at their places with that padding. Whatever lies behind
a padded bucket is saved shifted: a resumed run gets wrong weights and moments, without an error. A bucket is padded to
a multiple of lcm(dp x cp, 128); there are several where gradients overlap, or where a tied embedding has its own.
Megatron-LM's pull request 5077 mended it upstream. The method here: put the padding back in before the look-up.
"""

import inspect
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_medllm.parallel.foreach import leaves

# A workaround in the faulty look-up, gone in the mended one.
_SIGN_OF_THE_FAULT = "param range exceeds"


def mend_saved_state(optimizer: MegatronOptimizer) -> None:
    """Make `optimizer` save every parameter's own state; does nothing where Megatron-Core does so by itself."""
    if _SIGN_OF_THE_FAULT not in inspect.getsource(DistributedOptimizer.sharded_param_state_fully_reshardable):
        return
    for leaf in leaves(optimizer):
        if isinstance(leaf, DistributedOptimizer):
            leaf.get_parameter_state_dp_zero = Padded(leaf)


class Padded:
    """`get_parameter_state_dp_zero` with the buckets' padding."""

    def __init__(self, optimizer: DistributedOptimizer) -> None:
        self._optimizer, self._upstream = optimizer, optimizer.get_parameter_state_dp_zero

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any] | None:
        state = self._upstream(*args, **kwargs)
        if state is None:
            return None
        for index, buffer in enumerate(self._optimizer.buffers):
            places = [(bucket.offset, bucket.numel_unpadded) for bucket in buffer.buckets]
            for tensors in state[index].values():
                for key, value in tensors.items():
                    if isinstance(value, Tensor) and len(value) != buffer.numel:  # else it has its padding
                        tensors[key] = with_padding(value, places, size=buffer.numel)
        return state


def with_padding(packed: Tensor, places: list[tuple[int, int]], *, size: int) -> Tensor:
    """Buckets that lie behind one another, at their places.

    Args:
        packed: [sum of lengths].
        places: (start, length) of every bucket, in order.
        size: of the result.

    Returns:
        [size], zeros between the buckets.
    """
    whole = packed.new_zeros(size)
    parts = torch.split(packed, [length for _, length in places])
    for (start, length), part in zip(places, parts, strict=True):
        whole[start : start + length] = part
    return whole
