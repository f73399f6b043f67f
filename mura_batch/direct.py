"""Score files where they are: the daemon's pipeline over a throw-away ledger, nothing moved."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from mura_batch import database
from mura_batch.area import Area
from mura_batch.config import Settings
from mura_batch.custody import Candidate, Custody, FoundFile
from mura_batch.errors import Misconfigured
from mura_batch.inbox import Inbox
from mura_batch.pipeline import Pipeline
from mura_batch.records import Filters, ImageRow, Place, Recorded, Rerun, StoredStudy, StudyRow
from mura_batch.scoring import warm_scorer
from mura_batch.store import Store
from mura_batch.study import Kind
from mura_batch.weights import WeightsStore
from mura_batch.weights_import import Facts, import_checkpoint


@dataclass(frozen=True, slots=True)
class Scored:
    """What was found out about the given paths: a row per study and area, a row per view."""

    studies: tuple[StudyRow, ...]
    images: tuple[ImageRow, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """What to score and how it differs from the site's settings.

    Attributes:
        area: for every view, whatever the evidence says.
        weights_file: a checkpoint or safetensors file to use for ``area``.
        overlays: folder for the overlay pictures; none are written where it is None.
        save: keep the results in the site's database.
    """

    paths: tuple[Path, ...]
    area: Area | None = None
    weights_file: Path | None = None
    weights_digest: str | None = None
    overlays: Path | None = None
    save: bool = False


Track = Callable[[Sequence[StoredStudy]], Iterable[StoredStudy]]


def score_paths(settings: Settings, request: Request, *, track: Track = iter) -> Scored:
    """Score files and folders as the daemon would, without moving them.

    ``track`` passes the studies on and may show how far the work is.

    Folder names of a path count as evidence from where the path starts as it is given: from the
    root, the working folder, or the folder that its ``..`` lead to; where the paths start apart,
    from the folder that holds all of these.

    Raises:
        Misconfigured: a path is missing or holds no image, the wanted weights are missing, or a
            saved study with an area of its own is known already.
    """
    missing = [str(path) for path in request.paths if not path.exists()]
    if missing:
        raise Misconfigured(f"no such file or folder: {', '.join(missing)}")
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mura-batch-")))
        weights = _weights(settings, request, scratch)
        local = replace(
            settings,
            home=settings.home if request.save else scratch,
            database=settings.database_url if request.save else "",
            inbox=Path(os.path.commonpath([_start(path) for path in request.paths])),
            archive="leave",
            precision=settings.precision if request.save else "f32",  # int8 takes long to prepare
            overlays=request.overlays is not None,
        )
        if not request.save:
            database.upgrade(local.database_url)
        store = stack.enter_context(Store.open(local.database_url))
        scorer = stack.enter_context(warm_scorer(local, weights, lasting=request.save))
        with Pipeline(local, store, Custody(local), weights, scorer) as pipeline:
            claims = map(Custody(local).claim, _candidates(local, request.paths))
            held = [claim for claim in claims if claim is not None]
            if not held:
                raise Misconfigured(f"no image in {', '.join(map(str, request.paths))}")
            received = pipeline.receive(held, outside=True)
            studies = [recorded.study_id for recorded in received]
            if request.save and (request.area or request.weights_digest or request.weights_file):
                _only_news(received)
            if request.area is not None:
                store.rerun(Rerun(studies=tuple(studies)), request.area)
            found = store.studies(dict.fromkeys(studies))
            # What the site keeps itself is the daemon's to score: only it may move files.
            own = [s for s in found if all(file.place is Place.OUTSIDE for file in s.files)]
            pipeline.feed(track(own))
            pipeline.drain()
        scored = _rows(store, studies)
        if request.overlays is None:
            return scored
        return replace(
            scored,
            images=tuple(_carried(row, local.home, request.overlays) for row in scored.images),
        )


def _only_news(received: Sequence[Recorded]) -> None:
    """Refuse to let an answer of the moment replace what the site knows of a study.

    Raises:
        Misconfigured: one of the studies was in the database before.
    """
    for recorded in received:
        if recorded.outcome != "new":
            raise Misconfigured(
                f"this is study {recorded.study_id} of the site already: `mura-batch rerun"
                f" {recorded.study_id} --set-area AREA` scores it anew, or leave out --save"
            )


def _absolute(path: Path) -> Path:
    """Return ``path`` from the root on, without ``..``, its links kept."""
    plain = Path(os.path.normpath(path.absolute()))
    # Behind a link to a folder, `..` leads elsewhere than the names say.
    return plain if plain.exists() and plain.samefile(path) else path.resolve()


def _start(path: Path) -> Path:
    """Return the folder from which the names of ``path`` count."""
    up = [part for part in Path(os.path.normpath(path)).parts if part == os.pardir]
    start = Path(path.anchor or os.path.normpath(Path.cwd().joinpath(*up)))
    return start if _absolute(path).is_relative_to(start) else Path("/")


def _candidates(settings: Settings, paths: Sequence[Path]) -> Iterator[Candidate]:
    """Yield the units below ``paths``, named from the settings' inbox on."""
    root = settings.inbox_dir
    for path in paths:
        absolute = _absolute(path)
        if absolute.is_dir():
            inbox = Inbox(replace(settings, inbox=absolute, settle_seconds=0.0))
            inbox.scan()
            found = _whole(inbox.scan())
            prefix = absolute.relative_to(root)
        else:
            status = absolute.lstat()
            file = FoundFile(absolute.name, status.st_size, status.st_mtime_ns, status.st_ino)
            found = [Candidate(Kind.FILE, absolute.name, (file,), "quiet")]
            prefix = absolute.parent.relative_to(root)
        for unit in found:
            files = tuple(replace(f, name=(prefix / f.name).as_posix()) for f in unit.files)
            key = (prefix / unit.key).as_posix() if unit.kind is Kind.FOLDER else unit.key
            yield replace(unit, key=key, files=files)


def _whole(units: list[Candidate]) -> list[Candidate]:
    """Return the units, those of a folder that holds nothing but loose images as one study."""
    loose = all(unit.kind is Kind.FILE and "/" not in unit.files[0].name for unit in units)
    if not loose or len(units) < 2:  # noqa: PLR2004 - one image is a study either way
        return units
    files = tuple(file for unit in units for file in unit.files)
    return [Candidate(Kind.FOLDER, "", files, "quiet")]


def _weights(settings: Settings, request: Request, scratch: Path) -> WeightsStore:
    """Return the site's weights, or a scratch store where the request names others."""
    site = WeightsStore(settings.weights_dir)
    named = request.weights_file is not None or request.weights_digest is not None
    if not named and any(site.cards()):
        return site
    store = WeightsStore(scratch / "weights")
    if not named:
        store.install_bundled()
        return store
    if request.area is None:
        raise Misconfigured("weights are for one area: name it with --area")
    if request.weights_digest is not None:
        card = site.find(request.area, request.weights_digest)
        file = site.file(card)
        store.add(file, card)
    elif request.weights_file is not None:
        card = import_checkpoint(request.weights_file, Facts(area=request.area), store)
    store.activate(request.area, card.sha256)
    return store


def _carried(row: ImageRow, home: Path, folder: Path) -> ImageRow:
    """Copy a view's overlay into ``folder``; return its row with the new path."""
    if row.overlay is None:
        return row
    source = home / row.overlay
    target = folder / source.name
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return replace(row, overlay=str(target))


def _rows(store: Store, studies: Sequence[str]) -> Scored:
    chosen = [Filters(study=study) for study in dict.fromkeys(studies)]
    return Scored(
        tuple(row for each in chosen for row in store.query(each)),
        tuple(row for each in chosen for row in store.images(each)),
    )
