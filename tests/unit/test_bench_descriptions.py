"""benchmarks/DESCRIPTION.md says of each program what it is for, and names options that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "benchmarks/DESCRIPTION.md").read_text()
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S))
HEAD = TEXT.partition("\n## ")[0]
COMMON, SCRATCH = ((ROOT / f"aifactory_train/measure/{name}.py").read_text() for name in ("program", "scratch"))
PROGRAMS = {path.stem: path.read_text() for path in sorted((ROOT / "benchmarks").glob("*.py"))}


def options(text: str) -> set[str]:
    return set(re.findall(r"`(--[a-z-]+)`", text))


def defined(source: str) -> set[str]:
    return set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', source))


def test_every_program_has_a_section_and_every_section_a_program() -> None:
    assert sorted(SECTIONS) == sorted(PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_section_has_its_parts_and_names_the_options_of_its_program(program: str) -> None:
    parts = re.findall(r"^- \*\*([A-Z][a-z ]+)\*\*: ", SECTIONS[program], re.M)
    assert parts == ["Purpose", "Execution", "Verification", "Results"]
    of_files = defined(SCRATCH) if "measure.scratch import" in PROGRAMS[program] else set()
    assert options(SECTIONS[program]) == defined(PROGRAMS[program]) | of_files, "all of them, and no others"


def test_what_holds_for_all_programs_is_said_once() -> None:
    parts = re.findall(r"^- \*\*([A-Z][a-z ]+)\*\*: ", HEAD, re.M)
    common = ["Source", "Building", "Execution", "Modification rules", "Results", "Baseline", "Commitment"]
    assert parts == common
    assert options(HEAD) - {"--help"} == defined(COMMON)
