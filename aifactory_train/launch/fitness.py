"""Which nodes of an attempt are fit, from the files that the ranks of its preflight left."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aifactory_train.hostlist import compress
from aifactory_train.metrics.outliers import slow_ranks
from aifactory_train.rundir import write_atomic
from aifactory_train.units import format_bytes_per_s, format_flops_per_s

_RATES = {
    "matmul_flops_per_s": ("matrix products", format_flops_per_s),
    "memory_bytes_per_s": ("memory copies", format_bytes_per_s),
}


@dataclass(frozen=True)
class Fitness:
    """`failing`: host -> its faults. `notes`: what went wrong without a node to blame for it."""

    passing: list[str]
    failing: dict[str, list[str]]
    notes: list[str] = field(default_factory=list)


def judge(attempt: Path, hosts: list[str], ranks_per_node: int) -> Fitness:
    """Read attempt/preflight/, write attempt/preflight.json.

    Args:
        hosts: of the job, in Slurm's order: rank r runs on hosts[r // ranks_per_node].

    A host fails by its own faults, by silence where others have spoken, by a rank much slower than the median, and
    by a rank for which the others waited in vain. Who waited is not to blame.
    """
    rows = _read_rows(attempt / "preflight", len(hosts) * ranks_per_node)
    failing: dict[str, list[str]] = {}

    def blame(rank: int, sentence: str) -> None:
        failing.setdefault(hosts[rank // ranks_per_node], []).append(f"rank {rank}: {sentence}")

    for rank, row in rows.items():
        for sentence in row["faults"]:
            blame(rank, sentence)
    if rows:
        for host, sentence in _silent_hosts(rows, hosts, ranks_per_node):
            failing.setdefault(host, []).append(sentence)
    for rank, sentence in _outliers(rows):
        if not rows[rank]["faults"]:
            blame(rank, sentence)
    apart, notes = _missing(rows, hosts, ranks_per_node, failing)
    for rank, sentence in apart:
        blame(rank, sentence)
    if not rows:
        notes.append("no rank of the preflight has left a report: the reason is before it, in log.txt")
    fitness = Fitness([h for h in hosts if h not in failing], {h: failing[h] for h in hosts if h in failing}, notes)
    _write(attempt / "preflight.json", fitness)
    return fitness


def render_fitness(fitness: Fitness) -> str:
    """The culprits, one per line; one line if all is well."""
    n = len(fitness.passing) + len(fitness.failing)
    if not fitness.failing and not fitness.notes:
        return f"all {n} nodes are fit" if n > 1 else "the node is fit"
    lines = [_line(host, faults) for host, faults in fitness.failing.items()]
    if fitness.failing and not fitness.passing and n > 1:
        lines.insert(0, f"none of the {n} nodes is fit; what they share is the likely cause, not the nodes")
    elif fitness.failing:
        lines.insert(0, f"{len(fitness.failing)} of {n} nodes not fit: {compress(fitness.failing)}")
    return "\n".join([*lines, *fitness.notes])


def _line(host: str, faults: list[str]) -> str:
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{host}: {faults[0]}{more}"


def _read_rows(folder: Path, n_ranks: int) -> dict[int, dict[str, Any]]:
    """rank -> its report; a damaged one counts as none."""
    rows = {}
    for rank in range(n_ranks):
        try:
            row = json.loads((folder / f"rank-{rank:05d}.json").read_text())
        except (OSError, ValueError):
            continue
        if isinstance(row, dict):
            empty: dict[str, Any] = {"faults": [], "elsewhere": [], "missing": [], "facts": {}, "phase": "together"}
            rows[rank] = {**empty, **row}
    return rows


def _silent_hosts(rows: dict[int, Any], hosts: list[str], per_node: int) -> Iterable[tuple[str, str]]:
    for i, host in enumerate(hosts):
        silent = [r for r in range(i * per_node, (i + 1) * per_node) if r not in rows]
        if len(silent) == per_node:
            yield host, "none of its ranks has left a report"
        elif silent:
            yield host, f"no report of rank {', '.join(map(str, silent))}"


def _outliers(rows: dict[int, dict[str, Any]]) -> Iterable[tuple[int, str]]:
    for name, (what, shown) in _RATES.items():
        rates = {rank: float(row["facts"][name]) for rank, row in rows.items() if row["facts"].get(name)}
        slow, median = slow_ranks(rates)
        for rank in slow:
            yield rank, f"{what} at {shown(rates[rank])}; the median of all ranks is {shown(median)}"


def _missing(
    rows: dict[int, dict[str, Any]], hosts: list[str], per_node: int, failing: dict[str, list[str]]
) -> tuple[list[tuple[int, str]], list[str]]:
    """Ranks to blame for not having come, and what else happened to the ranks together."""
    missed = {rank for row in rows.values() for rank in row["missing"]}
    absent = [rank for rank in sorted(missed) if rank in rows and rows[rank]["phase"] == "local"]
    blamed = [(rank, "passed its own checks, and then the others waited for it in vain") for rank in absent]
    blamed = [(rank, why) for rank, why in blamed if not rows[rank]["faults"]]
    # What is left: ranks that were all there and could not reach each other. Few of them are cut off; many mean
    # that the way itself is wrong.
    lonely = {rank for rank, row in rows.items() if row["phase"] != "local" and 0 in row["missing"]}
    lonely_hosts = sorted({rank // per_node for rank in lonely if rank // per_node != 0})
    culprits = {hosts[rank // per_node] for rank in absent} | set(failing)
    notes: list[str] = []
    if lonely_hosts and 0 not in absent and hosts[0] not in culprits:
        if 2 * len(lonely_hosts) < len(hosts):
            blamed += [
                (rank, f"could not reach rank 0 on {hosts[0]}, as the others could")
                for rank in sorted(lonely)
                if hosts[rank // per_node] not in culprits
            ]
        else:
            notes.append(
                f"{len(lonely_hosts)} of {len(hosts) - 1} nodes could not reach rank 0 on {hosts[0]}: check that "
                "MASTER_ADDR names a network that the nodes share"
            )
    if not blamed and not culprits:
        told = [sentence for row in rows.values() for sentence in row["elsewhere"]]
        notes += [f"{sentence} ({told.count(sentence)} ranks)" for sentence in dict.fromkeys(told)][:4]
    return blamed, notes


def _write(path: Path, fitness: Fitness) -> None:
    row = {
        "passing": compress(fitness.passing),
        "failing": compress(fitness.failing),
        "faults": fitness.failing,
        "notes": fitness.notes,
    }
    write_atomic(path, json.dumps(row, indent=1) + "\n")
