"""The note that is written from run records, and the pictures beside it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tiny_atlas import TINY, write_atlas

from mura_batch.errors import Misconfigured
from training.crossval import ALL_FOLDS, Record, cross_validate
from training.data_report import survey
from training.dataset import Region
from training.pictures import draw, pictures_of
from training.report import write_note
from training.run_folder import write_json
from training.settings import FitSettings, Stage
from training.sources import fracatlas

START = "runs/trunk-{fold}/network.pt"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of two folds, the same changed, of one with a part changed, and of a specialist."""
    root = tmp_path_factory.mktemp("report")
    data = fracatlas.read(write_atlas(root / "atlas"))
    boxed = (replace(f, boxes=(Region(0.5, 0.5, 0.4, 0.3),) * f.label) for f in data.films)
    data = replace(data, films=tuple(boxed))
    whole = replace(TINY, patience=None, stages=(Stage(64, 1),))
    for name, settings, folds in (
        ("generalist", whole, ("0", "1")),
        ("parts/base", whole, ("0",)),
        ("parts/no-first-phase", replace(whole, head_epochs=0, inside=0.2), ("0",)),
        ("specialists/hand", replace(whole, rate=1e-4), ("1",)),
    ):
        write_record(root, name, settings, folds)
    same = Record.read(root / "records/generalist.json")
    (root / "records/variants").mkdir()
    changed = replace(same, settings=replace(whole, inside=0.5), start=START)
    write_json(changed.to_json(), root / "records/variants/more-inside.json")
    write_json(replace(same, start=START).to_json(), root / "records/generalist.json")
    for name in ("0", "1", ALL_FOLDS):  # as if the folds had begun with trunks
        trunk = root / "records/trunks" / name
        trunk.mkdir(parents=True)
        run = root / "runs/generalist" / f"fold-{name.replace(ALL_FOLDS, '1')}"
        shutil.copy(run / "outcome.json", trunk)
        told = json.loads((run / "run.json").read_text())
        told["held_out"] = [] if name == ALL_FOLDS else [name]
        write_json(told, trunk / "run.json")
    (root / "records/trunks/.DS_Store").touch()
    (root / "records/data.json").write_text(survey(data, workers=1).to_json())
    return root


def write_record(root: Path, name: str, settings: FitSettings, folds: tuple[str, ...]) -> None:
    run = root / "runs" / name
    areas = ("XR_HAND",)
    data = fracatlas.read(root / "atlas")
    cross_validate(data, run, settings, folds=folds, areas=areas, workers=0)
    target = root / "records" / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "record.json", target)


def rows(note: str, first: str) -> list[list[str]]:
    """Return the cells of the tables' rows that begin with a word."""
    lines = (line.strip().strip("|").split("|") for line in note.splitlines() if "|" in line)
    cells = ([cell.strip() for cell in line] for line in lines)
    return [row for row in cells if row[0] == first]


def test_the_note_says_what_the_records_say(made: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training", "report", str(made / "records"), str(tmp_path)]
    drawn = ["--data", str(made / "atlas"), "--run", str(made / "runs/generalist")]
    done = subprocess.run([*command, *drawn], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    note = (tmp_path / "REPORT.md").read_text()
    assert "research use only" in note
    record = Record.read(made / "records/generalist.json")
    for fold in record.folds:
        (row,) = (row for row in rows(note, fold.name) if len(row) == 6 and "/" in row[4])
        assert row[1:4] == [str(fold.films), "2", str(fold.seconds)]
        assert row[4] == "5 / 2"
    (hand,) = rows(note, "no first phase")
    assert hand[1] == "head epochs 0 (1); inside 0.2 (0.0)"
    assert [row[5] for row in rows(note, "in full")] == ["10 / 4", "5 / 2"]
    (variant,) = rows(note, "more inside")
    assert variant[1] == "inside 0.5 (0.0)"
    assert rows(note, "base")[0][7] == "-"
    (trunk,) = (row for row in rows(note, ALL_FOLDS) if len(row) == 6)
    told = json.loads((made / "records/trunks/all/outcome.json").read_text())
    assert trunk[2:] == ["2", str(told["seconds"]), *(f"{told['losses'][n]:.3f}" for n in (0, -1))]
    for trunk, held_out in (("0", " --held-out 0"), ("1", " --held-out 1"), (ALL_FOLDS, "")):
        settings = f"training/records/trunks/{trunk}/run.json"
        assert f"pretrain fracatlas runs/trunk-{trunk} --settings {settings}{held_out}\n" in note
    assert "fit fracatlas runs/all --start runs/trunk-all/network.pt --settings" in note
    assert note.count(" --specialist training/records/specialists/hand.json") == 1
    (special,) = (row for row in rows(note, "XR_HAND") if row[1] == "hand")
    assert special[2] == "rate 0.0001 (0.0003); start nothing"
    assert rows(note, "XR_WRIST")[0][1:] == ["2134 / 1326", "9752", "140 / 97", "659"]
    page = (tmp_path / "REPORT.html").read_text()
    tables = sum(line.startswith("|---") for line in note.splitlines())
    assert page.count("<table>") == tables > 5
    pictures = sorted((tmp_path / "figures").glob("*.jpg"))
    assert len(pictures) == 5
    for picture in pictures:
        assert f"figures/{picture.name}" in note
        with Image.open(picture) as film:
            assert min(film.size) > 100


def test_films_of_folds_without_a_network_are_not_drawn(made: Path, tmp_path: Path) -> None:
    whole = Record.read(made / "records/generalist.json")
    films = fracatlas.read(made / "atlas").films
    shutil.copytree(made / "runs/generalist/fold-1", tmp_path / "runs/fold-1")
    only = [film for film in films if film.split == "1"]
    draw(whole, only, tmp_path / "runs", tmp_path / "figures")
    drawn = {path.name for path in (tmp_path / "figures").glob("*.jpg")}
    assert len(drawn) == 5
    assert {*pictures_of(whole, tmp_path / "figures")} == drawn
    assert not pictures_of(replace(whole, start="something else"), tmp_path / "figures")


def test_the_same_records_make_the_same_note(made: Path, tmp_path: Path) -> None:
    for folder in ("one", "other"):
        write_note(made / "records", tmp_path / folder)
    for name in ("REPORT.md", "REPORT.html", "figures/studies.svg", "figures/losses.svg"):
        one, other = ((tmp_path / folder / name).read_bytes() for folder in ("one", "other"))
        assert one == other


def test_records_that_are_missing_or_damaged_are_named(made: Path, tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match=r"generalist\.json is not there"):
        write_note(tmp_path, tmp_path / "out")
    records = tmp_path / "records"
    shutil.copytree(made / "records", records)
    (records / "parts/base.json").unlink()
    with pytest.raises(Misconfigured, match=r"holds no base\.json"):
        write_note(records, tmp_path / "out")
    (records / "parts/base.json").write_text("{}")
    with pytest.raises(Misconfigured, match=r"base\.json is no record"):
        write_note(records, tmp_path / "out")
    sound = json.loads((made / "records/generalist.json").read_text())
    row = sound["scores"][0]
    for changed in (
        {"folds": []},
        {"areas": ["XR_FOOT"]},
        {"scores": [row, row]},
        {"scores": [[*row[:6], "1", *row[7:]]]},
        {"scores": [[*row[:8], float("nan"), row[9]]]},
        {"folds": [{**sound["folds"][0], "losses": ["a"]}]},
        {"folds": [{**sound["folds"][0], "versions": None}]},
        {"folds": [{**sound["folds"][0], "versions": {}}]},
        {"folds": [{**sound["folds"][0], "threads": None}]},
        {"folds": [{**sound["folds"][0], "seconds": float("inf")}]},
        {"folds": [{**sound["folds"][0], "start": [1]}]},
        {"scores": [[*row[:8], 10**400, row[9]]]},
    ):
        (records / "parts/base.json").write_text(json.dumps(sound | changed))
        with pytest.raises(Misconfigured, match=r"base\.json is no record"):
            write_note(records, tmp_path / "out")
    shutil.copy(made / "records/parts/no-first-phase.json", records / "parts/base.json")
    for harm in ("[]", "{}", '{"counts": [], "duplicates": []}', "[" * 200_000):
        (records / "data.json").write_text(harm)
        with pytest.raises(Misconfigured, match=r"data\.json is no data report"):
            write_note(records, tmp_path / "out")
    shutil.copy(made / "records/data.json", records)
    (records / "remarks.md").write_bytes(b"\xff")
    with pytest.raises(Misconfigured, match=r"remarks\.md cannot be read"):
        write_note(records, tmp_path / "out")
    (records / "remarks.md").unlink()
    whole = Record.read(records / "generalist.json")
    lost = tuple(
        replace(one, film=replace(one.film, study=f"x{one.film.study}")) for one in whole.scores
    )
    films, runs = fracatlas.read(made / "atlas").films, made / "runs/generalist"
    with pytest.raises(Misconfigured, match="no film IMG"):
        draw(replace(whole, scores=lost), films, runs, tmp_path)
    with pytest.raises(Misconfigured, match="no network of the record's folds"):
        draw(whole, films, tmp_path, tmp_path)
    negative = tuple(one for one in whole.scores if not one.film.label)
    write_json(replace(whole, scores=negative).to_json(), records / "generalist.json")
    with pytest.raises(Misconfigured, match="one label only"):
        write_note(records, tmp_path / "out")


@pytest.mark.parametrize(
    ("place", "change", "why"),
    [
        ("1/run.json", {"held_out": []}, "made without no fold, not without 1"),
        ("all/run.json", {"held_out": ["0"]}, "made without 0, not without no fold"),
        ("0/run.json", {"held_out": None}, "does not say how a run is made"),
        ("0/run.json", {"start": [1]}, "does not say how a run is made"),
        ("0/outcome.json", {"losses": []}, "does not say how its run ended"),
        ("0/outcome.json", {"losses": [None]}, "does not say how its run ended"),
        ("1/outcome.json", None, "does not say how its run ended"),
    ],
)
def test_a_trunk_that_is_not_what_the_note_would_say_is_refused(
    made: Path, tmp_path: Path, place: str, change: dict[str, object] | None, why: str
) -> None:
    records = tmp_path / "records"
    shutil.copytree(made / "records", records)
    file = records / "trunks" / place
    if change is None:
        file.unlink()
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(Misconfigured, match=why):
        write_note(records, tmp_path)


def test_trunks_of_other_settings_than_each_others_are_refused(made: Path, tmp_path: Path) -> None:
    records = tmp_path / "records"
    shutil.copytree(made / "records", records)
    place = records / "trunks/1/run.json"
    told = json.loads(place.read_text())
    told["settings"]["rate"] /= 2
    place.write_text(json.dumps(told))
    with pytest.raises(Misconfigured, match="other settings"):
        write_note(records, tmp_path)


def test_a_converter_makes_a_pdf(made: Path, tmp_path: Path) -> None:
    if shutil.which("weasyprint") is None:
        pytest.skip("weasyprint is not installed")
    *_, last = write_note(made / "records", tmp_path)
    assert last.read_bytes().startswith(b"%PDF-")


def test_the_note_that_is_kept_says_what_the_kept_records_say(tmp_path: Path) -> None:
    kept = Path(__file__).parent.parent / "training"
    for folder in ("records", "figures"):
        shutil.copytree(kept / folder, tmp_path / folder)
    write_note(tmp_path / "records", tmp_path)
    notes = [(folder / "REPORT.md").read_text() for folder in (kept, tmp_path)]
    words = [re.sub(r"\d+\.\d+", "#", note) for note in notes]
    assert words[0] == words[1]
    numbers = [[float(number) for number in re.findall(r"\d+\.\d+", note)] for note in notes]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.002)
