"""What is asked of the studies, and the log of what happened to them; inside a transaction."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Row, and_, insert, select, update

from mura_batch.errors import Misconfigured
from mura_batch.lookup import AMONG, among, chunks
from mura_batch.records import Json, State, Work
from mura_batch.schema import events, readings, studies

_ASKED = select(
    studies.c.id,
    studies.c.digest,
    studies.c.received_at,
    studies.c.request,
    studies.c.attempts,
    studies.c.rerun,
).where(studies.c.id.in_(AMONG))
_NO_TRY = {"attempts": 0, "last_error": None, "not_before": None}
_SETTLED = (
    update(studies).where(studies.c.id.in_(AMONG)).values(work=Work.SETTLED, rerun=False, **_NO_TRY)
)
_ONCE_MORE = update(studies).where(studies.c.id.in_(AMONG)).values(work=Work.QUEUED, **_NO_TRY)
_EVENTS = insert(events)


def asked_of(connection: Connection, ids: Sequence[str]) -> dict[str, Row[*tuple[Any, ...]]]:
    """Return what is asked of each study, in the order of ``ids``.

    Raises:
        Misconfigured: a study is not stored.
    """
    rows = {row.id: row for row in among(connection, _ASKED, ids)}
    if missing := [study for study in ids if study not in rows]:
        raise Misconfigured(f"No study {missing[0]!r}: see `mura-batch query`.")
    return {study: rows[study] for study in ids}


def queue(
    connection: Connection,
    ids: Sequence[str],
    what: str,
    detail: Json,
    *,
    rerun: bool = False,
) -> None:
    """Ask for another pass; a study that is running goes on and is queued at its end."""
    values: dict[str, Any] = {"request": studies.c.request + 1, "attempts": 0}
    values |= {"not_before": None, "last_error": None}
    if rerun:
        values["rerun"] = True
    for some in chunks(ids):
        wanted = studies.c.id.in_(some)
        connection.execute(update(studies).where(wanted).values(**values))
        idle = and_(wanted, studies.c.work == Work.SETTLED)
        connection.execute(update(studies).where(idle).values(work=Work.QUEUED))
        now = datetime.now(UTC)
        log_all(connection, ((now, what, detail, study) for study in some))


def fail(connection: Connection, study: str, code: str, reason: str, at: datetime) -> None:
    """Let all readings of a study fail; what they last showed is kept."""
    failed = {"state": State.FAILED, "reason_code": code, "reason": reason, "updated_at": at}
    connection.execute(update(readings).where(readings.c.study_id == study).values(**failed))
    log(connection, at, State.FAILED, {"code": code, "reason": reason}, study)


def settle(connection: Connection, ids: Collection[str], *, fresh: bool) -> None:
    """End a pass; studies of which more was asked meanwhile (not ``fresh``) are queued again."""
    for some in chunks(sorted(ids)):
        connection.execute(_SETTLED if fresh else _ONCE_MORE, {AMONG.key: some})


def log(connection: Connection, at: datetime, what: str, detail: Json, study: str | None) -> None:
    """Append one entry to the log: when, what, its detail, and to which study."""
    log_all(connection, [(at, what, detail, study)])


def log_all(
    connection: Connection, happened: Iterable[tuple[datetime, str, Json, str | None]]
) -> None:
    """Append entries to the log, each as :func:`log` takes it."""
    names = ("at", "what", "detail", "study_id")
    if rows := [dict(zip(names, entry, strict=True)) for entry in happened]:
        connection.execute(_EVENTS, rows)
