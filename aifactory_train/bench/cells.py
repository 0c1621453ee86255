"""Records as a report names them: cells in words, what tells them apart, hosts of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from aifactory_train import units
from aifactory_train.bench.record import Metric, Record, Scalar

DASH = "\N{EN DASH}"

# Metric name -> rank -> values; empty where a record has none that can be read.
Samples = Mapping[str, Mapping[int, Sequence[float]]]
Read = Callable[[Record], Samples]


def words(cell: Mapping[str, Scalar | None], keys: Sequence[str] | None = None) -> str:
    """A cell as people read it: "nodes 2, bf16, 1.00 MiB"."""
    shown = {key: cell.get(key) for key in keys} if keys is not None else cell
    return ", ".join(_word(key, value) for key, value in shown.items() if value is not None)


def _word(key: str, value: Scalar) -> str:
    name = key.replace("_", " ")
    if isinstance(value, bool):
        return name if value else f"not {name}"
    if isinstance(value, str):
        return value
    if key == "bytes" or key.endswith("_bytes"):
        return units.format_bytes(value)
    return f"{name} {units.format_count(value) if key.endswith('_tokens') else f'{value:g}'}"


def telling_keys(records: Sequence[Record]) -> list[str]:
    """Keys of cells that part these records; a key that follows from those before it is left out."""
    kept: list[str] = []
    groups = 1
    for key in dict.fromkeys(key for record in records for key in record.cell):
        parts = len({tuple(record.cell.get(k) for k in (*kept, key)) for record in records})
        if parts > groups:
            kept, groups = [*kept, key], parts
    return kept


def labels(records: Sequence[Record]) -> list[str]:
    """What tells each record from the others: cell keys that part them, then hosts, then the time."""
    kept = telling_keys(records)
    found = [words(record.cell, kept) or record.benchmark for record in records]
    for more in (lambda record: " ".join(dict.fromkeys(record.hosts)), lambda record: record.started):
        if len(set(found)) < len(found):
            twice = {label for label in found if found.count(label) > 1}
            pairs = zip(found, records, strict=True)
            found = [f"{label}, {more(record)}" if label in twice else label for label, record in pairs]
    return found


def short_names(records: Sequence[Record]) -> dict[str, str]:
    """Record id -> its benchmark, and what tells its cell from others of that benchmark: "gemm, bf16, m 4096"."""
    by_benchmark: dict[str, list[Record]] = {}
    for record in records:
        by_benchmark.setdefault(record.benchmark, []).append(record)
    keys = {benchmark: telling_keys(own) for benchmark, own in by_benchmark.items()}
    return {
        record.id: ", ".join(filter(None, (record.benchmark, words(record.cell, keys[record.benchmark]))))
        for record in records
    }


def metric_of(record: Record, name: str) -> Metric | None:
    """None where the record has no such metric."""
    return next((metric for metric in record.metrics if metric.name == name), None)


def host_of(record: Record, rank: int) -> str:
    """`hosts` of a record has one entry for each rank, or one node for all."""
    if len(set(record.hosts)) == 1:
        return record.hosts[0]
    return record.hosts[rank] if rank < len(record.hosts) else f"rank {rank}"


def short_name(metric: str) -> str:
    """ "aifactory_train_mfu_ratio" -> "train mfu ratio"."""
    return metric.removeprefix("aifactory_").replace("_", " ")
