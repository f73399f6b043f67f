"""Fill a database with studies, results and views as a busy site has them, and time `query`.

    python tests/bench/make_database.py /tmp/home --results 100000

makes ``/tmp/home/results.db`` (some thousands of results a second) and prints how long reading
processes take over it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import Connection, Table

from mura_batch import database, schema
from mura_batch.area import Area
from mura_batch.engine import open_engine, writing
from mura_batch.reader import for_sqlite

START = datetime(2020, 1, 1, tzinfo=UTC)  # 2,500,000 results end in 2024: none in the last hour
AREAS = list(Area)
READ = """
import sys
from mura_batch.area import Area
from mura_batch.records import Filters, State
from mura_batch.results import Results
with Results.open(sys.argv[1]) as results:
    print(sum(1 for _ in results.query(eval(sys.argv[2]))))
"""
QUERIES = (
    "Filters(limit=20)",
    "Filters(area=Area.XR_HAND, min_probability=0.95)",
    "Filters(decision='positive', min_probability=0.99)",
    "Filters(state=State.QUARANTINED)",
    "Filters(weights='0', limit=50)",
    "Filters(study='abc')",
    "Filters(area=Area.XR_WRIST)",
)


def fill(url: str, count: int) -> None:
    """Make the database and fill it with ``count`` results, two views each, one in fifty bad."""
    database.upgrade(url)
    engine = open_engine(url, read_only=False)
    draw = random.Random(7)  # noqa: S311 - a repeatable filling
    with writing(engine) as connection:
        connection.exec_driver_sql("PRAGMA cache_size = -1000000")  # KiB: ids come in no order
        weights = [sha(area) for area in AREAS]
        put(connection, schema.weights, [card(a, w) for a, w in zip(AREAS, weights, strict=True)])
        for first in range(0, count, 10_000):
            numbers = range(first + 1, min(first + 10_000, count) + 1)
            made = [study(number, draw) for number in numbers]
            put(connection, schema.studies, [row["study"] for row in made])
            put(connection, schema.files, [file for row in made for file in row["files"]])
            put(connection, schema.results, [row["result"] for row in made])
            put(connection, schema.views, [view for row in made for view in row["views"]])
            put(connection, schema.readings, [row["reading"] for row in made])
    engine.dispose()


def put(connection: Connection, table: Table, rows: list[dict]) -> None:
    """Insert rows as SQLite keeps them; SQLAlchemy's own way takes three times as long."""
    names = list(rows[0])
    columns, values = (", ".join(form.format(name) for name in names) for form in ('"{}"', ":{}"))
    connection.exec_driver_sql(
        f"INSERT INTO {table.name} ({columns}) VALUES ({values})",  # noqa: S608 - our own names
        [for_sqlite({name: stored(value) for name, value in row.items()}) for row in rows],
    )


def stored(value: object) -> object:
    return json.dumps(value) if isinstance(value, dict | list) else value


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def card(area: Area, weights: str) -> dict:
    return {"digest": weights, "area": area, "card": {"area": area}, "first_used": START}


def study(number: int, draw: random.Random) -> dict:
    """One study with its result, as rows by table."""
    digest, area = sha(f"study {number}"), draw.choice(AREAS)
    name, arrived = f"p{number:06}/{area}", START + timedelta(minutes=number)
    probability = draw.random()
    positive = "positive" if probability >= 0.5 else "negative"
    bad = number % 50 == 0
    key = {"study_id": digest[:12], "area": area}
    why = {"area_source": "folder", "evidence": [{"term": "hand", "source": "folder"}]}
    view = {"frame": 0, "logit": 0.1, "probability": probability, "overlay": "o.png"}
    view |= {"result_id": number, "error_code": "", "error": ""}
    file = {"study_id": digest[:12], "claim": digest[:16], "size": 9, "mtime_ns": "1", "inode": "1"}
    file |= {"place": "archive", "problem": "", "received_at": arrived}
    images = [f"{name}/{image}.png" for image in (1, 2)]
    return {
        "study": {
            "id": digest[:12],
            "kind": "folder",
            "key": name,
            "digest": digest,
            "source": name,
            "received_at": arrived,
            "work": "settled",
            "request": 1,
            "attempts": 0,
            "rerun": False,
            "set_all": False,
        },
        "files": [file | {"raw_name": i.encode(), "source": i, "sha256": sha(i)} for i in images],
        "result": key
        | why
        | {
            "id": number,
            "revision": 1,
            "digest": digest,
            "weights": sha(area),
            "run": 1,
            "logit": 0.1,
            "probability": probability,
            "calibrated": probability,
            "decision": positive,
            "threshold": 0.5,
            "operating_point": "balanced",
            "aggregate": "mean",
            "target": "abnormal",
            "preprocessing": {"size": 224},
            "calibration": {"slope": 1.0},
            "views": 2,
            "views_failed": 0,
            "runtime": "torch",
            "version": "0.1.0",
            "scored_at": arrived,
        },
        "views": [view | {"sha256": sha(i), "source": i} for i in images],
        "reading": key
        | why
        | {
            "state": "quarantined" if bad else "done",
            "reason_code": "truncated" if bad else "",
            "reason": "the file ends early" if bad else "",
            "result_id": None if bad else number,
            "decision": None if bad else positive,
            "probability": None if bad else probability,
            "weights": None if bad else sha(area),
            "received_at": arrived,
            "updated_at": arrived,
        },
    }


def main() -> None:
    """Fill and time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("home", type=Path)
    parser.add_argument("--results", type=int, default=100_000)
    options = parser.parse_args()
    file = options.home / "results.db"
    url = f"sqlite:///{file}"
    if not file.exists():
        started = time.perf_counter()
        fill(url, options.results)
        took = time.perf_counter() - started
        print(f"filled with {options.results} results in {took:.0f} s: {file}")  # noqa: T201 - what it did
    print("wall and CPU seconds of a process, the best of five")  # noqa: T201 - the table's head
    for query in ("Filters(limit=0)", *QUERIES):
        walls, cpus = [], []
        for _ in range(5):
            started, spent = time.perf_counter(), children()
            found = subprocess.run(
                [sys.executable, "-c", READ, url, query], capture_output=True, text=True, check=True
            )
            walls.append(time.perf_counter() - started)
            cpus.append(children() - spent)
        times = f"{min(walls):.3f} s wall  {min(cpus):.3f} s CPU"
        print(f"{times}  {found.stdout.strip():>6} rows  {query}")  # noqa: T201 - a row of it


def children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
