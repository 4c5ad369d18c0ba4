"""Summaries of samples: known answers, and an interval that holds the truth as often as it says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smbench.stats import Summary, geometric_mean, summarize


def test_known_answers() -> None:
    (summary,) = summarize([[float(value) for value in range(1, 12)]])
    assert (summary.n, summary.median, summary.mean) == (11, 6.0, 6.0)
    assert (summary.p10, summary.p90) == (2.0, 10.0)
    assert summary.spread == 8.0 / 6.0
    assert summary.ci_low < 6.0 < summary.ci_high


def test_no_outlier_is_dropped() -> None:
    (summary,) = summarize([[1.0] * 9 + [1001.0]])
    assert (summary.median, summary.mean) == (1.0, 101.0)


def test_a_single_sample_is_its_own_interval() -> None:
    (summary,) = summarize([[3e-6]])
    assert summary == Summary(n=1, median=3e-6, ci_low=3e-6, ci_high=3e-6, mean=3e-6, p10=3e-6, p90=3e-6, p99=3e-6)


def test_equal_samples_have_an_interval_without_width() -> None:
    (summary,) = summarize([[2.0] * 20])
    assert (summary.ci_low, summary.ci_high, summary.spread) == (2.0, 2.0, 0.0)


def test_an_empty_set_has_no_summary() -> None:
    with pytest.raises(ValueError, match="a sample set is empty"):
        summarize([[1.0], []])
    assert summarize([]) == []


def test_sets_of_different_lengths_keep_their_order_and_repeat_to_the_digit() -> None:
    sets = [[1.0, 2.0, 3.0], [5.0], [4.0, 6.0, 5.0], [7.0, 8.0]]
    assert [summary.median for summary in summarize(sets)] == [2.0, 5.0, 5.0, 7.5]
    assert [summary.n for summary in summarize(sets)] == [3, 1, 3, 2]
    assert summarize(sets) == summarize(sets)


@given(st.lists(st.floats(1e-9, 10.0), min_size=1, max_size=12))
@settings(deadline=None, max_examples=40)
def test_the_interval_holds_the_median_and_lies_in_the_samples(samples: list[float]) -> None:
    (summary,) = summarize([samples])
    # no error bar is negative, not by a rounding either
    assert summary.ci_low <= summary.median <= summary.ci_high
    assert min(samples) * (1 - 1e-12) <= summary.ci_low
    assert summary.ci_high <= max(samples) * (1 + 1e-12)


@pytest.mark.parametrize("n", [20, 100])
def test_the_interval_covers_the_true_median_about_as_often_as_it_says(n: int) -> None:
    """Skewed samples, as run times are. 400 runs have a standard error of 1.1 % themselves."""
    draws = np.random.default_rng(0).lognormal(mean=0.0, sigma=0.3, size=(400, n))
    summaries = summarize(draws.tolist())
    covered = sum(summary.ci_low <= 1.0 <= summary.ci_high for summary in summaries) / len(summaries)
    assert 0.92 <= covered <= 0.98


def test_geometric_mean() -> None:
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no ratios"):
        geometric_mean([])


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20))
def test_the_geometric_mean_of_inverses_is_the_inverse(ratios: list[float]) -> None:
    assert math.isclose(geometric_mean([1 / ratio for ratio in ratios]), 1 / geometric_mean(ratios), rel_tol=1e-9)
