"""A stretch of a flattened tensor as boxes, and through a checkpoint."""

import itertools

import pytest
import torch

from aifactory_train.checkpoint.dcp import read_tensors, write_tensors
from aifactory_train.models.flat import FlatSlice
from aifactory_train.models.parts import copy_into


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
