"""The order of rows: a pure function of (seed, position)."""

from __future__ import annotations

import numpy as np
import pytest

from aifactory_train.data.order import SLOTS, Order, _key, permute
from aifactory_train.errors import DataError


def located(order: Order, start: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return order.locate(np.arange(start, start + n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 64, 65, 1000, 4097])
def test_permute_visits_every_index_exactly_once(n: int) -> None:
    for epoch in range(3):
        key = _key(5, 0, np.full(n, epoch))
        assert sorted(permute(np.arange(n), n, key).tolist()) == list(range(n))


@pytest.mark.parametrize("rows", [1, 2, 37, 1500])
def test_every_epoch_holds_every_row_of_every_source_once(rows: int) -> None:
    order = Order(3, ["a", "b"], [3.0, 1.0], [rows, rows + 5])
    source, epoch, row = located(order, 0, 16 * (rows + 5) + SLOTS)
    for which, n in ((0, rows), (1, rows + 5)):
        for e in range(3):
            seen = row[(source == which) & (epoch == e)]
            assert sorted(seen.tolist()) == list(range(n))


def test_epochs_sources_and_seeds_each_have_another_order() -> None:
    n = 500
    orders = []
    for seed in (0, 1, 2**63 + 11):
        order = Order(seed, ["a"], [1.0], [n])
        orders += [tuple(located(order, e * n, n)[2].tolist()) for e in range(3)]
    pair = Order(0, ["a", "b"], [1.0, 1.0], [n, n])
    source, epoch, row = located(pair, 0, 3 * n + SLOTS)
    orders += [tuple(row[(source == s) & (epoch == 0)].tolist()) for s in (1,)]
    assert len(set(orders)) == len(orders)


def test_neighbouring_positions_do_not_get_neighbouring_rows() -> None:
    row = located(Order(0, ["a"], [1.0], [10_000]), 0, 10_000)[2]
    assert (np.abs(np.diff(row)) < 100).mean() < 0.04  # 0.02 by chance
    assert abs(np.corrcoef(np.arange(10_000), row)[0, 1]) < 0.05


def test_order_depends_on_the_position_alone_not_on_how_it_is_asked() -> None:
    order = Order(9, ["a", "b", "c"], [0.5, 0.3, 0.2], [700, 90, 11])
    together = np.stack(located(order, 0, 3000))
    fresh = Order(9, ["a", "b", "c"], [0.5, 0.3, 0.2], [700, 90, 11])
    shuffled = np.random.default_rng(0).permutation(3000)
    np.testing.assert_array_equal(np.stack(fresh.locate(shuffled)), together[:, shuffled])
    one_by_one = [np.stack(order.locate(np.array([n])))[:, 0] for n in range(0, 3000, 97)]
    np.testing.assert_array_equal(np.stack(one_by_one, axis=1), together[:, ::97])


def test_order_is_the_same_on_every_machine_and_version() -> None:
    # A change of these numbers breaks the resume of every run that is under way.
    order = Order(7, ["a", "b"], [2.0, 1.0], [1000, 300])
    located_rows = order.locate(np.array([0, 1, 2, 1023, 1024, 123_456_789]))
    assert [x.tolist() for x in located_rows] == [
        [0, 1, 0, 1, 0, 0],
        [0, 0, 0, 1, 0, 82344],
        [3, 247, 221, 104, 395, 288],
    ]


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.3], [5.0, 3.0, 1.5, 0.01], [1.0] * 7])
def test_every_window_of_slots_holds_the_weights_to_within_one_slot(weights: list[float]) -> None:
    names = [f"s{i}" for i in range(len(weights))]
    order = Order(1, names, weights, [1000] * len(weights))
    for block in (0, 1, 2**30):
        source = located(order, block * SLOTS, SLOTS)[0]
        shares = np.bincount(source, minlength=len(weights)) / SLOTS
        assert np.abs(shares - np.array(weights) / sum(weights)).max() < 1 / SLOTS


def test_sources_are_spread_over_the_window() -> None:
    source = located(Order(1, ["a", "b"], [1.0, 1.0], [1000, 1000]), 0, SLOTS)[0]
    assert 0.4 < source[: SLOTS // 4].mean() < 0.6


def test_positions_far_away_work() -> None:
    order = Order(1, ["a", "b"], [0.9, 0.1], [12345, 7])
    start = 2**40 + 17
    source, epoch, row = located(order, start, 2 * SLOTS)
    assert set(source.tolist()) == {0, 1}
    assert epoch.min() > 2**20
    assert (row < np.array([12345, 7])[source]).all() and (row >= 0).all()
    np.testing.assert_array_equal(row[5:9], located(order, start + 5, 4)[2])


def test_permute_stays_a_permutation_on_a_huge_range() -> None:
    n = 3 * 2**38 + 1
    index = np.arange(n - 2000, n)
    out = permute(index, n, _key(1, 0, np.zeros(2000, np.int64)))
    assert len(set(out.tolist())) == 2000 and out.min() >= 0 and out.max() < n


def test_a_source_too_light_to_be_read_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="tiny would never be read.*1e-05"):
        Order(1, ["big", "tiny"], [1.0, 1e-5], [10, 10])
