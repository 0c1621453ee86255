"""Our own decoder: Llama, Mistral, Qwen2 and Qwen3, with the parameter names of their Hugging Face models.

Because the names and shapes are the same, weights travel in both directions without a map.
Shapes: B rows, T tokens, D width, N query heads, K key/value heads, H head width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aifactory_train.models.attention import LOCAL, Mask
from aifactory_train.models.loss import ChunkLoss, cross_entropy_sum
from aifactory_train.models.parts import ModelParts, boxes, copy_into, local_tensor
from aifactory_train.recipe.schema import Model


def rope_frequencies(model: Model, device: torch.device) -> Tensor:
    """Angle per position of each rotated pair, float32, shape (H/2,). Llama-3 scaling as in its model card."""
    exponent = torch.arange(0, model.head_size, 2, dtype=torch.float32, device=device) / model.head_size
    freq_P = 1.0 / (model.rope_theta**exponent)
    scaling = model.rope_scaling
    if scaling is None:
        return freq_P
    wavelength_P = 2 * math.pi / freq_P
    original = scaling.original_max_seq_len_tokens
    span = scaling.high_freq_factor - scaling.low_freq_factor
    smooth_P = ((original / wavelength_P - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return (1 - smooth_P) * freq_P / scaling.factor + smooth_P * freq_P


def rotate(x_BNTH: Tensor, cos_BTP: Tensor, sin_BTP: Tensor) -> Tensor:
    """Rotate pairs (i, i + H/2), as Hugging Face stores them; computed in float32."""
    a, b = x_BNTH.float().chunk(2, dim=-1)
    cos, sin = cos_BTP[:, None], sin_BTP[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BNTH.dtype)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


# In the words of the `base_model_tp_plan` of Hugging Face's models.
TP_PLAN = {
    **{f"self_attn.{name}_proj": "colwise" for name in "qkv"},
    "self_attn.o_proj": "rowwise",
    "mlp.gate_proj": "colwise",
    "mlp.up_proj": "colwise",
    "mlp.down_proj": "rowwise",
}


class SelfAttention(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        width, head = model.hidden_size, model.head_size
        self.head_size = head
        self.attention = LOCAL
        self.q_proj = nn.Linear(width, model.n_heads * head, bias=model.qkv_bias)
        self.k_proj = nn.Linear(width, model.n_kv_heads * head, bias=model.qkv_bias)
        self.v_proj = nn.Linear(width, model.n_kv_heads * head, bias=model.qkv_bias)
        self.o_proj = nn.Linear(model.n_heads * head, width, bias=False)
        self.q_norm = RMSNorm(head, model.norm_eps) if model.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head, model.norm_eps) if model.qk_norm else nn.Identity()

    def forward(self, x_BTD: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, mask: Mask) -> Tensor:
        split = (*x_BTD.shape[:2], -1, self.head_size)
        q_BNTH = self.q_norm(self.q_proj(x_BTD).view(split)).transpose(1, 2)
        k_BKTH = self.k_norm(self.k_proj(x_BTD).view(split)).transpose(1, 2)
        v_BKTH = self.v_proj(x_BTD).view(split).transpose(1, 2)
        y_BNTH = self.attention.attend(rotate(q_BNTH, cos_BTP, sin_BTP), rotate(k_BKTH, cos_BTP, sin_BTP), v_BKTH, mask)
        return self.o_proj(y_BNTH.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(model.hidden_size, model.ffn_size, bias=False)
        self.up_proj = nn.Linear(model.hidden_size, model.ffn_size, bias=False)
        self.down_proj = nn.Linear(model.ffn_size, model.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(model.hidden_size, model.norm_eps)
        self.self_attn = SelfAttention(model)
        self.post_attention_layernorm = RMSNorm(model.hidden_size, model.norm_eps)
        self.mlp = FeedForward(model)

    def forward(self, x_BTD: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, mask: Mask) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_BTP, sin_BTP, mask)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class _Trunk(nn.Module):
    """Only here so that parameters are called `model.layers.0…`, as Hugging Face calls them."""

    def __init__(self, model: Model, layers: range) -> None:
        super().__init__()
        is_last = layers.stop == model.n_layers
        if layers.start == 0 or (is_last and model.tied_embeddings):
            self.embed_tokens = nn.Embedding(model.vocab_size, model.hidden_size)
        self.layers = nn.ModuleDict({str(i): Block(model) for i in layers})
        if is_last:
            self.norm = RMSNorm(model.hidden_size, model.norm_eps)


class Decoder(nn.Module):
    """Built on any device, also "meta"; `init_weights` fills it.

    Args:
        layers: the layers of one pipeline stage, and with the first and last of them what lies before and behind.
    """

    def __init__(self, model: Model, layers: range | None = None) -> None:
        super().__init__()
        layers = range(model.n_layers) if layers is None else layers
        self.shape = model
        self.is_first, self.is_last = layers.start == 0, layers.stop == model.n_layers
        self.attention = LOCAL
        self.model = _Trunk(model, layers)
        own_head = self.is_last and not model.tied_embeddings
        self.lm_head = nn.Linear(model.hidden_size, model.vocab_size, bias=False) if own_head else None
        self.chunk_loss = ChunkLoss()

    def parts(self) -> ModelParts:
        blocks = list(self.model.layers.values())
        return ModelParts(
            root=self,
            embed=getattr(self.model, "embed_tokens", None),
            blocks=blocks,
            norm=getattr(self.model, "norm", None),
            head=self.lm_head,
            attention_hosts=[self, *(block.get_submodule("self_attn") for block in blocks)],
            tp_plan=TP_PLAN,
        )

    def forward(
        self,
        x: Tensor,
        target_BT: Tensor | None = None,
        document_BT: Tensor | None = None,
        position_BT: Tensor | None = None,
    ) -> Tensor:
        """x_BT of token numbers, or x_BTD of the stage before, to x_BTD, or of the last stage:

        the summed loss over valid targets (float32 scalar), or logits (B, T, V) without targets.

        Args:
            document_BT: of whole rows, also where context parallelism gives this rank a part of their tokens.
            position_BT: None for 0, 1, 2...; only where x are whole rows of token numbers.
        """
        cos_BTP, sin_BTP = self._rope(x, position_BT)
        x_BTD = self.model.embed_tokens(x) if self.is_first else x
        mask = self.attention.build_mask(document_BT)
        for block in self.model.layers.values():
            x_BTD = block(x_BTD, cos_BTP, sin_BTP, mask)
        if not self.is_last:
            return x_BTD
        x_BTD = self.model.norm(x_BTD)
        head_VD = local_tensor(self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight)
        if target_BT is None:
            return x_BTD @ head_VD.T
        return cross_entropy_sum(x_BTD.flatten(0, 1), head_VD, target_BT.flatten(), self.chunk_loss)

    def _rope(self, x: Tensor, position_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        """cos and sin of every angle, float32, (B or 1, T, H/2)."""
        if position_BT is None:
            position_BT = torch.arange(x.shape[1], device=x.device)[None]
        angle_BTP = position_BT[..., None].float() * rope_frequencies(self.shape, x.device)
        return angle_BTP.cos(), angle_BTP.sin()


@torch.no_grad()
def init_weights(weights: Mapping[str, Tensor], model: Model, seed: int) -> None:
    """Fill every weight; each from its own generator, so the numbers do not depend on the number of ranks.

    Matrices are normal with std `init_std`; those that write into the residual stream (o_proj, down_proj) are
    scaled by 1/sqrt(2 * n_layers) (GPT-2, section 2.3); norms are 1, biases 0.
    """
    std = model.init_std
    residual_std = std / math.sqrt(2 * model.n_layers)
    for name, weight in weights.items():
        views = [view for _, view in boxes(weight)]
        if weight.ndim == 1:
            for view in views:
                view.fill_(0.0 if name.endswith(".bias") else 1.0)
            continue
        # Where a rank has nothing of a weight, it makes no numbers either.
        if not views:
            continue
        device = views[0].device
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        scale = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else std
        full = torch.empty(weight.shape, dtype=weight.dtype, device=device)
        copy_into(weight, full.normal_(0.0, scale, generator=generator))
