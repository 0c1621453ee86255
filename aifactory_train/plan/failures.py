"""Failures of devices, and the interval of checkpoints that they ask for."""

from __future__ import annotations

import math

from aifactory_train.machine.machine import Device

# No site publishes how often its nodes fail. 419 unexpected interruptions in 54 days on 16 384 H100 (The Llama 3 Herd
# of Models, 2024, table 5): 16384 * 54 * 24 / 419 hours of one package between two of them.
PACKAGE_MTBF_H = 50_700.0
# From jobs on 1024 A100 in one cluster, one failure in 7.9 h, to 2.34 failures in 1000 node-days of 8 A100 in another,
# 11 months each (arXiv 2410.21680).
PACKAGE_MTBF_RANGE_H = (8_100.0, 82_100.0)
FAILURES = "a GPU package fails once in 5.8 years, as in the training of Llama 3; elsewhere once in 0.9 to 9.4 years"

# Segments longer than so many mean times between failures hardly ever end.
MAX_SEGMENT_MTBFS = 10.0


def devices_per_package(device: Device) -> int:
    """An MI250 or MI250X is two devices (GCDs) in one package, which fail together."""
    return 2 if device.kind == "rocm" and "MI250" in device.name.upper() else 1


def mtbf_s(n_packages: float, package_mtbf_h: float = PACKAGE_MTBF_H) -> float:
    """Mean time between failures that end a job on so many packages: assumed, see PACKAGE_MTBF_H."""
    return package_mtbf_h * 3600 / n_packages


def best_interval_s(stall_s: float, mtbf_s: float) -> float:
    """Seconds of training between two saves that cost the least (Daly 2006, equation 37).

    Its first term, sqrt(2 * stall * mtbf), is Young's (1974), which is enough where a save is short.
    """
    if stall_s >= 2 * mtbf_s:
        return mtbf_s
    x = math.sqrt(stall_s / (2 * mtbf_s))
    return math.sqrt(2 * stall_s * mtbf_s) * (1 + x / 3 + x * x / 9) - stall_s


def expected_time_s(training_s: float, interval_s: float, stall_s: float, restart_s: float, mtbf_s: float) -> float:
    """Time to do `training_s` of steps with a save after each `interval_s`, under failures at random (Daly 2006, 20).

    Exact for exponential failures: each segment of interval and save is done again until it passes whole, and what
    comes between a failure and the lost work (`restart_s`) can fail too.
    """
    segment = min((interval_s + stall_s) / mtbf_s, MAX_SEGMENT_MTBFS)
    restart = min(restart_s / mtbf_s, MAX_SEGMENT_MTBFS)
    return training_s / interval_s * mtbf_s * math.exp(restart) * math.expm1(segment)
