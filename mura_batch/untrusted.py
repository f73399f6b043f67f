"""Limits and habits for reading files that nobody vouches for.

Whatever a decoder raises on hostile bytes becomes :class:`UnreadableImage` with a code; what the
file system raises is kept apart from it; claimed sizes are judged before memory is taken.
"""

from __future__ import annotations

import logging
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

from mura_batch.errors import Transient, UnreadableImage

MAX_PIXELS = 200_000_000
"""One image of more is refused; the largest films (long legs, 50 µm scans) have a third of it.
Pillow's own limit for PNG and JPEG, 178,956,970, is a little lower: the same code."""

MAX_BYTES = 2 * MAX_PIXELS
"""One image whose samples take more is refused: 16-bit grey may be as large as any film, 16-bit
colour has 66 megapixels. Reading an image takes a few times its samples."""

_USUAL_PIXELS = 50_000_000
_PIXELS_A_BYTE = 500  # no film larger than that compresses further: such a file is a bomb
_LONGEST = 20  # times as long as wide: stitched spines and legs have a fifth of it
_MOST_UNPACKED = 1 << 34  # bytes: some twenty seconds for the frames of one deflated file

DECODER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,  # RecursionError and NotImplementedError with it
    SyntaxError,  # Pillow's word for a broken PNG
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""What Pillow, pydicom and their codecs were seen to raise on broken files."""

LATER = "the file could not be read just now: check the disk or share"
"""What :class:`Transient` says where the file system failed, not the file."""

Format = Literal["png", "jpeg", "dicom", "other"]


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading; the body turns its own decoding errors into refusals.

    Raises:
        UnreadableImage: ``unreadable`` (missing, not permitted) or ``not_a_file``.
        Transient: any other trouble of the file system or too little memory.
    """
    try:
        with open(path, "rb", opener=_without_waiting) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise UnreadableImage("not_a_file", "this is no regular file: drop the image")
            yield stream
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as exc:
        raise UnreadableImage(
            "unreadable", "the file is gone or may not be read: check its permissions"
        ) from exc
    except OSError as exc:
        raise Transient(LATER) from exc
    except MemoryError as exc:
        raise Transient("too little memory to read an image: close other programs") from exc


def _without_waiting(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NONBLOCK)  # a pipe called hand.png must not stop us


def size_of(stream: BinaryIO) -> int:
    """Return the bytes of an opened file."""
    return os.fstat(stream.fileno()).st_size


def sniff(head: bytes) -> Format:
    """Tell the format from the first 132 bytes; a file's name counts for nothing.

    DICOM without its preamble is known by a plausible first element of group 0002 or 0008.
    """
    if head[128:132] == b"DICM":
        return "dicom"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    return "dicom" if _starts_like_a_dataset(head) else "other"


_FIRST_ELEMENT_MAX = 1024  # bytes: the first element of a data set is a length, a UID, a charset


def _starts_like_a_dataset(head: bytes) -> bool:
    for order in "<>":
        if len(head) < 8:  # noqa: PLR2004 - the shortest element header
            return False
        group, element, vr, short = struct.unpack(f"{order}HH2sH", head[:8])
        (long,) = struct.unpack(f"{order}I", head[4:8])
        if group in {0x0002, 0x0008} and element <= 0x0100:  # noqa: PLR2004 - up to Code Value
            explicit = vr.isalpha() and vr.isupper() and short <= _FIRST_ELEMENT_MAX
            if explicit or long <= _FIRST_ELEMENT_MAX:
                return True
    return False


def check_size(width: int, height: int, payload: int, *, pixel_bytes: int, frames: int = 1) -> None:
    """Judge the size that a header claims against the ``payload`` bytes that are there.

    ``pixel_bytes`` are those of all samples of a pixel, unpacked. ``frames`` are those of one
    compressed stream, where each is reached by unpacking the ones before it.

    Raises:
        UnreadableImage: ``corrupt`` for no pixels at all; ``too_large`` above
            :data:`MAX_PIXELS` or :data:`MAX_BYTES`, when more than 50 megapixels would have to
            come out of fewer than one byte for 500 pixels, or when all frames, each unpacked
            with as many as there are, take more than 16 GiB; ``shape`` for an image more than
            20 times as long as wide.
    """
    if width < 1 or height < 1:
        raise UnreadableImage("corrupt", "the header claims an image without pixels: export again")
    film = width * height
    pixels = film * frames
    if (
        film > MAX_PIXELS
        or film * pixel_bytes > MAX_BYTES
        or (pixels > _USUAL_PIXELS and pixels > payload * _PIXELS_A_BYTE)
        or pixels * pixel_bytes * frames > _MOST_UNPACKED
    ):
        times = f"{frames} x " if frames > 1 else ""
        raise UnreadableImage(
            "too_large",
            f"the header claims {times}{width} x {height} pixels, more than any radiograph of this"
            " file's size has: export the image again",
        )
    if max(width, height) > _LONGEST * min(width, height):
        raise UnreadableImage(
            "shape",
            f"the header claims {width} x {height} pixels, and no radiograph is that narrow:"
            " export the image again",
        )


_TALKATIVE = (
    r"(PIL|pydicom|pylibjpeg|libjpeg|openjpeg|rle|jpeg_ls"
    r"|mura_batch\.(dicom_file|dicom_pixels|radiograph|study))(\.|$)"
)


_SILENT = logging.CRITICAL + 1


def hush() -> None:
    """Keep the codecs' warnings out of standard error and logs: they quote header values.

    Called before each read instead of a ``catch_warnings`` block, which is not safe in threads:
    it sets one process-wide filter for those modules, ahead of any set since.
    """
    if getattr(next(iter(warnings.filters), (None,) * 4)[3], "pattern", "") != _TALKATIVE:
        warnings.filterwarnings("ignore", module=_TALKATIVE)
    pydicom = logging.getLogger("pydicom")
    if pydicom.level != _SILENT:  # setting it makes every logger of the process ask anew
        pydicom.setLevel(_SILENT)
