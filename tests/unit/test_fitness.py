"""Who is to blame, from the files that the ranks of a preflight leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aifactory_train.launch.fitness import judge, render_fitness

HOSTS = ["n1", "n2", "n3"]


def write_rank(attempt: Path, rank: int, **changes: object) -> None:
    row = {
        "rank": rank,
        "local_rank": rank % 2,
        "host": f"n{rank // 2 + 1}",
        "ok": True,
        "phase": "together",
        "faults": [],
        "elsewhere": [],
        "missing": [],
        "facts": {"matmul_flops_per_s": 100e12, "memory_bytes_per_s": 1e12},
    }
    folder = attempt / "preflight"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank-{rank:05d}.json").write_text(json.dumps({**row, **changes}))


@pytest.fixture
def attempt(tmp_path: Path) -> Path:
    """Three nodes of two ranks, all well."""
    for rank in range(6):
        write_rank(tmp_path, rank)
    return tmp_path


def test_all_well_passes_every_host_and_says_so(attempt: Path) -> None:
    fitness = judge(attempt, HOSTS, 2)
    assert (fitness.passing, fitness.failing, fitness.notes) == (HOSTS, {}, [])
    assert render_fitness(fitness) == "all 3 nodes are fit"
    kept = json.loads((attempt / "preflight.json").read_text())
    assert kept == {"passing": "n[1-3]", "failing": "", "faults": {}, "notes": []}


def test_a_fault_fails_its_host_by_the_block_of_its_rank(attempt: Path) -> None:
    write_rank(attempt, 3, host="a-name-that-slurm-does-not-know", faults=["too slow; leave it out"])
    fitness = judge(attempt, HOSTS, 2)
    assert fitness.passing == ["n1", "n3"]
    assert fitness.failing == {"n2": ["rank 3: too slow; leave it out"]}
    assert render_fitness(fitness) == "1 of 3 nodes not fit: n2\nn2: rank 3: too slow; leave it out"
    kept = json.loads((attempt / "preflight.json").read_text())
    assert (kept["passing"], kept["failing"]) == ("n[1,3]", "n2")


def test_a_host_that_said_nothing_fails(attempt: Path) -> None:
    for rank in (4, 5):
        (attempt / "preflight" / f"rank-{rank:05d}.json").unlink()
    assert judge(attempt, HOSTS, 2).failing == {"n3": ["none of its ranks has left a report"]}


def test_one_silent_or_damaged_report_of_a_host_is_named(attempt: Path) -> None:
    (attempt / "preflight" / "rank-00005.json").write_text('{"rank": 5, "fau')
    assert judge(attempt, HOSTS, 2).failing == {"n3": ["no report of rank 5"]}


def test_nobody_is_blamed_where_no_host_said_anything(tmp_path: Path) -> None:
    fitness = judge(tmp_path, HOSTS, 2)
    assert fitness.passing == HOSTS and fitness.failing == {}
    assert "no rank of the preflight has left a report" in render_fitness(fitness)


@pytest.mark.parametrize(
    ("fact", "words"),
    [
        ("matmul_flops_per_s", ["matrix products at 60.0 TFLOP/s", "100 TFLOP/s"]),
        ("memory_bytes_per_s", ["memory copies at 600 GB/s", "1.00 TB/s"]),
    ],
)
def test_a_rank_far_below_the_median_fails_with_both_numbers(attempt: Path, fact: str, words: list[str]) -> None:
    facts = {"matmul_flops_per_s": 100e12, "memory_bytes_per_s": 1e12}
    write_rank(attempt, 2, facts={**facts, fact: 0.6 * facts[fact]})
    (sentence,) = judge(attempt, HOSTS, 2).failing["n2"]
    assert all(word in sentence for word in words), sentence
    write_rank(attempt, 2, facts={**facts, fact: 0.75 * facts[fact]})
    assert judge(attempt, HOSTS, 2).failing == {}


def test_three_ranks_have_no_outlier(tmp_path: Path) -> None:
    for rank in range(3):
        write_rank(tmp_path, rank, facts={"matmul_flops_per_s": 1e12 if rank else 1e11})
    assert judge(tmp_path, HOSTS, 1).failing == {}


def test_who_did_not_come_is_blamed_and_not_those_who_waited(attempt: Path) -> None:
    for rank in range(6):
        write_rank(attempt, rank, missing=[4], elsewhere=["1 of 6 ranks did not come: rank 4 on n3; look there"])
    write_rank(attempt, 4, phase="local")
    fitness = judge(attempt, HOSTS, 2)
    assert fitness.failing == {"n3": ["rank 4: passed its own checks, and then the others waited for it in vain"]}
    assert fitness.notes == []


def test_who_died_before_its_report_is_blamed_once(attempt: Path) -> None:
    for rank in range(6):
        write_rank(attempt, rank, missing=[4, 5], elsewhere=["did not come"])
    for rank in (4, 5):
        (attempt / "preflight" / f"rank-{rank:05d}.json").unlink()
    assert judge(attempt, HOSTS, 2).failing == {"n3": ["none of its ranks has left a report"]}


def test_a_node_that_alone_cannot_reach_rank_0_is_blamed(attempt: Path) -> None:
    for rank in range(4):
        write_rank(attempt, rank, missing=[4, 5], elsewhere=["2 of 6 did not come"])
    for rank in (4, 5):
        write_rank(attempt, rank, missing=[0], elsewhere=["rank 0 did not answer"])
    failing = judge(attempt, HOSTS, 2).failing
    assert list(failing) == ["n3"] and "could not reach rank 0 on n1" in failing["n3"][0]


def test_no_node_is_blamed_where_most_cannot_reach_rank_0(attempt: Path) -> None:
    write_rank(attempt, 0, missing=[2, 3, 4, 5], elsewhere=["4 of 6 did not come"])
    write_rank(attempt, 1, missing=[2, 3, 4, 5], elsewhere=["4 of 6 did not come"])
    for rank in range(2, 6):
        write_rank(attempt, rank, missing=[0], elsewhere=["rank 0 did not answer"])
    fitness = judge(attempt, HOSTS, 2)
    assert fitness.failing == {}
    assert "2 of 2 nodes could not reach rank 0 on n1: check that MASTER_ADDR" in fitness.notes[0]


def test_a_collective_that_hangs_on_all_blames_nobody_and_is_told(attempt: Path) -> None:
    for rank in range(6):
        write_rank(attempt, rank, elsewhere=["all-reduce of 6 ranks: it did not end within 30 s; launch again"])
    fitness = judge(attempt, HOSTS, 2)
    assert fitness.failing == {}
    assert render_fitness(fitness) == "all-reduce of 6 ranks: it did not end within 30 s; launch again (6 ranks)"


def test_a_fault_on_every_node_is_told_as_one_that_they_share(attempt: Path) -> None:
    for rank in range(6):
        write_rank(attempt, rank, faults=["torch sees no GPU; look"])
    text = render_fitness(judge(attempt, HOSTS, 2))
    assert text.startswith("none of the 3 nodes is fit; what they share is the likely cause")
    assert "n1: rank 0: torch sees no GPU; look (and 1 more)" in text
