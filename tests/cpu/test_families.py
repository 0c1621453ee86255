"""Any Hugging Face model: tiny random ones of many families train, are exported, and come back in.

The code of transformers stands on both sides: trained by us on packed rows, and plain, document by document.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aifactory_train.checkpoint.export import export_run
from aifactory_train.checkpoint.huggingface import load_weights
from aifactory_train.machine.load import load_machine
from aifactory_train.models.build import build_model, init_weights
from aifactory_train.plan.plan import Plan, load_plan, make_plan
from aifactory_train.recipe.load import load_recipe
from aifactory_train.recipe.schema import Model
from aifactory_train.rundir import RunDir, read_jsonl
from forked_ranks import in_forks
from tiny_models import FAMILIES, save_config
from training_runs import write_recipe

OWN = ("llama", "eurollm", "mistral", "qwen2", "qwen3")
# By DeepSpeed, with this stage of ZeRO: tied embeddings, a loss from all logits, experts.
ZERO = {"gemma2": 3, "mixtral": 3, "gpt2": 1}
STEPS = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("configs")
    return {name: save_config(name, top / name) for name in FAMILIES}


def plan_of(words: dict[str, Path], folder: Path, ranks: int, **changes: object) -> Plan:
    shape = {key: changes.pop(key) for key in ("hf", "init_from") if key in changes}
    steps = {"train__budget_tokens": STEPS * 1024, "schedule__warmup_tokens": 0, "checkpoint__every_steps": 100}
    recipe = load_recipe(write_recipe(folder, **words, model=shape, **{**steps, **changes}))
    return make_plan(recipe, load_machine("local"), cpu_ranks=ranks)


def train(plans: dict[str, Plan], top: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of metrics.jsonl of each plan; all ranks are forks of one process."""
    failed = [name for name, codes in in_forks(plans, top).items() if any(codes)]
    assert not failed, (top / f"{failed[0]}.txt").read_text()
    return {name: read_jsonl(RunDir(top / name).metrics) for name in plans}


@pytest.fixture(scope="module")
def trained(words, folders, tmp_path_factory):
    """(top folder, rows by run).

    FAMILY-RANKS is trained by the code of transformers, FAMILY-own by our decoder, FAMILY-zero by DeepSpeed.
    """
    top = tmp_path_factory.mktemp("runs")
    plans = {}
    for name, folder in folders.items():
        code = {"hf": str(folder), "layout__model_code": "transformers"}
        for ranks in (1, 2):
            plans[f"{name}-{ranks}"] = plan_of(words, top / "recipes" / f"{name}-{ranks}", ranks, **code)
        if name in OWN:
            code["layout__model_code"] = "own"
            plans[f"{name}-own"] = plan_of(words, top / "recipes" / f"{name}-own", 1, **code)
    tp = {"hf": str(folders["qwen2"]), "layout__model_code": "own", "layout__tp": 2}
    plans["qwen2-tp"] = plan_of(words, top / "recipes" / "qwen2-tp", 2, **tp)
    for name, stage in ZERO.items():
        zero = {"layout__engine": "deepspeed", "layout__zero_stage": stage, "layout__model_code": "transformers"}
        folder = top / "recipes" / f"{name}-zero"
        plans[f"{name}-zero"] = plan_of(words, folder, 2, hf=str(folders[name]), **zero)
    return top, train(plans, top)


def exported(top: Path, name: str) -> RunDir:
    run = RunDir(top / name)
    if not run.export.exists():
        export_run(run, load_plan(run.plan))
    return run


def filled(model: Model, weights: Path) -> torch.nn.Module:
    with torch.device("meta"):
        root = build_model(model, "transformers").root
    root.to_empty(device="cpu")
    load_weights(dict(root.named_parameters()), model, weights)
    return root


def norm_of(root: torch.nn.Module) -> float:
    return torch.stack([p.grad.norm() for p in root.parameters()]).norm().item()


def packed() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two rows of three documents, which begin at other tokens in each."""
    torch.manual_seed(0)
    tokens, target = torch.randint(3, 512, (2, 2, 64))
    target[0, :9] = -100
    lengths = torch.tensor([[20, 1, 43], [7, 40, 17]])
    document = torch.stack([torch.arange(3).repeat_interleave(row) for row in lengths])
    position = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    return tokens, target, document.int(), position


def same_curve(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
    assert len(one) == len(two) == STEPS
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in one], rel=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_on_ranks_as_on_one(trained, name):
    _, rows = trained
    one, two = rows[f"{name}-1"], rows[f"{name}-2"]
    assert one[-1]["loss"] < one[0]["loss"] - 0.2
    same_curve(one, two)


@pytest.mark.parametrize("name", OWN)
def test_our_decoder_and_the_code_of_transformers_train_alike(trained, name):
    same_curve(*(trained[1][f"{name}-{code}"] for code in ("1", "own")))


@pytest.mark.parametrize("name", ZERO)
def test_deepspeed_trains_a_family_as_one_process_does(trained, name):
    same_curve(*(trained[1][f"{name}-{layout}"] for layout in ("1", "zero")))


def test_biases_are_split_with_their_heads(trained):
    same_curve(*(trained[1][f"qwen2-{layout}"] for layout in ("own", "tp")))


@pytest.mark.parametrize("name", FAMILIES)
def test_an_export_gives_plain_transformers_the_same_logits_and_losses_document_by_document(trained, name):
    from transformers import AutoModelForCausalLM

    top, _ = trained
    run = exported(top, f"{name}-2")
    ours = filled(load_plan(run.plan).recipe.model, run.export)
    theirs, info = AutoModelForCausalLM.from_pretrained(
        run.export, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens, target, document, position = packed()
    with torch.no_grad():
        assert (ours(tokens) - theirs.eval()(tokens).logits).abs().max() < 1e-5
    loss = ours(tokens, target, document, position)
    loss.backward()
    expected = torch.zeros(())
    for row in range(2):
        for number in range(3):
            of = document[row] == number
            logits = theirs(tokens[row : row + 1, of]).logits[0].float()
            expected = expected + F.cross_entropy(logits, target[row, of], ignore_index=-100, reduction="sum")
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert norm_of(ours) == pytest.approx(norm_of(theirs), rel=1e-5)
    with torch.no_grad():
        assert abs(ours(tokens, target).item() - loss.item()) > 1e-3, "documents make no difference here"


def test_training_goes_on_from_an_export(words, trained, folders, tmp_path):
    top, rows = trained
    plans = {}
    for name in ("llama", "gemma2", "gpt2", "apertus", "mixtral"):
        start = {"hf": str(folders[name]), "init_from": str(exported(top, f"{name}-2").export)}
        plans[name] = plan_of(words, tmp_path / "recipes" / name, 2, **start, train__budget_tokens=1024)
    for name, (row, *_) in train(plans, tmp_path).items():
        assert row["loss"] < rows[f"{name}-2"][0]["loss"] - 0.2, f"{name} begins anew"


@pytest.mark.parametrize("name", OWN)
def test_both_codes_give_one_loss_and_one_gradient_norm(folders, tmp_path, words, name):
    model = plan_of(words, tmp_path, 1, hf=str(folders[name])).recipe.model
    assert model.family == FAMILIES[name][0]
    roots = []
    for code in ("own", "transformers"):
        with torch.device("meta"):
            root = build_model(model, code).root
        root.to_empty(device="cpu")
        roots.append(root)
    init_weights(dict(roots[0].named_parameters()), model, 3)
    with torch.no_grad():
        for parameter in roots[0].parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    roots[1].load_state_dict(roots[0].state_dict())
    losses = [root(*packed()) for root in roots]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    assert norm_of(roots[0]) == pytest.approx(norm_of(roots[1]), rel=1e-6)
