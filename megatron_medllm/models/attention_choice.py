"""Which kernel attends: chosen once a run, checked on the device before it is trusted, and said in one line.

flash   variable-length FlashAttention: every CUDA device, every stream.
dense   cuDNN through torch, where one document fills the stream.
ragged  cuDNN through its front end, every other stream; needs the optional wheel.

Both of cuDNN's are for Hopper in bf16 or fp16. Before the first step each of them attends to a short stream, forward
and backward, beside flash. One that fails or disagrees is left out (`auto`) or refused (`cudnn`).
"""

import logging
import math
from collections.abc import Iterable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from megatron_medllm.errors import UserError
from megatron_medllm.kernels.attention import (
    CUDNN_ERRORS,
    PlanCache,
    RaggedBatch,
    described,
    missing_front_end,
    plan_key,
    ragged_attention,
)
from megatron_medllm.kernels.backend import missing_hopper
from megatron_medllm.models.attention import Attend, PackedAttention, attend_by_default, dense_sdpa, flash_varlen
from megatron_medllm.parallel.packed import PackedSequences, Segment
from megatron_medllm.parallel.staging import to_device

log = logging.getLogger(__name__)

DENSE_FROM = 512  # tokens; below, a launch costs more than the kernels differ
DENSE_LENGTHS = 16  # torch plans every new length anew (tens of ms): only so many lengths of a process go this way
_AGREEMENT = 0.02  # relative; two bf16 kernels are within 0.01 of each other
_NO_KERNEL = "No available kernel"  # torch's words where the backends that it may use refuse
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


class CudnnAttention:
    """Attend by cuDNN where it can, by flash where not."""

    def __init__(self, *, dense: bool, plans: PlanCache | None) -> None:
        """`dense`: for one-document streams; `plans`: for all others, None: none of them."""
        self.dense, self.plans = dense, plans
        self._lengths: set[int] = set()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, scale: float) -> Tensor:
        """[t, np, hn], as `flash_varlen`."""
        if query.dtype not in _SIXTEEN_BITS or packed.split.size != 1:
            return attend_by_default(query, key, value, packed, scale)
        if self.dense and self._is_dense(packed, len(query)):
            try:
                return dense_sdpa(query, key, value, scale)
            except RuntimeError as error:
                if _NO_KERNEL not in str(error):
                    raise
                log.warning("attention: cuDNN has no kernel for a document of %d tokens; flash attends", len(query))
                self.dense = False
        out = None if self.plans is None else ragged_cudnn(query, key, value, packed, scale, self.plans)
        return attend_by_default(query, key, value, packed, scale) if out is None else out

    def _is_dense(self, packed: PackedSequences, tokens: int) -> bool:
        if len(packed.segments) > 1 or tokens < DENSE_FROM:
            return False
        if len(self._lengths) < DENSE_LENGTHS:
            self._lengths.add(tokens)
        return tokens in self._lengths


def ragged_cudnn(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, scale: float, plans: PlanCache
) -> Tensor | None:
    """[t, np, hn]: by cuDNN's ragged kernels; None where there is no plan for this stream."""
    heads, width = (query.shape[1], key.shape[1]), query.shape[2]
    name = ("ragged", heads, width)
    if name not in packed.tables:  # its first layer decides for all of them
        layout = packed.ragged_layout()
        batch = RaggedBatch.build(
            layout.lengths_q,
            layout.lengths_kv,
            heads=heads,
            width=width,
            move=partial(to_device, device=query.device, ahead=packed.ahead),
            kv_rows=layout.kv_rows,
        )
        found = plans.get(plan_key(batch, heads=heads, width=width, dtype=query.dtype, scale=scale), query.device)
        packed.tables[name] = (batch, found)
    batch, found = packed.tables[name]
    return None if found is None else ragged_attention(query, key, value, batch, found, scale)


def choose_attention(
    chunks: Iterable[nn.Module], wanted: Literal["auto", "flash", "cudnn"], device: torch.device
) -> None:
    """Tell every attention of our own in these chunks how to attend; say it in one line.

    Raises:
        UserError: `cudnn` was asked for and cannot run here.
    """
    layers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, PackedAttention)]
    if not layers:
        if wanted != "auto":
            log.warning("kernels.attention=%s: this backend's attention is not ours and stays as it is", wanted)
        return
    attend, said = _choice(wanted, device, layers[0].dtype, layers[0].heads, layers[0].width)
    for layer in layers:
        layer.attend = attend
    log.info("attention: %s (asked for: %s)", said, wanted)


def _choice(
    wanted: str, device: torch.device, dtype: torch.dtype, heads: tuple[int, int], width: int
) -> tuple[Attend, str]:
    missing = missing_dense(device, dtype, width)
    if wanted == "cudnn" and missing is not None:
        raise UserError(f"kernels.attention=cudnn needs {missing}")
    if wanted == "flash" or missing is not None:
        flash = device.type == "cuda" and dtype in _SIXTEEN_BITS
        why = f"; cuDNN needs {missing}" if missing is not None and wanted == "auto" else ""
        return attend_by_default, ("flash" if flash else "torch's SDPA of padded documents") + why
    strict, no_ragged = wanted == "cudnn", missing_front_end(device)
    if strict and no_ragged is not None:
        raise UserError(f"kernels.attention=cudnn needs {no_ragged}; auto takes cuDNN for one-document streams alone")
    plans = PlanCache(strict=strict, sightings=1)  # of the check
    dense_fault = disagreement(CudnnAttention(dense=True, plans=None), ONE_DOCUMENT, device, dtype, heads, width)
    ragged_fault = no_ragged
    if no_ragged is None:
        ragged = CudnnAttention(dense=False, plans=plans)
        ragged_fault = disagreement(ragged, PAIR_AND_DOCUMENTS, device, dtype, heads, width) or plans.off
    faults = [fault for fault in (dense_fault, None if no_ragged else ragged_fault) if fault]
    if strict and faults:
        raise UserError(f"kernels.attention=cudnn: {faults[0]}")
    if faults:
        log.warning("attention: cuDNN failed its check and is left out: %s", "; ".join(faults))
    kept = PlanCache(strict=strict) if ragged_fault is None else None
    attend = CudnnAttention(dense=dense_fault is None, plans=kept)
    one = "cuDNN" if dense_fault is None else f"flash (cuDNN: {dense_fault})"
    many = "cuDNN" if ragged_fault is None else f"flash (cuDNN: {ragged_fault})"
    return attend, f"one document a stream: {one}; several: {many}"


def missing_dense(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """What dense cuDNN attention lacks here, in words; None where nothing is missing."""
    if (missing := missing_hopper(device)) is not None:
        return missing
    if dtype not in _SIXTEEN_BITS:
        return f"model.dtype bfloat16 (this one is {str(dtype).removeprefix('torch.')})"
    if width % 16 or width > 128:
        return f"heads of a multiple of 16 up to 128 numbers (these have {width})"
    return None if torch.backends.cudnn.is_available() else "torch built with cuDNN"


ONE_DOCUMENT = (Segment(0, 640),)
# A document of one token and one of three hundred, then a prompt of ninety with two responses.
PAIR_AND_DOCUMENTS = (
    Segment(0, 1), Segment(1, 301), Segment(301, 391), Segment(391, 450, 301, 391), Segment(450, 641, 301, 391)
)  # fmt: skip


def disagreement(
    attend: Attend,
    segments: tuple[Segment, ...],
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int],
    width: int,
    reference: Attend = flash_varlen,
) -> str | None:
    """How `attend` differs from `reference` on random numbers, or why it fails, in words; None where it agrees."""
    tokens, scale = segments[-1].end, 1 / math.sqrt(width)
    generator = torch.Generator().manual_seed(0)
    sizes = (heads[0], heads[1], heads[1], heads[0])
    *inputs, upstream = (torch.randn(tokens, n, width, generator=generator).to(device, dtype) for n in sizes)
    results = []
    for function in (attend, reference):
        packed = PackedSequences.from_segments(segments, torch.zeros(tokens, device=device), backend="torch")
        leaves = [x.clone().requires_grad_() for x in inputs]
        try:
            out = function(leaves[0], leaves[1], leaves[2], packed, scale)
            results.append((out, *torch.autograd.grad(out, leaves, upstream)))
        except CUDNN_ERRORS as error:
            return described(error)
    for what, found, expected in zip(("output", "d query", "d key", "d value"), *results, strict=True):
        off = float((found.float() - expected.float()).norm() / expected.float().norm())
        if not off <= _AGREEMENT:  # NaN is no agreement
            return f"{what} is off by {off:.3g} of its size"
    return None
