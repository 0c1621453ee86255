"""ReFrame checks that start our programs and read the JSON that they leave. No number is parsed from text.

    reframe -C SITE_CONFIG.py -c benchmarks/reframe/aifactory_checks.py -r
    ... -S python=/path/to/venv/bin/python -S Gemm.options='--dtypes bf16 --sizes 8192' -n Gemm

ReFrame's partition gives launcher and access, its environment the modules. References are those of
benchmarks/references/MACHINE.yaml: `bench report` judges the records, and ReFrame gets the reference of each verdict.
"""

import json
import os
from pathlib import Path

import reframe as rfm
import reframe.utility.sanity as sn
from reframe.core.builtins import (
    parameter,
    run_after,
    run_before,
    sanity_function,
    variable,
)

HERE = Path(__file__).resolve().parent
BENCHMARKS = HERE.parent
FOLDER = "bench"
# EESSI's names of scales: name -> nodes.
SCALES = {"1_node": 1, "2_nodes": 2, "4_nodes": 4, "8_nodes": 8, "16_nodes": 16}
RED = ("invalid", "incomplete", "unstable", "degraded", "regression")


class ProgramCheck(rfm.RunOnlyRegressionTest):
    """One program of benchmarks/ at one scale. python: an interpreter with aifactory-train; machine: its name in
    configs/machines/; tasks_per_node: ranks, by default one for each GPU of the partition."""

    program = ""
    scale = parameter(["1_node"])
    python = variable(str, value="python3")
    machine = variable(str, value="local")
    options = variable(str, value="")
    tasks_per_node = variable(int, value=0)
    valid_systems = ["*"]
    valid_prog_environs = ["*"]
    time_limit = "20m"
    tags = {"production", "maintenance"}

    @run_after("init")
    def set_command(self) -> None:
        self.descr = f"aifactory-train {self.program} on {self.scale}"
        self.tags = {*self.tags, self.scale}
        self.executable = self.python
        words = [str(BENCHMARKS / f"{self.program}.py"), "--machine", self.machine, "--suite", "reframe"]
        self.executable_opts = [*words, "--out", FOLDER, *self.options.split()]
        # The programs are started by their path, so that the package beside them is found without an installation.
        self.env_vars = {"PYTHONPATH": f"{BENCHMARKS.parent}{os.pathsep}$PYTHONPATH"}
        # Its exit code is the verdict, which sanity reads from the records.
        self.postrun_cmds = [f"{self.python} -m aifactory_train bench report {FOLDER} || true"]

    @run_after("setup")
    def set_ranks(self) -> None:
        devices = sum(device.num_devices or 0 for device in self.current_partition.devices)
        self.num_tasks_per_node = self.tasks_per_node or max(1, devices)
        self.num_tasks = SCALES[self.scale] * self.num_tasks_per_node

    def records(self) -> list[dict]:
        found = [json.loads(path.read_text()) for path in sorted(Path(self.stagedir, FOLDER, "records").glob("*.json"))]
        return sorted(found, key=lambda record: (record["started"], record["id"]))

    @sanity_function
    def verdicts_are_green(self) -> bool:
        verdicts = [(record, verdict) for record in self.records() for verdict in record["verdicts"]]
        red = [
            f"{verdict['verdict']} on {','.join(sorted(set(record['hosts'])))}: {verdict['metric']} {verdict['why']}"
            for record, verdict in verdicts
            if verdict["verdict"] in RED
        ]
        sn.evaluate(sn.assert_true(verdicts, msg=f"no judged record in {FOLDER}/records; see the output of the job"))
        return sn.assert_false(red, msg="; ".join(red))

    @run_before("performance")
    def take_numbers(self) -> None:
        """A variable for each metric of each cell, with both ends of its interval beside it."""
        self.perf_variables = {}
        references = {}
        for record in self.records():
            cell = "_".join(f"{key}={value}" for key, value in sorted(record["cell"].items()) if value is not None)
            of = {verdict["metric"]: verdict for verdict in record["verdicts"]}
            for metric in record["metrics"]:
                name = f"{metric['name']}/{cell}"
                low, high = metric["ci95"] or (metric["min"], metric["max"])
                for suffix, value in (("", metric["median"]), ("/ci_low", low), ("/ci_high", high)):
                    variable_of = sn.make_performance_function(sn.defer(value), metric["unit"])
                    self.perf_variables[name + suffix] = variable_of
                verdict = of.get(metric["name"], {})
                if verdict.get("reference") and verdict["verdict"] != "no_reference":
                    tolerance = verdict["tolerance_frac"]
                    ends = (-tolerance, None) if metric["better"] == "higher" else (None, tolerance)
                    references[name] = (verdict["reference"], *ends, metric["unit"])
            nodes = sn.make_performance_function(sn.defer(len(set(record["hosts"]))), "nodes")
            self.perf_variables["num_nodes"] = nodes
        self.reference = {"*": references}


@rfm.simple_test
class Gemm(ProgramCheck):
    program = "gemm"


@rfm.simple_test
class Memory(ProgramCheck):
    program = "memory"


@rfm.simple_test
class Collectives(ProgramCheck):
    program = "collectives"
    scale = parameter(SCALES)


@rfm.simple_test
class Step(ProgramCheck):
    program = "step"
    scale = parameter(SCALES)
