"""What a user sees of other packages' warnings: nothing that they cannot mend."""

import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_training_is_imported_without_a_warning() -> None:
    """Megatron-Core warns eight times that it does without Apex and Transformer Engine."""
    done = subprocess.run(
        [sys.executable, "-c", "import megatron_medllm.train.loop, megatron_medllm.train.scoring"],
        capture_output=True,
        text=True,
        check=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"},
    )
    assert "arning" not in done.stderr + done.stdout, done.stderr
