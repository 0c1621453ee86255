"""Machine files and commands as they are typed in a hurry: a message, never a traceback, and nothing that runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from aifactory_train.cli import main
from aifactory_train.errors import MachineError
from aifactory_train.launch.slurm import render_job
from aifactory_train.machine.load import load_machine, machine_names
from aifactory_train.machine.show import render_list, render_machine
from aifactory_train.strictyaml import configs_dir

LUMI = (configs_dir() / "machines" / "lumi-g.yaml").read_text()
LEONARDO = (configs_dir() / "machines" / "leonardo-booster.yaml").read_text()


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "lab.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(path: Path) -> str:
    with pytest.raises(MachineError) as caught:
        load_machine(path)
    return caught.value.render()


def said(capsys, *argv: str) -> tuple[int, str]:
    try:
        code = main(list(argv))
    except SystemExit as stopped:  # argparse
        code = int(stopped.code or 0)
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "at"),
    [
        ("memory: 480G", 'memory: "480G\\ntouch x"', "slurm.memory"),
        ("memory: 480G", 'memory: "480G --account=y"', "slurm.memory"),
        ("- module purge", '- "module load \'x"', "software.setup.0"),
        ("- module purge", '- "module purge\\ntouch x"', "software.setup.0"),
        ("value: /tmp/$USER-miopen-$SLURM_JOB_ID", 'value: "$(touch x)"', "environment.4.value"),
        ("value: /tmp/$USER-miopen-$SLURM_JOB_ID", 'value: "${USER"', "environment.4.value"),
        ("value: PHB", 'value: "a`touch x`"', "environment.1.value"),
        ("option: --gpus-per-node=8", 'option: "--a=1\\ntouch x"', "slurm.devices.option"),
        ("why: as MIOPEN", 'why: "a\\u2028b" #', "environment.5.why"),
        ("account_hint: project", 'account_hint: "a\\ntouch x" #', "slurm.account_hint"),
        ("title: LUMI-G", 'title: "\\e[31mred" #', "title"),
        ("devices: [5, 7]", "devices: [5, 9]", "topology.links.11.devices"),
        ("cores: 49-55", "cores: 55-49", "topology.places.0.cores"),
        ("cores: 49-55", "cores: 49-99999999999", "topology.places.0.cores"),
        ("nid[005001-007952,007954-007977]", "nid[a-b]", "slurm.node_names"),
        ("nid[005001-007952,007954-007977]", "nid[1-999999999]", "slurm.node_names"),
        ("nid[005001-007952,007954-007977]", '"nid[1-"', "slurm.node_names"),
        ("per_node: 8", "per_node: 1000000000", "device.per_node"),
        ("memory_bytes: 68_702_699_520", f"memory_bytes: {'9' * 300}", "device.memory_bytes"),
    ],
)
def test_a_value_that_no_script_or_node_can_hold_is_refused_at_its_line(old, new, at, tmp_path):
    assert old in LUMI
    path = write(tmp_path, LUMI.replace(old, new, 1))
    line = LUMI[: LUMI.index(old)].count("\n") + 1
    text = refusal(path)
    assert f"{path}:{line}: {at}: " in text
    assert "pattern" not in text and len(text) < 600


def test_what_a_machine_binds_runs_nothing(tmp_path):
    for bind in ('/a"; touch x; "', "/a$(touch x)", "/a`touch x`"):
        assert "container.binds.0" in refusal(write(tmp_path, LEONARDO.replace("[/leonardo,", f"['{bind}',", 1)))
    assert load_machine(write(tmp_path, LEONARDO.replace("[/leonardo,", "[$WORK,", 1))).container.binds[0] == "$WORK"


def test_options_and_mpirun_reach_the_script_as_words_not_as_commands(tmp_path):
    options = ["--a=$(touch${IFS}x)", "--b=`id`", "--c;touch", "--d='", "--e=#"]
    listed = "".join(f'\n    - {{option: "{option}", why: w}}' for option in options)
    machine = load_machine(
        write(tmp_path, LUMI.replace("  cpu_bind: map", f"  cpu_bind: map\n  srun_options:{listed}"))
    )
    script = render_job(machine)
    ranks = script[script.index("ranks=(") : script.index("code=0")]
    done = subprocess.run(
        ["bash", "-c", f"{ranks}\nprintf '%s\\n' \"${{ranks[@]}}\""], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.split("\n")[-len(options) - 1 : -1] == options
    assert not (tmp_path / "x").exists()

    by_mpirun = machine.model_copy(
        update={
            "slurm": machine.slurm.model_copy(update={"starter": "mpirun"}),
            "mpi": machine.mpi.model_copy(update={"mpirun": "mpirun; touch x"}),
        }
    )
    assert "\n  'mpirun; touch x'\n" in render_job(by_mpirun)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "found nothing"),
        ("hello", "found the word 'hello'"),
        (b"\xff\xfe\x00binary", "not text in UTF-8: byte 0xff"),
        (b"name: a\nb: \x00\n", "lab.yaml:2"),
        (f"nodes: {'9' * 5000}", "a number of 5000 characters"),
        ("a: &a [x,x]\n" + "".join(f"k{i}: &{chr(98 + i)} [{f'*{chr(97 + i)},' * 20}]\n" for i in range(8)), "values"),
    ],
)
def test_what_is_no_machine_file_is_refused_at_once_and_in_a_few_words(text, told, tmp_path):
    refused = refusal(write(tmp_path, text))
    assert told in refused and len(refused) < 400


def test_a_name_that_is_nearly_right_is_answered_with_the_right_one(tmp_path, monkeypatch):
    assert "did you mean lumi-g?" in refusal(Path("LUMI_G"))
    assert "did you mean lumi-g?" in refusal(Path("lumi"))
    assert "did you mean deucalion-a100-40 or deucalion-a100-80?" in refusal(Path("deucalion"))
    monkeypatch.chdir(tmp_path)
    assert "give the name of the machine: lumi-g" in refusal(Path("lumi-g.yaml"))


def test_a_drawing_goes_to_a_file_and_to_one_only(tmp_path, capsys):
    for target in (str(tmp_path), ""):
        code, text = said(capsys, "machines", "show", "lumi-g", "--svg", target)
        assert code == 2 and "Is a directory while writing the drawing" in text and "--svg FILE" in text
    code, text = said(capsys, "machines", "show", "lumi-g", "vega-gpu", "--svg", str(tmp_path / "a.svg"))
    assert code == 2 and "2 machines" in text and not list(tmp_path.iterdir())
    code, _ = said(capsys, "machines", "show", "--svg", str(tmp_path / "a.svg"), "lumi-g")
    assert code == 0 and (tmp_path / "a.svg").read_text().startswith("<svg")


def test_a_folder_whose_variable_is_not_set_is_not_the_folder_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = str(configs_dir() / "recipes" / "demo.yaml")
    for argv in (["stage", recipe, "--to", ""], ["plan", recipe, "--run", ""], ["status", ""]):
        code, text = said(capsys, *argv)
        assert code == 2 and "it is empty; is the variable set?" in text
    assert not list(tmp_path.iterdir())


def test_what_a_script_hands_to_an_attempt_is_checked_before_anything_is_written(tmp_path, capsys):
    begin = ["attempt", "begin", str(configs_dir() / "recipes" / "demo.yaml"), "--machine", "lumi-g", "--nodes", "1"]
    begin += ["--run", str(tmp_path / "run")]
    for option, value in (("--node-list", "n[a-b]"), ("--job-id", ""), ("--job-id", "1\n2"), ("--end-time-s", "nan")):
        given = {"--node-list": "n1", "--job-id": "7", "--end-time-s": ""} | {option: value}
        code, text = said(capsys, *begin, *(word for pair in given.items() for word in pair))
        assert code == 2 and f"argument {option}: " in text and "_value" not in text
    assert not (tmp_path / "run").exists()
    for verb in (["attempt", "end", "--exit-code", "0"], ["preflight"]):
        code, text = said(capsys, *verb, str(tmp_path / "nothing"))
        assert code == 2 and "no such folder" in text and str(tmp_path / "nothing") in text


@pytest.mark.parametrize("width", [80, 120])
def test_a_narrow_terminal_gets_the_columns_that_it_has_room_for(width):
    machines = [load_machine(name) for name in machine_names()]
    everything, lines = render_list(machines).splitlines(), render_list(machines, width).splitlines()
    assert max(map(len, lines)) <= width < max(map(len, everything))
    assert len(lines) == len(everything) + 1 and "no room here for title" in lines[-1]
    for line, machine in zip(lines[2:], machines, strict=False):
        assert line.startswith(machine.name) and f"{machine.device.per_node} x " in line
    pages = [render_machine(machine, width) for machine in machines]
    too_long = [line for page in pages for line in page.splitlines() if len(line) > width]
    assert all(max(map(len, line.split())) > 40 for line in too_long), "only a path or a value may stick out"


def test_a_machine_of_one_node_without_slurm_is_shown_without_a_word_about_jobs(capsys):
    assert main(["machines", "show", "h200-node"]) == 0
    shown = capsys.readouterr().out
    assert "1 node " in shown and "rendezvous" not in shown
