"""A network of all films is published with what its like reached on films that they never saw."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_atlas import TINY, write_atlas

from mura_batch.area import Area
from mura_batch.errors import Misconfigured
from mura_batch.weights import read_card, read_weights
from training.crossval import Fold, Record, score_run, study_figures
from training.dataset import Dataset
from training.fit import fit
from training.localisation import Localised
from training.publish import publish_bundled
from training.run_folder import state_digest, write_json
from training.settings import FitSettings
from training.sources import fracatlas
from training.start import state_of


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return fracatlas.read(write_atlas(tmp_path_factory.mktemp("atlas")))


@pytest.fixture(scope="module")
def runs(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a fold, and one of all films."""
    folder = tmp_path_factory.mktemp("runs")
    fit(data, folder / "without-0", TINY, held_out=["0"], workers=0)
    fit(data, folder / "all", TINY, workers=0)
    return folder


@pytest.fixture(scope="module")
def record(data: Dataset, runs: Path) -> Record:
    unseen = [film for film in data.films if film.split == "0"]
    scores = tuple(
        replace(
            one,
            film=replace(one.film, study=f"{one.film.study}-{n}", patient=f"{n}{one.film.patient}"),
            logit=one.logit + 5 * one.film.label,  # else some thresholds find none
            localised=Localised(hit=True, chance=0.1, energy=0.5, overlap=0.2)
            if one.film.label
            else None,
        )
        for n in range(4)  # else they are too few to estimate anything
        for one in score_run(runs / "without-0", unseen)
    )
    start = json.loads((runs / "all/run.json").read_text())["start"]
    fold = Fold("0", start, 10, "data", 1, (0.5,), {"torch": "2.8"}, 1)
    return Record(TINY, "nothing", data.target, ("XR_HAND",), (fold,), scores)


def test_weights_are_published_with_what_they_reach_on_what_they_never_saw(
    data: Dataset, runs: Path, record: Record, tmp_path: Path
) -> None:
    write_json(record.to_json(), tmp_path / "record.json")
    kept = Record.read(tmp_path / "record.json")
    assert kept.settings == TINY
    assert [one.logit for one in kept.scores] == [one.logit for one in record.scores]
    assert [one.film for one in kept.scores] == [
        replace(one.film, path=Path(one.film.path.name), where="") for one in record.scores
    ]

    better = tuple(replace(one, logit=one.logit + 9 * one.film.label) for one in kept.scores)
    special = [replace(kept, scores=better)]
    file = publish_bundled(data.films, kept, runs / "all", tmp_path / "bundle", special)
    for area in Area:
        card = read_card(tmp_path / "bundle/cards" / f"{area}.json")
        assert card.area is area
        assert card.preprocessing == TINY.preprocessing
        assert read_weights(file, card) is not None
    hand = read_card(tmp_path / "bundle/cards/XR_HAND.json")
    assert f"AUC {hand.metrics['study_auc'].value:.3f}" in next(iter(study_figures(kept)))
    assert "Fine-tuned for XR_HAND, it reached an AUC of 1.000" in hand.notes
    assert "Fine-tuned" not in read_card(tmp_path / "bundle/cards/XR_WRIST.json").notes
    assert hand.metrics["study_auc"].on.startswith("20 studies")
    assert hand.metrics["peak_touches_box"].value == 1
    before = {path: path.read_bytes() for path in (tmp_path / "bundle").rglob("*.*")}
    one_label = tuple(one for one in record.scores if not one.film.label)
    with pytest.raises(Misconfigured, match="one label only"):
        publish_bundled(
            data.films, replace(kept, scores=one_label), runs / "all", tmp_path / "bundle"
        )
    assert {path: path.read_bytes() for path in (tmp_path / "bundle").rglob("*.*")} == before
    (tmp_path / "record.json").write_text("{}")
    with pytest.raises(Misconfigured, match="no record"):
        Record.read(tmp_path / "record.json")


def test_what_was_trained_otherwise_than_it_was_measured_is_not_published(
    data: Dataset, runs: Path, record: Record, tmp_path: Path
) -> None:
    def refused(of: Record, run: Path, why: str) -> None:
        with pytest.raises(Misconfigured, match=why):
            publish_bundled(data.films, of, run, tmp_path / "bundle")

    refused(record, runs / "without-0", "without some folds")
    refused(replace(record, settings=FitSettings()), runs / "all", "other settings")
    otherwise = replace(record, folds=(replace(record.folds[0], start="0"),))
    refused(otherwise, runs / "all", "began otherwise")
    two = replace(record, folds=(*record.folds, *otherwise.folds))
    refused(two, runs / "all", "began otherwise")


def test_where_each_fold_began_with_a_trunk_of_its_own_the_published_one_has_seen_all(
    data: Dataset, runs: Path, record: Record, tmp_path: Path
) -> None:
    trunk = str(tmp_path / "trunk-{fold}/network.pt")
    for name, source in (("0", "without-0"), ("all", "all")):
        shutil.copytree(runs / source, tmp_path / f"trunk-{name}")
    own, every = (
        state_digest(state_of(trunk.replace("{fold}", name)) or {}) for name in ("0", "all")
    )
    record = replace(record, start=trunk, folds=(replace(record.folds[0], start=own),))

    def published(run: Path, record: Record = record) -> Path:
        return publish_bundled(data.films, record, run, tmp_path / "bundle")

    with pytest.raises(Misconfigured, match="began otherwise"):
        published(runs / "all")
    begun = tmp_path / "begun"
    fit(data, begun, TINY, start=state_of(trunk.replace("{fold}", "all")), workers=0)
    assert json.loads((begun / "run.json").read_text())["start"] == every
    assert published(begun).exists()
    other = replace(record, folds=(replace(record.folds[0], start=every),))
    with pytest.raises(Misconfigured, match="The fold 0 did not begin with"):
        published(begun, other)
    told = tmp_path / "trunk-0/run.json"
    sound = told.read_text()
    for change, why in (
        ({"held_out": []}, "without no fold, not without 0"),
        ({"settings": json.loads(sound)["settings"] | {"rate": 1e-5}}, "with other settings"),
    ):
        told.write_text(json.dumps(json.loads(sound) | change))
        with pytest.raises(Misconfigured, match=why):
            published(begun)
    told.write_text(sound)
    shutil.rmtree(tmp_path / "trunk-all")
    shutil.copytree(runs / "without-0", tmp_path / "trunk-all")
    with pytest.raises(Misconfigured, match="without 0, not without no fold"):
        published(begun)
