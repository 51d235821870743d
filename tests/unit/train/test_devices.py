"""MFU refers to the peak of exactly this device, or is not given."""

import pytest
import torch

from megatron_medllm.planner import known_hardware
from megatron_medllm.train.throughput import hardware_of_device

KNOWN = {"NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100-sxm", "NVIDIA A100-SXM4-80GB": "a100-80g"}
OTHERS = [
    "NVIDIA H100 PCIe",
    "NVIDIA H100 NVL",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA H200 NVL",
    "NVIDIA GH200 480GB",
    "NVIDIA GH200 144G HBM3e",
    "NVIDIA H800",
    "NVIDIA H800 PCIe",
    "NVIDIA H20",
    "NVIDIA A100-SXM4-40GB",
    "NVIDIA A100-PCIE-40GB",
    "NVIDIA A100 80GB PCIe",
    "NVIDIA A800-SXM4-80GB",
    "NVIDIA B200",
    "NVIDIA L40S",
]


@pytest.mark.parametrize(("name", "hardware"), [*KNOWN.items(), *((name, None) for name in OTHERS)])
def test_a_device_is_known_by_its_whole_name(name: str, hardware: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert hardware_of_device(torch.device("cuda")) == hardware
    assert hardware_of_device(torch.device("cpu")) is None
    assert hardware is None or hardware in known_hardware()
