"""The batch script between the ranks and the next job, where Slurm answers late, oddly or not at all.

Its commands are stand-ins here: a real Slurm, as in tests/slurm, cannot be made to fail on demand.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from aifactory_train.launch.slurm import render_job
from aifactory_train.machine.machine import Device, Host, Machine
from aifactory_train.machine.site import Partition, Slurm

MACHINE = Machine(
    name="lab",
    device=Device(kind="cuda", name="H100", per_node=4),
    host=Host(cores=32),
    slurm=Slurm(partitions=[Partition(name="gpu")]),
)
GIVEN = "proj|gpu|normal|16|6:00:00|(null)|(null)|(null)"
# Each stand-in notes its call; $BUSY names those that fail as often as their number says.
STAND_IN = r"""#!/bin/bash
name=${0##*/}
printf '%s\n' "$name $*" >> "$CALLS"
for busy in $BUSY; do
  if [ "$name" = "${busy%=*}" ] && [ "$(grep -c "^$name " "$CALLS")" -le "${busy#*=}" ]; then
    echo "$name: error: Socket timed out on send/recv operation" >&2
    exit 1
  fi
done
"""
COMMANDS = {
    "scontrol": "echo n1",
    "squeue": 'case "$*" in *%e*) echo "${ENDS-}" ;; *) echo "$GIVEN" ;; esac',
    "sinfo": "",
    "srun": 'exit "${RANKS:-143}"',
    "sleep": "",
    "sbatch": 'env | grep ^SLURM_; echo "${SBATCH_SAYS-777;lab}"',
    "python3": r"""
        case "$*" in
          *"attempt begin"*) echo "$RUN/attempts/001" ;;
          *"attempt end"*)
            [ -z "${TERM_AT_END:-}" ] || [[ $* == *--terminated* ]] || kill -TERM "$PPID" $$
            sleep 0
            echo "n[2-3]"
            if [[ $* == *--terminated* ]]; then exit "${END_TERMINATED:-75}"; else exit "${END:-75}"; fi ;;
        esac""",
}


@pytest.fixture
def job(tmp_path):
    """Runs the script of a job; gives its result and the calls of each command."""
    run = tmp_path / "a run of 100% $(touch pwned)"
    (run / "attempts" / "001").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    for name, body in COMMANDS.items():
        path = tmp_path / "bin" / name
        path.write_text(STAND_IN + body + "\n")
        path.chmod(0o755)
    script = tmp_path / "slurm_script"
    script.write_text(render_job(MACHINE))

    def start(**env: str) -> tuple[subprocess.CompletedProcess[str], dict[str, list[str]]]:
        calls = tmp_path / "calls"
        calls.write_text("")
        slurm = {"SLURM_JOB_ID": "101", "SLURM_JOB_NUM_NODES": "16", "SLURM_JOB_NODELIST": "n[1-16]"}
        slurm |= {"SLURM_JOB_NAME": "a|b c", "SLURM_JOB_END_TIME": "1790000000"}
        done = subprocess.run(
            ["bash", str(script), "recipe.yaml", str(run)],
            env={
                "PATH": f"{tmp_path}/bin:{os.defpath}",
                "CALLS": str(calls),
                "RUN": str(run),
                "GIVEN": GIVEN,
                "BUSY": "",
                **slurm,
                **env,
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=30,
        )
        said: dict[str, list[str]] = {name: [] for name in COMMANDS}
        for line in calls.read_text().splitlines():
            name, _, words = line.partition(" ")
            said[name].append(words)
        assert not (tmp_path / "pwned").exists() and not (Path.cwd() / "pwned").exists()
        return done, said

    return start


def test_the_next_job_asks_for_what_this_one_was_given_and_does_without_bad_nodes(job):
    done, said = job()
    assert done.returncode == 0 and "the run goes on in job 777\n" in done.stdout
    assert "$(touch pwned)/attempts/001'/log.txt\n" in done.stdout, "a command to type, also with blanks in the path"
    words = said["sbatch"][0]
    for option in ("exclude=n[2-3]", "account=proj", "partition=gpu", "qos=normal", "nodes=16", "time=6:00:00"):
        assert f"--{option} " in words
    assert "--job-name=a|b c " in words and "100%% $(touch pwned)/slurm-%j.out " in words
    assert "reservation" not in words and "constraint" not in words
    assert said["python3"][-1].endswith(" 777") and "attempt submitted" in said["python3"][-1]


def test_nodes_that_the_user_left_out_stay_out_beside_the_unfit(job):
    _, said = job(GIVEN="proj|gpu|normal|16|6:00:00|(null)|x[7,9]|(null)")
    assert "--exclude=x[7,9],n[2-3] " in said["sbatch"][0]


def test_a_constraint_with_an_or_stays_whole(job):
    _, said = job(GIVEN="proj|gpu|normal|16|6:00:00|(null)|(null)|[rack1|rack2]")
    assert "--constraint=[rack1|rack2] " in said["sbatch"][0]


def test_a_busy_slurm_is_asked_again(job):
    done, said = job(BUSY="squeue=2 sbatch=2")
    assert done.returncode == 0 and len(said["squeue"]) == 4 and len(said["sbatch"]) == 3
    assert "--nodes=16 " in said["sbatch"][-1]


def test_without_an_answer_no_next_job_is_submitted_with_the_nodes_of_the_script(job):
    done, said = job(BUSY="squeue=9")
    assert done.returncode == 1 and said["sbatch"] == [] and "to go on, launch again" in done.stderr


def test_a_refused_next_job_is_told_so_that_it_can_be_typed(job):
    done, said = job(BUSY="sbatch=9")
    assert done.returncode == 1 and len(said["sbatch"]) == 3 and "submitted" not in said["python3"][-1]
    assert "could not be submitted" in done.stderr and "'--job-name=a|b c'" in done.stderr


def test_of_what_sbatch_says_the_last_line_is_the_id(job):
    _, said = job(SBATCH_SAYS="Welcome to the lab\n778;lab")
    assert said["python3"][-1].endswith(" 778")


@pytest.mark.parametrize(
    ("ends", "busy", "told"),
    [("2026-09-21T14:13:20", "", "1790000000"), ("N/A", "", ""), ("NONE", "", ""), ("", "", ""), ("", "squeue=3", "")],
)
def test_the_end_of_the_job_is_what_squeue_tells_or_unknown(job, ends, busy, told):
    _, said = job(SLURM_JOB_END_TIME="", ENDS=ends, BUSY=busy, TZ="UTC")
    begin = next(words for words in said["python3"] if "attempt begin" in words)
    assert begin.endswith(f"--end-time-s {told}"), "no answer is not midnight"


def test_where_squeue_is_silent_the_end_is_what_slurm_has_set(job):
    _, said = job(BUSY="squeue=3", END="0")
    assert said["python3"][1].endswith("--end-time-s 1790000000")


def test_a_sigterm_while_the_end_is_decided_is_decided_by_and_breaks_nothing(job):
    done, said = job(TERM_AT_END="1", END_TERMINATED="143")
    assert done.returncode == 143 and said["sbatch"] == [], "somebody ended the job"
    assert ["--terminated" in words for words in said["python3"] if "attempt end" in words] == [False, True]
    done, said = job(TERM_AT_END="1")
    assert done.returncode == 0 and len(said["sbatch"]) == 1, "its time was up, and the run goes on"


@pytest.mark.parametrize("code", ("0", "2", "143"))
def test_a_chain_that_is_over_submits_nothing(job, code):
    done, said = job(END=code)
    assert done.returncode == int(code) and said["sbatch"] == []


def test_a_busy_slurm_does_not_keep_a_job_from_training(job):
    _, said = job(BUSY="squeue=9 scontrol=9 sinfo=9", SLURM_JOB_END_TIME="", RANKS="0")
    assert len(said["srun"]) == 2, "preflight and training"
