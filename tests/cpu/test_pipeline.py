"""Axis pp where the parity matrix does not look: what travels, checkpoints of a V, weights of other stages."""

from __future__ import annotations

import json
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch.distributed.pipelining._utils import InferenceMode
from torch.utils._python_dispatch import TorchDispatchMode

from aifactory_train.checkpoint.dcp import read_tensors, write_tensors
from aifactory_train.checkpoint.huggingface import load_weights
from aifactory_train.data.loader import Batch
from aifactory_train.errors import CheckpointError
from aifactory_train.models.build import init_weights
from aifactory_train.models.decoder import Decoder
from aifactory_train.plan.plan import Plan
from aifactory_train.plan.stages import layers_by_stage
from aifactory_train.recipe.huggingface import own_config
from aifactory_train.recipe.schema import Model
from aifactory_train.train.engine_torch import TorchEngine
from aifactory_train.train.setup import build_engine
from results_run import a_plan
from training_runs import MODEL, free_port

WORLD = 2
ROWS, TOKENS, N_MICRO = 8, 16, 4
RTOL = 1e-6
TIED = Model(**{**MODEL, "n_layers": 4, "tied_embeddings": True})
HIDDEN_BYTES = ROWS // N_MICRO * TOKENS * TIED.hidden_size * 4
TABLE_BYTES = TIED.vocab_size * TIED.hidden_size * 4
# Messages of a rank in a step: of each micro-batch at each border to another rank, and of the tied table. In a V the
# two stages of the last rank meet there, and so do the two tables of rank 0.
SENDS = {
    ("1f1b", 1): Counter({HIDDEN_BYTES: N_MICRO, TABLE_BYTES: 1}),
    ("interleaved", 2): Counter({HIDDEN_BYTES: 3 * N_MICRO, TABLE_BYTES: 1}),
    ("zbv", 2): Counter({HIDDEN_BYTES: 2 * N_MICRO}),
    ("dualpipev", 2): Counter({HIDDEN_BYTES: 2 * N_MICRO}),
}


class Seen(TorchDispatchMode):
    """Sizes of all messages that are sent, and how often the host asked for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.sends: Counter[int] = Counter()
        self.n_syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d.send.default:
            self.sends[sum(t.nbytes for t in args[0])] += 1
        self.n_syncs += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def tied_plan(base: Plan, pp: int, schedule: str = "1f1b", stages_per_rank: int = 1) -> Plan:
    layout = {
        "world_size": pp, "pp": pp, "dp_shard": 1, "pipeline_schedule": schedule, "stages_per_rank": stages_per_rank,
        "accumulation": N_MICRO, "micro_batch_rows": ROWS // N_MICRO, "precision": "fp32", "remat": "none",
        "compile": False, "reshard_after_forward": False, "reduce_each_micro_batch": False,
    }  # fmt: skip
    recipe = base.recipe.model_copy(
        update={"model": TIED, "data": base.recipe.data.model_copy(update={"seq_len_tokens": TOKENS})}
    )
    return base.model_copy(update={"recipe": recipe, "layout": base.layout.model_copy(update=layout)})


def batch_of(step: int) -> Batch:
    tokens = torch.randint(0, TIED.vocab_size, (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(step))
    return Batch(tokens[:, :-1], tokens[:, 1:], None, None, ROWS * TOKENS)


def built(plan: Plan, fresh: bool = True) -> TorchEngine:
    return build_engine(plan, torch.device("cpu"), fresh=fresh)


def loss_of(engine: TorchEngine, step: int) -> float:
    loss_sum = engine.train_step(batch_of(step), step).loss_sum
    dist.all_reduce(loss_sum)
    return loss_sum.item() / (ROWS * TOKENS)


def load(engine: TorchEngine, folder: Path) -> None:
    state = engine.state_dict()
    read_tensors(state, folder, dist.group.WORLD)
    engine.load_state_dict(state)


def save(engine: TorchEngine, folder: Path) -> None:
    write_tensors(engine.state_dict(), folder, dist.group.WORLD)


@contextmanager
def group(rank: int, world_size: int, port: int) -> Iterator[None]:
    limit, address = timedelta(seconds=60), f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size, timeout=limit)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> list[dict[str, Any]]:
    """What each rank found; all in one start of the ranks, which costs seconds."""
    folder, base = tmp_path_factory.mktemp("pp"), a_plan()
    with group(0, 1, free_port()):
        engine = built(tied_plan(base, 1))
        for step in (1, 2):
            engine.train_step(batch_of(step), step)
        save(engine, folder / "one")
        after = {"from one": loss_of(engine, 3)}
    mp.spawn(run_rank, (free_port(), folder, base.to_json()), WORLD)
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]
    with group(0, 1, free_port()):
        engine = built(tied_plan(base, 1), fresh=False)
        for schedule in ("1f1b", "zbv"):
            load(engine, folder / schedule)
            after[f"from {schedule}"] = loss_of(engine, 4)
    return [{**one, "one process": after} for one in found]


def run_rank(rank: int, port: int, folder: Path, base: str) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {"error": ""}
    try:
        with group(rank, WORLD, port):
            for schedule, stages_per_rank in SENDS:
                plan = tied_plan(Plan.model_validate_json(base), WORLD, schedule, stages_per_rank)
                found[schedule] = look_at(built(plan, fresh=False), folder)
    except Exception:
        found["error"] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(found))


def look_at(engine: TorchEngine, folder: Path) -> dict[str, Any]:
    """Two steps behind what one process saved."""
    load(engine, folder / "one")
    losses = [loss_of(engine, 3)]
    schedule = engine.plan.layout.pipeline_schedule
    save(engine, folder / schedule)
    tensors, scale = engine._tensors(batch_of(4), slice(None)), torch.ones(())
    with Seen() as seen:
        engine.pipeline.forward_backward(tensors, scale)
    engine._zero_grad()
    load(engine, folder / schedule)
    losses.append(loss_of(engine, 4))
    stages = getattr(engine.pipeline.schedule, "_stages", None) or [engine.pipeline.schedule._stage]
    return {
        "losses": losses,
        "sends": {str(size): n for size, n in seen.sends.items()},
        "n_syncs": seen.n_syncs,
        "static": all(stage._inference_mode is InferenceMode.STATIC for stage in stages),
        "tables": [table.to_local().double().sum().item() for table in engine.pipeline.tables],
    }


@pytest.mark.parametrize("schedule, stages_per_rank", SENDS)
def test_each_micro_batch_sends_its_hidden_states_on_and_their_gradients_back(checked, schedule, stages_per_rank):
    for one in checked:
        assert not one["error"], one["error"]
        sends = Counter({int(size): n for size, n in one[schedule]["sends"].items()})
        assert sends == SENDS[schedule, stages_per_rank]


@pytest.mark.parametrize("schedule", [schedule for schedule, _ in SENDS])
def test_a_step_brings_nothing_to_the_host_and_no_shapes_are_asked_for(checked, schedule):
    for one in checked:
        assert one[schedule]["n_syncs"] == 0
        assert one[schedule]["static"]


@pytest.mark.parametrize("schedule", [schedule for schedule, _ in SENDS])
def test_a_checkpoint_of_one_process_goes_on_in_a_pipeline(checked, schedule):
    for one in checked:
        assert one[schedule]["losses"][0] == pytest.approx(one["one process"]["from one"], rel=RTOL)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_a_checkpoint_of_a_pipeline_goes_on_in_one_process(checked, schedule):
    for one in checked:
        assert one[schedule]["losses"][1] == pytest.approx(one["one process"][f"from {schedule}"], rel=RTOL)


@pytest.mark.parametrize("schedule, stages_per_rank", SENDS)
def test_both_copies_of_a_tied_table_are_loaded_and_stay_equal(checked, schedule, stages_per_rank):
    tables = [one[schedule]["tables"] for one in checked]
    assert [len(held) for held in tables] == ([2, 0] if schedule in ("zbv", "dualpipev") else [1, 1])
    first, last = (table for held in tables for table in held)
    assert first == last


@pytest.fixture
def weights(tmp_path) -> tuple[Decoder, Path]:
    """A whole model, and the same as a Hugging Face folder."""
    whole = Decoder(TIED)
    init_weights(dict(whole.named_parameters()), whole.shape, 0)
    save_file(dict(whole.named_parameters()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(own_config(TIED)))
    return whole, tmp_path


def test_a_stage_takes_its_own_weights_from_a_whole_model(weights):
    whole, folder = weights
    everything = dict(whole.named_parameters())
    seen = set()
    for layers in layers_by_stage(TIED, 3):
        stage = Decoder(TIED, layers)
        load_weights(dict(stage.named_parameters()), TIED, folder)
        for name, parameter in stage.named_parameters():
            assert torch.equal(parameter, everything[name])
            seen.add(name)
    assert seen == set(everything)


def test_a_stage_refuses_weights_that_no_stage_has(weights):
    whole, folder = weights
    foreign = {"model.layers.3.self_attn.q_proj.bias": torch.zeros(4)}
    save_file({**dict(whole.named_parameters()), **foreign}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors that the recipe's model has not, such as .*q_proj.bias"):
        load_weights(dict(Decoder(TIED, layers_by_stage(TIED, 2)[0]).named_parameters()), TIED, folder)
