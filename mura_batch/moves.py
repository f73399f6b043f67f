"""Content hashes of files, and moves of files that a crash leaves repeatable.

Nothing here replaces a file: a move onto one of other content is refused.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BufferedReader
from pathlib import Path

from mura_batch.atomic import sync_folder

_PLAINLY = os.O_NOFOLLOW | os.O_NONBLOCK
CARRIED = ".carried.tmp"
"""The name of a file that is copied from another file system, until it is whole."""
MAX_BYTES = 8 << 30
"""No film has more; reading a larger file only for its hash would stop everything else."""

_CHUNK = 1 << 16  # bytes; file_digest's larger buffer costs more than hashing most films
_REFUSALS = {errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENXIO}  # of this file, and to stay


def digest(
    path: str | Path, name: str, status: os.stat_result, *, most: float = MAX_BYTES
) -> tuple[str, str]:
    """Return a file's SHA-256 and its problem.

    What has no readable content, or more than ``most`` bytes, gets a digest of what is known of
    it instead, so that two such files are not taken for one.

    Raises:
        OSError: it vanished, or the file system failed; reading it again may succeed.
    """
    if stat.S_ISLNK(status.st_mode):
        return _stand_in("symbolic_link", os.fsencode(os.readlink(path))), "symbolic_link"
    if not stat.S_ISREG(status.st_mode):
        return _stand_in("not_a_file", os.fsencode(name)), "not_a_file"
    known = os.fsencode(name) + b"\0%d\0%d" % (status.st_size, status.st_mtime_ns)
    if status.st_size > most:
        return _stand_in("too_large", known), "too_large"
    try:
        with open_regular(path) as stream:
            content = hashlib.sha256()
            while chunk := stream.read(_CHUNK):
                content.update(chunk)
            return content.hexdigest(), ""
    except OSError as exc:
        if exc.errno not in _REFUSALS:
            raise
        return _stand_in("unreadable", known), "unreadable"


def _stand_in(problem: str, known: bytes) -> str:
    return hashlib.sha256(problem.encode() + b"\0" + known).hexdigest()


def open_regular(path: str | Path) -> BufferedReader:
    """Open a file to read without following a link or waiting for a FIFO's writer.

    Raises:
        OSError: it is not there, or may not be read.
    """
    return open(path, "rb", opener=lambda at, flags: os.open(at, flags | _PLAINLY))


def same_content(one: str, other: str) -> bool:
    """Whether two files hold the same bytes, or two links the same target."""
    first, second = (digest(p, "", os.lstat(p), most=math.inf) for p in (one, other))
    return first == second


def move(source: str, target: str, carried: str, unchanged: Callable[[], bool]) -> None:
    """Rename; across file systems copy, fsync, rename, unlink, with ``carried`` in between.

    A source that changed while it was copied stays where it is.
    """
    try:
        os.rename(source, target)
    except OSError as exc:
        if exc.errno != errno.EXDEV:
            raise
        remove_if_there(carried)
        try:
            _copy(source, carried)
        except OSError:
            remove_if_there(carried)
            raise
        if not unchanged():
            os.unlink(carried)
            return
        os.rename(carried, target)
        try:
            sync_folder(os.path.dirname(target))
            os.unlink(source)
        except OSError:
            os.unlink(target)  # it cannot be taken away from there: it must not be in two places
            raise


def _copy(source: str, target: str) -> None:
    """Copy one file with its times, durably; a link or a special file is made anew."""
    status = os.lstat(source)
    if stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(source), target)
    elif stat.S_ISREG(status.st_mode):
        with open_regular(source) as stream, open(target, "xb") as copy:
            shutil.copyfileobj(stream, copy, 1 << 20)
            copy.flush()
            os.fsync(copy.fileno())
    else:
        os.mknod(target, status.st_mode, status.st_rdev)
    times = (status.st_atime_ns, status.st_mtime_ns)
    os.utime(target, ns=times, follow_symlinks=False)


def settle_into(source: str, target: str, carried: str) -> None:
    """Move one file, making the folders it needs; ``carried`` as for :func:`move`.

    Raises:
        FileExistsError: another content lies at ``target`` already.
    """
    folder = os.path.dirname(target)
    os.makedirs(folder, exist_ok=True)
    if not os.path.lexists(target):
        move(source, target, carried, lambda: True)
        sync_folder(folder)
    elif same_content(source, target):
        os.unlink(source)
    else:
        raise FileExistsError(errno.EEXIST, "another file lies there already", target)


def relocate(source: str, target: str, *, last: str) -> None:
    """Move a folder: one rename, or file by file where ``target`` exists already or is on another
    file system. The file ``last`` then goes last: where it lies, the folder is whole.

    Raises:
        OSError: the move stopped half-way and can be repeated.
    """
    folder = os.path.dirname(target)
    os.makedirs(folder, exist_ok=True)
    try:
        os.rename(source, target)
    except OSError as exc:
        if exc.errno not in (errno.EXDEV, errno.ENOTEMPTY, errno.EEXIST):
            raise
        files = [path for path in files_below(source) if os.path.basename(path) != CARRIED]
        files.sort(key=lambda path: path == f"{source}/{last}")
        for path in files:
            settle_into(path, target + path.removeprefix(source), f"{target}/{CARRIED}")
        shutil.rmtree(source)
    sync_folder(folder)
    sync_folder(os.path.dirname(source))


def remove_if_there(path: str) -> None:
    """Delete a file that may be gone already."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def files_below(folder: str) -> Iterator[str]:
    """Yield everything below ``folder`` that is not a folder; links are not followed."""
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from files_below(entry.path)
            else:
                yield entry.path
