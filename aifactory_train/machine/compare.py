"""Does a machine agree with its file? What a probe saw against what the file says, fact by fact."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from itertools import combinations
from typing import Any

from aifactory_train.hostlist import expand
from aifactory_train.machine.facts import Facts
from aifactory_train.machine.machine import Machine
from aifactory_train.units import (
    format_bytes,
    format_bytes_per_s,
    format_flops_per_s,
    format_gbit_per_s,
    format_hours,
    format_watts,
)

# A kernel keeps some memory for itself, and vendors round: 503 GiB are what is left of 512.
_MEMORY_TOLERANCE_FRAC = 0.03
# The machine as it is. The rest of a file says what it is called, how it is used and how it is paid for.
_COMPARED = ("nodes", "device", "host", "topology", "network", "slurm", "internet")
# Of Slurm, what the site has set; the others are our way of asking for a job.
_OF_SLURM = ("partitions", "node_names", "account_required", "qos_required", "requeues_after_node_failure")
_ELEMENT_KEY = {"places": "device", "nics": "name", "partitions": "name"}
_LISTED = "present"
_FORMATS: dict[str, Callable[[float], str]] = {
    "_flops_per_s": format_flops_per_s,
    "_bytes_per_s": format_bytes_per_s,
    "_gbit_per_s": format_gbit_per_s,
    "_bytes": format_bytes,
    "_w": format_watts,
    "_h": format_hours,
}


def render_differences(seen: Machine, expected: Machine) -> str:
    """What differs, what the file could gain, what could not be seen and why; last a line with the counts.

    Memory is equal within 3 %, near cores where the file names some of those that are seen, a name where one has all
    words of the other.
    """
    here, there = _facts(seen), _facts(expected)
    _spread_links(seen, expected, here, there)
    file = expected.name
    differ: list[str] = []
    unseen: dict[str, list[str]] = {}
    n_agree = 0
    for key, value in there.items():
        if key in here:
            if _agree(key, here[key], value):
                n_agree += 1
            else:
                a, b = _shown(key, here[key]), _shown(key, value)
                a, b = (a, b) if a != b else (str(here[key]), str(value))
                differ.append(f"{key}: here {a}, {file} says {b}")
        elif _whole_element_lacks(key, there, here):
            continue
        elif _list_is_seen(key, here):
            differ.append(f"{key}: not here, {file} {_says(key, value)}")
        else:
            unseen.setdefault(_reason(seen, key), []).append(f"  {key}: {file} {_says(key, value)}")
    gains = [key for key in here if key not in there and not _whole_element_lacks(key, here, there)]
    new = [f"{key}: here {_shown(key, here[key])}, not in {file}; new: could be added" for key in gains]
    rules = f"memory is equal within {_MEMORY_TOLERANCE_FRAC * 100:.0f} %, cores where the file's are among those seen"
    lines = [f"this machine against {file}: {rules}", *differ, *new]
    for reason, facts in unseen.items():
        lines += [f"not seen, {reason}:", *facts]
    n_unseen = sum(map(len, unseen.values()))
    return "\n".join([*lines, f"{len(differ)} differ, {n_agree} agree, {n_unseen} not seen"])


def _facts(machine: Machine) -> dict[str, Any]:
    """Dotted key -> value of each fact that is given; an element of a list goes by its name or number."""
    found: dict[str, Any] = {}
    for block in _COMPARED:
        value = getattr(machine, block)
        if block == "slurm" and value is not None:
            found |= {k: v for name in _OF_SLURM for k, v in _below(f"slurm.{name}", getattr(value, name))}
        else:
            found |= dict(_below(block, value))
    return {key: value for key, value in found.items() if not key.startswith(("topology.links", "topology.all_to"))}


def _below(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    identity = _ELEMENT_KEY.get(key.rpartition(".")[2])
    if isinstance(value, Facts):
        for name in type(value).model_fields:
            yield from _below(f"{key}.{name}", getattr(value, name))
    elif isinstance(value, list) and identity is not None:
        for element in value:
            name = f"{key}.{getattr(element, identity)}"
            if identity == "name":
                yield name, _LISTED
            for field in type(element).model_fields:
                if field != identity:
                    yield from _below(f"{name}.{field}", getattr(element, field))
    elif value is not None and value != []:
        yield key, value


def _spread_links(seen: Machine, expected: Machine, here: dict[str, Any], there: dict[str, Any]) -> None:
    """Links as one rate where both machines have one for all pairs, else pair by pair."""
    rates = [_pair_rates(seen), _pair_rates(expected)]
    uniform = all(_is_uniform(r, m.device.per_node) or not r for r, m in zip(rates, (seen, expected), strict=True))
    for facts, pairs in zip((here, there), rates, strict=True):
        if uniform and pairs:
            facts["topology.all_to_all_bytes_per_s"] = next(iter(pairs.values()))
        else:
            facts |= {f"topology.links.{a}-{b}": rate for (a, b), rate in sorted(pairs.items())}


def _pair_rates(machine: Machine) -> dict[tuple[int, int], float]:
    topology = machine.topology
    if topology.all_to_all_bytes_per_s is not None:
        return dict.fromkeys(combinations(range(machine.device.per_node), 2), topology.all_to_all_bytes_per_s)
    return {(min(link.devices), max(link.devices)): link.bytes_per_s for link in topology.links}


def _is_uniform(rates: dict[tuple[int, int], float], n_devices: int) -> bool:
    return len(set(rates.values())) == 1 and len(rates) == n_devices * (n_devices - 1) // 2


def _element(key: str) -> str | None:
    """The element of a list that a key stands in: "slurm.partitions.gpu.nodes" -> "slurm.partitions.gpu"."""
    found = re.match(
        r"(topology\.(?:places|links)\.\d[^.]*|(?:network\.nics|slurm\.partitions)\..+?)(?:\.[a-z_]+)?$", key
    )
    return found.group(1) if found else None


def _whole_element_lacks(key: str, having: dict[str, Any], lacking: dict[str, Any]) -> bool:
    """Whether one line for the element that the key stands in says it all."""
    element = _element(key)
    return element is not None and element != key and element in having and element not in lacking


def _list_is_seen(key: str, here: dict[str, Any]) -> bool:
    """Whether other elements of the same list were seen: then this one is not there, and not just unseen."""
    element = _element(key)
    if element is None or (element != key and element in here) or key.startswith("topology.places."):
        return False
    return any(other.startswith(".".join(element.split(".")[:2]) + ".") for other in here)


def _agree(key: str, a: Any, b: Any) -> bool:
    if key.endswith("_bytes"):
        return math.isclose(a, b, rel_tol=_MEMORY_TOLERANCE_FRAC)
    if key.endswith(".cores") and isinstance(a, str):
        return set(_cores(b)) <= set(_cores(a))
    if key == "slurm.node_names":
        return set(expand(a)) == set(expand(b))
    if isinstance(a, str) and isinstance(b, str):
        plain = [re.sub(r"\((R|TM|C)\)", " ", text, flags=re.IGNORECASE).casefold() for text in (a, b)]
        words = [set(re.findall(r"[a-z0-9.+]+", text)) for text in plain]
        return words[0] <= words[1] or words[1] <= words[0]
    if isinstance(a, float) or isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    return bool(a == b)


def _cores(text: str) -> list[int]:
    spans = re.findall(r"(\d+)(?:-(\d+))?", text)
    return [core for first, last in spans for core in range(int(first), int(last or first) + 1)]


def _says(key: str, value: Any) -> str:
    return "lists it" if value == _LISTED else f"says {_shown(key, value)}"


def _shown(key: str, value: Any) -> str:
    if key.startswith("topology.links."):
        return format_bytes_per_s(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        # Rates by dtype stand one step below the name with the unit: device.peak_flops_per_s.bf16.
        names = key.split(".")
        for name in (names[-1], names[-2] if len(names) > 1 else ""):
            for suffix, render in _FORMATS.items():
                if name.endswith(suffix):
                    return render(value)
    return str(value)


def _reason(seen: Machine, key: str) -> str:
    """The reason noted for the longest part of the key, "*" standing for any element."""
    parts = key.split(".")
    for n in range(len(parts), 0, -1):
        for noted, reason in seen.unseen.items():
            if fnmatchcase(".".join(parts[:n]), noted):
                return reason
    return "the probe does not look at this"
