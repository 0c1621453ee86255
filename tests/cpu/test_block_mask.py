"""The GPU's mask and attention mean the same as the CPU's; here both run on the CPU, forward only."""

import torch

from aifactory_train.models.attention import attend, block_mask, build_mask


@torch.no_grad()
def test_flex_attention_under_the_block_mask_equals_ours():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 256, 16) for heads in (6, 2, 2))
    compiled = torch.compile(attend, dynamic=False)
    for second_starts in ((100, 200), (3, 130)):  # the compiled mask must not remember the documents before
        document = torch.stack([(torch.arange(256) >= start).int() for start in second_starts])
        ours = attend(q, k, v, build_mask(document))
        for flex in (attend, compiled):
            torch.testing.assert_close(flex(q, k, v, block_mask(document)), ours, rtol=1e-5, atol=1e-5)
