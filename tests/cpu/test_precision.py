"""fp8 through torchao: what is converted, how near it is to bf16, on tp too, and where it is refused.

No CPU multiplies in fp8, so torchao's emulation casts to 8 bits and multiplies in the precision of the model. Run as a
program, this file is one rank of tp: `test_precision.py RANK FOLDER`.
"""

import importlib
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from aifactory_train.errors import PlanError
from aifactory_train.models.build import init_weights
from aifactory_train.models.decoder import Decoder
from aifactory_train.parallel.precision import _convert_linears, apply_precision, refuse_fp8
from aifactory_train.parallel.remat import apply_remat
from aifactory_train.parallel.tensor import apply_tensor_parallel
from aifactory_train.plan.contract import Layout
from aifactory_train.recipe.schema import Model

SMALL = Model(
    family="llama", vocab_size=256, hidden_size=64, ffn_size=128, n_layers=2, n_heads=4, n_kv_heads=2, head_size=16,
    max_seq_len_tokens=128, rope_theta=1e4, norm_eps=1e-5, tied_embeddings=False,
)  # fmt: skip
TOKENS = 32
# A number of e4m3 has 3 bits after the point, so it is off by 1 in 16 at most; sums over a matrix are nearer.
LOSS_RTOL, GRADIENT_RTOL = 5e-4, 0.16
# Around fp8 in float32 only a number that lies between two of e4m3 may fall the other way when tp sums in halves.
# A scale of a rank's own part, in place of the whole tensor or row, moves gradients by 0.09.
TP_LOSS_RTOL, TP_GRADIENT_RTOL = 1e-6, 2e-3


def a_layout(precision: str, tp: int = 1, remat: str = "none") -> Layout:
    return Layout(
        engine="fsdp2", world_size=tp, dp_shard=1, tp=tp, micro_batch_rows=2, accumulation=1, remat=remat,
        reshard_after_forward=False, precision=precision, threads_per_rank=1,
    )  # fmt: skip


def trained(layout: Layout, around: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Loss and gradients of one forward and backward, whole on every rank. around: what is not fp8."""
    with torch.device("meta"):
        decoder = Decoder(SMALL).to(around)
    parts = decoder.parts()
    if layout.precision != "bf16":
        _convert_linears(parts, layout, emulate=True)
    if layout.tp > 1:
        apply_tensor_parallel(parts, init_device_mesh("cpu", (layout.tp,), mesh_dim_names=("tp",)))
    apply_remat(parts, layout)
    decoder.to_empty(device="cpu")
    init_weights(dict(decoder.named_parameters()), decoder.shape, 0)
    tokens = torch.randint(0, 256, (2, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    document = (torch.arange(TOKENS) // 7).expand(2, -1).int()
    loss = decoder(tokens[:, :-1], tokens[:, 1:], document)
    loss.backward()
    grads = {name: p.grad for name, p in decoder.named_parameters()}
    whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}
    return {"loss": loss.detach(), **whole}


def error_of(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Relative error of the loss, and the largest of a gradient."""
    assert found.keys() == right.keys()
    off = {n: float((found[n].float() - right[n].float()).norm() / right[n].float().norm()) for n in right}
    loss = off.pop("loss")
    return loss, torch.tensor(list(off.values())).max().item()  # max() would drop a NaN


def test_a_gradient_that_is_no_number_is_within_no_bound():
    right = {name: torch.ones(2) for name in ("loss", "a", "b", "c")}
    for broken in "abc":
        _, gradient = error_of(right | {broken: torch.full((2,), math.nan)}, right)
        assert not gradient < math.inf


@pytest.mark.parametrize("precision", ["fp8", "fp8_rowwise"])
def test_fp8_is_near_bf16_and_not_the_same(precision):
    bf16, fp8 = trained(a_layout("bf16")), trained(a_layout(precision))
    assert all(torch.isfinite(t).all() for t in fp8.values())
    loss, gradient = error_of(fp8, bf16)
    assert 0 < loss < LOSS_RTOL and 0.01 < gradient < GRADIENT_RTOL, (loss, gradient)


@pytest.mark.parametrize("precision", ["fp8", "fp8_rowwise"])
@pytest.mark.parametrize("remat", ["selective", "full"])
def test_remat_changes_no_bit_in_fp8(precision, remat):
    without, with_it = trained(a_layout(precision)), trained(a_layout(precision, remat=remat))
    assert all(torch.equal(without[name], with_it[name]) for name in without)


def test_the_linears_of_the_blocks_are_converted_and_nothing_else():
    with torch.device("meta"):
        decoder = Decoder(SMALL)
    names = [name for name, _ in decoder.named_parameters()]
    apply_precision(decoder.parts(), a_layout("bf16"))
    assert all(type(m) is nn.Linear for m in decoder.modules() if isinstance(m, nn.Linear)), "bf16 changes nothing"
    apply_precision(decoder.parts(), a_layout("fp8"))
    kinds = {name: type(m).__name__ for name, m in decoder.named_modules() if isinstance(m, nn.Linear)}
    assert kinds.pop("lm_head") == "Linear" and set(kinds.values()) == {"Float8Linear"}
    assert len(kinds) == 7 * SMALL.n_layers
    assert [name for name, _ in decoder.named_parameters()] == names


def test_matrices_that_fp8_units_do_not_take_are_refused_with_their_sides_on_a_rank_of_tp():
    with torch.device("meta"):
        parts = Decoder(SMALL).parts()
    apply_precision(parts, a_layout("fp8", tp=2))
    with pytest.raises(PlanError, match=r"self_attn.k_proj is 8 x 64 on each of 4"):
        apply_precision(parts, a_layout("fp8", tp=4))


GPU = torch.device("cuda", 0)
A100, ADA, HOPPER = (
    {"name": n, "major": a, "minor": b} for n, a, b in (("A100", 8, 0), ("L40S", 8, 9), ("H100", 9, 0))
)


@pytest.mark.parametrize(
    ("precision", "gpu", "reason"),
    [
        ("fp8", A100, "compute capability 8.9, and A100 has 8.0"),
        ("fp8", ADA, None),
        ("fp8_rowwise", ADA, "compute capability 9.0, and L40S has 8.9"),
        ("fp8", HOPPER, None),
        ("fp8_rowwise", HOPPER, None),
        ("fp8", {"name": "MI250X", "gcnArchName": "gfx90a:sramecc+"}, "gfx942, gfx950, and MI250X is gfx90a"),
        ("fp8_rowwise", {"name": "MI300X", "gcnArchName": "gfx942:sramecc+"}, None),
        ("bf16", A100, None),
    ],
)
def test_a_gpu_without_fp8_units_is_refused_with_what_it_is(monkeypatch, precision, gpu, reason):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**gpu))
    monkeypatch.setattr(torch.version, "hip", "6.2" if "gcnArchName" in gpu else None)
    if reason is None:
        return refuse_fp8(a_layout(precision), GPU)
    with pytest.raises(PlanError, match=reason) as refused:
        refuse_fp8(a_layout(precision), GPU)
    assert "train.precision=bf16" in refused.value.do


def test_a_cpu_is_refused_and_so_is_an_installation_without_torchao(monkeypatch):
    with pytest.raises(PlanError, match="needs a GPU, and this run is on cpu"):
        refuse_fp8(a_layout("fp8"), torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**HOPPER))
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(PlanError, match="needs torchao") as refused:
        refuse_fp8(a_layout("fp8"), GPU)
    assert "pip install 'aifactory-train[fp8]'" in refused.value.do


@pytest.mark.parametrize("error", [OSError("undefined symbol: _ZN3c10"), RuntimeError("operator does not exist")])
def test_a_torchao_that_was_built_for_another_torch_is_refused_with_what_it_says(monkeypatch, error):
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**HOPPER))
    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(PlanError, match=str(error)) as refused:
        refuse_fp8(a_layout("fp8"), GPU)
    assert refused.value.on_every_rank


def rank_of_tp(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    for precision in ("fp8", "fp8_rowwise"):
        for remat in ("none", "selective"):
            found = trained(a_layout(precision, tp=2, remat=remat), torch.float32)
            if rank == 0:
                torch.save(found, folder / f"{precision}-{remat}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_of_tp_have_the_gradients_of_one_in_fp8(tmp_path):
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    for precision in ("fp8", "fp8_rowwise"):
        found = {remat: torch.load(tmp_path / f"{precision}-{remat}.pt") for remat in ("none", "selective")}
        assert all(torch.equal(found["none"][name], found["selective"][name]) for name in found["none"])
        loss, gradient = error_of(found["none"], trained(a_layout(precision), torch.float32))
        assert loss < TP_LOSS_RTOL and gradient < TP_GRADIENT_RTOL, (precision, loss, gradient)


if __name__ == "__main__":
    rank_of_tp(int(sys.argv[1]), Path(sys.argv[2]))
