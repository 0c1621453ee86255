"""The planner's counts against what torch itself counts: FLOPs, activations, the memory of FSDP2."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

import aifactory_train.models.decoder as decoder_module
from aifactory_train.models.attention import Attention, build_mask
from aifactory_train.models.decoder import Block, Decoder
from aifactory_train.models.parts import DTYPES
from aifactory_train.parallel.apply import apply_parallelism
from aifactory_train.parallel.mesh import build_mesh
from aifactory_train.parallel.remat import apply_remat
from aifactory_train.plan import shape
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.memory import estimate_memory
from aifactory_train.plan.work import Work
from aifactory_train.recipe.schema import Model, Optim
from aifactory_train.train.optim import build_optimizers

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
# As wide as Llama-3 8B, whose blocks decide most; few layers and a vocabulary that 1024 ranks divide keep it quick.
WIDE = SMALL.model_copy(
    update={
        "vocab_size": 32768, "hidden_size": 4096, "ffn_size": 14336, "n_layers": 3, "n_heads": 32, "n_kv_heads": 8,
        "head_size": 128,
    }
)  # fmt: skip
TOKENS = 2048


def a_layout(world_size=1, n_rows=1, **changes):
    given = {"accumulation": 1, "reshard_after_forward": True, "remat": "none", "precision": "bf16"} | changes
    return Layout(
        engine="fsdp2", world_size=world_size, dp_shard=world_size, micro_batch_rows=n_rows, threads_per_rank=1, **given
    )


def attend_by(monkeypatch, attend):
    monkeypatch.setattr(decoder_module, "LOCAL", Attention(build_mask, attend))


def whole_attention(q_BNTH, k_BKTH, v_BKTH, mask):
    """All T x T scores: what torch's counter counts, while our convention counts the causal half."""
    groups = q_BNTH.shape[1] // k_BKTH.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k_BKTH, v_BKTH))
    return (q_BNTH @ k.transpose(2, 3)).softmax(-1) @ v


@pytest.mark.parametrize("remat", ["none", "full"])
def test_flops_of_a_step_are_those_that_torch_counts_but_for_the_half_that_a_causal_mask_hides(monkeypatch, remat):
    attend_by(monkeypatch, whole_attention)
    n_tokens, model = 96, SMALL
    decoder = Decoder(model)
    apply_remat(decoder.parts(), a_layout(remat=remat))
    input_BT = torch.zeros(1, n_tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        decoder(input_BT, input_BT).backward()
    # torch counts all T x T scores.
    passes = 3 if remat == "none" else 4  # forward, backward is two, and forward again
    hidden_half = passes * 2 * n_tokens * model.n_heads * model.head_size * model.n_layers
    per_token = shape.hardware_flops_per_token(model, n_tokens, remat) + hidden_half
    assert counter.get_total_flops() == n_tokens * per_token


class FlashAttention(torch.autograd.Function):
    """Keeps what a flash attention kernel keeps; computes nothing."""

    @staticmethod
    def forward(ctx, q_BNTH, k_BKTH, v_BKTH):
        n_rows, n_heads, n_tokens, head = q_BNTH.shape
        out = q_BNTH.new_empty(n_rows, n_tokens, n_heads, head).transpose(1, 2)  # the layout in which o reads it
        ctx.save_for_backward(q_BNTH, k_BKTH, v_BKTH, out, torch.empty(n_rows, n_heads, n_tokens))
        return out

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


class OneKernelNorm(torch.autograd.Function):
    """Keeps its input, as torch's RMSNorm on a GPU does; computes nothing."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


def kept_bytes(model, n_tokens, wrap=lambda block: None):
    """Bytes of the storages that one block saves for the backward pass, without weights and RoPE angles."""
    block = Block(model).to(torch.bfloat16)
    x = torch.zeros(1, n_tokens, model.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    cos, sin = torch.zeros(2, 1, n_tokens, model.head_size // 2).unbind()
    wrap(block)
    not_counted = {t.untyped_storage()._cdata for t in (*block.parameters(), cos, sin)}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in not_counted:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x, cos, sin, None)
    return sum(sizes.values())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_block_on_a_gpu_keeps_the_bytes_of_the_table(monkeypatch, family):
    model = SMALL.model_copy(update={"family": family})
    attend_by(monkeypatch, lambda q, k, v, mask: FlashAttention.apply(q, k, v))
    monkeypatch.setattr(F, "rms_norm", lambda x, *_: OneKernelNorm.apply(x))
    how = shape.Kept("bf16", "cuda", document_mask=False)
    assert kept_bytes(model, TOKENS) == TOKENS * shape.block_activation_bytes_per_token(model, TOKENS, how)


def test_a_block_on_a_cpu_keeps_the_bytes_of_the_table_and_a_number_per_norm_and_token():
    how = shape.Kept("bf16", "cpu", document_mask=False)
    per_token = kept_bytes(SMALL, TOKENS) / TOKENS
    assert per_token == shape.block_activation_bytes_per_token(SMALL, TOKENS, how) + 2 * 4


def test_torch_compile_keeps_what_the_table_calls_fused(monkeypatch):
    def one_kernel(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), is_causal=True)

    attend_by(monkeypatch, one_kernel)
    per_token = kept_bytes(SMALL, TOKENS, lambda block: block.compile(backend="aot_eager_decomp_partition")) / TOKENS
    how = shape.Kept("bf16", "cuda", document_mask=False, elementwise="fused")
    # The kernel here is a CPU's: k and v are kept for every head, and its output once more as o reads it.
    q, kv = 4 * 32, 2 * 32
    more = 2 * (q - kv) * 2 + q * 2 + 2 * 4
    assert per_token == shape.block_activation_bytes_per_token(SMALL, TOKENS, how) + more


def tracked_peak(model, layout, n_rows):
    """Bytes by category at the peak of a step, by torch's tracker on fake tensors.

    The tracker looks at the second step: in the first, it takes the whole-model shapes that DTensor works out for the
    optimizer's state for memory.
    """
    dist.init_process_group("fake", rank=0, world_size=layout.world_size, store=FakeStore())
    try:
        mesh = build_mesh(layout, "cpu")
        with FakeTensorMode():
            with torch.device("meta"):
                decoder = Decoder(model)
            apply_parallelism(decoder.parts(), mesh, layout, TOKENS)
            decoder.to_empty(device="cpu")
            (optimizer,) = build_optimizers([decoder.parts()], Optim(lr=1e-3), DTYPES[layout.precision])
            tokens = torch.zeros(n_rows, TOKENS, dtype=torch.long)

            def step(tracker=None):
                for done in range(layout.accumulation):
                    each = layout.reduce_each_micro_batch
                    is_last = done == layout.accumulation - 1
                    decoder.set_requires_gradient_sync(each or is_last)
                    decoder.set_reshard_after_backward(layout.reshard_after_forward or is_last)
                    if tracker is not None:
                        tracker.reset_mod_stats()
                    decoder(tokens, tokens).backward()
                torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0, foreach=True)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            step()
            tracker = FSDPMemTracker(decoder, optimizer)
            with tracker:
                step(tracker)
            peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    finally:
        dist.destroy_process_group()
    return {getattr(name, "name", name): n_bytes for name, n_bytes in peak.items()}


CASES = [
    (8, {}, 1),
    (8, {"remat": "full"}, 4),
    (8, {"remat": "full", "accumulation": 2}, 1),
    (8, {"remat": "full", "accumulation": 2, "reduce_each_micro_batch": True}, 1),
    (8, {"reshard_after_forward": False}, 1),
    (8, {"precision": "fp32"}, 1),
    (64, {}, 4),
    (64, {"remat": "full"}, 1),
    (1024, {}, 1),
    (1024, {"remat": "full"}, 1),
]


@pytest.mark.parametrize(("world_size", "changes", "n_rows"), CASES)
def test_the_peak_of_fsdp_is_within_three_percent_of_torchs_own_tracker(world_size, changes, n_rows):
    layout = a_layout(world_size, n_rows, **changes)
    seen = tracked_peak(WIDE, layout, n_rows)
    work = Work(WIDE, TOKENS, global_batch_rows=world_size * n_rows * layout.accumulation)
    terms = dict(estimate_memory(work, "cpu", layout).terms_bytes)
    for unseen in ("runtime", "communicators"):
        terms.pop(unseen)
    # A number in fp32 per weight, and two moments, which only the counters of AdamW's steps come on top of.
    assert terms["parameters"] == seen["SHARDED_PARAM"] == 4 * shape.n_parameters(WIDE) // world_size
    assert terms["optimizer_state"] == pytest.approx(seen["OPT"], abs=4096)
    # While a block's gradients are reduced, the tracker counts its shards among what is temporary.
    one_block = 4 * shape.n_block_parameters(WIDE) / world_size
    assert terms.get("gradients", 0) == pytest.approx(seen["SHARDED_GRAD"], abs=1.01 * one_block)
    assert terms.get("reduce_buffers", 0) == seen["REDUCE_SCATTER"]
    gathered = seen["UNSHARDED_PARAM"] + seen["ALL_GATHER"]
    assert terms["gathered_parameters"] == pytest.approx(gathered, rel=0.15)
    assert sum(terms.values()) == pytest.approx(seen["Total"], rel=0.03)
