"""What each remat keeps, against the planner's tables, and that it changes no number."""

import gc
import weakref

import pytest
import torch
import torch._dynamo
import torch._functorch.config
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aifactory_train.models.attention import Attention
from aifactory_train.models.build import init_weights
from aifactory_train.models.decoder import Block, Decoder, FeedForward
from aifactory_train.models.parts import ModelParts
from aifactory_train.parallel.remat import apply_remat
from aifactory_train.plan import shape
from aifactory_train.plan.contract import Layout
from aifactory_train.recipe.schema import Model

SMALL = Model(
    family="llama",
    vocab_size=512,
    hidden_size=128,
    ffn_size=320,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_size=32,
    max_seq_len_tokens=4096,
    rope_theta=1e4,
    norm_eps=1e-5,
    tied_embeddings=False,
)
TOKENS = 2048  # more than attention in chunks takes on a CPU


@pytest.fixture(autouse=True)
def as_it_was():
    yield
    torch._functorch.config.activation_memory_budget = 1.0
    torch._dynamo.reset()


def a_layout(remat: str, **changes) -> Layout:
    return Layout(
        engine="fsdp2", world_size=1, dp_shard=1, micro_batch_rows=2, accumulation=1, reshard_after_forward=False,
        precision="bf16", threads_per_rank=1, remat=remat, **changes,
    )  # fmt: skip


def parts_of(block: nn.Module) -> ModelParts:
    return ModelParts(
        root=block, embed=None, blocks=[block], norm=None, head=None, attention_hosts=[], tp_plan={}
    )  # fmt: skip


class Alive(TorchDispatchMode):
    """Bytes of all storages made inside that somebody still holds, by operator, without those of `there`."""

    def __init__(self, *there: torch.Tensor) -> None:
        super().__init__()
        self.not_counted = {t.untyped_storage()._cdata for t in there}
        self.made: dict[int, tuple[StorageWeakRef, int, str]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.not_counted:
                storage = tensor.untyped_storage()
                self.made.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes(), str(func)))
        return out

    def kept(self, *but: torch.Tensor) -> list[tuple[str, int]]:
        gc.collect()
        without = {t.untyped_storage()._cdata for t in but}
        return [(name, n) for key, (ref, n, name) in self.made.items() if key not in without and not ref.expired()]


def flash(q_BNTH, k_BKTH, v_BKTH, mask):
    """The operator that a GPU runs, on the meta device."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q_BNTH, k_BKTH, v_BKTH, 0.0, True)[0]


def kernel_of_a_cpu(q_BNTH, k_BKTH, v_BKTH, mask):
    k, v = k_BKTH.repeat(1, 2, 1, 1), v_BKTH.repeat(1, 2, 1, 1)
    return F.scaled_dot_product_attention(q_BNTH, k, v, is_causal=True)


def one_block(model: Model, attend, device: str) -> tuple[Block, torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.device(device):
        block = Block(model).to(torch.bfloat16)
        x_BTD = torch.zeros(1, TOKENS, model.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        cos_BTP, sin_BTP = (torch.zeros(1, TOKENS, model.head_size // 2) for _ in range(2))
    block.self_attn.attention = Attention(lambda document_BT: None, attend)
    return block, x_BTD, cos_BTP, sin_BTP


def gradients(remat: str, compiled: bool = False) -> list[torch.Tensor]:
    decoder = Decoder(SMALL)
    init_weights(dict(decoder.named_parameters()), decoder.shape, 0)
    apply_remat(decoder.parts(), a_layout(remat))
    if compiled:
        for block in decoder.parts().blocks:
            block.compile(backend="aot_eager_decomp_partition", dynamic=False)
    tokens = torch.randint(0, 512, (2, 65), generator=torch.Generator().manual_seed(0))
    document = (torch.arange(64) // 7).expand(2, -1).int()
    loss = decoder(tokens[:, :-1], tokens[:, 1:], document)
    loss.backward()
    return [loss.detach(), *(p.grad for p in decoder.parameters())]


@pytest.mark.parametrize("remat", ["selective", "full"])
def test_loss_and_gradients_are_those_without_remat_to_the_last_bit(remat):
    for with_it, without in zip(gradients(remat), gradients("none"), strict=True):
        assert torch.equal(with_it, without)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("remat", ["selective", "full"])
def test_a_block_keeps_the_bytes_of_the_planners_table(family, remat):
    model = SMALL.model_copy(update={"family": family})
    block, x, cos, sin = one_block(model, flash, "meta")
    apply_remat(parts_of(block), a_layout(remat))
    with Alive(x, cos, sin, *block.parameters()) as alive:
        y = block(x, cos, sin, None)
    # The seed and offset of attention's dropout are two numbers, and not a number per token.
    kept = [n for _, n in alive.kept(y) if n > 16]
    how = shape.Kept("bf16", "cuda", document_mask=False, remat=remat)
    assert x.nbytes + sum(kept) == TOKENS * shape.block_activation_bytes_per_token(model, TOKENS, how)


def test_selective_keeps_q_v_gate_and_down_whatever_they_are_called():
    class Other(nn.Module):
        """Seven products of different widths, with and without a bias."""

        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.ModuleList(nn.Linear(8 * i, 8 * i + 8, bias=i > 3) for i in range(1, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for linear in self.stack:
                x = linear(x).relu()
            return x

    with torch.device("meta"):
        block, x = Other(), torch.zeros(10, 8, requires_grad=True)
    apply_remat(parts_of(block), a_layout("selective"))
    with Alive(x, *block.parameters()) as alive:
        y = block(x)
    assert [n // (4 * 10 * 8) for _, n in alive.kept(y)] == [2, 4, 6, 8], "the outputs of products 1, 3, 5 and 7"


def compiled_kept_bytes(remat: str, budget_frac: float | None = None) -> float:
    """Bytes per token that a compiled block saves for its backward pass."""
    torch._dynamo.reset()
    counters.clear()
    block, x, cos, sin = one_block(SMALL, kernel_of_a_cpu, "cpu")
    apply_remat(parts_of(block), a_layout(remat, remat_budget_frac=budget_frac, compile=True))
    block.compile(backend="aot_eager_decomp_partition", dynamic=False)
    not_counted = {t.untyped_storage()._cdata for t in (*block.parameters(), cos, sin)}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in not_counted and tensor.shape[:-1].numel() > 1:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x, cos, sin, None)
    assert counters["aot_autograd"]["ok"] == 1, "the block was not compiled"
    return sum(sizes.values()) / TOKENS


def test_a_compiled_block_keeps_the_same_but_for_the_output_of_down_which_nothing_needs():
    how = shape.Kept("bf16", "cuda", document_mask=False, remat="selective", elementwise="fused")
    table = shape.block_kept_bytes_per_token(SMALL, TOKENS, how)
    assert compiled_kept_bytes("selective") == sum(table.values()) - table["output of down"]
    assert compiled_kept_bytes("full") == table["block input"]


def test_a_budget_is_kept_and_another_layout_in_this_process_takes_it_back():
    everything, least = compiled_kept_bytes("none"), 2.0 * SMALL.hidden_size
    for budget_frac in (0.5, 0.2):
        kept = compiled_kept_bytes("budget", budget_frac)
        assert least < kept <= least + budget_frac * (everything - least)
    assert compiled_kept_bytes("none") == everything


@pytest.mark.parametrize("remat", ["selective", "full"])
def test_compiled_gradients_are_those_of_eager_but_for_rounding(remat):
    for compiled, eager in zip(gradients(remat, compiled=True), gradients("none"), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6 * float(eager.abs().max()))
    assert counters["aot_autograd"]["ok"] > 0


def test_with_tp_the_sums_are_kept_and_not_what_is_still_to_be_summed():
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        block = FeedForward(SMALL)
        column = ColwiseParallel(input_layouts=Shard(1))
        row = RowwiseParallel(output_layouts=Shard(1))
        parallelize_module(block, mesh, {"gate_proj": column, "up_proj": column, "down_proj": row})
        apply_remat(parts_of(block), a_layout("selective", tp=2))
        x = torch.zeros(1, 16, SMALL.hidden_size, requires_grad=True)
        with Alive() as alive:
            graph = block(x).grad_fn  # without its output, which is the sum
        kept = alive.kept()
        assert graph is not None
    finally:
        dist.destroy_process_group()
    names = [name for name, _ in kept if "mm" in name or "reduce_scatter" in name]
    assert names == ["aten.mm.default", "_c10d_functional.reduce_scatter_tensor.default"], kept


def test_weak_references_of_storages_tell_when_they_are_gone():
    with Alive() as alive:
        held, gone = torch.zeros(8), torch.ones(16)
        watched = weakref.ref(gone)
        del gone
    assert watched() is None and [n for _, n in alive.kept()] == [held.nbytes]
