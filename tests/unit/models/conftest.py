from collections.abc import Iterator

import pytest

from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.parallel import runtime


@pytest.fixture(scope="module")
def one_process() -> Iterator[runtime.Runtime]:
    """A runtime of this process alone, for a module's tests."""
    yield runtime.start(LayoutConfig(), seed=0)
    runtime.stop()
