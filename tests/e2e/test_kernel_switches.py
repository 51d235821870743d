"""`kernels.copies` and `kernels.optimizer`, both ways: the same losses, to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.worlds.pairs import random_pairs, rpo_settings, write_model, write_pairs
from tests.worlds.run import cpt_settings, run_config
from tests.worlds.steps import steps_of

SWITCHES = [
    {"copies": "blocking", "optimizer": "megatron"},
    {"copies": "ahead", "optimizer": "megatron"},
    {"copies": "ahead", "optimizer": "foreach"},
]


class Operations(TorchDispatchMode):
    """Counts the operations that make a host wait for a CUDA device whose result has an unknown size."""

    def __init__(self) -> None:
        super().__init__()
        self.nonzero = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.nonzero += function is torch.ops.aten.nonzero.default
        return function(*args, **(kwargs or {}))


def losses(settings: dict) -> tuple[list[dict[str, float]], int]:
    """Metrics of three steps, and how often the third asked for the size of a result."""
    with steps_of(run_config(settings)) as take:
        found = [take(step).metrics for step in range(2)]
        with Operations() as operations:
            found.append(take(2).metrics)
    return found, operations.nonzero


@pytest.mark.parametrize("adapter", [None, {"rank": 4}])
def test_pretraining(adapter: dict | None, tiny_world: Path, tmp_path: Path) -> None:
    results = []
    for index, switches in enumerate(SWITCHES):
        cpt = {"adapter": adapter, "z_loss": 0.0 if adapter else 1e-4}
        settings = cpt_settings(tiny_world, tmp_path / str(index), kernels=switches, cpt=cpt)
        settings["model"]["dtype"] = "bfloat16"
        results.append(losses(settings))
    (blocking, asked), *others = results
    assert asked > 0 and blocking[0]["loss"] != blocking[2]["loss"]
    for found, sizes in others:
        assert found == blocking and sizes == 0


def test_preferences_and_their_reference(tmp_path: Path) -> None:
    from megatron_medllm.train.scoring import score

    model = write_model(tmp_path / "hf")
    pairs = write_pairs(tmp_path / "pairs.jsonl", random_pairs(24))
    results = []
    for index, switches in enumerate(SWITCHES):
        settings = rpo_settings(model, pairs, tmp_path / str(index), adapter={"rank": 4}) | {"kernels": switches}
        score(run_config(settings))
        results.append(losses(settings))
    (blocking, asked), *others = results
    assert asked > 0 and blocking[0]["preference_loss"] != blocking[2]["preference_loss"]
    for found, sizes in others:
        assert found == blocking and sizes == 0
