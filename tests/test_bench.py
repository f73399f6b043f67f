from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pydicom
import pytest

from mura_batch import bench
from mura_batch.bench import (
    EndToEnd,
    ModelOnly,
    Plan,
    Report,
    Way,
    measure,
    run_through,
    sample_films,
)
from mura_batch.errors import MuraError
from mura_batch.radiograph import read_luminance

INT8 = ("int8", "int8+bf16")
MODEL_FIELDS = [
    *("runtime", "precision", "mode", "device", "batch", "images_per_s"),
    *("max_logit_diff", "max_map_diff"),
]
WHOLE_FIELDS = ["runtime", "precision", "overlay", "images", "images_per_s", "start_s"]


def test_repeated_films_are_other_files_with_the_same_pixels() -> None:
    with sample_films(20) as folder:
        copies = [sorted(f for f in c.rglob("*") if f.is_file()) for c in sorted(folder.iterdir())]
        files = [file for copy in copies for file in copy]
        assert len(files) >= 20
        assert len({hashlib.sha256(file.read_bytes()).digest() for file in files}) == len(files)
        pixels = [[read_luminance(file).tobytes() for file in copy] for copy in copies]
        assert all(each == pixels[0] for each in pixels)


def test_repeated_dicom_studies_have_uids_of_their_own_and_keep_their_views_together() -> None:
    def studies(folder: Path) -> dict[str, int]:
        counted: dict[str, int] = {}
        for file in (folder / "DICOM").iterdir():
            film = pydicom.dcmread(file, stop_before_pixels=True)
            assert film.file_meta.MediaStorageSOPInstanceUID == film.SOPInstanceUID
            counted[film.StudyInstanceUID] = counted.get(film.StudyInstanceUID, 0) + 1
        return counted

    with sample_films(10) as folder:
        first, second = (studies(copy) for copy in sorted(folder.iterdir()))
    assert not first.keys() & second.keys()
    assert sorted(first.values()) == sorted(second.values()) == [1, 2]


@pytest.fixture(scope="module")
def report() -> Report:
    return measure(lambda _: None, Plan(rounds=1, views=1, films=1))


def test_the_report_is_the_documented_json(report: Report) -> None:
    told = json.loads(json.dumps(report.to_dict()))
    assert list(told) == ["machine", "model_only", "end_to_end"]
    assert all(list(entry) == MODEL_FIELDS for entry in told["model_only"])
    assert all(list(entry) == WHOLE_FIELDS for entry in told["end_to_end"])
    assert told["machine"]["cores"] >= 1


def test_every_runtime_is_measured_and_agrees_with_torch_eager(report: Report) -> None:
    measured = {(m.runtime, m.precision, m.mode): m for m in report.model_only if m.device == "cpu"}
    (int8,) = (measured.pop(way) for way in list(measured) if way[1] in INT8)
    assert set(measured) == {
        ("torch", "f32", "eager"),
        ("torch", "f32", "channels_last"),
        ("openvino", "f32", "async"),
    }
    eager = measured["torch", "f32", "eager"]
    assert eager.max_logit_diff == eager.max_map_diff == 0
    for entry in measured.values():
        assert entry.images_per_s > 0
        assert entry.max_logit_diff < 1e-4
        assert entry.max_map_diff < 1e-4
    assert 1e-3 < int8.max_logit_diff < 0.5
    assert 1e-4 < int8.max_map_diff < 0.05


def test_each_runtime_goes_the_whole_way_with_and_without_overlays(report: Report) -> None:
    ways = {(e.runtime, e.precision, e.overlay) for e in report.end_to_end}
    f32 = {(r, "f32", o) for r in ("torch", "openvino") for o in (True, False)}
    quick = [{("openvino", how, o) for o in (True, False)} for how in INT8]
    assert ways - f32 in (set(), *quick)
    assert f32 <= ways
    for entry in report.end_to_end:
        assert entry.images == 9
        assert entry.images_per_s > 0
        assert entry.start_s > 0.5  # the warm-up's settling alone


def test_the_text_holds_the_whole_way_against_the_same_runtime() -> None:
    def bare(mode: str, rate: float) -> ModelOnly:
        return ModelOnly("torch", "f32", mode, "cpu", 16, rate, 0.0, 0.0)

    whole = EndToEnd("torch", "f32", overlay=True, images=200, images_per_s=18.0, start_s=3.0)
    text = Report({"cpu": "x"}, (bare("eager", 12.0), bare("channels_last", 20.0)), (whole,))
    assert " 90%" in text.to_text()


def test_a_film_that_cannot_be_scored_gives_an_error_and_no_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "_PATIENCE", 8.0)
    films = tmp_path / "films"
    films.mkdir()
    (films / "hand.png").write_text("no image")
    with pytest.raises(MuraError, match="stands still"):
        run_through(films, Way("torch", "f32", overlay=False))
    assert [file.read_text() for file in films.iterdir()] == ["no image"]  # as it was
