"""Statistics of samples, against values worked out by hand and from published tables."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from aifactory_train.bench.metric_names import NAMES
from aifactory_train.bench.statistics import (
    Dip,
    Spike,
    dips,
    median_interval,
    outlier_nodes,
    over_jobs_interval,
    spikes,
    steady_from,
    summarize,
)
from aifactory_train.units import format_quantity


# Ranks as in tables of the sign test, such as Conover, Practical Nonparametric Statistics, table A3.
@pytest.mark.parametrize(
    ("n", "low", "high"),
    [(6, 1, 6), (8, 1, 8), (9, 2, 8), (10, 2, 9), (12, 3, 10), (20, 6, 15), (50, 18, 33), (100, 40, 61)],
)
def test_the_interval_of_the_median_has_the_ranks_of_the_tables(n: int, low: int, high: int) -> None:
    shuffled = random.Random(n).sample([float(i) for i in range(1, n + 1)], n)
    assert median_interval(shuffled) == (low, high)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_too_few_samples_have_no_interval(n: int) -> None:
    assert median_interval([1.0] * n) is None


def test_less_confidence_needs_fewer_samples() -> None:
    # P(median outside of the extremes of 5) = 2 / 32 = 0.0625; of 2, one half.
    assert median_interval([3.0, 1.0, 2.0, 5.0, 4.0], confidence=0.9) == (1.0, 5.0)
    assert median_interval([1.0, 2.0], confidence=0.5) == (1.0, 2.0)


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    draw = random.Random(1)
    held = 0
    for _ in range(400):
        interval = median_interval([draw.expovariate(1.0) for _ in range(20)])
        assert interval is not None
        held += interval[0] <= math.log(2) <= interval[1]
    assert held >= 0.93 * 400  # exact coverage for n = 20 is 0.959


def test_a_summary_of_eleven_samples() -> None:
    summary = summarize([float(i) for i in (10, 0, 9, 1, 8, 2, 7, 3, 6, 4, 5)])
    assert (summary.median, summary.min, summary.max, summary.n) == (5.0, 0.0, 10.0, 11)
    assert summary.ci95 == (1.0, 9.0)  # ranks 2 and 10
    assert (summary.p5, summary.p95, summary.p99) == pytest.approx((0.5, 9.5, 9.9))
    assert summary.cv == pytest.approx(math.sqrt(11) / 5)


def test_a_single_sample_has_neither_interval_nor_spread() -> None:
    summary = summarize([2.0])
    assert (summary.median, summary.p99, summary.n) == (2.0, 2.0, 1)
    assert summary.ci95 is None and summary.cv is None
    assert summarize([-1.0, 1.0]).cv is None


def test_no_samples_and_broken_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        summarize([])
    with pytest.raises(ValueError, match="sample 1 of 3 is nan"):
        summarize([1.0, math.nan, 2.0])
    with pytest.raises(ValueError, match="sample 2 of 3 is inf"):
        summarize([1.0, 2.0, math.inf])


def test_the_interval_over_jobs_is_wider_than_that_of_their_pooled_steps() -> None:
    draw = random.Random(2)
    jobs = [[level + draw.gauss(0, 0.1) for _ in range(50)] for level in (10, 11, 12, 13, 14)]
    over_jobs = over_jobs_interval([statistics.median(job) for job in jobs])
    pooled = median_interval([step for job in jobs for step in job])
    assert over_jobs is not None and pooled is not None
    assert over_jobs[1] - over_jobs[0] > 2 * (pooled[1] - pooled[0])
    assert over_jobs[0] < 12 < over_jobs[1]


def test_the_interval_over_equal_jobs_is_a_point_and_two_jobs_have_none() -> None:
    assert over_jobs_interval([3.0, 3.0, 3.0]) == (3.0, 3.0)
    assert over_jobs_interval([1.0, 2.0]) is None


def test_steady_is_where_two_windows_agree() -> None:
    warm = [5.0] * 10 + [2.0] * 10
    assert steady_from(warm) is None
    assert steady_from(warm + [1.0] * 20) == 20
    assert steady_from(warm + [1.0] * 10 + [1.0099] * 10) == 20
    assert steady_from(warm + [1.0] * 10 + [1.0102] * 10) is None
    assert steady_from([1.0] * 19) is None
    assert steady_from([1.0, 1.0, 9.0, 1.0, 1.0, 1.0], window=3) == 0


def test_more_samples_do_not_change_where_it_was_steady() -> None:
    draw = random.Random(4)
    samples = [1 + 2.0 ** (-i / 5) + draw.gauss(0, 0.005) for i in range(100)]
    answers = {steady_from(samples[:n]) for n in range(100)} - {None}
    assert len(answers) == 1


def test_a_spike_of_most_ranks_is_of_the_system_and_of_few_a_straggler() -> None:
    by_rank = {rank: [1.0] * 9 for rank in range(4)}
    for rank in (0, 1, 3):
        by_rank[rank][2] = 1.6
    by_rank[2][5] = by_rank[3][5] = 2.0
    by_rank[1][7] = 1.5
    assert spikes(by_rank) == [Spike(2, "system", (0, 1, 3)), Spike(5, "straggler", (2, 3))]


def test_a_rank_that_is_always_slow_has_no_spikes() -> None:
    assert spikes({0: [1.0] * 5, 1: [4.0] * 5}) == []


def test_a_node_is_an_outlier_by_share_and_by_spread() -> None:
    # Median 100, MAD 1: 94 is 6 % below, z = 0.6745 * 6 / 1 = 4.05; 96 is within 5 %.
    rates = {"a": 100.0, "b": 101.0, "c": 99.0, "d": 101.0, "e": 99.0, "f": 100.5, "g": 101.5, "h": 96.0, "i": 94.0}
    found = outlier_nodes(rates, "higher")
    assert list(found) == ["i"]
    assert found["i"] == "94 is 6.0 % worse than the median of 9 nodes, 100 (MAD z 4.0)"
    assert outlier_nodes({host: -rate for host, rate in rates.items()}, "lower").keys() == {"i"}
    assert outlier_nodes(rates, "lower") == {}


def test_a_wide_spread_hides_no_verdict_behind_a_share() -> None:
    # Median 100, MAD 8: 80 is 20 % below, but z is only 1.7.
    assert outlier_nodes({"a": 92.0, "b": 108.0, "c": 100.0, "d": 80.0, "e": 107.0}, "higher") == {}


def test_one_slow_node_among_equal_ones_is_found() -> None:
    assert list(outlier_nodes({"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.2}, "lower")) == ["d"]
    assert outlier_nodes({"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.04}, "lower") == {}


def test_two_or_three_nodes_are_held_against_the_best_and_it_is_said() -> None:
    found = outlier_nodes({"a": 100.0, "b": 79.0}, "higher")
    assert found == {"b": "79 is 21.0 % worse than the best of 2 nodes, 100 (too few nodes for their spread)"}
    assert outlier_nodes({"a": 100.0, "b": 81.0, "c": 90.0}, "higher") == {}
    assert list(outlier_nodes({"a": 1.0, "b": 1.3, "c": 1.1}, "lower")) == ["b"]
    assert outlier_nodes({"a": 1.0}, "lower") == {}


def test_a_dip_is_named_with_the_size_that_was_better() -> None:
    points = [(1024, 10.0), (2048, 20.0), (8192, 30.0), (4096, 18.0), (16384, 29.0)]
    assert dips(points) == [Dip(4096, 18.0, 2048, 20.0)]
    assert dips([(1, 1.0), (2, 2.0), (4, 2.0)]) == dips([]) == []


def test_names_of_metrics_end_in_their_unit() -> None:
    suffixes = {
        "s": ("_seconds",),
        "B/s": ("_bytes_per_second",),
        "FLOP/s": ("_flops_per_second", "_flops_per_second_per_gpu"),
        "tokens/s": ("_tokens_per_second", "_tokens_per_second_per_gpu"),
        "1": ("_ratio", "_active"),
        "B": ("_bytes",),
        "J": ("_joules_total",),
        "J/token": ("_joules",),
        "degC": ("_celsius",),
        "W": ("_watts",),
        "Hz": ("_hertz",),
    }
    assert [name for name, known in NAMES.items() if not name.endswith(suffixes[known.unit])] == []


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0123, "s", "12.3 ms"),
        (1.2e11, "B/s", "120 GB/s"),
        (9.89e14, "FLOP/s", "989 TFLOP/s"),
        (1046.2, "tokens/s", "1.05 k tokens/s"),
        (0.413, "1", "41.3 %"),
        (3 * 1024.0, "B", "3.00 KiB"),
        (560.0, "W", "560 W"),
        (7200.0, "J", "2 Wh"),
        (0.0214, "J/token", "0.0214 J/token"),
        (None, "s", "unknown"),
    ],
)
def test_a_quantity_is_printed_in_the_unit_that_people_read(value: float | None, unit: str, text: str) -> None:
    assert format_quantity(value, unit) == text
