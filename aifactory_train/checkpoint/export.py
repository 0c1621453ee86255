"""Hugging Face folders out and in: safetensors, config and tokenizer, read and written a few GiB at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from aifactory_train.checkpoint.dcp import read_tensors, stored_tensors
from aifactory_train.checkpoint.manager import check_model, read_commit, verify_files
from aifactory_train.errors import CheckpointError, UserError, storage_errors
from aifactory_train.models.decoder import Decoder
from aifactory_train.models.parts import DTYPES, boxes
from aifactory_train.plan.plan import Plan
from aifactory_train.recipe.schema import Model
from aifactory_train.rundir import RunDir, committed_steps, step_folder, write_atomic

# A file of this size is what the process holds at once; the hub's own convention is 5 GB.
EXPORT_FILE_BYTES = 5_000_000_000
STEP_FILE = "aifactory_step.json"
INDEX = "model.safetensors.index.json"


def huggingface_config(model: Model) -> dict[str, Any]:
    """The fields of `config.json` that describe our model."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling is not None:
        s = model.rope_scaling
        rope |= {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_max_seq_len_tokens,
        }
    config = {
        "architectures": [{"llama": "Llama", "mistral": "Mistral", "qwen3": "Qwen3"}[model.family] + "ForCausalLM"],
        "model_type": model.family,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_size,
        "max_position_embeddings": model.max_seq_len_tokens,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied_embeddings,
        "initializer_range": model.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        # Version 5 of transformers reads rope_parameters, version 4 the two older fields.
        "rope_parameters": rope,
        "rope_theta": model.rope_theta,
        "rope_scaling": None if model.rope_scaling is None else rope,
    }
    if model.family == "mistral":
        config["sliding_window"] = None
    return config


def export_run(run: RunDir, plan: Plan) -> str:
    """Write the newest commit as a Hugging Face folder that plain `transformers` loads. Needs no GPU, one process.

    Returns a sentence that says what was done. A folder that already holds this step is left alone; another one is
    replaced as a whole.

    Raises:
        CheckpointError: no commit, a damaged one, or one of another model.
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
    check_model(commit, model.model_dump(mode="json"), run.checkpoints)
    verify_files(run.checkpoints, commit)
    tmp = run.export.with_name(run.export.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    with storage_errors("exporting", run.export, "free some space and export again; the checkpoint is untouched"):
        tmp.mkdir(parents=True)
        _write_weights(step_folder(run.checkpoints, commit.step), tmp, dtype)
        _write_config(model, run.tokenizer, tmp, dtype)
        write_atomic(tmp / STEP_FILE, stamp)
        shutil.rmtree(run.export, ignore_errors=True)
        tmp.rename(run.export)
    return f"exported step {commit.step} of {plan.recipe.n_steps}: {run.export}"


def _write_weights(checkpoint: Path, target: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import save_file

    names = {k.removeprefix("model."): v for k, v in stored_tensors(checkpoint).items() if k.startswith("model.")}
    groups: list[list[str]] = [[]]
    size = 0
    for name, meta in names.items():
        n_bytes = meta.size.numel() * dtype.itemsize
        if size + n_bytes > EXPORT_FILE_BYTES and groups[-1]:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += n_bytes
    weight_map: dict[str, str] = {}
    for i, group in enumerate(groups):
        file = "model.safetensors" if len(groups) == 1 else f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        part = {n: torch.empty(names[n].size, dtype=names[n].properties.dtype) for n in group}
        read_tensors({"model": part}, checkpoint)
        save_file({n: t.to(dtype).contiguous() for n, t in part.items()}, target / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
    if len(groups) > 1:
        total = sum(m.size.numel() * dtype.itemsize for m in names.values())
        write_atomic(target / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def _write_config(model: Model, tokenizer: Path, target: Path, dtype: torch.dtype) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    words = AutoTokenizer.from_pretrained(tokenizer)
    words.save_pretrained(target)
    config = huggingface_config(model)
    special = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": None}
    name = str(dtype).removeprefix("torch.")
    AutoConfig.for_model(config.pop("model_type"), **config, **special, dtype=name).save_pretrained(target)
    GenerationConfig(**special).save_pretrained(target)


@torch.no_grad()
def load_huggingface(decoder: Decoder, folder: Path) -> None:
    """Fill a decoder or a stage of one, sharded or not, from a Hugging Face folder of safetensors.

    Each rank reads its own part.

    Raises:
        CheckpointError: no such folder, another architecture, missing or truncated files, missing tensors.
    """
    from safetensors import SafetensorError, safe_open

    _check_config(decoder.shape, folder)
    files = _weight_files(folder)
    # Of the whole model: a pipeline stage has a part of it, and the other tensors belong to other stages.
    with torch.device("meta"):
        ours = {n for n, _ in Decoder(decoder.shape).named_parameters()}
    # Older folders hold the frequencies of RoPE, and tied ones a second copy of the embedding.
    extra = [n for n in files if n not in ours and n != "lm_head.weight" and not n.endswith("rotary_emb.inv_freq")]
    if extra:
        raise CheckpointError(
            f"the weights have {len(extra)} tensors that the recipe's model has not, such as {extra[0]}",
            where=str(folder),
            do="take a recipe of that model; biases are not supported",
        )
    for name, parameter in decoder.named_parameters():
        do = "download the folder again, or take the recipe of that model"
        if name not in files:
            raise CheckpointError(f"the weights have no tensor {name}", where=str(folder), do=do)
        try:
            with safe_open(folder / files[name], framework="pt") as f:
                stored = f.get_slice(name)
                shape = tuple(stored.get_shape())
                if shape != tuple(parameter.shape):
                    raise CheckpointError(
                        f"{name} has shape {shape}, the recipe's model {tuple(parameter.shape)}",
                        where=str(folder),
                        do=do,
                    )
                for box, view in boxes(parameter):
                    view.copy_(stored[box])
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{files[name]} cannot be read: {error}", where=str(folder), do=do) from None


def _weight_files(folder: Path) -> dict[str, str]:
    """Tensor name -> file of a Hugging Face folder, with one file or with an index."""
    from safetensors import SafetensorError, safe_open

    index = folder / INDEX
    if index.exists():
        return dict(_read_json(index).get("weight_map", {}))
    try:
        with safe_open(folder / "model.safetensors", framework="pt") as f:
            return dict.fromkeys(f.keys(), "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"model.safetensors cannot be read: {error}",
            where=str(folder),
            do="give a Hugging Face folder with safetensors; pickled weights (.bin) are not loaded",
        ) from None


def _check_config(model: Model, folder: Path) -> None:
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError("no config.json", where=str(folder), do="set model.init_from to a Hugging Face folder")
    found, wanted = _read_json(path), huggingface_config(model)
    there, here = _rope(found), _rope(wanted)
    keys = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    keys += ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings")
    # A field that is absent or null has the default of its architecture, which the tensor shapes check.
    wrong = [f"{k}: weights {found[k]!r}, recipe {wanted[k]!r}" for k in keys if found.get(k) not in (None, wanted[k])]
    wrong += [f"RoPE {k}: weights {there.get(k)!r}, recipe {here.get(k)!r}" for k in here if there.get(k) != here[k]]
    wrong += [f"RoPE {k}: weights {there[k]!r}, recipe nothing" for k in there if k not in here]
    wrong += [f"{k}: weights true, our decoder has none" for k in ("attention_bias", "mlp_bias") if found.get(k)]
    window = found.get("sliding_window") if found.get("use_sliding_window", True) else None
    if window is not None and window < model.max_seq_len_tokens:
        wrong.append(f"sliding_window: weights {window}, shorter than max_seq_len_tokens {model.max_seq_len_tokens}")
    if wrong:
        raise CheckpointError(
            f"the weights are of another model: {'; '.join(wrong)}",
            where=str(path),
            do="extend the matching file of configs/models/ in the recipe",
        )


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """What decides the angles, from either form: `rope_parameters`, or `rope_theta` beside `rope_scaling`."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    names = () if kind == "default" else tuple(k for k in given if k not in ("rope_type", "type", "rope_theta"))
    return {
        "rope_theta": float(config.get("rope_theta") or given.get("rope_theta") or 10000.0),
        "rope_type": kind,
        **{k: float(given[k]) for k in names if isinstance(given[k], int | float)},
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path.name} cannot be read: {error}", where=str(path), do="download the folder again"
        ) from None


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
