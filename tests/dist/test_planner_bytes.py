"""The planner's bytes of weights, gradients and optimizer state are exactly what every rank of a real model holds."""

import json
from typing import Any

import pytest

from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import ModelShape
from megatron_medllm.planner.memory import optimizer_bytes, weight_bytes
from megatron_medllm.planner.workload import Workload
from tests.worlds.ranks import run_ranks
from tests.worlds.shapes import ODD_SHAPE

# Odd widths, so that the buffers' padding shows.
CASES: list[dict[str, Any]] = [
    {"layout": {"tp": 2, "pp": 2}, "shape": ODD_SHAPE, "dtype": "bfloat16", "lora_rank": 0},
    {
        "layout": {"pp": 2, "vpp": 2, "dp": 2},
        "shape": ODD_SHAPE | {"tie_embeddings": True},
        "dtype": "float32",
        "lora_rank": 0,
    },
    {"layout": {"tp": 2, "dp": 2, "sp": True}, "shape": ODD_SHAPE, "dtype": "bfloat16", "lora_rank": 3},
    {
        "layout": {"pp": 2, "dp": 2, "distributed_optimizer": False},
        "shape": ODD_SHAPE,
        "dtype": "bfloat16",
        "lora_rank": 0,
    },
]


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, int]]]:
    """What each of four ranks holds in each case: `[rank][case]`."""
    directory = tmp_path_factory.mktemp("planner")
    cases = directory / "cases.json"
    cases.write_text(json.dumps(CASES))
    (directory / "out").mkdir()
    run_ranks(4, "tests.dist.planner_ranks", str(cases), str(directory / "out"), timeout_s=400, runtimes=len(CASES))
    return [json.loads((directory / "out" / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize(
    "index", range(len(CASES)), ids=["tp2-pp2", "pp2-vpp2-dp2-tied-fp32", "tp2-sp-dp2-lora", "pp2-dp2-replicated"]
)
def test_bytes_are_exact_on_every_rank(held: list[list[dict[str, int]]], index: int) -> None:
    case = CASES[index]
    workload = Workload(
        shape=ModelShape(**case["shape"]),
        layout=LayoutConfig(**case["layout"]),
        mode="lora" if case["lora_rank"] else "full",
        precision="bf16" if case["dtype"] == "bfloat16" else "fp32",
        lora_rank=case["lora_rank"] or 1,
        overlap_grad_reduce=False,  # as on a CPU
    )
    for rank in range(4):
        found = held[rank][index]
        place = {"stage": found.pop("stage"), "dp_rank": found.pop("dp_rank")}
        assert found.pop("rank") == rank
        planned = optimizer_bytes(workload, **place)
        planned["weights"] = sum(weight_bytes(workload, stage=place["stage"]).values())
        assert planned == found, f"rank {rank}"
