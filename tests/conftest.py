from __future__ import annotations

import itertools
import shutil
from functools import cache
from pathlib import Path

import pytest
from postgres_server import database as postgres_database

from mura_batch import database
from mura_batch.store import Store

REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared" / "data"


LONG = {"test_bench", "test_crash", "test_retrain", "test_search", "test_training_faults"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest: no process waits for another's in the end."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The large open data beside the checkout; tests that need it skip in a user's clone."""
    if not SHARED.is_dir():
        pytest.skip("the large data set (../shared/data) is not here: nothing to test against")
    return SHARED


# ---- databases

_names = itertools.count(1)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory):
    file = tmp_path_factory.mktemp("template") / "results.db"
    database.upgrade(f"sqlite:///{file}")
    return file


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def new_url(request, tmp_path_factory):
    """Call it for the URL of a fresh database."""
    if request.param == "sqlite":
        template = request.getfixturevalue("sqlite_template")

        def fresh():
            file = tmp_path_factory.mktemp("fresh") / "results.db"
            shutil.copy(template, file)
            return f"sqlite:///{file}"

        return fresh
    template = _postgres_template()
    return lambda: postgres_database(f"store{next(_names)}", template)


@cache  # a process that takes its test files one by one sets up the fixture above for each
def _postgres_template():
    name = "template_store"
    database.upgrade(postgres_database(name))
    return name


@pytest.fixture
def url(new_url):
    return new_url()


@pytest.fixture
def store(url):
    with Store.open(url) as opened:
        yield opened
