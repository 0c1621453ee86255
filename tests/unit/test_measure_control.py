"""Ranks hear each other, and those that are gone are named within the time-out on all that are left."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time

from aifactory_train.measure.control import Control, Missing, build_control
from aifactory_train.train.ranks import Ranks, node_name
from control_threads import run_ranks


def test_rank_0_gets_all_values_in_the_order_of_ranks_and_all_get_rank_0s():
    def work(control: Control) -> object:
        gathered = control.gather({"of": control.rank}, 20.0)
        return gathered, control.broadcast(["from", control.rank], 20.0), control.hosts

    hosts = [node_name()] * 3
    all_values = [{"of": 0}, {"of": 1}, {"of": 2}]
    assert run_ranks(3, work) == [(all_values, ["from", 0], hosts)] + [(None, ["from", 0], hosts)] * 2


def test_one_rank_alone_needs_no_store_and_gets_what_others_would_get():
    control = build_control(Ranks(0, 1, 0, "alone", "127.0.0.1", 0), 1.0)
    assert control.gather((1, 2), 1.0) == [[1, 2]]
    assert control.broadcast({1: "a"}, 1.0) == {"1": "a"}
    control.barrier(1.0)
    control.close(1.0)


def test_a_missing_rank_is_named_with_its_host_on_all_ranks_that_are_left():
    def work(control: Control) -> None:
        if control.rank != 2:
            control.barrier(1.0)

    t0_s = time.monotonic()
    first, second, third = run_ranks(3, work)
    assert time.monotonic() - t0_s < 20
    assert third is None
    for error in (first, second):
        assert isinstance(error, Missing) and error.ranks == [2]
        assert f"2 on {node_name()}" in error.what


def test_a_rank_that_never_came_is_named():
    (error,) = run_ranks(2, lambda control: None, present=1, timeout_s=1.0)
    assert isinstance(error, Missing) and error.ranks == [1]


def test_a_missing_rank_0_is_named_by_the_others():
    def work(control: Control) -> None:
        if control.rank != 0:
            control.broadcast(None, 0.5)

    _, error = run_ranks(2, work)
    assert isinstance(error, Missing) and error.ranks == [0]


def test_after_a_fault_the_roll_is_called_wherever_the_ranks_stand():
    def work(control: Control) -> list[int] | None:
        if control.rank == 1:
            control.gather("one more turn than the others", 5.0)
        return None if control.rank == 2 else control.roll_call(1.0)

    assert run_ranks(3, work) == [[2], [2], None]


def test_messages_do_not_stay_in_the_store():
    def work(control: Control) -> int:
        for _ in range(20):
            control.barrier(20.0)
        control.gather(None, 20.0)
        return control._store.num_keys() if control.rank == 0 else 0

    assert run_ranks(2, work)[0] < 10


def test_the_error_survives_the_way_from_a_worker_process():
    error = Missing([3], "1 of 4 ranks", "rank 0 on n1")
    assert pickle.loads(pickle.dumps(error)).ranks == [3]
    assert json.dumps(error.ranks) == "[3]"


def test_a_start_that_hangs_outside_of_python_ends_by_an_exit_code_that_mpirun_counts():
    hangs = "import ctypes\nwith limited_start(0.2): ctypes.PyDLL(None).sleep(60)"  # holds the lock of Python
    code = f"from aifactory_train.measure.control import limited_start\n{hangs}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 3, done.stderr
    assert "MPI did not start all ranks" in done.stderr and "Traceback" not in done.stderr
