"""The committed benches of one machine: what is said of it follows from the samples that lie beside it."""

from __future__ import annotations

import json
import statistics
import tarfile
from pathlib import Path

import pytest
import zstandard

from aifactory_train.bench.learn import learn
from aifactory_train.bench.record import build_metric, read_samples
from aifactory_train.bench.references import lint, load_references
from aifactory_train.bench.store import load_records
from training_runs import aifactory_here

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MACHINE = "epyc-2core"
RESULTS = BENCHMARKS / "results" / MACHINE
NODE = sorted(RESULTS.glob("bench-node-*.tar.zst"))
TRAIN = sorted(RESULTS.glob("bench-train*.tar.zst"))


def unpack(archive: Path, to: Path) -> Path:
    with zstandard.open(archive, "rb") as packed, tarfile.open(fileobj=packed, mode="r|") as tar:
        tar.extractall(to, filter="data")
    return to / archive.name.removesuffix(".tar.zst")


@pytest.mark.parametrize("archive", NODE + TRAIN, ids=lambda archive: archive.name)
def test_medians_intervals_and_worst_ranks_follow_from_the_samples(archive: Path, tmp_path: Path) -> None:
    folder = unpack(archive, tmp_path)
    assert (folder / "report.html").is_file() and (folder / "summary.md").is_file()
    n_intervals = 0
    for record in load_records(folder):
        assert "+dirty" not in record.provenance["git_sha"] and record.fault is None
        if record.samples is None or record.protocol is None:
            continue
        samples = read_samples(folder / "records" / record.samples)
        for metric in record.metrics:
            of_metric, reduction = samples[metric.name], record.protocol.rank_reduction
            assert build_metric(metric.name, metric.better, of_metric, record.hosts, reduction) == metric
            n_intervals += metric.ci95 is not None
    assert n_intervals > 50


def test_the_references_are_what_is_learned_from_the_benches_of_nodes(tmp_path: Path) -> None:
    references = load_references(MACHINE)
    assert references is not None and len(NODE) == 3
    learned = learn([load_records(unpack(archive, tmp_path)) for archive in NODE], "bench learn")
    assert references == learned and not [line for line in lint(references) if line.startswith("fault: ")]
    assert any(reference.kind != "info" for reference in references.references)


def test_the_plan_calibrated_by_them_is_within_a_tenth_of_the_steps_of_training(tmp_path: Path) -> None:
    """Judged by the median of all launches of yardstick.json: each is the median step of one run after its fifth, and
    none is what the plan was calibrated by. On a shared host they differ by up to a fifth among themselves."""
    assert len(TRAIN) == 1
    folders = [unpack(archive, tmp_path) for archive in (NODE[0], *TRAIN)]
    measured = tmp_path / "measured.yaml"
    done = aifactory_here("calibrate", RESULTS / "probed.yaml", *folders, "--out", measured)
    assert done.returncode == 0, done.stderr
    yardstick = json.loads((RESULTS / "yardstick.json").read_text())
    options = [word for change in yardstick["set"] for word in ("--set", change)]
    planned = aifactory_here("plan", yardstick["recipe"], "--machine", measured, "--json", *options)
    assert planned.returncode == 0, planned.stderr
    predicted_s = json.loads(planned.stdout)["plan"]["predicted"]["total_step_time_s"]
    launches_s = yardstick["step_time_s"]
    assert len(launches_s) == 7
    assert abs(predicted_s / statistics.median(launches_s) - 1) < 0.1, f"{predicted_s:.3f} s predicted, {launches_s}"
