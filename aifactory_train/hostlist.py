"""Host names in Slurm's list syntax: "nid[0012-0014,0020],login1"."""

from __future__ import annotations

import re
from collections.abc import Iterable

_PART = re.compile(r"(?:[^,\[]|\[[^\]]*\])+")
_SPANS = re.compile(r"\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*")
_MOST = 1_000_000
_BRACKET = re.compile(r"\[([^\]]*)\]")


def expand(hosts: str) -> list[str]:
    """Every host of a list, in its order: "n[1-2,10]-a" -> ["n1-a", "n2-a", "n10-a"].

    Raises ValueError where it is no host list, or one of more than a million hosts.
    """
    if _count(hosts) > _MOST:
        raise ValueError(f"{hosts!r} names more than {_MOST:,} hosts")
    found = []
    for part in _PART.findall(hosts):
        found += _expand_part(part.strip())
    return found


def _count(hosts: str) -> int:
    if re.search(r"[\[\]]", _BRACKET.sub("", hosts)):
        raise ValueError(f"{hosts!r} has a bracket too many or too few; write such as node[001-128,130]")
    n = 0
    for part in _PART.findall(hosts):
        n_part = 1
        for spans in _BRACKET.findall(part):
            if _SPANS.fullmatch(spans) is None:
                raise ValueError(f"{hosts!r} has [{spans}]; write numbers and spans such as [001-128,130]")
            ends = [[int(end) for end in span.split("-")] for span in spans.split(",")]
            n_part *= sum(max(0, end[-1] - end[0] + 1) for end in ends)
        n += n_part
    return n


def compress(hosts: Iterable[str]) -> str:
    """The shortest list that names the same hosts; numbers run together where only the last one differs."""
    groups: dict[tuple[str, int, str], list[int]] = {}
    plain = []
    for host in dict.fromkeys(hosts):
        match = re.fullmatch(r"(.*?)(\d+)(\D*)", host)
        if match is None:
            plain.append(host)
        else:
            head, digits, tail = match.groups()
            groups.setdefault((head, len(digits), tail), []).append(int(digits))
    parts = []
    for (head, width, tail), numbers in groups.items():
        spans = _spans(sorted(numbers), width)
        parts.append(f"{head}[{spans}]{tail}" if len(numbers) > 1 else f"{head}{spans}{tail}")
    return ",".join([*parts, *plain])


def _expand_part(part: str) -> list[str]:
    match = _BRACKET.search(part)
    if match is None:
        return [part] if part else []
    head, tail = part[: match.start()], part[match.end() :]
    names = []
    for span in match.group(1).split(","):
        first, _, last = span.partition("-")
        numbers = [first] if not last else [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
        names += [head + number + rest for number in numbers for rest in _expand_part(tail) or [""]]
    return names


def _spans(numbers: list[int], width: int) -> str:
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ",".join(f"{a:0{width}d}" if a == b else f"{a:0{width}d}-{b:0{width}d}" for a, b in spans)
