"""Records of benchmarks as `calibrate` finds them: only what it reads."""

from __future__ import annotations


def a_bench_record(benchmark, metric, median, **changes):
    """As the benchmark programs write it, without what `calibrate` does not read."""
    record = {
        "schema": "aifactory-bench/1", "id": f"{benchmark}-1", "benchmark": benchmark, "machine": "site",
        "hosts": ["n1", "n1"], "cell": {}, "metrics": [{"name": f"aifactory_{metric}", "unit": "x", "median": median}],
        "provenance": {"git_sha": "0123456789abcdef", "cpu": "EPYC"}, "fault": None,
    }  # fmt: skip
    return record | changes


def a_gemm(median=2.7e14, **changes):
    return a_bench_record("gemm", "gemm_flops_per_second", median, cell={"dtype": "bf16"}) | changes
