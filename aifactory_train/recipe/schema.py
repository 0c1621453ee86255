"""The recipe: every choice a user can make, in strict models. No I/O, no torch.

Unit in every field name. `auto` means: the plan decides, and the plan shows what it became.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Auto = Literal["auto"]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # names of folders


def _whole(value: Any) -> Any:
    """1e9 is a whole number of tokens, although YAML reads it as a float."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


# The bounds are beyond any machine; they keep slips such as 1e30 from becoming plans.
Count = Annotated[int, BeforeValidator(_whole), Field(gt=0, le=10**18)]
CountOrZero = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=10**18)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
BudgetFraction = Annotated[float, Field(gt=0, lt=1)]
# N of interleaved-N: stages on each rank.
PipelineSchedule = Literal[
    "1f1b", "interleaved-2", "interleaved-3", "interleaved-4", "interleaved-5", "interleaved-6", "interleaved-7",
    "interleaved-8", "interleaved-9", "zbv", "dualpipev",
]  # fmt: skip


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class RopeScaling(Strict):
    """Llama 3 frequency scaling (Llama 3.1 model card, `rope_type: llama3`)."""

    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_seq_len_tokens: Count


class Model(Strict):
    """A decoder. Field names follow `transformers` where it has one; see configs/models/.

    `hf: FOLDER` or a hub id in a recipe stands for all of it: recipe/huggingface.py fills the rest from config.json.

    family: "other" is a model that only the code of `transformers` has; its numbers are what the plan counts with.
    init_from: a folder of weights in safetensors; without it they are random.
    hf_config: config.json as it was read.
    trust_remote_code: whether Python files of the folder may run.
    ffn_size: of one expert where there are several.
    """

    family: Literal["llama", "mistral", "qwen2", "qwen3", "other"]
    vocab_size: Count
    hidden_size: Count
    ffn_size: Count
    n_layers: Count
    n_heads: Count
    n_kv_heads: Count
    head_size: Count
    max_seq_len_tokens: Count
    rope_theta: Positive
    rope_scaling: RopeScaling | None = None
    norm_eps: Positive
    tied_embeddings: bool
    init_std: Positive = 0.02
    init_from: str | None = None
    n_mlp_matrices: Literal[2, 3] = 3
    n_experts: Count = 1
    n_active_experts: Count = 1
    hf: str | None = None
    hf_config: dict[str, Any] | None = None
    trust_remote_code: bool = False

    @property
    def qk_norm(self) -> bool:
        """RMSNorm on each head of q and k before RoPE."""
        return self.family == "qwen3"

    @property
    def qkv_bias(self) -> bool:
        return self.family == "qwen2"

    @model_validator(mode="after")
    def _shapes(self) -> Model:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not divisible by n_kv_heads {self.n_kv_heads}")
        if self.head_size % 2:
            raise ValueError(f"head_size {self.head_size} is odd, RoPE rotates pairs; take an even one")
        if self.n_active_experts > self.n_experts:
            raise ValueError(f"n_active_experts {self.n_active_experts} is more than n_experts {self.n_experts}")
        if self.family == "other" and self.hf_config is None:
            raise ValueError("family other is what hf: FOLDER makes of a model; give hf: FOLDER alone")
        return self


class Source(Strict):
    """One text source: local files, a hub dataset, or Python's own standard library.

    messages_key: of chats, lists of {role, content}, in place of `text_key`. They are rendered by the tokenizer's chat
        template, and the loss counts on what the assistant says.
    """

    name: str = Field(pattern=NAME)
    path: str | None = None
    hub: str | None = None
    hub_config: str | None = None
    hub_split: str = "train"
    python_stdlib: bool = False
    text_key: str = "text"
    messages_key: str | None = None
    weight: Positive = 1.0

    @model_validator(mode="after")
    def _one_of(self) -> Source:
        given = [k for k, v in (("path", self.path), ("hub", self.hub), ("python_stdlib", self.python_stdlib)) if v]
        if len(given) != 1:
            raise ValueError(f"give exactly one of path, hub, python_stdlib; given: {given or 'none'}")
        if self.python_stdlib and self.messages_key is not None:
            raise ValueError("messages_key belongs to chats in jsonl, parquet or a hub dataset, not to python_stdlib")
        return self


class Tokenizer(Strict):
    """A Hugging Face tokenizer folder, or the size of a byte-level BPE to train on the sources."""

    path: str | None = None
    train_vocab_size: Count | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Tokenizer:
        if (self.path is None) == (self.train_vocab_size is None):
            raise ValueError("give exactly one of path, train_vocab_size")
        return self


class Data(Strict):
    sources: Annotated[list[Source], Field(min_length=1)]
    tokenizer: Tokenizer
    prepared_dir: str
    seq_len_tokens: Count
    document_mask: bool = True
    workers: Count | Auto = "auto"

    @model_validator(mode="after")
    def _names(self) -> Data:
        names = [s.name for s in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"source names must differ; given: {names}")
        chats = [s.name for s in self.sources if s.messages_key is not None]
        if chats and self.tokenizer.path is None:
            raise ValueError(
                f"messages_key of source {chats[0]} needs the chat template of a tokenizer; a trained one has none: "
                "give tokenizer.path, the folder of an instruct model's tokenizer, in place of train_vocab_size"
            )
        return self


class Train(Strict):
    seed: CountOrZero = 0
    budget_tokens: Count
    global_batch_tokens: Count
    micro_batch_rows: Count | Auto = "auto"
    precision: Literal["fp32", "bf16", "fp8", "fp8_rowwise"] | Auto = "auto"
    compile: bool | Auto = "auto"


class Lora(Strict):
    """Low-rank adapters by `peft` (Hu et al., arxiv.org/abs/2106.09685); the weights of the model stay as they are.

    targets: names of linears, or "all-linear" for all of the blocks.
    """

    rank: Count
    alpha: Positive
    targets: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = "all-linear"


class Optim(Strict):
    """AdamW everywhere, or Muon on the matrices of the blocks and AdamW on the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: Positive
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    eps: Positive = 1e-8
    grad_clip_norm: Positive = 1.0
    muon_lr: Positive = 0.02
    muon_momentum: Decay = 0.95


class Schedule(Strict):
    """Learning rate over tokens. `decay_tokens` is the last stretch of warm-up, stable, decay (wsd)."""

    shape: Literal["cosine", "wsd", "linear"] = "cosine"
    warmup_tokens: CountOrZero = 0
    decay_tokens: Count | None = None
    min_lr_frac: Fraction = 0.1

    @model_validator(mode="after")
    def _decay(self) -> Schedule:
        if (self.shape == "wsd") != (self.decay_tokens is not None):
            if self.shape == "wsd":
                raise ValueError("shape wsd needs schedule.decay_tokens, the length of its last stretch")
            raise ValueError(f"decay_tokens belongs to shape wsd; shape is {self.shape}")
        return self


class Layout(Strict):
    """What the plan may not decide freely: each value that is given is kept. plan/contract.py says what they mean.

    remat: a fraction is the share of activation memory that the compiler may keep; it chooses what it computes again.
    model_code: "own" is our decoder, "transformers" the model's own code there.
    deepspeed: options of DeepSpeed's JSON, or the path of such a file; merged into what the plan makes of itself.
    """

    engine: Literal["fsdp2", "deepspeed"] | Auto = "auto"
    model_code: Literal["own", "transformers"] | Auto = "auto"
    pp: Count | Auto = "auto"
    dp_replicate: Count | Auto = "auto"
    dp_shard: Count | Auto = "auto"
    cp: Count | Auto = "auto"
    tp: Count | Auto = "auto"
    zero_stage: Literal[1, 2, 3] | Auto = "auto"
    pipeline_schedule: PipelineSchedule | Auto = "auto"
    cp_attention: Literal["all_gather", "ring", "ulysses"] | Auto = "auto"
    reshard_after_forward: bool | Auto = "auto"
    remat: Literal["none", "selective", "full"] | BudgetFraction | Auto = "auto"
    offload: Literal["none", "optimizer", "parameters"] | Auto = "auto"
    deepspeed: dict[str, Any] | None = None


class Checkpoint(Strict):
    every_steps: Count
    keep: Count = 2
    asynchronous: bool = True


class Metrics(Strict):
    log_every_steps: Count = 10
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "aifactory-train"


class Recipe(Strict):
    name: str = Field(pattern=NAME)
    model: Model
    data: Data
    train: Train
    lora: Lora | None = None
    optim: Optim
    schedule: Schedule = Schedule()
    layout: Layout = Layout()
    checkpoint: Checkpoint
    metrics: Metrics = Metrics()

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        seq, most = self.data.seq_len_tokens, self.model.max_seq_len_tokens
        faults = []
        if seq > most:
            faults.append(f"data.seq_len_tokens {seq} is longer than model.max_seq_len_tokens {most}")
        if self.train.global_batch_tokens % seq:
            faults.append(
                f"train.global_batch_tokens {self.train.global_batch_tokens} is not divisible by "
                f"data.seq_len_tokens {seq}; nearest: {max(1, round(self.train.global_batch_tokens / seq)) * seq}"
            )
        wanted = self.data.tokenizer.train_vocab_size
        if wanted is not None and wanted > self.model.vocab_size:
            faults.append(
                f"data.tokenizer.train_vocab_size {wanted} is larger than model.vocab_size {self.model.vocab_size}"
            )
        ramps = self.schedule.warmup_tokens + (self.schedule.decay_tokens or 0)
        if ramps > self.train.budget_tokens:
            faults.append(f"schedule.warmup_tokens + decay_tokens = {ramps} exceed train.budget_tokens")
        if isinstance(self.layout.remat, float) and self.train.compile is False:
            faults.append(
                f"layout.remat {self.layout.remat} is a budget for the compiler, and train.compile is false; "
                "--set train.compile=true, or --set layout.remat=selective"
            )
        if faults:
            raise ValueError("\n    ".join(faults))
        return self

    @property
    def global_batch_rows(self) -> int:
        return self.train.global_batch_tokens // self.data.seq_len_tokens

    def checkpoint_model(self) -> dict[str, Any]:
        """What a checkpoint is of: the model, and with adapters these."""
        model = self.model.model_dump(mode="json")
        return model if self.lora is None else model | {"lora": self.lora.model_dump(mode="json")}

    @property
    def n_steps(self) -> int:
        """Optimizer steps to the token budget; the last one may pass it by less than a batch."""
        return -(-self.train.budget_tokens // self.train.global_batch_tokens)


def fingerprint(model: BaseModel) -> str:
    """sha256 of the canonical JSON of any of our models."""
    text = json.dumps(model.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
