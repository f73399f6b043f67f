"""Labelled films out of what people have: MURA, tables, DICOM, a site; and what is told of them."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import made_dicom
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mura_tree import make_tree, tiny_film
from PIL import Image
from site_home import film, make_home

from mura_batch.area import Area
from mura_batch.errors import Misconfigured
from training.data_report import alike, difference_hash, survey
from training.dataset import Dataset, Region
from training.sources import read
from training.sources.mura import PUBLISHED_IMAGES, PUBLISHED_STUDIES

STUDIES = {
    "train": {"XR_HAND": (4, 3), "XR_WRIST": (3, 2), "XR_ELBOW": (1, 1)},
    "valid": {"XR_HAND": (2, 2), "XR_WRIST": (1, 1)},
}
IMAGES = {
    "train": {"XR_HAND": 12, "XR_WRIST": 6, "XR_ELBOW": 2},
    "valid": {"XR_HAND": 5, "XR_WRIST": 2},
}


def problems(data: Dataset) -> list[str]:
    return [f"{Path(one.where).name}: {one.what}" for one in data.all_problems()]


# ---- MURA


@pytest.fixture
def mura(tmp_path: Path) -> Path:
    root = tmp_path / "MURA-v1.1"
    make_tree(root, STUDIES, IMAGES, in_two_areas=3)
    return root


def test_the_published_counts_are_those_of_the_paper() -> None:
    assert [sum(map(sum, PUBLISHED_STUDIES[s].values())) for s in ("train", "valid")] == [
        13457,
        1199,
    ]
    assert [sum(PUBLISHED_IMAGES[s].values()) for s in ("train", "valid")] == [36808, 3197]


def test_mura_is_read_from_its_folder_or_the_one_above(mura: Path) -> None:
    for folder in (mura, mura.parent):
        data = read(folder).checked()
        assert len(data.films) == 27
        assert len({film.study for film in data.films}) == 20
        assert {film.split for film in data.films} == {"train", "valid"}
    first = data.films[0]
    assert (first.study, first.patient, first.area) == (
        "XR_HAND/patient00001/study1",
        "patient00001",
        "XR_HAND",
    )
    assert first.where == f"{mura / 'train_image_paths.csv'}:1"


@pytest.mark.parametrize("change", ["header", "crlf", "no tables", "bom", "one split"])
def test_mura_in_other_spellings_is_the_same(mura: Path, change: str) -> None:
    expected = {(film.path, film.label, film.split) for film in read(mura).films}
    for table in mura.glob("*.csv"):
        text = table.read_text()
        if change == "header":
            columns = "path" if "image" in table.name else "study,label"
            table.write_text(f"{columns}\n{text}")
        elif change == "crlf":
            table.write_bytes(text.replace("\n", "\r\n").encode())
        elif change == "bom":
            table.write_text("\ufeff" + text)
        elif change == "no tables":
            table.unlink()
    if change == "one split":
        shutil.rmtree(mura / "valid")
        expected = {film for film in expected if film[2] == "train"}
    data = read(mura).checked()
    assert {(film.path, film.label, film.split) for film in data.films} == expected


def test_what_muras_tables_get_wrong_is_told_with_file_and_line(mura: Path) -> None:
    labels = mura / "train_labeled_studies.csv"
    lines = labels.read_text().splitlines()
    lines[0] = lines[0][:-1] + "1"  # its folder says negative
    lines[1] = lines[1][:-1] + "2"
    lines.append(lines[2][:-1] + "1")
    labels.write_text("\n".join(lines))
    images = mura / "train_image_paths.csv"
    with images.open("a") as stream:
        for path in (
            "XR_HAND/patient00003/study1_negative/image9.png",
            "XR_HAND/nobody/image9.png",
        ):
            stream.write(f"MURA-v1.1/train/{path}\n")
        stream.write("MURA-v1.1/train/XR_FOOT/patient1/study1_negative/a.png\n")
    with labels.open("a") as stream:
        stream.write("\nMURA-v1.1/train/XR_HAND/patient99999/study1_positive/,1\n")
    (mura / "train/XR_HAND/patient00003/study1_negative/more.png").touch()
    found = problems(read(mura))
    assert any("patient99999/study1_positive has no image" in one for one in found)
    assert any(" images of the tree are not listed" in one for one in found)
    assert "train_labeled_studies.csv:2: the label '2' is neither 0 nor 1" in found
    assert any(f.startswith("train_labeled_studies.csv:15: ") and " 0 at " in f for f in found)
    assert any(
        f.startswith("train_image_paths.csv:1: ") and "has the label 1 at" in f for f in found
    )
    assert any("image9.png is not there" in f for f in found)
    assert "train_image_paths.csv:22: XR_HAND/nobody/image9.png is no path of MURA" in found
    assert any("XR_FOOT is none of XR_ELBOW" in f for f in found)
    with pytest.raises(Misconfigured, match=r"train_labeled_studies\.csv:2: .*neither 0 nor 1"):
        read(mura).checked()


def test_a_patient_in_both_splits_is_refused(mura: Path) -> None:
    where = mura / "valid/XR_HAND"
    moved = next(where.iterdir())
    moved.rename(where / "patient00001")
    for table in mura.glob("valid*.csv"):
        table.write_text(table.read_text().replace(moved.name, "patient00001"))
    with pytest.raises(Misconfigured, match=r"patient00001 has the splits train and valid"):
        read(mura).checked()


# ---- tables


def write_manifest(folder: Path, *changes: dict[str, str]) -> Path:
    """Write a manifest of four films, the rows changed one by one."""
    rows = []
    for number in range(4):
        film(folder / f"{number}.png", number, size=64)
        row = {"image": f"{number}.png", "study": f"s{number}", "patient": f"p{number}"}
        row |= {
            "area": "XR_HAND",
            "label": str(number % 2),
            "boxes": "0.5 0.5 0.1 0.2;" * (number % 2),
        }
        rows.append(row | {"hardware": "", "weight": "2", "split": "0"})
    for number, change in enumerate(changes):
        rows[number] |= change
    file = folder / "manifest.csv"
    with file.open("w", newline="") as stream:
        table = csv.DictWriter(stream, rows[0])
        table.writeheader()
        table.writerows(rows)
    return file


def test_a_study_and_a_film_are_of_one_patient(tmp_path: Path) -> None:
    """Else studies of one name would be scored as one, and a film stand on both sides."""
    data = read(write_manifest(tmp_path, {"study": "study1"}, {}, {"study": "study1"}))
    with pytest.raises(Misconfigured, match=r"csv:4: study study1 \(XR_HAND\) has the patients"):
        data.checked()
    other = {"image": "0.png", "area": "XR_WRIST", "study": "t"}
    data = read(write_manifest(tmp_path, {}, {}, {}, other))
    with pytest.raises(Misconfigured, match=r"0\.png frame 0 has the patients p0 and p3"):
        data.checked()
    file = tmp_path / "manifest.csv"
    file.write_text(file.read_text().replace("weight", "label", 1))
    with pytest.raises(Misconfigured, match="columns label twice"):
        read(file)


def test_a_manifest_in_csv_and_parquet_is_the_same(tmp_path: Path) -> None:
    file = write_manifest(tmp_path, {"hardware": "1"})
    data = read(file).checked()
    assert [(f.label, f.hardware, f.weight) for f in data.films[:2]] == [(0, True, 2), (1, None, 2)]
    assert data.films[1].boxes == (Region(0.5, 0.5, 0.1, 0.2),)
    with file.open() as stream:
        rows = list(csv.DictReader(stream))
    typed = [
        row
        | {"label": int(row["label"]), "weight": float(row["weight"]), "split": float(row["split"])}
        | {"hardware": float(row["hardware"] or "nan")}
        for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(typed), tmp_path / "manifest.parquet")
    other = read(tmp_path / "manifest.parquet").checked()
    assert [replace(f, where="") for f in other.films] == [replace(f, where="") for f in data.films]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"label": "yes"}, "the label 'yes' is neither 0 nor 1"),
        ({"label": ""}, "the label '' is neither 0 nor 1"),
        ({"image": "none.png"}, "none.png is not there"),
        ({"area": "XR_FOOT"}, "the area 'XR_FOOT' is none of"),
        ({"patient": ""}, "the column patient is empty"),
        ({"boxes": "0.5 0.5 0.1"}, "not made of x y width height"),
        ({"boxes": "0.5 0.5 0.1 a"}, "not made of x y width height"),
        ({"boxes": "5 0.5 0.1 0.1"}, "not inside its film"),
        ({"boxes": "0.02 0.5 0.9 0.1"}, "not inside its film: x and y are its centre"),
        ({"boxes": "0.5 0.5 0.1 0.1", "label": "0"}, "a box on a film with the label 0"),
        ({"hardware": "maybe"}, "the hardware 'maybe' is neither 0 nor 1"),
        ({"weight": "x"}, "the weight 'x' is no number"),
        ({"weight": "-1"}, "the weight -1 is not from 0.001 to 1000"),
        ({"study": "s1"}, "study s1 (XR_HAND) has the labels 0 and 1"),
        ({"patient": "p1", "split": "1"}, "patient p1 has the splits 1 and 0"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(
    tmp_path: Path, change: dict[str, str], told: str
) -> None:
    file = write_manifest(tmp_path, change)
    with pytest.raises(Misconfigured, match=r"manifest\.csv:[23]: ") as refused:
        read(file).checked()
    assert told in str(refused.value)


def test_an_empty_area_and_one_class_are_refused(tmp_path: Path) -> None:
    data = read(write_manifest(tmp_path, {"area": "XR_WRIST"}))
    assert len(data.only([Area.XR_HAND]).films) == 3
    with pytest.raises(Misconfigured, match=r"no films of XR_ELBOW in .*manifest\.csv"):
        data.only([Area.XR_ELBOW])
    with pytest.raises(Misconfigured, match=r"XR_WRIST in .*manifest\.csv have the label 0"):
        data.only([Area.XR_WRIST])


def test_what_is_no_data_says_what_is(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("image,label\n")
    (tmp_path / "other.csv").write_text("image,label\na.png,1\n")
    with pytest.raises(Misconfigured, match="no MURA tree.*write a manifest"):
        read(tmp_path)
    with pytest.raises(Misconfigured, match="has no rows"):
        read(tmp_path / "empty.csv")
    with pytest.raises(Misconfigured, match="lacks the columns study, patient, area"):
        read(tmp_path / "other.csv")
    with pytest.raises(Misconfigured, match="no such folder"):
        read(tmp_path / "absent")


# ---- DICOM and a site


def test_dicom_files_get_their_labels_by_study_or_accession(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    (tmp_path / "files").mkdir()
    for number, (part, accession) in enumerate([("HAND", "A1"), ("WRIST", "A2"), ("CHEST", "A3")]):
        for view in range(2):
            made_dicom.write(
                tmp_path / f"files/{number}{view}.dcm",
                random.integers(0, 4000, (40, 40), np.uint16),
                StudyInstanceUID=f"2.25.{number}",
                SOPInstanceUID=f"2.25.9{number}{view}",
                AccessionNumber=accession,
                BodyPartExamined=part,
                PatientID="Doe^Jane",
            )
    labels = tmp_path / "labels.csv"
    labels.write_text("study,label\n2.25.0,1\nA2,0\nA3,1\nA9,1\n2.25.0,1\n")
    data = read(tmp_path / "files", labels)
    assert [(f.study, f.area, f.label) for f in data.films[:4]] == [
        ("2.25.0", "XR_HAND", 1),
        ("2.25.0", "XR_HAND", 1),
        ("2.25.1", "XR_WRIST", 0),
        ("2.25.1", "XR_WRIST", 0),
    ]
    assert {f.patient for f in data.films} == {"p1"}
    found = problems(data)
    assert sum("labels.csv:4: 2" in one for one in found) == 2  # both chest films
    assert any("labels.csv:5: no file" in one and "A9" in one for one in found)
    assert any("labels.csv:6: 00.dcm stands at" in one for one in found)
    labels.write_text("study,label,area\n2.25.2,1,XR_HAND\n")
    data = read(tmp_path / "files", labels)
    assert (data.films, len(data.problems)) == ((), 2)  # a chest stays a chest
    made_dicom.write(
        tmp_path / "files/other.dcm",
        random.integers(0, 4000, (40, 40), np.uint16),
        StudyInstanceUID="2.25.77",
        SOPInstanceUID="2.25.78",
        AccessionNumber="A1",
        BodyPartExamined="HAND",
    )
    labels.write_text("study,label\nA1,1\n")
    assert "labels.csv:2: 2 studies have the study A1" in problems(read(tmp_path / "files", labels))


def test_a_sites_labels_lead_to_the_films_that_it_scored(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    for number in range(2):
        film(home.inbox / f"XR_HAND/patient{number}/study1/a.png", number)
    assert home.command("watch", "--once").returncode == 0
    told = json.loads(home.command("query", "--json").stdout)
    for row, label in zip(told, ("positive", "negative"), strict=True):
        assert home.command("label", "set", row["study"], label).returncode == 0
    data = read(home.path).checked()
    assert {(f.study, f.area, f.label) for f in data.films} == {
        (row["study"], "XR_HAND", label) for row, label in zip(told, (1, 0), strict=True)
    }
    assert {f.patient for f in data.films} == {"patient0", "patient1"}
    assert all(f.path.is_file() for f in data.films)


# ---- the report


def test_duplicates_are_groups_and_say_what_they_stand_across(mura: Path) -> None:
    films = read(mura).films
    train, valid = films[0].path, films[-1].path
    shutil.copy(train, films[1].path)
    shutil.copy(train, valid)
    found = survey(read(mura), workers=1)
    (group,) = [group for group in found.duplicates if group.exact]
    assert len(group.films) == 3
    assert "splits" in group.across
    assert "patients" in group.across


def test_alike_are_films_that_the_eye_takes_for_one(tmp_path: Path) -> None:
    file = write_manifest(tmp_path)
    with Image.open(film(tmp_path / "big.png", 7, size=400)) as picture:
        picture.resize((150, 150)).save(tmp_path / "1.png")
        picture.point(lambda level: min(255, level * 1.1)).save(tmp_path / "2.png")
    (tmp_path / "3.png").write_bytes(tiny_film(np.random.default_rng(1)))
    found = survey(read(file), workers=1)
    (group,) = found.duplicates
    assert (group.exact, len(group.films)) == (False, 3)


def test_unreadable_films_are_listed_and_left_out(mura: Path) -> None:
    first, second = (film.path for film in read(mura).films[:2])
    first.write_bytes(first.read_bytes()[:-200])
    second.write_bytes(b"")
    found = survey(read(mura), workers=2)
    assert [line.split(": ")[2] for line in found.unreadable] == ["truncated", "empty"]
    assert found.quantiles["width"] == (24, 24, 24, 24, 24)
    assert sum(count.images for count in found.counts) == len(read(mura).films) - 2


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=8))
def test_groups_are_those_of_comparing_every_pair(hashes: list[bytes]) -> None:
    near = hashes + [bytes([one[0] ^ 3, *one[1:]]) for one in hashes]
    names = [one.hex() for one in near]
    numbers = alike(names)
    assert len(numbers) == len(names)
    values = [int.from_bytes(one) for one in near]
    groups = list(range(len(values)))
    for _ in values:  # until nothing changes: paths are no longer than that
        for i, one in enumerate(values):
            for j, other in enumerate(values):
                if (one ^ other).bit_count() <= 10:
                    groups[i] = groups[j] = min(groups[i], groups[j])
    for i in range(len(values)):
        for j in range(len(values)):
            assert (numbers[i] == numbers[j]) == (groups[i] == groups[j])


def test_a_hash_bears_scale_and_brightness_and_tells_films_apart() -> None:
    ramp = np.add.outer(np.arange(200), np.arange(300)) % 211
    film = ramp.astype(np.uint8)
    small = np.asarray(Image.fromarray(film).resize((150, 100), Image.Resampling.BOX))

    def apart(one: np.ndarray, other: np.ndarray) -> int:
        hashes = (int(difference_hash(each), 16) for each in (one, other))
        first, second = hashes
        return (first ^ second).bit_count()

    assert apart(film, small) <= 10
    assert apart(film, film // 2) <= 10
    assert apart(film, film[::-1].copy()) > 40


def test_the_command_prints_every_count_and_findings_are_no_failure(mura: Path) -> None:
    with (mura / "train_image_paths.csv").open("a") as stream:
        stream.write("MURA-v1.1/train/XR_HAND/a/b/c.png\n")
    command = [sys.executable, "-m", "training", "data", "report", str(mura)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "research use only" in done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    for split, areas in STUDIES.items():
        for area, (negative, positive) in areas.items():
            counts = [negative + positive, negative, positive, IMAGES[split][area]]
            rows = [line for line in lines if line[:2] == [split, area]]
            assert rows[0][3:] == [str(count) for count in counts]
    assert "train: 14 studies, 8 not abnormal, 6 abnormal; 20 images; " in done.stdout
    assert " patients, 3 of them in more than one area" in done.stdout
    assert "unusable rows: 1" in done.stdout
    told = json.loads(subprocess.run([*command, "--json"], capture_output=True, check=True).stdout)
    assert told["several_areas"] == {"train": 3}
    missing = subprocess.run(
        [*command[:-1], str(mura / "train")], capture_output=True, text=True, check=False
    )
    assert missing.returncode == 4
    assert "Traceback" not in missing.stderr
    assert len(missing.stderr.splitlines()) == 2
