"""Schedules as functions of tokens, and Muon against torch's."""

import pytest
import torch

from aifactory_train.recipe.schema import Schedule
from aifactory_train.train.optim import Muon, lr_factor, orthogonalize


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd"])
def test_learning_rate_warms_up_peaks_and_ends_at_its_floor(shape):
    decay = 300 if shape == "wsd" else None
    schedule = Schedule(shape=shape, warmup_tokens=100, decay_tokens=decay, min_lr_frac=0.1)
    factors = [lr_factor(schedule, tokens, 1000) for tokens in range(0, 1001, 10)]
    assert factors[0] == 0 and factors[5] == 0.5 and factors[10] == 1.0
    assert factors[-1] == pytest.approx(0.1)
    after = factors[10:]
    assert after == sorted(after, reverse=True)
    assert lr_factor(schedule, 5000, 1000) == pytest.approx(0.1), "past the budget it stays at the floor"


def test_each_schedule_has_its_own_shape():
    half = 550
    assert lr_factor(Schedule(warmup_tokens=100, min_lr_frac=0.0), half, 1000) == pytest.approx(0.5)
    assert lr_factor(Schedule(shape="cosine", warmup_tokens=100, min_lr_frac=0.0), 325, 1000) == pytest.approx(
        0.8535, abs=1e-4
    )
    assert lr_factor(Schedule(shape="linear", warmup_tokens=100, min_lr_frac=0.0), 325, 1000) == pytest.approx(0.75)
    wsd = Schedule(shape="wsd", warmup_tokens=100, decay_tokens=200, min_lr_frac=0.0)
    assert lr_factor(wsd, 800, 1000) == 1.0 and lr_factor(wsd, 900, 1000) == pytest.approx(0.5)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon to compare with (2.9 and newer)")
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_muon_equals_that_of_torch(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    a = Muon([ours], lr=0.02, momentum=0.95, weight_decay=0.1, precision=torch.bfloat16)
    b = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1, nesterov=True)
    for _ in range(4):
        grad = torch.randn(shape)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert (ours - start).abs().max() > 0.01


def test_orthogonalize_brings_all_singular_values_near_one():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(40, 24), torch.float32))
    assert values.min() > 0.6 and values.max() < 1.3
