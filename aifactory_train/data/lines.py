"""Lines of plain and compressed files."""

from __future__ import annotations

import gzip
from collections.abc import Iterator

ZST_READ_BYTES = 1 << 17  # compressed; repetitive text may unpack to thousands of times as much


def read_lines(path: str) -> Iterator[bytes]:
    """Lines of a plain, .gz or .zst file. Raises OSError or EOFError where it is damaged or cut off."""
    if path.endswith(".zst"):
        yield from _zst_lines(path)
    else:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            yield from file


def _zst_lines(path: str) -> Iterator[bytes]:
    """Not through `zstandard`'s own reader: that takes a file cut off in the middle for a whole one (0.25)."""
    import zstandard

    frame, rest = None, b""
    with open(path, "rb") as file:
        while piece := file.read(ZST_READ_BYTES):
            while piece:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    *lines, rest = (rest + frame.decompress(piece)).split(b"\n")
                except zstandard.ZstdError as error:
                    raise OSError(f"damaged zstd file: {error}") from None
                yield from lines
                piece = frame.unused_data
                frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("damaged zstd file: cut off in the middle of a frame")
    yield rest
