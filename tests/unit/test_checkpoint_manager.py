"""What a manager refuses before anything goes on from it."""

import json

import pytest
import torch
import torch.distributed as dist

from aifactory_train.checkpoint.manager import CheckpointManager
from aifactory_train.errors import CheckpointError


@pytest.fixture
def manager(tmp_path):
    """With one commit, of step 1."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    manager = CheckpointManager(tmp_path, 2, False, torch.device("cpu"))
    manager.save(1, 100, {"w": torch.arange(9_000_000.0), "rng": torch.arange(3, dtype=torch.uint8)}, {})
    yield manager
    dist.destroy_process_group()


def load(manager, **state):
    commit = manager.latest()
    manager.check(commit, {})
    manager.load(commit, state)


def flip_byte(path, at):
    with open(path, "r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("at", [0, 20_000_000, 36_000_002], ids=["first block", "second block", "rng"])
def test_a_changed_byte_is_refused_also_where_no_rank_needs_it(manager, tmp_path, at):
    load(manager, rng=torch.empty(3, dtype=torch.uint8))
    flip_byte(tmp_path / "step-00000001" / "__0_0.distcp", at)
    with pytest.raises(CheckpointError, match="__0_0.distcp has other bytes than when it was committed") as refused:
        load(manager, rng=torch.empty(3, dtype=torch.uint8))
    assert refused.value.on_every_rank and "starts from step 0" in refused.value.render()


def test_changed_metadata_are_refused_before_they_are_unpickled(manager, tmp_path):
    flip_byte(tmp_path / "step-00000001" / ".metadata", 100)
    with pytest.raises(CheckpointError, match="metadata has other bytes"):
        manager.check(manager.latest(), {})


@pytest.mark.parametrize("change, said", [({"format": None}, "an older"), ({"format": 3, "shards": []}, "a newer")])
def test_a_checkpoint_of_another_format_is_refused_by_its_number_and_not_called_damaged(
    manager, tmp_path, change, said
):
    path = tmp_path / "step-00000001" / "COMMIT"
    commit = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in commit.items() if value is not None}))
    with pytest.raises(CheckpointError, match=f"COMMIT of step 1 was written by {said} version") as refused:
        manager.latest()
    assert "go on with the version of aifactory-train that wrote it" in refused.value.do
    assert "mv " not in refused.value.do, "nothing is damaged"
