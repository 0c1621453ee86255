"""Benchmark records with their samples, and the report of them, for tests of what is drawn."""

from aifactory_train.bench.metric_names import NAMES
from aifactory_train.bench.record import build_metric
from aifactory_train.bench.report import render_report
from aifactory_train.bench.store import BenchDir
from bench_records import GEMM, a_protocol, a_record, write_folder

STEP_S = "aifactory_train_step_duration_seconds"
RATE = "aifactory_train_tokens_per_second"
RATE_PER_DEVICE = "aifactory_train_tokens_per_second_per_gpu"
BUS = "aifactory_collective_bus_bandwidth_bytes_per_second"


def made(number, by_rank, hosts, reduction="max", **changes):
    """A record of samples (metric -> rank -> values), and those samples."""
    metrics = [build_metric(name, NAMES[name].better, ranks, hosts, reduction) for name, ranks in by_rank.items()]
    protocol = a_protocol(rank_reduction=reduction)
    return a_record(id=f"r{number}", hosts=hosts, metrics=metrics, protocol=protocol, **changes), by_rank


def page(folder, *pairs):
    write_folder(folder, [record for record, _ in pairs], {record.id: samples for record, samples in pairs})
    return render_report(BenchDir(folder))


def a_step(number, nodes, seconds, gbs_tokens=1000, **changes):
    hosts = [f"n{i}" for i in range(nodes)]
    by_rank = {rank: [s * (1 + rank / 1000) for s in seconds] for rank in range(nodes)}
    samples = {
        STEP_S: by_rank,
        RATE: {rank: [gbs_tokens / s for s in values] for rank, values in by_rank.items()},
        RATE_PER_DEVICE: {rank: [gbs_tokens / nodes / s for s in values] for rank, values in by_rank.items()},
    }
    layout = f"dp_shard {nodes}, tp 2, {8 // nodes} x 1 rows"
    cell = {"model": "tiny", "nodes": nodes, "devices": nodes, "gbs_tokens": gbs_tokens, "layout": layout}
    return made(number, samples, hosts, benchmark="step", cell=cell, **changes)


def a_gemm(number, host, rate, **changes):
    values = [rate * (1 + i / 10000) for i in range(20)]
    return made(number, {GEMM: {0: values}}, [host], "none", **changes)


def a_collective(number, n_bytes, rate, wire):
    samples = {BUS: {0: [rate] * 10, 1: [rate * 1.01] * 10}}
    cell = {"op": "all_reduce", "bytes": n_bytes, "dtype": "bf16"}
    return made(number, samples, ["n0", "n1"], benchmark="collectives", cell=cell, facts={"wire": wire})
