"""Megatron-Core on a machine without CUDA: its CUDA names are redirected, inside `megatron.core` only.

The problem: Megatron-Core writes `torch.cuda.current_device()`, `device="cuda"` and CUDA streams into code
that is otherwise device-neutral. The method: every loaded `megatron.core` module that holds the name `torch` gets a
proxy module instead, whose factory functions place tensors on the CPU and whose `cuda` is made of no-ops; everything
else passes through. Two tensor methods (`Tensor.cuda`, and `Tensor.type` as Megatron's optimizer asks it) are patched
globally, since they cannot be reached by name. The trade-off: this leans on Megatron-Core's internals, so a version
that the tests did not run on is refused, and the module is never imported on a CUDA run.
"""

import contextlib
import functools
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from packaging.version import Version

from megatron_medllm import versions
from megatron_medllm.errors import UserError
from megatron_medllm.parallel import adam

# Modules that must be loaded before the redirection, so that none keeps the real `torch` by being imported late.
_MODULES = (
    "megatron.core",
    "megatron.core.optimizer",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.distributed.finalize_model_grads",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
)
# torch.jit and torch.compile read these modules' source: a proxy there breaks them, and they hold no CUDA names.
_UNTOUCHED = ("megatron.core.fusions", "megatron.core.jit", "megatron.core.activations")
_FACTORIES = (
    *("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "eye", "rand", "randn", "randint"),
    *("empty_like", "zeros_like", "ones_like", "full_like"),
)
# Names of `torch.cuda` that Megatron-Core's modules write and that are passed on: first and last version, names. A test
# goes through the modules of the version that is installed: a name that is neither here nor in `_Cuda` fails it.
PASSED_ON = (
    # the same without CUDA: types and errors that are compared with, decorators, the question whether there is a device
    ("0.16.1", "0.19.2", "FloatTensor HalfTensor BFloat16Tensor OutOfMemoryError amp is_available"),
    # never reached here: CUDA graphs, memory pools and statistics, experts, FSDP, offloading, generation
    ("0.16.1", "0.19.2", "CUDAGraph graph graph_pool_handle set_stream default_generators random MemPool use_mem_pool"),
    ("0.16.1", "0.19.2", "memory_stats get_device_capability get_device_properties"),
    ("0.16.1", "0.19.2", "clock_rate power_draw temperature utilization"),
    ("0.19.2", "0.19.2", "_sleep device_memory_used memory_snapshot"),
)


def passed_on(version: str) -> set[str]:
    """The names that `PASSED_ON` has for a version."""
    own = Version(Version(version).public)
    return {
        name for first, last, names in PASSED_ON if Version(first) <= own <= Version(last) for name in names.split()
    }


def _no_op(*_: Any, **__: Any) -> None:
    return None


class _Event:
    """A CUDA event that has always happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    record = wait = synchronize = _no_op

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: "_Event") -> float:
        return 0.0


class _Stream:
    """A CUDA stream on which everything is done at once."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    wait_stream = wait_event = synchronize = _no_op

    def record_event(self, *_: Any) -> _Event:
        return _Event()


class _Cuda(types.ModuleType):
    """What `torch.cuda` means inside Megatron-Core on a CPU."""

    Stream, Event = _Stream, _Event
    set_device = synchronize = empty_cache = staticmethod(_no_op)
    current_device = staticmethod(lambda: torch.device("cpu"))
    device_count = staticmethod(lambda: 1)
    current_stream = default_stream = staticmethod(lambda *_: _Stream())
    stream = staticmethod(lambda _: contextlib.nullcontext())
    get_rng_state = staticmethod(lambda *_, **__: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, *_, **__: torch.set_rng_state(state))
    manual_seed = staticmethod(torch.manual_seed)
    memory_allocated = max_memory_allocated = memory_reserved = staticmethod(lambda *_: 0)
    is_current_stream_capturing = staticmethod(lambda: False)
    nvtx = types.SimpleNamespace(range_push=_no_op, range_pop=_no_op)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


def _on_cpu(factory: Callable) -> Callable:
    @functools.wraps(factory)
    def place(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return place


def _torch_proxy() -> types.ModuleType:
    proxy = types.ModuleType("torch")
    proxy.__dict__.update(vars(torch))
    proxy.__getattr__ = lambda name: getattr(torch, name)  # type: ignore[method-assign]  # what a proxy is
    for name in _FACTORIES:
        setattr(proxy, name, _on_cpu(getattr(torch, name)))
    proxy.__dict__.update(
        cuda=_Cuda("torch.cuda"),
        autocast=lambda device, *args, **kwargs: torch.autocast("cpu", *args, **kwargs),
    )
    return proxy


installed = False


def install() -> None:
    """Redirect `megatron.core` to the CPU for the rest of this process. Calling it again does nothing.

    Raises:
        UserError: a Megatron-Core that the tests did not run on.
    """
    global installed
    if installed:
        return
    import megatron.core

    if not versions.is_tested(megatron.core.__version__):
        raise UserError(versions.untested(megatron.core.__version__))
    for name in _MODULES:
        importlib.import_module(name)
    proxy = _torch_proxy()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and not name.startswith(_UNTOUCHED) and vars(module).get("torch") is torch:
            vars(module)["torch"] = proxy
    _redirect_random_states()
    adam.install("cpu")
    _redirect_tensor_methods()
    _mend_recompute_without_te()
    installed = True


def _redirect_random_states() -> None:
    import megatron.core.tensor_parallel.random as mcore_random

    class CpuRNGStatesTracker(mcore_random.CudaRNGStatesTracker):
        """The tracker of named random states, over torch's CPU generator."""

        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"random state {name!r} or seed {seed} was added before")
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = mcore_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            if name not in self.states_:
                raise ValueError(f"random state {name!r} was never added")
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    mcore_random.CudaRNGStatesTracker = CpuRNGStatesTracker
    mcore_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _redirect_tensor_methods() -> None:
    tensor_type = torch.Tensor.type

    def type_as_megatron_asks(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        if dtype is not None:
            return tensor_type(self, dtype, **kwargs)
        name = tensor_type(self)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return name.replace("torch.", "torch.cuda.", 1) if caller.startswith("megatron.core.optimizer") else name

    # Both methods are replaced on purpose.
    torch.Tensor.type = type_as_megatron_asks  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]


def _mend_recompute_without_te() -> None:
    """Upstream tests `fp8 is not None` on a bool, and so calls Transformer Engine where there is none."""
    import megatron.core.tensor_parallel.random as mcore_random

    if mcore_random.HAVE_TE:
        return
    upstream_init = mcore_random.CheckpointWithoutOutput.__init__

    def init(self: Any, fp8: bool = False) -> None:
        upstream_init(self, fp8)
        self.fp8 = bool(fp8)

    mcore_random.CheckpointWithoutOutput.__init__ = init
