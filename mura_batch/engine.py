"""Connections to the results database: SQLite in WAL mode, or PostgreSQL.

Every write of every process is one transaction that waits for the others: SQLite takes its write
lock at ``BEGIN IMMEDIATE``, PostgreSQL an advisory lock. Readers never wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    InternalError,
    NoSuchModuleError,
    OperationalError,
)

from mura_batch.errors import Misconfigured
from mura_batch.reader import (
    Ask,
    Values,
    damaged,
    for_sqlite,
    in_utc,
    refuse_other_revision,
    said,
    silent,
    sqlite_connection,
    sqlite_path,
    sqlite_revision,
)

_STREAM = 1000  # rows fetched at a time: memory stays flat however long the answer is
_WRITE_LOCK = 0x6D757261  # "mura": one number for all programs that share a PostgreSQL database


def open_engine(url: str, *, read_only: bool) -> Engine:
    """Return an engine for ``url``; nothing is opened yet.

    Raises:
        Misconfigured: not a SQLite file or PostgreSQL URL, or psycopg is not installed.
    """
    if (file := sqlite_path(url)) is not None:
        engine = create_engine(
            URL.create("sqlite", database=str(file)),
            creator=lambda: sqlite_connection(file, read_only=read_only),
        )
    else:
        engine = _postgres(url, read_only=read_only)
    event.listen(engine, "begin", _begin)
    return engine


def name_of(engine: Engine) -> str:
    """Return the file of a SQLite database, or the URL without its password."""
    file = _file_of(engine)
    return engine.url.render_as_string(hide_password=True) if file is None else str(file)


def _file_of(engine: Engine) -> Path | None:
    return Path(str(engine.url.database)) if engine.dialect.name == "sqlite" else None


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
    refuse_other_revision(revision(engine), name_of(engine))


def revision(engine: Engine) -> str | None:
    """Return the database's migration revision, None where there is no database yet.

    Raises:
        Misconfigured: the file is no database, or the server cannot be reached.
    """
    if (file := _file_of(engine)) is not None:
        return sqlite_revision(file)
    try:
        with engine.connect() as connection:
            if not engine.dialect.has_table(connection, "alembic_version"):
                return None
            found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
            return None if found is None else str(found)
    except DatabaseError as exc:
        raise Misconfigured(
            f"The database {name_of(engine)} cannot be opened ({said(exc.orig)}): check"
            " `database` in config.toml, its server, and what this user may do there."
        ) from exc


class EngineReader:
    """What an engine leads to; see :class:`reader.Reader`.

    Raises:
        Misconfigured: it is missing, unreadable, or of another revision.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        try:
            check_revision(engine)
        except Misconfigured:
            engine.dispose()
            raise

    @contextmanager
    def reading(self, *, stream: bool = False) -> Iterator[Ask]:
        """Give a way to ask; see :class:`reader.Reader`."""
        options: dict[str, Any] = {"yield_per": _STREAM} if stream else {}
        with reading(self._engine) as connection, ExitStack() as answers:
            yield lambda sql, values: answers.enter_context(
                connection.execute(
                    text(sql), driver_values(connection, values), execution_options=options
                )
            )

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()


def driver_values(connection: Connection, values: Values) -> dict[str, object]:
    """Return values for SQL text as the database's driver takes them."""
    return for_sqlite(values) if connection.dialect.name == "sqlite" else in_utc(values)


@contextmanager
def _guarded() -> Iterator[None]:
    try:
        yield
    except OperationalError as exc:
        raise silent(exc.orig or exc) from exc
    except DatabaseError as exc:
        # Damage comes as the class itself (SQLite) or as an internal error (PostgreSQL); the other
        # subclasses are of the program's own making.
        if not isinstance(exc, InternalError) and type(exc) is not DatabaseError:
            raise
        raise damaged(exc.orig or exc) from exc


def _postgres(url: str, *, read_only: bool) -> Engine:
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
    except (ArgumentError, NoSuchModuleError, ValueError) as exc:
        raise Misconfigured("`database` is no SQLAlchemy URL; see config.toml.") from exc
    if backend != "postgresql":
        raise Misconfigured(
            f"`database` is {parsed.render_as_string(hide_password=True)}: use sqlite:///FILE or"
            " postgresql://… in config.toml."
        )
    try:
        engine = create_engine(parsed.set(drivername="postgresql+psycopg"), pool_pre_ping=True)
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
