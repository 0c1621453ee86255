"""Hugging Face folders out: safetensors, config and tokenizer, written a few GiB at a time."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from aifactory_train.checkpoint.adapters import ADAPTER, open_merged, read_adapters, save_adapters
from aifactory_train.checkpoint.dcp import State, read_tensors, stored_tensors
from aifactory_train.checkpoint.huggingface import check_weights
from aifactory_train.checkpoint.manager import check_model, read_commit, verify_files
from aifactory_train.checkpoint.weightfiles import INDEX
from aifactory_train.errors import CheckpointError, UserError, storage_errors
from aifactory_train.models.parts import DTYPES
from aifactory_train.plan.plan import Plan
from aifactory_train.recipe.huggingface import huggingface_config
from aifactory_train.recipe.schema import Model
from aifactory_train.rundir import RunDir, committed_steps, step_folder, write_atomic

# A file of this size is what the process holds at once; the hub's own convention is 5 GB.
EXPORT_FILE_BYTES = 5_000_000_000
STEP_FILE = "aifactory_step.json"

_Read = Callable[[list[str]], dict[str, Tensor]]


def export_run(run: RunDir, plan: Plan) -> str:
    """Write the newest commit as a Hugging Face folder that plain `transformers` loads. Needs no GPU, one process.

    Returns a sentence that says what was done. A folder that already holds this step is left alone; another one is
    replaced as a whole.

    Raises:
        CheckpointError: no commit, a damaged one, or one of another model; for adapters also where the folder that
            they were trained on is gone or another: export/adapter/ is written nevertheless.
    """
    model = plan.recipe.model
    dtype = DTYPES[plan.layout.precision]
    steps = committed_steps(run.checkpoints)
    if not steps:
        raise CheckpointError(
            "there is no checkpoint to export", where=str(run.checkpoints), do="aifactory-train launch RECIPE --run RUN"
        )
    commit = read_commit(run.checkpoints, steps[-1])
    stamp = json.dumps({"step": commit.step, "dtype": str(dtype)})
    if (run.export / STEP_FILE).exists() and (run.export / STEP_FILE).read_text() == stamp:
        return f"step {commit.step} is exported already: {run.export}"
    check_model(commit, plan.recipe.checkpoint_model(), run.checkpoints)
    verify_files(run.checkpoints, commit)
    tmp = run.export.with_name(run.export.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    with storage_errors("exporting", run.export, "free some space and export again; the checkpoint is untouched"):
        tmp.mkdir(parents=True)
        shapes, read = _open_weights(plan, step_folder(run.checkpoints, commit.step), tmp)
        if plan.recipe.lora is not None:
            _check_base(model, run, commit.step, tmp)
        _write_weights(model, shapes, read, tmp, dtype)
        _write_config(model, run.tokenizer, tmp, dtype)
        write_atomic(tmp / STEP_FILE, stamp)
        shutil.rmtree(run.export, ignore_errors=True)
        tmp.rename(run.export)
    return f"exported step {commit.step} of {plan.recipe.n_steps}: {run.export}"


def _open_weights(plan: Plan, checkpoint: Path, target: Path) -> tuple[dict[str, torch.Size], _Read]:
    """Shape of each weight by name, and what reads some of them whole. Adapters are merged, and also saved as such."""
    recipe = plan.recipe
    if recipe.lora is not None:
        adapters = read_adapters(checkpoint)
        save_adapters(recipe.lora, adapters, str(Path(str(recipe.model.init_from)).expanduser()), target / ADAPTER)
        return open_merged(recipe.model, plan.layout.model_code, recipe.lora, adapters)
    stored = {k.removeprefix("model."): v for k, v in stored_tensors(checkpoint).items() if k.startswith("model.")}

    def read(names: list[str]) -> dict[str, Tensor]:
        part = {name: torch.empty(stored[name].size, dtype=stored[name].properties.dtype) for name in names}
        read_tensors({"model": part}, checkpoint)
        return part

    return {name: meta.size for name, meta in stored.items()}, read


def _check_base(model: Model, run: RunDir, step: int, written: Path) -> None:
    """Raise CheckpointError where the weights below the adapters are not there; the adapters are kept without them.

    What an earlier export has merged stays.
    """
    base = Path(str(model.init_from)).expanduser()
    try:
        check_weights(model, base)
    except CheckpointError as error:
        kept = run.export / ADAPTER
        shutil.rmtree(kept, ignore_errors=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        (written / ADAPTER).rename(kept)
        shutil.rmtree(written)
        raise CheckpointError(
            f"the adapters of step {step} are in {kept}, and cannot be merged into their model: {error.what}",
            where=error.where,
            do=f"put the folder back at {base}, the adapters were trained on it; then: "
            f"aifactory-train export {shlex.quote(str(run.root))}",
        ) from None


def _write_weights(model: Model, shapes: dict[str, torch.Size], read: _Read, target: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import save_file

    of_hub, buffers = _hub_format(model)
    groups = _file_groups({name: shape.numel() * dtype.itemsize for name, shape in shapes.items()})
    weight_map: dict[str, str] = {}
    n_bytes = 0
    for i, group in enumerate(groups):
        file = "model.safetensors" if len(groups) == 1 else f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        part = read(group)
        written = of_hub({n: part.pop(n).to(dtype) for n in group})
        written |= buffers if i == 0 else {}
        save_file({n: t.contiguous() for n, t in written.items()}, target / file, metadata={"format": "pt"})
        n_bytes += sum(t.nbytes for t in written.values())
        weight_map |= dict.fromkeys(written, file)
    if len(groups) > 1:
        write_atomic(target / INDEX, json.dumps({"metadata": {"total_size": n_bytes}, "weight_map": weight_map}))


def _file_groups(n_bytes: dict[str, int]) -> list[list[str]]:
    """Names of weights by file. A block stays in one file: some formats join several of its weights."""
    blocks: dict[str, list[str]] = {}
    for name in n_bytes:
        block = re.match(r".*?\.\d+\.", name)
        blocks.setdefault(block.group() if block else name, []).append(name)
    groups: list[list[str]] = [[]]
    size = 0
    for block_names in blocks.values():
        block_bytes = sum(n_bytes[name] for name in block_names)
        if size + block_bytes > EXPORT_FILE_BYTES and groups[-1]:
            groups.append([])
            size = 0
        groups[-1] += block_names
        size += block_bytes
    return groups


def _hub_format(model: Model) -> tuple[Callable[[State], State], State]:
    """What turns weights of the code of transformers into those of its files, and what its files hold beside them."""
    if model.family != "other":
        return lambda weights: weights, {}
    from transformers.core_model_loading import revert_weight_conversion

    from aifactory_train.models.hf import build_root

    root = build_root(model)
    state, weights = root.state_dict(), {name for name, _ in root.named_parameters()}
    buffers = {name: tensor for name, tensor in state.items() if name not in weights}
    return lambda part: revert_weight_conversion(root, part), buffers


def _write_config(model: Model, tokenizer: Path, target: Path, dtype: torch.dtype) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    words = AutoTokenizer.from_pretrained(tokenizer)
    words.save_pretrained(target)
    config = huggingface_config(model)
    special = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    name = str(dtype).removeprefix("torch.")
    GenerationConfig(**special, pad_token_id=None).save_pretrained(target)
    if model.hf_config is not None:
        # Not by way of AutoConfig, which has no class for a model with code of its own. The padding token stays: it is
        # the row of the embedding that is not trained.
        config.pop("torch_dtype", None)
        write_atomic(target / "config.json", json.dumps({**config, **special, "dtype": name}, indent=2))
        if model.trust_remote_code and model.hf is not None:
            for code in sorted(Path(model.hf).expanduser().glob("*.py")):
                shutil.copy2(code, target)
        return
    special["pad_token_id"] = None
    AutoConfig.for_model(config.pop("model_type"), **config, **special, dtype=name).save_pretrained(target)


def sample(folder: Path, prompt: str, n_tokens: int, seed: int) -> str:
    """Text that an exported model continues `prompt` with, by plain `transformers`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if not (folder / "config.json").exists():
        raise CheckpointError("there is no exported model", where=str(folder), do="aifactory-train export RUN")
    if n_tokens < 1 or not 0 <= seed < 2**63:
        raise UserError(
            f"--tokens {n_tokens} --seed {seed}: tokens must be 1 or more, the seed from 0 to 2^63 - 1",
            where="command line",
            do="--tokens 60 --seed 0",
        )
    logging.disable_progress_bar()
    words = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    inputs = words(prompt.encode("utf-8", "replace").decode() or words.eos_token, return_tensors="pt")
    room = model.config.max_position_embeddings - inputs.input_ids.shape[1]
    if n_tokens > room:
        raise UserError(
            f"prompt and --tokens {n_tokens} pass the {model.config.max_position_embeddings} tokens of the model",
            where="command line",
            do=f"--tokens {room}" if room > 0 else "give a shorter --prompt",
        )
    out = model.generate(**inputs, max_new_tokens=n_tokens, do_sample=True, top_k=20, temperature=0.8)
    return str(words.decode(out[0], skip_special_tokens=True))
