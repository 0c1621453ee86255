"""What prepared tokens depend on, and whether a folder was made from what a recipe says."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from aifactory_train.errors import DataError
from aifactory_train.recipe.schema import Data


def data_settings(data: Data) -> dict[str, Any]:
    """What the tokens depend on: sources by name and the tokenizer, not how rows are cut or mixed."""
    sources = {s.name: s.model_dump(mode="json", exclude={"name", "weight"}) for s in data.sources}
    for source in sources.values():
        if source["messages_key"] is None:
            del source["messages_key"]  # so that text has the settings it had before there were chats
    return {"sources": sources, "tokenizer": data.tokenizer.model_dump(mode="json")}


def settings_fingerprint(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def check_settings(there: dict[str, Any], data: Data) -> None:
    """Raise DataError that names each key in which a prepared folder differs from the recipe."""
    faults = list(_differences("", there, data_settings(data)))
    if faults:
        raise DataError(
            f"{data.prepared_dir} was prepared from other data settings:\n" + "\n".join(f"  {f}" for f in faults),
            where=f"data.prepared_dir {data.prepared_dir}",
            do="--set data.prepared_dir=ANOTHER_FOLDER, or delete that folder and prepare anew",
        )


def _differences(key: str, there: Any, wanted: Any) -> list[str]:
    if isinstance(there, dict) and isinstance(wanted, dict):
        out = []
        for name in sorted({*there, *wanted}):
            out += _differences(f"{key}.{name}".lstrip("."), there.get(name), wanted.get(name))
        return out
    return [] if there == wanted else [f"{key}: folder has {_short(there)}, recipe has {_short(wanted)}"]


def _short(value: Any) -> str:
    return "nothing" if value is None else "something else" if isinstance(value, dict) else repr(value)
