"""What the estimates are about, without the rest of a recipe: the model, its batch, and how the software works.

`benchmarks/plan_accuracy` fills both for runs that others published, so that one code predicts theirs and ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aifactory_train.recipe.schema import Lora, Model, Recipe


@dataclass(frozen=True)
class Work:
    """One optimizer step: `global_batch_rows` rows of `seq_len_tokens` tokens through `model`."""

    model: Model
    seq_len_tokens: int
    global_batch_rows: int
    document_mask: bool = False
    optimizer: Literal["adamw", "muon"] = "adamw"
    asynchronous_save: bool = False
    checkpoint_every_steps: int | None = None
    lora: Lora | None = None

    @property
    def global_batch_tokens(self) -> int:
        return self.global_batch_rows * self.seq_len_tokens


def work_of(recipe: Recipe) -> Work:
    return Work(
        model=recipe.model,
        seq_len_tokens=recipe.data.seq_len_tokens,
        global_batch_rows=recipe.global_batch_rows,
        document_mask=recipe.data.document_mask,
        optimizer=recipe.optim.name,
        asynchronous_save=recipe.checkpoint.asynchronous,
        checkpoint_every_steps=recipe.checkpoint.every_steps,
        lora=recipe.lora,
    )


@dataclass(frozen=True)
class Software:
    """What an implementation does where that moves time or memory. The defaults are this framework.

    attention: "unfused" writes the scores to memory; the others are generations of the flash attention kernels.
    fused_elementwise: norms, RoPE, activation function and residual sums run as few kernels (compiled or by hand);
        None: as the layout's `compile` says.
    fused_norm: a norm is one kernel, even where the rest is not; else some ten of them in fp32.
    loss_chunk_tokens: logits are held for so many tokens at once; None: for the whole micro-batch, in fp32 too.
    fp32_gradients: gradients are added up over micro-batches in fp32, else in the precision of the model.
    sequence_parallel: between the blocks activations are split over tp.
    overlap_dp: gathers and reductions of dp run beside the computation.
    gathers_by_broadcast: after a sharded optimizer each rank broadcasts its share of the weights.
    overlap_tp: gathers and reductions of tp run beside the matrix products that they belong to, piece by piece.
    fp32_states: master weights and the optimizer's moments are fp32, else in the precision of the model.
    flat_step: ZeRO lays gradients out in long fp32 tensors for the step, which find no room in what activations left.
    stops_recomputing_early: full remat leaves out the last product of a block, whose result nothing needs (torch's
        own checkpoint from 2.1 on); else it repeats the whole forward.
    n_fp32_logits: fp32 tensors of the size of the logits that a loss over the whole micro-batch makes. 3 in plain
        torch: copy, log-softmax, gradient; 1 where Megatron works in place; 0 in a kernel over the logits themselves.
    vocab_parallel_loss: the loss works on each tp rank's part of the vocabulary, else on logits gathered from all.
    stages_count_head: pipeline stages are cut so that the output head counts as layers, else blocks alone are counted.
    moves_inputs_again: in backward the inputs of a block's products are gathered over tp, and keys and values moved
        over cp, once more (Megatron), in place of keeping what forward gathered.
    fp8_inputs: under fp8 the inputs of matrix products wait for the backward pass in fp8, else in bf16.
    """

    attention: Literal["unfused", "flash1", "flash2", "flash3"] = "flash2"
    fused_elementwise: bool | None = None
    fused_norm: bool = True
    loss_chunk_tokens: int | None = 1024
    fp32_gradients: bool = True
    sequence_parallel: bool = True
    overlap_dp: bool = True
    gathers_by_broadcast: bool = False
    overlap_tp: bool = False
    fp32_states: bool = True
    flat_step: bool = False
    stops_recomputing_early: bool = True
    n_fp32_logits: int = 3
    vocab_parallel_loss: bool = True
    fp8_inputs: bool = False
    stages_count_head: bool = True
    moves_inputs_again: bool = False

    @property
    def flash_attention(self) -> bool:
        return self.attention != "unfused"


OURS = Software()
