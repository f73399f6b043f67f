"""Films under their evidence, out of fold: rightly decided or not, looked at in the right place
or not.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from mura_batch.atomic import write_atomic
from mura_batch.errors import Misconfigured
from mura_batch.network_input import Box, Luminance
from mura_batch.overlay import thumbnail
from mura_batch.radiograph import read_film
from mura_batch.runtime import Inference
from training.crossval import Record, load_run
from training.dataset import Film
from training.evaluate import FilmScore, cases_of
from training.publish import deciding_of
from training.run_folder import read_settings, write_json

_TOLD = "pictures.json"  # says of which record the pictures are
_EACH = 4  # films of a group
_GROUPS = ("found", "found elsewhere", "overlooked", "false alarm", "cleared")


class _Chosen(NamedTuple):
    group: str
    film: Film
    probability: float


class _Seen(NamedTuple):
    luminance: Luminance
    box: Box
    evidence: NDArray[np.float32]


def draw(record: Record, films: Sequence[Film], run: Path, folder: Path) -> None:
    """Draw some films of each group that decisions end in, a JPEG a group.

    ``run`` is the cross-validation's folder, or holds some of its folds: a film is seen by the
    network that was trained without its fold.

    Raises:
        Misconfigured: a film or a network cannot be read, or there is none.
    """
    known = {film.identity: film for film in films}
    chosen = _chosen(record, run)
    if missing := [one.film.name for one in chosen if one.film.identity not in known]:
        raise Misconfigured(f"These data have no film {missing[0]} of the record: name its data.")
    chosen = [one._replace(film=known[one.film.identity]) for one in chosen]
    seen = _seen([one.film for one in chosen], run)
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number, group in enumerate(_GROUPS, start=1):
        some = [one for one in chosen if one.group == group]
        figure = Figure(figsize=(3 * _EACH, 3.4), layout="constrained")
        places = figure.subplots(1, _EACH)
        for axes in places[len(some) :]:
            axes.set_axis_off()
        for axes, one in zip(places, some, strict=False):
            _draw(axes, one, seen[one.film.identity])
        figure.suptitle(f"{group}, research use only")
        name = f"{number}-{group.replace(' ', '-')}.jpg"
        write_atomic(folder / name, partial(figure.savefig, format="jpeg", dpi=80))
        names.append(name)
    write_json({"record": record.digest(), "pictures": names}, folder / _TOLD)


def pictures_of(record: Record, folder: Path) -> list[str]:
    """Return the names of the pictures in a folder that were drawn of this very record."""
    try:
        told = json.loads((folder / _TOLD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    return told["pictures"] if told["record"] == record.digest() else []


def _chosen(record: Record, run: Path) -> list[_Chosen]:
    """Return of each group the films nearest to its median probability, of the folds in ``run``."""
    there = {fold.name for fold in record.folds if (run / f"fold-{fold.name}/network.pt").exists()}
    if not there:
        raise Misconfigured(f"{run} holds no network of the record's folds: name their folder.")
    deciding = deciding_of(record)
    cases = cases_of([[one] for one in record.scores], deciding.calibration)
    groups: defaultdict[str, list[_Chosen]] = defaultdict(list)
    for one, told in zip(record.scores, cases.probabilities.tolist(), strict=True):
        if one.film.split in there:
            group = _group(one, positive=told >= deciding.thresholds["balanced"])
            groups[group].append(_Chosen(group, one.film, told))
    chosen = []
    for some in groups.values():
        middle = float(np.median([one.probability for one in some]))
        near = sorted(some, key=lambda one: (abs(one.probability - middle), one.film.path.name))
        chosen += near[:_EACH]
    return chosen


def _group(one: FilmScore, *, positive: bool) -> str:
    if not one.film.label:
        return "false alarm" if positive else "cleared"
    if not positive:
        return "overlooked"
    return "found" if one.localised is not None and one.localised.hit else "found elsewhere"


def _seen(films: Sequence[Film], run: Path) -> Mapping[tuple[str, str, str], _Seen]:
    """Return what the networks saw of films."""
    seen = {}
    for fold in {film.split for film in films}:
        own = run / f"fold-{fold}"
        spec, runtime = read_settings(own / "run.json").preprocessing, load_run(own)
        for film in (film for film in films if film.split == fold):
            with film.named():
                luminance, given = read_film(film.path, film.frame, spec)
            found = Inference.joined(runtime.infer(given.pixels[None]))
            seen[film.identity] = _Seen(luminance, given.box, found.maps[0])
    return seen


def _draw(axes: Axes, one: _Chosen, seen: _Seen) -> None:
    """Draw a film under the positive part of its evidence, with its boxes."""
    height, width = seen.luminance.shape
    whole = (0, width, height, 0)
    box = seen.box
    axes.imshow(thumbnail(seen.luminance, box).pixels, cmap="gray", extent=whole)
    heat = np.maximum(seen.evidence, 0)
    reach = (box.left, box.right, box.bottom, box.top)
    axes.imshow(heat, cmap="inferno", vmin=0, alpha=0.4, extent=reach, interpolation="bilinear")
    for it in one.film.boxes:
        corner = ((it.x - it.width / 2) * width, (it.y - it.height / 2) * height)
        size = (it.width * width, it.height * height)
        axes.add_patch(Rectangle(corner, *size, fill=False, ls="--", ec="cyan"))
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.set_title(f"{one.film.path.stem}: {one.probability:.2f}", fontsize=9)
