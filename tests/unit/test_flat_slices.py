"""A stretch of a flattened tensor as boxes, and through a checkpoint."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from aifactory_train.checkpoint.dcp import Stager, read_tensors, write_tensors
from aifactory_train.models.flat import FlatSlice
from aifactory_train.models.parts import copy_into
from gloo_forks import on_forks


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 4), (1, 1, 5), (4, 1, 2)])
def test_the_boxes_of_every_stretch_hold_its_elements_in_order(shape):
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for start, stop in itertools.combinations(range(whole.numel() + 1), 2):
        stretch = whole.flatten()[start:stop]
        piece = FlatSlice(stretch.clone(), start, shape)
        boxes = piece.boxes()
        assert torch.equal(torch.cat([whole[box].flatten() for box, _ in boxes]), stretch)
        assert all(torch.equal(whole[box], view) for box, view in boxes)
        assert len(boxes) <= max(1, 2 * len(shape) - 1)
        assert all(view.untyped_storage().data_ptr() == piece.local_X.untyped_storage().data_ptr() for _, view in boxes)


def test_an_empty_stretch_has_no_boxes():
    assert FlatSlice(torch.empty(0), 5, (3, 4)).boxes() == []


def test_a_whole_tensor_is_copied_into_a_stretch():
    whole, piece = torch.randn(3, 5), FlatSlice(torch.empty(8), 4, (3, 5))
    copy_into(piece, whole)
    assert torch.equal(piece.local_X, whole.flatten()[4:12])


def test_stretches_are_read_from_a_checkpoint_and_written_to_one(tmp_path):
    whole = torch.randn(5, 7)
    pieces = {"w": FlatSlice(whole.flatten().clone(), 0, whole.shape)}
    write_tensors(pieces, tmp_path)
    back = {"w": torch.empty(5, 7)}
    read_tensors(back, tmp_path)
    assert torch.equal(back["w"], whole)
    for start, stop in [(0, 35), (3, 4), (3, 11), (7, 14), (6, 29)]:
        part = {"w": FlatSlice(torch.empty(stop - start), start, whole.shape)}
        read_tensors(part, tmp_path)
        assert torch.equal(part["w"].local_X, whole.flatten()[start:stop])


def test_a_staged_stretch_does_not_follow_the_original():
    whole = torch.arange(12.0)
    state = {"optim": {"w": {"exp_avg": FlatSlice(whole[2:9], 2, (3, 4)), "step": torch.ones(())}}}
    staged = Stager().stage(state)["optim"]["w"]
    whole.zero_()
    state["optim"]["w"]["step"].zero_()
    assert (staged["exp_avg"].start, staged["exp_avg"].shape) == (2, (3, 4))
    assert torch.equal(staged["exp_avg"].local_X, torch.arange(2.0, 9.0)) and staged["step"] == 1


def test_what_two_ranks_save_as_stretches_is_read_as_shards_whole_or_as_other_stretches(tmp_path):
    shape, n_elements = (6, 5), 30
    whole = torch.arange(float(n_elements)).view(shape)

    def stretch(rank, cut):
        start, stop = (0, cut) if rank == 0 else (cut, n_elements)
        return FlatSlice(whole.flatten()[start:stop].clone(), start, shape)

    def work(rank):
        mesh, group = init_device_mesh("cpu", (2,)), dist.group.WORLD
        staged = Stager().stage({"w": stretch(rank, 13), "step": torch.tensor(7.0)})
        write_tensors(staged, tmp_path / "saved", group)
        for dim in (0, 1):
            local = whole.chunk(2, dim)[rank] if dim == 0 else whole.tensor_split([3], dim)[rank]
            split = DTensor.from_local(torch.empty_like(local), mesh, [Shard(dim)], shape=shape, stride=(5, 1))
            read_tensors({"w": split}, tmp_path / "saved", group)
            assert torch.equal(split.to_local(), local), dim
        state = {"w": torch.empty(shape), "step": torch.zeros(())}
        read_tensors(state, tmp_path / "saved", group)
        assert torch.equal(state["w"], whole) and state["step"] == 7
        for cut in (0, 1, 17, 30):
            other = stretch(rank, cut)
            expected = other.local_X.clone()
            other.local_X.zero_()
            read_tensors({"w": other}, tmp_path / "saved", group)
            assert torch.equal(other.local_X, expected), cut

    on_forks(tmp_path, 2, work)
