"""Memory by part, against numbers worked out by hand and the published parameter counts."""

import pytest

from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import SIZES
from megatron_medllm.errors import UserError
from megatron_medllm.planner.memory import in_flight_layers, optimizer_bytes, stage_memory, weight_bytes
from megatron_medllm.planner.optimizer_state import buffer_layout
from megatron_medllm.planner.parameters import (
    PlannedWeight,
    chunk_layers,
    chunk_weights,
    matmul_parameters,
    stored_bytes,
    total_parameters,
)
from megatron_medllm.planner.workload import Workload


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("0.5b", 494_032_768),
        ("7b", 7_615_616_512),
        ("72b", 72_706_203_648),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-1.7b", 1_720_574_976),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-14b", 14_768_307_200),
        ("qwen3-32b", 32_762_123_264),
    ],
)
def test_total_parameters_are_the_published_models(size: str, parameters: int) -> None:
    assert total_parameters(SIZES[size]) == parameters


def test_72b_matmul_parameters_are_71_46_billion() -> None:
    assert matmul_parameters(SIZES["72b"]) == pytest.approx(71.46e9, rel=1e-3)


@pytest.mark.parametrize(("size", "parameters"), [("7b", 7_615_616_512), ("qwen3-8b", 8_190_735_360)])
def test_one_rank_holds_every_parameter_once(size: str, parameters: int) -> None:
    weights = chunk_weights(Workload(shape=SIZES[size], layout=LayoutConfig()), stage=0, chunk=0)
    assert sum(w.numel for w in weights) == parameters


def test_uneven_and_interleaved_stages() -> None:
    uneven = LayoutConfig(pp=4, first_stage_layers=6, last_stage_layers=6)
    assert chunk_layers(uneven, 28) == [[6], [8], [8], [6]]
    assert chunk_layers(LayoutConfig(pp=2, vpp=7), 28) == [[2] * 7, [2] * 7]


def test_buffers_pad_parameters_and_buckets() -> None:
    weights = [PlannedWeight("a", 10, 1), PlannedWeight("b", 70, 1), PlannedWeight("c", 3, 1)]
    layout = buffer_layout(weights, dp_size=2, distributed_optimizer=True, bucket_size=None)
    assert layout.parameters == ((0, 3), (64, 134), (192, 202))
    assert layout.buckets == ((0, 256),)
    assert [layout.owned_numel(dp_rank=r, dp_size=2) for r in (0, 1)] == [3 + 64, 6 + 10]
    plain = buffer_layout(weights, dp_size=2, distributed_optimizer=False, bucket_size=None)
    assert plain.numel == 83


def test_buckets_close_when_full_and_shared_embeddings_stand_alone() -> None:
    weights = [
        PlannedWeight("embedding", 100, 1, shared_embedding=True),
        PlannedWeight("x", 128, 1),
        PlannedWeight("y", 128, 1),
    ]
    layout = buffer_layout(weights, dp_size=2, distributed_optimizer=True, bucket_size=128)
    assert layout.buckets == ((0, 128), (128, 256), (256, 384))


def test_full_training_costs_18_bytes_per_parameter_on_one_gpu() -> None:
    workload = Workload(shape=SIZES["0.5b"], layout=LayoutConfig(distributed_optimizer=False), global_batch_size=1)
    parts = {**weight_bytes(workload, stage=0), **optimizer_bytes(workload, stage=0, dp_rank=0)}
    assert sum(parts.values()) == 18 * 494_032_768


def test_the_distributed_optimizer_shards_twelve_of_them() -> None:
    layout = LayoutConfig(dp=8)
    workload = Workload(shape=SIZES["7b"], layout=layout, global_batch_size=8)
    owned = [optimizer_bytes(workload, stage=0, dp_rank=r)["optimizer moments"] for r in range(8)]
    assert sum(owned) == 8 * 7_615_616_512


def test_quantised_bases() -> None:
    weight = PlannedWeight("w", 256, 256, quantisable=True)
    fp8 = Workload(shape=SIZES["7b"], layout=LayoutConfig(), mode="fp8-lora", global_batch_size=1)
    nf4 = Workload(shape=SIZES["7b"], layout=LayoutConfig(), mode="qlora", global_batch_size=1)
    assert stored_bytes(weight, fp8) == 65536 + 4 * 4
    assert stored_bytes(weight, nf4) == 32768 + 4 * 1024


def test_72b_fp8_ffn_is_padded_for_tensor_parallelism() -> None:
    workload = Workload(shape=SIZES["72b"], layout=LayoutConfig(tp=8), mode="fp8-lora", global_batch_size=1)
    assert workload.ffn_hidden_size == 29696


def test_in_flight_layers_follow_the_schedule() -> None:
    workload = Workload(shape=SIZES["7b"], layout=LayoutConfig(pp=4), global_batch_size=16)
    assert [in_flight_layers(workload, stage=s) for s in range(4)] == [28, 21, 14, 7]


def test_recompute_and_sequence_parallelism_shrink_activations() -> None:
    def activations(**layout: object) -> int:
        workload = Workload(shape=SIZES["7b"], layout=LayoutConfig(**layout), global_batch_size=1)
        return stage_memory(workload, stage=0).parts["activations"]

    assert activations(recompute="full") < 0.15 * activations()
    assert activations(tp=4, sp=True) < 0.3 * activations()
    assert activations(tp=4) > activations(tp=4, sp=True)


def test_batches_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="global_batch_size 3 is not a multiple"):
        Workload(shape=SIZES["7b"], layout=LayoutConfig(dp=2), global_batch_size=3)
    with pytest.raises(UserError, match="interleaved"):
        Workload(shape=SIZES["7b"], layout=LayoutConfig(pp=2, vpp=2), global_batch_size=3)
