"""What facts are made of: strict, frozen, and each with a source."""

from __future__ import annotations

import re
import shlex
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from aifactory_train.hostlist import expand


def fits(pattern: str, expected: str) -> AfterValidator:
    """A text that the pattern takes whole; else the fault says what was expected, in words."""

    def check(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise ValueError(f"expected {expected}")
        return text

    return AfterValidator(check)


def _whole_command(text: str) -> str:
    try:
        shlex.split(text, comments=True)
    except ValueError as error:
        raise ValueError(f"no line of a shell: {str(error).lower()}") from None
    return text


def _host_list(text: str) -> str:
    if not expand(text):
        raise ValueError("expected host names, such as node[001-128]")
    return text


Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0, lt=2**63)]
Index = Annotated[int, Field(ge=0, lt=2**31)]
Name = Annotated[str, fits(r"[A-Za-z0-9][A-Za-z0-9._-]*", "a name of letters, digits, dots, _ and -")]
# One line of a batch script: a newline would start a new one.
Line = Annotated[str, fits(r"[^\x00-\x1f\x7f\x85\u2028\u2029]+", "one line of text, without control characters")]
Command = Annotated[Line, AfterValidator(_whole_command)]
VariableName = Annotated[str, fits(r"[A-Za-z_][A-Za-z0-9_]*", "the name of a variable: letters, digits and _")]
# Stands between double quotes in a batch script, where $VARIABLES are to be filled in and nothing is to be run.
_IN_QUOTES = r"(?:[^\x00-\x1f\x7f`\"\\$]|\$(?:[A-Za-z_][A-Za-z0-9_]*|\{[A-Za-z_][A-Za-z0-9_]*\}))*"
Expanded = Annotated[str, fits(_IN_QUOTES, "text in which $ begins $NAME or ${NAME}, without quotes, ` and \\")]
HostList = Annotated[str, AfterValidator(_host_list)]


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
    date: Annotated[str, fits(r"20\d\d-[01]\d(-[0-3]\d)?", "YYYY-MM-DD or YYYY-MM")]


class Option(Facts):
    """One option of sbatch or srun, and why the machine needs it."""

    option: Annotated[str, fits(r"--?[A-Za-z][!-~]*", "one option, such as --name=value, without spaces")]
    why: Line


class Variable(Facts):
    """One environment variable, and why. The value is text, never evaluated by a shell unless `expand` says so.

    expand: the value holds variables such as $SLURM_JOB_ID, to be filled in when the job starts.
    """

    name: VariableName
    value: Annotated[str, fits(r"[^\x00-\x1f\x7f`\"\\]*", 'one line without ", ` and \\')]
    why: Line
    expand: bool = False

    @model_validator(mode="after")
    def _expands_to_text(self) -> Variable:
        if self.expand and re.fullmatch(_IN_QUOTES, self.value) is None:
            raise ValueError(f"value: expected $NAME or ${{NAME}} after each $, given: {self.value!r}")
        return self
