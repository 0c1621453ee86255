"""The mpirun command, the variables of the ranks, what of mpirun's output is shown, and what launch gives to type."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from aifactory_train.errors import CheckpointError, MachineError, RunFolderError
from aifactory_train.launch import env, local
from aifactory_train.launch import submit as submitting
from aifactory_train.launch.checks import JobOptions, check_init_from
from aifactory_train.launch.local import check_run_folder, without_notice, write_run_folder
from aifactory_train.launch.mpi import find_mpirun, mpirun_command
from aifactory_train.machine.machine import Mpi
from aifactory_train.machine.site import Partition, Slurm
from aifactory_train.recipe.huggingface import own_config
from aifactory_train.recipe.schema import Lora
from aifactory_train.rundir import COMMIT, RunDir, hold, step_folder
from results_run import a_plan

RULE = b"-" * 74 + b"\n"
NOTICE = RULE + b"prterun detected that one or more processes exited with non-zero status,\n  Exit code: 2\n" + RULE


def test_mpiruns_notice_is_dropped_and_all_else_passes():
    assert without_notice(b"a\n" + NOTICE + b"b\n") == (b"a\nb\n", b"")
    other = RULE + b"There are not enough slots available\n" + RULE
    assert without_notice(b"a\n" + other) == (b"a\n" + other, b"")
    assert without_notice(b"\rstep 3/9") == (b"\rstep 3/9", b""), "a progress bar has no line end"


def test_a_notice_that_arrives_in_pieces_is_dropped_too():
    text = b"error\n" + NOTICE + b"end\n"
    for cut in range(len(text)):
        shown, held = without_notice(text[:cut])
        more, left = without_notice(held + text[cut:])
        assert shown + more + left == b"error\nend\n", cut


def test_every_variable_of_a_rank_has_a_reason_and_the_users_own_value_wins(monkeypatch):
    machine = a_plan().machine
    assert all(v.why for v in env.local_variables(machine, 3))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert env.local_environment(machine, 3, "/x")["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert env.local_environment(machine, 3, "/x")["OMP_NUM_THREADS"] == "7"


def test_a_folder_that_a_killed_mpirun_left_behind_stops_no_later_one(tmp_path):
    """The later one gets the same process id: it replaces the shell that knows its own."""
    mpirun = mpirun_command(a_plan().machine, 1, ["true"])
    files = '"$0/ompi.$$/pmix.$(hostname).tool" "$0/ompi.$$/pmix.$(hostname).tool.$$"'
    stale = f'mkdir "$0/ompi.$$"; touch {files}; exec "$@"'
    base = {**os.environ, "TMPDIR": str(tmp_path)}
    folder = tmp_path / "of its own"
    folder.mkdir()
    for environment, fails in ((base, True), (env.local_environment(a_plan().machine, 1, str(folder)) | base, False)):
        done = subprocess.run(["bash", "-c", stale, str(tmp_path), *mpirun], env=environment, capture_output=True)
        assert (done.returncode != 0) == fails, done.stderr


def test_the_embedded_mpirun_lies_beside_our_python_and_a_sites_is_looked_up():
    machine = a_plan().machine
    assert find_mpirun(machine).startswith(sys.prefix)
    site = machine.model_copy(update={"mpi": Mpi(kind="site", mpirun="/bin/true")})
    assert mpirun_command(site, 3, ["x"])[:3] == ["/bin/true", "-n", "3"]
    gone = machine.model_copy(update={"mpi": Mpi(kind="site", mpirun="no-such-mpirun")})
    with pytest.raises(MachineError, match="no-such-mpirun"):
        find_mpirun(gone)


def test_a_run_folder_of_another_recipe_is_refused_by_key(tmp_path):
    plan, run = a_plan(), RunDir(tmp_path / "run")
    check_run_folder(plan, run)
    write_run_folder(plan, run)
    check_run_folder(plan, run)
    optim = plan.recipe.optim.model_copy(update={"lr": 0.5})
    other = plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"optim": optim})})
    with pytest.raises(RunFolderError, match=r"optim\.lr"):
        check_run_folder(other, run)


def test_a_folder_with_foreign_files_is_not_taken_for_a_run(tmp_path):
    (tmp_path / "thesis.txt").write_text("keep me")
    with pytest.raises(RunFolderError, match="holds files but no run"):
        check_run_folder(a_plan(), RunDir(tmp_path))


def test_a_folder_that_is_not_of_this_model_or_not_whole_is_refused_before_any_rank_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model, folder = a_plan().recipe.model, tmp_path / "weights"
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}

    def check(name: str) -> None:
        check_init_from(model.model_copy(update={"init_from": name}))

    def write_config(**changes: object) -> None:
        (folder / "config.json").write_text(json.dumps(own_config(model) | changes))

    def write_shard(name: str, n_bytes: int | None = None) -> None:
        save_file({"a": np.zeros(100, np.float32)}, folder / name)
        os.truncate(folder / name, n_bytes or (folder / name).stat().st_size)

    for what, make in (
        ("no such folder", folder.mkdir),
        ("no config.json", (folder / "config.json").touch),
        ("no weights", (folder / "pytorch_model.bin").touch),
        ("config.json cannot be read", lambda: write_config(hidden_size=1 + model.hidden_size)),
        (rf"hidden_size: weights {1 + model.hidden_size}, recipe {model.hidden_size}", write_config),
    ):
        with pytest.raises(CheckpointError, match=what):
            check("~/weights")
        make()
    check("~/weights")
    write_shard("model.safetensors", 300)
    with pytest.raises(CheckpointError, match=r"~/weights: model\.safetensors cannot be read"):
        check("~/weights")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_shard("one.safetensors")
    with pytest.raises(CheckpointError, match=r"two\.safetensors cannot be read: No such file"):
        check("~/weights")
    write_shard("two.safetensors")
    check("~/weights")
    with pytest.raises(CheckpointError, match="org/name: no such folder") as refused:
        check("org/name")
    assert "aifactory-train stage RECIPE --to DIR" in refused.value.do


def test_a_launch_needs_init_from_until_there_is_a_commit_and_with_adapters_always(tmp_path, monkeypatch):
    plan, run = a_plan(), RunDir(tmp_path / "run")
    monkeypatch.setattr(local, "load_prepared", lambda _: SimpleNamespace(manifest=None))
    monkeypatch.setattr(local, "check_fits_model", lambda *_: None)
    gone = plan.recipe.model.model_copy(update={"init_from": str(tmp_path / "gone")})

    def launch(lora: Lora | None) -> int:
        recipe = plan.recipe.model_copy(update={"model": gone, "lora": lora})
        write_run_folder(plan.model_copy(update={"recipe": recipe}), run)
        return local.launch_local(plan.model_copy(update={"recipe": recipe}), run, JobOptions(dry_run=True))

    with pytest.raises(CheckpointError, match="gone: no such folder"):
        launch(None)
    commit = step_folder(run.checkpoints, 3) / COMMIT
    commit.parent.mkdir(parents=True)
    commit.touch()
    assert launch(None) == 0
    with pytest.raises(CheckpointError, match="gone: no such folder"):
        launch(Lora(rank=2, alpha=4.0))


def test_a_run_is_not_started_twice_at_once(tmp_path):
    busy = RunFolderError("this run is being trained already")
    with hold(tmp_path, busy), pytest.raises(RunFolderError, match="already"), hold(tmp_path, busy):
        pass
    with hold(tmp_path, busy):
        pass


def test_what_launch_gives_to_type_works_as_it_stands(tmp_path, monkeypatch):
    plan, run, live = a_plan(), RunDir(tmp_path / "my run"), []
    slurm = Slurm(partitions=[Partition(name="gpu", max_time_h=2)])
    plan = plan.model_copy(update={"machine": plan.machine.model_copy(update={"name": "lab", "slurm": slurm})})
    monkeypatch.setattr(submitting, "check_job", lambda *_: None)
    monkeypatch.setattr(submitting, "submit", lambda *_: "77")
    monkeypatch.setattr(submitting, "live_jobs", lambda _: live)
    text = submitting.launch_job(plan, run, JobOptions(), Path("recipe.yaml"))
    log = run.attempt(1) / "log.txt"
    assert f"tail -F '{log}'\n" in text, "a pattern matches nothing while the job waits, and the shell looks only once"
    live.append("77")
    with pytest.raises(RunFolderError, match="job 77 has this run already") as caught:
        submitting.launch_job(plan, run, JobOptions(), Path("recipe.yaml"))
    assert f"aifactory-train cancel '{run.root}'" in caught.value.render()
