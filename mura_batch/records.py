"""What the database takes in and gives out: frozen records, no database types.

The pipeline hands ``ClaimRecord`` and ``StudyOutcome`` to the store and gets ``Recorded`` and
``StoredStudy`` back; ``query`` and ``export`` read ``StudyRow`` and ``ImageRow``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from mura_batch.area import Area, Source
from mura_batch.config import NOTICE

if TYPE_CHECKING:
    from mura_batch.study import Kind  # with what reads files: nothing that a query waits for

Json = dict[str, Any]
Evidence = list[dict[str, str]]


class State(StrEnum):
    """Where one area of a study stands, as ``query --state`` names it."""

    DONE = "done"
    FAILED = "failed"
    QUARANTINED = "quarantined"
    NEEDS_AREA = "needs_area"
    NO_WEIGHTS = "no_weights"
    QUEUED = "queued"
    RUNNING = "running"


class Work(StrEnum):
    """What the daemon has to do for a study; ``settled`` is nothing until something new comes."""

    QUEUED = "queued"
    RUNNING = "running"
    SETTLED = "settled"


class Place(StrEnum):
    """Where a file lies."""

    WORK = "work"
    ARCHIVE = "archive"
    QUARANTINE = "quarantine"
    INBOX = "inbox"  # archive = "leave"
    OUTSIDE = "outside"  # scored where it lies, away from the site's folders
    DELETED = "deleted"  # archive = "delete": gone after its result was committed
    REPLACED = "replaced"  # archive = "leave": other content lies under its name now


# ---- into the database


@dataclass(frozen=True, slots=True)
class ClaimedFile:
    """One file of a claim.

    Attributes:
        name: path relative to the inbox, "/"-separated, real name with surrogateescape.
        sha256: content hash, or one of what is known of the file where it could not be read
            (``problem`` says why).
    """

    name: str
    sha256: str
    size: int
    mtime_ns: int
    inode: int
    problem: str = ""


@dataclass(frozen=True, slots=True)
class ClaimRecord:
    """A claim as the ledger wants it.

    Attributes:
        key: folder's relative path for ``Kind.FOLDER``; the other kinds' is not kept.
        place: ``WORK``, or ``INBOX`` or ``OUTSIDE`` where the files stay where they are.
        root: folder that the files' names start from, where they lie outside the site.
        queue: False where the caller scores the study itself at once (``score --save``): the
            study counts as running, and a daemon that starts meanwhile may finish it.
    """

    id: str
    kind: Kind
    key: str
    received_at: datetime
    settled_by: str
    files: tuple[ClaimedFile, ...]
    study_uid: str | None = None
    accession: str | None = None
    place: Place = Place.WORK
    root: str = ""
    queue: bool = True


@dataclass(frozen=True, slots=True)
class Recorded:
    """What became of a claim.

    Attributes:
        outcome: ``new`` study; ``late`` images of a known one (queued again); ``duplicate``:
            every content hash is known, no new work (move the files to where the study's lie);
            ``replayed``: this very claim was recorded before.
        request: the study's request number now (see ``StoredStudy.request``).
    """

    study_id: str
    outcome: Literal["new", "late", "duplicate", "replayed"]
    request: int


@dataclass(frozen=True, slots=True)
class ViewOutcome:
    """One view of a result: a score, or an error code and sentence."""

    sha256: str
    frame: int
    source: str  # masked, displayable
    sop_instance_uid: str | None = None
    logit: float | None = None
    probability: float | None = None
    overlay: str | None = None  # path relative to the home
    error_code: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewResult:
    """A fresh score of one area; the store gives it its revision and run.

    Attributes:
        weights: digest of the weights; ``card`` is their card as JSON.
    """

    weights: str
    card: Json
    logit: float
    probability: float
    calibrated: float | None
    decision: Literal["positive", "negative"]
    threshold: float
    operating_point: str
    aggregate: str
    target: str
    preprocessing: Json
    calibration: Json | None
    runtime: str
    version: str
    scored_at: datetime
    views: tuple[ViewOutcome, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingOutcome:
    """How one area of a study ended.

    Attributes:
        area: None where it is not known (``needs_area``, or quarantined before it was).
        result: a fresh score, or the id of a stored one with the same key
            (``StoredStudy.scored``), or None.
    """

    area: Area | None
    state: State
    area_source: Source | None = None
    evidence: Evidence
    reason_code: str = ""
    reason: str = ""
    result: NewResult | int | None = None


@dataclass(frozen=True, slots=True)
class FileProblem:
    """Why a file's views could not be scored; kept with the file, shown by ``query --images``."""

    sha256: str
    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyOutcome:
    """All that one pass over a study found out; committed in one transaction.

    Attributes:
        request: the number the study had when it was taken. Where another one has come since
            (a late image, a rerun), the results are kept and the study is queued again.
        digest: content digest of the files that were looked at (``StoredStudy.digest``).
        readings: every area of the study; areas that are not named any more are dropped from
            the study's current rows (their results stay in the history).
        events: further things to log, as (what, detail), such as identifier conflicts.
    """

    study_id: str
    request: int
    digest: str
    at: datetime
    readings: tuple[ReadingOutcome, ...]
    problems: tuple[FileProblem, ...] = ()
    events: tuple[tuple[str, Json], ...] = ()


# ---- out of the database


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a study and where it lies (``Custody.locate(place, study, claim, name)``)."""

    claim: str
    name: str
    source: str
    sha256: str
    size: int
    place: Place
    problem: str  # empty, or a code, a colon and a sentence


@dataclass(frozen=True, slots=True)
class StoredReading:
    """One current row of a study: its last settled state and its current result."""

    area: Area | None
    state: State
    reason_code: str
    reason: str
    result_id: int | None


@dataclass(frozen=True, slots=True)
class StoredStudy:
    """A study with its files and current readings.

    Attributes:
        digest: over the distinct content hashes of all files but replaced ones.
        request: counts what has been asked of the study; goes back in ``StudyOutcome.request``.
        rerun: score again even where a result with the same key is stored.
        set_area: a person's area, for all views where ``set_all``, else for the undecided.
        scored: the latest result of each (area, weights digest) that ``digest`` was scored with.
    """

    id: str
    kind: Kind
    key: str
    study_uid: str | None
    accession: str | None
    digest: str
    source: str
    received_at: datetime
    work: Work
    request: int
    attempts: int
    rerun: bool
    set_area: Area | None
    set_all: bool
    files: tuple[StoredFile, ...]
    readings: tuple[StoredReading, ...]
    scored: Mapping[tuple[str, str], int]


@dataclass(frozen=True, slots=True)
class Move:
    """Where files of a claim lie now.

    Attributes:
        names: of the files, as in :class:`StoredFile`.
    """

    claim: str
    place: Place
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """Which rows; everything given must hold.

    Attributes:
        study: a study id or the beginning of one.
        since, until: of ``received_at``, aware; since <= received_at < until.
        min_probability, max_probability: inclusive, of ``probability`` (of the view's with
            ``images``).
        weights: a weights digest or the beginning of one.
        reason: a reason code (with ``images`` also a view's error code).
        history: superseded revisions too.
    """

    study: str | None = None
    area: Area | None = None
    state: State | None = None
    decision: Literal["positive", "negative"] | None = None
    since: datetime | None = None
    until: datetime | None = None
    min_probability: float | None = None
    max_probability: float | None = None
    weights: str | None = None
    reason: str | None = None
    history: bool = False
    limit: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rerun:
    """Which studies to queue again; everything given must hold.

    Attributes:
        studies: ids or unique beginnings of ids.
        failed, stale: given both, either is enough. ``stale`` maps areas to their active
            weights digests; a result with other weights of such an area is stale.
    """

    studies: tuple[str, ...] = ()
    filters: Filters | None = None
    failed: bool = False
    stale: Mapping[Area, str] | None = None


@dataclass(frozen=True, slots=True)
class StudyRow:
    """One row of ``query``: a study and area, in the order of the printed fields."""

    study: str
    digest: str
    revision: int | None
    state: str
    area: str | None
    area_source: str | None
    logit: float | None
    probability: float | None
    calibrated: float | None
    decision: str | None
    threshold: float | None
    operating_point: str | None
    target: str | None
    views: int | None
    views_failed: int | None
    weights: str | None
    study_uid: str | None
    accession: str | None
    source: str
    received_at: datetime
    scored_at: datetime | None
    reason: str | None
    notice: str = NOTICE

    def to_dict(self) -> Json:
        """Return the row as JSON values, in this order; times as ISO 8601 in UTC."""
        return {name: _plain(getattr(self, name)) for name in STUDY_FIELDS}


@dataclass(frozen=True, slots=True)
class ImageRow:
    """One row of ``query --images``: a view with its study's row.

    ``logit`` and ``probability`` are the view's; ``calibrated`` and ``decision`` the study's.
    """

    study: StudyRow
    image: str
    probability: float | None
    logit: float | None
    overlay: str | None
    error: str | None

    def to_dict(self) -> Json:
        """Return the study's fields with the view's over them, as JSON values."""
        return self.study.to_dict() | {name: getattr(self, name) for name in IMAGE_ONLY_FIELDS}


STUDY_FIELDS: tuple[str, ...] = tuple(StudyRow.__dataclass_fields__)
IMAGE_ONLY_FIELDS: tuple[str, ...] = tuple(ImageRow.__dataclass_fields__)[1:]
IMAGE_FIELDS: tuple[str, ...] = tuple(dict.fromkeys(STUDY_FIELDS + IMAGE_ONLY_FIELDS))


@dataclass(frozen=True, slots=True)
class LabelRow:
    """Truth about a study (of one area, or of the whole study where area is None)."""

    study: str
    label: Literal["positive", "negative"]
    area: Area | None = None
    by: str = "person"
    at: datetime | None = None


@dataclass(frozen=True, slots=True)
class EventRow:
    """One line of what happened to a study."""

    at: datetime
    study: str | None
    what: str
    detail: Json


@dataclass(frozen=True, slots=True)
class Counts:
    """The numbers of ``status``.

    Attributes:
        states: current rows (study and area) in each state.
        queued, running: studies the daemon has still to do; ``oldest`` the longest waiting.
        results, views: scored since the moment that was asked for.
    """

    states: Mapping[State, int]
    studies: int
    queued: int
    running: int
    oldest: datetime | None
    results: int
    views: int
    last_scored_at: datetime | None


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value
