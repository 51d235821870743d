"""What can run here: asked by every kernel, and by those who choose one."""

import importlib.util
from functools import lru_cache

import torch


@lru_cache
def triton_installed() -> bool:
    """True where the triton package is there; it is looked for, not imported."""
    return importlib.util.find_spec("triton") is not None


def missing_cuda(device: torch.device) -> str | None:
    """What a CUDA kernel lacks here, in words; None where nothing is missing."""
    return None if device.type == "cuda" else f"a CUDA device (this one is {device.type})"


def missing_hopper(device: torch.device) -> str | None:
    """What a kernel for Hopper lacks here, in words; None where nothing is missing."""
    if (missing := missing_cuda(device)) is not None:
        return missing
    is_hopper = torch.cuda.get_device_capability(device)[0] == 9
    return None if is_hopper else f"a Hopper GPU (this one is {torch.cuda.get_device_name(device)})"
