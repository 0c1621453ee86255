"""Judged records as other programs read them, checked by those programs' own schemas and parsers."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import lxml.etree as lxml
import reframe
import yaml
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from aifactory_train.bench.exports import render_bmf, render_csv, render_junit, render_markdown, render_openmetrics
from aifactory_train.bench.metric_names import NAMES
from aifactory_train.bench.record import EnergyWindow, Judgement, Record, Verdict
from bench_records import GEMM, a_metric, a_record

ROOT = Path(__file__).resolve().parent.parent.parent
# The schema of the Ant JUnit tasks by Windy Road, as ReFrame carries it.
SCHEMA = Path(reframe.__file__).parent / "schemas" / "junit.xsd"


def judged(verdict: Verdict, number: int = 0, **changes: object) -> Record:
    known = verdict in ("pass", "regression", "improvement")
    judgement = Judgement(
        metric=GEMM,
        verdict=verdict,
        reference=110.0 if known else None,
        tolerance_frac=0.07 if known else None,
        why=f'100 FLOP/s beside 110 & "more"\x1b[31m <{verdict}>',
    )
    return a_record(**({"id": f"r{number}", "hosts": [f"n{number}"] * 2, "verdicts": [judgement]} | changes))


VERDICTS: tuple[Verdict, ...] = ("pass", "regression", "improvement", "no_reference", "unstable", "degraded", "invalid")
NOTHING = [
    Judgement(metric="", verdict=verdict, reference=None, tolerance_frac=None, why=f"why {verdict}")
    for verdict in ("incomplete", "skipped")
]
ALL = [
    *(judged(verdict, i) for i, verdict in enumerate(VERDICTS)),
    *(a_record(id=f"e{i}", metrics=[], protocol=None, verdicts=[j]) for i, j in enumerate(NOTHING)),
]


def test_junit_follows_the_schema_and_has_the_numbers() -> None:
    document = lxml.fromstring(render_junit(ALL).encode())
    schema = lxml.XMLSchema(lxml.parse(str(SCHEMA)))
    assert schema.validate(document), schema.error_log
    values = {p.get("name"): p.get("value") for p in document[1].iter("property")}
    assert values == {
        "verdict": "regression",
        "value": "100.0",
        "unit": "FLOP/s",
        "ci_low": "99.8",
        "ci_high": "100.2",
        "n": "10",
        "reference": "110.0",
        "tolerance": "0.07",
        "result_id": "r1",
        "hosts": "n1",
    }
    failure = document[1].find("testcase/failure")
    assert failure is not None and "regression on n1: 100 FLOP/s beside 110" in failure.get("message")


def test_junit_says_what_is_red_what_is_broken_and_what_was_skipped() -> None:
    document = lxml.fromstring(render_junit(ALL).encode())
    found = {}
    for suite in document:
        (verdict,) = (p.get("value") for p in suite.iter("property") if p.get("name") == "verdict")
        children = [child.tag for child in suite.find("testcase")]
        counts = [suite.get(name) for name in ("failures", "errors", "skipped")]
        found[verdict] = ("".join(children), "".join(counts))
    green, red, broken = ("", "000"), ("failure", "100"), ("error", "010")
    assert found == {
        **dict.fromkeys(("pass", "improvement", "no_reference"), green),
        **dict.fromkeys(("regression", "degraded", "invalid"), red),
        **dict.fromkeys(("unstable", "incomplete"), broken),
        "skipped": ("skipped", "001"),
    }
    assert document[-1].find("testcase/skipped").text == "why skipped"


def test_openmetrics_is_read_by_the_parser_of_prometheus() -> None:
    text = render_openmetrics(ALL)
    families = {family.name: family for family in text_string_to_metric_families(text)}
    medians = [s for s in families[GEMM].samples if s.labels["stat"] == "median" and s.labels["id"] == "r1"]
    assert [(s.value, s.labels["dtype"], s.labels["hosts"]) for s in medians] == [(100.0, "bf16", "n1")]
    assert {s.labels["stat"] for s in families[GEMM].samples} >= {"ci_low", "ci_high", "p95", "worst_rank", "n"}
    verdicts = {(s.labels["id"], s.labels["verdict"]) for s in families["aifactory_benchmark_verdict"].samples}
    assert ("r1", "regression") in verdicts and len(verdicts) == len(ALL)
    info = families["aifactory_benchmark"].samples[0]
    assert info.name == "aifactory_benchmark_info" and info.labels["torch"] == "2.13.0"


def test_every_metric_name_of_ours_is_a_legal_one() -> None:
    metrics = [a_metric(name, unit=known.unit, better=known.better) for name, known in NAMES.items()]
    record = a_record(metrics=metrics, cell={"layout": 'tp 2, "odd"\\\n', "odd-key": True})
    families = {family.name: family for family in text_string_to_metric_families(render_openmetrics([record]))}
    assert len(families) == len(NAMES) + 2
    labels = families[GEMM].samples[0].labels
    assert labels["layout"] == 'tp 2, "odd"\\\n' and labels["odd_key"] == "True"


def test_bencher_gets_the_median_and_its_interval() -> None:
    found = json.loads(render_bmf([judged("pass"), a_record(id="few", samples=[1.0, 2.0], hosts=["n7"])]))
    key = "here/benchmark=gemm,dtype=bf16,k=1024,m=1024,n=1024 on n0"
    assert found[key] == {GEMM: {"value": 100.0, "lower_value": 99.8, "upper_value": 100.2}}
    assert found[key.replace("n0", "n7")][GEMM] == {"value": 1.5, "lower_value": 1.0, "upper_value": 2.0}


def test_markdown_has_every_verdict_and_number_in_one_row_each() -> None:
    text = render_markdown(ALL)
    rows = [line for line in text.splitlines() if line.startswith("| gemm")]
    assert len(rows) == len(ALL) and "1 regression" in text and "1 incomplete" in text
    assert "100 FLOP/s | 99.8 FLOP/s to 100 FLOP/s | 10 | 100 FLOP/s, rank 0 on n1" in rows[1]
    assert {line.count(" | ") for line in rows} == {9}


def test_csv_has_the_columns_of_caraml_for_a_step() -> None:
    step, rate = "aifactory_train_step_duration_seconds", "aifactory_train_tokens_per_second"
    flops = "aifactory_train_model_flops_per_second_per_gpu"
    record = a_record(
        benchmark="step",
        hosts=["n1", "n1", "n2", "n2"],
        cell={"devices": 4, "gbs_tokens": 8192, "layout": "pp 2, dp_shard 2, 2 x 1 rows"},
        metrics=[
            a_metric(step, [0.5] * 10, unit="s", better="lower"),
            a_metric(rate, [16384.0] * 10, unit="tokens/s"),
            a_metric(flops, [2e12] * 10),
        ],
        energy=[EnergyWindow(scope="gpu", method="nvml_counter", joules=1638.4, seconds=10.0)],
        facts={"window": {"tokens": 163840}},
    )
    rows = list(csv.DictReader(io.StringIO(render_csv([record, a_record()]))))
    caraml = {"System": "here", "Nodes": "2", "Devices": "4", "GBS": "8192", "PP": "2", "TP": "1", "DP": "2"}
    caraml |= {"Time/iteration": "0.5", "Tokens/second": "16384.0", "Avg_TFLOPs/GPU": "2.0", "JPerToken": "0.01"}
    assert len(rows) == 6 and all({name: row[name] for name in caraml} == caraml for row in rows[:5])
    assert (rows[5]["PP"], rows[5]["Median"], rows[5]["CILow"], rows[5]["N"]) == ("", "100.0", "99.8", "10")


def test_energy_of_a_token_is_in_all_exports_by_scope_and_without_an_interval() -> None:
    windows = [
        EnergyWindow(scope="gpu", method="nvml_counter", joules=50.0, seconds=10.0),
        EnergyWindow(scope="node", method="pm_counters", joules=90.0, seconds=10.0),
    ]
    record = judged("pass", energy=windows, facts={"window": {"tokens": 100}, "warnings": ["they disagree"]})
    rows = [row for row in csv.DictReader(io.StringIO(render_csv([record]))) if row["Unit"] == "J/token"]
    assert [(row["Scope"], row["Method"], row["Median"], row["CILow"], row["N"]) for row in rows] == [
        ("gpu", "nvml_counter", "0.5", "", "1"),
        ("node", "pm_counters", "0.9", "", "1"),
    ]
    families = {family.name: family for family in text_string_to_metric_families(render_openmetrics([record]))}
    found = {
        (sample.labels["scope"], sample.labels["method"], sample.labels["stat"]): sample.value
        for sample in families["aifactory_train_energy_per_token_joules"].samples
    }
    assert found["gpu", "nvml_counter", "window"] == 0.5 and found["node", "pm_counters", "n"] == 1
    text = render_markdown([record])
    name = "aifactory_train_energy_per_token_joules{scope=gpu,method=nvml_counter}"
    assert f"| {name} | 0.5 J/token | none, one window | 1 | - | - | they disagree |" in text


def test_without_a_count_of_tokens_there_is_no_energy_of_a_token() -> None:
    window = EnergyWindow(scope="gpu", method="nvml_counter", joules=50.0, seconds=10.0)
    assert "J/token" not in render_csv([judged("pass", energy=[window])])


def test_the_patterns_of_jube_find_their_columns() -> None:
    benchmark = yaml.safe_load((ROOT / "benchmarks" / "jube" / "aifactory.yaml").read_text())
    metrics = {parameter["_"] for parameter in benchmark["parameterset"][1]["parameter"]}
    assert {name.strip() for name in ",".join(metrics).split(",")} <= set(NAMES)
    record = judged("regression", energy=[EnergyWindow(scope="gpu", method="rapl", joules=5.0, seconds=1.0)])
    line = render_csv([record]).splitlines()[1]
    patterns = {p["name"]: p["_"].replace("$metric", GEMM) for p in benchmark["patternset"]["pattern"]}
    found = {name: match[1] for name, pattern in patterns.items() if (match := re.search(pattern, line))}
    expected = {"system": "here", "n_nodes": "1", "n_devices": "2", "energy_j": "5.0", "median": "100.0"}
    expected |= {"ci_low": "99.8", "ci_high": "100.2", "n_samples": "10", "verdict": "regression", "pp": ""}
    assert {name: found[name] for name in expected} == expected
