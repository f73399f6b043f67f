"""Claims and outcomes for the tests of the database."""

from __future__ import annotations

import hashlib
import itertools
import os
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

from mura_batch.area import Area, Source
from mura_batch.records import (
    ClaimedFile,
    ClaimRecord,
    Move,
    NewResult,
    Place,
    ReadingOutcome,
    Recorded,
    State,
    StoredStudy,
    StudyOutcome,
    ViewOutcome,
)
from mura_batch.store import Store
from mura_batch.study import Kind

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
_numbers = itertools.count(1)


def sha(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def folder(key: str, *contents: str, hours: float = 0, **other) -> ClaimRecord:
    """A claim of a folder whose files have these contents, arriving ``hours`` after noon."""
    files = tuple(
        ClaimedFile(f"{key}/{content}.png", sha(content), 10, 1_000, 7) for content in contents
    )
    return claim(Kind.FOLDER, key, files, hours=hours, **other)


def dicom(uid: str, *contents: str, hours: float = 0) -> ClaimRecord:
    files = tuple(ClaimedFile(f"dump/{c}.dcm", sha(c), 10, 1_000, 7) for c in contents)
    return claim(Kind.DICOM, uid, files, hours=hours, study_uid=uid, accession="A1")


def loose(name: str, content: str, **other) -> ClaimRecord:
    return claim(Kind.FILE, name, (ClaimedFile(name, sha(content), 10, 1_000, 7),), **other)


def claim(kind, key, files, *, hours: float = 0, **other) -> ClaimRecord:
    return ClaimRecord(
        id=f"claim{os.getpid()}-{next(_numbers)}",
        kind=kind,
        key=key,
        received_at=NOON + timedelta(hours=hours),
        settled_by="quiet",
        files=files,
        **other,
    )


def record(store: Store, made: ClaimRecord) -> Recorded:
    (recorded,) = store.record([made], late_hours=24)
    return recorded


def new_result(weights: str = "aa", probability: float = 0.7, views=None, hours: float = 1):
    if views is None:
        views = (ViewOutcome(sha("x"), 0, "hand/x.png", logit=0.8, probability=probability),)
    return NewResult(
        weights=weights * 32,
        card={"area": "any"},
        logit=0.8,
        probability=probability,
        calibrated=None,
        decision="positive" if probability >= 0.5 else "negative",
        threshold=0.5,
        operating_point="balanced",
        aggregate="mean",
        target="abnormal",
        preprocessing={"size": 224},
        calibration=None,
        runtime="torch",
        version="0.1.0",
        scored_at=NOON + timedelta(hours=hours),
        views=views,
    )


def done(area: Area = Area.XR_HAND, result=None) -> ReadingOutcome:
    return ReadingOutcome(
        area=area,
        state=State.DONE,
        area_source=Source.FOLDER,
        evidence=[{"term": "hand"}],
        result=new_result() if result is None else result,
    )


def waiting(state: State, area: Area | None = None, code: str = "") -> ReadingOutcome:
    return ReadingOutcome(
        area=area, state=state, evidence=[], reason_code=code or state, reason="a sentence"
    )


def take(store: Store, hours: float = 100) -> StoredStudy:
    (study,) = store.take(1, NOON + timedelta(hours=hours))
    return study


def outcome(study: StoredStudy, *readings: ReadingOutcome, **other) -> StudyOutcome:
    return StudyOutcome(
        study_id=study.id,
        request=study.request,
        digest=study.digest,
        at=NOON,
        readings=readings,
        **other,
    )


def finish(store: Store, *readings: ReadingOutcome, **other) -> StoredStudy:
    """Take the next study and commit these readings for it; return it as it is stored then."""
    study = take(store)
    store.commit(outcome(study, *(readings or (done(),)), **other))
    return store.study(study.id)


def archived(store: Store, study: StoredStudy) -> None:
    store.moved(*(Move(file.claim, Place.ARCHIVE, (file.name,)) for file in study.files))


def damage(database: Path) -> None:
    """Record a study and overwrite pages of its readings, as a failing disk may."""
    with Store.open(f"sqlite:///{database}") as store:
        record(store, folder("hand", "a"))
        finish(store)
    with closing(sqlite3.connect(database)) as raw:
        raw.execute("PRAGMA journal_mode = DELETE")
        where = "SELECT rootpage FROM sqlite_master WHERE tbl_name = 'readings'"
        pages = [page for (page,) in raw.execute(where)]
        (size,) = raw.execute("PRAGMA page_size").fetchone()
    with database.open("r+b") as stream:
        for page in pages:
            stream.seek((page - 1) * size)
            stream.write(b"\xff" * size)
