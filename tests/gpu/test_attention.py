"""cuDNN's attention on a Hopper GPU against torch's in fp32: outputs and gradients, dense and ragged."""

import math
from typing import Any

import pytest
import torch
import torch.utils.checkpoint

from megatron_medllm.kernels.attention import PlanCache, missing_front_end
from megatron_medllm.models.attention import dense_sdpa, flash_varlen, padded_sdpa
from megatron_medllm.models.attention_choice import (
    ONE_DOCUMENT,
    PAIR_AND_DOCUMENTS,
    CudnnAttention,
    disagreement,
    missing_dense,
    ragged_cudnn,
)
from megatron_medllm.parallel.packed import PackedSequences, Segment
from tests.worlds.head import relative_error

CUDA = torch.device("cuda", 0)
MISSING = missing_dense(CUDA, torch.bfloat16, 128) if torch.cuda.is_available() else "a CUDA device"
FRONT_END = MISSING or missing_front_end(CUDA)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=f"needs {MISSING}")]
ragged_only = pytest.mark.skipif(FRONT_END is not None, reason=f"needs {FRONT_END}")
SCALE = 1 / math.sqrt(128)
LONG = (Segment(0, 700), Segment(700, 701), Segment(701, 1725), Segment(1725, 2000), Segment(2000, 2001))


def check(attend: Any, segments: tuple[Segment, ...], heads: tuple[int, int]) -> None:
    """Against fp32, with NaN behind every input."""
    tokens, generator = segments[-1].end, torch.Generator().manual_seed(0)
    tensors = []
    for n in (heads[0], heads[1], heads[1], heads[0]):
        buffer = torch.full((tokens + 256, n, 128), math.nan)
        buffer[:tokens] = torch.randn(tokens, n, 128, generator=generator)
        tensors.append(buffer.to(CUDA, torch.bfloat16)[:tokens])
    results = []
    for function, dtype in ((attend, torch.bfloat16), (padded_sdpa, torch.float32)):
        packed = PackedSequences.from_segments(segments, torch.zeros(tokens, device=CUDA), backend="torch")
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors[:3]]
        out = function(*leaves, packed, SCALE)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, tensors[3].to(dtype))))
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < 0.01


@pytest.mark.parametrize("heads", [(8, 8), (28, 4)])
@pytest.mark.parametrize("tokens", [640, 1999])
def test_dense_cudnn(heads: tuple[int, int], tokens: int):
    check(lambda q, k, v, packed, scale: dense_sdpa(q, k, v, scale), (Segment(0, tokens),), heads)


@ragged_only
@pytest.mark.parametrize("heads", [(8, 8), (28, 4), (8, 1)])
@pytest.mark.parametrize("segments", [LONG, PAIR_AND_DOCUMENTS, ONE_DOCUMENT])
def test_ragged_cudnn(heads: tuple[int, int], segments: tuple[Segment, ...]):
    plans = PlanCache(strict=True)
    check(lambda *arguments: ragged_cudnn(*arguments, plans), segments, heads)
    assert len(plans) == 1


@ragged_only
def test_plans_are_shared_by_streams_alike():
    plans = PlanCache(strict=True)
    for first in (600, 700, 900):
        check(lambda *arguments: ragged_cudnn(*arguments, plans), (Segment(0, first), Segment(first, 1024)), (8, 2))
    assert len(plans) == 1  # the longest is over 512 and under 1,024 in each


@ragged_only
def test_under_recompute():
    plans = PlanCache(strict=True)

    def recomputed(*arguments: Any) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(ragged_cudnn, *arguments, plans, use_reentrant=False)

    check(recomputed, PAIR_AND_DOCUMENTS, (8, 2))


def test_the_check_before_the_first_step():
    where = (CUDA, torch.bfloat16, (28, 4), 128)
    assert disagreement(flash_varlen, PAIR_AND_DOCUMENTS, *where) is None
    assert disagreement(CudnnAttention(dense=True, plans=None), ONE_DOCUMENT, *where) is None
    if FRONT_END is None:
        attend = CudnnAttention(dense=False, plans=PlanCache(strict=True))
        assert disagreement(attend, PAIR_AND_DOCUMENTS, *where) is None
