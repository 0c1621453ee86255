"""How a probe looks at the system: it reads files, runs tools, and notes what was seen where and what was not."""

from __future__ import annotations

import datetime
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from aifactory_train.machine.facts import FactSource

_ANSWER_WITHIN_S = 20
# Where tools are that a batch job's PATH often lacks.
_MORE_FOLDERS = "/opt/rocm/bin:/usr/sbin:/sbin"


class Answer(NamedTuple):
    """What a tool printed; `fault` says why there is nothing, "" where all went well."""

    text: str
    fault: str = ""


def run_tool(command: list[str]) -> Answer:
    """Output of a tool. One that is missing, fails or hangs (as beside a broken driver) is a fault, no exception."""
    program = shutil.which(command[0]) or shutil.which(command[0], path=_MORE_FOLDERS)
    if program is None:
        return Answer("", f"{command[0]} is not there")
    shown = " ".join(command)
    try:
        process = subprocess.Popen(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return Answer("", f"{shown}: {error.strerror}")
    try:
        text, complaint = process.communicate(timeout=_ANSWER_WITHIN_S)
    except subprocess.TimeoutExpired:
        # Not waited for: a process that hangs inside the driver does not die, and would take us with it.
        os.killpg(process.pid, signal.SIGKILL)
        return Answer("", f"{shown}: no answer in {_ANSWER_WITHIN_S} s")
    if process.returncode != 0:
        said = (complaint.strip() or text.strip() or f"exit code {process.returncode}").splitlines()[-1]
        return Answer("", f"{shown} failed: {said.strip()}")
    return Answer(text)


@dataclass
class Look:
    """A view of one system, and the notes taken. The first four are replaced where a recording is looked at.

    cpus: hardware threads that this process may use.
    """

    root: Path = Path("/")
    run: Callable[[list[str]], Answer] = run_tool
    cpus: list[int] = field(default_factory=lambda: sorted(os.sched_getaffinity(0)))
    uname: os.uname_result = field(default_factory=os.uname)
    sources: list[FactSource] = field(default_factory=list)
    unseen: dict[str, str] = field(default_factory=dict)

    def path(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def read(self, path: str | Path) -> str:
        """Text of a file without the newline at its end, "" where it cannot be read."""
        try:
            return self.path(str(path)).read_text(errors="replace").strip()
        except OSError:
            return ""

    def children(self, folder: str, pattern: str = "*") -> list[Path]:
        """What is in a folder, in the order of the numbers in the names; empty where there is no such folder."""
        return sorted(self.path(folder).glob(pattern), key=lambda path: (len(path.name), path.name))

    def saw(self, where: str, *facts: str) -> None:
        today = datetime.date.today().isoformat()
        self.sources.append(FactSource(facts=list(facts), source=where, by="probed", date=today))

    def missed(self, reason: str, *facts: str) -> None:
        for fact in facts:
            self.unseen[fact] = reason
