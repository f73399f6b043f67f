"""From labelled films to weights with a card; small, but the real way."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mura_tree import make_tree
from test_training_data import write_manifest
from tiny_atlas import TINY, write_atlas
from torchvision.models import DenseNet121_Weights, densenet121

from mura_batch.area import Area
from mura_batch.errors import Misconfigured, Transient, WeightsRefused
from mura_batch.network import EvidenceNet
from mura_batch.preprocessing import Preprocessing
from mura_batch.weights import BUNDLED, WeightsStore, bundled_card
from mura_batch.weights_import import Facts, import_checkpoint, load_checkpoint
from training.crossval import Fold, Record, join, score_run
from training.dataset import Film, Region
from training.evaluate import FilmScore
from training.fit import divide, fit
from training.loader import Drawn
from training.objectives import film_order, film_weights
from training.optimisation import parameter_groups, warm_cosines
from training.prepared import Prepared
from training.run_folder import alone_in, write_json
from training.settings import TRUNK, FitSettings, Stage
from training.sources import fracatlas, read
from training.start import obtained, settings_for, state_of


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_atlas(tmp_path_factory.mktemp("atlas"))


def test_films_that_show_no_upper_limb_are_left_out(atlas: Path) -> None:
    films = fracatlas.read(atlas).films
    assert len(films) == 21
    assert {f.split for f in films if f.area == "XR_HAND"} == {"0", "1"}
    assert [f.split for f in films if f.area == "leg"] == [""]


@pytest.fixture(scope="module")
def whole(atlas: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody cut off."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    fit(fracatlas.read(atlas), run, TINY, held_out=["0"], workers=0)
    return run


def same_networks(*runs: Path) -> bool:
    one, other = (torch.load(run / "network.pt", weights_only=True) for run in runs)
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_cut_off_run_goes_on_to_the_same_network(
    atlas: Path, whole: Path, tmp_path: Path
) -> None:
    data = fracatlas.read(atlas)
    for epochs in (1, 2):  # the end of phase one, and the middle of phase two
        fit(data, tmp_path / "cut", TINY, held_out=["0"], workers=1, stop_after=epochs)
        assert not (tmp_path / "cut/network.pt").exists()
    fit(data, tmp_path / "cut", TINY, held_out=["0"], workers=2)
    assert same_networks(whole, tmp_path / "cut")
    logs = [(run / "log.csv").read_text() for run in (whole, tmp_path / "cut")]
    assert logs[0] == logs[1]
    assert len(logs[0].splitlines()) == 1 + 4
    with pytest.raises(Misconfigured, match=r"another run \(data differ\)"):
        fit(data, tmp_path / "cut", TINY, held_out=["1"])
    with pytest.raises(Misconfigured, match=r"another run \(settings differ\)"):
        fit(data, tmp_path / "cut", replace(TINY, rate=1.0), held_out=["0"])


@pytest.mark.skipif(  # a CPU is held to the same bits above; only a GPU adds in any order
    not torch.cuda.is_available(), reason="needs a CUDA device, which adds in any order"
)
def test_a_cut_off_run_goes_on_to_nearly_the_same_network_on_a_gpu(
    atlas: Path, tmp_path: Path
) -> None:
    data = fracatlas.read(atlas)
    named = {"held_out": ["0"], "device": "cuda:0", "workers": 0}
    fit(data, tmp_path / "whole", TINY, **named)
    fit(data, tmp_path / "cut", TINY, **named, stop_after=2)
    fit(data, tmp_path / "cut", TINY, **named)
    one, other = (score_run(tmp_path / name, data.films, "cuda:0") for name in ("whole", "cut"))
    apart = [abs(a.logit - b.logit) for a, b in zip(one, other, strict=True)]
    assert max(apart) < 0.05


def test_each_fold_is_scored_by_a_network_that_never_saw_it(
    atlas: Path, whole: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "training", "cross-validate", str(atlas), str(tmp_path / "cv")]
    command += ["--settings", str(whole / "run.json"), "--workers", "0"]
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, check=True, capture_output=True, text=True
    )
    record = Record.read(tmp_path / "cv/record.json")
    assert record.settings == TINY
    assert [fold.name for fold in record.folds] == ["0", "1"]
    assert all(len(fold.losses) == 4 and fold.seconds > 0 for fold in record.folds)
    films = {film.path.name: film for film in fracatlas.read(atlas).films}
    assert len(record.scores) == 20
    for one in record.scores:
        film = films[one.film.path.name]
        assert (one.film.split, one.film.label) == (film.split, film.label)
    unseen = [film for film in films.values() if film.split == "1"]
    again = score_run(tmp_path / "cv/fold-1", unseen)
    assert [one.logit for one in again] == [
        one.logit for one in record.scores if one.film.split == "1"
    ]
    assert "all areas: 10 studies, 4 positive, AUC" in done.stdout


def test_folds_that_end_at_the_same_time_all_join_the_record(tmp_path: Path) -> None:
    names = [str(number) for number in range(24)]
    method = Record(TINY, "nothing", "fracture", ("XR_HAND",), (), ())

    def end(name: str) -> None:
        film = Film(Path(f"{name}.png"), name, name, "XR_HAND", 1, split=name)
        fold = Fold(name, "start", 1, "data", 1, (0.5,), {"torch": "2.8"}, 1)
        join(tmp_path, method, fold, [FilmScore(film, 0.5, None)])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(end, names))
    record = Record.read(tmp_path / "record.json")
    assert {fold.name for fold in record.folds} == {*names}
    assert {score.film.split for score in record.scores} == {*names}


def test_a_run_killed_at_any_moment_goes_on(atlas: Path, whole: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from tiny_atlas import TINY\n"
        "from training.fit import fit; from training.sources import fracatlas\n"
        "fit(fracatlas.read(Path(sys.argv[1])), Path(sys.argv[2]), TINY, held_out=['0'], workers=0)"
    )
    run = tmp_path / "run"
    command = [sys.executable, "-c", script, str(atlas), str(run)]
    with subprocess.Popen(command, cwd=Path(__file__).parent) as child:
        while child.poll() is None and not (run / "state.pt").exists():
            time.sleep(0.01)
        child.kill()
    subprocess.run(command, cwd=Path(__file__).parent, check=True)
    assert same_networks(whole, run)


def test_one_process_at_a_time_trains_in_a_folder(atlas: Path, tmp_path: Path) -> None:
    data = fracatlas.read(atlas)
    with alone_in(tmp_path / "run"), pytest.raises(Transient, match="another process"):
        fit(data, tmp_path / "run", TINY, held_out=["0"], workers=0)


def everything(atlas: Path, run: Path, settings: FitSettings) -> list[float]:
    """Train with boxes on every film, and return the losses of the epochs."""
    data = fracatlas.read(atlas)
    films = (replace(f, boxes=(Region(0.4, 0.5, 0.4, 0.3),) * f.label) for f in data.films)
    fit(replace(data, films=tuple(films)), run, settings, held_out=["0"], workers=0)
    with (run / "log.csv").open(newline="") as stream:
        return [float(row["loss"]) for row in csv.DictReader(stream)]


def test_the_mean_of_the_networks_that_stages_end_with_is_taken(
    atlas: Path, tmp_path: Path
) -> None:
    data = fracatlas.read(atlas)
    stages = (Stage(64, 1), Stage(32, 1, crops=True), Stage(64, 1, frozen=2))
    last = replace(TINY, head_epochs=0, patience=None, stages=stages)
    mean = replace(last, swa=True)
    assert (last.ends, mean.ends) == ((), (1, 3))
    fit(data, tmp_path / "first", replace(last, stages=stages[:1]), workers=0)
    fit(data, tmp_path / "last", last, workers=0)
    fit(data, tmp_path / "mean", mean, workers=0, stop_after=2)
    fit(data, tmp_path / "mean", mean, workers=0)
    first, after, both = (
        torch.load(tmp_path / name / "network.pt", weights_only=True)
        for name in ("first", "last", "mean")
    )
    name = "features.denseblock4.denselayer16.conv2.weight"
    assert not torch.equal(first[name], after[name])
    for name, tensor in both.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, (first[name] + after[name]) / 2)


def test_what_is_asked_besides_counts_in_the_loss(atlas: Path, tmp_path: Path) -> None:
    one = replace(TINY, head_epochs=0, stages=(Stage(64, 1),))
    plain, *_ = everything(atlas, tmp_path / "plain", one)
    for name in ("inside", "steady", "joint"):
        besides, *_ = everything(atlas, tmp_path / name, replace(one, **{name: 1.0}))
        assert besides > plain
    staged = replace(one, stages=(Stage(64, 1, inside=1.0),))
    inside, *_ = everything(atlas, tmp_path / "staged", staged)
    assert inside > plain
    cropped = replace(one, stages=(Stage(32, 1, crops=True), Stage(64, 1)), inside=0.5)
    assert len(everything(atlas, tmp_path / "crops", cropped)) == 2


def test_a_hybrid_is_trained_scored_and_begun_with(atlas: Path, tmp_path: Path) -> None:
    hybrid = replace(
        TINY, architecture="densenet121-transformer", head_epochs=1, stages=(Stage(64, 1),)
    )
    torch.manual_seed(4)
    trunk = EvidenceNet().state_dict()
    data = fracatlas.read(atlas)
    fit(data, tmp_path / "run", hybrid, held_out=["0"], start=trunk, workers=0)
    scores = score_run(tmp_path / "run", [film for film in data.films if film.split == "0"])
    assert len({round(one.logit, 6) for one in scores}) > 1
    state = state_of(str(tmp_path / "run/network.pt"))
    assert state is not None
    assert "encoder.layers.0.linear1.weight" in state


def moved(atlas: Path, run: Path, settings: FitSettings) -> set[str]:
    """Return which tensors of the network one epoch has moved."""
    state = EvidenceNet().state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    data = fracatlas.read(atlas)
    fit(data, run, replace(settings, average=0.0), start=state, workers=0, stop_after=1)
    after = torch.load(run / "state.pt", weights_only=True)["average"]
    return {
        name.removeprefix("module.")
        for name, tensor in after.items()
        if name != "n_averaged" and not torch.equal(tensor, before[name.removeprefix("module.")])
    }


def test_phase_one_moves_the_head_alone(atlas: Path, tmp_path: Path) -> None:
    assert moved(atlas, tmp_path / "run", TINY) == {"classifier.weight", "classifier.bias"}


def test_frozen_blocks_stay_as_they_are(atlas: Path, tmp_path: Path) -> None:
    frozen = replace(TINY, head_epochs=0, stages=(Stage(64, 1, frozen=2),))
    upper = {"denseblock3", "transition3", "denseblock4", "norm5", "classifier"}
    changed = moved(atlas, tmp_path / "run", frozen)
    assert {name.removeprefix("features.").split(".")[0] for name in changed} == upper


def test_blocks_learn_more_slowly_the_deeper_they_lie() -> None:
    network = EvidenceNet()
    groups = parameter_groups(network, FitSettings(rate=1.0, block_decay=0.5), "all")
    parameters = [p for group in groups for p in group["params"]]
    assert {id(p) for p in parameters} == {id(p) for p in network.parameters()}
    assert len(parameters) == len(list(network.parameters()))
    rates = [group["lr"] for group in groups[::2]]
    assert rates == [1, 0.5, 0.25, 0.125, 0.0625, 0.03125]
    assert all(p.ndim > 1 for group in groups if group["weight_decay"] for p in group["params"])
    head = parameter_groups(network, FitSettings(), "head")
    assert sum(len(group["params"]) for group in head) == 2


@given(st.lists(st.integers(2, 300), min_size=1, max_size=3))
def test_each_stage_learns_at_a_rate_that_rises_and_falls(stages: list[int]) -> None:
    factor, first = warm_cosines(stages), 0
    for steps in stages:
        rates = [factor(step) for step in range(first, first + steps)]
        height = rates.index(1.0)
        assert rates[: height + 1] == sorted(rates[: height + 1])
        assert rates[height:] == sorted(rates[height:], reverse=True)
        assert height <= steps / 10 + 1
        assert rates[-1] <= (math.pi / steps) ** 2  # what a cosine has left before its last step
        first += steps
    assert factor(first) == pytest.approx(0, abs=1e-9)


def test_classes_weigh_as_much_as_the_other_has_films() -> None:
    films = [Film(Path(), "s", "p", "XR_HAND", label) for label in (0, 0, 0, 1)]
    assert film_weights(films, "mura").tolist() == [0.25, 0.25, 0.25, 0.75]
    heavy = [replace(film, weight=2.0) for film in films]
    assert film_weights(heavy, "none").tolist() == [2, 2, 2, 2]


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 50))
def test_balanced_epochs_show_either_label_as_often_and_all_of_its_films_alike(
    negative: int, positive: int, seed: int
) -> None:
    labels = np.repeat([0, 1], [negative, positive])
    order = film_order(labels, "balanced", np.random.default_rng(seed))
    shown = np.bincount(order, minlength=len(labels))
    assert len(order) == len(labels)
    assert abs(shown[labels == 0].sum() - shown[labels == 1].sum()) <= 1
    assert all(np.ptp(shown[labels == label]) <= 1 for label in (0, 1))
    assert sorted(film_order(labels, "mura", np.random.default_rng(seed))) == [*range(len(labels))]


@given(st.integers(0, 50))
def test_no_patient_stands_on_both_sides(seed: int) -> None:
    films = [
        Film(Path(), f"s{n}", f"p{n % 13}", "XR_HAND", int(n % 3 == 0), split=str(n % 13 % 2))
        for n in range(60)
    ]
    settings = FitSettings(seed=seed, aside=0.34)
    train, aside = divide(films, ["1"], settings)
    assert {film.study for film in train + aside} == {f.study for f in films if f.split == "0"}
    assert not {film.patient for film in train} & {film.patient for film in aside}
    assert divide(films, ["1"], settings) == (train, aside)
    assert divide(films, ["1"], replace(settings, patience=None)).aside == ()


def test_too_few_patients_and_one_label_are_refused(atlas: Path, tmp_path: Path) -> None:
    data = fracatlas.read(atlas)
    with pytest.raises(Misconfigured, match="patients of one label are too few"):
        fit(data, tmp_path / "run", replace(TINY, aside=0.1))
    alone = replace(data, films=tuple(f for f in data.films if f.label == 0))
    for settings in (TINY, replace(TINY, patience=None)):
        with pytest.raises(Misconfigured, match=r"have the label 0, that of .*labels\.csv:4"):
            fit(alone, tmp_path / "run", settings)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_ends_the_run(atlas: Path, tmp_path: Path) -> None:
    data = fracatlas.read(atlas)
    state = {name: tensor * torch.nan for name, tensor in EvidenceNet().state_dict().items()}
    with pytest.raises(Misconfigured, match="The loss is nan in epoch 1 of 4"):
        fit(data, tmp_path / "run", TINY, start=state, workers=0)
    assert not (tmp_path / "run/network.pt").exists()


def test_a_film_is_drawn_alike_whoever_draws_it(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (4, 40, 40), np.uint8)
    np.save(tmp_path / "films.npy", pixels)
    films = Prepared(tmp_path / "films.npy", ((),) * 4)
    one = Drawn(films, [0] * 4, whole=64, strength=1.0, seed=5)
    one.begin(2, [3, 0, 1, 3], 32)
    other = copy.deepcopy(one)
    last = other[3].film
    torch.manual_seed(99)
    assert last.shape == (32, 32)
    assert torch.equal(one[3].film, last)
    assert not torch.equal(one[0].film, last)  # the same film, drawn anew
    other.begin(3, [3, 0, 1, 3], 32)
    assert not torch.equal(one[1].film, other[1].film)


@pytest.mark.parametrize("crops", [True, False])
def test_boxes_go_along_with_what_is_drawn(tmp_path: Path, *, crops: bool) -> None:
    box = (0.25, 0.4, 0.75, 0.7)
    film = np.zeros((96, 96), np.uint8)
    film[38:67, 24:72] = 200
    np.save(tmp_path / "films.npy", np.stack([film] * 40))
    drawn = Drawn(
        Prepared(tmp_path / "films.npy", ((box,),) * 40), [1] * 40, whole=160, strength=1.0, seed=2
    )
    drawn.begin(1, range(40), 64, crops=crops)
    labels = set()
    for draw in (drawn[number] for number in range(40)):
        seen = (draw.film.float() > 60).float().view(2, 32, 2, 32).mean(dim=(1, 3))
        assert torch.allclose(seen, draw.boxes, atol=0.1)
        if draw.counts:
            labels.add(float(draw.label))
            assert draw.boxes.any() if draw.label else draw.boxes.mean() < 0.2
    assert labels == ({0.0, 1.0} if crops else {1.0})


def test_crops_are_not_drawn_where_no_boxes_say_what_they_show(tmp_path: Path) -> None:
    np.save(tmp_path / "films.npy", np.zeros((2, 40, 40), np.uint8))
    bare = Drawn(Prepared(tmp_path / "films.npy", ((), ())), [0, 1], whole=64, strength=0, seed=1)
    bare.begin(0, range(2), 32, crops=True)
    assert [float(bare[n].label) for n in (0, 1)] == [0, 1]
    assert all(bare[n].counts for n in (0, 1))


def test_a_film_that_cannot_be_read_is_named_and_leaves_no_run(tmp_path: Path) -> None:
    file = write_manifest(tmp_path)
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:-300])
    tiny = replace(TINY, patience=None, batch=2)
    with pytest.raises(Misconfigured, match=r"manifest\.csv:4: 2\.png: the image is cut off"):
        fit(read(file), tmp_path / "run", tiny)
    assert not (tmp_path / "run").exists()
    with pytest.raises(Misconfigured, match="No film is in the split vaild; splits: 0"):
        fit(read(file), tmp_path / "run", tiny, held_out=["vaild"])
    with pytest.raises(Misconfigured, match="less than a batch of 16"):
        fit(read(file), tmp_path / "run", replace(tiny, batch=16))
    with pytest.raises(Misconfigured, match="nonsense"):
        fit(read(file), tmp_path / "run", tiny, device="nonsense")


def test_a_damaged_run_folder_says_what_to_do(atlas: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "network.pt").unlink()
    state = torch.load(run / "state.pt", weights_only=True)
    of_another = pickled(state | {"network": {"conv": torch.zeros(1)}})
    long = state["history"] * 100
    odd = [
        pickled(state | changed)
        for changed in ({"history": 5}, {"history": long}, {"ends": [1]}, {"schedule": None})
    ]
    short = b"\x80\x02."  # a pickle of nothing
    empty = pickled({"history": []})
    for content in (b"PK damaged", b"", short, empty, pickled([1]), of_another, *odd):
        (run / "state.pt").write_bytes(content)
        with pytest.raises(Misconfigured, match=r"state\.pt is damaged: remove \S*run to begin"):
            fit(fracatlas.read(atlas), run, TINY, held_out=["0"], workers=0)
    (run / "network.pt").write_bytes((whole / "network.pt").read_bytes()[:5000])
    with pytest.raises(Misconfigured, match=r"network\.pt is damaged: remove \S*run to begin"):
        fit(fracatlas.read(atlas), run, TINY, held_out=["0"], workers=0)
    (run / "network.pt").unlink()
    (run / "run.json").write_text("{}")
    with pytest.raises(Misconfigured, match=r"run\.json is damaged"):
        fit(fracatlas.read(atlas), run, TINY, held_out=["0"], workers=0)
    (run / "run.json").unlink()
    with pytest.raises(Misconfigured, match=r"without run\.json"):
        fit(fracatlas.read(atlas), run, TINY, held_out=["0"], workers=0)


def pickled(state: object) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def test_a_run_is_imported_as_what_it_is(whole: Path, tmp_path: Path) -> None:
    """Nothing in a state tells how films were seen, nor log-sum-exp pooling from the mean."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    told = json.loads((run / "run.json").read_text())
    settings = told["settings"] | {"architecture": "densenet121-lse"}
    (run / "run.json").write_text(json.dumps(told | {"settings": settings}))
    store = WeightsStore(tmp_path / "weights")
    card = import_checkpoint(run / "network.pt", Facts(area=Area.XR_HAND), store)
    assert (card.architecture, card.preprocessing) == ("densenet121-lse", TINY.preprocessing)
    assert card.target == "fracture"
    assert card.training_data.startswith(f"{told['films']} films (data ")
    (run / "run.json").write_text("{}")
    with pytest.raises(WeightsRefused, match=r"run\.json is damaged"):
        load_checkpoint(run / "network.pt", Area.XR_HAND)


def test_what_a_network_starts_with(whole: Path, tmp_path: Path) -> None:
    assert state_of("nothing") is None
    assert settings_for("nothing").head_epochs == 0
    assert settings_for("bundled").preprocessing == bundled_card(Area.XR_HAND).preprocessing
    assert settings_for("imagenet").preprocessing == Preprocessing()
    assert settings_for(str(whole / "network.pt")).preprocessing == TINY.preprocessing
    hybrid = replace(TRUNK, architecture="densenet121-transformer")
    write_json({"settings": asdict(hybrid)}, tmp_path / "run.json")
    assert settings_for(str(tmp_path / "network.pt")).architecture == hybrid.architecture
    for name in ("", "."):
        with pytest.raises(Misconfigured, match="takes nothing, imagenet"):
            settings_for(name)
    (tmp_path / "short.pt").write_bytes(b"\x80\x02.")
    with pytest.raises(Misconfigured, match="is no network's state"):
        state_of(str(tmp_path / "short.pt"))
    bundled = state_of("bundled")
    assert bundled is not None
    torch.save(bundled, tmp_path / "network.pt")
    found = state_of(str(tmp_path / "network.pt"))
    assert all(torch.equal(found[name], bundled[name]) for name in bundled)
    weights = state_of(str(BUNDLED / "generalist.safetensors"))
    assert torch.equal(weights["classifier.bias"], bundled["classifier.bias"])
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("no network")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save(bundled | {"classifier.bias": torch.zeros(7)}, tmp_path / "shape.pt")
    for name, told in (
        ("other.pt", "another network"),
        ("shape.pt", "another network"),
        ("text.pt", "no network's state"),
        ("empty.pt", "no network's state"),
        ("list.pt", "no tensors by name"),
    ):
        with pytest.raises(Misconfigured, match=told):
            state_of(str(tmp_path / name))
    with pytest.raises(Misconfigured, match="takes nothing, imagenet"):
        state_of("something")


def from_imagenet(tree: Path, run: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    few = ("--head-epochs", "1", "--epochs", "1", "--batch", "4", "--patience", "0")
    asked = ("--start", "imagenet", "--area", "XR_WRIST", "--held-out", "valid", "--workers", "0")
    command = [sys.executable, "-m", "training", "fit", str(tree), str(run), *few, *asked]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_mura_is_learned_from_imagenets_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file lies where torchvision keeps what it has downloaded."""
    counts = {"train": {"XR_WRIST": (3, 3)}, "valid": {"XR_WRIST": (1, 1)}}
    images = {"train": {"XR_WRIST": 8}, "valid": {"XR_WRIST": 2}}
    make_tree(tmp_path / "MURA-v1.1", counts, images)
    kept = tmp_path / "torch/hub/checkpoints" / Path(DenseNet121_Weights.DEFAULT.url).name
    kept.parent.mkdir(parents=True)
    torch.manual_seed(4)
    theirs = densenet121().state_dict()
    torch.save(theirs, kept)
    done = from_imagenet(tmp_path / "MURA-v1.1", tmp_path / "run", TORCH_HOME=str(kept.parents[2]))
    assert done.returncode == 0, done.stderr
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("TORCH_HOME", str(kept.parents[2]))
        assert obtained("auto")[0] == "imagenet"
    losses = json.loads((tmp_path / "run/outcome.json").read_text())["losses"]
    told = [f"run: epoch {n} of 2: loss {loss:.4f}" for n, loss in enumerate(losses, start=1)]
    assert [line for line in done.stderr.splitlines() if "epoch " in line][1:] == told
    ours = torch.load(tmp_path / "run/network.pt", weights_only=True)
    assert ours["classifier.weight"].shape == (1, 1024)
    apart = ours["features.conv0.weight"] - theirs["features.conv0.weight"]
    assert 0 < apart.abs().max() < 1e-3  # it has learned a little from there
    made_of = json.loads((tmp_path / "run/run.json").read_text())
    assert made_of["films"] == 8
    assert made_of["settings"]["preprocessing"]["size"] == 224


def test_imagenets_weights_that_cannot_be_had_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tree(tmp_path, {"train": {"XR_WRIST": (2, 2)}}, {"train": {"XR_WRIST": 4}})
    nowhere = {"https_proxy": "http://127.0.0.1:9", "TORCH_HOME": str(tmp_path / "torch")}
    for name, value in nowhere.items():
        monkeypatch.setenv(name, value)
    start, why = obtained("auto")
    assert (start, "cannot be downloaded" in why) == ("bundled", True)
    done = from_imagenet(tmp_path, tmp_path / "run", **nowhere)
    assert done.returncode == 1
    assert "cannot be downloaded" in done.stderr.splitlines()[-1]
    assert "--start bundled" in done.stderr.splitlines()[-1]
