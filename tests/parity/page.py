"""docs/parity.md and the table of layouts in the README, from the cases and what their runs gave."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from parity.cases import AXES, BF16_CHECKPOINTS, CHECKPOINTS, FAULTY, LONG, LONG_CHECKPOINTS, SHORT, STEPS, Case

ROOT = Path(__file__).resolve().parents[2]
PAGE, README = ROOT / "docs" / "parity.md", ROOT / "README.md"
BEGIN, END = "<!-- layouts: begin, from tests/parity/cases.py -->", "<!-- layouts: end -->"

# How each axis is called where one reads about it, and its forms.
LAYOUTS = {
    "pp": ("pipeline", {"pipeline_schedule": ("1f1b", "interleaved", "zbv", "dualpipev")}),
    "dp_replicate": ("HSDP: copies of sharded groups", {}),
    "dp_shard": ("FSDP2", {}),
    "cp": ("context parallel", {"cp_attention": ("all_gather", "ring", "ulysses")}),
    "tp": ("tensor and sequence parallel, loss by vocabulary", {}),
}
NEEDS_GPU = {
    "flash kernels and flex_attention, alone and on the parts that each form of cp makes of a row": "they have no "
    "backward on a CPU; their masks are held against the dense ones in tests/cpu",
    "bf16 with flash attention, fp8": "no fp8 matrix products on a CPU; the conversion runs emulated in tests/cpu",
}

Differences = Mapping[str, tuple[float, float, float]]


def render_layouts() -> str:
    """The table of the README."""
    cases = SHORT + LONG
    lines = ["| axis | what | forms | degrees | together with | cases |", "|---|---|---|---|---|---|"]
    for axis, (what, forms) in LAYOUTS.items():
        mine = [case for case in cases if getattr(case, axis) > 1]
        ((key, names),) = forms.items() or [("", ())]
        shown = [name for name in names if any(getattr(case, key) == name for case in mine)]
        degrees = sorted({getattr(case, axis) for case in mine})
        others = [other for other in AXES if other != axis and any(getattr(case, other) > 1 for case in mine)]
        cells = [axis, what, ", ".join(shown), ", ".join(map(str, degrees)), ", ".join(others), str(len(mine))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def render_page(differences: Differences) -> str:
    """The matrix. `differences`: (loss, gradient norm, weights) of each case, by name."""
    return f"""# Every layout has the numbers of one process

Each line is a run of {STEPS} steps of a tiny model in float32 on CPU ranks (gloo, one thread each), from the same
weights and the same global batches as one process. The numbers are the largest relative differences to it: of the
loss and the gradient norm over all steps, and of any weight tensor (norm of the difference over norm) after the last.
The tests allow 1e-5. `make test` runs what is marked "short", `make parity` all of it, and writes this page.

The training code is the one that runs on a machine: `build_engine` and `train_step`. The global batch has 16 rows of 32
tokens, with documents of uneven lengths under the mask and targets that do not count, unless a line says "rows" (no
document mask). A pipeline has as many micro-batches as rows; "accumulate" cuts the rows of a rank without one, too.
"uneven" has a width of 50 and 5 layers, so that neither shards nor stages are equal.

## Layouts

{_table(SHORT + LONG, differences)}

## Faults that must be seen

Each is made on purpose in the ranks of one run (tests/parity/faults.py), and the test fails if it goes unseen.

{_table(FAULTY, differences)}

{render_checkpoints()}

## What a CPU cannot show

`make gpu-check` runs these where there is a GPU.

{chr(10).join(f"* {what}: {why}" for what, why in NEEDS_GPU.items())}
"""


def render_checkpoints() -> str:
    """Which checkpoints move: a section of the page."""
    n, n_long, n_bf16 = len(CHECKPOINTS), len(LONG_CHECKPOINTS), len(BF16_CHECKPOINTS)
    return f"""## Checkpoints

Saved by each of a list and loaded by each (tests/parity/test_checkpoints_move.py): weights, both moments of Adam and
the step have moved, as the next steps are those of one process within the same 1e-5. "zero" is the engine deepspeed
with that stage; the others are fsdp2.

In `make test`, all {n} x {n} of:

{_list(CHECKPOINTS)}

In `make parity`, all {n_long} x {n_long} of these, too:

{_list(LONG_CHECKPOINTS)}

In `make test` with bf16 compute, all {n_bf16} x {n_bf16} of these; the float32 state is the same bit for bit after it
has moved:

{_list(BF16_CHECKPOINTS)}"""


def _list(cases: list[Case]) -> str:
    return "\n".join(f"* {case.name}" for case in cases)


def _table(cases: list[Case], differences: Differences) -> str:
    lines = ["| case | ranks | loss | gradient norm | weights | in |", "|---|---|---|---|---|---|"]
    for case in cases:
        numbers = " | ".join(f"{x:.0e}" for x in differences[case.name])
        lines.append(f"| {case.name} | {case.world_size} | {numbers} | {'long' if case in LONG else 'short'} |")
    return "\n".join(lines)


def write(differences: Differences) -> None:
    PAGE.write_text(render_page(differences))
    before, rest = README.read_text().split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{render_layouts()}\n{END}{rest.split(END)[1]}")
