import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # exam_world.py

from exam_world import write_exam, write_tiny_model


@pytest.fixture(scope="session")
def exam_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exam(tmp_path_factory.mktemp("exam"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The published exams, where this machine has them."""
    default = Path(__file__).parents[2].parent / "shared" / "data"
    place = Path(os.environ.get("MEDLLM_SHARED_DATA", default))
    if not (place / "igakuqa").is_dir():
        pytest.skip(f"no exam data in {place} (set MEDLLM_SHARED_DATA)")
    return place
