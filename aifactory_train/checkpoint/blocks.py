"""Files as blocks of 16 MiB with a sha256 each, written and read by a few threads.

Sums of blocks, unlike one of a whole file, can be made side by side, and a part of a file can be verified by itself.
Waiting for the disk, hashing and copying all leave the interpreter to others.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

# Part of the format: a COMMIT has one sum for each so many bytes.
BLOCK_BYTES = 1 << 24
# Where tensors begin in a file. It divides a block, so that no element lies in two.
ALIGN_BYTES = 64
_THREADS = 4
# O_DIRECT takes whole sectors of the disk only; 4 KiB is the largest in use.
_DISK_BYTES = 4096

T = TypeVar("T")


class OtherBytes(Exception):
    """A block of a file has another sha256 than it had when it was written."""


def n_blocks(n_bytes: int) -> int:
    return -(-n_bytes // BLOCK_BYTES)


def blocks_of(start: int, stop: int) -> range:
    """The blocks that hold bytes start..stop of a file."""
    return range(start // BLOCK_BYTES, n_blocks(stop)) if start < stop else range(0)


def write_blocks(path: Path, tensors: Sequence[tuple[int, Tensor]]) -> list[str]:
    """Write tensors, fsynced. Returns the sha256 of each block.

    Args:
        tensors: (first byte in the file, tensor of bytes of one dim), one behind the other, on any device; zeros lie
            between them.
    Raises:
        OSError
    """
    n_bytes = max((start + t.numel() for start, t in tensors), default=0)
    inside: list[list[tuple[int, Tensor]]] = [[] for _ in range(n_blocks(n_bytes))]
    for start, tensor in tensors:
        for block in blocks_of(start, start + tensor.numel()):
            inside[block].append((start, tensor))
    fd = _open_direct(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        # Some file systems let only one thread at a time make a file longer.
        os.ftruncate(fd, n_bytes)

        def write(block: int, buffer: Tensor) -> str:
            first = block * BLOCK_BYTES
            n = min(BLOCK_BYTES, n_bytes - first)
            _gather(first, buffer[:n].zero_(), inside[block])
            data = memoryview(buffer.numpy())
            digest = hashlib.sha256(data[:n])
            left, at = data[: -(-n // _DISK_BYTES) * _DISK_BYTES], first
            while left:
                done = os.pwrite(fd, left, at)
                left, at = left[done:], at + done
            return digest.hexdigest()

        sums = _each_block(range(len(inside)), write)
        os.ftruncate(fd, n_bytes)
        os.fsync(fd)
    finally:
        os.close(fd)
    return sums


def _gather(first: int, data: Tensor, tensors: Sequence[tuple[int, Tensor]]) -> None:
    """Fill the bytes of a file from `first` on."""
    for start, tensor in tensors:
        a, b = max(start, first), min(start + tensor.numel(), first + data.numel())
        data[a - first : b - first].copy_(tensor[a - start : b - start])


def read_blocks(
    path: Path,
    blocks: Sequence[int],
    sums: Sequence[str] | None,
    use: Callable[[int, Tensor], None],
    alone: bool = False,
) -> None:
    """Read some blocks of a file and verify them.

    Args:
        sums: sha256 of all its blocks; None: it has been verified.
        use: called by several threads, with the first byte of a block and its bytes, which are valid until it returns.
        alone: no other process needs them, so the page cache, which costs a copy, is left out.
    Raises:
        OtherBytes, OSError
    """
    fd = _open_direct(path, os.O_RDONLY) if alone else os.open(path, os.O_RDONLY)
    try:
        n_bytes = os.fstat(fd).st_size

        def read(block: int, buffer: Tensor) -> None:
            first, n = block * BLOCK_BYTES, 0
            # Whole, also at the end of the file: O_DIRECT takes no other lengths.
            view = memoryview(buffer.numpy())
            while n < min(BLOCK_BYTES, n_bytes - first) and (got := os.preadv(fd, [view[n:]], first + n)):
                n += got
            if sums is not None and hashlib.sha256(view[:n]).hexdigest() != sums[block]:
                raise OtherBytes(str(path))
            use(first, buffer[:n])

        _each_block(blocks, read)
    finally:
        os.close(fd)


def _open_direct(path: Path, flags: int) -> int:
    """Past the page cache: no copy into it, and none of its pages to be found while the job needs its memory."""
    try:
        return os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o644)  # a file system, such as an older tmpfs, that has no other way


def sums_of(path: Path) -> list[str]:
    """The sha256 of each block of a file."""
    with open(path, "rb") as f:
        return [hashlib.sha256(block).hexdigest() for block in iter(lambda: f.read(BLOCK_BYTES), b"")]


def verify_blocks(path: Path, blocks: Sequence[int], sums: Sequence[str]) -> None:
    """Raises OtherBytes where one of these blocks is not what was written."""
    read_blocks(path, blocks, sums, lambda first, data: None)


def _each_block(blocks: Sequence[int], work: Callable[[int, Tensor], T]) -> list[T]:
    """`work(block, buffer)` of each in turn, by threads that have a buffer of their own. Results in order."""

    def some(thread: int) -> list[T]:
        # Of pages of its own, as O_DIRECT wants. They go back to the system: glibc would keep what torch.empty takes,
        # once for each thread.
        buffer = torch.frombuffer(mmap.mmap(-1, BLOCK_BYTES), dtype=torch.uint8)
        return [work(block, buffer) for block in blocks[thread::n_threads]]

    n_threads = min(_THREADS, len(blocks))
    if n_threads <= 1:
        return some(0) if blocks else []
    with ThreadPoolExecutor(n_threads) as pool:
        by_thread = list(pool.map(some, range(n_threads)))
    return [by_thread[i % n_threads][i // n_threads] for i in range(len(blocks))]
