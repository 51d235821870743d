"""cuDNN's ragged attention through its front end (`nvidia-cudnn-frontend`, optional), as a differentiable function.

A key's two plans take 0.17 s to build on an H200, so they are kept by `PlanKey`, both are built before its first
forward pass, and only so many are built in a process. The log-sum-exps are always made,
so that a forward pass without gradients uses the same plan.

Source: cudnn-frontend 1.19.0, test/python/sdpa/fp16.py (`create_forward_graph`, `create_backward_graph`) and
samples/python/51_sdpa_backward.ipynb.
"""

import importlib.util
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_medllm.errors import UserError
from megatron_medllm.kernels.attention.ragged import PlanKey, RaggedBatch
from megatron_medllm.kernels.backend import missing_hopper

log = logging.getLogger(__name__)

# Streams of a key before its plans are built: 0.17 s, against 15 to 20 ms that each later stream of a 7B saves.
SIGHTINGS = 10
MAX_PLANS = 256  # keys of one process; beyond them a new one is left to flash
# What cuDNN's front end and torch raise where they have no kernel, miss a library, or know another version's arguments.
CUDNN_ERRORS = (RuntimeError, ImportError, OSError, ValueError, TypeError, AttributeError)
_OLDEST = 90700  # cuDNN 9.7: bottom-right masks of any length, grouped heads in ragged layout
_UIDS = {
    name: number
    for number, name in enumerate(
        ("q", "k", "v", "o", "stats", "dO", "dQ", "dK", "dV", "lengths_q", "lengths_kv",
         "offsets_q", "offsets_k", "offsets_v", "offsets_o", "offsets_stats"),
        start=1,
    )
}  # fmt: skip


def missing_front_end(device: torch.device) -> str | None:
    """What ragged cuDNN attention lacks here, in words; None where nothing is missing."""
    if (missing := missing_hopper(device)) is not None:
        return missing
    if importlib.util.find_spec("cudnn") is None:
        return "cuDNN's front end (pip install nvidia-cudnn-frontend==1.19.0)"
    try:
        import cudnn

        version = int(cudnn.backend_version())
    except (*CUDNN_ERRORS, AssertionError) as error:  # it asserts that it finds one libcudnn
        return f"cuDNN's front end, which is installed and cannot be used: {described(error)}"
    return None if version >= _OLDEST else f"cuDNN 9.7 or newer (found {version})"


def described(error: Exception) -> str:
    """An error's type and the first lines of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' | '.join(lines[:3])[:400]}"


@dataclass(frozen=True)
class Plans:
    """Both plans of a key, on one device."""

    forward: Any  # cudnn.pygraph
    backward: Any
    forward_workspace: int  # bytes
    backward_workspace: int


class PlanCache:
    """Plans by key. What cannot be built turns ragged attention off for the rest of the process, with one warning."""

    def __init__(
        self,
        build: Callable[[PlanKey, torch.device], Plans] | None = None,
        *,
        strict: bool = False,
        sightings: int = SIGHTINGS,
    ) -> None:
        """Args:
        build: makes a key's plans.
        strict: build at once, and raise UserError instead of turning off.
        sightings: how often a key is asked for before its plans are built.
        """
        self._build = build or build_plans
        self._strict, self._sightings = strict, 1 if strict else sightings
        self._seen: Counter[PlanKey] = Counter()
        self._plans: dict[tuple[PlanKey, torch.device], Plans] = {}
        self._full = False
        self.off: str | None = None  # why it was turned off

    def __len__(self) -> int:
        return len(self._plans)

    def get(self, key: PlanKey, device: torch.device) -> Plans | None:
        """The key's plans, for one more stream; None where something else has to attend."""
        plans = self._plans.get((key, device))
        if plans is not None or self.off is not None:
            return plans
        self._seen[key] += 1
        if self._seen[key] < self._sightings:
            return None
        if len(self._plans) >= MAX_PLANS and not self._strict:
            if not self._full:
                log.warning("attention: %d cuDNN plans are built; flash attends to what needs another", MAX_PLANS)
            self._full = True
            return None
        try:
            plans = self._build(key, device)
        except CUDNN_ERRORS as error:
            self.turn_off(f"no plan for {key}: {described(error)}")
            return None
        self._plans[key, device] = plans
        return plans

    def turn_off(self, reason: str) -> None:
        """Use it no more; plans already built are kept for backward passes that hold them."""
        if self._strict:
            raise UserError(f"kernels.attention=cudnn: {reason}")
        self.off = reason
        self._plans.clear()
        log.warning("attention: ragged cuDNN is off from here on, flash attends instead: %s", reason)


def ragged_attention(
    query: Tensor, key: Tensor, value: Tensor, batch: RaggedBatch, plans: Plans, scale: float
) -> Tensor:
    """Causal attention within sequences, the mask aligned to each sequence's last key.

    Args:
        query: [t, np, hn] bf16 or fp16, on CUDA.
        key: [t_kv, ng, hn].
        value: [t_kv, ng, hn].
        batch: the sequences.
        plans: of `plan_key(batch, ...)`, for this device.
        scale: of the scores.

    Returns:
        [t, np, hn]; differentiable in query, key and value.
    """
    return _Ragged.apply(query, key, value, batch, plans, scale)


class _Ragged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, batch: RaggedBatch, plans: Plans, scale: float
    ) -> Tensor:
        query, key, value = (x.contiguous() for x in (query, key, value))
        k, v = _own_rows(key, batch), _own_rows(value, batch)
        out = torch.empty_like(query)
        stats = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
        tensors = {"q": query, "k": k, "v": v, "o": out, "stats": stats}
        _execute(plans.forward, tensors, batch, plans.forward_workspace)
        ctx.save_for_backward(query, key, value, out, stats)
        ctx.batch, ctx.plans = batch, plans
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, out, stats = ctx.saved_tensors
        k, v = _own_rows(key, ctx.batch), _own_rows(value, ctx.batch)
        d_query, d_k, d_v = torch.empty_like(query), torch.empty_like(k), torch.empty_like(v)
        tensors = {"q": query, "k": k, "v": v, "o": out, "stats": stats, "dO": d_out.contiguous()}
        tensors |= {"dQ": d_query, "dK": d_k, "dV": d_v}
        _execute(ctx.plans.backward, tensors, ctx.batch, ctx.plans.backward_workspace)
        d_key, d_value = (_summed(dx, x, ctx.batch) for dx, x in ((d_k, key), (d_v, value)))
        return d_query, d_key, d_value, None, None, None


def _own_rows(x: Tensor, batch: RaggedBatch) -> Tensor:
    """[tokens_kv, ng, hn]: every sequence's keys (or values) behind one another."""
    return x if batch.kv_rows is None else x.index_select(0, batch.kv_rows)


def _summed(gradient: Tensor, like: Tensor, batch: RaggedBatch) -> Tensor:
    """The gradient of `_own_rows`' input: a row that several sequences see gets all their parts, added in fp32."""
    if batch.kv_rows is None:
        return gradient
    total = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    return total.index_add_(0, batch.kv_rows, gradient.float()).to(like.dtype)


def _execute(graph: Any, tensors: dict[str, Tensor], batch: RaggedBatch, workspace_bytes: int) -> None:
    """Run a plan on the current stream, in a workspace from torch's allocator, which knows that stream."""
    import cudnn

    tables = {
        "lengths_q": batch.lengths_q,
        "lengths_kv": batch.lengths_kv,
        "offsets_q": batch.offsets_q,
        "offsets_k": batch.offsets_kv,
        "offsets_v": batch.offsets_kv,
        "offsets_o": batch.offsets_q,
        "offsets_stats": batch.offsets_stats,
    }
    device = tensors["q"].device
    workspace = torch.empty(max(workspace_bytes, 1), dtype=torch.uint8, device=device)
    pointers = {_UIDS[name]: x.data_ptr() for name, x in (tensors | tables).items()}
    handle = device_handle(device)
    cudnn.set_stream(handle=handle, stream=current_stream(device))
    graph.execute(pointers, workspace.data_ptr(), handle=handle)


def current_stream(device: torch.device) -> int:
    """torch's current stream, as CUDA's own pointer."""
    return torch.cuda.current_stream(device).cuda_stream


@lru_cache
def device_handle(device: torch.device) -> Any:
    """cuDNN's handle, one a device."""
    import cudnn

    with torch.cuda.device(device):
        return cudnn.create_handle()


def build_plans(key: PlanKey, device: torch.device) -> Plans:
    """Both plans of a key.

    Raises:
        RuntimeError: cuDNN has no kernel for it, or failed.
    """
    start = time.perf_counter()
    handle = device_handle(device)
    with torch.cuda.device(device):
        graphs = [make(key, handle=handle) for make in (forward_graph, backward_graph)]
        for graph in graphs:
            compile_graph(graph)
    forward, backward = (int(graph.get_workspace_size()) for graph in graphs)
    log.debug("attention: cuDNN plans in %.0f ms for %s", 1e3 * (time.perf_counter() - start), key)
    return Plans(graphs[0], graphs[1], forward, backward)


def compile_graph(graph: Any) -> None:
    """Check a graph and build its first plan.

    Raises:
        RuntimeError: cuDNN has no kernel for it, or failed.
    """
    import cudnn

    try:
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
    except cudnn.cudnnGraphNotSupportedError as error:  # an Exception of no other kind
        raise RuntimeError(f"cudnnGraphNotSupportedError: {error}") from error


def forward_graph(key: PlanKey, **where: Any) -> Any:
    """The graph of o and the log-sum-exps; `where`: cuDNN's `handle`, or the `device_property` of a GPU not here."""
    parts = _Parts(key, **where)
    q, k, v = parts.tensor("q", "q", "q"), parts.tensor("k", "kv", "k"), parts.tensor("v", "kv", "v")
    out, stats = parts.graph.sdpa(name="ragged_sdpa", q=q, k=k, v=v, generate_stats=True, **parts.mask())
    parts.output(out, "o", "q", "o")
    parts.output(stats, "stats", "stats", "stats").set_data_type(parts.cudnn.data_type.FLOAT)
    return parts.graph


def backward_graph(key: PlanKey, **where: Any) -> Any:
    """The graph of dQ, dK and dV; arguments as of `forward_graph`."""
    parts = _Parts(key, **where)
    inputs = {
        "q": parts.tensor("q", "q", "q"),
        "k": parts.tensor("k", "kv", "k"),
        "v": parts.tensor("v", "kv", "v"),
        "o": parts.tensor("o", "q", "o"),
        "dO": parts.tensor("dO", "q", "o"),
        "stats": parts.tensor("stats", "stats", "stats", data_type=parts.cudnn.data_type.FLOAT),
    }
    d_query, d_key, d_value = parts.graph.sdpa_backward(
        name="ragged_sdpa_backward",
        **inputs,
        max_total_seq_len_q=key.total_q,
        max_total_seq_len_kv=key.total_kv,
        **parts.mask(),
    )
    parts.output(d_query, "dQ", "q", "q")
    parts.output(d_key, "dK", "kv", "k")
    parts.output(d_value, "dV", "kv", "v")
    return parts.graph


class _Parts:
    """What both graphs are made of."""

    def __init__(self, key: PlanKey, **where: Any) -> None:
        import cudnn

        kinds = cudnn.data_type
        self.cudnn, self.key = cudnn, key
        self.io = {torch.bfloat16: kinds.BFLOAT16, torch.float16: kinds.HALF}[key.dtype]
        self.graph = cudnn.pygraph(
            io_data_type=self.io,
            intermediate_data_type=kinds.FLOAT,
            compute_data_type=kinds.FLOAT,
            sm_version=90,
            **where,
        )
        self.offsets = {
            name: self._table(f"offsets_{name}", key.sequences + 1, kinds.INT64)
            for name in ("q", "k", "v", "o", "stats")
        }

    def _table(self, name: str, count: int, kind: Any) -> Any:
        return self.graph.tensor(name=name, uid=_UIDS[name], dim=(count, 1, 1, 1), stride=(1, 1, 1, 1), data_type=kind)

    def tensor(self, name: str, which: str, offsets: str, data_type: Any = None) -> Any:
        """A ragged input: of a shape of `PlanKey.shape`, its sequences at the named offsets."""
        dims, strides = self.key.shape(which)
        tensor = self.graph.tensor(name=name, uid=_UIDS[name], dim=dims, stride=strides, data_type=data_type or self.io)
        tensor.set_ragged_offset(self.offsets[offsets])
        return tensor

    def output(self, tensor: Any, name: str, which: str, offsets: str) -> Any:
        """Make a ragged output of what a node returned."""
        dims, strides = self.key.shape(which)
        tensor.set_uid(_UIDS[name]).set_output(True).set_dim(dims).set_stride(strides)
        tensor.set_ragged_offset(self.offsets[offsets])
        return tensor

    def mask(self) -> dict[str, Any]:
        """Lengths, scale and mask: keyword arguments of `sdpa` and `sdpa_backward` alike."""
        kinds, alignment = self.cudnn.data_type, self.cudnn.diagonal_alignment
        return {
            "attn_scale": self.key.scale,
            "use_padding_mask": True,
            "seq_len_q": self._table("lengths_q", self.key.sequences, kinds.INT32),
            "seq_len_kv": self._table("lengths_kv", self.key.sequences, kinds.INT32),
            "diagonal_alignment": alignment.BOTTOM_RIGHT if self.key.bottom_right else alignment.TOP_LEFT,
            "diagonal_band_right_bound": 0,
        }
