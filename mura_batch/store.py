"""The ledger: every write to the database, each method one transaction that can be replayed.

A study is recorded, taken, and committed (or deferred, or failed); what is asked of it meanwhile
counts up its ``request``, so that an outcome that is older than the last request never settles it.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import threading
from collections import ChainMap, defaultdict
from collections.abc import Collection, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    Connection,
    Row,
    and_,
    bindparam,
    func,
    insert,
    or_,
    select,
    union,
    update,
)
from sqlalchemy.engine import Engine

from mura_batch.area import Area
from mura_batch.engine import reading, writing
from mura_batch.errors import Misconfigured
from mura_batch.records import (
    ClaimedFile,
    ClaimRecord,
    Filters,
    Json,
    LabelRow,
    Move,
    Place,
    Recorded,
    Rerun,
    State,
    StoredStudy,
    StudyOutcome,
    Work,
)
from mura_batch.results import (
    AMONG,
    Results,
    among,
    chunks,
    conditions,
    is_stale,
    resolve,
    stored_studies,
)
from mura_batch.revisions import Placed, Revisions
from mura_batch.schema import clean, events, files, labels, readings, results, studies
from mura_batch.study import Kind, content_digest, masked

_WAITING = (State.NEEDS_AREA, State.NO_WEIGHTS)
_GONE = (Place.DELETED, Place.REPLACED)
_INTERRUPTED = "the program ended while this study was under way: it is tried again, alone"
Fingerprint = tuple[int, str, str]  # size, mtime_ns, inode
Ledger = dict[bytes, Fingerprint]  # of the files that were left in the inbox, by raw name

_ASKED = select(
    studies.c.id,
    studies.c.digest,
    studies.c.received_at,
    studies.c.request,
    studies.c.attempts,
    studies.c.rerun,
).where(studies.c.id.in_(AMONG))
_DUE = and_(  # queued, and not waiting for a retry
    studies.c.work == Work.QUEUED,
    or_(studies.c.not_before.is_(None), studies.c.not_before <= bindparam("now")),
)
_CUT_OFF = studies.c.last_error.is_not_distinct_from(_INTERRUPTED)
_LONGEST = (studies.c.received_at, studies.c.id)
_NEXT = select(studies.c.id).where(_DUE).limit(bindparam("limit"))
_USUAL = _NEXT.where(~_CUT_OFF).order_by(studies.c.rerun, *_LONGEST)
_ALONE = _NEXT.where(_CUT_OFF).order_by(studies.c.attempts, *_LONGEST)
_BUSY = select(studies.c.id).where(or_(studies.c.work == Work.RUNNING, _DUE)).limit(1)
_RUNNING = update(studies).where(studies.c.id.in_(AMONG)).values(work=Work.RUNNING)
_OF_CLAIMS = select(
    files.c.id, files.c.study_id, files.c.claim, files.c.raw_name, files.c.place
).where(files.c.claim.in_(AMONG))
_LIES = update(files).where(files.c.id == bindparam("number"))
_NO_TRY = {"attempts": 0, "last_error": None, "not_before": None}
_SETTLED = (
    update(studies).where(studies.c.id.in_(AMONG)).values(work=Work.SETTLED, rerun=False, **_NO_TRY)
)
_ONCE_MORE = update(studies).where(studies.c.id.in_(AMONG)).values(work=Work.QUEUED, **_NO_TRY)
_SOUND = update(files).where(files.c.study_id.in_(AMONG), files.c.problem != "").values(problem="")
_EVENTS = insert(events)
_TRACES: CompoundSelect[str | None] = (
    union(  # of claims (see `_Arrival`), wherever they may be stored
        select(files.c.claim).where(files.c.claim.in_(AMONG)),
        select(studies.c.id).where(studies.c.id.in_(AMONG)),
        select(studies.c.digest).where(studies.c.digest.in_(AMONG)),
        select(studies.c.study_uid).where(studies.c.study_uid.in_(AMONG)),
        select(studies.c.key).where(studies.c.kind == Kind.FOLDER, studies.c.key.in_(AMONG)),
    )
)
_NEW_STUDIES = insert(studies)
_NEW_FILES = insert(files)
_FIRST_READINGS = insert(readings)
_ID_DIGITS = 12


class Store(Results):
    """The writer; answers everything that :class:`Results` does. Thread-safe.

    Every method raises Transient where the database does not answer; nothing was changed then.
    """

    _READ_ONLY: ClassVar = False

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._lock = threading.RLock()
        self._ledger: Ledger | None = None

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with self._lock, writing(self._engine) as connection:
            yield connection

    # ---- claims

    def record(self, claims: Sequence[ClaimRecord], late_hours: float) -> list[Recorded]:
        """Record claims, all or none, and find or make the studies that they belong to.

        DICOM files belong to their Study Instance UID. Others belong to the study that has exactly
        their contents; else a folder's to the study of the same (masked) path whose last arrival
        is within ``late_hours`` or that shares a content; else they make a new study.

        Raises:
            ValueError: a claim has no files.
        """
        if bare := [claim.id for claim in claims if not claim.files]:
            msg = f"claim {bare[0]} has no files"
            raise ValueError(msg)
        left = any(claim.place is Place.INBOX for claim in claims)
        ledger = self._known_files() if left else {}
        news: Ledger = {}
        with self._write() as connection:
            recorded = _Intake(connection, ChainMap(news, ledger), late_hours).record(claims)
        ledger.update(news)
        return recorded

    def seen(self, name: str, size: int, mtime_ns: int, inode: int) -> bool:
        """Say whether a file of the inbox, left where it is, has been recorded like this."""
        return self._known_files().get(os.fsencode(name)) == (size, str(mtime_ns), str(inode))

    def moved(self, *moves: Move) -> None:
        """Record where files lie now."""
        if not moves:
            return
        stated = {
            (move.claim, os.fsencode(name)): move.place for move in moves for name in move.names
        }
        changed = defaultdict[tuple[str, str, Place], list[int]](list)
        with self._write() as connection:
            claims = list({move.claim for move in moves})
            for number, study, claim, name, lay in among(connection, _OF_CLAIMS, claims):
                place = stated.get((claim, name), Place(lay))
                if place != lay:
                    changed[study, claim, place].append(number)
            if not changed:
                return
            lies = [
                {"number": number, "place": place}
                for (_, _, place), numbers in changed.items()
                for number in numbers
            ]
            connection.execute(_LIES, lies)
            now = datetime.now(UTC)
            _log_all(
                connection,
                (
                    (now, "moved", {"claim": claim, "place": place, "files": len(numbers)}, study)
                    for (study, claim, place), numbers in changed.items()
                ),
            )

    def unsettled_custody(self) -> list[StoredStudy]:
        """Return settled studies that wait for nobody but whose files still lie in work."""
        waits = select(readings.c.id).where(
            readings.c.study_id == studies.c.id, readings.c.state.in_(_WAITING)
        )
        wanted = (
            select(studies.c.id)
            .distinct()
            .select_from(studies.join(files))
            .where(files.c.place == Place.WORK, studies.c.work == Work.SETTLED, ~waits.exists())
            .order_by(studies.c.id)
        )
        with reading(self._engine) as connection:
            return stored_studies(connection, connection.execute(wanted).scalars())

    # ---- the queue

    def take(self, limit: int, now: datetime, *, idle: bool = True) -> list[StoredStudy]:
        """Mark up to ``limit`` queued studies as running and return them.

        New studies come before reruns, and longer waiting ones first. Those that were under way
        when a process was killed come after all others, one at a time, and only where nothing
        else is under way (``idle``): so that the one that ends the program is found.
        """
        with self._write() as connection:
            ids = connection.execute(_USUAL, {"now": now, "limit": limit}).scalars().all()
            if not ids and idle:
                ids = connection.execute(_ALONE, {"now": now, "limit": 1}).scalars().all()
            for some in chunks(ids):
                connection.execute(_RUNNING, {AMONG.key: some})
            return stored_studies(connection, ids)

    def busy(self, now: datetime) -> bool:
        """Return whether any study is running, or queued and due."""
        with reading(self._engine) as connection:
            return connection.execute(_BUSY, {"now": now}).first() is not None

    def recover(self, most: int) -> int:
        """Queue again what an earlier process was running; return how many.

        Each of them counts one more attempt. One that ran alone (see :meth:`take`) and has come
        to ``most`` attempts fails: it may be what ends the program.
        """
        running = studies.c.work == Work.RUNNING
        suspect = and_(running, studies.c.last_error == _INTERRUPTED)
        again = {"work": Work.QUEUED, "last_error": _INTERRUPTED}
        with self._write() as connection:
            given_up = select(studies.c.id, studies.c.attempts + 1)
            given_up = given_up.where(suspect, studies.c.attempts + 1 >= most)
            for study, times in connection.execute(given_up).all():
                reason = (
                    f"the program ended {times} times while this study was under way: it may be"
                    f" the cause; look at its files, then `mura-batch rerun {study}`"
                )
                _fail(connection, study, "interrupted", reason, datetime.now(UTC))
                _settle(connection, {study}, fresh=True)
            queued = update(studies).where(running)
            return connection.execute(
                queued.values(attempts=studies.c.attempts + 1, **again)
            ).rowcount

    def commit(self, *outcomes: StudyOutcome) -> list[StoredStudy]:
        """Store what one pass over each study found out: results, readings, problems, events.

        All or none, and each study at most once. A key that is stored already keeps its row,
        except on a rerun, which makes a new one. The studies are settled, or queued again where
        more was asked of them meanwhile; returned is what is stored of them now.

        Raises:
            Misconfigured: a study, or a result that a reading names, is not stored.
            ValueError: no readings; every study keeps a row.
        """
        if bare := [outcome.study_id for outcome in outcomes if not outcome.readings]:
            msg = f"an outcome of study {bare[0]} without a reading"
            raise ValueError(msg)
        with self._write() as connection:
            asked = _asked(connection, [outcome.study_id for outcome in outcomes])
            fresh = {o.study_id for o in outcomes if asked[o.study_id].request == o.request}
            reruns = {study for study in fresh if asked[study].rerun}
            revisions = Revisions(connection, outcomes, reruns)
            placed = revisions.place()
            revisions.show(placed, {study: row.received_at for study, row in asked.items()})
            _note_problems(connection, outcomes)
            _log_all(connection, _happened(placed, outcomes))
            _settle(connection, fresh, fresh=True)
            _settle(connection, set(asked) - fresh, fresh=False)
            return stored_studies(connection, asked)

    def defer(self, study_id: str, error: str, not_before: datetime) -> int:
        """Queue a study for another try; return how many tries have failed."""
        with self._write() as connection:
            attempts = int(_asked(connection, [study_id])[study_id].attempts) + 1
            connection.execute(
                update(studies)
                .where(studies.c.id == study_id)
                .values(
                    work=Work.QUEUED, attempts=attempts, last_error=error, not_before=not_before
                )
            )
            detail = {"error": error, "attempts": attempts}
            _log(connection, datetime.now(UTC), "deferred", detail, study_id)
            return attempts

    def fail(self, study_id: str, request: int, code: str, reason: str, at: datetime) -> None:
        """Give a study up: all its readings fail, with what they last showed kept."""
        with self._write() as connection:
            fresh = _asked(connection, [study_id])[study_id].request == request
            _fail(connection, study_id, code, reason, at)
            _settle(connection, {study_id}, fresh=fresh)

    # ---- asked again

    def requeue_no_weights(self, areas: Iterable[Area]) -> int:
        """Queue the studies that waited for weights of these areas; return how many."""
        waiting = select(readings.c.study_id).where(
            readings.c.state == State.NO_WEIGHTS, readings.c.area.in_(list(areas))
        )
        with self._write() as connection:
            wanted = select(studies.c.id).where(
                studies.c.id.in_(waiting), studies.c.work == Work.SETTLED
            )
            ids = list(connection.execute(wanted).scalars())
            _queue(connection, ids, "weights_came", {})
            return len(ids)

    def rerun(self, which: Rerun, set_area: Area | None = None) -> list[str]:
        """Queue studies to be scored again and return their ids.

        ``set_area`` is a person's word: it counts for the undecided views where the study waits
        for an area, else for all of its views, and for images that come later. Studies of which
        files were deleted after scoring are passed over when a filter chose them, unless a part
        of them has not ended.

        Raises:
            Misconfigured: nothing was chosen, an id is unknown or ambiguous, or the files of a
                study that was named are deleted.
        """
        nothing = which.filters in {None, Filters()}
        if nothing and not (which.studies or which.failed or which.stale is not None):
            raise Misconfigured("Say which studies: ids, filters, --failed or --stale.")
        with self._write() as connection:
            named = [resolve(connection, study) for study in which.studies]
            chosen = _chosen(connection, which, named)
            ids = _with_files(connection, chosen)
            if missing := sorted(set(named) & (set(chosen) - set(ids))):
                raise Misconfigured(
                    f"The files of {', '.join(missing)} are deleted: drop them in again."
                )
            if set_area is not None:
                _set_area(connection, ids, set_area)
            _queue(connection, ids, "rerun", {"set_area": set_area} if set_area else {}, rerun=True)
            return ids

    # ---- people's labels, and the log

    def set_labels(self, truth: Iterable[LabelRow]) -> int:
        """Store labels, all or none; a later one of the same study and area replaces the earlier.

        Raises:
            Misconfigured: naming every study that is unknown or ambiguous.
        """
        problems = []
        count = 0
        with self._write() as connection:
            for row in truth:
                try:
                    _label(connection, row, resolve(connection, row.study))
                    count += 1
                except Misconfigured as exc:
                    problems.append(str(exc))
            if problems:
                raise Misconfigured("No label was stored. " + " ".join(problems))
        return count

    def _known_files(self) -> Ledger:
        """Return the ledger of files that were left in the inbox, read once."""
        with self._lock:
            if self._ledger is None:
                columns = (files.c.raw_name, files.c.size, files.c.mtime_ns, files.c.inode)
                wanted = select(*columns).where(files.c.place == Place.INBOX)
                with reading(self._engine) as connection:
                    rows = connection.execute(wanted)
                    self._ledger = {row[0]: (row[1], row[2], row[3]) for row in rows}
            return self._ledger


# ---- which study


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A claim, and what its study can be known by.

    Attributes:
        uid: Study Instance UID that groups DICOM claims; a header that fails later changes nothing.
        folder: what makes two folders one: the masked path in the inbox; outside the site, the
            whole path. None where the claim is no folder.
        digest: content digest of its files.
        whole: what a new study's id begins.
    """

    claim: ClaimRecord
    uid: str | None
    folder: str | None
    digest: str
    whole: str

    @classmethod
    def of(cls, claim: ClaimRecord) -> _Arrival:
        key = (claim.key or claim.study_uid) if claim.kind == Kind.DICOM else None
        uid = None if key is None else clean(key)
        folder = None
        if claim.kind == Kind.FOLDER:
            path = os.fspath(Path(claim.root, claim.key)) if claim.root else claim.key
            folder = masked(path)
        digest = content_digest(file.sha256 for file in claim.files)
        name = folder or masked(claim.files[0].name)
        parts = (claim.kind, uid) if uid is not None else (claim.kind, name, digest)
        whole = hashlib.sha256("\0".join(parts).encode("utf-8", "backslashreplace")).hexdigest()
        return cls(claim, uid, folder, digest, whole)

    @property
    def id(self) -> str:
        """The id of its study, if it is new and no other study has it."""
        return self.whole[:_ID_DIGITS]

    @property
    def traces(self) -> set[str]:
        """What is stored once the claim is; where none of it is stored, its study is new."""
        traces = {self.claim.id, self.id, self.digest}
        return traces | {trace for trace in (self.uid, self.folder) if trace is not None}


class _Intake:
    """Claims on the way to their studies, in one transaction.

    Those of which no trace is stored make new studies, written together; every other one is
    looked at by itself, after all that came before it.
    """

    def __init__(
        self,
        connection: Connection,
        ledger: MutableMapping[bytes, Fingerprint],
        late_hours: float,
    ) -> None:
        self._connection = connection
        self._ledger = ledger
        self._late = timedelta(hours=late_hours)
        self._stored: set[str | None] = set()  # traces, in the database or among the new ones
        self._new: dict[str, _Arrival] = {}  # studies that are not yet written, by id

    def record(self, claims: Iterable[ClaimRecord]) -> list[Recorded]:
        arrivals = [_Arrival.of(claim) for claim in claims]
        traces = list(set().union(*(arrival.traces for arrival in arrivals)))
        self._stored.update(trace for (trace,) in among(self._connection, _TRACES, traces))
        recorded = [self._record(arrival) for arrival in arrivals]
        self._write_new()
        return recorded

    def _record(self, arrival: _Arrival) -> Recorded:
        claim = arrival.claim
        left = claim.files if claim.place is Place.INBOX else ()
        names = {os.fsencode(file.name): _fingerprint(file) for file in left}
        replaced = [name for name in names if name in self._ledger]
        if replaced or not self._stored.isdisjoint(arrival.traces):
            self._write_new()
            recorded = self._record_alone(arrival, replaced)
        else:
            self._new[arrival.id] = arrival
            recorded = Recorded(arrival.id, "new", 1)
        self._stored |= arrival.traces
        self._ledger.update(names)
        return recorded

    def _record_alone(self, arrival: _Arrival, replaced: list[bytes]) -> Recorded:
        of_claim = select(studies.c.id, studies.c.request).join(files)
        replayed = of_claim.where(files.c.claim == arrival.claim.id).limit(1)
        if (known := self._connection.execute(replayed).first()) is not None:
            return Recorded(known.id, "replayed", known.request)
        if replaced:
            lay = and_(files.c.place == Place.INBOX, files.c.raw_name.in_(replaced))
            self._connection.execute(update(files).where(lay).values(place=Place.REPLACED))
        study = self._study_of(arrival)
        if study is not None:
            return self._add_to(study, arrival)
        study = self._free_id(arrival.whole)
        self._new[study] = arrival
        return Recorded(study, "new", 1)

    def _study_of(self, arrival: _Arrival) -> str | None:
        if arrival.uid is not None:
            same = and_(studies.c.kind == Kind.DICOM, studies.c.study_uid == arrival.uid)
            return self._connection.execute(select(studies.c.id).where(same)).scalar()
        twin = select(studies.c.id).where(studies.c.digest == arrival.digest)
        first = twin.order_by(studies.c.received_at).limit(1)
        found = self._connection.execute(first).scalar()
        if found is not None or arrival.folder is None:
            return found
        return self._earlier_folder(arrival)

    def _earlier_folder(self, arrival: _Arrival) -> str | None:
        last = func.max(files.c.received_at)
        same_path = (
            select(studies.c.id, last)
            .select_from(studies.join(files))
            .where(studies.c.kind == Kind.FOLDER, studies.c.key == arrival.folder)
            .group_by(studies.c.id)
            .order_by(last.desc())
        )
        contents = {file.sha256 for file in arrival.claim.files}
        for study, arrived in self._connection.execute(same_path).all():
            its_files = select(files.c.sha256).where(files.c.study_id == study)
            if arrived >= arrival.claim.received_at - self._late or not contents.isdisjoint(
                self._connection.execute(its_files).scalars()
            ):
                return str(study)
        return None

    def _free_id(self, whole: str) -> str:
        """The 12 digits are longer only where they are another study's."""
        taken = select(studies.c.id)
        return next(
            whole[:length]
            for length in range(_ID_DIGITS, len(whole) + 1)
            if self._connection.execute(taken.where(studies.c.id == whole[:length])).first() is None
        )

    def _add_to(self, study: str, arrival: _Arrival) -> Recorded:
        """Add a claim to a study; contents that it did not have queue it again."""
        claim = arrival.claim
        before = _asked(self._connection, [study])[study]
        self._connection.execute(_NEW_FILES, _file_rows(study, claim))
        hashes = select(files.c.sha256)
        present = hashes.where(files.c.study_id == study, files.c.place != Place.REPLACED)
        digest = content_digest(self._connection.execute(present).scalars())
        if digest == before.digest:
            _log(self._connection, claim.received_at, "duplicate", _about(claim), study)
            return Recorded(study, "duplicate", before.request)
        self._stored.add(digest)
        changed = update(studies).where(studies.c.id == study).values(digest=digest)
        self._connection.execute(changed)
        _queue(self._connection, [study], "late", _about(claim))
        return Recorded(study, "late", before.request + 1)

    def _write_new(self) -> None:
        if not (new := self._new):
            return
        self._new = {}
        write = self._connection.execute
        write(_NEW_STUDIES, [_study_row(study, arrival) for study, arrival in new.items()])
        write(_FIRST_READINGS, [_first_reading(study, a.claim) for study, a in new.items()])
        write(_NEW_FILES, [row for study, a in new.items() for row in _file_rows(study, a.claim)])
        _log_all(
            self._connection,
            ((a.claim.received_at, "new", _about(a.claim), study) for study, a in new.items()),
        )


def _study_row(study: str, arrival: _Arrival) -> dict[str, Any]:
    claim = arrival.claim
    return {
        "id": study,
        "kind": claim.kind,
        "key": arrival.folder or "",
        "study_uid": arrival.uid or claim.study_uid,
        "accession": claim.accession,
        "digest": arrival.digest,
        "source": _shown_source(claim),
        "received_at": claim.received_at,
        "work": Work.QUEUED if claim.queue else Work.RUNNING,
        "request": 1,
        "attempts": 0,
        "rerun": False,
        "set_all": False,
    }


def _first_reading(study: str, claim: ClaimRecord) -> dict[str, Any]:
    return {
        "study_id": study,
        "area": "",
        "received_at": claim.received_at,
        "state": State.QUEUED,
        "reason_code": "",
        "reason": "",
        "evidence": [],
        "updated_at": claim.received_at,
    }


def _file_rows(study: str, claim: ClaimRecord) -> list[dict[str, Any]]:
    return [
        {
            "study_id": study,
            "claim": claim.id,
            "raw_name": os.fsencode(Path(claim.root, file.name) if claim.root else file.name),
            "source": masked(file.name),
            "sha256": file.sha256,
            "size": file.size,
            "mtime_ns": str(file.mtime_ns),
            "inode": str(file.inode),
            "place": claim.place,
            "problem": file.problem,
            "received_at": claim.received_at,
        }
        for file in claim.files
    ]


def _shown_source(claim: ClaimRecord) -> str:
    """The folder that all files share, else the first file; labels masked."""
    if claim.kind == Kind.FOLDER and claim.key:
        return masked(claim.key)
    names = [file.name for file in claim.files]
    shared = posixpath.commonpath(names) if len(names) > 1 else names[0]
    return masked(shared or names[0])


def _about(claim: ClaimRecord) -> Json:
    return {"claim": claim.id, "files": len(claim.files), "settled_by": claim.settled_by}


def _fingerprint(file: ClaimedFile) -> Fingerprint:
    return file.size, str(file.mtime_ns), str(file.inode)


# ---- rows of one study


def _asked(connection: Connection, ids: Sequence[str]) -> dict[str, Row[*tuple[Any, ...]]]:
    """Return what is asked of each study, in the order of ``ids``.

    Raises:
        Misconfigured: a study is not stored.
    """
    rows = {row.id: row for row in among(connection, _ASKED, ids)}
    if missing := [study for study in ids if study not in rows]:
        raise Misconfigured(f"No study {missing[0]!r}: see `mura-batch query`.")
    return {study: rows[study] for study in ids}


def _queue(
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
        _log_all(connection, ((now, what, detail, study) for study in some))


def _fail(connection: Connection, study: str, code: str, reason: str, at: datetime) -> None:
    failed = {"state": State.FAILED, "reason_code": code, "reason": reason, "updated_at": at}
    connection.execute(update(readings).where(readings.c.study_id == study).values(**failed))
    _log(connection, at, State.FAILED, {"code": code, "reason": reason}, study)


def _settle(connection: Connection, ids: Collection[str], *, fresh: bool) -> None:
    for some in chunks(sorted(ids)):
        connection.execute(_SETTLED if fresh else _ONCE_MORE, {AMONG.key: some})


def _happened(
    placed: Iterable[Placed], outcomes: Iterable[StudyOutcome]
) -> Iterator[tuple[datetime, str, Json, str]]:
    """Yield what the log keeps of a pass: how each area ended, and what else was seen."""
    for each in placed:
        reading = each.reading
        how = {"area": reading.area or "", "result": each.result, "code": reading.reason_code}
        yield each.outcome.at, reading.state, how, each.outcome.study_id
    for outcome in outcomes:
        for what, detail in outcome.events:
            yield outcome.at, what, detail, outcome.study_id


def _note_problems(connection: Connection, outcomes: Sequence[StudyOutcome]) -> None:
    """Keep with each file why this pass could not score it, or that it could."""
    for some in chunks([outcome.study_id for outcome in outcomes]):
        connection.execute(_SOUND, {AMONG.key: some})
    for outcome in outcomes:
        for problem in outcome.problems:
            same = and_(files.c.study_id == outcome.study_id, files.c.sha256 == problem.sha256)
            why = f"{problem.code}: {problem.message}"
            connection.execute(update(files).where(same).values(problem=why))


def _chosen(connection: Connection, which: Rerun, named: list[str]) -> list[str]:
    tables = readings.join(studies).outerjoin(results, results.c.id == readings.c.result_id)
    filters = which.filters
    wanted = conditions(filters) if filters else []
    if which.studies:
        wanted.append(studies.c.id.in_(named))
    either: list[ColumnElement[bool]] = []
    if which.failed:
        either += [and_(readings.c.state == State.FAILED, studies.c.work == Work.SETTLED)]
    if which.stale is not None:
        either.append(is_stale(which.stale))
    if either:
        wanted.append(or_(*either))
    chosen = select(studies.c.id).select_from(tables).where(*wanted).group_by(studies.c.id)
    ordered = chosen.order_by(studies.c.id).limit(filters.limit if filters else None)
    return list(connection.execute(ordered).scalars())


def _with_files(connection: Connection, ids: Sequence[str]) -> list[str]:
    """Return those of the studies that still have their files, or a part that has none scored.

    A settled study of which a scored file is deleted would only lose its result.
    """
    present: set[str] = set()
    lost: set[str] = set()
    open_states = (State.QUEUED, State.FAILED, *_WAITING)
    for some in chunks(ids):
        of = select(files.c.study_id).where(files.c.study_id.in_(some))
        present.update(connection.execute(of.where(files.c.place.not_in(_GONE))).scalars())
        ends = select(readings.c.id).where(
            readings.c.study_id == files.c.study_id, readings.c.state.in_(open_states)
        )
        settled = of.where(files.c.place == Place.DELETED, ~ends.exists())
        lost.update(connection.execute(settled).scalars())
    return [study for study in ids if study in present - lost]


def _set_area(connection: Connection, ids: Sequence[str], area: Area) -> None:
    undecided = select(readings.c.study_id).where(readings.c.state == State.NEEDS_AREA)
    waiting = studies.c.id.in_(undecided)
    for some in chunks(ids):
        for which, everywhere in ((waiting, False), (~waiting, True)):
            values = {"set_area": area, "set_all": everywhere}
            chosen = and_(studies.c.id.in_(some), which)
            connection.execute(update(studies).where(chosen).values(**values))


def _label(connection: Connection, row: LabelRow, study: str) -> None:
    at = row.at or datetime.now(UTC)
    area = row.area or ""
    values = {"label": row.label, "by": row.by, "at": at}
    same = and_(labels.c.study_id == study, labels.c.area == area)
    if not connection.execute(update(labels).where(same).values(**values)).rowcount:
        connection.execute(insert(labels).values(study_id=study, area=area, **values))
    _log(connection, at, "label", {"area": area, "label": row.label, "by": row.by}, study)


def _log(connection: Connection, at: datetime, what: str, detail: Json, study: str | None) -> None:
    _log_all(connection, [(at, what, detail, study)])


def _log_all(
    connection: Connection, happened: Iterable[tuple[datetime, str, Json, str | None]]
) -> None:
    """Append to the log: when, what, its detail, and to which study."""
    names = ("at", "what", "detail", "study_id")
    if rows := [dict(zip(names, entry, strict=True)) for entry in happened]:
        connection.execute(_EVENTS, rows)
