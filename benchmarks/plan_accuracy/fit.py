"""Fits the constants of the time model on published rows, and does so again without each publication.

The fit minimises, over rows, weight * soft_l1(log(predicted / measured) / 0.1), plus a pull of every constant towards
its prior. The prior is what the vendors and kernel benchmarks say, before any row was seen, so a constant on which no
row speaks stays there: without a publication nothing of it is left in the constants that predict its rows.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import least_squares

from aifactory_train.plan.constants import Constants
from benchmarks.plan_accuracy.rows import Row

ERROR_SCALE = 0.1  # log error up to which a row counts by its square, beyond by its size
PRIOR_SIGMA = 0.5  # of a constant, in the units of the vector: about a factor of 1.6
STEP = 1e-3  # of the finite differences, in the units of the vector
EDGE = 1e-4  # shares stay so far from 0 and 1
Predict = Callable[[Row, Constants], float | None]  # tokens per second of one device
Array = np.ndarray


def names_of(constants: Constants) -> list[str]:
    """Dotted name of every number: "nic_frac", "gemm_frac.ampere"."""
    names: list[str] = []
    for f in dataclasses.fields(constants):
        value = getattr(constants, f.name)
        names += [f"{f.name}.{key}" for key in value] if isinstance(value, dict) else [f.name]
    return names


def to_vector(constants: Constants) -> Array:
    """Shares as the logit, all else as the logarithm, so that no value of the vector is out of bounds."""
    flat: list[float] = []
    for name in names_of(constants):
        value = value_of(constants, name)
        share = min(max(value, EDGE), 1 - EDGE)
        flat.append(math.log(share / (1 - share)) if _is_share(name) else math.log(value))
    return np.array(flat)


def from_vector(vector: Array, like: Constants) -> Constants:
    """The inverse; `like` gives the names. A number that equals its own there stays exactly so."""
    values: dict[str, float] = {}
    for name, x, x_like in zip(names_of(like), vector.tolist(), to_vector(like).tolist(), strict=True):
        if x == x_like:
            values[name] = value_of(like, name)
        else:
            values[name] = 1 / (1 + math.exp(-x)) if _is_share(name) else math.exp(x)
    return from_values(values, like)


def from_values(values: dict[str, float], like: Constants) -> Constants:
    """Constants with these values by dotted name, one for each of `like`."""
    nested: dict[str, float | dict[str, float]] = {}
    for name, value in values.items():
        head, _, key = name.partition(".")
        if key:
            nested[head] = {**nested.get(head, {}), key: value}  # type: ignore[dict-item]
        else:
            nested[head] = value
    return dataclasses.replace(like, **nested)  # type: ignore[arg-type]


def value_of(constants: Constants, name: str) -> float:
    head, _, key = name.partition(".")
    return getattr(constants, head)[key] if key else getattr(constants, head)


def _is_share(name: str) -> bool:
    return name.partition(".")[0].endswith("_frac")


def publication(source: str) -> str:
    """What is held out together: a source, and all rounds of MLPerf, in which the same runs come back."""
    return "MLPerf Training" if source.startswith("MLPerf Training") else source


def timed(rows: Sequence[Row]) -> list[Row]:
    """Rows with a measured speed."""
    return [row for row in rows if row.tokens_per_s_per_device is not None]


def weights_of(rows: Sequence[Row]) -> Array:
    """n^-1/2 of the publication's rows: one with 4 times the rows counts twice."""
    count = Counter(publication(row.source) for row in rows)
    return np.array([count[publication(row.source)] ** -0.5 for row in rows])


class Problem:
    """Residuals and their derivatives; derivatives of a dict's entry are taken only on rows that use it."""

    def __init__(self, rows: Sequence[Row], prior: Constants, predict: Predict) -> None:
        self.prior, self.predict = prior, predict
        self.x_prior = to_vector(prior)
        known = [row for row in timed(rows) if predict(row, prior) is not None]
        self.rows = known
        self.log_measured = np.log([row.tokens_per_s_per_device or 1.0 for row in known])
        self.weights = weights_of(known)
        self.used = self._used()
        self.free = [i for i, rows_of_i in enumerate(self.used) if rows_of_i.size]

    def log_predicted(self, x: Array, chosen: Array | None = None) -> Array:
        constants = from_vector(x, self.prior)
        indices = range(len(self.rows)) if chosen is None else chosen
        return np.log([self.predict(self.rows[i], constants) or 1e-9 for i in indices])

    def _used(self) -> list[Array]:
        """For each number of the vector: the rows that it can move."""
        everything = np.arange(len(self.rows))
        base = self.log_predicted(self.x_prior)
        used: list[Array] = []
        for i, name in enumerate(names_of(self.prior)):
            moved = np.zeros(len(self.rows), dtype=bool)
            for shift in (-1.0, 1.0):
                x = self.x_prior.copy()
                x[i] += shift
                moved |= np.abs(self.log_predicted(x) - base) > 1e-12
            used.append(everything[moved] if "." in name or not moved.any() else everything)
        return used

    def whole(self, free: Array) -> Array:
        x = self.x_prior.copy()
        x[self.free] = free
        return x

    def residuals(self, free: Array) -> Array:
        pull = ERROR_SCALE * (free - self.x_prior[self.free]) / PRIOR_SIGMA
        return np.concatenate([self.log_predicted(self.whole(free)) - self.log_measured, pull])

    def jacobian(self, free: Array) -> Array:
        x, n = self.whole(free), len(self.rows)
        base = self.log_predicted(x)
        jacobian = np.zeros((n + len(self.free), len(self.free)))
        for column, i in enumerate(self.free):
            moved = x.copy()
            moved[i] += STEP
            chosen = self.used[i]
            jacobian[chosen, column] = (self.log_predicted(moved, chosen) - base[chosen]) / STEP
            jacobian[n + column, column] = ERROR_SCALE / PRIOR_SIGMA
        return jacobian

    def loss(self, z: Array) -> Array:
        """Value and two derivatives by z: weighted soft_l1 for rows, plain squares for the prior."""
        n = len(self.rows)
        root = np.sqrt(1 + z[:n])
        out = np.stack([z, np.ones_like(z), np.zeros_like(z)])
        out[:, :n] = self.weights * np.stack([2 * (root - 1), 1 / root, -0.5 / root**3])
        return out


def fit(rows: Sequence[Row], prior: Constants, predict: Predict, start: Constants | None = None) -> Constants:
    """The constants that predict `rows` best. `start`: where the search begins; it does not move the optimum."""
    problem = Problem(rows, prior, predict)
    if not problem.free:
        return prior
    begin = (problem.x_prior if start is None else to_vector(start))[problem.free]
    found = least_squares(
        problem.residuals,
        begin,
        problem.jacobian,
        loss=problem.loss,
        f_scale=ERROR_SCALE,
        x_scale=PRIOR_SIGMA,
        ftol=1e-4,
        xtol=1e-4,
        max_nfev=30,
    )
    return from_vector(problem.whole(found.x), prior)


def without(rows: Sequence[Row], held_out: str) -> list[Row]:
    """All rows but those of one publication."""
    return [row for row in rows if publication(row.source) != held_out]


_fold: Callable[[str], tuple[str, Constants]]  # set in the parent before the fork, so that rows are not sent


def _run_fold(name: str) -> tuple[str, Constants]:
    return _fold(name)


def leave_one_out(rows: Sequence[Row], prior: Constants, predict: Predict, start: Constants) -> dict[str, Constants]:
    """Publication -> constants fitted without it, on all cores."""
    global _fold

    def fold(name: str) -> tuple[str, Constants]:
        return name, fit(without(rows, name), prior, predict, start)

    _fold = fold
    count = Counter(publication(row.source) for row in timed(rows))
    names = [name for name, _ in count.most_common()]
    with multiprocessing.get_context("fork").Pool(min(len(names), len(os.sched_getaffinity(0)))) as pool:
        return dict(pool.imap_unordered(_run_fold, names, chunksize=1))
