"""What a step may not do: wait for the device, or talk more because the batch is cut in more pieces."""

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from aifactory_train.data.loader import Batch
from aifactory_train.errors import PlanError
from aifactory_train.parallel.apply import refuse_old_torch
from aifactory_train.plan.plan import Plan
from aifactory_train.recipe.schema import Model
from aifactory_train.train.ranks import find_ranks, join
from aifactory_train.train.setup import build_engine
from results_run import a_plan
from training_runs import MODEL

ROWS, TOKENS = 8, 16


class Calls(TorchDispatchMode):
    """Names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def count(self, part: str) -> int:
        return sum(part in name for name in self.names)


@pytest.fixture
def one_rank():
    join(find_ranks(env={}), torch.device("cpu"), 20)
    yield
    dist.destroy_process_group()


@pytest.fixture
def four_silent_ranks():
    """This process as rank 0 of four whose collectives do nothing: for counting them."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


def small_plan(micro_batch_rows: int, optimizer: str = "adamw", world_size: int = 1, **changes) -> Plan:
    plan = a_plan()
    optim = plan.recipe.optim.model_copy(update={"name": optimizer})
    recipe = plan.recipe.model_copy(update={"model": Model(**MODEL), "optim": optim})
    cut = {"micro_batch_rows": micro_batch_rows, "accumulation": ROWS // micro_batch_rows, "precision": "fp32"}
    cut |= {"world_size": world_size, "dp_shard": world_size}
    return plan.model_copy(
        update={
            "recipe": recipe,
            "layout": plan.layout.model_copy(update={**cut, **changes}),
        }
    )


def a_batch() -> Batch:
    tokens = torch.randint(0, MODEL["vocab_size"], (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    target = tokens[:, 1:].clone()
    target[0, :5] = -100
    document = (torch.arange(TOKENS) // 7).expand(ROWS, -1).int()
    position = (torch.arange(TOKENS) % 7).expand(ROWS, -1)
    return Batch(tokens[:, :-1], target, document, position, int((target != -100).sum()))


def engine_after_one_step(plan: Plan):
    engine = build_engine(plan, torch.device("cpu"), fresh=True)
    engine.train_step(a_batch(), 1)
    return engine


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_brings_nothing_to_the_host(one_rank, optimizer):
    engine, batch = engine_after_one_step(small_plan(4, optimizer)), a_batch()
    with Calls() as calls:
        stats = engine.train_step(batch, 2)
    assert calls.count("_local_scalar_dense") == 0
    assert calls.count("mm") > 0, "it does see the operators"
    assert all(isinstance(t, torch.Tensor) for t in (stats.loss_sum, stats.n_valid_tokens, stats.grad_norm))


def test_remat_computes_the_blocks_again_and_changes_no_bit(one_rank):
    matmuls, states = [], []
    for remat in ("none", "full"):
        plan = small_plan(4)
        plan = plan.model_copy(update={"layout": plan.layout.model_copy(update={"remat": remat})})
        engine = engine_after_one_step(plan)
        with Calls() as calls:
            stats = engine.train_step(a_batch(), 2)
        matmuls.append(calls.count("mm"))
        states.append([stats.loss_sum, stats.grad_norm, *(p.full_tensor() for p in engine.named_parameters.values())])
    assert matmuls[1] > matmuls[0]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_accumulation_reduces_gradients_once(four_silent_ranks):
    counts = []
    for micro_batch_rows in (8, 2):
        engine, batch = engine_after_one_step(small_plan(micro_batch_rows, world_size=4)), a_batch()
        with Calls() as calls:
            engine.train_step(batch, 2)
        counts.append(calls.count("reduce_scatter"))
    assert counts == [MODEL["n_layers"] + 1] * 2, "one for each block and one for the rest"


def test_gradients_may_be_reduced_in_each_micro_batch(four_silent_ranks):
    engine = engine_after_one_step(small_plan(2, world_size=4, reduce_each_micro_batch=True))
    with Calls() as calls:
        engine.train_step(a_batch(), 2)
    assert calls.count("reduce_scatter") == 4 * (MODEL["n_layers"] + 1)


def test_a_rehearsal_changes_nothing(one_rank):
    engine = engine_after_one_step(small_plan(8))
    before = [p.full_tensor().clone() for p in engine.named_parameters.values()]
    engine.rehearse(a_batch())
    assert all(torch.equal(a, b.full_tensor()) for a, b in zip(before, engine.named_parameters.values(), strict=True))
    assert all(p.grad is None for p in engine.named_parameters.values())


@pytest.mark.parametrize("changes", [{"tp": 2}, {"pp": 2}, {"cp": 2}, {"remat": "selective"}])
def test_a_torch_that_is_too_old_for_a_layout_is_refused_before_the_run_is_built(monkeypatch, changes):
    layout = small_plan(4).layout
    monkeypatch.setattr(torch, "__version__", "2.12.1+rocm6.4")
    refuse_old_torch(layout)
    with pytest.raises(PlanError, match=r"needs torch 2\.13 or newer, this is 2\.12\.1"):
        refuse_old_torch(layout.model_copy(update=changes))
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    refuse_old_torch(layout.model_copy(update=changes))
