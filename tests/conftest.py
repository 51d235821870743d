"""Fixtures that more than one room's tests use."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tiny_run.py and its like

from tiny_run import write_tiny_world


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a small invented world and its two corpora, built once."""
    return write_tiny_world(tmp_path_factory.mktemp("tiny"))
