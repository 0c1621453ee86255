"""Collectives and pairs: results are checked, numbers are those of nccl-tests, and a broken pair costs itself only."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from aifactory_train.bench.record import read_record, read_samples
from aifactory_train.bench.wire import OPS
from aifactory_train.errors import UserError
from aifactory_train.measure.collectives import build_exchange
from aifactory_train.measure.nccltests import command, find_nccl_tests, read_nccl_tests
from aifactory_train.measure.pairs import Task, rounds_of, run_child
from gloo_forks import on_forks

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "tests" / "unit" / "recorded" / "nccl_tests.json"
MPIRUN = [str(Path(sys.executable).parent / "mpirun"), "--allow-run-as-root", "--oversubscribe"]


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_every_collective_gives_what_it_must_and_a_wrong_value_is_counted(n_ranks: int, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        for op, dtype in itertools.product(OPS, (torch.bfloat16, torch.float32)):
            exchange = build_exchange(op, 12_000, dtype, torch.device("cpu"))
            assert exchange.count_wrong() == 0, (op, dtype)
            target = exchange.pristine if exchange.pristine is not None else exchange.given
            target[1] += 1  # each rank gives one wrong value
            # Element 1 lies in the part that goes to rank 0.
            wanted = {
                "all_reduce": 1,
                "all_gather": n_ranks,
                "reduce_scatter": int(rank == 0),
                "all_to_all": n_ranks * (rank == 0),
                "sendrecv": 1,
            }
            assert exchange.count_wrong() == wanted[op], op

    on_forks(tmp_path, n_ranks, work)


def test_records_hold_duration_and_both_bandwidths_with_the_factors_of_nccl_tests(tmp_path: Path) -> None:
    options = ["--out", str(tmp_path), "--budget-s", "0.1", "--ops", "all_reduce", "--dtypes", "fp32"]
    program = [sys.executable, str(ROOT / "benchmarks/collectives.py"), *options, "--max-bytes", "32768"]
    done = subprocess.run([*MPIRUN, "-n", "2", *program], capture_output=True, text=True, timeout=120, check=False)
    [path] = (tmp_path / "records").glob("*.json")
    record = read_record(path)
    assert done.returncode == 0 and record.fault is None, done.stderr
    assert record.cell["op"] == "all_reduce" and record.cell["bytes"] == 32768 and record.cell["ranks"] == 2
    assert record.validity.wrong_values == 0
    assert record.facts["init_s"] > 0 and record.facts["wire"]["ceiling_bytes_per_s"] is None
    samples = read_samples(path.parent / (record.samples or ""))
    prefix = "aifactory_collective_"
    for rank, seconds in samples[f"{prefix}duration_seconds"].items():
        for name in ("algorithm", "bus"):  # over two ranks the factor of an all_reduce is 1
            rates = samples[f"{prefix}{name}_bandwidth_bytes_per_second"][rank]
            assert rates == pytest.approx([32768 / s for s in seconds])


def test_one_rank_alone_skips_and_says_why(tmp_path: Path) -> None:
    program = [sys.executable, str(ROOT / "benchmarks/collectives.py"), "--out", str(tmp_path)]
    subprocess.run(program, capture_output=True, timeout=120, check=True)
    [path] = (tmp_path / "records").glob("*.json")
    record = read_record(path)
    assert not record.metrics and [v.verdict for v in record.verdicts] == ["skipped"]


def test_the_json_of_nccl_tests_is_read_in_base_units() -> None:
    first, second = read_nccl_tests(RECORDED)
    assert (first.n_bytes, first.n_wrong, second.n_wrong) == (32768, 0, 2)
    assert sorted(first.seconds) == [0, 1] and len(first.seconds[0]) == 8
    assert first.seconds[1][1] == pytest.approx(22e-6)
    assert second.seconds[1][2] == pytest.approx(40e-6)


def test_a_file_without_the_times_of_each_call_is_refused(tmp_path: Path) -> None:
    document = json.loads(RECORDED.read_text())
    del document["results"][0]["out_of_place_per_iter"]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match="no JSON of nccl-tests"):
        read_nccl_tests(path)
    document = json.loads(RECORDED.read_text()) | {"errors": ["unhandled system error"]}
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match="unhandled system error"):
        read_nccl_tests(path)


def test_binaries_of_nccl_tests_are_found_where_they_are_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no all_reduce_perf"):
        find_nccl_tests(str(tmp_path))
    (tmp_path / "all_reduce_perf").touch()
    assert find_nccl_tests(str(tmp_path)) == tmp_path
    line = " ".join(command(tmp_path, "all_to_all", "bf16", 32768, 65536, 4))
    assert line.endswith("alltoall_perf -b 32768 -e 65536 -f 2 -w 10 -n 50 -I 1 -c 1 -d bfloat16 -g 4 -J")


@pytest.mark.parametrize("n", [2, 3, 6, 7])
def test_in_a_tournament_all_meet_once_and_nobody_twice_in_a_round(n: int) -> None:
    hosts = [f"n{i}" for i in range(n)]
    rounds = rounds_of(hosts)
    assert len(rounds) == n - 1 + n % 2
    assert sorted(pair for pairs in rounds for pair in pairs) == list(itertools.combinations(hosts, 2))
    for pairs in rounds:
        assert len({host for pair in pairs for host in pair}) == 2 * len(pairs)


def test_a_link_that_is_dead_is_a_fault_of_both_ends_within_the_time_out() -> None:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1], other.getsockname()[1]]
    tasks = [Task(rank, 2, "127.0.0.1", ports[rank], "cpu", 1024, 2, 1, 8.0) for rank in (0, 1)]
    begin_s = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run_child, tasks))
    assert all("fault" in result for result in results)
    assert time.monotonic() - begin_s < 30


def test_a_killed_peer_is_reported_with_both_hosts_and_the_other_pairs_are_measured(tmp_path: Path) -> None:
    sizes = ["--bytes", "4096", "--calls", "6", "--warmup-calls", "1", "--pair-timeout-s", "25"]
    options = ["--out", str(tmp_path), *sizes]
    program = [sys.executable, str(ROOT / "benchmarks/p2p.py"), *options]
    parts = [["-n", "1", "-x", f"SLURMD_NODENAME=n{i}", *program] for i in (1, 2, 3)]
    line = [*MPIRUN, *itertools.chain.from_iterable([*part, ":"] for part in parts)][:-1]
    job = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        _kill_one(job.pid, b"aifactory_train.measure.pairs")
        out, _ = job.communicate(timeout=120)
    finally:
        job.kill()
    records = [read_record(path) for path in (tmp_path / "records").glob("*.json")]
    faults = [record for record in records if record.fault]
    assert [record.hosts for record in faults] == [["n2", "n3"]], out
    assert "n2 and n3" in (faults[0].fault or "") and "killed by signal 9" in (faults[0].fault or "")
    measured = sorted((r.cell["pair"], r.cell["mode"]) for r in records if r.metrics)
    assert measured == [(p, m) for p in ("n1+n2", "n1+n3") for m in ("all_reduce", "receive", "send")]


def test_the_survivor_of_a_bench_on_this_node_names_the_rank_that_was_killed(tmp_path: Path) -> None:
    suite = tmp_path / "own.yaml"
    options = "--ops all_reduce --dtypes fp32 --max-bytes 32768 --budget-s 100 --change-frac 0.95 --timeout-s 5"
    entry = {"program": "collectives", "scope": "job", "budget_s": 20, "cpu": options}
    suite.write_text(json.dumps({"about": "two ranks", "programs": [entry]}))
    command = [sys.executable, "-m", "aifactory_train", "bench", str(suite), "--machine", "local", "--cpu-ranks", "2"]
    out = tmp_path / "out"
    bench = subprocess.Popen(
        [*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    try:
        _kill_one(bench.pid, b"benchmarks/collectives.py", b"OMPI_COMM_WORLD_RANK=1", n_sockets=3)
        said, _ = bench.communicate(timeout=120)
    finally:
        bench.terminate()
    [record] = [read_record(path) for path in (out / "records").glob("*.json")]
    assert bench.returncode == 2 and record.fault is not None, said
    assert record.facts["missing_ranks"] == [1] and f"1 on {record.hosts[1]}" in record.fault and record.fault in said
    assert "asked to stop" not in record.fault and (out / "failing_nodes.txt").read_text() == f"{record.hosts[1]}\n"


def _kill_one(launcher: int, word: bytes, variable: bytes = b"", n_sockets: int = 0) -> None:
    """The first process below `launcher` with that word, variable and number of sockets, as soon as it is there."""
    end_s = time.monotonic() + 60
    while time.monotonic() < end_s:
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                ours = word in (entry / "cmdline").read_bytes() and variable in (entry / "environ").read_bytes()
                opened = [os.readlink(fd) for fd in (entry / "fd").iterdir()] if ours else []
                connected = sum(name.startswith("socket:") for name in opened) >= n_sockets
                if ours and connected and launcher in _ancestors(int(entry.name)):
                    os.kill(int(entry.name), signal.SIGKILL)
                    return
            except (OSError, ValueError):  # it has ended meanwhile
                continue
        time.sleep(0.02)
    pytest.fail(f"no process of {word.decode()} within a minute")


def _ancestors(pid: int) -> list[int]:
    found = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        found.append(pid)
    return found
