"""The redirection of Megatron-Core to the CPU: what it changes, what it leaves alone, what it refuses."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.errors import UserError
from megatron_medllm.parallel import adam, cpu, runtime


def test_another_megatron_version_is_refused(monkeypatch: pytest.MonkeyPatch):
    import megatron.core

    monkeypatch.setattr(megatron.core, "__version__", "0.17.0")
    monkeypatch.setattr(cpu, "_installed", False)
    with pytest.raises(UserError, match=r"megatron-core 0\.17\.0 is installed; the CPU runtime knows 0\.16\.1 only"):
        cpu.install()


# In a process of its own: which modules are touched depends on what was imported before.
UNTOUCHED = """
import torch
before = {name: getattr(torch, name) for name in ("zeros", "empty", "cuda", "tensor")}
from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.parallel import runtime
here = runtime.start(LayoutConfig(), seed=0)
assert here.device == torch.device("cpu") and here.is_main and here.is_last_stage
assert all(getattr(torch, name) is value for name, value in before.items())
assert not torch.cuda.is_initialized() and torch.cuda.__name__ == "torch.cuda"

import megatron.core.optimizer as optimizer
import megatron.core.parallel_state as state
from megatron_medllm.parallel.adam import FusedAdam
assert state.torch is not torch and state.torch.float32 is torch.float32
assert state.torch.cuda.current_device() == torch.device("cpu")
assert state.torch.zeros(2, device="cuda").device.type == "cpu"
assert state.torch.empty(2, device=state.torch.cuda.current_device(), pin_memory=True).device.type == "cpu"
assert optimizer.Adam is FusedAdam
assert torch.zeros(1).type() == "torch.FloatTensor" and torch.zeros(1).cuda().device.type == "cpu"
try:
    torch.zeros(1, device="cuda")
except (RuntimeError, AssertionError):
    pass
else:
    raise AssertionError("torch itself was redirected")
runtime.stop()
runtime.start(LayoutConfig(), seed=0)  # a second runtime in the same process
runtime.stop()
print("fine")
"""


def test_only_megatron_is_redirected():
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", UNTOUCHED],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout.endswith("fine\n"), result.stderr


def test_named_random_states_are_streams_of_their_own():
    cpu.install()
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("experts", 7)
    expected = torch.rand(4, generator=torch.Generator().manual_seed(7))
    torch.manual_seed(1)
    plain = torch.rand(2)
    torch.manual_seed(1)
    with tracker.fork("experts"):
        first = torch.rand(2)
    with tracker.fork("experts"):
        second = torch.rand(2)
    assert torch.equal(torch.cat((first, second)), expected)
    assert torch.equal(torch.rand(2), plain)
    with pytest.raises(ValueError, match="added before"):
        tracker.add("experts", 8)
    with pytest.raises(ValueError, match="never added"), tracker.fork("nobody"):
        pass


def test_a_cuda_run_is_not_redirected(monkeypatch: pytest.MonkeyPatch):
    """Up to the process group, as far as a machine without CUDA goes."""
    asked: dict = {}

    def joined(**settings: object) -> None:
        asked.update(settings)
        raise ConnectionError

    devices: list[torch.device] = []
    optimizers: list[str] = []
    monkeypatch.setattr(cpu, "install", lambda: pytest.fail("redirected to the CPU"))
    monkeypatch.setattr(adam, "install", lambda: optimizers.append("torch's, unless a better one is there"))
    monkeypatch.setattr(runtime.dist, "init_process_group", joined)
    stand_in = SimpleNamespace(is_available=lambda: True, set_device=devices.append)
    monkeypatch.setattr(runtime.torch, "cuda", stand_in)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(ConnectionError):
        runtime.start(LayoutConfig(), seed=0)
    assert asked["backend"] == "nccl" and asked["device_id"] == torch.device("cuda", 3)
    assert devices == [torch.device("cuda", 3)] and len(optimizers) == 1


@pytest.mark.parametrize(
    ("layout", "world_size", "message"),
    [
        (LayoutConfig(tp=2), "1", "layout needs 2 processes, but 1 were started"),
        (LayoutConfig(), "4", "layout needs 1 processes, but 4 were started"),
    ],
)
def test_what_cannot_start_says_why(
    monkeypatch: pytest.MonkeyPatch, layout: LayoutConfig, world_size: str, message: str
):
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(UserError, match=message):
        runtime.start(layout, seed=0)
