"""Files in blocks: what is written is read, and every other byte is found."""

import errno
import os

import pytest
import torch

from aifactory_train.checkpoint import blocks
from aifactory_train.checkpoint.blocks import OtherBytes, read_blocks, sums_of, verify_blocks, write_blocks
from aifactory_train.checkpoint.dcp import read_tensors, write_tensors


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """A page, so that small tensors have many."""
    for module in ("blocks", "dcp"):
        monkeypatch.setattr(f"aifactory_train.checkpoint.{module}.BLOCK_BYTES", 4096)


@pytest.mark.parametrize("n_bytes", [1, 4095, 4096, 4097, 50000])
def test_a_file_has_the_sums_that_its_writing_gave(tmp_path, n_bytes):
    data = torch.randint(0, 256, (n_bytes,), dtype=torch.uint8)
    sums = write_blocks(tmp_path / "f", [(0, data)])
    assert (tmp_path / "f").read_bytes() == data.numpy().tobytes()
    assert sums == sums_of(tmp_path / "f") and len(sums) == blocks.n_blocks(n_bytes)


def test_tensors_lie_where_they_should_with_zeros_between_them(tmp_path):
    a, b, c = (torch.randint(1, 256, (n,), dtype=torch.uint8) for n in (3, 9600, 1100))
    write_blocks(tmp_path / "f", [(0, a), (64, b), (9664, c)])
    expected = torch.zeros(10764, dtype=torch.uint8)
    expected[:3], expected[64:9664], expected[9664:] = a, b, c
    assert (tmp_path / "f").read_bytes() == expected.numpy().tobytes()


def test_one_changed_byte_is_found_in_its_block_alone(tmp_path):
    path = tmp_path / "f"
    sums = write_blocks(path, [(0, torch.zeros(16000, dtype=torch.uint8))])
    path.write_bytes(bytes(9600) + b"\x01" + bytes(6399))
    verify_blocks(path, [0, 1, 3], sums)
    with pytest.raises(OtherBytes, match=str(path)):
        verify_blocks(path, [0, 1, 2, 3], sums)


def test_a_file_that_ends_early_is_found(tmp_path):
    path = tmp_path / "f"
    sums = write_blocks(path, [(0, torch.zeros(16000, dtype=torch.uint8))])
    path.write_bytes(bytes(15000))
    with pytest.raises(OtherBytes):
        read_blocks(path, range(4), sums, lambda first, data: None)


def test_a_file_system_without_direct_reads_is_read_all_the_same(tmp_path, monkeypatch):
    path, data = tmp_path / "f", torch.randint(0, 256, (10000,), dtype=torch.uint8)
    sums, found, plain = write_blocks(path, [(0, data)]), torch.zeros(10000, dtype=torch.uint8), os.open

    def refusing(path, flags, *mode):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return plain(path, flags, *mode)

    monkeypatch.setattr(os, "open", refusing)
    read_blocks(path, range(3), sums, lambda first, part: found[first : first + len(part)].copy_(part), alone=True)
    assert torch.equal(found, data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_tensors_of_any_shape_and_strides_come_back(tmp_path, dtype):
    shapes = [(), (1,), (7,), (50, 129), (3, 500, 7), (0, 4)]
    state = {f"w{i}": torch.randint(0, 100, shape).to(dtype) for i, shape in enumerate(shapes)}
    state["turned"] = torch.randint(0, 100, (300, 40)).to(dtype).T
    files = write_tensors(state, tmp_path)
    back = {name: torch.empty(t.shape, dtype=dtype) for name, t in state.items()}
    seen = read_tensors(back, tmp_path, files=files)
    assert all(torch.equal(back[name], t) for name, t in state.items())
    assert seen == {name: set(range(len(sums))) for name, (_, sums) in files.items()}
