"""Connections to the results database: SQLite in WAL mode, or PostgreSQL.

Every write of every process is one transaction that waits for the others: SQLite takes its write
lock at ``BEGIN IMMEDIATE``, PostgreSQL an advisory lock. Readers never wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

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
    for_sqlite,
    refuse_damage,
    refuse_other_revision,
    refuse_silence,
    said,
    sqlite_connection,
    sqlite_revision,
)

_STREAM = 1000  # rows fetched at a time: memory stays flat however long the answer is
_WRITE_LOCK = 0x6D757261  # "mura": one number for all programs that share a PostgreSQL database


def open_engine(url: str, *, read_only: bool) -> Engine:
    """Return an engine for ``url``; nothing is opened yet.

    Raises:
        Misconfigured: not a SQLite file or PostgreSQL URL, or psycopg is not installed.
    """
    parsed = parse_url(url)
    if (file := sqlite_file(parsed)) is not None:
        engine = create_engine(parsed, creator=lambda: sqlite_connection(file, read_only=read_only))
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
    refuse_other_revision(revision(engine), shown(engine.url))


def revision(engine: Engine) -> str | None:
    """Return the database's migration revision, None where there is no database yet.

    Raises:
        Misconfigured: the file is no database, or the server cannot be reached.
    """
    if (file := sqlite_file(engine.url)) is not None:
        return sqlite_revision(file)
    try:
        with engine.connect() as connection:
            if not engine.dialect.has_table(connection, "alembic_version"):
                return None
            found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
            return None if found is None else str(found)
    except DatabaseError as exc:
        raise Misconfigured(
            f"The database {shown(engine.url)} cannot be opened ({said(exc.orig)}): check"
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
    def reading(self) -> Iterator[Ask]:
        """Give a way to ask; see :class:`reader.Reader`."""
        with reading(self._engine) as connection, ExitStack() as answers:
            streaming = connection.execution_options(yield_per=_STREAM)
            yield lambda sql, values: answers.enter_context(
                streaming.execute(text(sql), driver_values(connection, values))
            )

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()


def driver_values(connection: Connection, values: Values) -> dict[str, object]:
    """Return values for SQL text as the database's driver takes them."""
    return for_sqlite(values) if connection.dialect.name == "sqlite" else dict(values)


@contextmanager
def _guarded() -> Iterator[None]:
    try:
        yield
    except OperationalError as exc:
        refuse_silence(exc.orig or exc)
    except DatabaseError as exc:
        # Damage comes as the class itself (SQLite) or as an internal error (PostgreSQL); the other
        # subclasses are of the program's own making.
        if not isinstance(exc, InternalError) and type(exc) is not DatabaseError:
            raise
        refuse_damage(exc.orig or exc)


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
