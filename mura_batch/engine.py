"""Connections to the results database: SQLite in WAL mode, or PostgreSQL.

Every write of every process is one transaction that waits for the others: SQLite takes its write
lock at ``BEGIN IMMEDIATE``, PostgreSQL an advisory lock. Readers never wait.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    InternalError,
    NoSuchModuleError,
    OperationalError,
)

from mura_batch.errors import Misconfigured, Transient
from mura_batch.schema import REVISION

BUSY_SECONDS = 30.0
_WRITE_LOCK = 0x6D757261  # "mura": one number for all programs that share a PostgreSQL database


def open_engine(url: str, *, read_only: bool) -> Engine:
    """Return an engine for ``url``; nothing is opened yet.

    Raises:
        Misconfigured: not a SQLite file or PostgreSQL URL, or psycopg is not installed.
    """
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite":
        engine = create_engine(parsed, creator=lambda: _sqlite(parsed, read_only=read_only))
    else:
        engine = _postgres(parsed, read_only=read_only)
    event.listen(engine, "begin", _begin)
    return engine


def parse_url(url: str) -> URL:
    """Return the URL with its driver named.

    Raises:
        Misconfigured: another database than a SQLite file or PostgreSQL.
    """
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
    except (ArgumentError, NoSuchModuleError) as exc:
        raise Misconfigured("`database` is no SQLAlchemy URL; see config.toml.") from exc
    if backend == "sqlite" and parsed.database not in {None, "", ":memory:"}:
        return parsed.set(drivername="sqlite")
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    raise Misconfigured(
        f"`database` is {shown(parsed)}: use sqlite:///FILE or postgresql://… in config.toml."
    )


def shown(url: URL) -> str:
    """Return the URL without its password."""
    return url.render_as_string(hide_password=True)


def sqlite_file(url: URL) -> Path | None:
    """Return the file of a SQLite URL, None for PostgreSQL."""
    return Path(str(url.database)) if url.get_backend_name() == "sqlite" else None


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Give a connection in a transaction that sees one moment of the database.

    Raises:
        Transient: the database does not answer.
        Misconfigured: the database is damaged.
    """
    with _guarded(), engine.connect() as connection, connection.begin():
        yield connection


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """Give a connection whose transaction has the one write lock; commits at the end.

    Raises:
        Transient: another program held the lock for 30 s, the disk is full, or the database
            does not answer. Nothing was changed.
        Misconfigured: the database is damaged. Nothing was changed.
    """
    with _guarded(), engine.connect() as connection:
        connection = connection.execution_options(mura_write=True)  # noqa: PLW2901 - the same one
        with connection.begin():
            yield connection


def check_revision(engine: Engine) -> None:
    """Refuse a database that is missing or not of this program's revision.

    Raises:
        Misconfigured: with the command that fixes it.
    """
    found = revision(engine)
    if found == REVISION:
        return
    name = shown(engine.url)
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


def revision(engine: Engine) -> str | None:
    """Return the database's migration revision, None where there is no database yet.

    Raises:
        Misconfigured: the file is no database, or the server cannot be reached.
    """
    file = sqlite_file(engine.url)
    if file is not None and not file.exists():
        return None
    try:
        with engine.connect() as connection:
            if not engine.dialect.has_table(connection, "alembic_version"):
                return None
            found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
            return None if found is None else str(found)
    except OperationalError as exc:
        raise Misconfigured(
            f"The database {shown(engine.url)} cannot be opened ({_said(exc)}): check `database` in"
            " config.toml, its server, and that this user may write to the file and its folder."
        ) from exc
    except DatabaseError as exc:
        raise Misconfigured(
            f"The database {shown(engine.url)} cannot be read ({_said(exc)}): check `database` in"
            " config.toml, or restore a backup."
        ) from exc


def _said(error: DatabaseError) -> str:
    """Return the driver's words as one line."""
    return " ".join(str(error.orig).split())


@contextmanager
def _guarded() -> Iterator[None]:
    try:
        yield
    except OperationalError as exc:
        raise Transient(f"The results database does not answer ({_said(exc)}); try again.") from exc
    except DatabaseError as exc:
        # Damage comes as the class itself (SQLite) or as an internal error (PostgreSQL); the other
        # subclasses are of the program's own making.
        if not isinstance(exc, InternalError) and type(exc) is not DatabaseError:
            raise
        raise Misconfigured(
            f"The results database is damaged ({_said(exc)}): restore a backup."
        ) from exc


def _sqlite(url: URL, *, read_only: bool) -> sqlite3.Connection:
    mode = "ro" if read_only else "rwc"
    connection = sqlite3.connect(
        f"file:{quote(str(url.database))}?mode={mode}",
        uri=True,
        timeout=BUSY_SECONDS,
        isolation_level=None,  # transactions begin where the begin event says so, DDL included
        check_same_thread=False,
    )
    if not read_only:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
    return connection


def _postgres(url: URL, *, read_only: bool) -> Engine:
    try:
        engine = create_engine(url, pool_pre_ping=True)
    except ModuleNotFoundError as exc:
        raise Misconfigured(
            "A PostgreSQL database needs psycopg: pip install 'mura-batch[postgres]'."
        ) from exc
    if not read_only:
        return engine
    return engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


def _begin(connection: Connection) -> None:
    write = connection.get_execution_options().get("mura_write", False)
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
    elif write:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITE_LOCK})")
