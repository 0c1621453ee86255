import re

import pytest

from aifactory_train.results.chart import MAX_POINTS, build_chart, running_mean, thin
from aifactory_train.results.report import summary, write_report
from aifactory_train.rundir import log_event
from results_run import a_run


def places(points):
    return [tuple(map(float, pair.split(","))) for pair in points.split()]


def test_a_chart_places_points_by_percent_from_the_top_left():
    chart = build_chart("t", [(0, 0.0), (50, 5.0), (100, 10.0)], str)
    assert places(chart.curve) == [(0, 100), (50, 50), (100, 0)]
    assert [t.place for t in chart.x_ticks] == [0, 50, 100] or len(chart.x_ticks) >= 3


@pytest.mark.parametrize("values", [[3.0], [3.0, 3.0], [0.0, 0.0], [1e-4, 2e-4], [2e9, 3e9]])
def test_a_chart_of_any_values_stays_within_its_frame(values):
    for base in (2, 10):
        chart = build_chart("t", list(enumerate(values, 1)), lambda v: f"{v:g}", base=base, from_zero=False)
        assert all(0 <= x <= 100 and 0 <= y <= 100 for x, y in places(chart.curve))
        assert all(0 <= t.place <= 100 for t in (*chart.x_ticks, *chart.y_ticks)) and len(chart.y_ticks) >= 2


def test_levels_belong_to_the_range_of_the_axis_and_unknown_ones_are_left_out():
    chart = build_chart("t", [(1, 1.0), (2, 2.0)], str, levels={"planned": 8.0, "unknown": None})
    assert [level.label for level in chart.levels] == ["planned"] and 0 <= chart.levels[0].place < 30


def test_memory_ticks_are_round_in_binary_units():
    chart = build_chart("t", [(1, 1.5 * 1024**3), (2, 3.9 * 1024**3)], lambda v: str(v / 1024**3), base=2)
    assert [t.label for t in chart.y_ticks] == ["0", "1", "2", "3", "4"]


def test_thinning_keeps_the_ends_and_every_spike():
    points = [(i, 1.0) for i in range(10_000)]
    points[4321] = (4321, 50.0)
    points[8765] = (8765, -50.0)
    kept = thin(points)
    assert len(kept) <= MAX_POINTS and kept == sorted(kept)
    assert {points[0], points[4321], points[8765], points[-1]} <= set(kept)


def test_a_running_mean_keeps_a_straight_line():
    line = [(i, 2.0 * i) for i in range(200)]
    assert [x for x, _ in running_mean(line)] == [x for x, _ in line]
    assert [y for _, y in running_mean(line)] == pytest.approx([y for _, y in line])


def test_a_report_is_written_for_one_two_and_ten_thousand_log_lines(tmp_path):
    for steps in ([1], [1, 10], range(1, 10_001)):
        run = a_run(tmp_path / str(len(steps)), steps)
        html = write_report(run).read_text()
        assert html.count("<figure") == 5 and run.result.exists()
        assert len(html) < 400_000


def test_a_report_links_to_nothing_outside_itself(tmp_path):
    html = write_report(a_run(tmp_path, range(10, 250, 10))).read_text()
    assert not re.search(r"https?:|\b(?:src|href|srcset|action)=|@import|url\(|<script|<link|<iframe", html)


def test_a_report_marks_checkpoints_and_resumes(tmp_path):
    html = write_report(a_run(tmp_path, range(10, 310, 10), resumed_from=150)).read_text()
    assert ">attempt 2</span>" in html and "rank 1 died of signal 9" in html
    assert html.count("<i style=") == 3


def test_what_a_run_wrote_cannot_become_markup(tmp_path):
    run = a_run(tmp_path, [1, 10])
    log_event(run, "fault", message="<script>alert(1)</script>")
    assert "&lt;script&gt;alert" in write_report(run).read_text()


def test_the_events_of_a_long_run_are_cut_in_the_middle(tmp_path):
    run = a_run(tmp_path, [1, 10])
    for step in range(300):
        log_event(run, "commit", step=step, seconds=0.1, bytes=1000)
    html = write_report(run).read_text()
    assert "202 more in events.jsonl" in html


def test_the_summary_sets_the_final_loss_beside_the_first_and_the_entropy(tmp_path):
    run = a_run(tmp_path, [1, *range(10, 250, 10)])
    text = summary(run)
    assert re.search(
        r"loss +\d\.\d{3} nats/token, mean of steps 221-240; 8\.\d{3} at step 1, unigram entropy of the corpus 5\.870",
        text,
    )
    assert re.search(r"throughput +\S+ k tokens/s measured, \S+ k tokens/s predicted", text)
    assert "not written yet" in text and "not exported yet" in text
    write_report(run)
    run.export.mkdir()
    assert str(run.report) in summary(run) and str(run.export) in summary(run)
