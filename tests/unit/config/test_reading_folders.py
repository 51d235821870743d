"""A folder where a file is expected is one line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_medllm.errors import UserError
from megatron_medllm.storage import read_json, read_jsonl


@pytest.mark.parametrize("read", [read_json, lambda path: list(read_jsonl(path))])
def test_a_folder_is_no_file(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read(tmp_path)
