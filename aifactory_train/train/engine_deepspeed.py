"""The engine on DeepSpeed: ZeRO stages 1, 2 and 3 over axis dp_shard, with offload to host memory.

Numbers and names are those of the engine on plain torch, so curves can be compared and checkpoints exchanged. The
optimizer is torch's own AdamW on the float32 stretches that ZeRO leaves to this rank.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aifactory_train.data.loader import Batch
from aifactory_train.errors import PlanError
from aifactory_train.models.flat import FlatSlice
from aifactory_train.models.parts import DTYPES, ModelParts
from aifactory_train.parallel.remat import apply_remat
from aifactory_train.plan.deepspeed import Options, ds_config
from aifactory_train.plan.plan import Plan
from aifactory_train.train.engine import StepStats, memory_errors, on_device
from aifactory_train.train.optim import build_optimizers, lr_factor, set_lr

# Its import looks for a device and says on stdout which one it took; the plan says it here.
logging.disable(logging.WARNING)
import deepspeed  # noqa: E402
from deepspeed.accelerator import set_accelerator  # noqa: E402
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator  # noqa: E402
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator  # noqa: E402
from deepspeed.runtime.config import DeepSpeedConfigError  # noqa: E402
from deepspeed.utils import set_z3_leaf_module  # noqa: E402

logging.disable(logging.NOTSET)

# DeepSpeed 0.19.8 calls collectives by the names that torch 2.13 deprecates; goes when DeepSpeed takes the new ones.
warnings.filterwarnings("ignore", r"`torch.distributed.\w+_tensor` is deprecated", FutureWarning)

MOMENTS = ("exp_avg", "exp_avg_sq")


class _Cpu(CPU_Accelerator):
    def create_op_builder(self, op_name: str) -> Any:
        """DeepSpeed would compile shared-memory collectives with g++ and ninja (comm/torch.py of 0.19.8); gloo does."""
        return None if op_name == "ShareMemCommBuilder" else super().create_op_builder(op_name)


class _Cuda(CUDA_Accelerator):
    """The device that this rank has chosen, where DeepSpeed would go by LOCAL_RANK."""

    def device_name(self, device_index: int | None = None) -> str:
        return "cuda" if device_index is None else f"cuda:{torch.cuda.current_device()}"

    def set_device(self, device_index: int) -> None:
        pass


@dataclass(frozen=True)
class _Place:
    """Where this rank's stretch of a weight lies: elements offset..offset+n of `flat` are start..start+n of it."""

    flat: Tensor
    offset: int
    n: int
    start: int
    shape: torch.Size

    def of(self, flat: Tensor) -> FlatSlice:
        """The stretch of `flat`, a tensor like `self.flat`."""
        return FlatSlice(flat.detach().narrow(0, self.offset, self.n), self.start, self.shape)


class DeepSpeedEngine:
    """Steps a model whose weights ZeRO has split. `weights` are to be filled, and `publish` ends that.

    A step waits for the device once, when DeepSpeed asks whether the gradient norm is finite (runtime/utils.py,
    is_invalid_grad_norm); with offload also where gradients go to the host.

    Args:
        parts: the whole model on the meta device. No rank holds all of its weights at any time with stage 3.
    """

    def __init__(self, plan: Plan, parts: ModelParts, device: torch.device) -> None:
        self.plan, self.device, self.root = plan, device, parts.root
        config, self.stage = ds_config(plan), plan.layout.zero_stage
        deepspeed.logger.setLevel(logging.WARNING)
        set_accelerator(_Cpu() if device.type == "cpu" else _Cuda())
        deepspeed.init_distributed()  # joins the process group that is there
        _apply(parts, plan)
        # BF16_Optimizer of 0.19.8 prints what memory it takes, with no switch (runtime/bf16_optimizer.py, force=True).
        with redirect_stdout(io.StringIO()), _refused_options(plan):
            _materialise(parts, config, device, DTYPES[plan.layout.precision])
            names = {p: name for name, p in parts.root.named_parameters()}
            (self.adamw,) = build_optimizers([parts], plan.recipe.optim, DTYPES[plan.layout.precision])
            self.engine, self.zero, _, _ = deepspeed.initialize(model=parts.root, optimizer=self.adamw, config=config)
        self.places = {names[p]: place for p, place in _places(self.zero, self.stage)}
        self._build_state()

    def _build_state(self) -> None:
        """The state that the first step of AdamW would make, before it: zeros."""
        for flat in {id(place.flat): place.flat for place in self.places.values()}.values():
            state = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
            self.adamw.state[flat] = {"step": torch.zeros((), device=flat.device), **state}

    def rehearse(self, batch: Batch) -> None:
        with memory_errors(self.plan, self.device):
            self._forward_backward(batch)
        self._drop_gradients()

    def train_step(self, batch: Batch, step: int) -> StepStats:
        with memory_errors(self.plan, self.device):
            return self._train_step(batch, step)

    def _train_step(self, batch: Batch, step: int) -> StepStats:
        loss_sum, n_valid_tokens = self._forward_backward(batch)
        recipe = self.plan.recipe
        factor = lr_factor(recipe.schedule, step * recipe.train.global_batch_tokens, recipe.train.budget_tokens)
        set_lr([self.adamw], factor)
        self.engine.step()
        # A plain number where it is not finite; then DeepSpeed has changed no weight.
        grad_norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.device)
        # DeepSpeed passes over a step whose gradients are not finite, and trains on. 0 * inf makes its loss not finite,
        # so that the run stops at the next look, as with weights that are not finite on plain torch.
        return StepStats(loss_sum + 0 * grad_norm, n_valid_tokens, grad_norm, recipe.optim.lr * factor)

    def _forward_backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Gradients of (sum of losses / global count of valid tokens)."""
        n_valid_tokens = torch.full((), float(batch.n_valid_tokens), device=self.device)  # no copy, so no sync
        dist.all_reduce(n_valid_tokens)  # axis dp_shard, which is all ranks: each has a batch at every step
        # DeepSpeed averages over the ranks; times their number makes it the sum that the count divides.
        # Where no token of the whole batch counts, as chats may have it, the sums are 0 and any scale will do.
        scale = self.plan.layout.dp / n_valid_tokens.clamp(min=1)
        loss_sum = torch.zeros((), device=self.device)
        n_rows, rows = batch.input_BT.shape[0], self.plan.layout.micro_batch_rows
        for start in range(0, n_rows, rows):
            self.engine.set_gradient_accumulation_boundary(start + rows >= n_rows)
            loss = self.engine(*on_device(batch, slice(start, start + rows), self.device))
            self.engine.backward(loss * scale, scale_wrt_gas=False)
            loss_sum += loss.detach()
        return loss_sum, n_valid_tokens

    def _drop_gradients(self) -> None:
        """What DeepSpeed does with gradients that are not finite (`overflow` in each of its `step`)."""
        zero = self.zero
        zero.zero_grad()
        if not hasattr(zero, "averaged_gradients"):  # BF16_Optimizer, of stage 1 in bf16
            return
        if zero.cpu_offload if self.stage < 3 else zero.offload_optimizer:
            zero.reset_cpu_buffers()
        for group in zero.averaged_gradients:
            zero.averaged_gradients[group] = None
        if self.stage < 3:
            zero.micro_step_id = -1

    def weights(self) -> dict[str, FlatSlice]:
        """The float32 weights of this rank, to be filled in place; adapters leave others frozen, in their own dtype."""
        return {name: place.of(place.flat) for name, place in self.places.items()}

    def frozen(self) -> dict[str, Tensor]:
        """This rank's part of the weights below adapters, in the dtype that computes, to be filled in place."""
        found: dict[str, Tensor] = {}
        for name, p in self.root.named_parameters():
            if p.requires_grad:
                continue
            if self.stage < 3:
                found[name] = p.detach()
                continue
            part = p.ds_tensor
            start = dist.get_rank() * part.ds_numel
            n = max(0, min(part.ds_numel, p.ds_numel - start))
            found[name] = FlatSlice(part.detach().narrow(0, 0, n), start, p.ds_shape)
        return found

    @torch.no_grad()
    def publish(self) -> None:
        """Make the weights that compute from the float32 ones. Collective over dp_shard: all ranks arrive."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        zero = self.zero
        zero.parameter_offload.partition_all_parameters()
        for compute, master in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True):
            compute.copy_(master)
        if zero.persistent_parameters:  # small ones are gathered once and stay so
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def state_dict(self) -> dict[str, Any]:
        """The tensors themselves, not copies."""
        state = self.adamw.state
        return {
            "model": self.weights(),
            "optim": {
                name: {"step": state[at.flat]["step"], **{key: at.of(state[at.flat][key]) for key in MOMENTS}}
                for name, at in self.places.items()
            },
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        ours = self.state_dict()
        for name, weight in ours["model"].items():
            weight.local_X.copy_(state["model"][name].local_X)
            moments = state["optim"][name]
            ours["optim"][name]["step"].copy_(moments["step"])
            for key in MOMENTS:
                ours["optim"][name][key].local_X.copy_(moments[key].local_X)
        self.publish()

    def close(self) -> None:
        self.engine.destroy()


@contextmanager
def _refused_options(plan: Plan) -> Iterator[None]:
    """Where the user gave options, what DeepSpeed says against them is a PlanError."""
    try:
        yield
    except (ValueError, TypeError, AssertionError, DeepSpeedConfigError) as error:
        if not plan.recipe.layout.deepspeed:
            raise
        refused = PlanError(
            f"DeepSpeed {deepspeed.__version__} refuses these options: {error}",
            where="recipe: layout.deepspeed",
            do="correct the key or take it out; www.deepspeed.ai/docs/config-json lists them",
        )
        refused.on_every_rank = True  # all ranks read the same plan
        raise refused from None


def _apply(parts: ModelParts, plan: Plan) -> None:
    """Remat and compile, below DeepSpeed's hooks, which are around `forward`.

    With stage 3 a block is gathered and given back as a whole: hooks on its linears would run in the middle of a
    compiled or recomputed block.
    """
    apply_remat(parts, plan.layout)
    if plan.layout.compile:
        for module in (*parts.blocks, parts.root.get_submodule("chunk_loss")):
            module.forward = torch.compile(module.forward, dynamic=False)  # type: ignore[method-assign]
    if plan.layout.zero_stage == 3:
        for block in parts.blocks:
            set_z3_leaf_module(block, True)
        if parts.embed is not None and not any(p.requires_grad for p in parts.embed.parameters()):
            # The gradients of a block are taken when the gradient of its input is there, so there has to be one.
            parts.embed.register_forward_hook(lambda module, args, output: output.requires_grad_())


def _materialise(parts: ModelParts, config: Options, device: torch.device, dtype: torch.dtype) -> None:
    """Memory for the weights that compute, not filled. With stage 3 block by block, each split before the next."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    if config["zero_optimization"]["stage"] < 3:
        _leave_meta(parts.root, device, dtype, made)
        return
    for module in (*parts.blocks, parts.root):
        _leave_meta(module, device, dtype, made)
        deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=dtype)
    table = parts.head or parts.embed
    # The loss reads it without calling its module, whose hooks would gather it.
    deepspeed.zero.register_external_parameter(parts.root, table.weight)


def _leave_meta(
    root: nn.Module, device: torch.device, dtype: torch.dtype, made: dict[nn.Parameter, nn.Parameter]
) -> None:
    """Empty parameters on the device in place of those on meta; what was one parameter stays one."""
    for module in root.modules():
        for name, meta in module.named_parameters(recurse=False):
            if meta.is_meta:
                if meta not in made:
                    empty = torch.empty_like(meta, device=device, dtype=dtype)
                    made[meta] = nn.Parameter(empty, requires_grad=meta.requires_grad)
                module.register_parameter(name, made[meta])


def _places(zero: Any, stage: int) -> Iterator[tuple[nn.Parameter, _Place]]:
    """Of all weights that train. Attributes of DeepSpeed 0.19.8, which has no public names for them."""
    if stage == 3:
        for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
            for p in group:
                _, offset, n = zero.grad_position[zero.get_param_id(p)]
                start = dist.get_rank() * n
                yield p, _Place(flat, offset, max(0, min(n, p.ds_numel - start)), start, torch.Size(p.ds_shape))
        return
    is_bf16 = hasattr(zero, "bf16_groups")  # its class for stage 1 in bf16
    groups = zero.bf16_groups if is_bf16 else zero.bit16_groups
    flats = zero.fp32_groups_flat_partition if is_bf16 else zero.single_partition_of_fp32_groups
    for group, flat in zip(groups, flats, strict=True):
        for p in group:
            at = p._hp_mapping
            if at is None:
                yield p, _Place(flat, 0, 0, 0, p.shape)
            else:
                here, there = at.hp_fragment_address, at.lp_fragment_address
                yield p, _Place(flat, here.start, here.numel, there.start, p.shape)
