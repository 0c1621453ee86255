"""Axis tp where the parity matrix does not look: loss over a split vocabulary, blocks of Hugging Face models."""

from __future__ import annotations

import json
import traceback
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from aifactory_train.errors import PlanError
from aifactory_train.models.loss import IGNORE, ChunkLoss, VocabularyParallelChunkLoss, cross_entropy_sum
from aifactory_train.models.parts import ModelParts, local_tensor
from aifactory_train.parallel.tensor import apply_tensor_parallel

WORLD = 2
N_WORDS, N_TOKENS, WIDTH = 33, 16, 32
RTOL = 1e-5
BF16_RTOL = 8e-3  # two roundings to 8 bits of mantissa


@pytest.fixture(scope="module")
def faults(tmp_path_factory) -> dict[str, str]:
    """Each check's traceback, "" where it passed on both ranks; all in one start of the ranks, which costs seconds."""
    folder = tmp_path_factory.mktemp("tp")
    mp.spawn(_check_all, (folder,), WORLD)
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]
    return {name: "".join(one[name] for one in found) for name in found[0]}


def _check_all(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=limit)
    mesh, found = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("tp",)), {}
    for check in (_check_losses, _check_families, _check_collectives, _check_refusal):
        try:
            check(mesh)
            found[check.__name__] = ""
        except Exception:
            found[check.__name__] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def targets() -> dict[str, Tensor]:
    target_C = torch.randint(0, N_WORDS, (N_TOKENS,))
    ignored_C = target_C.clone()
    ignored_C[::3] = IGNORE
    split = -(-N_WORDS // WORLD)
    return {
        "all words": target_C,
        "some ignored": ignored_C,
        "all on rank 0": target_C % split,
        "all on rank 1": split + target_C % (N_WORDS - split),
        "none counts": torch.full((N_TOKENS,), IGNORE),
    }


def _check_losses(mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    split = -(-N_WORDS // WORLD)
    own = slice(0, split) if mesh.get_local_rank() == 0 else slice(split, N_WORDS)
    module = VocabularyParallelChunkLoss(own.start, mesh.get_group())
    for what, target_C in targets().items():
        for dtype in (torch.float32, torch.bfloat16):
            logits_CV = (torch.randn(N_TOKENS, N_WORDS) * 30).to(dtype)  # exp of them is not finite in float32
            loss, grad_CV = module(logits_CV[:, own], target_C)
            expected, expected_grad_CV = ChunkLoss()(logits_CV, target_C)
            assert loss.dtype == torch.float32 and grad_CV.dtype == dtype
            torch.testing.assert_close(torch.as_tensor(loss), expected, rtol=RTOL, atol=0, msg=what)
            rtol = RTOL if dtype == torch.float32 else BF16_RTOL
            torch.testing.assert_close(grad_CV, expected_grad_CV[:, own], rtol=rtol, atol=1e-7, msg=what)


def test_a_split_vocabulary_gives_the_plain_loss_and_gradient(faults):
    assert not faults["_check_losses"], faults["_check_losses"]


class FromTransformers(nn.Module):
    """A causal LM of transformers with the forward that ModelParts promises, in few lines."""

    def __init__(self, family: str, n_words: int = N_WORDS + 1) -> None:
        super().__init__()
        import transformers

        size = {"vocab_size": n_words, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "attention_bias": family == "llama"}
        config = transformers.AutoConfig.for_model(family, **size, **heads, tie_word_embeddings=family == "qwen3")
        lm = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        self.model, self.lm_head, self.chunk_loss = lm.model, lm.lm_head, ChunkLoss()
        self.tp_plan = {
            name.removeprefix("layers.*."): how
            for name, how in config.base_model_tp_plan.items()
            if name.startswith("layers.*.")
        }
        self.is_tied = config.tie_word_embeddings

    def parts(self) -> ModelParts:
        model, head = self.model, None if self.is_tied else self.lm_head
        if self.is_tied:
            del self.lm_head
        return ModelParts(self, model.embed_tokens, list(model.layers), model.norm, head, [], self.tp_plan)

    def forward(self, x_BT: Tensor, target_BT: Tensor) -> Tensor:
        angles = self.model.rotary_emb(torch.zeros(()), torch.arange(x_BT.shape[1])[None])
        x_BTD = self.model.embed_tokens(x_BT)
        for block in self.model.layers:
            x_BTD = block(x_BTD, attention_mask=None, position_embeddings=angles)
        x_BTD = self.model.norm(x_BTD)
        table_VD = local_tensor((self.model.embed_tokens if self.is_tied else self.lm_head).weight)
        return cross_entropy_sum(x_BTD.flatten(0, 1), table_VD, target_BT.flatten(), self.chunk_loss)


def loss_and_gradients(family: str, mesh: DeviceMesh | None) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    lm = FromTransformers(family)
    parts = lm.parts()
    for parameter in lm.parameters():
        nn.init.normal_(parameter, std=0.3)
    if mesh is not None:
        apply_tensor_parallel(parts, mesh)
    x_BT, target_BT = torch.randint(0, N_WORDS, (2, 3, N_TOKENS)).unbind()
    loss = lm(x_BT, target_BT)
    loss.backward()
    gradients = {n: p.grad for n, p in lm.named_parameters()}
    return loss.detach(), {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}


def _check_families(mesh: DeviceMesh) -> None:
    for family in ("llama", "qwen3"):
        expected, expected_gradients = loss_and_gradients(family, None)
        loss, gradients = loss_and_gradients(family, mesh)
        assert difference(loss, expected) < RTOL
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in gradients.items():
            assert difference(gradient, expected_gradients[name]) < RTOL, (family, name)


def test_blocks_of_transformers_split_by_their_own_plan_give_the_loss_and_gradients_of_one_process(faults):
    assert not faults["_check_families"], faults["_check_families"]


def _check_collectives(mesh: DeviceMesh) -> None:
    block = apply_to_block(mesh)
    x_BTD = torch.randn(2, N_TOKENS // WORLD, WIDTH, requires_grad=True)
    angles = (torch.ones(1, N_TOKENS, 8), torch.zeros(1, N_TOKENS, 8))
    counts = []
    with CommDebugMode() as seen:
        y_BTD = block(x_BTD, attention_mask=None, position_embeddings=angles)
        counts.append(dict(seen.get_comm_counts()))
        y_BTD.sum().backward()
        counts.append(dict(seen.get_comm_counts()))
    forward, both = ({str(op).split(".")[-1].split("'")[0]: n for op, n in count.items()} for count in counts)
    assert forward == {"all_gather_into_tensor": 2, "reduce_scatter_tensor": 2}
    assert both == {"all_gather_into_tensor": 4, "reduce_scatter_tensor": 4}


def apply_to_block(mesh: DeviceMesh) -> Any:
    parts = FromTransformers("qwen3").parts()
    apply_tensor_parallel(parts, mesh)
    return parts.blocks[0]


def test_a_block_gathers_twice_and_scatters_twice_in_each_direction(faults):
    assert not faults["_check_collectives"], faults["_check_collectives"]


def _check_refusal(mesh: DeviceMesh) -> None:
    with pytest.raises(
        PlanError, match=r"model.embed_tokens.weight is \(33, 32\), and tp 2 does not divide dim 0"
    ) as refused:
        apply_tensor_parallel(FromTransformers("llama", N_WORDS).parts(), mesh)
    assert refused.value.on_every_rank and refused.value.where == "plan.json: layout.tp"


def test_a_vocabulary_that_tp_does_not_divide_is_refused(faults):
    assert not faults["_check_refusal"], faults["_check_refusal"]


def test_a_block_that_its_plan_does_not_cover_is_refused(monkeypatch):
    lm = FromTransformers("llama")
    parts, mesh = lm.parts(), SimpleNamespace(size=lambda: WORLD)
    monkeypatch.setitem(lm.tp_plan, "mlp.gate_proj", "colwise_gather_output")
    with pytest.raises(PlanError, match="mlp.gate_proj of LlamaDecoderLayer: Linear, colwise_gather_output") as refused:
        apply_tensor_parallel(parts, mesh)  # type: ignore[arg-type]
    assert refused.value.on_every_rank and refused.value.where == "plan.json: layout.tp"
    del lm.tp_plan["mlp.gate_proj"]
    with pytest.raises(PlanError, match="Linear, not named in its plan"):
        apply_tensor_parallel(parts, mesh)  # type: ignore[arg-type]
