"""``mura-batch db``: migrations (Alembic), the revision, a check, an online backup."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, inspect

from mura_batch import engine as engines
from mura_batch.atomic import write_atomic
from mura_batch.errors import Misconfigured, Transient
from mura_batch.reader import BUSY_SECONDS, REVISION, sqlite_path
from mura_batch.schema import metadata


def migrations_folder() -> Path:
    """Return the migrations: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "migrations"
    return inside if inside.is_dir() else package.parent / "migrations"


def configuration(connection: Connection | None = None) -> Config:
    """Return the Alembic configuration; ``migrations/env.py`` runs on the connection."""
    config = Config()
    config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def upgrade(url: str, revision: str = "head") -> None:
    """Make or upgrade the database, whole or not at all; a newest one is left as it is.

    Raises:
        Misconfigured: it cannot be reached, is no database, or is newer than this program.
        Transient: another program is writing.
    """
    file = sqlite_path(url)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
    engine = engines.open_engine(url, read_only=False)
    try:
        if (found := engines.revision(engine)) == REVISION:
            return
        if found is not None and found > REVISION:
            engines.check_revision(engine)
        with engines.writing(engine) as connection:
            command.upgrade(configuration(connection), revision)
    finally:
        engine.dispose()


def current(url: str) -> str | None:
    """Return the database's revision, None where there is none yet; nothing is made.

    Raises:
        Misconfigured: it cannot be reached or is no database.
    """
    engine = engines.open_engine(url, read_only=True)
    try:
        return engines.revision(engine)
    finally:
        engine.dispose()


def check(url: str) -> list[str]:
    """Return what is wrong with the database, a sentence each; empty where all is well.

    Looks at the revision, the tables and columns, and SQLite's own integrity and foreign keys.

    Raises:
        Misconfigured: the URL is not that of a SQLite file or PostgreSQL.
        Transient: it does not answer.
    """
    engine = engines.open_engine(url, read_only=True)
    try:
        engines.check_revision(engine)
        with engines.reading(engine) as connection:
            return [*_missing_columns(connection), *_integrity(connection)]
    except Misconfigured as exc:
        return [str(exc)]
    finally:
        engine.dispose()


def backup(url: str, file: Path) -> None:
    """Copy a SQLite database, also while the daemon writes; ``file`` appears whole.

    Raises:
        Misconfigured: there is no database or a damaged one, ``file`` is the database itself, or
            it is a PostgreSQL one (``pg_dump`` does that better).
        Transient: the database does not answer, or the disk is full.
    """
    source = sqlite_path(url)
    if source is None:
        raise Misconfigured("This is a PostgreSQL database: back it up with pg_dump.")
    nothing = Misconfigured(f"No results database at {source}: nothing to back up.")
    if not source.exists():
        raise nothing
    if not file.absolute().parent.is_dir():
        raise Misconfigured(f"{file.absolute().parent}: no such folder; make it first.")
    if file.exists() and file.samefile(source):
        raise Misconfigured("The backup would overwrite the database itself: name another file.")

    def copy(stream: BinaryIO) -> None:
        # SQLite writes by name into the very file that write_atomic has open and will fsync.
        uri = f"{source.absolute().as_uri()}?mode=ro"
        with (
            closing(sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS)) as original,
            closing(sqlite3.connect(stream.name)) as copied,
        ):
            original.backup(copied)
            copied.execute("PRAGMA journal_mode = DELETE")  # one file, without a -wal beside it
            if (verdict := copied.execute("PRAGMA quick_check").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(" ".join(verdict.split()))
            if copied.execute("PRAGMA table_info(alembic_version)").fetchone() is None:
                raise nothing

    try:
        write_atomic(file, copy)
    except sqlite3.OperationalError as exc:
        raise Transient(f"The database could not be copied ({exc}): try again.") from exc
    except sqlite3.DatabaseError as exc:
        raise Misconfigured(f"The database is damaged ({exc}): no backup was made.") from exc


def _missing_columns(connection: Connection) -> list[str]:
    inspector = inspect(connection)
    present = set(inspector.get_table_names())
    problems = []
    for table in metadata.sorted_tables:
        if table.name not in present:
            problems.append(f"Table {table.name} is missing: restore a backup.")
            continue
        columns = {column["name"] for column in inspector.get_columns(table.name)}
        problems += [
            f"Column {table.name}.{column.name} is missing: restore a backup."
            for column in table.columns
            if column.name not in columns
        ]
    return problems


def _integrity(connection: Connection) -> list[str]:
    if connection.dialect.name != "sqlite":
        return []
    verdicts = [row[0] for row in connection.exec_driver_sql("PRAGMA quick_check")]
    if verdicts != ["ok"]:
        return [f"SQLite: {' '.join(verdict.split())}: restore a backup." for verdict in verdicts]
    orphans = len(connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall())
    return [f"{orphans} rows point to rows that are gone: restore a backup."] if orphans else []
