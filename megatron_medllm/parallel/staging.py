"""Small host arrays on their way to the device, without a wait.

The problem: copying from ordinary memory makes the host wait until the device has done all work queued so far, so the
device then idles while the host prepares what comes next: some ten times a micro-batch. The method: the arrays are laid
into one pinned buffer and copied in the stream's order; the host goes on at once and prepares the next micro-batch
while the device computes this one. torch's allocator keeps a pinned buffer until its copy is done.
"""

import logging
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)

_ALIGNMENT = 16  # bytes: any dtype may be viewed at such an offset, and kernels load 16 bytes at once


@lru_cache
def runs_ahead(choice: Literal["auto", "ahead", "blocking"], device: torch.device) -> bool:
    """Whether copies are queued: what `kernels.copies` comes to; says so in the log."""
    ahead = choice == "ahead" or (choice == "auto" and device.type == "cuda")
    log.info("copies to the %s: %s (asked for: %s)", device.type, "queued" if ahead else "blocking", choice)
    return ahead


def to_device(arrays: list[np.ndarray], device: torch.device, *, ahead: bool) -> list[Tensor]:
    """The arrays on the device, of the same shapes and dtypes.

    Args:
        arrays: small ones, of any dtypes that torch knows.
        device: where they go.
        ahead: queue one copy for all of them; on a CPU they are copied into one buffer all the same.
    """
    if not ahead:
        return [torch.from_numpy(array).to(device) for array in arrays]
    starts, size = [], 0
    for array in arrays:
        starts.append(size)
        size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    raw = buffer.numpy()
    for start, array in zip(starts, arrays, strict=True):
        raw[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    moved = buffer.to(device, non_blocking=True)
    return [
        moved[start : start + array.nbytes].view(_dtype(array)).view(array.shape)
        for start, array in zip(starts, arrays, strict=True)
    ]


def _dtype(array: np.ndarray) -> torch.dtype:
    return torch.from_numpy(np.empty(0, array.dtype)).dtype
