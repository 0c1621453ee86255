"""Any AutoModelForCausalLM of `transformers` as parts: its own code and names, our loss, our documents.

Written against transformers 5.23. Shapes: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, initialization, masking_utils

from aifactory_train.errors import PlanError
from aifactory_train.models.loss import IGNORE, ChunkLoss, cross_entropy_sum
from aifactory_train.models.parts import ModelParts, boxes, copy_into, local_tensor
from aifactory_train.recipe.huggingface import TESTED, huggingface_config
from aifactory_train.recipe.schema import Model

# A parameter no larger than this keeps the value that its module's constructor gave it.
_SMALL = 1 << 16


class TiedHead(nn.Module):
    """The output head of tied embeddings, without a weight of its own, which to_empty and FSDP would untie."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self._embed = (embed,)  # in a tuple, so that it is no child

    @property
    def weight(self) -> Tensor:
        return self._embed[0].weight

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.linear(x_BTD, self.weight)


class Foreign:
    """What is called in place of the forward of a model of transformers: arguments and result as of our Decoder.

    Its buffers (angles, scales) are those that the constructors made, put on the device at the first call: whatever
    brought the parameters from the meta device left numbers of no meaning in them.
    """

    def __init__(self, root: Any, model: Model, buffers: dict[str, Tensor]) -> None:
        self.root, self.forward, self.buffers = root, root.forward, buffers
        self.takes_positions = "position_ids" in inspect.signature(root.base_model.forward).parameters
        self.aux_loss_scale = float(getattr(root.config, "router_aux_loss_coef", 0.0) or 0.0)
        if not getattr(root.config, "output_router_logits", False):
            self.aux_loss_scale = 0.0
        self.default_attention = root.config._attn_implementation
        head = root.get_output_embeddings()
        self.has_linear_logits = (
            root.config.model_type in TESTED
            and not root.is_custom_code()
            and getattr(head, "bias", None) is None
            and not getattr(root.config, "final_logit_softcapping", None)
            and not self.aux_loss_scale
        )

    def __call__(
        self,
        x_BT: Tensor,
        target_BT: Tensor | None = None,
        document_BT: Tensor | None = None,
        position_BT: Tensor | None = None,
    ) -> Tensor:
        """The summed loss over valid targets (float32 scalar), or logits (B, T, V) without targets."""
        self._set_buffers(x_BT.device)
        self._choose_attention(x_BT.is_cuda, document_BT is not None)
        given = {"position_ids": position_BT} if self.takes_positions else {}
        with self._documents(document_BT):
            if target_BT is not None and self.has_linear_logits:
                out = self.root.base_model(x_BT, use_cache=False, **given)
                hidden_BTD, head_VD = out.last_hidden_state, self.root.get_output_embeddings().weight
                return cross_entropy_sum(
                    hidden_BTD.flatten(0, 1), local_tensor(head_VD), target_BT.flatten(), self.root.chunk_loss
                )
            extra = {"output_router_logits": True} if self.aux_loss_scale and target_BT is not None else {}
            out = self.forward(x_BT, use_cache=False, **given, **extra)
        if target_BT is None:
            return out.logits
        loss = F.cross_entropy(
            out.logits.flatten(0, 1).float(), target_BT.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        if self.aux_loss_scale:
            # Of each micro-batch by itself, weighed by its tokens: the mean over tokens then is of the whole batch.
            loss = loss + self.aux_loss_scale * out.aux_loss * (target_BT != IGNORE).sum()
        return loss

    def _set_buffers(self, device: torch.device) -> None:
        for name, value in self.buffers.items():
            holder, _, key = name.rpartition(".")
            self.root.get_submodule(holder)._buffers[key] = value.to(device, copy=True)
        self.buffers = {}

    def _choose_attention(self, is_cuda: bool, has_documents: bool) -> None:
        """flex_attention holds no T x T mask; on a CPU it is slow, and sdpa or what the family says is taken."""
        with_flex = is_cuda and has_documents and getattr(self.root, "_supports_flex_attn", False)
        wanted = "flex_attention" if with_flex else self.default_attention
        if self.root.config._attn_implementation != wanted:
            self.root.config._attn_implementation = wanted

    @contextmanager
    def _documents(self, document_BT: Tensor | None) -> Iterator[None]:
        """Tell transformers which document each token is of.

        It would find out by itself where positions restart, but asks the device about it in each micro-batch, and a
        step must not wait for the device. That function has no public switch in transformers 5.23 (masking_utils.py);
        take one when there is.
        """
        find, asked = masking_utils.find_packed_sequence_indices, []

        def documents(position_ids: Tensor) -> Tensor | None:
            asked.append(True)
            return document_BT

        masking_utils.find_packed_sequence_indices = documents
        try:
            yield
        finally:
            masking_utils.find_packed_sequence_indices = find
        if document_BT is not None and (not asked or not self.takes_positions or self.root._is_stateful):
            error = PlanError(
                f"{type(self.root).__name__} cannot keep the documents of a row apart: it has its own masks or a state",
                where="recipe: data.document_mask",
                do="--set data.document_mask=false",
            )
            error.on_every_rank = True  # all ranks run the same code on rows with documents
            raise error


def build_foreign(model: Model) -> ModelParts:
    """The model of transformers on the meta device, behind the forward of `ModelParts`.

    Raises:
        PlanError: transformers has no such model, or it is not made of blocks.
    """
    root = build_root(model)
    n_layers = model.n_layers
    lists = [m for m in root.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if not lists:
        raise _refusal(f"{type(root).__name__} has no list of {n_layers} blocks")
    blocks = list(lists[0])
    embed, head = root.get_input_embeddings(), root.get_output_embeddings()
    of_blocks = {id(p) for block in blocks for p in block.parameters()}
    behind = [m for m in root.base_model.children() if m is not embed and _is_norm(m, of_blocks)]
    buffers = {name: buffer for name, buffer in root.named_buffers()}
    root.chunk_loss = ChunkLoss()
    root.forward = Foreign(root, model, buffers)
    return ModelParts(
        root=root,
        embed=embed,
        blocks=blocks,
        norm=behind[-1] if behind else None,
        head=None if isinstance(head, TiedHead) else head,
        attention_hosts=[],
        tp_plan={},
    )


def _is_norm(module: nn.Module, of_blocks: set[int]) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and all(p.ndim == 1 and id(p) not in of_blocks for p in parameters)


def load_config(model: Model) -> Any:
    """The config object of transformers; without dropout, and with a router's extra loss only where it says so."""
    given = huggingface_config(model)
    if "auto_map" in given and model.trust_remote_code and model.hf is not None:
        config = AutoConfig.from_pretrained(model.hf, trust_remote_code=True)
    else:
        kind = given.pop("model_type")
        try:
            config = AutoConfig.for_model(kind, **given)
        except ValueError:
            raise _refusal(f"transformers {transformers.__version__} has no model_type {kind!r}") from None
    for key, value in config.to_dict().items():
        if ("dropout" in key or key.endswith(("pdrop", "layerdrop"))) and isinstance(value, float):
            setattr(config, key, 0.0)
    config.use_cache = False
    return config


def build_root(model: Model) -> Any:
    """The model of transformers as it is there: parameters on the meta device, buffers with their numbers."""
    return _construct(model)[0]


def _construct(model: Model) -> tuple[Any, dict[str, Tensor]]:
    """The model with parameters on the meta device in float32 and buffers on the CPU, and what its constructors put
    into small parameters."""
    config = load_config(model)
    trusted = {"trust_remote_code": True} if model.trust_remote_code else {}
    values: dict[int, tuple[Tensor, Tensor]] = {}
    try:
        with torch.device("cpu"), initialization.no_init_weights(), _parameters_on_meta(values):
            root = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **trusted)
    except ValueError as error:
        raise _refusal(str(error).splitlines()[0]) from None
    root.tie_weights()
    embed, head = root.get_input_embeddings(), root.get_output_embeddings()
    if head is not None and head.weight is embed.weight:
        tied = TiedHead(embed)
        if getattr(head, "bias", None) is not None:
            raise _refusal(f"the head of {type(root).__name__} is tied and has a bias")
        root.set_output_embeddings(tied)
    root.train()
    named = {name: values[id(p)][1] for name, p in root.named_parameters() if id(p) in values}
    return root, named


@contextmanager
def _parameters_on_meta(values: dict[int, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Parameters are moved to the meta device, in float32, as soon as a module has them; buffers stay.

    Args:
        values: learns of small ones, by id of what was moved, that parameter (so the id is not used again) and what
            the constructor put there.
    """
    register = nn.Module.register_parameter

    def moved(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            dtype = torch.float32 if parameter.is_floating_point() else parameter.dtype
            made = nn.Parameter(parameter.detach().to("meta", dtype), requires_grad=parameter.requires_grad)
            if parameter.numel() <= _SMALL:
                values[id(made)] = made, parameter.detach().to(dtype)
            parameter = made
        register(module, name, parameter)

    nn.Module.register_parameter = moved  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@torch.no_grad()
def fill_foreign(weights: Mapping[str, Tensor], model: Model, seed: int) -> None:
    """Fill weights by the rules of transformers (`_init_weights`), each module from its own seed.

    One block at a time is whole on the device: some rules of a block look into the modules below it.
    """
    root, constructed = _construct(model)
    parts = {id(block) for block in _blocks(root, model.n_layers)}
    inside = {id(m) for name, m in root.named_modules() if id(m) in parts for m in m.modules()}
    for name, module in root.named_modules():
        if id(module) in parts:
            _fill(root, name, module, True, weights, constructed, seed)
        elif id(module) not in inside and list(module.parameters(recurse=False)):
            _fill(root, name, module, False, weights, constructed, seed)


def _blocks(root: Any, n_layers: int) -> list[nn.Module]:
    return next((list(m) for m in root.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers), [])


def _fill(
    root: Any,
    name: str,
    module: nn.Module,
    recurse: bool,
    weights: Mapping[str, Tensor],
    constructed: dict[str, Tensor],
    seed: int,
) -> None:
    """One module, or with `recurse` all of it, on the device of its weights, and back to meta."""
    names = [f"{name}.{key}" if name else key for key, _ in module.named_parameters(recurse=recurse)]
    views = [view for n in names for _, view in boxes(weights[n])]
    if not views:
        return
    device = views[0].device
    module.to_empty(device=device, recurse=recurse)
    for parameter in module.parameters(recurse=recurse):
        parameter.fill_(float("nan"))
    inner = list(module.named_modules(prefix=name)) if recurse else [(name, module)]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for inner_name, inner_module in reversed(inner):  # children first, as in transformers
            digest = hashlib.sha256(f"{seed}:{inner_name}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            root._init_weights(inner_module)
    for full_name, parameter in zip(names, module.parameters(recurse=recurse), strict=True):
        value = parameter
        if parameter.isnan().any():
            # No rule: what the constructor put there stays.
            if full_name not in constructed:
                raise _refusal(f"{type(root).__name__} has no rule for the first values of {full_name}")
            value = constructed[full_name].to(device)
        copy_into(weights[full_name], value)
    module.to_empty(device="meta", recurse=recurse)


def _refusal(what: str) -> PlanError:
    error = PlanError(what, where="recipe: model.hf", do="take a model that AutoModelForCausalLM builds and trains")
    error.on_every_rank = True
    return error
