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
_CARRIED = ".carried.tmp"
MAX_BYTES = 8 << 30
"""No film has more; reading a larger file only for its hash would stop everything else."""

_REFUSALS = {errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENXIO}  # of this file, and to stay


def digest(
    path: Path, name: str, status: os.stat_result, *, most: float = MAX_BYTES
) -> tuple[str, str]:
    """Return a file's SHA-256 and its problem.

    What has no readable content, or more than ``most`` bytes, gets a digest of what is known of
    it instead, so that two such files are not taken for one.

    Raises:
        OSError: it vanished, or the file system failed; reading it again may succeed.
    """
    if stat.S_ISLNK(status.st_mode):
        return _stand_in("symbolic_link", os.fsencode(path.readlink())), "symbolic_link"
    if not stat.S_ISREG(status.st_mode):
        return _stand_in("not_a_file", os.fsencode(name)), "not_a_file"
    known = os.fsencode(name) + b"\0%d\0%d" % (status.st_size, status.st_mtime_ns)
    if status.st_size > most:
        return _stand_in("too_large", known), "too_large"
    try:
        with open_regular(path) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest(), ""
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


def same_content(one: Path, other: Path) -> bool:
    """Whether two files hold the same bytes, or two links the same target."""
    first, second = (digest(p, "", os.lstat(p), most=math.inf) for p in (one, other))
    return first == second


def move(source: Path, target: Path, carried: Path, unchanged: Callable[[], bool]) -> None:
    """Rename; across file systems copy, fsync, rename, unlink, with ``carried`` in between.

    A source that changed while it was copied stays where it is.
    """
    try:
        source.rename(target)
    except OSError as exc:
        if exc.errno != errno.EXDEV:
            raise
        carried.unlink(missing_ok=True)
        try:
            _copy(source, carried)
        except OSError:
            carried.unlink(missing_ok=True)
            raise
        if not unchanged():
            carried.unlink()
            return
        carried.rename(target)
        try:
            sync_folder(target.parent)
            source.unlink()
        except OSError:
            target.unlink()  # it cannot be taken away from there: it must not be in two places
            raise


def _copy(source: Path, target: Path) -> None:
    """Copy one file with its times, durably; a link or a special file is made anew."""
    status = os.lstat(source)
    if stat.S_ISLNK(status.st_mode):
        target.symlink_to(source.readlink())
    elif stat.S_ISREG(status.st_mode):
        with open_regular(source) as stream, target.open("xb") as copy:
            shutil.copyfileobj(stream, copy, 1 << 20)
            copy.flush()
            os.fsync(copy.fileno())
    else:
        os.mknod(target, status.st_mode, status.st_rdev)
    times = (status.st_atime_ns, status.st_mtime_ns)
    os.utime(target, ns=times, follow_symlinks=False)


def settle_into(source: Path, target: Path, carried: Path) -> None:
    """Move one file, making the folders it needs; ``carried`` as for :func:`move`.

    Raises:
        FileExistsError: another content lies at ``target`` already.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(target):
        move(source, target, carried, lambda: True)
        sync_folder(target.parent)
    elif same_content(source, target):
        source.unlink()
    else:
        raise FileExistsError(errno.EEXIST, "another file lies there already", str(target))


def relocate(source: Path, target: Path, *, last: str) -> None:
    """Move a folder: one rename, or file by file where ``target`` exists already or is on another
    file system. The file ``last`` then goes last: where it lies, the folder is whole.

    Raises:
        OSError: the move stopped half-way and can be repeated.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.rename(target)
    except OSError as exc:
        if exc.errno not in (errno.EXDEV, errno.ENOTEMPTY, errno.EEXIST):
            raise
        files = [path for path in files_below(source) if path.name != _CARRIED]
        files.sort(key=lambda path: path == source / last)
        for path in files:
            settle_into(path, target / path.relative_to(source), target / _CARRIED)
        shutil.rmtree(source)
    sync_folder(target.parent)
    sync_folder(source.parent)


def files_below(folder: Path) -> Iterator[Path]:
    """Yield everything below ``folder`` that is not a folder; links are not followed."""
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from files_below(Path(entry.path))
            else:
                yield Path(entry.path)
