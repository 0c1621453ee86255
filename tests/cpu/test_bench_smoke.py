"""A bench from its suite to its pages, and what the other words of `bench` make of its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training_runs import aifactory_here

SUITE = """\
about: products on two ranks
programs:
  - program: gemm
    scope: node
    budget_s: 20
    cpu: --change-frac 1000 --dtypes fp32 --sizes 64 --budget-s 2
"""
PAGES = ("summary.md", "report.html", "junit.xml", "metrics.prom", "bmf.json", "result.csv", "passing_nodes.txt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a bench that has ended well."""
    root = tmp_path_factory.mktemp("bench")
    (root / "own.yaml").write_text(SUITE)
    done = run(root / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 programs to run" in done.stdout and "no_reference" in done.stdout
    return root / "out"


def run(out: Path):
    return aifactory_here("bench", out.parent / "own.yaml", "--out", out)


def test_a_bench_leaves_records_of_both_ranks_and_every_page(folder):
    records = [json.loads(path.read_text()) for path in (folder / "records").glob("*.json")]
    assert [record["suite"] for record in records] == ["own"]
    assert {judgement["verdict"] for judgement in records[0]["verdicts"]} == {"no_reference"}
    assert records[0]["cell"]["ranks"] == 2
    assert all((folder / name).stat().st_size for name in PAGES)
    assert (folder.parent / "index.sqlite").exists()


def test_what_has_ended_well_is_not_run_again(folder):
    before = (folder / "ends.jsonl").read_text()
    done = run(folder)
    assert done.returncode == 0 and "0 of 1 programs to run" in done.stdout
    assert (folder / "ends.jsonl").read_text() == before


def test_report_archive_compare_and_learn_take_the_folder(folder, tmp_path):
    (folder / "report.html").unlink()
    assert aifactory_here("bench", "report", folder).returncode == 0 and (folder / "report.html").exists()
    packed = aifactory_here("bench", "archive", folder, "--out", tmp_path / "out.tar.zst")
    assert packed.returncode == 0 and (tmp_path / "out.tar.zst").stat().st_size
    assert "aifactory_gemm_flops_per_second" in aifactory_here("bench", "compare", folder, folder).stdout
    done = aifactory_here("bench", "learn", folder, "--out", tmp_path / "here.yaml")
    assert done.returncode == 0 and "aifactory_gemm_flops_per_second" in (tmp_path / "here.yaml").read_text()


def test_a_word_with_too_few_folders_or_a_wrong_one_is_a_message(folder):
    for words, said in ((("compare", folder), "takes 2 folder"), (("report", folder.parent), "not a bench folder")):
        done = aifactory_here("bench", *words)
        assert done.returncode == 3 and said in done.stderr
