"""A machine by name, by file, or the one we stand on."""

from __future__ import annotations

import difflib
from pathlib import Path

import yaml

from aifactory_train.errors import MachineError
from aifactory_train.machine.machine import Machine
from aifactory_train.machine.probe import probe_local
from aifactory_train.rundir import write_atomic
from aifactory_train.strictyaml import Key, configs_dir, read_yaml, validate

LOCAL = "local"


def load_machine(name_or_path: str | Path) -> Machine:
    """`local` probes this machine; a bare name is configs/machines/NAME.yaml; anything else is a YAML file.

    Raises:
        MachineError: no such machine, or every fault of the file with its line.
    """
    text = str(name_or_path)
    if text == LOCAL:
        return probe_local()
    path = Path(text)
    if path.suffix not in (".yaml", ".yml") and "/" not in text:
        path = configs_dir() / "machines" / f"{text}.yaml"
        if not path.is_file():
            known = [LOCAL, *machine_names()]
            near = difflib.get_close_matches(text.lower().replace("_", "-"), known, n=1, cutoff=0.5)
            near = [name for name in known if text and name.startswith(text.lower())] or near
            hint = f"did you mean {' or '.join(near)}?  " if near else ""
            raise MachineError(
                f"unknown machine {text!r}",
                where=str(path.parent),
                do=f"{hint}one of {', '.join(known)}, or the path of a YAML file",
            )
    elif path.parent == Path() and path.stem in machine_names() and not path.exists():
        raise MachineError(
            f"no file {text} in this folder", where=str(Path.cwd()), do=f"give the name of the machine: {path.stem}"
        )
    origins: dict[Key, str] = {}
    data = read_yaml(path, origins, MachineError)
    return validate(Machine, data, origins, str(path), MachineError, do="mend the lines named above")


def write_machine(machine: Machine, path: Path) -> None:
    """As YAML that `load_machine` reads back to an equal machine."""
    write_atomic(path, yaml.safe_dump(machine.model_dump(mode="json"), sort_keys=False))


def machine_names() -> list[str]:
    """Names of the files in configs/machines/."""
    return sorted(p.stem for p in (configs_dir() / "machines").glob("*.yaml"))
