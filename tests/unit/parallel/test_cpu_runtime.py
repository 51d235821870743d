"""The redirection of Megatron-Core to the CPU: what it changes, what it leaves alone, what it refuses."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.errors import UserError
from megatron_medllm.parallel import adam, cpu, runtime
from megatron_medllm.versions import installed


def run_alone(code: str) -> "subprocess.CompletedProcess[str]":
    """In a process of its own: which modules are touched depends on what was imported before."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_an_untested_megatron_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    """Also where the environment lets it pass: that is for CUDA."""
    import megatron.core

    monkeypatch.setattr(megatron.core, "__version__", "0.18.2")
    monkeypatch.setattr(cpu, "installed", False)
    monkeypatch.setenv("MEDLLM_UNTESTED_MCORE", "1")
    with pytest.raises(UserError, match=r"^megatron-core 0\.18\.2 is installed, tested are 0\.16\.1 and 0\.19\.2: pip"):
        cpu.install()


def test_the_commit_in_a_version_is_passed_over():
    """In a folder that is a git clone Megatron-Core puts the clone's commit behind its own version."""
    assert cpu.passed_on("0.19.2+23d5ab7") == cpu.passed_on("0.19.2") != cpu.passed_on("0.16.1+23d5ab7")


@pytest.mark.slow
def test_a_folder_that_is_a_clone_makes_no_other_version(tmp_path: Path):
    for command in ("init", "add .", "-c user.name=a -c user.email=a@b commit --allow-empty -m x"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True, capture_output=True)
    code = "from megatron import core; from megatron_medllm.parallel import cpu; cpu.install(); print(core.__version__)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(installed("megatron-core"))


USED = """
import ast, sys
from megatron_medllm.parallel import cpu
cpu.install()
import megatron_medllm.train.loop
import megatron.core
proxy = sys.modules["megatron.core.parallel_state"].torch
used = set()
for name, module in list(sys.modules.items()):
    if not name.startswith("megatron.core") or getattr(module, "torch", None) is not proxy:
        continue
    for node in ast.walk(ast.parse(open(module.__file__).read())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.cuda":
            used.add(node.attr)
known = cpu.passed_on(megatron.core.__version__) | set(vars(cpu._Cuda))
print(len(used), sorted(used - known))
"""


@pytest.mark.slow
def test_every_cuda_name_that_megatron_writes_is_known():
    """Of a new version this tells what to look at, before something fails far away."""
    result = run_alone(USED)
    count, unknown = result.stdout.strip().split(" ", 1)
    assert int(count) > 30 and unknown == "[]", result.stderr


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


@pytest.mark.slow
def test_only_megatron_is_redirected():
    result = run_alone(UNTOUCHED)
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
    monkeypatch.setattr(adam, "install", optimizers.append)
    monkeypatch.setattr(runtime.dist, "init_process_group", joined)
    stand_in = SimpleNamespace(is_available=lambda: True, set_device=devices.append)
    monkeypatch.setattr(runtime.torch, "cuda", stand_in)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(ConnectionError):
        runtime.start(LayoutConfig(), seed=0)
    assert asked["backend"] == "nccl" and asked["device_id"] == torch.device("cuda", 3)
    assert devices == [torch.device("cuda", 3)] and optimizers == ["cuda"]


@pytest.mark.parametrize(("device_type", "native", "replaced"), [
    ("cpu", False, True), ("cpu", True, True), ("cuda", False, True), ("cuda", True, False),
])  # fmt: skip
def test_adam_is_replaced_but_where_a_fused_one_runs(
    monkeypatch: pytest.MonkeyPatch, device_type: str, native: bool, replaced: bool
):
    """`native`: Transformer Engine or apex brought an Adam, which only CUDA can run."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed_optimizer

    for module in (optimizer, distributed_optimizer):
        monkeypatch.setattr(module, "Adam", object)
    monkeypatch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", not native)
    monkeypatch.setattr(distributed_optimizer, "HAVE_APEX_OR_TE", native)
    monkeypatch.setattr(distributed_optimizer, "USING_APEX_OPTIMIZER", False)
    adam.install(device_type)
    for module in (optimizer, distributed_optimizer):
        assert module.Adam is (adam.FusedAdam if replaced else object)
    assert distributed_optimizer.USING_APEX_OPTIMIZER is replaced and not optimizer.USING_PYTORCH_OPTIMIZER


def test_the_device_and_its_process_group():
    assert runtime.local_device(cuda=True, environment={"LOCAL_RANK": "5"}) == torch.device("cuda", 5)
    assert runtime.local_device(cuda=True, environment={}) == torch.device("cuda", 0)
    assert runtime.local_device(cuda=False, environment={"LOCAL_RANK": "5"}) == torch.device("cpu")
    gpu, cpu_device = torch.device("cuda", 1), torch.device("cpu")
    nccl = runtime.group_settings(gpu, {"MASTER_ADDR": "a"}, world_size=2, timeout_s=9.0)
    assert nccl == {"backend": "nccl", "device_id": gpu, "timeout": timedelta(seconds=9)}
    gloo = runtime.group_settings(cpu_device, {"MASTER_ADDR": "a"}, world_size=1, timeout_s=9.0)
    assert gloo == {"backend": "gloo", "timeout": timedelta(seconds=9)}
    alone = runtime.group_settings(cpu_device, {}, world_size=1, timeout_s=9.0)
    assert alone["rank"] == 0 and alone["world_size"] == 1 and alone["store"] is not None


def test_what_a_gpu_run_needs_of_its_environment():
    environment: dict[str, str] = {"IBV_FORK_SAFE": "0"}
    assert runtime.host_settings(LayoutConfig(), environment) == []
    assert environment == {"IBV_FORK_SAFE": "0", "RDMAV_FORK_SAFE": "1"}  # what the user set stays
    (warning,) = runtime.host_settings(LayoutConfig(tp=2), {})
    assert warning.startswith("CUDA_DEVICE_MAX_CONNECTIONS is not set: with layout.tp=2 set it to 1")
    (warning,) = runtime.host_settings(LayoutConfig(tp=4), {"CUDA_DEVICE_MAX_CONNECTIONS": "8"})
    assert warning.startswith("CUDA_DEVICE_MAX_CONNECTIONS is 8")
    assert runtime.host_settings(LayoutConfig(tp=2), {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}) == []


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
