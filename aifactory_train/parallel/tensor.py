"""Axis tp: tensor parallel with sequence parallel (Korthikanti et al., arxiv.org/abs/2205.05198), on DTensor.

Between the modules named here each rank holds its T / tp tokens as a plain tensor x_BTD. Attention and the MLP see all
tokens and a part of the heads or columns. Angles, document masks and targets are of all tokens on each rank.
Shapes: B rows, T tokens, D width, H head width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle

from aifactory_train.errors import PlanError
from aifactory_train.models.loss import VocabularyParallelChunkLoss
from aifactory_train.models.parts import ModelParts

# T in x_BTD, and heads in (B, T, heads, H): what per-head norms get is split there.
TOKEN_DIM, HEAD_DIM = 1, 2
# What Hugging Face's plans call a norm that each rank applies to its own heads.
_HEAD_NORM = "replicated_with_grad_allreduce"


def apply_tensor_parallel(parts: ModelParts, mesh: DeviceMesh) -> None:
    """Split the model in place; every parameter becomes a DTensor on `mesh`. The model stands on the meta device.

    Args:
        mesh: axis tp alone, of the same root mesh as FSDP's.

    Raises:
        PlanError: a block has modules that its `tp_plan` does not say how to split, or tp does not divide a size.
    """
    for block in parts.blocks:
        parallelize_module(block, mesh, _block_styles(block, parts.tp_plan))
    if parts.embed is not None:
        distribute_module(parts.embed, mesh, _split_rows, _same_tokens, _own_tokens)
    if parts.head is not None:
        distribute_module(parts.head, mesh, _split_rows)  # its forward is never called, so it needs no hooks
    if parts.norm is not None:
        parallelize_module(parts.norm, mesh, SequenceParallel(sequence_dim=TOKEN_DIM))
        parts.norm.register_forward_hook(_gather_output)
        table = (parts.head or parts.embed).weight  # type: ignore[union-attr]
        first_word = mesh.get_local_rank() * (table.shape[0] // mesh.size())
        parts.root.chunk_loss = VocabularyParallelChunkLoss(first_word, mesh.get_group())
    _refuse_uneven(parts, mesh.size())


def _refuse_uneven(parts: ModelParts, tp: int) -> None:
    """Where tp ranks have unlike shares, DTensor and FSDP2 cut these at unlike rows: 1021 rows over tp 2, fsdp 3."""
    for name, parameter in parts.root.named_parameters():
        dims = [placement.dim for placement in parameter.placements if placement.is_shard()]  # type: ignore[attr-defined]
        if any(parameter.shape[dim] % tp for dim in dims):
            error = PlanError(
                f"{name} is {tuple(parameter.shape)}, and tp {tp} does not divide dim {dims[0]}",
                where="plan.json: layout.tp",
                do="--set layout.tp=1, or another size",
            )
            # A stage of a pipeline may have parameters that others lack, and those would wait for this rank.
            error.on_every_rank = parts.embed is not None and parts.norm is not None
            raise error


def _block_styles(block: nn.Module, tp_plan: dict[str, str]) -> dict[str, ParallelStyle]:
    """By name in the block: its linears, the modules that hold them, and the norms before them and on heads."""
    styles: dict[str, ParallelStyle] = {}
    for name, module in block.named_modules():
        holder = name.rpartition(".")[0]
        how = tp_plan.get(name, "")
        if not list(module.parameters(recurse=False)):
            continue
        is_linear = isinstance(module, nn.Linear) and holder != ""
        is_norm = all(p.ndim == 1 for p in module.parameters()) and not isinstance(module, nn.Linear)
        if is_linear and how == "colwise":
            styles[name] = ColwiseParallel()
        elif is_linear and how == "rowwise":
            styles[name] = RowwiseParallel(output_layouts=Shard(TOKEN_DIM))
        elif is_norm and holder == "" and name != "" and how == "":
            styles[name] = SequenceParallel(sequence_dim=TOKEN_DIM, use_local_output=True)
        elif is_norm and holder != "" and how in ("", _HEAD_NORM):
            styles[name] = SequenceParallel(sequence_dim=HEAD_DIM, use_local_output=True)
        else:
            error = PlanError(
                f"tensor parallel cannot split {name or 'the parameters'} of {type(block).__name__}: "
                f"{type(module).__name__}, {how or 'not named'} in its plan",
                where="plan.json: layout.tp",
                do="--set layout.tp=1",
            )
            error.on_every_rank = True  # each stage of a pipeline has such a block
            raise error
    holders = {name.rpartition(".")[0] for name in styles if name in tp_plan}
    return styles | {holder: _GatherTokens() for holder in holders}


class _GatherTokens(ParallelStyle):
    """All tokens of the hidden states, gathered once for all linears of a module.

    torch's PrepareModuleInput wants to know how many positional arguments a module gets; models differ in that.
    A DTensor goes in, so that the gradients of the linears are summed before one reduce_scatter.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def gather(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if args:
                return (_all_tokens(args[0], device_mesh), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": _all_tokens(kwargs["hidden_states"], device_mesh)}

        module.register_forward_pre_hook(gather, with_kwargs=True)
        return module


def _all_tokens(x_BTD: Tensor, mesh: DeviceMesh) -> DTensor:
    split = DTensor.from_local(x_BTD, mesh, [Shard(TOKEN_DIM)], run_check=False)
    # Axis tp: all its ranks run the same blocks, so all arrive; in the backward pass, too.
    return split.redistribute(placements=[Replicate()], async_op=True)


def _gather_output(norm: nn.Module, args: Any, output: DTensor) -> Tensor:
    """All tokens, for the part of the vocabulary of this rank; backward sums the shares of all parts."""
    # Axis tp: all its ranks arrive, in the backward pass too.
    return output.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def _same_tokens(embed: nn.Module, args: tuple[Tensor], mesh: DeviceMesh) -> tuple[DTensor]:
    return (DTensor.from_local(args[0], mesh, [Replicate()], run_check=False),)


def _own_tokens(embed: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
    """Each token from the rank that has its row of the table."""
    # Axis tp: all its ranks arrive, in the backward pass too.
    # RowwiseParallel would not wait for the result, and torch 2.13 drops the gradient of an AsyncCollectiveTensor that
    # goes into a compiled block: take RowwiseParallel when github.com/pytorch/pytorch/pull/191113 is in our torch.
    return output.redistribute(placements=[Shard(TOKEN_DIM)]).to_local()


def _split_rows(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    for key, parameter in module.named_parameters(recurse=False):
        module.register_parameter(key, nn.Parameter(distribute_tensor(parameter, mesh, [Shard(0)])))
