"""Whole plans: the paper's hardware, what does not fit, the search, failures, hardware files."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import SIZES
from megatron_medllm.errors import UserError
from megatron_medllm.planner import (
    Plan,
    Workload,
    known_hardware,
    load_hardware,
    plan,
    plan_report,
    plan_values,
    search,
)
from megatron_medllm.planner.flops import model_flops_per_token
from megatron_medllm.planner.plan import require_fit
from megatron_medllm.planner.reliability import daly_interval, expected_efficiency, young_interval
from megatron_medllm.planner.report import scale_report
from megatron_medllm.planner.scale import doublings, scaling_curve
from megatron_medllm.planner.step_time import adapter_bytes_per_token, tensor_parallel_time
from megatron_medllm.planner.workload import Mode

GIB = 2**30


def qlora(gpus: int, **changes: object) -> Workload:
    settings = {
        "shape": SIZES["72b"],
        "layout": LayoutConfig(gpus_per_node=gpus, tp=gpus, sp=True, recompute="full"),
        "mode": "qlora",
        "sequence_length": 4096,
        "global_batch_size": 16,
    }
    return Workload(**{**settings, **changes})  # type: ignore[arg-type]


def test_the_papers_72b_qlora_fits_four_a100_80g() -> None:
    found = plan(qlora(4), "a100-80g")
    assert found.fits
    # 70.2 billion quantised weights at 0.5625 bytes over 4 GPUs, and 2.5 billion of embedding and head in bf16.
    assert found.peak_stage.parts["weights"] / GIB == pytest.approx((70.21e9 * 0.5625 + 2.49e9 * 2) / 4 / GIB, rel=0.01)


def test_the_papers_rpo_fits_two_a100_80g() -> None:
    assert plan(qlora(2, objective="rpo"), "a100-80g").fits


def test_72b_full_training_does_not_fit_eight_h100_and_says_what_is_large() -> None:
    layout = LayoutConfig(gpus_per_node=8, tp=8, sp=True, recompute="full")
    found = plan(Workload(shape=SIZES["72b"], layout=layout, global_batch_size=8))
    assert not found.fits
    with pytest.raises(UserError, match=r"needs 1\d\d\.\d GiB per GPU, h100-sxm has 79.7; the largest part is"):
        require_fit(found)
    assert "DOES NOT FIT" in plan_report(found)


def test_search_ranks_layouts_that_fit_and_names_the_closest_when_none_does() -> None:
    workload = Workload(shape=SIZES["7b"], layout=LayoutConfig(gpus_per_node=8), sequence_length=4096)
    found = search(workload, limit=5)
    rates = [p.tokens_per_s_per_gpu for p in found]
    assert len(found) == 5 and rates == sorted(rates, reverse=True) and all(p.fits for p in found)
    tiny_world = Workload(shape=SIZES["72b"], layout=LayoutConfig(gpus_per_node=2, tp=2), global_batch_size=2)
    with pytest.raises(UserError, match="no layout of 2 x h100-sxm fits; closest: tp2"):
        search(tiny_world)


def test_values_are_json_and_parts_sum_up() -> None:
    found = plan(qlora(4, token_budget=10**9), "a100-80g")
    values = json.loads(json.dumps(plan_values(found)))
    assert sum(values["step_parts_s"].values()) == pytest.approx(values["step_time_s"])
    assert values["training_time_s"] == pytest.approx(found.total_steps * found.step.total_s)
    assert found.total_steps == math.ceil(10**9 / (16 * 4096))


def test_flops_by_both_conventions() -> None:
    workload = Workload(shape=SIZES["7b"], layout=LayoutConfig(), sequence_length=4096)
    matmul = 6 * 7_070_285_824
    attention = 12 * 28 * 3584 * 4096
    assert model_flops_per_token(workload, causal=False) == matmul + attention
    assert model_flops_per_token(workload, causal=True) == matmul + attention / 2


def test_fp8_needs_fp8_units() -> None:
    workload = Workload(shape=SIZES["7b"], layout=LayoutConfig(), precision="fp8")
    with pytest.raises(UserError, match="a100-80g has no FP8 units"):
        plan(workload, "a100-80g")


def test_young_daly() -> None:
    assert young_interval(save_time_s=60, mtbf_s=86400) == pytest.approx(math.sqrt(2 * 60 * 86400))
    # Daly 2006, eq. 37, worked by hand for C = 60 s, M = 24 h.
    ratio = 60 / (2 * 86400)
    by_hand = 3219.94 * (1 + math.sqrt(ratio) / 3 + ratio / 9) - 60
    assert daly_interval(save_time_s=60, mtbf_s=86400) == pytest.approx(by_hand, abs=0.01)


def test_dalys_interval_is_where_the_expected_efficiency_peaks() -> None:
    def efficiency(interval: float) -> float:
        return expected_efficiency(interval_s=interval, save_time_s=120, restart_time_s=300, mtbf_s=4 * 3600)

    best = daly_interval(save_time_s=120, mtbf_s=4 * 3600)
    assert efficiency(best) > efficiency(0.8 * best)
    assert efficiency(best) > efficiency(1.2 * best)


def test_the_scaling_curve_loses_to_failures_what_it_gains_in_gpus() -> None:
    layout = LayoutConfig(nodes=8, gpus_per_node=8, tp=8, pp=4, vpp=4, sp=True)
    workload = Workload(
        shape=SIZES["72b"], layout=layout, precision="fp8", backend="te", sequence_length=8192, global_batch_size=2048
    )
    assert doublings(workload, largest=16384) == [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
    assert doublings(workload, largest=200) == [64, 128]
    with pytest.raises(UserError, match="the recipe has 64 already"):
        doublings(workload, largest=63)
    curve = scaling_curve(workload, "h100-sxm", gpus=[64, 1024, 16384])
    assert len(scale_report(curve).splitlines()) == 4 and "  16,384 " in scale_report(curve)
    assert [point.gpus for point in curve] == [64, 1024, 16384]
    assert curve[0].tokens_per_s_per_gpu > curve[1].tokens_per_s_per_gpu > curve[2].tokens_per_s_per_gpu
    assert curve[0].failure_efficiency > curve[2].failure_efficiency > 0.5
    assert curve[2].tokens_per_s > curve[1].tokens_per_s > curve[0].tokens_per_s


def test_hardware_files_load_and_broken_ones_name_the_field(tmp_path: Path) -> None:
    assert {"a100-80g", "h100-sxm", "h200"} <= set(known_hardware())
    good = {**vars(load_hardware("h200")), "name": "ours"}
    path = tmp_path / "ours.json"
    path.write_text(json.dumps(good))
    assert load_hardware(str(path)).name == "ours"
    for problem, values in (
        ("missing field 'memory_bytes'", {k: v for k, v in good.items() if k != "memory_bytes"}),
        ("unknown field 'colour'", {**good, "colour": "green"}),
        ("gpus_per_node must be a number", {**good, "gpus_per_node": "eight"}),
    ):
        path.write_text(json.dumps(values))
        with pytest.raises(UserError, match=problem):
            load_hardware(str(path))
    with pytest.raises(UserError, match="unknown hardware 'h9000'; known: a100-80g"):
        load_hardware("h9000")


def test_block_scaled_fp8_saves_memory_and_time() -> None:
    def lora(mode: Mode) -> Plan:
        layout = LayoutConfig(gpus_per_node=1, recompute="full")
        return plan(Workload(shape=SIZES["72b"], layout=layout, mode=mode, global_batch_size=1), "h200")

    fp8, bf16 = lora("fp8-lora"), lora("lora")
    assert fp8.fits and not bf16.fits  # 72B on one H200
    assert fp8.tokens_per_s_per_gpu > bf16.tokens_per_s_per_gpu  # measured: 19,167 and 15,535 at 7B


def test_low_rank_products_cost_what_they_read_and_write() -> None:
    """7B: k is 3 x 3,584 + 18,944 and n 4,608 + 3,584 + 37,888 + 3,584 over the four linears, in bf16."""
    whole = Workload(shape=SIZES["7b"], layout=LayoutConfig(), mode="lora")
    k, n = 29_696, 49_664
    assert adapter_bytes_per_token(whole) == (2 * (k + 2 * n), 2 * (2 * n + 3 * k))
    assert adapter_bytes_per_token(dataclasses.replace(whole, lora_targets=("linear_proj",))) == (21_504, 35_840)
    assert adapter_bytes_per_token(dataclasses.replace(whole, mode="full")) == (0, 0)


def test_every_adapter_adds_a_collective_that_nothing_hides() -> None:
    hardware = load_hardware("h100-sxm")
    layout = LayoutConfig(gpus_per_node=2, tp=2, sp=True)
    lora = Workload(shape=SIZES["7b"], layout=layout, mode="lora")
    narrow = 16 * 4096 * 2 / 2 / (450e9 * 0.8) + 20e-6
    full = dataclasses.replace(lora, mode="full")
    added = tensor_parallel_time(lora, hardware) - tensor_parallel_time(full, hardware)
    assert added == pytest.approx(4 * narrow)
