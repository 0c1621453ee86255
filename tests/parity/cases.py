"""The matrix: which layouts are held against one process, and with what else. Data alone; ranks.py trains them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import Any

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
ROWS, TOKENS, STEPS = 16, 32, 5
# After this step a checkpoint is written where a case says so; the steps behind it are what a load must repeat.
SAVED_AFTER = 3

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tied_embeddings": True},
    "qwen3": {"family": "qwen3"},
    # Nothing that FSDP cuts divides by 2, 3 or 4, and the layers do not divide by the stages.
    "uneven": {"hidden_size": 50, "n_layers": 5},
    # To compile takes most of a run's time, and blocks are compiled one by one.
    "shallow": {"n_layers": 2},
}


@dataclass(frozen=True)
class Case:
    """One layout and what goes with it. `reference` is the case of one process with the same weights and batches."""

    engine: str = "fsdp2"
    zero_stage: int = 3
    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pipeline_schedule: str = "1f1b"
    stages_per_rank: int = 1
    cp_attention: str = "all_gather"
    remat: str = "none"
    offload: str = "none"
    compile: bool = False
    accumulate: bool = False
    reshard: bool = False
    reduce_each: bool = False
    model: str = "llama"
    documents: bool = True
    optimizer: str = "adamw"
    precision: str = "fp32"
    fault: str = ""

    @property
    def world_size(self) -> int:
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def rows_per_rank(self) -> int:
        return ROWS // (self.dp_replicate * self.dp_shard)

    @property
    def micro_batch_rows(self) -> int:
        """A pipeline always has several micro-batches, as many as there are rows."""
        return 1 if self.accumulate or self.pp > 1 else self.rows_per_rank

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(axis for axis in AXES if getattr(self, axis) > 1)

    @property
    def name(self) -> str:
        words = [f"{axis}{getattr(self, axis)}" for axis in self.axes] or ["one"]
        if self.engine == "deepspeed":
            words.insert(0, f"zero{self.zero_stage}")
        if self.pp > 1 and self.pipeline_schedule != "1f1b":
            words.append(self.pipeline_schedule)
        if self.cp > 1:
            words.append(self.cp_attention)
        words += [
            getattr(self, key)
            for key in ("remat", "model", "optimizer", "precision")
            if getattr(self, key) != DEFAULT[key]
        ]
        words += [key for key in ("compile", "accumulate", "reshard", "reduce_each") if getattr(self, key)]
        words += [f"offload-{self.offload}"] if self.offload != "none" else []
        words += ["rows"] if not self.documents else []
        return "-".join([*words, *([f"FAULT={self.fault}"] if self.fault else [])])

    @property
    def reference(self) -> Case:
        # Newton-Schulz blows up differences of rounding, so Muon is held to the same sums over micro-batches.
        accumulate = self.optimizer == "muon" and self.micro_batch_rows == 1
        return Case(
            model=self.model,
            documents=self.documents,
            optimizer=self.optimizer,
            precision=self.precision,
            accumulate=accumulate,
        )


DEFAULT = {field.name: field.default for field in fields(Case)}


VARIANTS: dict[str, dict[str, Any]] = {
    "remat full": {"remat": "full"},
    "remat selective": {"remat": "selective"},
    "accumulation": {"accumulate": True},
    "tied embeddings": {"model": "tied"},
    "qwen3": {"model": "qwen3"},
    "uneven": {"model": "uneven"},
    "no document mask": {"documents": False},
    "muon": {"optimizer": "muon"},
    "resharded": {"reshard": True},
    "compile": {"compile": True, "model": "shallow"},
    "compile, remat full": {"compile": True, "remat": "full", "model": "shallow"},
    "compile, remat budget": {"compile": True, "remat": "budget", "model": "shallow"},
}

# Pairs are compiled with one remat alone: to compile four ranks takes a minute.
ONCE = ("compile", "compile, remat budget")


def _degrees(axes: tuple[str, ...], **changes: Any) -> Case:
    return Case(**dict.fromkeys(axes, 2), **changes)


def _forms(case: Case) -> list[Case]:
    """With each schedule of the pipeline and each form of context parallelism."""
    forms = [case]
    if case.pp > 1:
        forms += [replace(case, pipeline_schedule=s, stages_per_rank=2) for s in ("interleaved", "zbv", "dualpipev")]
    if case.cp > 1:
        forms = [replace(form, cp_attention=a) for form in forms for a in ("all_gather", "ring", "ulysses")]
    return forms


ALONE = [form for axis in AXES for form in _forms(_degrees((axis,)))]
FOUR_RANKS = [Case(**{axis: 4}) for axis in AXES]
PAIRS = [_degrees(pair) for pair in combinations(AXES, 2)]
TRIPLES = [_degrees(triple) for triple in combinations(AXES, 3)]
FOURS = [_degrees(four) for four in combinations(AXES, 4)]
WITH_EACH_VARIANT = [replace(_degrees((axis,)), **change) for axis in AXES for change in VARIANTS.values()]
COMPILED_SHORT = [
    Case(dp_shard=2, compile=True, remat="full", model="shallow"),
    *[_degrees((axis,), compile=True, model="shallow") for axis in ("pp", "cp", "tp")],
    Case(tp=2, compile=True, remat="budget", model="shallow"),
]
TRIPLES_SHORT = [
    _degrees(triple)
    for triple in (
        ("pp", "cp", "tp"),
        ("pp", "dp_shard", "tp"),
        ("pp", "dp_replicate", "dp_shard"),
        ("dp_replicate", "dp_shard", "tp"),
        ("dp_shard", "cp", "tp"),
    )
]
FSDP_CHOICES = [
    Case(dp_shard=2, accumulate=True, reduce_each=True),
    Case(dp_replicate=2, dp_shard=2, accumulate=True, reduce_each=True),
    Case(dp_shard=2, accumulate=True, reshard=True),
]


def _rotated(cases: list[Case], n_each: int) -> list[Case]:
    """Each case with `n_each` of the variants, in turn, so that all variants meet all sizes of combination."""
    changes = [change for name, change in VARIANTS.items() if "compile" not in name]
    return [
        replace(case, **changes[(i * n_each + k) % len(changes)]) for i, case in enumerate(cases) for k in range(n_each)
    ]


def _distinct(cases: list[Case]) -> list[Case]:
    return list(dict.fromkeys(cases))


# In `make test`.
SHORT = _distinct(
    [
        *ALONE,
        *PAIRS,
        *TRIPLES_SHORT,
        *FSDP_CHOICES,
        *_rotated(PAIRS, 1),
        *[case for case in WITH_EACH_VARIANT if not case.compile],
        *COMPILED_SHORT,
    ]
)
# `make parity` adds these.
LONG = [
    case
    for case in _distinct([
        *FOUR_RANKS,
        *WITH_EACH_VARIANT,
        *TRIPLES,
        *[form for pair in PAIRS for form in _forms(pair)],
        *[replace(pair, **change) for pair in PAIRS for name, change in VARIANTS.items() if name not in ONCE],
        *_rotated(TRIPLES, 1),
        *FOURS,
    ])
    if case not in SHORT
]  # fmt: skip

_ZERO = [Case(engine="deepspeed", zero_stage=stage, dp_shard=n) for stage in (1, 2, 3) for n in (1, 2, 4)]
# Within each list, each saves and each loads what all of them saved.
CHECKPOINTS = [
    replace(case, model="shallow")
    for case in (
        Case(),
        Case(dp_shard=2),
        Case(dp_shard=4),
        Case(dp_replicate=2, dp_shard=2),
        Case(tp=2),
        Case(pp=2),
        *_ZERO,
    )
]
# The same with weights that compute in bfloat16; those of the checkpoint are float32.
BF16_CHECKPOINTS = [replace(case, precision="bf16") for case in CHECKPOINTS if case.world_size == 2 and case.pp == 1]
# `make parity` adds these: two axes that split one weight, several stages on a rank.
LONG_CHECKPOINTS = [
    Case(),
    Case(dp_shard=4),
    Case(cp=2, tp=2),
    Case(pp=2, pipeline_schedule="interleaved", stages_per_rank=2),
    Case(pp=2, dp_shard=2, tp=2),
    *[case for case in _ZERO if case.dp_shard == 2],
]

# What each deliberate fault is made in; faults.py says what it does.
FAULTY = [
    Case(dp_shard=2, fault="tokens_of_own_rows_counted"),
    Case(dp_shard=2, fault="shards_not_summed"),
    Case(dp_replicate=2, fault="copies_not_summed"),
    Case(cp=2, fault="gradients_of_keys_stay"),
    Case(cp=2, cp_attention="ring", fault="gradients_lost_in_the_ring"),
    Case(cp=2, cp_attention="ulysses", fault="heads_return_gradients_twice"),
    Case(cp=2, fault="tokens_in_order_under_a_balanced_mask"),
    Case(tp=2, fault="hidden_gradient_of_own_words"),
    Case(tp=2, fault="words_of_own_rank_summed"),
    Case(pp=2, fault="norm_of_own_stage"),
    Case(pp=2, fault="half_of_the_loss"),
    Case(pp=2, model="tied", fault="tables_not_summed"),
]
