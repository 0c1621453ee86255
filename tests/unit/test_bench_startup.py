"""The phases of a start, from what a run leaves."""

from __future__ import annotations

import json
import sys
import time

import pytest

from aifactory_train.errors import TrainingFault
from aifactory_train.measure.startup import PHASES, measure_start_s, write_corpus
from aifactory_train.rundir import RunDir, append_jsonl


def test_phases_lie_end_to_end_and_add_up_to_the_whole(tmp_path):
    run, now_s = RunDir(tmp_path), time.time()
    names = ("process", "imported", "met", "built", "rehearsed")
    marks_s = {name: now_s + at for at, name in enumerate(names, start=1)}
    append_jsonl(run.events, {"event": "start", "marks_s": marks_s})
    append_jsonl(run.metrics, {"step": 1, "time_s": now_s + 8})
    phases_s = measure_start_s([sys.executable, "-c", ""], run, {}, 30.0)
    assert phases_s.pop("total") == pytest.approx(sum(phases_s.values()))
    assert list(phases_s) == list(PHASES)
    assert phases_s["imports"] == pytest.approx(1) and phases_s["first_step"] == pytest.approx(3)


def test_a_start_that_fails_or_does_not_end_is_a_fault_with_what_it_said(tmp_path):
    with pytest.raises(TrainingFault, match="ended with 3: no such file"):
        measure_start_s([sys.executable, "-c", "print('no such file'); exit(3)"], RunDir(tmp_path), {}, 30.0)
    with pytest.raises(TrainingFault, match="did not end within 0 s"):
        measure_start_s([sys.executable, "-c", "import time; time.sleep(60)"], RunDir(tmp_path), {}, 0.3)


def test_the_text_is_documents_of_many_lengths(tmp_path):
    texts = [json.loads(line)["text"] for line in write_corpus(tmp_path / "words.jsonl").read_text().splitlines()]
    assert len({len(text) for text in texts}) > 50
