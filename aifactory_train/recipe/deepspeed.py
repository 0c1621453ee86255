"""`layout.deepspeed: FILE` to the options in that file: DeepSpeed's own JSON, as others wrote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aifactory_train.errors import RecipeError


def read_options(given: dict[str, Any], folder: Path, where: str) -> None:
    """Put the content of the file in the place of its path, where the `layout` of `given` names one.

    Args:
        given: a recipe as it was read.
        folder: what a relative path is relative to: that of the recipe file, as with `extends`.
        where: of the key, for messages.

    Raises:
        RecipeError: no such file, no JSON, or no keys and values in it.
    """
    layout = given.get("layout")
    if not isinstance(layout, dict) or not isinstance(layout.get("deepspeed"), str):
        return
    path = folder / Path(layout["deepspeed"]).expanduser()
    try:
        options = json.loads(path.read_text())
    except OSError as error:
        raise RecipeError(
            f"layout.deepspeed {layout['deepspeed']}: cannot read {path}: {error.strerror}",
            where=where,
            do="give the path of DeepSpeed's JSON, relative to the recipe file, or its options as keys and values",
        ) from None
    except ValueError as error:  # also text that is not UTF-8
        raise RecipeError(f"not valid JSON: {error}", where=str(path), do="mend that file") from None
    if not isinstance(options, dict):
        raise RecipeError(
            "expected the keys and values of DeepSpeed's JSON, found something else",
            where=str(path),
            do='write {"zero_optimization": {...}, ...}',
        )
    layout["deepspeed"] = options
