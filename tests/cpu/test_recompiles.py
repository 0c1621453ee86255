"""After the rehearsal and the first step nothing is compiled any more, whatever the documents of a batch are."""

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters

from aifactory_train.data.loader import Batch
from aifactory_train.models.attention import Attention, attend, block_mask
from aifactory_train.plan.plan import Plan
from aifactory_train.recipe.schema import Model
from aifactory_train.train.ranks import find_ranks, join
from aifactory_train.train.setup import build_engine
from compilations import compilations
from results_run import a_plan
from training_runs import MODEL

ROWS, TOKENS = 4, 96  # more than one chunk of attention on a CPU, and the last one shorter


@pytest.fixture
def one_rank(monkeypatch):
    """Compilers are chosen for speed: what has to be compiled again is decided before any of them is asked."""
    compile_in_place = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **how: compile_in_place(self, backend="aot_eager", **how)
    )  # fmt: skip
    torch._dynamo.reset()
    counters.clear()
    join(find_ranks(env={}), torch.device("cpu"), 20)
    yield
    dist.destroy_process_group()
    torch._dynamo.reset()
    torch._functorch.config.activation_memory_budget = 1.0


def compiled_plan(**layout) -> Plan:
    plan = a_plan()
    data = plan.recipe.data.model_copy(update={"seq_len_tokens": TOKENS})
    recipe = plan.recipe.model_copy(update={"model": Model(**MODEL), "data": data})
    cut = {"world_size": 1, "dp_shard": 1, "micro_batch_rows": 2, "accumulation": 2, "precision": "bf16"}
    changed = plan.layout.model_copy(update={**cut, "compile": True, **layout})
    return plan.model_copy(update={"recipe": recipe, "layout": changed})


def batch_of(step: int, documents: bool) -> Batch:
    """Documents of other lengths, and other targets that do not count, in each step."""
    random = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, MODEL["vocab_size"], (ROWS, TOKENS + 1), generator=random)
    starts = torch.rand(ROWS, TOKENS, generator=random) < 0.05 * (step + 1)
    starts[:, 0] = True
    index = torch.arange(TOKENS).expand(ROWS, -1)
    position = index - torch.where(starts, index, 0).cummax(1).values
    target = torch.where(torch.rand(ROWS, TOKENS, generator=random) < 0.1 * step, -100, tokens[:, 1:])
    document = starts.cumsum(1).int() - 1
    n_valid_tokens = int((target != -100).sum())
    return Batch(tokens[:, :-1], target, *((document, position) if documents else (None, None)), n_valid_tokens)


@pytest.mark.parametrize(
    ("layout", "attention"),
    [
        ({"remat": "none"}, "plain"),
        ({"remat": "none"}, "documents"),
        ({"remat": "selective", "reshard_after_forward": True}, "documents"),
        ({"remat": "full"}, "documents"),
        ({"remat": "budget", "remat_budget_frac": 0.5}, "documents"),
        ({"remat": "none"}, "documents as on a GPU"),
        ({"remat": "selective"}, "documents as on a GPU"),
        ({"remat": "full"}, "documents as on a GPU"),
    ],
)
def test_steps_after_the_first_compile_nothing(one_rank, monkeypatch, layout, attention):
    engine, documents = build_engine(compiled_plan(**layout), torch.device("cpu"), fresh=True), attention != "plain"
    if attention == "documents as on a GPU":
        # torch refuses gradients of flex_attention on a CPU for want of a kernel; traced, it is plain operators.
        monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda query, key, value: None)
        for host in engine.stages[0].attention_hosts:
            host.attention = Attention(block_mask, attend)
    with compilations() as at_first:
        engine.rehearse(batch_of(0, documents))
        engine.train_step(batch_of(1, documents), 1)
    with compilations() as later:
        for step in (2, 3, 4):
            engine.train_step(batch_of(step, documents), step)
    assert any("forward" in line or "block" in line.lower() or "checkpointed" in line for line in at_first), at_first
    assert later == []
    assert not counters["graph_break"], dict(counters["graph_break"])


def test_a_batch_of_another_shape_is_seen_to_compile_again(one_rank):
    engine = build_engine(compiled_plan(remat="none"), torch.device("cpu"), fresh=True)
    engine.rehearse(batch_of(0, True))
    longer = batch_of(1, True)
    with compilations() as again:
        fields = (longer.input_BT, longer.target_BT, longer.document_BT, longer.position_BT)
        engine.train_step(Batch(*(t[:, :64].contiguous() for t in fields), longer.n_valid_tokens), 1)
    assert again and any("size mismatch" in line for line in again), again
