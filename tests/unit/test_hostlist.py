"""Slurm's host lists, in both directions."""

from __future__ import annotations

import pytest

from aifactory_train.hostlist import compress, expand
from aifactory_train.units import format_slurm_time, parse_slurm_time_s


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("", []),
        ("login1", ["login1"]),
        ("nid[0012-0014,0020],x1", ["nid0012", "nid0013", "nid0014", "nid0020", "x1"]),
        ("jpbo-001-[09-10]", ["jpbo-001-09", "jpbo-001-10"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("n[8-10]-a", ["n8-a", "n9-a", "n10-a"]),
    ],
)
def test_a_list_names_its_hosts_in_order(text, hosts):
    assert expand(text) == hosts


@pytest.mark.parametrize(
    ("hosts", "text"),
    [
        ([], ""),
        (["nid0014", "nid0012", "nid0013", "nid0020"], "nid[0012-0014,0020]"),
        (["n9", "n10"], "n9,n10"),
        (["gnx501"], "gnx501"),
        (["a-01-x", "a-02-x", "login"], "a-[01-02]-x,login"),
        (["n1", "n1"], "n1"),
    ],
)
def test_hosts_run_together_into_the_list_that_slurm_reads(hosts, text):
    assert compress(hosts) == text
    assert set(expand(text)) == set(hosts)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("90:30", 5430), ("4:00:00", 14400), ("1-12", 129600), ("1-12:30:00", 131400), ("0:45", 45)],
)
def test_times_are_read_as_sbatch_reads_them(text, seconds):
    assert parse_slurm_time_s(text) == seconds
    assert parse_slurm_time_s(format_slurm_time(seconds)) == seconds


@pytest.mark.parametrize("text", ["", "soon", "4h", "1:2:3:4", "-5", "1-"])
def test_what_sbatch_would_not_take_is_no_time(text):
    assert parse_slurm_time_s(text) is None
