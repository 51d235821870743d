"""fp8_frozen_linear in Megatron's column and row splits over two gloo ranks, equal to one rank in value and gradients.

Shards are whole blocks of 128, so that every rank casts what one rank would have cast.
"""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from megatron_medllm.kernels.fp8 import fp8_frozen_linear, quantize_weight
from tests.worlds.head import relative_error

TOKENS, K, N, RANK = 24, 512, 256, 4


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (TOKENS, K), "weight": (N, K), "a": (RANK, K), "b": (N, RANK), "dy": (TOKENS, N)}
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def run_layer(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, dy: Tensor, **split) -> dict[str, Tensor]:
    x, a, b = (t.clone().requires_grad_() for t in (x, a, b))
    y = fp8_frozen_linear(x, quantize_weight(weight), lora_a=a, lora_b=b, lora_scale=0.25, **split)
    y.backward(dy)
    return {"y": y.detach(), "x": x.grad, "a": a.grad, "b": b.grad}


def summed(value: Tensor) -> Tensor:
    """What the caller's mapping does in Megatron: the sum over ranks."""
    total = value.clone()
    dist.all_reduce(total)
    return total


def run_rank(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    t = tensors()
    whole = run_layer(**t)

    def mine(value: Tensor, dim: int) -> Tensor:
        return value.chunk(2, dim)[rank].contiguous()

    split = {"tp_group": dist.group.WORLD}
    column = run_layer(
        t["x"], mine(t["weight"], 0), t["a"], mine(t["b"], 0), mine(t["dy"], 1), parallel="column", **split
    )
    assert relative_error(column["y"], mine(whole["y"], 1)) < 1e-6
    assert relative_error(summed(column["x"]), whole["x"]) < 1e-6
    assert relative_error(column["a"], whole["a"]) < 1e-6  # whole on every rank
    assert relative_error(column["b"], mine(whole["b"], 0)) < 1e-6

    row = run_layer(mine(t["x"], 1), mine(t["weight"], 1), mine(t["a"], 1), t["b"], t["dy"], parallel="row", **split)
    assert relative_error(summed(row["y"]), whole["y"]) < 1e-6
    assert relative_error(row["x"], mine(whole["x"], 1)) < 1e-6
    assert relative_error(row["a"], mine(whole["a"], 1)) < 1e-6
    assert relative_error(row["b"], whole["b"]) < 1e-6  # whole on every rank
    dist.destroy_process_group()


@pytest.mark.timeout(120)
def test_column_and_row_splits_equal_one_rank(tmp_path: Path):
    mp.spawn(run_rank, args=(str(tmp_path / "rendezvous"),), nprocs=2)
