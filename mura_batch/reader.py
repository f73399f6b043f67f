"""Reading the database in SQL text; SQLite by Python's own driver.

A ``query`` is a process that has to answer at once, and to import SQLAlchemy takes longer than all
else that it does. What is open for writing, and PostgreSQL, are read in the same text through
``engine.EngineReader``.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, unquote

from mura_batch.errors import Misconfigured, Transient

REVISION = "0003"  # newest in migrations/versions; a test holds that they agree
BUSY_SECONDS = 30.0
_CACHE_KIB = 64 * 1024  # holds what finds a million studies by their ids, which come in no order

Values = Mapping[str, object]
Ask = Callable[[str, Values], Iterable[Any]]
"""Run a statement with what its ``:names`` stand for; rows are tuples, in the columns' order."""


class Reader(Protocol):
    """A database open for reading. Thread-safe."""

    def reading(self, *, stream: bool = False) -> AbstractContextManager[Ask]:
        """Give a way to ask, in a transaction that sees one moment of the database.

        Answers end with it. With ``stream`` memory stays flat however long they are.

        Raises:
            Transient: the database does not answer.
            Misconfigured: the database is damaged.
        """

    def close(self) -> None:
        """Let the database go."""


class SqliteReader:
    """A SQLite file.

    Raises:
        Misconfigured: it is missing, unreadable, or of another revision.
        Transient: another program has locked it.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        refuse_other_revision(sqlite_revision(file), str(file))

    @contextmanager
    def reading(self, *, stream: bool = False) -> Iterator[Ask]:
        """Give a way to ask; see :class:`Reader`."""
        try:
            with closing(sqlite_connection(self._file, read_only=True)) as connection:
                if stream:
                    connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
                connection.execute("BEGIN")
                yield lambda sql, values: connection.execute(sql, for_sqlite(values))
        except sqlite3.OperationalError as exc:
            raise silent(exc) from exc
        except sqlite3.DatabaseError as exc:
            if type(exc) is not sqlite3.DatabaseError:  # a subclass: this program's own making
                raise
            raise damaged(exc) from exc

    def close(self) -> None:
        """Nothing is held between two readings."""


_SQLITE = re.compile(r"sqlite(?:\+pysqlite)?:///([^?]+)")


def sqlite_path(url: str) -> Path | None:
    """Return the file of ``sqlite:///FILE`` (percent-encoded), None for other URLs."""
    found = _SQLITE.fullmatch(url)
    return None if found is None or found[1] == ":memory:" else Path(unquote(found[1]))


def sqlite_url(file: Path) -> str:
    """Return the URL of a SQLite file."""
    return f"sqlite:///{quote(str(file))}"


def sqlite_connection(file: Path, *, read_only: bool) -> sqlite3.Connection:
    """Open a SQLite file; transactions begin where a statement says so."""
    connection = sqlite3.connect(
        f"file://{quote(str(file.absolute()))}?mode={'ro' if read_only else 'rwc'}",
        uri=True,
        timeout=BUSY_SECONDS,
        isolation_level=None,  # DDL included
        check_same_thread=False,
    )
    if not read_only:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
    return connection


def sqlite_revision(file: Path) -> str | None:
    """Return a SQLite file's migration revision, None where there is no database yet.

    Raises:
        Misconfigured: the file is no database, or cannot be opened.
        Transient: another program has locked it.
    """
    if not file.exists():
        return None
    try:
        with closing(sqlite_connection(file, read_only=True)) as connection:
            if connection.execute("PRAGMA table_info(alembic_version)").fetchone() is None:
                return None
            found = connection.execute("SELECT version_num FROM alembic_version").fetchone()
            return str(found[0]) if found else None
    except sqlite3.OperationalError as exc:
        if exc.sqlite_errorcode == sqlite3.SQLITE_BUSY:
            raise silent(exc) from exc
        raise Misconfigured(
            f"The database {file} cannot be opened ({said(exc)}): check `database` in config.toml,"
            " and that this user may write to the file and its folder."
        ) from exc
    except sqlite3.DatabaseError as exc:
        raise Misconfigured(
            f"The database {file} cannot be read ({said(exc)}): check `database` in config.toml,"
            " or restore a backup."
        ) from exc


def refuse_other_revision(found: str | None, name: str) -> None:
    """Refuse a database that is missing or not of this program's revision.

    Raises:
        Misconfigured: with the command that fixes it.
    """
    if found == REVISION:
        return
    if found is None:
        raise Misconfigured(
            f"No results database at {name}: run `mura-batch init`, or for the"
            " database alone `mura-batch db upgrade`."
        )
    if found > REVISION:
        raise Misconfigured(
            f"The database {name} is of revision {found}, newer than this program knows"
            f" ({REVISION}): install the newer mura-batch."
        )
    raise Misconfigured(
        f"The database {name} is of revision {found}, this program needs {REVISION}:"
        " run `mura-batch db upgrade`."
    )


def silent(error: Exception) -> Transient:
    """Return what to raise for a driver's error that may pass."""
    return Transient(f"The results database does not answer ({said(error)}); try again.")


def damaged(error: Exception) -> Misconfigured:
    """Return what to raise for a driver's error that will not."""
    return Misconfigured(f"The results database is damaged ({said(error)}): restore a backup.")


def said(error: object) -> str:
    """Return a driver's words as one line."""
    return " ".join(str(error).split())


# ---- values


def in_utc(values: Values) -> dict[str, object]:
    """Return values with their moments in UTC; ValueError for a naive one."""
    return {name: _utc(v) if isinstance(v, datetime) else v for name, v in values.items()}


def for_sqlite(values: Values) -> dict[str, object]:
    """Return values as SQLite keeps them: moments as naive text in UTC."""
    return {
        name: v.replace(tzinfo=None).isoformat(" ", "microseconds")
        if isinstance(v, datetime)
        else v
        for name, v in in_utc(values).items()
    }


def _naive(utc: datetime) -> str:
    return utc.replace(tzinfo=None).isoformat(" ", "microseconds")


def _utc(at: datetime) -> datetime:
    if at.tzinfo is None:
        msg = f"naive time {at}"
        raise ValueError(msg)
    return at.astimezone(UTC)


def moment(stored: str | datetime | None) -> datetime | None:
    """Return a moment that was read, aware and in UTC."""
    if stored is None:
        return None
    if isinstance(stored, str):
        return datetime.fromisoformat(stored).replace(tzinfo=UTC)
    return stored.astimezone(UTC)


def iso_utc(stored: str | datetime | None) -> str | None:
    """Return a moment that was read as ISO 8601 in UTC, as ``datetime.isoformat`` writes it."""
    if isinstance(stored, str):  # as `for_sqlite` wrote it
        return stored.replace(" ", "T").removesuffix(".000000") + "+00:00"
    return None if stored is None else stored.astimezone(UTC).isoformat()


def json_object(stored: Any) -> dict[str, Any]:
    """Return a JSON object that was read; SQLite gives its text."""
    found: dict[str, Any] = json.loads(stored) if isinstance(stored, str) else stored
    return found


def clean(text: str) -> str:
    """Return the text with NUL and lone surrogates as backslash escapes; once is enough."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
