"""fused_linear_logprob over gloo: the vocabulary split over 1, 2 and 4 ranks, against float64 on the whole.

One launch of four processes holds every case; groups of 1 and 2 ranks live inside it.
"""

from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from megatron_medllm.kernels.logprob import fused_linear_logprob
from tests.worlds.head import HeadCase, make_case, relative_error

WORLD = 4
# name -> shard borders of a vocabulary of 208 rows, 203 of them real
SHARDS = {
    1: {"whole": (0, 208)},
    2: {"even": (0, 104, 208), "ragged": (0, 37, 208)},
    4: {"even": (0, 52, 104, 156, 208), "ragged": (0, 1, 100, 103, 208), "last is padding": (0, 70, 140, 203, 208)},
}


class GatherSequence(torch.autograd.Function):
    """What Megatron's gather_from_sequence_parallel_region does: all-gather, backward reduce-scatter."""

    @staticmethod
    def forward(ctx, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, local.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None


def border_targets(case: HeadCase, borders: tuple[int, ...]) -> None:
    """Put the first and last word of every shard among the targets."""
    edges = [word for start, end in pairwise(borders) for word in (start, end - 1) if word < case.valid]
    rows = torch.arange(3, len(case.target))
    rows = rows[case.target[rows] != -100][: len(edges)]
    case.target[rows] = torch.tensor(edges[: len(rows)])


def check_case(
    case: HeadCase, borders: tuple[int, ...], group: dist.ProcessGroup, *, mode: str, with_lse: bool
) -> None:
    rank = dist.get_rank(group)
    start, end = borders[rank], borders[rank + 1]
    exact = case.hidden.dtype == torch.float32
    upstream = case.upstream.abs() if mode == "uniform" else case.upstream
    case = HeadCase(**{**case.__dict__, "upstream": upstream})
    expected, expected_lse, expected_dx, expected_dw = case.expect(with_lse=with_lse)
    tp_size = dist.get_world_size(group)
    local = case.hidden.chunk(tp_size)[rank].clone().requires_grad_()
    weight = case.weight[start:end].clone().requires_grad_(mode != "frozen")
    logprobs, lse = fused_linear_logprob(
        GatherSequence.apply(local, group),
        weight,
        case.target,
        tp_group=group,
        vocab_start=start,
        valid_vocab=case.valid,
        chunk_tokens=16,
        uniform_grad=2 * upstream if mode == "uniform" else None,
    )
    outputs, upstreams = [logprobs], [upstream]
    if with_lse:
        outputs, upstreams = [logprobs, lse], [upstream, case.upstream_lse]
    torch.autograd.backward(outputs, upstreams)  # as Megatron's pipeline schedules do
    assert (logprobs - expected).abs().max() < 1e-5
    assert (lse - expected_lse).abs().max() < 1e-5
    assert relative_error(local.grad, expected_dx.chunk(tp_size)[rank]) < (1e-6 if exact else 8e-3)
    if mode != "frozen":
        assert relative_error(weight.grad, expected_dw[start:end]) < (1e-6 if exact else 8e-3)
    copies = [torch.empty_like(logprobs) for _ in range(tp_size)]
    dist.all_gather(copies, logprobs.detach(), group=group)
    assert all(torch.equal(copy, copies[0]) for copy in copies)


def run_rank(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    groups = {}
    for size in SHARDS:
        for first in range(0, WORLD, size):
            members = list(range(first, first + size))
            group = dist.new_group(members)
            if rank in members:
                groups[size] = group
    for size, layouts in SHARDS.items():
        for name, borders in layouts.items():
            for mode in ("general", "frozen", "uniform"):
                for settings in (
                    {},
                    {"ignored": "all"},
                    {"dtype": torch.bfloat16, "hidden": 64},
                ):
                    case = make_case(tokens=40, **settings)
                    if "ignored" not in settings:
                        border_targets(case, borders)
                    with_lse = mode == "general" and "dtype" not in settings
                    try:
                        check_case(case, borders, groups[size], mode=mode, with_lse=with_lse)
                    except AssertionError as error:
                        raise AssertionError(f"tp {size}, {name}, {mode}, {settings}") from error
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.timeout(300)
def test_every_split_of_the_vocabulary(tmp_path: Path):
    mp.spawn(run_rank, args=(str(tmp_path / "rendezvous"),), nprocs=WORLD)
