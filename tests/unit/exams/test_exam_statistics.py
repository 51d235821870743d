import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from megatron_medllm.exams.statistics import mcnemar_exact, paired_bootstrap, wilson_interval


def test_mcnemar_literal() -> None:
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(1, 0) == 1.0
    assert mcnemar_exact(6, 0) == 2 / 64
    assert mcnemar_exact(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)


@pytest.mark.parametrize(("lost", "won"), [(3, 9), (40, 25), (7, 7), (0, 12)])
def test_mcnemar_against_statsmodels(lost: int, won: int) -> None:
    expected = mcnemar([[50, lost], [won, 50]], exact=True).pvalue
    assert mcnemar_exact(lost, won) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (7, 20), (868, 1000)])
def test_wilson_against_statsmodels(k: int, n: int) -> None:
    low, high = proportion_confint(k, n, method="wilson")
    interval = wilson_interval(k, n)
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((k / n, low, high), abs=1e-9)


def test_bootstrap_of_equal_answers_is_a_point() -> None:
    interval = paired_bootstrap([1, 0, 1], [1, 0, 1], groups=["x", "y", "z"], resamples=200)
    assert (interval.estimate, interval.low, interval.high) == (0.0, 0.0, 0.0)
    interval = paired_bootstrap([0, 0], [1, 1], groups=["x", "y"], resamples=200)
    assert (interval.estimate, interval.low, interval.high) == (1.0, 1.0, 1.0)


def test_bootstrap_of_two_groups_literal() -> None:
    """One group gains 1, the other 0: a resample's mean is 0, 1/2 or 1 with weights 1/4, 1/2, 1/4."""
    interval = paired_bootstrap([0, 0], [1, 0], groups=["x", "y"], resamples=4000)
    assert (interval.estimate, interval.low, interval.high) == (0.5, 0.0, 1.0)
    narrow = paired_bootstrap([0, 0], [1, 0], groups=["x", "y"], resamples=4000, confidence=0.4)
    assert (narrow.low, narrow.high) == (0.5, 0.5)


def test_bootstrap_against_scipy() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.random(300) < 0.7, rng.random(300) < 0.6
    ours = paired_bootstrap(a, b, groups=[str(i) for i in range(300)], resamples=20_000)
    theirs = stats.bootstrap(
        (b.astype(float) - a.astype(float),), np.mean, n_resamples=20_000, method="percentile", rng=4
    ).confidence_interval
    assert ours.estimate == pytest.approx(b.mean() - a.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.006)


def test_bootstrap_keeps_groups_together() -> None:
    """Ten copies of each question carry no more information than one: grouping says so."""
    rng = np.random.default_rng(0)
    a, b = rng.random(60) < 0.7, rng.random(60) < 0.5
    names = [str(i) for i in range(60)]
    one = paired_bootstrap(a, b, groups=names, resamples=4000)
    ten = paired_bootstrap(np.repeat(a, 10), np.repeat(b, 10), groups=np.repeat(names, 10).tolist(), resamples=4000)
    blind = paired_bootstrap(np.repeat(a, 10), np.repeat(b, 10), groups=[str(i) for i in range(600)], resamples=4000)
    assert (ten.low, ten.high) == pytest.approx((one.low, one.high), abs=0.02)
    assert blind.high - blind.low < 0.5 * (one.high - one.low)


def test_bootstrap_weights_are_points() -> None:
    interval = paired_bootstrap([1, 1], [0, 1], groups=["x", "y"], weights=[3, 1], resamples=100)
    assert interval.estimate == -0.75
    with pytest.raises(ValueError, match="no item has weight"):
        paired_bootstrap([1], [1], groups=["x"], weights=[0])
    with pytest.raises(ValueError, match="same length"):
        paired_bootstrap([1], [1, 0], groups=["x"])
