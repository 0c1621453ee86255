"""The statistics, the protocol and the turns of benchmarks/peers."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

import compare
import sides
import venvs
from aifactory_train.bench.paired import order_of_turns, ratio_line, ratio_of_medians
from measure import Comparison
from sides import OURS, Program
from worker import Task


def test_turns_go_forwards_and_backwards() -> None:
    assert order_of_turns(2, 4) == [0, 1, 1, 0, 0, 1, 1, 0]
    assert order_of_turns(3, 2) == [0, 1, 2, 2, 1, 0]


def test_without_noise_the_interval_is_the_ratio() -> None:
    assert ratio_of_medians([[150.0] * 3] * 5, [[100.0] * 3] * 5) == (1.5, 1.5, 1.5)


def test_one_slow_step_does_not_move_the_ratio() -> None:
    ours = [[150.0, 150.0, 1.0]] + [[150.0] * 3] * 5
    assert ratio_of_medians(ours, [[100.0] * 3] * 6) == (1.5, 1.5, 1.5)


def test_a_drift_that_both_sides_share_stays_out_of_the_interval() -> None:
    machine = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    ours, theirs = [[150 * m] * 3 for m in machine], [[100 * m] * 3 for m in machine]
    _, low, high = ratio_of_medians(ours, theirs)
    assert low == pytest.approx(1.5) and high == pytest.approx(1.5)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    draw = random.Random(3)
    held = 0
    for trial in range(20):
        ours = [[draw.gauss(130, 6) for _ in range(2)] for _ in range(8)]
        theirs = [[draw.gauss(100, 6) for _ in range(2)] for _ in range(8)]
        ratio, low, high = ratio_of_medians(ours, theirs, seed=trial)
        assert low <= ratio <= high and low < high
        held += low <= 1.3 <= high
    assert held >= 15


def test_too_few_or_unpaired_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="4 blocks of ours and 4 of theirs"):
        ratio_of_medians([[1.0]] * 4, [[1.0]] * 4)
    with pytest.raises(ValueError, match="6 blocks of ours and 5 of theirs"):
        ratio_of_medians([[1.0]] * 6, [[1.0]] * 5)


SIDE = """
import torch
from worker import serve
def step():
    print("a library talks")
    return torch.tensor(LOSS)
serve(step)
"""


def a_task(folder: Path, processes: int) -> Task:
    return Task(
        folder, device="cpu", seq_len_tokens=50, global_batch_rows=2, micro_batch_rows=1, processes=processes,
        threads=1, recompute=False, lr=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, grad_clip_norm=1.0,
    )  # fmt: skip


def a_comparison(
    folder: Path, monkeypatch: pytest.MonkeyPatch, peer: str, processes: int = 2, peer_loss: str = "7.0"
) -> Comparison:
    """Of ours and one peer, which is that code."""
    for name, code in ((OURS, SIDE.replace("LOSS", "7.0")), ("peer", peer.replace("LOSS", peer_loss))):
        (folder / f"{name}.py").write_text(code)
    programs = {name: Program(str(folder / f"{name}.py"), name) for name in (OURS, "peer")}
    monkeypatch.setattr(sides, "PROGRAMS", programs)
    return Comparison(a_task(folder, processes), {OURS: sys.executable, "peer": sys.executable})


@pytest.mark.parametrize("processes", [1, 2])
def test_sides_answer_each_block_whatever_their_libraries_print(tmp_path, monkeypatch, processes) -> None:
    comparison = a_comparison(tmp_path, monkeypatch, SIDE, processes)
    comparison.measure(n_blocks=2, steps=3, warm_up_steps=2)
    assert not comparison.failed and comparison.loss == {OURS: [7.0] * 2, "peer": [7.0] * 2}
    for name in (OURS, "peer"):
        assert [len(block.step_s) for block in comparison.blocks[name]] == [4, 4]
        assert [len(block) for block in comparison.rates(name)] == [3, 3], "the first step of a block does not count"
    assert "a library talks" in (tmp_path / "peer.log").read_text()


def test_a_side_that_dies_is_named_with_its_last_error_and_ours_goes_on(tmp_path, monkeypatch) -> None:
    comparison = a_comparison(tmp_path, monkeypatch, "raise ValueError('no such model')", processes=1)
    comparison.measure(n_blocks=1, steps=1, warm_up_steps=1)
    assert comparison.failed["peer"].startswith("ended (exit codes 1): ValueError: no such model; all of it: ")
    assert len(comparison.blocks[OURS]) == 1 and "peer" not in comparison.blocks


def test_a_side_that_trains_something_else_is_refused(tmp_path, monkeypatch) -> None:
    comparison = a_comparison(tmp_path, monkeypatch, SIDE, peer_loss="7.1")
    comparison.measure(n_blocks=1, steps=1, warm_up_steps=1)
    assert comparison.failed["peer"] == "does not train what ours does: losses up to 0.1000 apart, not 0.05"


def test_where_ours_fails_nothing_is_compared(tmp_path, monkeypatch) -> None:
    comparison = a_comparison(tmp_path, monkeypatch, SIDE)
    (tmp_path / "ours.py").write_text("raise SystemExit(7)")
    comparison.measure(n_blocks=1, steps=1, warm_up_steps=1)
    assert list(comparison.failed) == [OURS] and comparison.blocks == {"peer": []}


def test_each_side_is_a_file_and_has_an_environment() -> None:
    for name, program in sides.PROGRAMS.items():
        assert (sides.HERE / program.file).is_file(), name
        assert program.venv in {OURS, *venvs.NEEDS}, name


def test_what_cannot_run_on_a_cpu_is_left_out_there_with_the_reason() -> None:
    assert set(compare.PEERS) < set(sides.PROGRAMS)
    peers, left_out = compare.choose_peers(["litgpt", "torchtitan", "litgpt"], on_cpu=True)
    assert peers == ["litgpt"] and "triton" in left_out["torchtitan"]
    assert compare.choose_peers(["torchtitan"], on_cpu=False) == (["torchtitan"], {})


def test_a_peers_versions_take_the_place_of_ours() -> None:
    lines = venvs.constraints("litgpt")
    assert not [line for line in lines if line.startswith("huggingface")]
    assert f"torch=={venvs.torch_version()}" in lines and "huggingface_hub==1.3.7" in venvs.requirements("litgpt")


def test_the_line_of_a_ratio_is_one_that_programs_read() -> None:
    assert ratio_line("litgpt@2", 1.25, 1.0, 1.5) == "ratio_to litgpt@2 1.250 low 1.000 high 1.500"
