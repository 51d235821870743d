"""Which Megatron-Core this package runs on.

What differs between the versions is asked in `parallel.mcore`, what differs on a CPU stands in a table of
`parallel.cpu`. This file imports neither torch nor Megatron-Core: an untested version is refused before its first line
runs, by the packages `parallel`, `models` and `train` when they are imported.
"""

import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

from packaging.version import Version

from megatron_medllm.errors import UserError

TESTED = ("0.16.1", "0.19.2")  # each has a leg of its own in .ci/run
OVERRIDE = "MEDLLM_UNTESTED_MCORE"


def is_tested(version: str) -> bool:
    """Whether the tests ran on it; the commit of a build or of the folder around (0.19.2+23d5ab7) does not count."""
    return Version(version).public in TESTED


def refuse_untested(version: str | None = None, environment: Mapping[str, str] = os.environ) -> None:
    """Stop at a Megatron-Core that the tests never ran on, unless the environment says to go on.

    Args:
        version: of megatron-core; default: the installed one.
        environment: where `MEDLLM_UNTESTED_MCORE=1` lets it pass, on CUDA only (`parallel.cpu` refuses it anyway).

    Raises:
        UserError: names the version, the tested ones and what to install.
    """
    if version is None:
        try:
            version = installed("megatron-core")
        except PackageNotFoundError:
            raise UserError(f"megatron-core is not installed: {_ADVICE}") from None
    if not is_tested(version) and environment.get(OVERRIDE) != "1":
        raise UserError(f"{untested(version)}; on CUDA {OVERRIDE}=1 runs it all the same")


_ADVICE = f"pip install megatron-core=={TESTED[-1]} (on Python 3.11 {TESTED[0]})"


def untested(version: str) -> str:
    """That a version was never tested, and which ones were."""
    return f"megatron-core {version} is installed, tested are {' and '.join(TESTED)}: {_ADVICE}"
