"""Host arrays on the device: the same values and dtypes, queued or not, and the head's rows counted on the host."""

from typing import Any

import numpy as np
import pytest
import torch

from megatron_medllm.data.microbatch import IGNORED, MicroBatch
from megatron_medllm.kernels.logprob import fused_linear_logprob
from megatron_medllm.losses.cpt import cpt_loss
from megatron_medllm.parallel.context import ContextSplit
from megatron_medllm.parallel.packed import PackedSequences, Segment
from megatron_medllm.parallel.staging import runs_ahead, to_device

CPU = torch.device("cpu")
GENERATOR = np.random.default_rng(0)
ARRAYS = [
    GENERATOR.integers(0, 100, 7),
    GENERATOR.random((3, 2)).astype(np.float32),
    GENERATOR.random(5) > 0.5,
    np.arange(9, dtype=np.int32)[::2],  # not contiguous
    np.empty(0, dtype=np.int64),
    np.empty((0, 2), dtype=np.float32),
    GENERATOR.integers(0, 9, (1, 1)),
]


@pytest.mark.parametrize("ahead", [True, False])
def test_arrays_arrive_as_they_were(ahead: bool):
    moved = to_device(ARRAYS, CPU, ahead=ahead)
    for tensor, array in zip(moved, ARRAYS, strict=True):
        expected = torch.from_numpy(array.copy())
        assert tensor.dtype is expected.dtype and torch.equal(tensor, expected)
    assert to_device([], CPU, ahead=ahead) == []


def test_one_buffer_carries_all_at_aligned_places():
    moved = to_device(ARRAYS, CPU, ahead=True)
    assert len({tensor.untyped_storage().data_ptr() for tensor in moved if tensor.numel()}) == 1
    assert all(tensor.storage_offset() * tensor.itemsize % 16 == 0 for tensor in moved)
    moved[0].zero_()
    assert ARRAYS[0].any()  # the buffer is a copy


def test_auto_queues_where_there_is_a_queue(caplog: pytest.LogCaptureFixture):
    runs_ahead.cache_clear()
    with caplog.at_level("INFO", logger="megatron_medllm.parallel.staging"):
        assert runs_ahead("auto", torch.device("cuda")) and not runs_ahead("auto", CPU) and not runs_ahead("auto", CPU)
        assert runs_ahead("ahead", CPU) and not runs_ahead("blocking", torch.device("cuda"))
    assert caplog.messages[:2] == [
        "copies to the cuda: queued (asked for: auto)",
        "copies to the cpu: blocking (asked for: auto)",
    ]
    assert len(caplog.messages) == 4  # said once each


SEGMENTS = (Segment(0, 5), Segment(5, 8), Segment(8, 11, 5, 8), Segment(11, 16, 5, 8))
LABELS = np.where(np.arange(16) % 3 == 0, IGNORED, np.arange(16) + 1)
STREAM = MicroBatch(np.arange(16) + 2, LABELS, np.arange(16) % 5, SEGMENTS)


@pytest.mark.parametrize("split", [ContextSplit(), ContextSplit(0, 2), ContextSplit(1, 2)])
def test_a_micro_batch_is_the_same_both_ways(split: ContextSplit):
    queued, blocking = (STREAM.model_inputs(CPU, backend="torch", split=split, ahead=ahead) for ahead in (True, False))
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(queued[name], blocking[name])
    assert blocking["packed_seq_params"].counted_rows is None
    counted = queued["packed_seq_params"].counted_rows
    assert torch.equal(counted, (blocking["labels"][0] != IGNORED).nonzero()[:, 0])
    plans: list[list[Any]] = [inputs["packed_seq_params"].varlen_plans(CPU) for inputs in (queued, blocking)]
    assert len(plans[0]) == len(plans[1]) == (1 if split.size == 1 else 2)
    for own, other in zip(*plans, strict=True):
        assert own.cu_seqlens_q.dtype is own.cu_seqlens_kv.dtype is torch.int32
        assert torch.equal(own.cu_seqlens_q, other.cu_seqlens_q)
        assert torch.equal(own.cu_seqlens_kv, other.cu_seqlens_kv)
        assert (own.queries, own.max_q, own.max_kv) == (other.queries, other.max_q, other.max_kv)
        rows = [torch.arange(16)[plan.kv_rows] for plan in (own, other)]
        assert torch.equal(*rows)


def test_transformer_engines_bounds_are_the_same_both_ways():
    documents = (Segment(0, 5), Segment(5, 16))
    for ahead in (True, False):
        packed = PackedSequences.from_segments(documents, torch.zeros(16), backend="te", ahead=ahead)
        assert packed.cu_seqlens_q is not None and packed.cu_seqlens_q.dtype is torch.int32
        assert packed.cu_seqlens_q.tolist() == [0, 5, 16]


def head(target: torch.Tensor, kept: torch.Tensor | None, *, uniform: bool, trained: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(16, 8, generator=generator).requires_grad_()
    weight = torch.randn(20, 8, generator=generator).requires_grad_(trained)
    logprobs, lse = fused_linear_logprob(hidden, weight, target, kept_rows=kept, uniform_grad=-1.0 if uniform else None)
    (-logprobs.sum()).backward()
    return [logprobs, lse, *(t.grad for t in (hidden, weight) if t.grad is not None)]


@pytest.mark.parametrize(("uniform", "trained"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("ignored", [0, 5, 16])
def test_the_head_is_the_same_with_rows_counted_on_the_host(ignored: int, uniform: bool, trained: bool):
    target = torch.arange(16) + 1
    target[torch.randperm(16, generator=torch.Generator().manual_seed(1))[:ignored]] = IGNORED
    kept = torch.from_numpy(np.flatnonzero(target.numpy() != IGNORED))
    pairs = zip(
        head(target, kept, uniform=uniform, trained=trained),
        head(target, None, uniform=uniform, trained=trained),
        strict=True,
    )
    assert all(torch.equal(own, other) for own, other in pairs)


@pytest.mark.parametrize("kept", [[0, 1, 2], [0, 1, 3], [0, 1, 2, 3, 4], [0, 1, 2, 2]])
def test_other_rows_than_those_that_count_are_refused(kept: list[int]):
    target = torch.tensor([1, 2, 3, 4, IGNORED])
    with pytest.raises(ValueError, match="not the rows whose target counts"):
        fused_linear_logprob(torch.randn(5, 8), torch.randn(20, 8), target, kept_rows=torch.tensor(kept))


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_the_loss_is_the_same_by_rows_and_by_mask(z_loss: float):
    mask = torch.arange(50) % 3 != 0
    results = []
    for counted in (mask, mask.nonzero()[:, 0]):
        logprobs, lse = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).requires_grad_().unbind()
        loss = cpt_loss(logprobs, lse, counted, z_loss=z_loss)
        results.append([loss, *torch.autograd.grad(loss, [logprobs, lse], allow_unused=True)])
    assert all(torch.equal(own, other) for own, other in zip(*results, strict=True) if own is not None)
