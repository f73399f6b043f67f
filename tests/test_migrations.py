"""Migrations: they make what the models say, keep what is stored, and are found where they lie."""

from __future__ import annotations

import itertools
import shutil
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from datetime import UTC, datetime

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from ledger import damage, finish, folder, record
from postgres_server import database as postgres_database
from sqlalchemy import JSON, DateTime, Float, LargeBinary, MetaData, insert, select
from sqlalchemy import types as sql
from sqlalchemy.exc import IntegrityError

from mura_batch import database, schema
from mura_batch.engine import open_engine, writing
from mura_batch.errors import Misconfigured, Transient
from mura_batch.reader import REVISION
from mura_batch.records import Filters
from mura_batch.results import Results
from mura_batch.store import Store

_names = itertools.count(1)
REVISIONS = [
    script.revision
    for script in reversed(
        list(ScriptDirectory.from_config(database.configuration()).walk_revisions())
    )
]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'results.db'}"
    return postgres_database(f"migrated{next(_names)}")


def test_the_newest_migration_is_the_one_that_the_program_asks_for():
    assert REVISIONS[-1] == REVISION


def test_models_and_migrations_agree(url):
    database.upgrade(url)
    engine = open_engine(url, read_only=True)
    with engine.connect() as connection:
        compared = MigrationContext.configure(connection, opts={"compare_type": True})
        differences = compare_metadata(compared, schema.metadata)
    engine.dispose()
    assert differences == []


@pytest.mark.parametrize("start", REVISIONS)
def test_every_revision_upgrades_a_database_with_data_in_it(url, start):
    database.upgrade(url, start)
    engine = open_engine(url, read_only=False)
    before = MetaData()
    before.reflect(engine)
    tables = [t for t in before.sorted_tables if t.name != "alembic_version"]
    with writing(engine) as connection:
        for table in tables:
            connection.execute(insert(table).values(filled(table)))
    engine.dispose()

    database.upgrade(url)

    assert database.current(url) == REVISION
    assert database.check(url) == []
    engine = open_engine(url, read_only=True)
    with engine.connect() as connection:
        for table in tables:
            kept = connection.execute(select(table)).mappings().all()
            assert [dict(row) for row in kept] == [filled(table)], table.name
    engine.dispose()


def test_readings_of_an_old_database_are_found_by_what_their_results_say(url):
    database.upgrade(url, "0002")
    engine = open_engine(url, read_only=False)
    old = MetaData()
    old.reflect(engine)
    with writing(engine) as connection:
        for table in old.sorted_tables:
            if table.name != "alembic_version":
                connection.execute(insert(table).values(filled(table)))
    engine.dispose()
    database.upgrade(url)
    chosen = Filters(min_probability=0.5, max_probability=0.5)
    with Results.open(url) as results:
        (row,) = results.query(chosen)
        assert (row.decision, row.weights) == ("x", "x")
        assert list(results.query(Filters(min_probability=0.6))) == []


def filled(table):
    """A row with something in every column; foreign keys fit since all texts and ids are one."""
    values = {
        sql.Boolean: True,
        sql.Integer: 1,
        Float: 0.5,
        JSON: {"a": [1]},
        LargeBinary: b"\xff",
        sql.String: "x",
    }
    row = {}
    for column in table.columns:
        if isinstance(column.type, DateTime):
            aware = UTC if column.type.timezone else None
            row[column.name] = datetime(2026, 1, 2, 3, 4, 5, tzinfo=aware)
        else:
            row[column.name] = next(
                v for kind, v in values.items() if isinstance(column.type, kind)
            )
    return row


def test_upgrade_of_a_newest_database_changes_nothing(url):
    assert database.current(url) is None
    for _ in range(2):
        database.upgrade(url)
    with Store.open(url) as store:
        record(store, folder("hand", "a"))
        finish(store)
    database.upgrade(url)
    with Results.open(url) as results:
        assert len(list(results.query())) == 1


def test_programs_that_upgrade_at_once_do_not_disturb_each_other(url):
    failures = []

    def upgrade():
        try:
            database.upgrade(url)
        except Exception as exc:  # noqa: BLE001 - anything at all fails the test
            failures.append(exc)

    threads = [threading.Thread(target=upgrade) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert database.check(url) == []


def test_an_old_database_is_refused_with_the_command_that_upgrades_it(url):
    database.upgrade(url, REVISIONS[0])
    for opened in (Results, Store):
        with pytest.raises(Misconfigured, match="mura-batch db upgrade"):
            opened.open(url)
    (problem,) = database.check(url)
    assert "mura-batch db upgrade" in problem


def test_a_newer_database_is_left_alone(url):
    database.upgrade(url)
    engine = open_engine(url, read_only=False)
    with writing(engine) as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    engine.dispose()
    with pytest.raises(Misconfigured, match="newer"):
        database.upgrade(url)
    with pytest.raises(Misconfigured, match="newer"):
        Store.open(url)


def test_a_migration_that_fails_leaves_the_database_as_it_was(url, tmp_path, monkeypatch):
    database.upgrade(url)
    copied = tmp_path / "migrations"
    shutil.copytree(database.migrations_folder(), copied)
    (copied / "versions" / "9999_broken.py").write_text(
        "from alembic import op\n"
        "revision = '9999'\n"
        f"down_revision = '{REVISIONS[-1]}'\n"
        "def upgrade():\n"
        "    op.execute('CREATE TABLE half (id INTEGER)')\n"
        "    op.execute('DROP TABLE nowhere')\n"
    )
    monkeypatch.setattr(database, "migrations_folder", lambda: copied)
    monkeypatch.setattr(database, "REVISION", "9999")
    with pytest.raises(Exception, match="nowhere"):
        database.upgrade(url)
    assert database.current(url) == REVISION
    engine = open_engine(url, read_only=True)
    with engine.connect() as connection:
        assert not engine.dialect.has_table(connection, "half")
    engine.dispose()


def test_migrations_are_found_inside_the_package_of_a_wheel(tmp_path):
    package = tmp_path / "site" / "mura_batch"
    source = database.migrations_folder()
    data = shutil.ignore_patterns("samples", "bundled", "migrations", "__pycache__")
    shutil.copytree(source.parent / "mura_batch", package, ignore=data)
    shutil.copytree(source, package / "migrations")
    script = (
        "from mura_batch import database as d;"
        f"d.upgrade('sqlite:///{tmp_path}/r.db');"
        f"print(d.migrations_folder(), d.current('sqlite:///{tmp_path}/r.db'))"
    )
    found = subprocess.run(
        [sys.executable, "-c", script],
        cwd=package.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == [str(package / "migrations"), REVISION]


def test_check_names_damage(tmp_path):
    file = tmp_path / "results.db"
    url = f"sqlite:///{file}"
    database.upgrade(url)
    assert database.check(url) == []
    with closing(sqlite3.connect(file)) as raw:
        raw.execute("ALTER TABLE labels DROP COLUMN by")
        raw.execute("DROP TABLE views")
        raw.execute("PRAGMA foreign_keys = OFF")
        raw.execute("INSERT INTO labels VALUES ('gone', '', 'positive', '2026-01-01 00:00:00.0')")
        raw.commit()
    assert " ".join(database.check(url)).count("restore a backup") == 3


def test_a_backup_is_whole_while_the_daemon_writes(tmp_path):
    file = tmp_path / "results.db"
    url = f"sqlite:///{file}"
    database.upgrade(url)
    (tmp_path / "backups").mkdir()
    with Store.open(url) as store:
        record(store, folder("hand", "a"))
        finish(store)
        with writing(store._engine) as connection:
            connection.execute(insert(schema.events).values(unfinished()))
            database.backup(url, tmp_path / "backups" / "one.db")
    backed_up = f"sqlite:///{tmp_path / 'backups' / 'one.db'}"
    assert database.check(backed_up) == []
    with Results.open(backed_up) as results:
        (row,) = results.query()
        assert "unfinished" not in [event.what for event in results.events(row.study)]
    assert [f.name for f in (tmp_path / "backups").iterdir() if "-" not in f.name] == ["one.db"]


def garbage(file):
    file.write_bytes(b"no database" * 99)


@pytest.mark.parametrize("harm", [damage, garbage])
def test_damage_is_told_with_the_cure_and_not_backed_up(tmp_path, harm):
    file = tmp_path / "results.db"
    url = f"sqlite:///{file}"
    database.upgrade(url)
    harm(file)
    (problem,) = database.check(url)
    assert "restore a backup" in problem
    with pytest.raises(Misconfigured, match="damaged.*no backup was made"):
        database.backup(url, tmp_path / "backup.db")
    with pytest.raises(Misconfigured, match="restore a backup"), Results.open(url) as results:
        list(results.query())
    assert not (tmp_path / "backup.db").exists()


def test_a_database_that_cannot_be_opened_is_not_called_damaged(tmp_path):
    (tmp_path / "results.db").mkdir()
    with pytest.raises(Transient, match="could not be copied.*try again"):
        database.backup(f"sqlite:///{tmp_path / 'results.db'}", tmp_path / "backup.db")


def test_a_mistake_of_the_program_is_not_called_damage(tmp_path):
    url = f"sqlite:///{tmp_path / 'results.db'}"
    database.upgrade(url)
    engine = open_engine(url, read_only=False)
    with pytest.raises(IntegrityError), writing(engine) as connection:
        connection.execute(insert(schema.events).values(unfinished() | {"study_id": "none"}))
    engine.dispose()


def unfinished():
    return {"at": datetime(2026, 1, 1, tzinfo=UTC), "what": "unfinished", "detail": {}}


def test_a_good_backup_is_not_replaced_by_an_empty_database(tmp_path):
    url, copy = f"sqlite:///{tmp_path / 'results.db'}", tmp_path / "copy.db"
    database.upgrade(url)
    database.backup(url, copy)
    good = copy.read_bytes()
    (tmp_path / "results.db").write_bytes(b"")
    with pytest.raises(Misconfigured, match="nothing to back up"):
        database.backup(url, copy)
    assert copy.read_bytes() == good


def test_a_backup_refuses_what_it_cannot_do(tmp_path):
    url = f"sqlite:///{tmp_path / 'results.db'}"
    with pytest.raises(Misconfigured, match="nothing to back up"):
        database.backup(url, tmp_path / "b.db")
    database.upgrade(url)
    with pytest.raises(Misconfigured, match="itself"):
        database.backup(url, tmp_path / "results.db")
    with pytest.raises(Misconfigured, match="pg_dump"):
        database.backup("postgresql://h/db", tmp_path / "b.db")
    assert not (tmp_path / "b.db").exists()
