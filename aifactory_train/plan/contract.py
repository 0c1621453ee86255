"""The parts of plan.json. plan.py joins them; search, shape, memory and steptime fill them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Layout(Part):
    """Degrees of the axes in nesting order, outermost first, and how one replica's share of the batch is cut.

    world_size = pp * dp_replicate * dp_shard * cp * tp
    global_batch_rows = dp_replicate * dp_shard * accumulation * micro_batch_rows

    zero_stage: what dp_shard (together with cp) splits: 1 optimizer state, 2 and gradients, 3 and parameters.
    pipeline_schedule: of torch.distributed.pipelining. 1f1b has one stage on each rank, zbv and dualpipev two, and
        interleaved `stages_per_rank`. zbv and dualpipev place stages in a V: the last one beside the first.
    cp_attention: how queries meet the keys of other ranks: "all_gather" collects keys and values, "ring" passes them
        on, "ulysses" exchanges heads for tokens.
    remat_budget_frac: with remat "budget", the share of activation memory that the compiler may keep.
    reduce_each_micro_batch: gradients are reduced in each micro-batch and added up as shards, instead of once per
        step and added up unsharded.
    offload: "optimizer" keeps the optimizer state in host memory and steps there; "parameters" keeps the weights there
        too, and brings them to the device block by block.
    model_code: "own" is our decoder, "transformers" the code of the model's family there.
    device_order: the device of each local rank of a node; empty where local rank n drives device n.
    """

    engine: Literal["fsdp2", "deepspeed"]
    world_size: int
    n_nodes: int = 1
    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int
    cp: int = 1
    tp: int = 1
    zero_stage: Literal[1, 2, 3] = 3
    pipeline_schedule: Literal["1f1b", "interleaved", "zbv", "dualpipev"] = "1f1b"
    stages_per_rank: int = 1
    cp_attention: Literal["all_gather", "ring", "ulysses"] = "all_gather"
    micro_batch_rows: int
    accumulation: int
    reshard_after_forward: bool
    reduce_each_micro_batch: bool = False
    remat: Literal["none", "selective", "full", "budget"]
    remat_budget_frac: float | None = None
    compile: bool = False
    precision: Literal["fp32", "bf16", "fp8", "fp8_rowwise"]
    offload: Literal["none", "optimizer", "parameters"] = "none"
    model_code: Literal["own", "transformers"] = "own"
    threads_per_rank: int
    device_order: list[int] = []

    @property
    def dp(self) -> int:
        """Replicas that see different rows."""
        return self.dp_replicate * self.dp_shard

    def data_rank(self, rank: int) -> int:
        """Which of the `dp` shares of the batch a rank reads: ranks of one share differ in pp, cp or tp alone."""
        return rank // (self.cp * self.tp) % self.dp

    @property
    def shard_degree(self) -> int:
        """Ranks over which FSDP or ZeRO splits: context-parallel ranks hold the same weights, so they share too."""
        return self.dp_shard * self.cp

    @property
    def engine_name(self) -> str:
        """As it is shown: with the stage of ZeRO."""
        return f"deepspeed ZeRO {self.zero_stage}" if self.engine == "deepspeed" else self.engine


class Shape(Part):
    """Counts from the model's shapes alone; plan/shape.py says how each is defined."""

    n_parameters: int
    n_matmul_parameters: int
    model_flops_per_token: float
    flops_convention: Literal["model_causal_v1"] = "model_causal_v1"


class Prediction(Part):
    """Predicted by model: bytes per device by term, seconds per step by term. None where a rate is unknown.

    memory_bytes: of the worst device; `peak_at` says which stage that is, and when. host_bytes: per node.
    step_time_low_s, step_time_high_s: where nine of ten such predictions were found to lie.
    """

    memory_bytes: dict[str, int]
    peak_memory_bytes: int
    peak_at: str = ""
    host_bytes: dict[str, int] = {}
    step_time_s: dict[str, float | None]
    total_step_time_s: float | None
    step_time_low_s: float | None = None
    step_time_high_s: float | None = None
    tokens_per_s: float | None
    mfu_frac: float | None
    run_time_s: float | None
    device_hours: float | None
