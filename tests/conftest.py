"""Fixtures that more than one room's tests use."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worlds.exam import write_exam
from tests.worlds.run import write_tiny_world


@pytest.fixture(autouse=True)
def signals_as_they_were() -> Iterator[None]:
    """Code that runs in the test's process may ignore a signal; the next test's children would inherit that."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a small invented world and its two corpora, built once."""
    return write_tiny_world(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def exam_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small invented exam in IgakuQA's layout."""
    return write_exam(tmp_path_factory.mktemp("exam"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An HF directory with a tiny random Qwen2."""
    from tests.worlds.model_dir import write_tiny_model  # torch and transformers: seconds to import

    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The published exams, where this machine has them."""
    default = Path(__file__).parents[1].parent / "shared" / "data"
    place = Path(os.environ.get("MEDLLM_SHARED_DATA", default))
    if not (place / "igakuqa").is_dir():
        pytest.skip(f"no exam data in {place} (set MEDLLM_SHARED_DATA)")
    return place
