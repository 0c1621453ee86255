"""The statistics, the protocol and the turns of benchmarks/peers."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

import compare
from aifactory_train.bench.paired import order_of_turns, ratio_of_medians

PEERS = Path(__file__).resolve().parents[2] / "benchmarks" / "peers"


def test_turns_go_forwards_and_backwards() -> None:
    assert order_of_turns(2, 4) == [0, 1, 1, 0, 0, 1, 1, 0]
    assert order_of_turns(3, 2) == [0, 1, 2, 2, 1, 0]


def test_without_noise_the_interval_is_the_ratio() -> None:
    assert ratio_of_medians([[150.0] * 3] * 5, [[100.0] * 3] * 5) == (1.5, 1.5, 1.5)


def test_one_slow_step_does_not_move_the_ratio() -> None:
    ours = [[150.0, 150.0, 1.0]] + [[150.0] * 3] * 5
    assert ratio_of_medians(ours, [[100.0] * 3] * 6) == (1.5, 1.5, 1.5)


def test_a_drift_that_both_sides_share_stays_out_of_the_interval() -> None:
    machine = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    ours, theirs = [[150 * m] * 3 for m in machine], [[100 * m] * 3 for m in machine]
    _, low, high = ratio_of_medians(ours, theirs)
    assert low == pytest.approx(1.5) and high == pytest.approx(1.5)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    draw = random.Random(3)
    held = 0
    for trial in range(20):
        ours = [[draw.gauss(130, 6) for _ in range(2)] for _ in range(8)]
        theirs = [[draw.gauss(100, 6) for _ in range(2)] for _ in range(8)]
        ratio, low, high = ratio_of_medians(ours, theirs, seed=trial)
        assert low <= ratio <= high and low < high
        held += low <= 1.3 <= high
    assert held >= 15


def test_too_few_or_unpaired_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="4 blocks of ours and 4 of theirs"):
        ratio_of_medians([[1.0]] * 4, [[1.0]] * 4)
    with pytest.raises(ValueError, match="6 blocks of ours and 5 of theirs"):
        ratio_of_medians([[1.0]] * 6, [[1.0]] * 5)


SIDE = """
import sys, time
from worker import parse_arguments, serve
def step():
    print("a library talks")
    time.sleep(0.01)
serve(step, 100, parse_arguments(None))
"""


def answers(stdin: str, *flags: str) -> list[dict]:
    done = subprocess.run(
        [sys.executable, "-c", SIDE, *flags], input=stdin, capture_output=True, text=True, cwd=PEERS, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_side_answers_each_block_and_ends_with_its_input() -> None:
    first, second = answers("run 2\nrun 3\n", "--serve")
    assert (len(first["step_s"]), len(second["step_s"])) == (2, 3)
    assert second["tokens_per_step"] == 100 and 100 < second["tokens_per_s"] < 100 / 0.01


def test_a_side_alone_prints_one_line_without_its_warm_up() -> None:
    (row,) = answers("", "--steps", "3", "--warmup", "2")
    assert len(row["step_s"]) == 3


def compare_sides(tmp_path: Path, ours: str, trainer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PEERS))
    for name, code in (("ours", ours), ("trainer", trainer)):
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setattr(compare, "SIDES", {n: [str(tmp_path / f"{n}.py")] for n in ("ours", "trainer")})
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    monkeypatch.setattr(compare, "provenance", lambda: {"git_sha": "0" * 40, "versions": {}})
    compare.main(["--blocks", "5", "--steps", "2", "--warmup", "1"])


def test_the_comparison_writes_its_samples_and_ends_with_the_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compare_sides(tmp_path, SIDE, SIDE.replace("0.01", "0.02"), monkeypatch)
    last = capsys.readouterr().out.splitlines()[-1]
    match = re.fullmatch(r"ratio_to_trainer ([\d.]+) low ([\d.]+) high ([\d.]+)", last)
    assert match, last
    ratio, low, high = (float(g) for g in match.groups())
    assert low <= ratio <= high and 1.2 < ratio < 3
    (path,) = tmp_path.glob("peers-*.json")
    row = json.loads(path.read_text())
    assert [len(b) for b in row["tokens_per_s"]["ours"]] == [2] * 5
    assert row["git_sha"] and len(row["recipe_hash"]) == 64


def test_a_side_that_dies_is_named_and_no_result_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="trainer ended with exit code 7"):
        compare_sides(tmp_path, SIDE, "raise SystemExit(7)", monkeypatch)
    assert not list(tmp_path.glob("peers-*.json"))
