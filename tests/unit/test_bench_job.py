"""How a bench is started: here, program after program, and as a batch script of a machine."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from aifactory_train.bench.faults import forget_faults, note_faults
from aifactory_train.bench.record import read_record
from aifactory_train.bench.suites import Suite, build_asked, load_asked, write_asked
from aifactory_train.cli import main
from aifactory_train.errors import PlanError, RunFolderError
from aifactory_train.launch.bench import begin_job, launch_bench
from aifactory_train.launch.checks import JobOptions
from aifactory_train.launch.slurm import render_bench, render_job
from aifactory_train.machine.load import load_machine, machine_names
from aifactory_train.machine.machine import Device, Host, Machine, Mpi
from aifactory_train.machine.site import Container, Partition, Slurm

MACHINES = [m for m in map(load_machine, machine_names()) if m.slurm is not None]
HERE = Machine(name="here", device=Device(kind="cpu", name="a CPU", per_node=1), host=Host(cores=2))
LAB = Machine(
    name="lab",
    device=Device(kind="cpu", name="a CPU", per_node=2),
    host=Host(cores=8),
    slurm=Slurm(partitions=[Partition(name="batch", max_nodes=4, max_time_h=2)], account_required=True),
)


def a_suite(*programs: str, scope: str = "job", **more: object) -> Suite:
    entry = {"ranks": "one", "scope": scope, "budget_s": 0.1, "cpu": "--fast", **more}
    return Suite.model_validate(
        {"name": "own", "about": "a test", "programs": [{**entry, "program": p} for p in programs]}
    )


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.name)
def test_the_batch_script_is_bash_and_starts_as_that_of_training(machine):
    script = render_bench(machine)
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    begin, end = "set -u -o pipefail", "export MASTER_ADDR MASTER_PORT"
    shared = render_job(machine).partition(begin)[2].partition(end)[0].partition("machine=")[2].partition("\n")[2]
    assert shared.strip() in script, "modules, Python, container, environment and rendezvous"


def test_a_node_that_fails_ends_only_programs_that_need_all_nodes():
    script = render_bench(LAB)
    assert '--kill-on-bad-exit="$together"' in script and '[ "$scope" = job ] || together=0' in script
    script = render_bench(LAB.model_copy(update={"slurm": LAB.slurm.model_copy(update={"starter": "mpirun"})}))
    assert "--map-by ppr:$per_node:node:PE=4" in script and "kill-on-bad-exit" not in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_pyxis_is_told_by_options_of_srun():
    script = render_bench(LAB.model_copy(update={"container": Container(runtime="pyxis")}))
    assert '"${ranks[@]}" "${in_ranks[@]}" "${words[@]:6}"' in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_a_dry_run_prints_script_and_commands_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    launch_bench(a_suite("gemm"), LAB, 2, 2, out, JobOptions(account="x", dry_run=True))
    text = capsys.readouterr().out
    assert "#!/bin/bash" in text and "--nodes=2" in text and "gemm.py --fast --machine" in text
    launch_bench(a_suite("gemm"), HERE, None, 2, out, JobOptions(dry_run=True))
    assert "gemm.py --fast --machine" in capsys.readouterr().out
    assert not out.exists()


def test_the_job_asks_for_the_time_that_its_programs_may_take(capsys):
    launch_bench(a_suite("gemm", budget_s=600), LAB, 1, 2, None, JobOptions(account="x", dry_run=True))
    assert "--time=00:22:00" in capsys.readouterr().out, "1.5 x 600 s, and 420 s around it"


def test_what_cannot_run_is_refused_with_what_to_type(tmp_path):
    with pytest.raises(PlanError, match="2 nodes, and machine here has no Slurm"):
        launch_bench(a_suite("gemm"), HERE, 2, 2, tmp_path / "out", JobOptions())
    with pytest.raises(PlanError, match="5 nodes; partition batch allows 4") as caught:
        launch_bench(a_suite("gemm"), LAB, 5, 2, tmp_path / "out", JobOptions())
    assert "no account is given" in caught.value.render()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", ["smok", "smoke --machine lumi", "smoke --nodes 2", "smoke --out setup.py"])
def test_a_slip_on_the_command_line_is_a_message_and_exit_code_3(words, capsys):
    assert main(["bench", *shlex.split(words)]) == 3
    said = capsys.readouterr().err
    assert "do:" in said and "Traceback" not in said


def test_the_batch_script_gets_a_line_for_each_cell(tmp_path):
    folder = tmp_path / "with space"
    write_asked(build_asked(a_suite("gemm", "memory", scope="node"), LAB, 2, 2), folder)
    lines = [line.split("\t") for line in begin_job(folder, "n[1-2]")]
    assert [line[:6] for line in lines] == [
        [str(i + 1), p, "120", "2", "1", "node"] for i, p in enumerate(("gemm", "memory"))
    ]
    assert lines[0][7:] == [
        "--fast",
        "--machine",
        f"{folder}/lab.yaml",
        "--suite",
        "own",
        "--out",
        str(folder),
        "--alone",
    ]
    assert load_asked(folder).hosts == ["n1", "n2"]
    with pytest.raises(RunFolderError, match=r"made for 2 node\(s\), the job has 3"):
        begin_job(folder, "n[1-3]")


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for programs of ours; none may take longer than a second or two to start."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setattr("aifactory_train.bench.suites.programs_dir", lambda: folder)
    monkeypatch.setattr("aifactory_train.bench.suites.START_S", 1.5)
    return folder


def run_here(suite: Suite, out: Path) -> dict[str, str | None]:
    """Benchmark -> fault of its record."""
    launch_bench(suite, HERE, None, 2, out, JobOptions())
    records = [read_record(path) for path in (out / "records").glob("*.json")]
    assert all(record.hosts == load_asked(out).hosts for record in records)
    return {record.benchmark: record.fault for record in records}


def test_a_program_that_hangs_or_dies_is_a_fault_and_the_next_one_runs(programs, tmp_path):
    (programs / "gemm.py").write_text("import time; print('here', flush=True); time.sleep(60)")
    (programs / "memory.py").write_text("raise SystemExit('out of memory')")
    (programs / "loader.py").write_text(f"open({str(tmp_path / 'seen')!r}, 'a').write('x')")
    suite = a_suite("gemm", "memory", "loader")
    found = run_here(suite, tmp_path / "out")
    assert "killed after 2 s, its time-out; see logs/1-gemm.txt" in found["gemm"]
    assert "exit code 1" in found["memory"] and "loader" not in found
    assert (tmp_path / "out/logs/1-gemm.txt").read_text() == "here\n"
    (programs / "gemm.py").write_text("pass")
    found = run_here(suite, tmp_path / "out")
    assert list(found) == ["memory"], "the fault of what ended well this time is gone"
    assert (tmp_path / "seen").read_text() == "x", "what had ended well is not run again"


def test_children_of_a_program_do_not_outlive_it(programs, tmp_path):
    (programs / "gemm.py").write_text(
        "import subprocess, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); time.sleep(60)"
    )
    run_here(a_suite("gemm"), tmp_path / "out")
    pid = int((tmp_path / "out/logs/1-gemm.txt").read_text())
    stat = Path(f"/proc/{pid}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_node_alone_that_left_nothing_is_blamed_and_its_neighbours_are_not(tmp_path):
    asked = build_asked(a_suite("gemm", scope="node"), LAB, 2, 2).model_copy(update={"hosts": ["n1", "n2"]})
    write_asked(asked, tmp_path)
    end = {"cell": 1, "exit_code": 1, "began": "2026-11-23T21:00:00Z", "seconds": 9}
    (tmp_path / "ends.jsonl").write_text(json.dumps(end) + "\n")
    note_faults(asked, tmp_path)
    (path,) = (tmp_path / "records").glob("*.json")
    record = read_record(path)
    assert record.hosts == ["n1", "n2"]
    heard = record.model_copy(update={"hosts": ["n1"], "fault": None, "started": "2026-11-23T21:00:05+00:00"})
    path.write_text(json.dumps(heard.model_dump(mode="json", by_alias=True)))
    note_faults(asked, tmp_path)
    new = [read_record(p) for p in (tmp_path / "records").glob("*.json") if p != path]
    assert [record.hosts for record in new] == [["n2"]]
    forget_faults(asked.cells, tmp_path)
    assert list((tmp_path / "records").glob("*.json")) == [path]


def test_ranks_are_started_by_mpirun_where_a_program_has_several(capsys):
    launch_bench(
        a_suite("gemm", ranks="one_per_device"),
        HERE.model_copy(update={"mpi": Mpi(kind="site", mpirun="/bin/true")}),
        None, 3, None, JobOptions(dry_run=True),
    )  # fmt: skip
    assert "/bin/true -n 3 " in capsys.readouterr().out
