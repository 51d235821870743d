"""The pipeline simulator against the closed forms of arXiv 2104.04473 (sections 2.2.1 and 2.2.2)."""

import pytest

from megatron_medllm.planner.schedule import Pass, peak_in_flight, simulate, stage_order


@pytest.mark.parametrize(("pp", "m"), [(2, 2), (4, 4), (4, 16), (8, 32)])
def test_1f1b_bubble_is_p_minus_1_over_m(pp: int, m: int) -> None:
    trace = simulate(pp=pp, vpp=1, num_microbatches=m, pass_time_s=lambda f, s, c: 1.0 if f else 2.0)
    assert trace.bubble_fraction == pytest.approx((pp - 1) / m)


@pytest.mark.parametrize(("pp", "vpp", "m"), [(2, 2, 4), (4, 2, 8), (4, 5, 16), (8, 5, 64)])
def test_interleaved_bubble_is_p_minus_1_over_m_v(pp: int, vpp: int, m: int) -> None:
    trace = simulate(pp=pp, vpp=vpp, num_microbatches=m, pass_time_s=lambda f, s, c: (1.0 if f else 2.0) / vpp)
    assert trace.bubble_fraction == pytest.approx((pp - 1) / (m * vpp))


def test_1f1b_stage_keeps_as_many_microbatches_as_stages_follow() -> None:
    peaks = [peak_in_flight(stage_order(stage=s, pp=4, vpp=1, num_microbatches=16)) for s in range(4)]
    assert peaks == [4, 3, 2, 1]


def test_interleaved_first_stage_keeps_the_published_number_of_chunks() -> None:
    # Korthikanti et al. 2022, eq. 7: p v (1 + (p - 1) / (p v)) chunks on the first stage.
    peak = peak_in_flight(stage_order(stage=0, pp=4, vpp=3, num_microbatches=16))
    assert peak == 4 * 3 + 4 - 1


def test_two_stage_order_is_warm_up_then_one_forward_one_backward() -> None:
    order = stage_order(stage=0, pp=2, vpp=1, num_microbatches=3)
    kinds = [("F" if work.forward else "B") + str(work.microbatch) for work in order]
    assert kinds == ["F0", "F1", "B0", "F2", "B1", "B2"]
    assert stage_order(stage=1, pp=2, vpp=1, num_microbatches=1) == [Pass(True, 0, 0), Pass(False, 0, 0)]


def test_a_slow_stage_sets_the_pace() -> None:
    trace = simulate(pp=2, vpp=1, num_microbatches=8, pass_time_s=lambda f, s, c: 2.0 if s else 1.0)
    assert trace.step_time_s == pytest.approx(8 * 4.0 + 2.0)


def test_transfers_lengthen_fill_and_drain() -> None:
    trace = simulate(pp=2, vpp=1, num_microbatches=1, pass_time_s=lambda *_: 1.0, transfer_time_s=0.25)
    assert trace.step_time_s == pytest.approx(4.5)
