"""Adapters: they alone train, on any ranks and either engine alike; saved, resumed, merged and exported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_ranks
from aifactory_train.checkpoint.adapters import open_merged, save_adapters
from aifactory_train.checkpoint.dcp import stored_tensors
from aifactory_train.checkpoint.export import export_run
from aifactory_train.checkpoint.manager import check_model, read_commit
from aifactory_train.data.loader import Batch, Loader
from aifactory_train.data.packing import IGNORE
from aifactory_train.data.prepare import prepare
from aifactory_train.data.shards import load_prepared
from aifactory_train.errors import CheckpointError, PlanError
from aifactory_train.launch.local import write_run_folder
from aifactory_train.machine.load import load_machine
from aifactory_train.models.build import build_model
from aifactory_train.models.lora import apply_lora, split_weights
from aifactory_train.plan.plan import Plan, load_plan, make_plan
from aifactory_train.recipe.huggingface import expand
from aifactory_train.recipe.load import load_recipe
from aifactory_train.recipe.schema import Lora, Model
from aifactory_train.rundir import RunDir, read_jsonl, step_folder
from prepared_data import tokenize_here
from training_runs import write_recipe

STEPS = 6
N_BASE_STEPS = 40
N_CHAT_STEPS = 24
BASE = {"train__budget_tokens": N_BASE_STEPS * 1024, "checkpoint__every_steps": N_BASE_STEPS, "optim__lr": 1e-2}
LORA = {"rank": 4, "alpha": 8.0}
SHORT = {
    "train__budget_tokens": STEPS * 1024,
    "schedule__warmup_tokens": 0,
    "checkpoint__every_steps": STEPS // 2,
    "optim__lr": 3e-2,
}
LOSS_RTOL = 1e-5
BF16_LOSS_RTOL = 4e-3


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% generation %}{% if m['role'] == 'assistant' %}{{ m['content'] }}"
    "{% endif %}{% endgeneration %}{% if m['role'] != 'assistant' %}{{ m['content'] }}{% endif %}\n{% endfor %}"
)


def plan_of(words: dict[str, Path], folder: Path, ranks: int, layout: dict[str, Any], **changes: Any) -> Plan:
    recipe = load_recipe(write_recipe(folder, **words, **changes))
    plan = make_plan(recipe, load_machine("local"), cpu_ranks=ranks)
    same = {"micro_batch_rows": 4, "accumulation": 16 // ranks // 4, "compile": False}
    return plan.model_copy(update={"layout": plan.layout.model_copy(update=same | layout)})


def write_chats(folder: Path, words: dict[str, Path]) -> dict[str, Any]:
    """Long questions with short answers, prepared: what a recipe says of them."""
    shutil.copytree(words["prepared"] / "tokenizer", folder / "tokenizer")
    (folder / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    texts = [json.loads(line)["text"] for line in words["corpus"].read_text().splitlines()]
    with open(folder / "chats.jsonl", "w") as file:
        for i in range(0, len(texts), 15):
            question, answer = " ".join(texts[i : i + 15]), texts[i][:20]
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    source = {"name": "chats", "path": str(folder / "chats.jsonl"), "messages_key": "messages"}
    return {"data__sources": [source], "data__tokenizer": {"path": str(folder / "tokenizer")}}


@pytest.fixture(scope="module")
def runs(words: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: one that trains all from the start, one that goes on from its export, and adapters on that."""
    folder = tmp_path_factory.mktemp("lora")
    common = {**SHORT, "model__init_from": str(RunDir(folder / "base").export)}
    deepspeed = {"engine": "deepspeed"}
    layouts: dict[str, tuple[int, dict[str, Any]]] = {
        "one": (1, {}),
        "two": (2, {}),
        "two-again": (2, {}),
        "replicas": (2, {"dp_shard": 1, "dp_replicate": 2}),
        "remat": (2, {"remat": "full", "reshard_after_forward": True}),
        "bf16": (2, {"precision": "bf16"}),
        "transformers": (2, {"model_code": "transformers"}),
        **{f"zero-{stage}": (2, deepspeed | {"zero_stage": stage}) for stage in (1, 2, 3)},
        "zero-3-bf16": (2, deepspeed | {"zero_stage": 3, "precision": "bf16"}),
    }
    plans = {"base": plan_of(words, folder, 1, {}, **BASE)}
    plans |= {name: plan_of(words, folder, n, layout, **common, lora=LORA) for name, (n, layout) in layouts.items()}
    plans["names"] = plan_of(words, folder, 1, {}, **common, lora=LORA | {"targets": ["q_proj", "mlp.down_proj"]})
    plans["whole"] = plan_of(words, folder, 1, {}, **common | {"data__document_mask": False})
    chats = {**common, **write_chats(folder, words)}
    paths = words | {"prepared": folder / "prepared"}
    plans["answers"] = plan_of(paths, folder, 1, {}, **chats | {"train__budget_tokens": N_CHAT_STEPS * 1024}, lora=LORA)
    plans["chats-one"] = plan_of(paths, folder, 1, {}, **chats)
    plans["chats-two"] = plan_of(paths, folder, 2, {}, **chats)
    plans["chats-zero"] = plan_of(paths, folder, 2, deepspeed | {"zero_stage": 2}, **chats)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aifactory_train.data.prepare.tokenize_units", tokenize_here)
        prepare(plans["chats-one"].recipe.data)

    for name, plan in plans.items():
        if not name.endswith("-again"):
            write_run_folder(plan, RunDir(folder / name))
    program = [sys.executable, lora_ranks.__file__, *(str(folder / name) for name in plans)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    for run, codes in json.loads(done.stdout.splitlines()[-1]).items():
        assert not any(codes), Path(f"{run}.txt").read_text()
    return folder


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_jsonl(RunDir(run).metrics)]


def logits(model: Any, tokens_BT: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 83).view(2, 40) if tokens_BT is None else tokens_BT).logits


SAME = ["two", "replicas", "remat", "transformers", "zero-1", "zero-2", "zero-3"]


@pytest.mark.parametrize("name", SAME)
def test_ranks_engines_and_model_code_have_the_curve_of_one_process(runs: Path, name: str) -> None:
    rows, wanted = read_jsonl(RunDir(runs / name).metrics), read_jsonl(RunDir(runs / "one").metrics)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for ours, theirs in zip(rows, wanted, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=LOSS_RTOL), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), ours["step"]


@pytest.mark.parametrize("name", ["bf16", "zero-3-bf16"])
def test_bf16_follows_the_curve_of_fp32(runs: Path, name: str) -> None:
    assert losses(runs / name) == pytest.approx(losses(runs / "one"), rel=BF16_LOSS_RTOL)
    assert losses(runs / name) != losses(runs / "one")


@pytest.mark.parametrize("name", ["one", "two", "transformers", "zero-1", "zero-3", "names"])
def test_adapters_alone_train_and_the_weights_below_stay_bit_for_bit(runs: Path, name: str) -> None:
    for path in sorted((runs / name).glob("weights-*.json")):
        seen = json.loads(path.read_text())
        assert seen["before"] == seen["after"] and len(seen["before"]) == 1 + 1 + 1 + 2 * (2 + 7)
        assert sorted(seen["before"])[0] == "lm_head.weight"
        linears = {trained.split(".lora_")[0].rpartition(".")[2] for trained in seen["trained"]}
        all_linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        assert linears == ({"q_proj", "down_proj"} if name == "names" else all_linear)
        assert len(seen["trained"]) == 2 * 2 * len(linears)


def test_the_loss_falls(runs: Path) -> None:
    """On answers, which the model has not seen before."""
    curve = [loss for loss in losses(runs / "answers") if loss > 0]
    assert sum(curve[-4:]) / 4 < curve[0] - 1


def test_a_checkpoint_holds_adapters_alone(runs: Path) -> None:
    stored = stored_tensors(step_folder(RunDir(runs / "zero-3").checkpoints, STEPS))
    weights = {name for name in stored if not name.startswith("rng.")}
    assert weights and all(".lora_A.default." in name or ".lora_B.default." in name for name in weights)
    small = read_commit(RunDir(runs / "two").checkpoints, STEPS)
    whole = read_commit(RunDir(runs / "base").checkpoints, N_BASE_STEPS)
    assert small.n_bytes < whole.n_bytes / 4


def test_a_resumed_run_is_bit_identical(runs: Path) -> None:
    """The weights below are read again at its start."""
    assert losses(runs / "two-again") == losses(runs / "two") + losses(runs / "two")[STEPS // 2 :]


def test_a_run_does_not_go_on_with_other_adapters_or_on_other_weights(runs: Path) -> None:
    recipe = load_plan(RunDir(runs / "one").plan).recipe
    folder = RunDir(runs / "one").checkpoints
    commit = read_commit(folder, STEPS)
    check_model(commit, recipe.checkpoint_model(), folder)
    assert recipe.lora is not None
    for change, said in (
        ({"lora": recipe.lora.model_copy(update={"rank": 2})}, "'rank': 4"),
        ({"lora": None}, "lora: checkpoint"),
        ({"model": recipe.model.model_copy(update={"init_from": "elsewhere"})}, "init_from: checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=said):
            check_model(commit, recipe.model_copy(update=change).checkpoint_model(), folder)


def test_a_target_that_is_no_linear_of_the_blocks_is_refused_with_those_that_are(runs: Path) -> None:
    recipe = load_plan(RunDir(runs / "one").plan).recipe
    with torch.device("meta"):
        parts = build_model(recipe.model, "own")
        with pytest.raises(PlanError, match="names lm_head.*there are: down_proj, gate_proj, k_proj"):
            apply_lora(parts, Lora(rank=2, alpha=2.0, targets=["q_proj", "lm_head"]))


@pytest.mark.parametrize("name", ["one", "zero-3", "transformers"])
def test_adapter_and_merged_model_are_those_of_peft(runs: Path, name: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export = RunDir(runs / name).export
    merged = logits(AutoModelForCausalLM.from_pretrained(export))
    below = AutoModelForCausalLM.from_pretrained(RunDir(runs / "base").export)
    before = logits(below)
    adapted = PeftModel.from_pretrained(below, export / "adapter")
    assert (merged - before).abs().max() > 0.1
    torch.testing.assert_close(merged, logits(adapted), rtol=0, atol=1e-5)
    assert adapted.peft_config["default"].base_model_name_or_path == str(RunDir(runs / "base").export)
    torch.testing.assert_close(merged, logits(adapted.merge_and_unload()), rtol=0, atol=1e-6)
    assert AutoTokenizer.from_pretrained(export).eos_token_id is not None


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_linears_that_are_stored_the_other_way_and_stacked_experts_are_merged_too(tmp_path: Path, kind: str) -> None:
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "eos_token_id": 0, "bos_token_id": 0},
        "mixtral": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "num_local_experts": 4, "head_dim": 8, "max_position_embeddings": 64,
        },
    }  # fmt: skip
    folder, lora = str(tmp_path / "base"), Lora(rank=4, alpha=8.0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=96, **sizes[kind])).save_pretrained(folder)
    model = Model.model_validate(expand({"hf": folder, "init_from": folder}, "here"))
    with torch.device("meta"):
        parts, plain = build_model(model, "transformers"), build_model(model, "transformers")
        apply_lora(parts, lora)
    _, empty = split_weights(dict(parts.root.named_parameters()))
    adapters = {name: torch.randn(weight.shape) / 10 for name, weight in empty.items()}
    save_adapters(lora, adapters, folder, tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    _, read = open_merged(model, "transformers", lora, adapters)
    plain.root.to_empty(device="cpu")
    for name, weight in plain.root.named_parameters():
        weight.data.copy_(read([name])[name])
    with torch.no_grad():
        ours = plain.root(torch.arange(3, 83).view(2, 40))
    torch.testing.assert_close(ours, logits(adapted.eval()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", [["attn.c_proj"], ["h.1.attn.c_attn", "mlp.c_fc"]], ids=str)
def test_peft_puts_adapters_on_the_same_linears_as_were_trained(tmp_path: Path, targets: list[str]) -> None:
    """GPT-2 has two linears of one name in a block, and one layer alone may be named."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, lora = str(tmp_path / "base"), Lora(rank=4, alpha=8.0, targets=targets)
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=96)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model = Model.model_validate(expand({"hf": folder, "init_from": folder}, "here"))
    with torch.device("meta"):
        parts = build_model(model, "transformers")
        apply_lora(parts, lora)
    _, empty = split_weights(dict(parts.root.named_parameters()))
    save_adapters(
        lora, {name: torch.ones(weight.shape) for name, weight in empty.items()}, folder, tmp_path / "adapter"
    )
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    theirs = {name for name, _ in adapted.named_parameters() if ".lora_" in name}
    assert theirs == {f"base_model.model.{name}" for name in empty}


def test_where_the_model_below_is_gone_the_adapter_is_exported_alone(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "one", tmp_path / "one", ignore=shutil.ignore_patterns("export"))
    run, plan = RunDir(tmp_path / "one"), load_plan(RunDir(runs / "one").plan)
    base = RunDir(runs / "base").export
    base.rename(tmp_path / "elsewhere")
    try:
        for _ in range(2):
            with pytest.raises(CheckpointError, match="cannot be merged .*: no such folder") as refused:
                export_run(run, plan)
            assert f"put the folder back at {base}, the adapters were trained on it" in refused.value.do
            assert [path.name for path in run.export.iterdir()] == ["adapter"]
    finally:
        (tmp_path / "elsewhere").rename(base)
    written = (RunDir(runs / "one").export / "adapter" / "adapter_model.safetensors").read_bytes()
    assert (run.export / "adapter" / "adapter_model.safetensors").read_bytes() == written
    assert export_run(run, plan).startswith("exported step") and (run.export / "model.safetensors").exists()


def batches(runs: Path, name: str, rank: int, n_ranks: int) -> list[Batch]:
    recipe = load_plan(RunDir(runs / name).plan).recipe
    prepared, rows = load_prepared(recipe.data), recipe.global_batch_rows
    loader = Loader(prepared, recipe.data, recipe.train.seed, rows, rank, n_ranks)
    return [loader.batch(step) for step in range(STEPS)]


def test_continued_training_starts_at_the_loss_where_the_run_ended(runs: Path) -> None:
    from transformers import AutoModelForCausalLM

    batch = batches(runs, "whole", 0, 1)[0]
    out = logits(AutoModelForCausalLM.from_pretrained(RunDir(runs / "base").export), batch.input_BT)
    ended = torch.nn.functional.cross_entropy(out.flatten(0, 1), batch.target_BT.flatten(), ignore_index=IGNORE)
    assert losses(runs / "whole")[0] == pytest.approx(ended.item(), rel=1e-5)
    # Adapters begin as nothing, and this run has the rows' documents apart as the one that ended had.
    assert losses(runs / "one")[0] == pytest.approx(losses(runs / "base")[-1], abs=0.05)


@pytest.mark.parametrize("name", ["chats-two", "chats-zero"])
def test_where_no_token_counts_training_goes_on(runs: Path, name: str) -> None:
    """On one of two ranks, and on both of them."""
    counted = [[batch.n_valid_tokens for batch in batches(runs, name, rank, 2)] for rank in range(2)]
    assert any(a == 0 < b or b == 0 < a for a, b in zip(*counted, strict=True))
    assert [0, 0] in [list(pair) for pair in zip(*counted, strict=True)]
    rows, wanted = read_jsonl(RunDir(runs / name).metrics), read_jsonl(RunDir(runs / "chats-one").metrics)
    assert [row["loss"] == 0 for row in rows] == [a + b == 0 for a, b in zip(*counted, strict=True)]
    for ours, theirs in zip(rows, wanted, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=LOSS_RTOL), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), ours["step"]
