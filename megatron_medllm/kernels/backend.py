"""Whether Triton kernels can run here: asked by every kernel, found out once."""

import importlib.util
from functools import lru_cache


@lru_cache
def triton_installed() -> bool:
    """True where the triton package is there; it is looked for, not imported."""
    return importlib.util.find_spec("triton") is not None
