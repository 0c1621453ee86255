"""What a parity run does not show of axis cp: balance, merging, masks, and what travels. No rank but this one runs."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from aifactory_train.errors import PlanError
from aifactory_train.models.attention import attend_part, build_part_mask, merge_parts
from aifactory_train.parallel.context import (
    apply_context_parallel,
    build_masks,
    gathered_parts,
    held_chunks,
    local_tokens,
    ring_parts,
)
from results_run import a_plan

B, N, K, T, H = 2, 4, 2, 512, 16
FORMS = {"all_gather": gathered_parts, "ring": ring_parts}


def layout(cp: int, form: str):
    return a_plan().layout.model_copy(update={"cp": cp, "cp_attention": form})


def whole_row():
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, heads, T, H, requires_grad=True) for heads in (N, K, K))
    starts = torch.rand(B, T) < 0.01
    return q, k, v, starts.cumsum(1).int()


def plain_softmax(q, k, v, document):
    """In fp64, with all T x T scores."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    score = q @ k.repeat_interleave(N // K, 1).transpose(2, 3) / H**0.5
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    if document is not None:
        seen = (seen & (document[:, :, None] == document[:, None, :]))[:, None]
    out = score.masked_fill(~seen, float("-inf")).softmax(-1) @ v.repeat_interleave(N // K, 1)
    out.backward(pattern(out))
    return [out, q.grad, k.grad, v.grad]


def pattern(out):
    """A gradient that differs from place to place."""
    return torch.linspace(-1, 1, out.numel(), dtype=out.dtype).sin().view(out.shape)


def take(x, chunks, cp, dim=2):
    pieces = x.chunk(2 * cp, dim=dim)
    return torch.cat([pieces[i] for i in chunks], dim=dim)


def attend_like_rank(calls, cp, rank, q, k, v, document):
    """The calls of attention of one rank, with keys taken from the whole row: (B, N, T / cp, H)."""
    masks = build_masks(calls, 2 * cp, T // (2 * cp), "cpu", document)
    found = {}
    for call, mask in zip(calls, masks, strict=True):
        out, lse = attend_part(
            take(q, call.queries, cp), take(k, call.keys, cp), take(v, call.keys, cp), mask, call.causal
        )
        n = len(call.queries)
        for chunk, *part in zip(call.queries, out.chunk(n, 2), lse.chunk(n, 2), strict=True):
            found[chunk] = merge_parts(found[chunk], part) if chunk in found else part
    return torch.cat([found[chunk][0] for chunk in held_chunks(cp, rank)], dim=2)


@pytest.mark.parametrize("form", ["all_gather", "ring", "ulysses"])
def test_each_token_of_a_row_is_with_one_rank(form):
    tokens = [local_tokens(layout(4, form), 64, rank) for rank in range(4)]
    assert torch.equal(torch.cat(tokens).sort().values, torch.arange(64))
    assert all(len(t) == 16 and bool((t.diff() > 0).all()) for t in tokens)
    second = [*range(16, 32)] if form == "ulysses" else [*range(8, 16), *range(48, 56)]
    assert tokens[1].tolist() == second


def test_a_row_that_cp_does_not_divide_is_refused():
    assert len(local_tokens(layout(4, "ulysses"), 60, 0)) == 15
    with pytest.raises(PlanError, match="60 tokens cannot be cut into 8 equal chunks") as refused:
        local_tokens(layout(4, "ring"), 60, 0)
    assert refused.value.on_every_rank and refused.value.where == "plan.json: layout.cp 4, layout.cp_attention ring"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cp", [2, 4])
def test_the_ranks_of_cp_do_the_same_work(form, cp):
    q, k, v, _ = whole_row()
    chunk = T // (2 * cp)
    flops, scores = set(), set()
    for rank in range(cp):
        calls = FORMS[form](cp, rank)
        with FlopCounterMode(display=False) as counter:
            attend_like_rank(calls, cp, rank, q, k, v, None)
        flops.add(counter.get_total_flops())
        area = [len(c.queries) * len(c.keys) * chunk**2 for c in calls]
        unseen = [(len(c.queries) * chunk) * (len(c.queries) * chunk - 1) // 2 * c.causal for c in calls]
        scores.add(
            tuple(a - u for a, u in zip(area, unseen, strict=True)) if form == "ring" else sum(area) - sum(unseen)
        )
    assert len(flops) == len(scores) == 1
    needed = T * (T + 1) // 2 // cp
    assert sum(scores.pop()) == needed if form == "ring" else scores.pop() == needed
    assert flops.pop() < 1.3 * 4 * B * N * H * needed, "chunks on the diagonal are all that is made for nothing"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("documents", [False, True])
def test_the_calls_of_all_ranks_are_plain_softmax_with_its_gradients(form, cp, documents):
    q, k, v, document = whole_row()
    document = document if documents else None
    out = torch.empty(B, N, T, H)
    for rank in range(cp):
        tokens = local_tokens(layout(cp, form), T, rank)
        out[:, :, tokens] = attend_like_rank(FORMS[form](cp, rank), cp, rank, q, k, v, document)
    out.backward(pattern(out))
    for ours, exact in zip([out, q.grad, k.grad, v.grad], plain_softmax(q, k, v, document), strict=True):
        assert (ours - exact).norm() / exact.norm() < 1e-6


@pytest.mark.parametrize("blind_first", [False, True])
def test_queries_that_see_nothing_of_a_part_leave_no_trace(blind_first):
    q, k, v, document = whole_row()
    seen = attend_part(q, k, v, build_part_mask((document, document), T, T, True, "cpu"), True)
    blind = attend_part(q, k, v, torch.zeros(B, 1, T, T, dtype=torch.bool), False)
    out, lse = merge_parts(*((blind, seen) if blind_first else (seen, blind)))
    assert torch.equal(out, seen[0]) and torch.equal(lse, seen[1])
    (out * pattern(out)).sum().backward()
    ours = [x.grad for x in (q, k, v)]
    for grad, exact in zip(ours, plain_softmax(q, k, v, document)[1:], strict=True):
        assert (grad - exact).norm() / exact.norm() < 1e-6


class Traffic(TorchDispatchMode):
    """(collective, bytes that go in, bytes that come out) of all that run."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "_c10d_functional" and not func.__name__.startswith(("wait", "_wrap")):
            self.seen[str(func).split(".")[1], args[0].nbytes, out.nbytes] += 1
        return out


@pytest.fixture
def four_silent_ranks():
    """This process as rank 1 of four whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield init_device_mesh("cpu", (4,), mesh_dim_names=("cp",))
    dist.destroy_process_group()


def attention_of(form, mesh):
    host = SimpleNamespace()
    apply_context_parallel(SimpleNamespace(attention_hosts=[host]), mesh, layout(4, form), T)
    return host.attention


@pytest.mark.parametrize("form", ["all_gather", "ring", "ulysses"])
def test_what_travels_in_one_layer(four_silent_ranks, form):
    n_kv_heads, cp = 4, 4
    attention = attention_of(form, four_silent_ranks)
    q, k, v = (
        torch.randn(B, heads, T // cp, H, requires_grad=True) for heads in (2 * n_kv_heads, n_kv_heads, n_kv_heads)
    )
    with Traffic() as forward:
        out = attention.attend(q, k, v, attention.build_mask(None))
    with Traffic() as backward:
        out.sum().backward()
    q_bytes, kv_bytes = q.nbytes, k.nbytes + v.nbytes
    assert out.shape == q.shape
    if form == "all_gather":
        assert forward.seen == {("all_gather_into_tensor", kv_bytes, cp * kv_bytes): 1}
        assert backward.seen == {("reduce_scatter_tensor", cp * kv_bytes, kv_bytes): 1}
    elif form == "ring":
        assert forward.seen == backward.seen == {("all_to_all_single", kv_bytes, kv_bytes): cp - 1}
    else:
        both = {
            ("all_to_all_single", q_bytes + kv_bytes, q_bytes + kv_bytes): 1,
            ("all_to_all_single", q_bytes, q_bytes): 1,
        }
        assert forward.seen == backward.seen == both


def test_ulysses_is_refused_where_ranks_outnumber_kv_heads(four_silent_ranks):
    q, k = torch.randn(B, N, T // 4, H), torch.randn(B, K, T // 4, H)
    with pytest.raises(PlanError, match="2 key/value heads for 4 ranks") as refused:
        attention_of("ulysses", four_silent_ranks).attend(q, k, k, None)
    assert refused.value.where.startswith("plan.json: layout.cp 4")
    assert not refused.value.on_every_rank, "later stages of a pipeline would be waited for"
