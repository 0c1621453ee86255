"""Suite files, the cells that they become on a machine, and the folder that they leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from aifactory_train.bench.suites import (
    Asked,
    Cell,
    Suite,
    build_asked,
    cell_words,
    cells_to_run,
    check_nodes,
    join_folder,
    load_asked,
    load_suite,
    programs_dir,
    suite_names,
    write_asked,
)
from aifactory_train.errors import RunFolderError, UserError
from aifactory_train.machine.machine import Device, Host, Machine
from aifactory_train.rundir import append_jsonl

CPU = Machine(name="lab", device=Device(kind="cpu", name="a CPU", per_node=1), host=Host(cores=2))
GPU = Machine(name="lab", device=Device(kind="cuda", name="a GPU", per_node=4), host=Host(cores=32))


def a_suite(**entry: object) -> Suite:
    base = {"program": "gemm", "scope": "job", "budget_s": 10, "cpu": "--dtypes fp32", "gpu": "--dtypes bf16"}
    return Suite.model_validate({"name": "own", "about": "a test", "programs": [{**base, **entry}]})


def cells(machine: Machine, n_nodes: int, ranks_per_node: int, **entry: object) -> list[Cell]:
    return build_asked(a_suite(**entry), machine, n_nodes, ranks_per_node).cells


def test_the_five_suites_are_there_and_every_file_that_they_name():
    assert suite_names() == ["node", "pair", "scale", "smoke", "train"]
    for suite in map(load_suite, suite_names()):
        for machine in (CPU, GPU):
            asked = build_asked(suite, machine, 4, 4)
            for word in (word for cell in asked.cells for word in cell_words(cell, asked, Path("out"))):
                assert not word.startswith(str(programs_dir().parent)) or Path(word).exists(), word


def test_options_are_those_of_the_kind_of_device_and_without_them_a_program_is_left_out():
    assert cells(CPU, 1, 1)[0].options == ["--dtypes", "fp32"]
    assert cells(GPU, 1, 4)[0].options == ["--dtypes", "bf16"]
    asked = build_asked(a_suite(cpu=None), CPU, 1, 1)
    assert asked.cells == [] and asked.left_out == ["gemm: this suite does not run it on a cpu device"]


def test_ranks_are_one_for_each_device_or_one_on_a_node():
    assert [(c.n_nodes, c.ranks_per_node) for c in cells(GPU, 2, 4)] == [(2, 4)]
    assert [(c.n_nodes, c.ranks_per_node) for c in cells(GPU, 2, 4, ranks="one")] == [(2, 1)]
    assert [c.n_nodes for c in cells(GPU, 6, 4, nodes="powers_of_two")] == [1, 2, 4]


def test_a_program_that_needs_more_ranks_is_left_out_and_a_node_alone_has_only_its_own():
    assert len(cells(CPU, 2, 1, least_ranks=2)) == 1
    assert cells(CPU, 2, 1, least_ranks=2, scope="node") == []
    asked = build_asked(a_suite(least_ranks=2), CPU, 1, 1)
    assert asked.left_out == ["gemm: needs 2 ranks on 1 node(s), there are 1 on 1"]


def test_only_a_node_alone_is_told_so():
    for scope, alone in (("node", True), ("job", False)):
        asked = build_asked(a_suite(scope=scope), CPU, 1, 1)
        words = cell_words(asked.cells[0], asked, Path("/out"))
        assert words[0] == str(programs_dir() / "gemm.py") and ("--alone" in words) == alone
        assert words[words.index("--machine") + 1] == "/out/lab.yaml", "programs call the machine by that name"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("about: x\nprograms: []\n", "programs"),
        ("about: x\nprograms:\n  - {program: gem, scope: job, budget_s: 1}\n", "'gem'"),
        ("about: x\nprograms:\n  - {program: gemm, scope: job, budget: 1}\n", "did you mean budget_s?"),
        ('about: x\nprograms:\n  - {program: gemm, scope: job, budget_s: 1, cpu: "--a \'b"}\n', "No closing quotation"),
    ],
)
def test_a_fault_of_a_suite_file_is_told_with_its_line(tmp_path, text, what):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_suite(str(tmp_path / "own.yaml"))
    assert what in caught.value.render() and "own.yaml:" in caught.value.render()


def test_an_unknown_suite_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"did you mean smoke\?"):
        load_suite("smok")


def test_a_suite_is_refused_on_nodes_that_it_is_not_for():
    check_nodes(load_suite("pair"), 2)
    with pytest.raises(UserError, match="--nodes 2"):
        check_nodes(load_suite("pair"), 1)
    with pytest.raises(UserError, match="--nodes 1"):
        check_nodes(load_suite("smoke"), 2)


def an_asked(**changes: object) -> Asked:
    return build_asked(a_suite(), CPU, 1, 1).model_copy(update=changes)


def test_what_was_asked_is_read_back_as_it_was_written(tmp_path):
    asked = an_asked(hosts=["n1"])
    write_asked(asked, tmp_path)
    assert load_asked(tmp_path) == asked
    join_folder(an_asked(), tmp_path)


@pytest.mark.parametrize("changes", [{"suite": "other"}, {"machine": "other"}, {"nodes": 2}, {"cells": []}])
def test_a_folder_of_another_bench_is_refused(tmp_path, changes):
    write_asked(an_asked(), tmp_path)
    with pytest.raises(RunFolderError, match=f"different: {next(iter(changes))}"):
        join_folder(an_asked(**changes), tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(RunFolderError, match="no bench"):
        join_folder(an_asked(), tmp_path)
    with pytest.raises(RunFolderError, match="is a file"):
        join_folder(an_asked(), tmp_path / "thesis.txt")


def test_only_what_has_not_ended_well_is_run_again(tmp_path):
    asked = build_asked(a_suite(nodes="powers_of_two"), GPU, 4, 4)
    end = {"began": "2026-11-23T21:00:00Z", "seconds": 1.0}
    for cell, code in ((1, 0), (2, 124), (3, 1), (3, 0)):
        append_jsonl(tmp_path / "ends.jsonl", {"cell": cell, "exit_code": code, **end})
    assert [cell.number for cell in cells_to_run(asked, tmp_path)] == [2]
