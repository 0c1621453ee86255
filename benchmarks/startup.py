"""From `aifactory-train launch` to the end of the first step, again and again, phase by phase.

A tiny text is made and prepared first. The first start is not counted: files and compiled kernels are cold then.
Starts by mpirun on this node, on a machine with Slurm inside of a job: what the queue adds is not a start.
"""

from __future__ import annotations

import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path

from aifactory_train.bench.record import Protocol
from aifactory_train.data.prepare import prepare
from aifactory_train.errors import PlanError
from aifactory_train.launch.env import submit_environment
from aifactory_train.machine.load import write_machine
from aifactory_train.measure.program import Program, start
from aifactory_train.measure.startup import PHASES, measure_start_s, write_corpus
from aifactory_train.measure.timing import FEWEST_SAMPLES
from aifactory_train.recipe.load import load_recipe
from aifactory_train.rundir import RunDir
from aifactory_train.strictyaml import configs_dir

# Of one start; from a parallel file system imports alone take a minute.
TIMEOUT_S = 600.0


def add_options(parser: ArgumentParser) -> None:
    parser.set_defaults(timeout_s=TIMEOUT_S)
    parser.add_argument("--recipe", default=str(configs_dir() / "recipes/smoke.yaml"), help="(default: smoke.yaml)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, as for launch")
    parser.add_argument("--cpu-ranks", type=int, default=1, help="ranks where the machine has no GPU (default 1)")
    parser.add_argument("--repeats", type=int, default=6, help="starts that are counted (default 6)")


def main() -> None:
    with start("startup", __doc__ or "", add_options) as program, tempfile.TemporaryDirectory() as folder:
        if program.control.size > 1:
            raise PlanError(
                f"{program.control.size} ranks were started, and each would start runs of its own",
                where="command line",
                do="start this program once; --cpu-ranks says how many ranks a run has",
            )
        measure(program, Path(folder))


def sets_of(program: Program, folder: Path) -> list[str]:
    """Overrides that make the recipe a run of one step on the text in `folder`."""
    given = program.options.set
    recipe = load_recipe(program.options.recipe, given)
    return [
        *given,
        f"data.sources=[{{name: words, path: {write_corpus(folder / 'words.jsonl')}}}]",
        "data.tokenizer={train_vocab_size: 300}",
        f"data.prepared_dir={folder / 'prepared'}",
        f"train.budget_tokens={recipe.train.global_batch_tokens}",
        "schedule={shape: cosine}",
    ]


def measure(program: Program, folder: Path) -> None:
    """Start a run, throw it away, and so on; write a record of the whole and one of each phase."""
    options, sets = program.options, sets_of(program, folder)
    recipe = load_recipe(options.recipe, sets)
    prepare(recipe.data)
    node = folder / f"{program.machine_name}.yaml"
    write_machine(program.machine.model_copy(update={"slurm": None}), node)
    command = [sys.executable, "-m", "aifactory_train", "launch", options.recipe, "--machine", str(node)]
    command += ["--cpu-ranks", str(options.cpu_ranks), *(word for each in sets for word in ("--set", each))]
    # In a job these lead to the first of its nodes.
    env = {k: v for k, v in submit_environment(None, None).items() if k not in ("MASTER_ADDR", "MASTER_PORT")}
    starts = []
    for number in range(options.repeats + 1):
        run = RunDir(folder / f"run-{number}")
        starts.append(measure_start_s([*command, "--run", str(run.root)], run, env, options.timeout_s))
    protocol = Protocol(
        warmup_steps=1,
        warmup_rule="the first start",
        steady=True,
        timed_steps=options.repeats,
        timer="wall",
        rank_reduction="none",
        ci_reached=options.repeats >= FEWEST_SAMPLES,
    )
    cell = {"model": recipe.name, "run_ranks": options.cpu_ranks if program.device.type == "cpu" else None}
    facts = {"first_s": starts[0]}
    counted = starts[1:]
    total = {"aifactory_startup_duration_seconds": {0: [s["total"] for s in counted]}}
    program.write(cell, total, protocol, facts=facts)
    for phase in PHASES:
        samples = {"aifactory_startup_phase_seconds": {0: [s[phase] for s in counted]}}
        program.write({**cell, "phase": phase}, samples, protocol)


if __name__ == "__main__":
    main()
