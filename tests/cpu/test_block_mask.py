"""The GPU's mask and attention mean the same as the CPU's; here both run on the CPU."""

import pytest
import torch
from torch.nn.attention import flex_attention as flex

from aifactory_train.models import attention
from aifactory_train.models.attention import (
    UNSEEN_SCORE,
    attend,
    attend_part,
    block_mask,
    build_mask,
    build_part_mask,
    part_block_mask,
)


@torch.no_grad()
def test_flex_attention_under_the_block_mask_equals_ours():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 256, 16) for heads in (6, 2, 2))
    compiled = torch.compile(attend, dynamic=False)
    for second_starts in ((100, 200), (3, 130)):  # the compiled mask must not remember the documents before
        document = torch.stack([(torch.arange(256) >= start).int() for start in second_starts])
        ours = attend(q, k, v, build_mask(document))
        for gpu_way in (attend, compiled):
            torch.testing.assert_close(gpu_way(q, k, v, block_mask(document)), ours, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("n_queries, causal", [(256, True), (128, True), (128, False)])
def test_flex_attention_to_a_part_of_the_keys_equals_ours(monkeypatch, documents, n_queries, causal):
    """With documents and causal False some queries see no key. On a CPU flex_attention has no backward."""
    monkeypatch.setattr(attention, "_flex_attention", flex.flex_attention)
    monkeypatch.setattr(attention, "_create_block_mask", flex.create_block_mask)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 16) for heads, n in ((6, n_queries), (2, 256), (2, 256)))
    document = torch.stack([torch.arange(256 + n_queries) // 50, torch.arange(256 + n_queries) // 70])
    first = 256 - n_queries if causal else 256
    documents = (document[:, first : first + n_queries], document[:, :256]) if documents else None
    ours, our_lse = attend_part(q, k, v, build_part_mask(documents, n_queries, 256, causal, "cpu"), causal)
    theirs, their_lse = attention._attend_part_flex(q, k, v, part_block_mask(documents, n_queries, 256, causal, "cpu"))
    sees = our_lse > UNSEEN_SCORE / 2
    assert sees.all() == (causal or documents is None)
    torch.testing.assert_close(their_lse, our_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs[sees], ours[sees], rtol=1e-5, atol=1e-5)
    assert theirs.isfinite().all()
