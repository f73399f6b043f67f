"""The analytical note: what was trained, how it did, what each part of the method bought.

It is written from a folder of records alone (:class:`training.crossval.Record`):

- ``generalist.json``: the method in full, over all folds;
- ``trunks/*/``: where each fold began with a trunk of its own, ``run.json`` and ``outcome.json`` of
  each, and of the trunk of ``all`` folds;
- ``specialists/*.json``: networks of some areas, held against it on the studies that both scored;
- ``variants/*.json``: the same with a part of the method changed, held against it;
- ``parts/*.json``: shorter trainings, each with a part of the method changed, held against
  ``parts/base.json``;
- ``data.json``: what ``data report --json`` said of the films;
- ``remarks.md``: what no record knows of itself.

Pictures of films need the films and the networks; those of the same record that stand beside the
note stay.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markdown_it import MarkdownIt

from mura_batch.area import Area
from mura_batch.atomic import write_atomic
from mura_batch.config import NOTICE
from mura_batch.errors import Misconfigured
from training.calibration import cross_fitted_rates
from training.crossval import ALL_FOLDS, FOLD, Fold, Record, paired, trunks_of
from training.dataset import ALL_AREAS
from training.evaluate import (
    Evaluation,
    FilmScore,
    both_labels,
    by_study,
    cases_of,
    evaluate,
)
from training.metrics import (
    Cases,
    Estimate,
    auc_of,
    difference,
    ece_of,
    resampled,
    roc_auc,
)
from training.pictures import pictures_of
from training.plots import STYLE, loss_curves, plots
from training.publish import decided_by, deciding_of
from training.settings import FitSettings
from training.sources.mura import PUBLISHED_IMAGES, PUBLISHED_STUDIES

GENERALIST = "generalist.json"
_BASE = "base"
_IN_FULL = "in full"
_DATA = ("target", "hardware", "unreadable", "problems", "duplicates", "quantiles")
_LONG = ("stages", "start", "areas")  # settings of the other method, told where it stands
_TEMPLATE = "report.md.jinja"
_CONVERTER = "weasyprint"  # HTML to PDF


@dataclass(frozen=True, slots=True)
class Compared:
    """A method beside another, on the studies that both scored.

    Attributes:
        changed: how its settings differ, in words.
        films: that it was trained on, in the mean over the folds that both scored; ``epochs`` and
            ``seconds`` too.
        gain: how much higher its AUC is (paired).
        hit: how often the peak of the evidence touches a box, of all films that have some.
    """

    name: str
    area: str
    changed: str
    folds: int
    films: int
    epochs: int
    seconds: int
    studies: int
    positive: int
    auc: Estimate
    gain: Estimate
    hit: Estimate


class _Calibrated(NamedTuple):
    """The expected calibration error of the study level's probabilities."""

    before: Estimate
    after: Estimate
    crossed: Estimate


def write_note(records: Path, out: Path) -> list[Path]:
    """Write ``REPORT.md``, ``REPORT.html`` and where a converter is installed ``REPORT.pdf``, with
    their figures, into ``out``; return the files.

    Raises:
        Misconfigured: there is no ``generalist.json``, a file is no record, or there is nothing to
            compare in one.
    """
    whole = Record.read(records / GENERALIST)
    if not both_labels(by_study(whole.scores)):
        raise Misconfigured(f"{records / GENERALIST} has scores of one label only, or none.")
    figures = out / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    exams = by_study(whole.scores)
    cases = cases_of(exams, deciding_of(whole).calibration)
    _write(figures / "studies.svg", plots(cases))
    losses = {f"fold {fold.name}": fold.losses for fold in whole.folds}
    _write(figures / "losses.svg", loss_curves(losses))
    base, parts = _parts(records, whole)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=jinja2.select_autoescape(),  # by the template's ending: Markdown has none
    )
    text = environment.get_template(_TEMPLATE).render(
        notice=NOTICE,
        record=whole,
        evaluations=list(_evaluations(whole)),
        all_areas=ALL_AREAS,
        all_folds=ALL_FOLDS,
        fold=FOLD,
        folds=list(_by_fold(whole)),
        rates=cross_fitted_rates(cases_of(exams, None)),
        calibrated=_calibrated(whole),
        grid=whole.settings.preprocessing.size // 32,
        specialists=list(_specialists(records, whole)),
        variants=list(_variants(records, whole)),
        base=base,
        parts=parts,
        data=_data(records / "data.json"),
        mura=list(_mura()),
        outside=sum(one.localised is not None and not one.localised.chance for one in whole.scores),
        pictures=pictures_of(whole, figures),
        records=os.path.relpath(records, out),
        trunks=list(_trunks(whole, records / "trunks")),
        remarks=_remarks(records / "remarks.md"),
    )
    note = out / "REPORT.md"
    _write(note, text)
    page = _page(text)
    _write(note.with_suffix(".html"), page)
    return [note, note.with_suffix(".html"), *_pdf(note.with_suffix(".html"))]


def _remarks(file: Path) -> str:
    """Return what people wrote of the records, more items of the list of limits."""
    try:
        return file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    except (OSError, UnicodeDecodeError) as exc:
        raise Misconfigured(f"{file} cannot be read: {exc}") from exc


def _evaluations(record: Record) -> Iterator[Evaluation]:
    """Yield the figures of each area and of all, at calibration and thresholds of all."""
    deciding = deciding_of(record)
    for area in record.scored_areas:
        yield from evaluate(record.of_area(area), deciding, area)


def _trunks(record: Record, folder: Path) -> Iterator[tuple[Fold, FitSettings, Path]]:
    """Yield each trunk that a fold began with, how it was made, and where its run lay."""
    if FOLD in record.start:
        for trunk, settings in trunks_of(record, lambda name: folder / name):
            yield trunk, settings, Path(record.start.replace(FOLD, trunk.name)).parent


def _by_fold(record: Record) -> Iterator[tuple[Fold, int, int, Estimate]]:
    """Yield each fold with its studies, positive ones, and AUC."""
    for fold in record.folds:
        own = [one for one in record.scores if one.film.split == fold.name]
        cases = cases_of(by_study(own), None)
        yield fold, len(cases.labels), int(cases.labels.sum()), auc_of(cases)


def _calibrated(record: Record) -> _Calibrated:
    """Measure the calibration: none, fitted on the same studies, and on the other folds'."""
    exams = by_study(record.scores)
    raw, fitted = (cases_of(exams, how) for how in (None, deciding_of(record).calibration))
    crossed = raw.probabilities.copy()
    splits = np.array([exam[0].film.split for exam in exams])
    for fold in {*splits}:
        others = [exam for exam in exams if exam[0].film.split != fold]
        if both_labels(others):
            how = decided_by(others, "the other folds").calibration
            crossed[splits == fold] = cases_of(exams, how).probabilities[splits == fold]
    apart = Cases(raw.logits, crossed, raw.labels, raw.patients)
    return _Calibrated(ece_of(raw), ece_of(fitted), ece_of(apart))


# ---- one method beside another


def _specialists(records: Path, whole: Record) -> Iterator[Compared]:
    """Yield each specialist on each of its areas, beside the generalist."""
    for name, record in _records(records / "specialists"):
        for area in record.areas:
            yield from _compared(name, record, whole, area)


def _parts(records: Path, whole: Record) -> tuple[str, list[Compared]]:
    """Return the base's course, and each shorter training beside it with the method in full."""
    found = dict(_records(records / "parts"))
    if not found:
        return "", []
    if _BASE not in found:
        raise Misconfigured(f"{records / 'parts'} holds no {_BASE}.json to compare with.")
    base = found.pop(_BASE)
    every = ((_BASE, base), *found.items(), (_IN_FULL, whole))
    return base.settings.course(), list(_beside(base, every, records / "parts"))


def _variants(records: Path, whole: Record) -> Iterator[Compared]:
    """Yield the method in full, and each full training with a part changed, beside it."""
    if found := _records(records / "variants"):
        yield from _beside(whole, ((_IN_FULL, whole), *found), records / "variants")


def _beside(base: Record, every: Iterable[tuple[str, Record]], folder: Path) -> Iterator[Compared]:
    for name, record in every:
        rows = list(_compared(name, record, base, ALL_AREAS))
        if not rows:
            raise Misconfigured(f"{folder}: {name} shares no studies of both labels to compare by.")
        yield from rows


def _records(folder: Path) -> list[tuple[str, Record]]:
    return [(file.stem, Record.read(file)) for file in sorted(folder.glob("*.json"))]


def _compared(name: str, one: Record, other: Record, area: str) -> Iterator[Compared]:
    """Yield how a method does beside another on an area, if both labels are there."""
    mine, theirs = paired(one, other, area)
    if not both_labels(by_study(mine)):
        return
    cases, others = (cases_of(by_study(scores), None) for scores in (mine, theirs))
    there = {score.film.split for score in mine}
    folds = [fold for fold in one.folds if fold.name in there]
    yield Compared(
        name=name.replace("-", " "),
        area=area,
        changed=_changes(one, other),
        folds=len(folds),
        films=round(np.mean([fold.films for fold in folds])),
        epochs=round(np.mean([len(fold.losses) for fold in folds])),
        seconds=round(np.mean([fold.seconds for fold in folds])),
        studies=len(cases.labels),
        positive=int(cases.labels.sum()),
        auc=auc_of(cases),
        gain=difference(cases, others, roc_auc),
        hit=_hit(mine),
    )


def _hit(scores: Sequence[FilmScore]) -> Estimate:
    boxed = [one for one in scores if one.localised is not None]
    if not boxed:
        return Estimate(None, None, None)
    hits = np.array([float(one.localised.hit) for one in boxed if one.localised is not None])
    return resampled(hits, [one.film.patient for one in boxed], np.ones(len(boxed), bool))


def _changes(one: Record, other: Record) -> str:
    """Say how the settings differ: those of the first, then of the other in brackets if short."""
    mine, theirs = _flat(one), _flat(other)
    told = (
        f"{name.replace('_', ' ')} {mine[name]}" + ("" if name in _LONG else f" ({theirs[name]})")
        for name in mine
        if mine[name] != theirs[name]
    )
    return "; ".join(told)


def _flat(record: Record) -> dict[str, object]:
    settings = asdict(record.settings)
    spec = settings.pop("preprocessing")
    told = ", then ".join(stage.words() for stage in record.settings.stages)
    areas = "all" if set(record.areas) == set(Area) else " and ".join(record.areas)
    return {**settings, **spec, "stages": told, "start": record.start, "areas": areas}


# ---- data


def _data(file: Path) -> dict[str, Any] | None:
    """Return what a data report said, with one row an area over all splits."""
    if not file.exists():
        return None
    try:
        told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        rows: dict[str, list[int]] = {}
        for count in told["counts"]:
            own = rows.setdefault(count["area"], [0, 0, 0])
            for place, name in enumerate(("studies", "positive", "images")):
                own[place] += count[name]
        across = Counter(side for group in told["duplicates"] for side in group["across"])
        shown = {name: told[name] for name in _DATA}
        return {**shown, "rows": sorted(rows.items()), "across": across}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
        raise Misconfigured(f"{file} is no data report in JSON: {exc!r}") from exc


def _mura() -> Iterator[tuple[str, tuple[int, int], int, tuple[int, int], int]]:
    """Yield an area, studies without and with an abnormality and images, of train and valid."""
    train, valid = (PUBLISHED_STUDIES[split] for split in ("train", "valid"))
    images = PUBLISHED_IMAGES
    for area, counts in train.items():
        yield area, counts, images["train"][area], valid[area], images["valid"][area]


# ---- files


def _page(text: str) -> str:
    body = MarkdownIt().enable("table").render(text)
    head = '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Training</title>'
    return f"{head}\n{STYLE}\n{body}</html>\n"


def _pdf(page: Path) -> Iterator[Path]:
    """Yield the page as PDF where the converter is installed.

    Raises:
        Misconfigured: it fails.
    """
    target = page.with_suffix(".pdf")
    target.unlink(missing_ok=True)
    if found := shutil.which(_CONVERTER):
        done = subprocess.run(  # noqa: S603 - no shell, a program found by a fixed name
            [found, str(page), str(target)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Misconfigured(f"{_CONVERTER} cannot make {target}: {done.stderr.strip()[-200:]}")
        yield target


def _write(file: Path, text: str) -> None:
    write_atomic(file, lambda stream: stream.write(text.encode()))
