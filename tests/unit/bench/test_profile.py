"""What a recorded timeline says: union of spans, gaps, waiting calls."""

import pytest

from megatron_medllm.bench.profile import busy_and_gaps, profile_report


def test_overlapping_kernels_count_once_and_gaps_lie_between_what_ended_last_and_what_began_next() -> None:
    kernels = [(10.0, 20.0, "b"), (0.0, 8.0, "a"), (12.0, 15.0, "inside b"), (18.0, 25.0, "c"), (40.0, 41.0, "d")]
    busy, gaps = busy_and_gaps(kernels)
    assert busy == pytest.approx(8 + 15 + 1)
    assert gaps == [(15.0, "c", "d"), (2.0, "a", "b")]


def test_a_kernel_inside_a_longer_one_does_not_end_the_busy_span() -> None:
    busy, gaps = busy_and_gaps([(0.0, 100.0, "long"), (1.0, 2.0, "short"), (101.0, 102.0, "next")])
    assert busy == pytest.approx(101.0)
    assert gaps == [(1.0, "long", "next")]


def test_touching_kernels_leave_no_gap() -> None:
    assert busy_and_gaps([(0.0, 1.0, "a"), (1.0, 2.0, "b")]) == (2.0, [])
    assert busy_and_gaps([]) == (0.0, [])


def test_the_report_names_gaps_and_the_calls_that_waited() -> None:
    profiled = {
        "kinds_s": {"attention": 0.002},
        "top": [{"name": "flash", "calls": 2, "seconds": 0.002}],
        "wall_s": 0.010,
        "busy_s": 0.008,
        "gap_s": 0.002,
        "gaps": [{"seconds": 0.0015, "after": "flash", "before": "nvjet"}],
        "syncs": {"cudaStreamSynchronize": 3},
    }
    lines = profile_report(profiled).splitlines()
    assert "Of 10.0 ms the device was busy for 8.0 and waited for 2.0 (20.0 %)." in lines
    assert "Calls that waited for the device: cudaStreamSynchronize 3." in lines
    assert "| 1.50 | flash | nvjet |" in lines
