"""Custody of real files, with processes that are really killed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import pytest
from custody_site import ALL, FILES, ODD, contents, drop, found, site, unit, unit_of
from hypothesis import given
from hypothesis import strategies as st

from mura_batch import moves
from mura_batch.config import Settings
from mura_batch.custody import Candidate, Claim, Custody, FoundFile, _Record
from mura_batch.errors import Misconfigured, Transient
from mura_batch.reasons import Reason
from mura_batch.study import Kind

STEPS = ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync", "symlink", "mknod", "utime")
REASON = Reason("truncated", "decode", "the file ends too early", "send the image again")
STUDY = "0123456789ab"


@pytest.fixture
def fast(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: the many claims here wait for fsync."""
    memory = Path("/dev/shm")  # noqa: S108 - the usual second file system of a Linux machine
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing it wrote: fsync is for power cuts, and slow."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def far(fast: Path, tmp_path: Path) -> Path:
    """A folder on another file system than ``fast``."""
    if fast.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here to move files across")
    return tmp_path


CROSSING = pytest.mark.parametrize("crossing", [False, True], ids=["same", "another"])


def counted(nth: int, happen: Callable[[], object], patch: Callable[..., None]) -> None:
    """Let ``happen`` come before the nth file system step, or in the middle of a copy."""
    steps = count(1)

    def before(step: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **named: object) -> object:
            if next(steps) == nth:
                happen()
            return step(*args, **named)

        return run

    def copy(source: object, target: object, _: int) -> None:
        content = source.read()
        target.write(content[: len(content) // 2])
        target.flush()
        if next(steps) == nth:
            happen()
        target.write(content[len(content) // 2 :])

    for name in STEPS:
        patch(os, name, before(getattr(os, name)))
    patch(shutil, "copyfileobj", copy)


def killed(nth: int, action: Callable[[], object]) -> bool:
    """Run ``action`` in a process that gets SIGKILL at its nth step; False if it ended first."""
    child = os.fork()
    if child == 0:
        ended = 1
        try:
            counted(nth, lambda: os.kill(os.getpid(), signal.SIGKILL), setattr)
            action()
            ended = 0
        finally:
            os._exit(ended)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or status == 0, "the action itself failed"
    return os.WIFSIGNALED(status)


def finish(settings: Settings) -> list[Claim]:
    """Start again: what was cut off is finished, what is left in the inbox is claimed."""
    custody = Custody(settings)
    claims = custody.pending()
    rest = unit(settings)
    if rest.files:
        claim = custody.claim(rest)
        assert claim is not None
        claims.append(claim)
    return claims


def assert_all_claimed(settings: Settings, claims: list[Claim]) -> None:
    assert contents(settings) == ALL
    assert list(settings.inbox_dir.iterdir()) == []
    assert sorted(f.name for claim in claims for f in claim.files) == sorted(FILES)
    for claim in claims:
        for file, fingerprint in zip(claim.files, claim.fingerprints, strict=True):
            content = file.path.read_bytes()
            assert content == FILES[file.name]
            assert (file.sha256, file.size) == (hashlib.sha256(content).hexdigest(), len(content))
            assert fingerprint.name == file.name
    assert sorted(path.name for path in settings.work.iterdir()) == [c.id for c in claims]


def fresh(folder: Path, inbox: Path | None, nth: int) -> Settings:
    settings = site(folder / f"home{nth}", inbox / str(nth) if inbox else None)
    drop(settings)
    (settings.inbox_dir / ODD / ".ready").touch()
    return settings


def test_claim_moves_hashes_and_removes_emptied_folders(tmp_path: Path) -> None:
    settings = fresh(tmp_path, None, 0)
    claim = Custody(settings).claim(unit(settings, "ready"))
    assert claim is not None
    assert (claim.kind, claim.key, claim.settled_by) == (Kind.DICOM, "1.2.3", "ready")
    assert claim.received_at.tzinfo is UTC
    assert_all_claimed(settings, [claim])
    assert Custody(settings).pending() == [claim]


def test_claim_ids_sort_by_time_and_differ(tmp_path: Path) -> None:
    settings = site(tmp_path)
    ids = []
    for _ in range(5):
        drop(settings, {"a.png": b"same"})
        candidate = Candidate(Kind.FILE, "a.png", (found(settings, "a.png"),), "quiet")
        ids.append(Custody(settings).claim(candidate).id)
    assert ids == sorted(set(ids))


def test_what_a_power_cut_must_not_undo_is_synced_before_what_builds_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = fresh(tmp_path, None, 0)
    synced: list[Path] = []  # since the last rename
    renames: list[tuple[str, list[Path]]] = []

    def renaming(step: Callable[..., None]) -> Callable[..., None]:
        def run(source: str, target: str) -> None:
            step(source, target)
            renames.append((os.fspath(target), synced.copy()))
            synced.clear()

        return run

    monkeypatch.setattr(
        os, "fsync", lambda handle: synced.append(Path(f"/proc/self/fd/{handle}").readlink())
    )
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, renaming(getattr(os, name)))
    custody = Custody(settings)
    claim = custody.claim(unit(settings))
    custody.to_archive(STUDY, claim.id)
    folder, archive = settings.work / claim.id, settings.archive_dir / STUDY
    intent, first, *others, seal, archived = renames
    assert intent[0] == seal[0] == os.fspath(folder / "claim.json")
    assert [path.suffix for path in intent[1]] == [".tmp"], "its content comes before its name"
    assert first[1] == [folder, settings.work]
    assert [moved for _, moved in others] == [[]] * (len(FILES) - 1)
    places = {file.path.parent for file in claim.files} | {folder / "files"}
    assert {path.suffix or path for path in seal[1]} == {".tmp"} | places
    assert archived == (os.fspath(archive / claim.id), [folder])
    assert set(synced) == {archive, settings.work}


@CROSSING
def test_claim_survives_a_kill_at_every_step(
    fast: Path, *, crossing: bool, request: pytest.FixtureRequest
) -> None:
    inbox = request.getfixturevalue("far") if crossing else None
    for nth in count(1):
        settings = fresh(fast, inbox, nth)
        candidate = unit(settings)
        was_killed = killed(nth, lambda s=settings, c=candidate: Custody(s).claim(c))
        if not crossing:
            assert contents(settings) == ALL, f"before the restart, step {nth}"
        assert_all_claimed(settings, finish(settings))
        if not was_killed:
            break
    assert nth > 15, "the steps were not counted"


def test_claim_survives_a_second_kill_while_it_is_finished(fast: Path, far: Path) -> None:
    for nth in range(6, 30, 8):
        for again in count(1, 4):
            settings = fresh(fast, far, nth * 1000 + again)
            candidate = unit(settings)
            assert killed(nth, lambda s=settings, c=candidate: Custody(s).claim(c))
            was_killed = killed(again, lambda s=settings: Custody(s).pending())
            assert_all_claimed(settings, finish(settings))
            if not was_killed:
                break


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_claim_loses_nothing_when_the_disk_refuses_a_step(fast: Path, far: Path, code: int) -> None:
    def refuse() -> None:
        raise OSError(code, os.strerror(code))

    claims = 0
    for nth in range(1, 30):
        settings = fresh(fast, far, nth)
        candidate = unit(settings)
        with pytest.MonkeyPatch.context() as patch:
            counted(nth, refuse, patch.setattr)
            try:
                claims += Custody(settings).claim(candidate) is not None
            except Transient as exc:
                assert os.strerror(code) in str(exc)  # noqa: PT017 - a claim may also succeed
                assert sorted(f.name for f in unit(settings).files) == sorted(FILES)
        finish(settings)
        assert contents(settings) == ALL
    assert 5 < claims < 29


def settled_moves(custody: Custody, claim: Claim) -> dict[str, list[Callable[[], None]]]:
    bad = next(name for name in FILES if name.endswith("same.png"))

    def archive() -> None:
        custody.to_archive(STUDY, claim.id)

    def quarantine() -> None:
        custody.to_quarantine(STUDY, claim.id, REASON)

    def view() -> None:
        custody.quarantine_file(STUDY, claim.id, bad, REASON)

    return {
        "archive": [archive],
        "quarantine": [quarantine],
        "view": [view, archive],
        "view, then all": [view, quarantine],
        "scored after all": [quarantine, archive],
        "never after all": [archive, quarantine],
    }


@pytest.mark.parametrize("way", settled_moves(None, None))  # type: ignore[arg-type] # names only
@CROSSING
def test_settled_files_survive_a_kill_at_every_step(
    fast: Path, *, crossing: bool, way: str, request: pytest.FixtureRequest
) -> None:
    other = request.getfixturevalue("far") if crossing else None
    for nth in count(1):
        settings = fresh(fast, None, nth)
        if other is not None:  # the site keeps its archive on another disk
            (other / str(nth)).mkdir()
            settings.archive_dir.symlink_to(other / str(nth))
        custody = Custody(settings)
        whole = unit(settings)
        claim = custody.claim(replace(whole, files=whole.files[1:3]))  # the others stay
        assert claim is not None
        moves = settled_moves(custody, claim)[way]
        was_killed = killed(nth, lambda m=moves: [move() for move in m])
        custody.pending()
        for move in moves:
            move()
        assert contents(settings) == ALL
        assert_settled(settings, claim, way)
        if not was_killed:
            break


def assert_settled(settings: Settings, claim: Claim, way: str) -> None:
    assert list(settings.work.iterdir()) == []
    quarantined = settings.quarantine / STUDY / claim.id
    archived = settings.archive_dir / STUDY / claim.id
    whole, single = way in ("quarantine", "view, then all", "never after all"), way == "view"
    assert (quarantined / "reason.json").exists() == (whole or single)
    assert archived.exists() == (not whole)
    assert not (archived / "reason.json").exists()
    custody = Custody(settings)
    for file in claim.files:
        aside = whole or (single and file.name.endswith("same.png"))
        place = "quarantine" if aside else "archive"
        path = custody.locate(place, STUDY, claim.id, file.name)
        assert path.read_bytes() == FILES[file.name]
        assert path.is_relative_to(quarantined if aside else archived)
        assert custody.locate("work", STUDY, claim.id, file.name) == path, "found after a crash"


def test_discard_is_finished_after_a_kill(fast: Path) -> None:
    for nth in count(1):
        settings = fresh(fast, None, nth)
        custody = Custody(settings)
        claim = custody.claim(unit(settings))
        assert claim is not None
        was_killed = killed(nth, lambda c=custody, i=claim.id: c.discard(i))
        assert custody.pending() in ([], [claim]), "whole, or gone: never a part of it"
        custody.discard(claim.id)
        assert list(settings.work.iterdir()) == []
        with pytest.raises(Misconfigured, match="deleted"):
            custody.locate("deleted", STUDY, claim.id, "loose.dcm")
        if not was_killed:
            break


def test_file_that_changed_since_the_scan_stays_in_the_inbox(tmp_path: Path) -> None:
    settings = site(tmp_path)
    drop(settings, {f"s/{name}": b"0" for name in ("grows", "touched", "replaced", "gone", "ok")})
    folder = settings.inbox_dir / "s"
    files = tuple(found(settings, f"s/{path.name}") for path in sorted(folder.iterdir()))
    with (folder / "grows").open("ab") as stream:
        stream.write(b"1")
    os.utime(folder / "touched", ns=(1, 1))
    old = os.lstat(folder / "replaced").st_mtime_ns
    (folder / "new").write_bytes(b"1")
    os.utime(folder / "new", ns=(old, old))
    (folder / "new").replace(folder / "replaced")
    (folder / "gone").unlink()
    claim = Custody(settings).claim(Candidate(Kind.FOLDER, "s", files, "quiet"))
    assert [f.name for f in claim.files] == ["s/ok"]
    assert sorted(path.name for path in folder.iterdir()) == ["grows", "replaced", "touched"]


def test_cap_takes_a_file_that_never_stops_changing(tmp_path: Path) -> None:
    settings = site(tmp_path)
    drop(settings, {"grows.png": b"0"})
    candidate = Candidate(Kind.FILE, "grows.png", (found(settings, "grows.png"),), "cap")
    with (settings.inbox_dir / "grows.png").open("ab") as stream:
        stream.write(b"1")
        stream.flush()
        claim = Custody(settings).claim(candidate)
    assert claim.files[0].path.read_bytes() == b"01"
    assert (claim.files[0].size, claim.fingerprints[0].size) == (2, 2)


@pytest.mark.parametrize("archive", ["move", "leave"])
def test_nothing_left_is_no_claim(tmp_path: Path, archive: str) -> None:
    settings = site(tmp_path, archive=archive)
    candidate = Candidate(Kind.FILE, "a", (FoundFile("a", 1, 1, 1),), "quiet")
    assert Custody(settings).claim(candidate) is None
    assert list(settings.work.iterdir()) == []


def test_leave_hashes_and_moves_nothing(tmp_path: Path) -> None:
    settings = site(tmp_path, archive="leave")
    drop(settings)
    custody = Custody(settings)
    claim = custody.claim(unit(settings))
    for file in claim.files:
        assert file.path == settings.inbox_dir / file.name
        assert file.sha256 == hashlib.sha256(FILES[file.name]).hexdigest()
        assert custody.locate("inbox", STUDY, claim.id, file.name) == file.path
    assert list(settings.work.iterdir()) == []
    custody.to_archive(STUDY, claim.id)
    custody.discard(claim.id)
    custody.to_quarantine(STUDY, claim.id, REASON, sources=list(FILES))
    told = json.loads((settings.quarantine / STUDY / claim.id / "reason.json").read_text())
    assert told["code"] == "truncated"
    assert len(told["sources"]) == len(FILES)
    assert "positive" not in json.dumps(told)
    assert contents(settings) == ALL


def test_late_file_never_goes_over_another(tmp_path: Path) -> None:
    for nth in count(1):
        settings = site(tmp_path / str(nth))
        drop(settings, {"a.png": b"first"})
        candidate = unit_of(settings, "a.png")
        assert killed(nth, lambda s=settings, c=candidate: Custody(s).claim(c))
        if not (settings.inbox_dir / "a.png").exists():
            break
    drop(settings, {"a.png": b"second"})
    custody = Custody(settings)
    claims = [*custody.pending(), custody.claim(unit_of(settings, "a.png"))]
    assert [claim.files[0].path.read_bytes() for claim in claims] == [b"first", b"second"]


@CROSSING
def test_links_and_special_files_move_and_their_targets_do_not(
    fast: Path, *, crossing: bool, request: pytest.FixtureRequest
) -> None:
    inbox = request.getfixturevalue("far") / "inbox" if crossing else None
    settings = site(fast / "home", inbox)
    secret = fast / "secret"
    secret.write_bytes(b"not for you")
    (settings.inbox_dir / "file").symlink_to(secret)
    (settings.inbox_dir / "folder").symlink_to(fast)
    os.mkfifo(settings.inbox_dir / "fifo")
    custody = Custody(settings)
    digests = set()
    for name, problem in [
        ("file", "symbolic_link"),
        ("folder", "symbolic_link"),
        ("fifo", "not_a_file"),
    ]:
        claim = custody.claim(unit_of(settings, name, problem))
        file = claim.files[0]
        assert (file.problem, file.name) == (problem, name)
        digests.add(file.sha256)
        custody.to_quarantine(STUDY, claim.id, REASON)
        lies = custody.locate("quarantine", STUDY, claim.id, name)
        mode = os.lstat(lies).st_mode
        assert stat.S_ISFIFO(mode) if name == "fifo" else stat.S_ISLNK(mode)
    assert len(digests) == 3, "two of them are never one content"
    assert digests.isdisjoint({hashlib.sha256(b"not for you").hexdigest()})
    assert secret.read_bytes() == b"not for you"
    assert list(settings.inbox_dir.iterdir()) == []


def test_unreadable_file_is_claimed_with_its_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = site(tmp_path)
    drop(settings, {"s/locked.png": b"1", "s/open.png": b"2"})
    refuse_opening(monkeypatch, "locked.png")
    files = tuple(found(settings, f"s/{name}.png") for name in ("locked", "open"))
    claim = Custody(settings).claim(Candidate(Kind.FOLDER, "s", files, "quiet"))
    assert [f.problem for f in claim.files] == ["unreadable", ""]
    assert [f.problem for f in claim.fingerprints] == ["unreadable", ""]
    assert len({f.sha256 for f in claim.files}) == 2
    assert Custody(settings).pending() == [claim]


def test_a_file_larger_than_any_film_is_not_read(tmp_path: Path) -> None:
    settings = site(tmp_path)
    digests = set()
    for name in ("wrist.png", "hand.dcm"):
        drop(settings, {name: b""})
        os.truncate(settings.inbox_dir / name, moves.MAX_BYTES + 1)
        claim = Custody(settings).claim(unit_of(settings, name))
        assert claim.files[0].problem == claim.fingerprints[0].problem == "too_large"
        digests.add(claim.files[0].sha256)
    assert len(digests) == 2
    assert {claim.files[0].problem for claim in Custody(settings).pending()} == {"too_large"}


def test_a_file_larger_than_any_film_is_not_copied_either(fast: Path, far: Path) -> None:
    settings = site(fast / "home", far / "inbox")
    drop(settings, {"wrist.png": b""})
    os.truncate(settings.inbox_dir / "wrist.png", moves.MAX_BYTES + 1)
    with pytest.raises(Transient, match="too large to be copied"):
        Custody(settings).claim(unit_of(settings, "wrist.png"))
    assert [path.name for path in settings.inbox_dir.iterdir()] == ["wrist.png"]
    assert list(settings.work.iterdir()) == []


@pytest.mark.parametrize("asked", range(1, 7))
def test_a_claim_that_is_told_to_stop_is_finished_by_a_restart(tmp_path: Path, asked: int) -> None:
    settings = site(tmp_path)
    drop(settings)
    before = contents(settings)
    answers = count(1)
    stopping = Custody(settings, go_on=lambda: next(answers) < asked)
    with pytest.raises(Transient, match="told to stop"):
        stopping.claim(unit(settings))
    assert stopping.pending() == []
    assert contents(settings) == before
    assert_all_claimed(settings, finish(settings))


def refuse_opening(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The fault of a file without permissions, which root does not meet."""
    really = os.open

    def refuse(path: object, *args: object, **named: object) -> int:
        if os.fspath(path).endswith(name):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return really(path, *args, **named)

    monkeypatch.setattr(os, "open", refuse)


def test_inbox_that_gives_nothing_away_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = site(tmp_path)
    drop(settings)
    really = os.rename

    def refuse(source: object, target: object) -> None:
        if "inbox" in os.fspath(source):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        really(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(Transient, match="permissions of the inbox"):
        Custody(settings).claim(unit(settings))
    assert list(settings.work.iterdir()) == []


def test_ready_marker_stays_with_a_file_that_was_not_taken(tmp_path: Path) -> None:
    settings = site(tmp_path)
    drop(settings, {"s/a.png": b"1", "s/b.png": b"2", "s/.ready": b"", "t/.ready": b""})
    drop(settings, {"t/a.png": b"1", "t/a.png.part": b"2"})
    Custody(settings).claim(unit_of(settings, "s/a.png"))
    assert (settings.inbox_dir / "s" / ".ready").exists()
    Custody(settings).claim(unit_of(settings, "t/a.png"))
    left = [path.name for path in (settings.inbox_dir / "t").iterdir()]
    assert left == ["a.png.part"], "an old marker must not hurry what comes later"


def test_reason_names_every_view_once(tmp_path: Path) -> None:
    settings = fresh(tmp_path, None, 0)
    custody = Custody(settings)
    claim = custody.claim(unit(settings))
    views = [name for name in FILES if name.endswith(".png")]
    for name in views * 2:
        custody.quarantine_file(STUDY, claim.id, name, REASON)
    text = (settings.quarantine / STUDY / claim.id / "reason.json").read_text()
    told = json.loads(text)
    assert [entry["code"] for entry in told["files"]] == ["truncated"] * 2
    assert (told["study"], told["claim"], told["stage"]) == (STUDY, claim.id, "decode")
    assert told["what_to_do"] == "send the image again"
    assert "study1_*" in told["files"][0]["file"]
    assert "positive" not in text


def test_whole_claim_can_be_empty_after_its_views_went_to_quarantine(tmp_path: Path) -> None:
    settings = site(tmp_path)
    drop(settings, {"a.png": b"1"})
    custody = Custody(settings)
    claim = custody.claim(unit_of(settings, "a.png"))
    custody.quarantine_file(STUDY, claim.id, "a.png", REASON)
    assert custody.pending() == []
    custody.to_archive(STUDY, claim.id)
    assert custody.locate("archive", STUDY, claim.id, "a.png").read_bytes() == b"1"
    assert (settings.quarantine / STUDY / claim.id / "files" / "a.png").exists()


def test_spoilt_record_keeps_its_files_and_stops_no_other(tmp_path: Path) -> None:
    settings = site(tmp_path)
    drop(settings, {"a.png": b"1", "b.png": b"2"})
    custody = Custody(settings)
    spoilt = custody.claim(unit_of(settings, "a.png"))
    good = custody.claim(unit_of(settings, "b.png"))
    (settings.work / spoilt.id / "claim.json").write_bytes(b'{"id": ')
    assert custody.pending() == [good]
    assert spoilt.files[0].path.read_bytes() == b"1"


names = st.text(st.characters(exclude_characters="\0"), min_size=1)
numbers = st.integers(0, 2**63)


@given(
    files=st.lists(st.builds(FoundFile, names, numbers, numbers, numbers), max_size=3),
    key=names,
    hashed=st.booleans(),
)
def test_record_reads_back_what_it_wrote(*, files: list[FoundFile], key: str, hashed: bool) -> None:
    candidate = Candidate(Kind.FOLDER, key, tuple(files), "cap")
    record = _Record("id", datetime.now(UTC), candidate, ("0",) * len(files) if hashed else None)
    assert _Record.from_json(record.to_json()) == record


def test_a_file_that_the_disk_fails_to_read_is_hashed_when_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = site(tmp_path)
    drop(settings)
    custody = Custody(settings)

    def failing(_: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(moves, "open_regular", failing)
        with pytest.raises(Transient, match="Input/output error"):
            custody.claim(unit(settings))
        assert custody.cut_off() == []
    (claim,) = custody.cut_off()
    assert {file.name: (file.sha256, file.problem) for file in claim.files} == {
        name: (hashlib.sha256(content).hexdigest(), "") for name, content in FILES.items()
    }
    assert custody.cut_off() == []
