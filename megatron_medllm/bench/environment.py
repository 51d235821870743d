"""Where a number was measured: device, versions, code revision."""

import os
import platform
from typing import Any

import torch

from megatron_medllm.provenance import git_changed_files, git_revision, package_versions

PACKAGES = (
    "megatron-medllm",
    "megatron-core",
    "torch",
    "transformer-engine",
    "triton",
    "apex",
    "transformers",
    "numpy",
)


def environment_facts(device: torch.device) -> dict[str, Any]:
    """JSON-able facts; packages that are not installed are None."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "device_type": device.type,
        "cpu_cores": os.cpu_count(),
        "load_average_1min": os.getloadavg()[0],
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "packages": package_versions(PACKAGES),
        "git_revision": git_revision(),
        "git_changed_files": git_changed_files(),
    }
