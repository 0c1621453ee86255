"""Silent data corruption: nodes of one kind that do the same must get the same, to the last bit."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from datetime import date, datetime
from pathlib import Path

from aifactory_train.bench.record import Record
from aifactory_train.bench.references import Fingerprint, Setting, nodes_of, setting_of, sku_of

_OURS = Path(__file__).resolve().parents[1]
SHOWN_DIGITS = 12


def code_sha256() -> str:
    """Of all our Python files: other code may sum in another order. A commit that changes none of them counts not."""
    digest = hashlib.sha256()
    for path in sorted(_OURS.rglob("*.py")):
        digest.update(f"{path.relative_to(_OURS)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def odd_results(records: Iterable[Record]) -> dict[str, str]:
    """Record id -> a sentence, of those whose parameters or fingerprint most nodes of their setting do not share.

    Where no value has more than half of the nodes, all are odd: one of them is wrong, and nobody knows which.
    """
    groups: dict[tuple[str, Setting], list[tuple[Record, str]]] = defaultdict(list)
    for record in records:
        for name in ("n_parameters", "fingerprint"):
            value = getattr(record.validity, name)
            if value is not None and not record.fault:
                groups[name, setting_of(record)].append((record, str(value)))
    found: dict[str, str] = {}
    for (name, _), results in groups.items():
        votes = {(nodes_of(record), value) for record, value in results}
        right = _majority(votes)
        for record, value in results:
            if len({of_all for _, of_all in votes}) > 1 and value != right:
                found.setdefault(record.id, _sentence(name, value, nodes_of(record), right, votes))
    return found


def _sentence(name: str, value: str, nodes: str, right: str | None, votes: set[tuple[str, str]]) -> str:
    rest: dict[str, list[str]] = defaultdict(list)
    for other, of_other in sorted(votes):
        if of_other != value and right in (None, of_other):
            rest[of_other].append(other)
    named = "; ".join(f"{other[:SHOWN_DIGITS]} on {', '.join(on)}" for other, on in rest.items())
    told = f"{name} is {value[:SHOWN_DIGITS]} on {nodes}, {named}"
    n_right = len({on for on, of in votes if of == right})
    n_all = len({on for on, _ in votes})
    if right is None:
        return f"{told}: the same steps, so that one of them computes wrong; no majority tells which"
    return f"{told}: {n_right} of {n_all} node(s) agree on that for the same steps"


def _majority(votes: set[tuple[str, str]]) -> str | None:
    """The value that more than half of the (nodes, value) have; None where none has."""
    value, n = Counter(value for _, value in votes).most_common(1)[0]
    return value if 2 * n > len(votes) else None


def learn_fingerprints(records: Sequence[Record], author: str) -> list[Fingerprint]:
    """What more than half of the nodes computed; nothing where no such majority is, or the device is not known."""
    groups: dict[Setting, list[Record]] = defaultdict(list)
    for record in records:
        if record.validity.fingerprint is not None and sku_of(record) is not None:
            groups[setting_of(record)].append(record)
    found = []
    for setting, of_one in groups.items():
        right = _majority({(nodes_of(record), str(record.validity.fingerprint)) for record in of_one})
        sources = [record for record in of_one if record.validity.fingerprint == right]
        if right is not None:
            found.append(
                Fingerprint(
                    setting=setting,
                    fingerprint=right,
                    source_result_ids=sorted(record.id for record in sources),
                    n_nodes=len({nodes_of(record) for record in sources}),
                    measured_on=last_day(sources),
                    author=author,
                )
            )
    return found


def last_day(records: Sequence[Record]) -> date:
    """On which the last of them ended."""
    return max(datetime.fromisoformat(record.ended).date() for record in records)
