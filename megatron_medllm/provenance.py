"""Where a result came from: package versions, code revision, machine. Collected here, for every file that says so."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_medllm import __version__

PACKAGE = Path(__file__).parent
_RECIPE_PACKAGES = ("megatron-core", "torch", "transformers", "tokenizers", "numpy", "fastokens", "rensa")


def environment() -> dict[str, Any]:
    """Versions, revision and machine of a pipeline's run, as RUN/environment.json holds them."""
    return {
        "versions": {
            "megatron_medllm": __version__,
            "python": platform.python_version(),
            **package_versions(_RECIPE_PACKAGES),
        },
        "git_revision": git_revision() or None,
        "machine": {
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "gpus": gpu_names(),
            "host_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
    }


def gpu_names() -> list[str]:
    """This machine's GPUs by NVIDIA's driver; none where it has no tool. (torch, seconds to import, is not asked.)"""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def package_versions(distributions: Iterable[str]) -> dict[str, str | None]:
    """Versions by distribution; None where it is not installed."""
    return {name: installed_version(name) for name in distributions}


def installed_version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_revision() -> str:
    """The checkout's commit; empty outside one."""
    return _git("rev-parse", "HEAD").strip()


def git_changed_files() -> int:
    """How many files differ from that commit."""
    return len(_git("status", "--porcelain").splitlines())


def git_state() -> dict[str, str]:
    """Revision and uncommitted changes of the checkout; empty outside one."""
    revision = git_revision()
    return {"revision": revision, "changes": _git("diff", "HEAD")} if revision else {}


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(PACKAGE), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git here
        return ""
    return done.stdout if done.returncode == 0 else ""
