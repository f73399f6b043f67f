"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


def write_atomic(target: str | Path, writer: Callable[[BinaryIO], object]) -> None:
    """Write ``target`` through a temporary name in its folder: fsync, then ``os.replace``.

    A reader sees the old file or the new one; a crash leaves at most a dotfile ending in
    ``.tmp``, which nothing reads. The folder is made where it is missing.
    """
    folder = os.path.dirname(target) or "."
    partial = f"{folder}/.{secrets.token_hex(8)}.tmp"
    if not os.path.isdir(folder):
        os.makedirs(folder, exist_ok=True)
    try:
        with open(partial, "xb") as stream:
            writer(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, target)
    except BaseException as exc:
        with suppress(FileNotFoundError):
            os.unlink(partial)
        if isinstance(exc, OSError) and exc.errno and exc.filename is None:
            exc.filename = str(target)  # a full disk does not say where it is
        raise
    sync_folder(folder)


def sync_folder(folder: str | Path) -> None:
    """Make renames in ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
