"""Seconds per optimizer step by named term; they add up to the step.

The slowest pipeline stage sets the pace: micro-batches x (its computation + its communication that nothing hides),
and once per step the pipeline's fill, the exchange of gradients and the optimizer. All terms are of the rank that
takes longest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from aifactory_train.machine.machine import Machine
from aifactory_train.plan import shape
from aifactory_train.plan.blocktime import Forward, Pace, block_forward, device_pace, head_forward
from aifactory_train.plan.constants import CONSTANTS, TRANSFORMERS_CODE_FACTOR, Constants
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.network import PCIE_BYTES_PER_S, AxisLink, axis_links, collective_s
from aifactory_train.plan.stages import V_SCHEDULES, layers_by_rank
from aifactory_train.plan.traffic import Held, Transfer, reduces_each, traffic
from aifactory_train.plan.work import OURS, Software, Work

# Per weight of the rank's share: gradient, fp32 weight and two moments read, weight and moments written, the working
# copy written, the gradient read once for its norm and once to set it to zero.
OPTIMIZER_BYTES_PER_PARAMETER = 4 * 4 + 3 * 4 + 2 + 4 + 4
# The same state in host memory: read and written there.
HOST_OPTIMIZER_BYTES_PER_PARAMETER = 7 * 4
# Memory of a two-socket host, all ranks of a node together; no machine file has it.
HOST_MEMORY_BYTES_PER_S = 400e9
# A copy to host memory while all devices of a node copy: a fifth of PCIe 4.0 x16.
STAGE_BYTES_PER_S = 5e9
NEWTON_SCHULZ_STEPS = 5  # of train/optim.py
# Backward over forward: two products for each; the flash kernel computes the scores again (5 products for 2).
BACKWARD_SCORES, BACKWARD_FLASH, BACKWARD_ELEMENTWISE = 2.0, 2.5, 2.0


@dataclass(frozen=True)
class _Compute:
    """Seconds of one micro-batch on the slowest rank of pp, which has `n_blocks`, and the mean over ranks.

    weights_frac: of a block, the gradients of its weights, for which no other rank waits.
    """

    n_blocks: int
    matmul_s: float
    attention_s: float
    elementwise_s: float
    gaps_s: float
    head_s: float
    recomputed_s: float
    mean_over_slowest: float
    weights_frac: float

    @property
    def total_s(self) -> float:
        return self.matmul_s + self.attention_s + self.elementwise_s + self.gaps_s + self.head_s + self.recomputed_s


def estimate_step_time_s(
    work: Work,
    machine: Machine,
    layout: Layout,
    software: Software = OURS,
    constants: Constants = CONSTANTS,
) -> dict[str, float | None]:
    """Seconds of one step by term. All are None where no rate of the device is known or can be assumed."""
    pace = device_pace(machine, layout, software, constants)
    if pace is None:
        return dict.fromkeys(("matmul", "elementwise", "optimizer", "communication"), None)
    links = axis_links(machine, layout, constants)
    compute = _compute(work, layout, software, pace if layout.model_code == "own" else _slower(pace))
    n_micro = layout.accumulation
    moved = _Moved(traffic(work, layout, software, _slowest(layout, compute)), links, layout)
    tp_s = _tensor_parallel_s(moved, software, constants)
    cp_s = _context_parallel_s(moved, compute, constants)
    transfer_s = moved.micro_s("pp")
    micro_s = compute.total_s + tp_s + cp_s + transfer_s
    fill = _fill(layout, compute)
    data_parallel_s = _data_parallel_s(moved, layout, software, compute.n_blocks, micro_s, constants)
    terms = {
        "matmul": n_micro * compute.matmul_s,
        "attention": n_micro * compute.attention_s,
        "elementwise": n_micro * compute.elementwise_s,
        "kernel_starts": n_micro * compute.gaps_s,
        "head_and_loss": n_micro * compute.head_s,
        "recomputation": n_micro * compute.recomputed_s,
        "tensor_parallel": n_micro * tp_s,
        "context_parallel": n_micro * cp_s,
        "pipeline_transfers": n_micro * transfer_s,
        "pipeline_bubble": fill * micro_s,
        "data_parallel": data_parallel_s,
        "weights_from_host": _weights_from_host_s(work, machine, layout),
        "optimizer": _optimizer_s(work, machine, layout, pace, links["fsdp"]),
        "data": _data_s(work, machine, layout),
        "checkpoint_stall": _checkpoint_stall_s(work, machine, layout),
        "host": constants.step_host_s,
    }
    doublings = max(0, layout.n_nodes.bit_length() - 1)
    terms["stragglers"] = constants.straggler_frac * doublings * sum(terms.values())
    always = ("matmul", "attention", "elementwise", "head_and_loss", "optimizer")
    return {name: seconds for name, seconds in terms.items() if seconds > 0 or name in always}


def total_step_time_s(terms: dict[str, float | None]) -> float | None:
    """Sum of the terms; None where the matrix products have no rate."""
    if terms["matmul"] is None:
        return None
    return sum(seconds for seconds in terms.values() if seconds is not None)


def _slower(pace: Pace) -> Pace:
    """That of the code of transformers."""
    factor = TRANSFORMERS_CODE_FACTOR
    return replace(
        pace,
        gemm_flops_per_s=pace.gemm_flops_per_s / factor,
        head_flops_per_s=pace.head_flops_per_s / factor,
        attention_flops_per_s=pace.attention_flops_per_s / factor,
        memory_bytes_per_s=pace.memory_bytes_per_s / factor,
        kernel_gap_s=pace.kernel_gap_s * factor,
    )


def _compute(work: Work, layout: Layout, software: Software, pace: Pace) -> _Compute:
    """Forward and backward of one micro-batch on the slowest rank of pp; the head is on the last."""
    block = block_forward(work, layout, software, pace)
    head = head_forward(work, layout, software, pace)
    back_attention = BACKWARD_FLASH if software.flash_attention else BACKWARD_SCORES
    recomputed_s = _recomputed_s(block, layout, software)
    block_s = (
        block.gemm_s
        + block.backward_gemm_s
        + (1 + back_attention) * block.attention_s
        + (1 + BACKWARD_ELEMENTWISE) * (block.elementwise_s + block.gaps_s)
        + recomputed_s
    )
    head_s = head.total_s + head.backward_gemm_s + BACKWARD_ELEMENTWISE * (head.elementwise_s + head.gaps_s)
    by_rank = layers_by_rank(work.model, layout, software.stages_count_head)
    # In a V the last stage is on the first rank.
    beside_head = by_rank[0 if layout.pipeline_schedule in V_SCHEDULES else -1]
    head_is_slowest = beside_head * block_s + head_s >= max(by_rank) * block_s
    n_blocks = beside_head if head_is_slowest else max(by_rank)
    slowest_s = n_blocks * block_s + (head_s if head_is_slowest else 0.0)
    mean_s = (work.model.n_layers * block_s + head_s) / layout.pp
    return _Compute(
        n_blocks=n_blocks,
        matmul_s=n_blocks * (block.gemm_s + block.backward_gemm_s),
        attention_s=n_blocks * (1 + back_attention) * block.attention_s,
        elementwise_s=n_blocks * (1 + BACKWARD_ELEMENTWISE) * block.elementwise_s,
        gaps_s=n_blocks * (1 + BACKWARD_ELEMENTWISE) * block.gaps_s,
        head_s=head_s if head_is_slowest else 0.0,
        recomputed_s=n_blocks * recomputed_s,
        mean_over_slowest=min(1.0, mean_s / slowest_s),
        weights_frac=block.backward_gemm_s / 2 / block_s,
    )


def _fill(layout: Layout, compute: _Compute) -> float:
    """Micro-batches' worth of time that the slowest rank waits while the first fills and the last drains the pipeline.

    In a V a rank does its own part of the gradients of weights meanwhile, twice as long as others let it wait: it is
    (pp - 1) (forward + backward for the input - for the weights) of one of its two stages (arXiv:2401.10241), which
    for dualpipev is right where these three take equally long.
    """
    others = layout.pp * compute.mean_over_slowest - 1
    if layout.pipeline_schedule in V_SCHEDULES:
        return others / 2 * (1 - 2 * compute.weights_frac)
    return others / layout.stages_per_rank


def _recomputed_s(block: Forward, layout: Layout, software: Software) -> float:
    """Within a budget the compiler keeps what is dearest per byte: attention always, and half of the products'
    results instead of what lies between them."""
    if layout.remat == "full":
        return block.total_s - (block.last_gemm_s if software.stops_recomputing_early else 0.0)
    if layout.remat == "budget" and layout.remat_budget_frac is not None:
        return (1 - layout.remat_budget_frac) * (block.gemm_s / 2 + block.elementwise_s + block.gaps_s)
    return block.second_gemms_s + block.elementwise_s + block.gaps_s if layout.remat == "selective" else 0.0


class _Moved:
    """Seconds of the collectives of one rank."""

    def __init__(self, transfers: tuple[Transfer, ...], links: dict[str, AxisLink], layout: Layout) -> None:
        self.transfers, self.links, self.n_micro = transfers, links, layout.accumulation

    def step_s(self, axis: str, *kinds: str) -> float:
        """Per step, of some kinds or of all."""
        link = self.links[axis]
        return sum(
            t.times * collective_s(t.kind, t.n_bytes, link)
            for t in self.transfers
            if t.axis == axis and (not kinds or t.kind in kinds)
        )

    def micro_s(self, axis: str, *kinds: str) -> float:
        """The same per micro-batch."""
        return self.step_s(axis, *kinds) / self.n_micro


def _slowest(layout: Layout, compute: _Compute) -> Held:
    """The rank of pp that sets the pace, which has neighbours on both sides or waits for the one it has as long."""
    has_head = compute.head_s > 0
    in_v = layout.pipeline_schedule in V_SCHEDULES
    return Held(compute.n_blocks, layout.pp == 1 or (has_head and in_v), has_head, 2 * layout.stages_per_rank)


def _tensor_parallel_s(moved: _Moved, software: Software, constants: Constants) -> float:
    """Per micro-batch of one stage; what the software hides are gathers and scatters, by pieces of their products."""
    hidden = constants.tp_overlap_frac if software.overlap_tp else 0.0
    streams_s = moved.micro_s("tp", "all_gather", "reduce_scatter")
    return streams_s * (1 - hidden) + moved.micro_s("tp", "all_reduce")


def _context_parallel_s(moved: _Moved, compute: _Compute, constants: Constants) -> float:
    """Per micro-batch of one stage, as far as the attention does not hide it."""
    seconds = moved.micro_s("cp")
    return max(seconds - constants.cp_overlap_frac * compute.attention_s, (1 - constants.cp_overlap_frac) * seconds)


def _data_parallel_s(
    moved: _Moved, layout: Layout, software: Software, n_blocks: int, micro_s: float, constants: Constants
) -> float:
    """Per step: gathers of weights and reductions of gradients, as far as no computation hides them.

    What happens in each micro-batch hides behind it, and what happens once behind the last one. But in a pipeline
    FSDP reduces after the last backward pass.
    """
    n_others, fsdp = layout.accumulation - 1, layout.zero_stage == 3
    gather_s, scatter_s = moved.step_s("fsdp", "all_gather"), moved.step_s("fsdp", "reduce_scatter")
    once_s, each_s = moved.step_s("dp_replicate"), 0.0
    if fsdp and layout.reshard_after_forward:
        each_s += gather_s / layout.accumulation
    else:
        once_s += gather_s
    if software.gathers_by_broadcast:
        once_s += layout.shard_degree * constants.broadcast_s
    if reduces_each(layout):
        each_s += scatter_s / layout.accumulation
    else:
        once_s += scatter_s
    bare_s = 0.0
    if fsdp and layout.pp > 1:
        bare_s = scatter_s + moved.step_s("dp_replicate")
        once_s -= bare_s
    others_s = n_others * _exposed_s(each_s, micro_s, software, constants, n_blocks)
    return others_s + _exposed_s(each_s + once_s, micro_s, software, constants, n_blocks) + bare_s


def _exposed_s(seconds: float, window_s: float, software: Software, constants: Constants, n_parts: float) -> float:
    """What of `seconds` of communication the step waits for beside `window_s` of computation."""
    if not software.overlap_dp:
        return seconds
    hidden = min(seconds * (1 - 1 / max(2.0, n_parts)), constants.dp_overlap_frac * window_s)
    return seconds - hidden + constants.contention_frac * hidden


def _optimizer_s(work: Work, machine: Machine, layout: Layout, pace: Pace, link: AxisLink) -> float:
    n_weights = shape.n_trained_parameters(work.model, work.lora) / (layout.tp * layout.pp * layout.shard_degree)
    muon_s = _muon_s(work, layout, pace, link) if work.optimizer == "muon" else 0.0
    if layout.offload == "none":
        return muon_s + n_weights * OPTIMIZER_BYTES_PER_PARAMETER / pace.memory_bytes_per_s
    host_link = machine.topology.host_bytes_per_s or PCIE_BYTES_PER_S
    ranks_per_node = layout.world_size // layout.n_nodes
    host_s = n_weights * ranks_per_node * HOST_OPTIMIZER_BYTES_PER_PARAMETER / HOST_MEMORY_BYTES_PER_S
    return muon_s + host_s + n_weights * (shape.BYTES["fp32"] + shape.BYTES["bf16"]) / host_link


def _weights_from_host_s(work: Work, machine: Machine, layout: Layout) -> float:
    """With offload of the parameters each rank brings its share from host memory, forward and backward, every time.

    As long as nobody has measured how much of it DeepSpeed hides, nothing is.
    """
    if layout.offload != "parameters" or machine.device.kind == "cpu":
        return 0.0
    n_bytes = shape.n_parameters(work.model) / layout.shard_degree * shape.BYTES[layout.precision]
    return 2 * layout.accumulation * n_bytes / (machine.topology.host_bytes_per_s or PCIE_BYTES_PER_S)


def _muon_s(work: Work, layout: Layout, pace: Pace, link: AxisLink) -> float:
    """Each rank gathers the fp32 momentum of whole matrices and makes it orthogonal (train/optim.py)."""
    at = shape.dims(work.model, layout.tp)
    sides = [(at.d, at.q), (at.d, at.kv), (at.d, at.kv), (at.q, at.d)] + at.n_experts * at.n_mlp_matrices * [
        (at.d, at.f)
    ]
    # One of the five steps, on rows x columns with rows the fewer: x x^T and gram x, and between them gram gram.
    flops = sum(NEWTON_SCHULZ_STEPS * (4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3) for s in sides)
    n_bytes = shape.BYTES["fp32"] * sum(rows * columns for rows, columns in sides)
    block_s = flops / pace.head_flops_per_s + collective_s("all_gather", n_bytes, link)
    return work.model.n_layers / layout.pp * block_s


def _data_s(work: Work, machine: Machine, layout: Layout) -> float:
    """Copies of token numbers and positions to the device, 8 bytes each; the loader itself works ahead."""
    if machine.device.kind == "cpu":
        return 0.0
    tokens = work.global_batch_tokens / layout.dp
    return 2 * 8 * tokens / (machine.topology.host_bytes_per_s or PCIE_BYTES_PER_S)


def _checkpoint_stall_s(work: Work, machine: Machine, layout: Layout) -> float:
    """Share of a step of the copy of weights and moments to host memory, from which they are written."""
    if not work.checkpoint_every_steps or machine.device.kind == "cpu":
        return 0.0
    n_bytes = shape.n_trained_parameters(work.model, work.lora) * 12 / (layout.tp * layout.pp * layout.shard_degree)
    staged_per_s = min(STAGE_BYTES_PER_S, machine.topology.host_bytes_per_s or STAGE_BYTES_PER_S)
    return n_bytes / staged_per_s / work.checkpoint_every_steps
