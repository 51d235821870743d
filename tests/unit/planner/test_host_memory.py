"""Host memory of a save, by hand: 2 bytes of bf16 weights and 12 of fp32 copy and moments for a parameter."""

import pytest

from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import SIZES
from megatron_medllm.planner.host_memory import save_host_bytes, saved_share_bytes
from megatron_medllm.planner.plan import plan
from megatron_medllm.planner.report import plan_report
from megatron_medllm.planner.workload import Workload

PARAMETERS = 7_615_616_512


@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize("distributed", [True, False])
def test_a_background_save_copies_the_ranks_share(dp: int, distributed: bool) -> None:
    layout = LayoutConfig(dp=dp, distributed_optimizer=distributed)
    workload = Workload(shape=SIZES["7b"], layout=layout, global_batch_size=8)
    shares = saved_share_bytes(workload, stage=0)
    assert sum(shares) == 14 * PARAMETERS
    assert max(shares) == save_host_bytes(workload, in_background=True)
    assert max(shares) == pytest.approx(14 * PARAMETERS / dp, rel=0.01)


def test_otherwise_it_copies_one_tensor_at_a_time() -> None:
    workload = Workload(shape=SIZES["7b"], layout=LayoutConfig())
    assert save_host_bytes(workload, in_background=False) == 4 * 152_064 * 3584  # the embedding's fp32 copy


def test_adapters_are_all_that_is_saved_of_a_frozen_base() -> None:
    workload = Workload(shape=SIZES["7b"], layout=LayoutConfig(), mode="lora", lora_rank=16)
    assert save_host_bytes(workload, in_background=True) < 14 * 45_000_000


def test_fp32_weights_have_a_copy_of_their_own_in_a_checkpoint() -> None:
    def bytes_per_parameter(*, distributed: bool) -> float:
        layout = LayoutConfig(distributed_optimizer=distributed)
        found = plan(Workload(shape=SIZES["0.5b"], layout=layout, precision="fp32"))
        assert found.checkpoint.background_host_bytes == pytest.approx(found.checkpoint.total_bytes, rel=0.01)
        return found.checkpoint.total_bytes / 494_032_768

    assert bytes_per_parameter(distributed=True) == pytest.approx(16, rel=0.01)
    assert bytes_per_parameter(distributed=False) == pytest.approx(12, rel=0.01)


def test_the_plan_says_it() -> None:
    report = plan_report(plan(Workload(shape=SIZES["7b"], layout=LayoutConfig(dp=2), global_batch_size=8)))
    assert "Host memory that a save adds: 49.65 GiB a process in the background (async_save), 2.03 GiB" in report


def test_without_gpus_one_full_stream_of_a_small_model_outweighs_its_weights() -> None:
    """0.5B in fp32, LoRA: 2 GB of weights, and 24 layers that keep some 90 KB a token of a stream of 4,096."""
    layout = LayoutConfig(recompute="none")
    found = plan(Workload(shape=SIZES["0.5b"], layout=layout, precision="fp32", mode="lora", objective="rpo"))
    parts = found.cpu_stage.parts
    assert parts["weights"] == pytest.approx(2e9, rel=0.05)
    assert 8e9 < parts["activations"] < 16e9
    assert "of them activations (a stream of micro_batch_size x sequence_length tokens" in plan_report(found)
    thrifty = plan(Workload(shape=SIZES["0.5b"], layout=LayoutConfig(recompute="full"), precision="fp32", mode="lora"))
    assert thrifty.cpu_stage.parts["activations"] < 1e9
