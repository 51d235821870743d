"""Which overlaps a layout turns on, and who is waited for."""

import pytest
import torch
from pydantic import ValidationError

from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.parallel.overlap import Overlaps, await_parameters, gather_parameters, overlaps


@pytest.mark.parametrize(
    ("layout", "device_type", "expected"),
    [
        ({"dp": 2}, "cuda", Overlaps(True, True)),
        ({"cp": 2}, "cuda", Overlaps(True, True)),  # context ranks hold the same weights
        ({"dp": 2, "distributed_optimizer": False}, "cuda", Overlaps(True, False)),
        ({"dp": 1, "tp": 2}, "cuda", Overlaps(False, False)),
        ({"dp": 2}, "cpu", Overlaps(False, False)),
        ({"dp": 2, "overlap_grad_reduce": "on"}, "cpu", Overlaps(True, False)),
        ({"dp": 2, "overlap_param_gather": "on"}, "cpu", Overlaps(True, True)),
        ({"dp": 1, "overlap_param_gather": "on"}, "cpu", Overlaps(True, True)),
        ({"dp": 2, "overlap_param_gather": "off"}, "cuda", Overlaps(True, False)),
        ({"dp": 2, "overlap_grad_reduce": "off"}, "cuda", Overlaps(False, False)),
    ],
)
def test_what_overlaps(layout: dict, device_type: str, expected: Overlaps):
    assert overlaps(LayoutConfig(**layout), device_type) == expected


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"distributed_optimizer": False}, "needs distributed_optimizer=true"),
        ({"overlap_grad_reduce": "off"}, "needs overlap_grad_reduce on or auto"),
    ],
)
def test_a_gather_that_cannot_be(layout: dict, message: str):
    with pytest.raises(ValidationError, match=message):
        LayoutConfig(overlap_param_gather="on", **layout)


def test_a_module_is_waited_for_without_calling_it():
    module, asked = torch.nn.Linear(2, 2), []
    module.register_forward_pre_hook(lambda found, _: asked.append(found))
    await_parameters(module)
    assert asked == [module]
    gather_parameters([module])  # without DDP its parameters are current
