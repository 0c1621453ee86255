"""Forward and backward of our decoder beside the code of transformers: the same Llama on this CPU, in turns.

    python benchmarks/model_code.py [--pairs 12]

Both have the same weights, rows, documents and chunked loss, uncompiled, float32. CPU seconds of one thread, so that
other work on the machine moves little; A B B A, so that a steady drift cancels. Writes
benchmarks/results/model-code-DATE.json and prints for each size the median of the paired ratios with the middle 80 % of
them. plan/constants.py quotes it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from aifactory_train.models.build import build_model, init_weights
from aifactory_train.models.parts import ModelParts
from aifactory_train.recipe.load import load_recipe
from aifactory_train.recipe.schema import Recipe
from aifactory_train.results.provenance import provenance
from aifactory_train.rundir import write_atomic
from aifactory_train.strictyaml import configs_dir

RESULTS = Path(__file__).resolve().parent / "results"
RECIPES = ("demo", "cpu-yardstick")
ROWS, DOCUMENTS_IN_ROW = 2, 4
CODES = ("own", "transformers")


def built(recipe: Recipe, code: str) -> ModelParts:
    with torch.device("meta"):
        parts = build_model(recipe.model, code)
    parts.root.to_empty(device="cpu")
    return parts


def same_models(recipe: Recipe) -> dict[str, ModelParts]:
    """Both codes with the same random weights."""
    models = {code: built(recipe, code) for code in CODES}
    own = models["own"].root
    init_weights(own, dict(own.named_parameters()), recipe.model, recipe.train.seed)
    theirs, weights = dict(models["transformers"].root.named_parameters()), dict(own.named_parameters())
    assert theirs.keys() == weights.keys()
    with torch.no_grad():
        for name, weight in weights.items():
            theirs[name].copy_(weight)
    return models


def pass_s(parts: ModelParts, batch: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    """CPU seconds of one forward and backward, and the mean loss of a token."""
    start_s = time.process_time()
    loss = parts.root(*batch)
    loss.backward()
    taken_s = time.process_time() - start_s
    parts.root.zero_grad(set_to_none=True)
    return taken_s, loss.item() / batch[0].numel()


def measure(recipe: Recipe, n_pairs: int) -> dict[str, Any]:
    """CPU seconds by code and the paired ratios transformers / own."""
    models, seq = same_models(recipe), recipe.data.seq_len_tokens
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(recipe.model.vocab_size, (ROWS, seq + 1), generator=generator)
    place = torch.arange(seq)[None].expand(ROWS, -1)
    document, position = place * DOCUMENTS_IN_ROW // seq, place % (seq // DOCUMENTS_IN_ROW)
    batch = (words[:, :-1], words[:, 1:], document, position)
    seconds: dict[str, list[float]] = {code: [] for code in CODES}
    for pair in range(-2, n_pairs):
        losses = {}
        for code in CODES if pair % 2 == 0 else reversed(CODES):
            taken_s, losses[code] = pass_s(models[code], batch)
            if pair >= 0:  # the first two pairs warm up
                seconds[code].append(taken_s)
        if abs(losses["own"] - losses["transformers"]) > 1e-5 * losses["own"]:
            raise SystemExit(f"the losses are not the same: {losses}")
    ratios = sorted(theirs / ours for ours, theirs in zip(seconds["own"], seconds["transformers"], strict=True))
    low, high = ratios[n_pairs // 10], ratios[-1 - n_pairs // 10]
    return {
        "rows": ROWS,
        "seq_len_tokens": seq,
        "median_s": {code: statistics.median(values) for code, values in seconds.items()},
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
        "ratios": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    load_before = os.getloadavg()[0]
    for name in RECIPES:
        found[name] = measure(load_recipe(configs_dir() / "recipes" / f"{name}.yaml"), args.pairs)
        at = found[name]
        print(f"{name:14s} transformers / own {at['ratio']:.2f} ({at['low']:.2f} to {at['high']:.2f})")
    today = datetime.now(UTC)
    result = {
        "schema": "aifactory-model-code/1",
        "date": today.isoformat(timespec="seconds"),
        **provenance(),
        "cores": os.cpu_count(),
        "threads": 1,
        "precision": "fp32",
        "load_1min_before": round(load_before, 2),
        "load_1min_after": round(os.getloadavg()[0], 2),
        "models": found,
    }
    write_atomic(RESULTS / f"model-code-{today:%Y-%m-%d}.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
