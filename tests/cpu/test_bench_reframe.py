"""ReFrame runs our checks for real: it starts the program, reads the records, and gets their references."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from aifactory_train.bench.record import Judgement, Record, Verdict
from bench_records import GEMM, a_record, write_folder

ROOT = Path(__file__).resolve().parent.parent.parent
CHECKS = ROOT / "benchmarks" / "reframe" / "aifactory_checks.py"


def reframe(tmp_path: Path, python: str, options: str) -> tuple[int, str, dict[str, list[float | None]]]:
    """Exit code, output, and the performance values of the one check: name -> [value, reference]."""
    report = tmp_path / "report.json"
    words = [str(Path(sys.executable).with_name("reframe")), "--nocolor", "--prefix", str(tmp_path), "-c", str(CHECKS)]
    words += ["-n", "Gemm", "-r", "-S", f"python={python}", "-S", f"options={options}", "--report-file", str(report)]
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=tmp_path, timeout=120, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    case = json.loads(report.read_text())["runs"][0]["testcases"][0]
    values = {key.split(":", 2)[2]: entry for key, entry in (case.get("perfvalues") or {}).items()}
    return done.returncode, done.stdout + done.stderr, values


def a_copying_python(tmp_path: Path, record: Record) -> str:
    """In place of Python: copies a bench folder that is judged already."""
    folder = write_folder(tmp_path / "made", [record])
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\ntest "$1" = -m || cp -r {folder} bench\n')
    script.chmod(0o755)
    return str(script)


def judged(verdict: Verdict, reference: float) -> Record:
    judgement = Judgement(metric=GEMM, verdict=verdict, reference=reference, tolerance_frac=0.07, why="beside others")
    return a_record(cell={"m": 8}, verdicts=[judgement])


def test_the_gemm_check_runs_and_reads_our_numbers(tmp_path: Path) -> None:
    options = "--sizes 64 --dtypes fp32 --budget-s 2 --change-frac 1000"
    exit_code, output, values = reframe(tmp_path, sys.executable, options)
    assert exit_code == 0, output
    name = next(name for name in values if name.startswith(f"{GEMM}/") and name.endswith("shape=square"))
    low, value, high = (values[key][0] for key in (f"{name}/ci_low", name, f"{name}/ci_high"))
    assert 0 < low <= value <= high and values["num_nodes"][0] == 1


def test_reframe_gets_the_reference_of_the_verdict(tmp_path: Path) -> None:
    exit_code, output, values = reframe(tmp_path, a_copying_python(tmp_path, judged("pass", 101.0)), "")
    assert exit_code == 0, output
    assert values[f"{GEMM}/m=8"][:3] == [100.0, 101.0, -0.07]


def test_a_red_verdict_fails_the_check_with_its_host(tmp_path: Path) -> None:
    exit_code, output, _ = reframe(tmp_path, a_copying_python(tmp_path, judged("regression", 120.0)), "")
    assert exit_code == 1 and f"regression on n1: {GEMM} beside others" in output


def test_a_program_that_leaves_no_record_fails_the_check(tmp_path: Path) -> None:
    exit_code, output, _ = reframe(tmp_path, "false", "")
    assert exit_code == 1 and "no judged record in bench/records" in output
