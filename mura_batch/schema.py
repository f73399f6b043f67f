"""The tables, as typed SQLAlchemy Core: one definition for SQLite and PostgreSQL.

Core and not the ORM: everything here is a handful of set-wise statements, and rows leave as frozen
records. Migrations are in
``migrations/``; a test holds that they and this module agree. Append-only are ``results``,
``views`` and ``events``: triggers (see the migrations) refuse UPDATE and DELETE there.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    DateTime,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Named,
    String,
    Table,
    TypedColumns,
    UniqueConstraint,
    desc,
    text,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator

from mura_batch.reader import clean

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC in and out; SQLite keeps the naive UTC text."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return the moment in UTC; ValueError for a naive one."""
        if value is None:
            return None
        if value.tzinfo is None:
            msg = f"naive time {value}"
            raise ValueError(msg)
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return the moment in UTC, aware."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if dialect.name == "sqlite" else value.astimezone(UTC)


class CleanText(TypeDecorator[str]):
    """Text from outside: what no database can hold (NUL, lone surrogates) is escaped."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:  # noqa: ARG002 - the base's signature
        """Return the text cleaned."""
        return None if value is None else clean(value)


_Id = BigInteger().with_variant(Integer, "sqlite")


class _Studies(TypedColumns):
    id: Named[str] = Column(String, primary_key=True)  # 12 hexadecimal digits, or more
    kind: Named[str]
    key: Named[str] = Column(CleanText)  # masked folder path, else ""
    study_uid: Named[str | None] = Column(CleanText)
    accession: Named[str | None] = Column(CleanText)
    digest: Named[str] = Column(String, index=True)
    source: Named[str] = Column(CleanText)
    received_at: Named[datetime] = Column(UtcDateTime)
    work: Named[str]
    request: Named[int]
    not_before: Named[datetime | None] = Column(UtcDateTime)
    attempts: Named[int]
    rerun: Named[bool]
    set_area: Named[str | None]
    set_all: Named[bool]
    last_error: Named[str | None] = Column(CleanText)


studies = Table(
    "studies",
    metadata,
    _Studies,
    Index(None, "work", "rerun", "received_at"),
    Index(None, "kind", "key"),
    Index(None, "study_uid"),
)


class _Files(TypedColumns):
    id: Named[int] = Column(_Id, primary_key=True)
    study_id: Named[str] = Column(ForeignKey("studies.id"), index=True)
    claim: Named[str]
    raw_name: Named[bytes] = Column(LargeBinary)  # os.fsencode of the path in the inbox
    source: Named[str] = Column(CleanText)
    sha256: Named[str]
    size: Named[int] = Column(BigInteger)
    mtime_ns: Named[str]  # text: file systems know times and inodes beyond 63 bits
    inode: Named[str]
    place: Named[str] = Column(String, index=True)
    problem: Named[str] = Column(CleanText)
    received_at: Named[datetime] = Column(UtcDateTime)


files = Table("files", metadata, _Files, UniqueConstraint("claim", "raw_name"))


class _Weights(TypedColumns):
    digest: Named[str] = Column(String, primary_key=True)
    area: Named[str] = Column(String, primary_key=True)
    card: Named[dict[str, Any]] = Column(JSON)
    first_used: Named[datetime] = Column(UtcDateTime)


weights = Table("weights", metadata, _Weights)


class _Results(TypedColumns):
    id: Named[int] = Column(_Id, primary_key=True)
    study_id: Named[str] = Column(ForeignKey("studies.id"))
    area: Named[str]
    revision: Named[int]
    supersedes: Named[int | None] = Column(_Id, ForeignKey("results.id"))
    digest: Named[str]
    weights: Named[str]
    run: Named[int]
    logit: Named[float] = Column(Float)
    probability: Named[float] = Column(Float)
    calibrated: Named[float | None] = Column(Float)
    decision: Named[str]
    threshold: Named[float] = Column(Float)
    operating_point: Named[str]
    aggregate: Named[str]
    target: Named[str]
    preprocessing: Named[dict[str, Any]] = Column(JSON)
    calibration: Named[dict[str, Any] | None] = Column(JSON(none_as_null=True))
    views: Named[int]
    views_failed: Named[int]
    area_source: Named[str | None]
    evidence: Named[list[dict[str, str]]] = Column(JSON)
    runtime: Named[str]
    version: Named[str]
    scored_at: Named[datetime] = Column(UtcDateTime, index=True)


results = Table(
    "results",
    metadata,
    _Results,
    UniqueConstraint("digest", "area", "weights", "run"),
    UniqueConstraint("study_id", "area", "revision"),
    ForeignKeyConstraint(["weights", "area"], ["weights.digest", "weights.area"]),
)


class _Readings(TypedColumns):
    id: Named[int] = Column(_Id, primary_key=True)
    study_id: Named[str] = Column(ForeignKey("studies.id"))
    area: Named[str]  # "" where it is not known, so that the constraint below holds
    received_at: Named[datetime] = Column(UtcDateTime)  # the study's: rows are read in this order
    state: Named[str]  # how the last pass ended; studies.work says what is under way
    reason_code: Named[str]
    reason: Named[str] = Column(CleanText)
    area_source: Named[str | None]
    evidence: Named[list[dict[str, str]]] = Column(JSON)
    result_id: Named[int | None] = Column(_Id, ForeignKey("results.id"), index=True)
    decision: Named[str | None]  # this and the next two are the result's: rows are chosen by them
    probability: Named[float | None] = Column(Float)
    weights: Named[str | None]
    updated_at: Named[datetime] = Column(UtcDateTime)


readings = Table("readings", metadata, _Readings, UniqueConstraint("study_id", "area"))
_ROWS = (
    readings.c.received_at,
    readings.c.study_id,
    desc(readings.c.area),
)  # their order, reversed


def _partial(name: str, *columns: Any, where: str) -> Index:
    return Index(name, *columns, sqlite_where=text(where), postgresql_where=text(where))


# A query walks an index in the order of the rows and stops at its limit. What filters ask of a row
# stands in the first one, so that a million rows that do not fit are passed over in 0.1 s.
Index(
    "ix_readings_rows",
    *_ROWS,
    readings.c.state,
    readings.c.reason_code,
    readings.c.decision,
    readings.c.probability,
    readings.c.result_id,
)
_partial("ix_readings_not_done", *_ROWS, readings.c.state, where="state <> 'done'")
_partial("ix_readings_weights", readings.c.weights, *_ROWS, where="weights IS NOT NULL")


class _Views(TypedColumns):
    id: Named[int] = Column(_Id, primary_key=True)
    result_id: Named[int] = Column(_Id, ForeignKey("results.id"))
    sha256: Named[str]
    frame: Named[int]
    source: Named[str] = Column(CleanText)
    sop_instance_uid: Named[str | None] = Column(CleanText)
    logit: Named[float | None] = Column(Float)
    probability: Named[float | None] = Column(Float)
    overlay: Named[str | None] = Column(CleanText)
    error_code: Named[str]
    error: Named[str] = Column(CleanText)


views = Table("views", metadata, _Views, Index(None, "result_id", "probability", "error_code"))


class _Labels(TypedColumns):
    study_id: Named[str] = Column(ForeignKey("studies.id"), primary_key=True)
    area: Named[str] = Column(String, primary_key=True)  # "" for the whole study
    label: Named[str]
    by: Named[str]
    at: Named[datetime] = Column(UtcDateTime)


labels = Table("labels", metadata, _Labels)


class _Events(TypedColumns):
    id: Named[int] = Column(_Id, primary_key=True)
    at: Named[datetime] = Column(UtcDateTime)
    study_id: Named[str | None] = Column(ForeignKey("studies.id"), index=True)
    what: Named[str]
    detail: Named[dict[str, Any]] = Column(JSON)


events = Table("events", metadata, _Events)
