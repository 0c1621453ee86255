"""A tuning over a bench folder: what it runs next, where it goes on, and what it leaves; nothing is started here."""

from __future__ import annotations

import json
import shlex
from datetime import UTC, datetime, timedelta

import pytest

from aifactory_train.bench.finish import finish
from aifactory_train.bench.judge import judge_folder
from aifactory_train.bench.record import build_metric
from aifactory_train.bench.rounds import Wish, build_tuning, longest_s
from aifactory_train.bench.suites import load_asked, load_suite, write_asked
from aifactory_train.bench.tune import STEP_DURATION
from aifactory_train.cli import main
from aifactory_train.errors import RunFolderError, UserError
from aifactory_train.launch.bench import begin_job, go_on_job, launch_bench
from aifactory_train.launch.checks import JobOptions
from aifactory_train.machine.load import load_machine, write_machine
from aifactory_train.machine.machine import ByDtype, Device, Host, Machine, Measured
from aifactory_train.machine.site import Partition, Slurm
from aifactory_train.plan.plan import make_plan
from aifactory_train.recipe.load import load_recipe
from bench_records import a_record, write_folder
from training_runs import write_recipe

RATES = Measured(matmul_flops_per_s=ByDtype(fp32=5e10), memory_bytes_per_s=1e10)
HERE = Machine(
    name="here", device=Device(kind="cpu", name="a CPU", per_node=1), host=Host(cores=2), measured=RATES
)  # fmt: skip
LAB = HERE.model_copy(
    update={"name": "lab", "slurm": Slurm(partitions=[Partition(name="batch", max_nodes=4, max_time_h=24)])}
)
NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)


@pytest.fixture
def recipe(tmp_path):
    """Of two rows on each of two ranks: micro-batches of one or two."""
    shape = {"train__global_batch_tokens": 256, "train__budget_tokens": 5120, "train__compile": False}
    return write_recipe(tmp_path, tmp_path, tmp_path, **shape)


class Tuned:
    """A bench folder, and programs of which only the traces are left: each begins a minute after the one before."""

    def __init__(self, folder, recipe, machine=HERE):
        self.folder, self.machine, self.minute = folder, machine, 0
        self.asked = build_tuning(load_suite("train"), machine, 1, 2, Wish(recipe, ["train.seed=7"], 1))
        self.names = [candidate.name for candidate in self.asked.tuning.candidates]
        write_asked(self.asked, folder)
        write_machine(machine, folder / f"{machine.name}.yaml")
        (folder / "recipe.yaml").write_text(self.asked.tuning.text)

    def begin(self):
        return [line.split("\t") for line in begin_job(self.folder, "n1")]

    def go_on(self):
        return [line.split("\t") for line in go_on_job(self.folder)]

    def end(self, words, step_s=None, fault=None, code=None):
        """The program of a line ends with a record of its steps, of a fault, or without one."""
        self.minute += 1
        began = NOON + timedelta(minutes=self.minute)
        fields = {"benchmark": "step", "hosts": ["n1", "n1"], "cell": {"number": words[0]}, "fault": fault}
        fields |= {"started": (began + timedelta(seconds=3)).isoformat(), "id": f"r{self.minute}"}
        if step_s is not None:
            n = int(words[words.index("--steps") + 1])
            samples = [step_s * (1 + 0.01 * i / n) for i in range(n)]
            metric = build_metric(STEP_DURATION, "lower", {0: samples}, ["n1"], "max")
            self.write(a_record(metrics=[metric], **fields))
        elif fault is not None:
            self.write(a_record(metrics=[], protocol=None, **fields))
        code = int(step_s is None) if code is None else code
        end = {"cell": int(words[0]), "exit_code": code, "began": began.isoformat(), "seconds": 30}
        with open(self.folder / "ends.jsonl", "a") as f:
            f.write(json.dumps(end) + "\n")

    def write(self, record):
        suite = (self.folder / "suite.json").read_bytes()
        write_folder(self.folder, [record])
        (self.folder / "suite.json").write_bytes(suite)

    def search(self):
        return json.loads((self.folder / "tuning.json").read_text())


@pytest.fixture
def tuned(tmp_path, recipe):
    (tmp_path / "out").mkdir()
    return Tuned(tmp_path / "out", recipe)


def test_the_folder_alone_says_which_runs_come_next_and_in_the_end_which_was_fastest(tuned, capsys):
    first = tuned.begin()
    assert [line[:2] for line in first] == [[str(n + 1), "step"] for n in range(len(tuned.names))]
    assert len(first) >= 2 and all(line[line.index("--steps") + 1] == "10" for line in first)
    assert all(line[line.index("--recipe") + 1] == str(tuned.folder / "recipe.yaml") for line in first)
    for line, step_s in zip(first, (2.0, 1.0, 3.0), strict=False):
        tuned.end(line, step_s)
    (last,) = tuned.go_on()
    assert int(last[0]) == len(first) + 1 and last[last.index("--steps") + 1] == "100"
    tuned.end(last, 1.0)
    assert tuned.go_on() == [] and finish(tuned.folder) == 0
    assert tuned.search()["best"] == tuned.names[1] and tuned.search()["finished"]
    said = capsys.readouterr().out
    assert f"aifactory-train calibrate {tuned.folder}/here.yaml {tuned.folder}" in said
    assert f"launch {tuned.folder}/tuned.yaml --machine {tuned.folder}/here.yaml --nodes 1 --cpu-ranks 2" in said
    assert "place" in (tuned.folder / "tuning.md").read_text() or "slower" in (tuned.folder / "tuning.md").read_text()
    given = load_recipe(tuned.asked.tuning.recipe, ["train.seed=7", *tuned.asked.tuning.candidates[1].sets()])
    assert make_plan(load_recipe(tuned.folder / "tuned.yaml"), HERE, 1, 2) == make_plan(given, HERE, 1, 2)


def test_a_run_that_was_broken_off_is_run_again_and_its_fault_forgotten(tuned):
    first = tuned.begin()
    tuned.end(first[0], 1.0)
    tuned.write(a_record(metrics=[], protocol=None, fault="asked to stop", benchmark="step", id="broken",
                         started=(NOON + timedelta(hours=1)).isoformat()))  # fmt: skip
    assert [line[0] for line in tuned.begin()] == [line[0] for line in first[1:]]
    assert not (tuned.folder / "records/broken.json").exists()
    assert [cell.number for cell in load_asked(tuned.folder).cells] == [int(line[0]) for line in first]


def test_what_failed_is_given_up_with_its_reason_and_says_nothing_against_the_node(tuned):
    first = tuned.begin()
    tuned.end(first[0], fault="out of memory on cuda:0")
    tuned.end(first[1], 0.1, code=1)  # its ranks did not come to an end
    for line in first[2:]:
        tuned.end(line, 1.0 + int(line[0]))
    assert first[0][0] not in [line[0] for line in tuned.begin()], "it is not run again in another job either"
    tuned.end(tuned.go_on()[0], 1.0)
    assert finish(tuned.folder) == 0 and tuned.search()["best"] == tuned.names[2]
    assert next(c for c in tuned.search()["candidates"] if c["name"] == tuned.names[0])["stopped"].startswith("out of")
    verdict = judge_folder(tuned.folder, NOON.date())
    assert verdict.nodes.failing == [] and verdict.exit_code == 0
    assert {j.verdict for r in verdict.records for j in r.verdicts} == {"skipped", "no_reference"}


def test_where_nothing_ran_the_exit_code_says_so_and_no_recipe_is_written(tuned, capsys):
    for line in tuned.begin():
        tuned.end(line, code=137)
    assert tuned.go_on() == [] and finish(tuned.folder) == 2
    assert finish(tuned.folder) == 2, "it can be judged again"
    assert "No candidate ran." in capsys.readouterr().out and not (tuned.folder / "tuned.yaml").exists()
    assert len(list((tuned.folder / "records").glob("*.json"))) == len(tuned.names), "a fault of each, once"
    assert "ended with exit code 137" in tuned.search()["candidates"][0]["stopped"]


def test_a_search_that_is_not_finished_says_how_it_goes_on(tuned, capsys):
    tuned.end(tuned.begin()[0], 1.0)
    assert finish(tuned.folder) == 2
    assert "Not finished" in capsys.readouterr().out and not (tuned.folder / "tuned.yaml").exists()
    assert tuned.begin() != []


def test_rates_that_nobody_measured_are_measured_first(tmp_path, recipe):
    bare = HERE.model_copy(update={"measured": Measured()})
    tuned = Tuned(tmp_path / "out", recipe, bare)
    gemm, memory, *steps = tuned.begin()
    assert gemm[7:10] == ["--dtypes", "fp32", "--sizes"] and "--recipe" in gemm and "--alone" in gemm
    assert memory[7:9] == ["--kernels", "copy"] and "--recipe" not in memory
    assert len(steps) == len(tuned.names)


def test_the_same_command_goes_on_and_another_recipe_is_refused(tuned, capsys):
    for line in tuned.begin():
        tuned.end(line, float(line[0]))
    tuned.end(tuned.go_on()[0], 1.0)
    path, suite = tuned.asked.tuning.recipe, load_suite("train")
    wish = Wish(tuned.folder / path, ["train.seed=7"], 1)
    faster = Measured(matmul_flops_per_s=ByDtype(fp32=9e11), memory_bytes_per_s=1e10)
    calibrated = HERE.model_copy(update={"measured": faster})
    assert launch_bench(suite, calibrated, 1, 2, tuned.folder, JobOptions(), wish) == 0
    assert "0 of" in capsys.readouterr().out
    assert load_asked(tuned.folder).tuning == tuned.asked.tuning, "other predictions are no other search"
    for other, what in ((Wish(wish.recipe, [], 1), "overrides"), (Wish(wish.recipe, wish.sets, 2), "layouts")):
        with pytest.raises(RunFolderError, match=f"different: {what}"):
            launch_bench(suite, HERE, 1, 2, tuned.folder, JobOptions(), other)
    with pytest.raises(RunFolderError, match="different: tuned recipe"):
        launch_bench(suite, HERE, 1, 2, tuned.folder, JobOptions())


def test_a_dry_run_shows_candidates_and_the_first_round_and_a_job_asks_for_time_for_all_rounds(
    tmp_path, recipe, capsys
):
    wish, out = Wish(recipe, [], 1), tmp_path / "out"
    for machine in (HERE, LAB):
        launch_bench(load_suite("train"), machine, 1, 2, out, JobOptions(dry_run=True), wish)
        said = capsys.readouterr().out
        n = said.count("# candidate ")
        assert n >= 1 and said.count("step.py --steps 10") == n and "a step predicted" in said
    asked = build_tuning(load_suite("train"), LAB, 1, 2, wish)
    assert longest_s(asked) > sum(cell.timeout_s for cell in asked.cells)
    assert not out.exists()


def test_a_bench_that_is_no_tuning_has_no_second_round(tuned):
    write_asked(tuned.asked.model_copy(update={"tuning": None}), tuned.folder)
    assert tuned.begin() != [] and tuned.go_on() == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("node --tune --recipe {recipe}", "--tune with node"),
        ("report . --tune --recipe {recipe}", "--tune with report"),
        ("train --tune", "--tune without a recipe"),
        ("train --layouts 3 --recipe {recipe}", "--recipe, --layouts without --tune"),
        ("train --tune --recipe {recipe} --layouts 0", "--layouts is 0"),
        ("train --tune --recipe {recipe} --set 'train.seed=1\t2'", "holds a tab"),
        ("train --tune --recipe {recipe} --set layout.tp=3", "tp"),
        ("train --tune --recipe no.yaml", "cannot read"),
        ("train --tune --recipe configs/recipes/llama3-8b.yaml --machine h200-node --dry-run", "memory"),
    ],
)
def test_a_slip_is_a_message_and_exit_code_3(words, said, recipe, capsys):
    assert main(["bench", *shlex.split(words.format(recipe=recipe))]) == 3
    told = capsys.readouterr().err
    assert said in told and "do:" in told and "Traceback" not in told


def test_a_recipe_of_which_nothing_can_be_trained_is_refused(monkeypatch, recipe):
    monkeypatch.setattr("aifactory_train.bench.rounds.choose_candidates", lambda *given: [])
    with pytest.raises(UserError, match="trains no layout of recipe tiny"):
        build_tuning(load_suite("train"), load_machine("h200-node"), 1, 1, Wish(recipe, [], 1))
