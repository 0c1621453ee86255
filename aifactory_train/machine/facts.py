"""What facts are made of: strict, frozen, and each with a source."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
Index = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
# One line of a batch script: a newline would start a new one.
Line = Annotated[str, Field(pattern=r"^[^\r\n]+$")]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class FactSource(Facts):
    """Where facts are from. `facts` are dotted keys of the machine; a key speaks for all that stands below it.

    by: `site` and `vendor` state it themselves; `third_party` saw or copied it; `derived` is arithmetic over other
    facts, shown in `source`; `probed` and `measured` were taken on the machine; `choice` is ours, not a fact.
    """

    facts: Annotated[list[str], Field(min_length=1)]
    source: Annotated[str, Field(min_length=1)]
    by: Literal["site", "vendor", "third_party", "derived", "probed", "measured", "choice"]
    date: Annotated[str, Field(pattern=r"^20\d\d-[01]\d(-[0-3]\d)?$")]


class Option(Facts):
    """One option of sbatch or srun, and why the machine needs it."""

    option: Annotated[str, Field(pattern=r"^--?[A-Za-z][^\s]*$")]
    why: Line


class Variable(Facts):
    """One environment variable, and why. The value is text, never evaluated by a shell unless `expand` says so.

    expand: the value holds shell expansions such as $SLURM_JOB_ID, to be made when the job starts.
    """

    name: VariableName
    value: Annotated[str, Field(pattern=r"^[^\r\n`\"\\]*$")]
    why: Line
    expand: bool = False
