import math
import re

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from aifactory_train.bench.cells import labels
from aifactory_train.bench.exports import render_markdown, render_openmetrics
from aifactory_train.bench.plots import MAX_LINES, Curve, box_plot, build_plot, ecdf, linear_axis, log_axis
from aifactory_train.bench.record import EnergyWindow, Judgement, Unavailable
from aifactory_train.bench.report import build_reader, render_report
from aifactory_train.bench.scaling import estimate_efficiency, estimate_scaling
from aifactory_train.bench.store import BenchDir, load_records
from aifactory_train.bench.tables import build_provenance, metric_rows
from bench_pages import STEP_S, a_collective, a_gemm, a_step, page
from bench_records import GEMM, PROVENANCE, a_record, write_folder


def headings(html):
    return re.findall(r"<h2>(.*?)</h2>", html)


def test_a_logarithmic_axis_gives_every_decade_the_same_room():
    axis = log_axis([1e6, 1e9], 10)
    assert [axis.place(v) for v in (1e6, 1e7, 1e8, 1e9)] == pytest.approx([0, 33.33, 66.67, 100])
    assert [math.log10(tick) for tick in axis.ticks] == pytest.approx([6, 7, 8, 9])


def test_less_than_two_decades_have_ticks_at_1_2_and_5_around_the_values():
    assert log_axis([3e9, 9e9], 10).ticks == [2e9, 5e9, 1e10]


@pytest.mark.parametrize("values", [[5.0], [1.0, 1.0], [0.0, 3.0], [0.3, 4e12], [32768.0, 2.0**30]])
@pytest.mark.parametrize("base", [2, 10])
def test_a_logarithmic_axis_holds_its_values_and_a_few_ticks(values, base):
    axis = log_axis(values, base)
    assert all(-0.01 <= axis.place(value) <= 100.01 for value in values if value > 0)
    assert 1 <= len(axis.ticks) <= 6 and all(-0.01 <= axis.place(tick) <= 100.01 for tick in axis.ticks)


def test_the_distribution_is_a_stair_from_the_smallest_sample_to_all_of_them():
    assert ecdf([3.0, 1.0]) == [(1.0, 0.0), (1.0, 0.5), (3.0, 0.5), (3.0, 1.0)]
    long = ecdf([float(i) for i in range(10_000)])
    assert len(long) < 500 and long[0] == (0.0, 0.0) and long[-1] == (9999.0, 1.0)


def test_lines_beyond_the_colours_are_named_and_not_drawn():
    curves = [Curve(f"cell {i}", [(0.0, 1.0), (1.0, 2.0)]) for i in range(MAX_LINES + 2)]
    axis = linear_axis([0.0, 2.0])
    plot = build_plot("t", curves, (axis, str), (axis, str), about="a")
    assert len(plot.lines) == MAX_LINES and f"cell {MAX_LINES}; cell {MAX_LINES + 1}" in plot.remarks[0]


def test_of_many_nodes_the_outliers_are_drawn_first_and_the_rest_is_counted():
    by_name = {f"n{i:03d}": [10.0 + i % 3, 11.0, 12.0] for i in range(100)}
    plot = box_plot("t", by_name, {"n077": "slow"}, str, note="", max_rows=24)
    assert [box.name for box in plot.boxes][:2] == ["n077", "n000"] and len(plot.boxes) == 24
    assert plot.n_left_out == 76 and plot.boxes[0].why == "slow"
    assert all(0 <= b.low <= b.first <= b.median <= b.third <= b.high <= 100 for b in plot.boxes)


def test_cells_are_named_by_what_parts_them_and_jobs_of_one_cell_by_their_hosts():
    one, two = a_record(cell={"dtype": "bf16", "m": 8, "n": 8}), a_record(cell={"dtype": "bf16", "m": 16, "n": 16})
    assert labels([one, two]) == ["m 8", "m 16"]
    assert labels([one, one.model_copy(update={"hosts": ["n9"]})]) == ["gemm, n1", "gemm, n9"]


def test_scaling_efficiency_is_beside_the_fewest_nodes_with_an_interval():
    noisy = [1.0 + (i * 7 % 11 - 5) / 200 for i in range(60)]
    one, two = estimate_efficiency({2: [0.9 * v for v in noisy], 1: noisy})
    assert (one.nodes, one.ratio, one.interval) == (1, 1.0, None)
    assert two.ratio == pytest.approx(0.9) and two.interval[0] < 0.9 < two.interval[1]
    assert two == estimate_efficiency({1: noisy, 2: [0.9 * v for v in noisy]})[1]


def test_a_scaling_interval_needs_more_than_a_few_steps():
    assert estimate_efficiency({1: [1.0] * 9, 2: [1.0] * 100})[1].interval is None


def test_weak_and_strong_scaling_are_parted_and_cells_of_another_model_left_out(tmp_path):
    steps = [a_step(0, 1, [1.0] * 20), a_step(1, 2, [1.25] * 20, 2000), a_step(2, 2, [0.8] * 20)]
    other, samples = a_step(3, 4, [9.0] * 20)
    other = other.model_copy(update={"cell": other.cell | {"model": "big"}})
    html = page(tmp_path, *steps, (other, samples))
    rows = re.findall(r'<td class="num">(\d)</td>\s*<td class="num">[^<]*</td>\s*<td class="num">([\d.]+) %</td>', html)
    assert rows == [("1", "100.0"), ("2", "79.9"), ("1", "100.0"), ("2", "62.4")]
    assert "Weak scaling" in html and "Strong scaling" in html and "(N0 = 1)" in html


def test_scaling_is_written_for_machines_too_with_its_mode_and_its_smallest_size(tmp_path):
    steps = [a_step(0, 1, [1.0] * 20), a_step(1, 2, [1.25] * 20, 2000), a_step(2, 4, [0.4] * 20)]
    folder = write_folder(tmp_path, [r for r, _ in steps], {r.id: samples for r, samples in steps})
    read, lost = build_reader(BenchDir(folder))
    weak, strong = estimate_scaling(load_records(folder), read)
    assert (weak.mode, weak.base_devices, [r.nodes for r in weak.sizes]) == ("weak", 1, [1, 2])
    assert strong.mode == "strong" and strong.sizes[1].ratio == pytest.approx(0.625, rel=0.01)
    families = {f.name: f for f in text_string_to_metric_families(render_openmetrics([], [weak, strong]))}
    samples = families["aifactory_train_scaling_efficiency_ratio"].samples
    found = {(s.labels["mode"], s.labels["base_gpus"], s.labels["gpus"], s.labels["stat"]): s.value for s in samples}
    assert found["weak", "1", "2", "ratio"] == pytest.approx(0.8, rel=0.01) and found["strong", "1", "4", "n"] == 20
    assert found["weak", "1", "2", "ci_low"] <= found["weak", "1", "2", "ratio"] <= found["weak", "1", "2", "ci_high"]
    assert ("weak", "1", "1", "ci_low") not in found and lost == {}
    assert "| strong | " in render_markdown([], {"n1": "it is slow"}, [strong])


def test_rows_of_a_micro_batch_follow_the_nodes_with_a_constant_batch_alone(tmp_path):
    one, two = a_step(0, 1, [1.0] * 20), a_step(1, 2, [0.6] * 20)
    fewer = two[0].model_copy(update={"cell": two[0].cell | {"layout": "dp_shard 2, tp 2, 4 x 2 rows"}})
    other = two[0].model_copy(update={"cell": two[0].cell | {"layout": "dp_shard 1, tp 4, 8 x 1 rows"}})
    by_id = {one[0].id: one[1], fewer.id: two[1]}
    assert [s.mode for s in estimate_scaling([one[0], fewer], lambda record: by_id[record.id])] == ["strong"]
    assert estimate_scaling([one[0], other], lambda record: by_id[record.id]) == []


def test_sections_without_data_are_left_out(tmp_path):
    assert headings(page(tmp_path, a_gemm(0, "n0", 1e12))) == ["All metrics", "Provenance"]
    html = page(tmp_path / "steps", a_step(0, 1, [1.0] * 20))
    assert headings(html) == ["Step time", "All metrics", "Provenance"]


def test_a_folder_without_records_says_so(tmp_path):
    html = page(tmp_path)
    assert "No records" in html and headings(html) == []


def test_the_slow_node_is_named_and_drawn_as_an_outlier(tmp_path):
    pairs = [a_gemm(i, f"n{i}", 7e11 if i == 2 else 1e12 + i * 1e9) for i in range(4)]
    html = page(tmp_path, *pairs)
    assert "<b>n2 is slow</b>" in html and "30.1 % worse than the median of the other nodes, 1.00 TFLOP/s" in html
    assert html.count('<span class="name bad">') == 1 and '<span class="name bad">n2</span>' in html


def test_nodes_that_wait_for_each_other_are_not_compared_by_their_speed(tmp_path):
    assert "Nodes beside each other" not in headings(page(tmp_path, a_step(0, 2, [1.0] * 20)))


def test_spikes_are_marked_with_their_kind_and_the_rank_is_named(tmp_path):
    record, samples = a_step(0, 4, [1.0] * 30)
    for rank in range(4):
        samples[STEP_S][rank][5] = 3.0
    samples[STEP_S][3][12] = 2.0
    html = page(tmp_path, (record, samples))
    assert html.count('<i class="dot system"') == 1 and html.count('<i class="dot straggler"') == 1
    assert "once on most ranks (step 6); once on rank 3 on n3 (step 13)" in html
    assert "2 of 30 steps lie farther right, up to 3 s" in html


def test_a_known_wire_is_a_line_and_an_unknown_one_a_sentence(tmp_path):
    known = {"ceiling_bytes_per_s": 1e11, "why_unknown": ""}
    html = page(tmp_path, *(a_collective(i, 2**15 << i, 1e9 * (i + 1), known) for i in range(4)))
    assert "wire ceiling 100 GB/s" in html and "No wire ceiling" not in html
    unknown = {"ceiling_bytes_per_s": None, "why_unknown": "the machine file has no rate of the NICs"}
    html = page(tmp_path / "b", *(a_collective(i, 2**15 << i, 1e9 * (i + 1), unknown) for i in range(4)))
    assert "No wire ceiling: the machine file has no rate of the NICs." in html and 'class="level"' not in html


def test_a_dip_over_sizes_and_rates_above_the_wire_are_said(tmp_path):
    wire = {"ceiling_bytes_per_s": 3.5e9}
    html = page(tmp_path, *(a_collective(i, 2**15 << i, rate, wire) for i, rate in enumerate((1e9, 4e9, 2e9))))
    assert 'title="dip at 128 KiB"' in html and "1 of 3 medians lie above the wire ceiling" in html


def test_energy_stands_beside_throughput_and_what_was_not_read_has_its_reason(tmp_path):
    window = EnergyWindow(scope="gpu", method="nvml_counter", joules=4000.0, seconds=20.0)
    missed = Unavailable(probe="rapl", reason="energy_uj: Permission denied")
    facts = {"window": {"tokens": 20_000}, "warnings": ["4000 J by nvml_counter, 9000 J by nvml_power"]}
    measured = a_step(0, 1, [1.0] * 20, energy=[window], facts=facts)
    html = page(tmp_path, measured, a_step(1, 2, [0.5] * 20, unavailable=[missed]))
    assert "Energy disagrees" in html and "9000 J by nvml_power" in html
    assert "0.2 J/token" in html and "200 W" in html and "not read" in html
    assert "energy_uj: Permission denied" in html and "(1 of 2 records)" in html


def test_the_plan_stands_beside_what_was_measured(tmp_path):
    facts = {"predicted": {"step_duration_s": 0.8, "peak_memory_bytes": None}, "measured": {"step_duration_s": 1.0}}
    html = page(tmp_path, a_step(0, 1, [1.0] * 20, facts=facts))
    assert "Plan beside measured" in headings(html) and "+25.0 %" in html and "memory peak" not in html


def test_verdicts_faults_and_node_lists_head_the_page(tmp_path):
    bad = Judgement(metric=GEMM, verdict="regression", reference=2e12, tolerance_frac=0.02, why="half of it")
    fault = a_record(id="f", metrics=[], protocol=None, fault="rank 3 on n7 is gone", hosts=["n7"])
    tmp_path.joinpath("missing_nodes.txt").write_text("n[7-8]\n")
    html = page(tmp_path, a_gemm(0, "n0", 1e12, verdicts=[bad]), (fault, {}))
    assert "half of it" in html and "rank 3 on n7 is gone" in html and "n[7-8]" in html
    assert "1 ended with a fault" in html and re.search(r"<b>0 <small>of 1 pass", html)


def test_the_same_finding_many_times_is_cut(tmp_path):
    faults = [(a_record(id=f"f{i}", metrics=[], protocol=None, fault=f"fault number {i}"), {}) for i in range(30)]
    html = page(tmp_path, *faults)
    assert html.count("fault number") == 12 and "18 more like these" in html


def test_the_metrics_of_a_cell_stand_below_its_name():
    record, _ = a_step(0, 2, [1.0] * 20)
    rows = metric_rows([record])["step"]
    assert [bool(row.cell) for row in rows] == [True, False, False] and rows[0].hosts == "n0, n1"
    assert (rows[0].median, rows[0].n, rows[0].worst) == ("1 s", 20, "rank 1 on n1, 1 s")


def test_what_differs_between_nodes_is_told_with_the_nodes():
    other = PROVENANCE | {"versions": PROVENANCE["versions"] | {"torch": "2.12.1"}, "command": ["b"]}
    records = [a_record(provenance=PROVENANCE | {"command": ["a"]}), a_record(provenance=other, hosts=["n2"])]
    found = build_provenance(records)
    assert found.different == [("versions.torch", [("2.13.0", "n1"), ("2.12.1", "n2")])]
    assert ("versions.python", "3.11.2") in found.common


def test_samples_that_cannot_be_read_are_named_and_the_rest_is_shown(tmp_path):
    record, samples = a_step(0, 1, [1.0] * 20)
    write_folder(tmp_path, [record], {record.id: samples})
    (tmp_path / "records" / f"{record.id}.samples.jsonl.zst").write_bytes(b"no zstd")
    html = render_report(BenchDir(tmp_path))
    assert "What could not be read" in headings(html) and "All metrics" in headings(html)


def test_the_page_links_to_nothing_and_records_cannot_become_markup(tmp_path):
    html = page(tmp_path, a_gemm(0, "n<script>alert(1)</script>", 1e12), a_step(1, 2, [1.0] * 20))
    assert not re.search(r"https?:|\b(?:src|href|srcset|action)=|@import|url\(|<script|<link|<iframe", html)
    assert "&lt;script&gt;alert" in html and "default-src 'none'" in html
