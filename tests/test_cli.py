"""The commands as a user types them: output, exit codes, help, and what they import."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import pytest
from ledger import damage
from pydicom import dcmread
from site_home import PROGRAM, SAMPLES, Home, film, make_home

from mura_batch.area import Area
from mura_batch.cli import program
from mura_batch.config import NOTICE
from mura_batch.records import STUDY_FIELDS
from mura_batch.weights import BUNDLED, OperatingPoint, WeightsStore, bundled_card

README = Path(__file__).parent.parent / "README.md"
HEAVY = ("torch", "torchvision", "openvino", "pandas", "optuna", "matplotlib", "pyarrow")
HEAVY += ("numpy", "PIL", "sqlalchemy")


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        yield (*path, name)


ALL = sorted(commands(program))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home with a scored study, one that waits for a person and one in quarantine."""
    made = make_home(tmp_path_factory.mktemp("cli") / "home")
    film(made.inbox / "XR_WRIST/patient00011/study1_positive/image1.png", 1)
    film(made.inbox / "=cmd.png", 2)
    (made.inbox / "elbow.png").write_text("no picture")
    done = made.command("watch", "--once")
    assert done.returncode == 3, done.stderr
    return made


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home whose database has a spoilt page."""
    made = make_home(tmp_path_factory.mktemp("damaged") / "home")
    damage(made.path / "results.db")
    return made


def rows(home: Home, *filters: str) -> list[dict[str, object]]:
    answer = home.command("query", "--json", *filters)
    assert answer.returncode == 0, answer.stderr
    found: list[dict[str, object]] = json.loads(answer.stdout)
    return found


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_command_has_an_example_and_is_in_the_readme(path: tuple[str, ...]) -> None:
    command: click.Command = program
    context = click.Context(program)
    for name in path:
        assert isinstance(command, click.Group)
        found = command.get_command(context, name)
        assert found is not None
        command = found
    assert f"mura-batch {' '.join(path)}" in (command.help or "") or path[-1] == "db"
    assert f"mura-batch {' '.join(path)}" in README.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["query"],
        ["query", "--json"],
        ["status"],
        ["models", "list"],
        ["query", "--csv"],
    ],
    ids=" ".join,
)
def test_quick_commands_import_nothing_heavy(home: Home, arguments: list[str]) -> None:
    check = (
        "import sys; from mura_batch.cli import main\n"
        f"sys.argv = ['mura-batch', *{arguments!r}]\n"
        "try:\n    main()\n"
        "finally:\n"
        f"    found = sorted(set(sys.modules) & set({HEAVY!r}))\n"
        "    print(f'heavy: {found}', file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", check],
        env=home.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "heavy: []" in done.stderr


def test_query_prints_the_documented_fields(home: Home) -> None:
    found = rows(home)
    assert {row["state"] for row in found} == {"done", "needs_area", "quarantined"}
    assert tuple(found[0]) == STUDY_FIELDS
    wrist = rows(home, "--area", "XR_WRIST")[0]
    assert wrist["source"] == "XR_WRIST/patient00011/study1_*"
    assert wrist["notice"] == NOTICE
    assert rows(home, "--area", "XR_HAND") == []
    views = rows(home, "--images", "--area", "XR_WRIST")
    assert (home.path / str(views[0]["overlay"])).is_file()


def test_query_as_csv_is_safe_for_spreadsheets(home: Home) -> None:
    answer = home.command("query", "--csv")
    table = list(csv.DictReader(io.StringIO(answer.stdout)))
    assert {row["source"] for row in table} >= {"'=cmd.png"}


def test_a_label_in_a_path_reaches_no_output(home: Home, tmp_path: Path) -> None:
    told = [home.command("query", "--images", form).stdout for form in ("--json", "--csv")]
    home.command("export", str(tmp_path / "all.jsonl"), "--level", "image")
    told.append((tmp_path / "all.jsonl").read_text())
    told += [str(path.relative_to(home.path)) for path in (home.path / "overlays").rglob("*")]
    assert "study1_*" in "".join(told)
    assert "study1_positive" not in "".join(told)


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_export_writes_every_row(home: Home, tmp_path: Path, ending: str) -> None:
    target = tmp_path / f"results.{ending}"
    done = home.command("export", str(target))
    assert done.returncode == 0, done.stderr
    assert "3 rows" in done.stderr
    assert target.stat().st_size > 100


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["query", "--state", "sleeping"], 2, "sleeping"),
        (["rerun"], 2, "name studies"),
        (["rerun", "zzzz"], 4, "zzzz"),
        (["export", "results.xlsx"], 4, ".parquet"),
        (["models", "show", "XR_HAND", "ffff"], 4, "ffff"),
        (["models", "rollback", "XR_HAND"], 4, "XR_HAND"),
        (["query", "--json", "--csv"], 2, "one of"),
        (["export", "missing/x.csv"], 4, "missing: no such folder"),
        (["db", "backup", "missing/x.db"], 4, "missing: no such folder"),
        (["score", "/does/not/exist"], 4, "/does/not/exist"),
        (["score", ""], 2, "empty"),
        (["--home", "/proc/none", "watch", "--once"], 4, "init"),
        (["--home", "/proc/none", "query"], 4, "db upgrade"),
        (["query", "--since", "yesterday"], 2, "yesterday"),
        (["export", "/proc/results.csv"], 1, "No such file or directory"),
        (["db", "backup", "/proc/copy.db"], 1, "No such file or directory"),
        (["models", "fetch", "XR_HAND", "--url", "ftp://x"], 4, "weights_url"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line_that_says_what_to_do(
    home: Home, arguments: list[str], code: int, words: str
) -> None:
    done = home.command(*arguments)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    if code != 2:
        errors = [line for line in done.stderr.splitlines() if line != NOTICE]
        assert len(errors) == 1


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["db", "check"], 1),
        (["db", "backup", "copy.db"], 4),
        (["doctor"], 3),
        (["query"], 4),
        (["status"], 4),
        (["export", "results.csv"], 4),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_damaged_database_is_told_in_a_line(
    damaged: Home, arguments: list[str], code: int
) -> None:
    done = damaged.command(*arguments)
    assert done.returncode == code, done.stderr
    assert "damaged" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_verbose_adds_the_traceback(home: Home) -> None:
    assert "Traceback" in home.command("-v", "models", "rollback", "XR_HAND").stderr


def test_a_person_sets_the_area(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    film(home.inbox / "x.png", 1)
    assert home.command("watch", "--once").returncode == 3
    study = str(rows(home)[0]["study"])
    assert home.command("rerun", study[:6], "--set-area", "XR_HAND").returncode == 0
    assert home.command("watch", "--once").returncode == 0
    row = rows(home)[0]
    assert (row["state"], row["area"], row["area_source"]) == ("done", "XR_HAND", "person")


def test_labels_are_kept(home: Home, tmp_path: Path) -> None:
    study = str(rows(home, "--state", "done")[0]["study"])
    assert home.command("label", "set", study, "positive").returncode == 0
    table = tmp_path / "truth.csv"
    table.write_text(f"study,label,area\n{study},negative,XR_WRIST\n")
    assert home.command("label", "import", str(table)).returncode == 0
    listed = json.loads(home.command("label", "list", "--json").stdout)
    assert {(row["label"], row["area"]) for row in listed} == {
        ("positive", ""),
        ("negative", "XR_WRIST"),
    }


def test_a_study_is_labelled_by_its_folder_or_its_uid(home: Home, tmp_path: Path) -> None:
    """As people's own tables name it: MURA's folders carry the truth, which is not stored."""
    home.inbox.mkdir(exist_ok=True)
    shutil.copytree(SAMPLES / "DICOM", home.inbox / "XR_WRIST/uid")
    assert home.command("watch", "--once").returncode == 3
    table = tmp_path / "truth.csv"
    uids = {str(dcmread(file).StudyInstanceUID) for file in (SAMPLES / "DICOM").iterdir()}
    named = ["XR_WRIST/patient00011/study1_positive/", *uids]
    table.write_text("study,label\n" + "".join(f"{name},positive\n" for name in named))
    done = home.command("label", "import", str(table))
    assert done.returncode == 0, done.stderr
    assert f"{len(named)} labels stored" in done.stderr
    told = home.command("label", "set", "XR_WRIST/patient00012", "positive")
    assert "No study" in told.stderr


def test_all_that_is_wrong_with_labels_is_told_at_once(home: Home, tmp_path: Path) -> None:
    study = str(rows(home, "--state", "done")[0]["study"])
    table = tmp_path / "truth.csv"

    def refused(text: str, encoding: str = "utf-8") -> str:
        before = home.command("label", "list").stdout
        table.write_text(text, encoding)
        done = home.command("label", "import", str(table))
        assert done.returncode == 4, done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert home.command("label", "list").stdout == before
        return done.stderr

    told = refused(f"study,label,area\n{study},maybe,\n{study},positive,XR_KNEE\n")
    assert "truth.csv:2 needs a study and a label" in told
    assert "truth.csv:3 needs an area" in told
    assert "truth.csv:4 needs" in refused("study, label\n\n\nfoo,maybe\n")
    assert "truth.csv:1 has no column study and label" in refused(f"study;label\n{study};0\n")
    assert "has no rows" in refused("study,label\n")
    assert "has no column" in refused("")
    told = refused(f"study,label\nno-such,positive\n{study},positive\nnor-this,negative\n")
    assert "no-such" in told
    assert "nor-this" in told
    assert "UTF-8" in refused("study,label\nHüfte,positive\n", "latin-1")
    done = home.command("label", "import", "/dev/zero")
    assert (done.returncode, "no file of at most" in done.stderr) == (4, True)


def test_a_full_disk_is_told_and_a_reader_that_leaves_early_is_no_error(home: Home) -> None:
    done = subprocess.run(  # noqa: S602 - a pipe, as a user types it
        f"{PROGRAM} query --json 2>&1 >/dev/full; {PROGRAM} query --json | true",
        shell=True,
        env=home.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[1:] == ["mura-batch: No space left on device"]
    assert done.stderr.splitlines() == [NOTICE]


def test_score_leaves_files_and_database_alone(home: Home, tmp_path: Path) -> None:
    picture = film(tmp_path / "wrist.png", 9)
    before = (picture.read_bytes(), rows(home))
    done = home.command(
        "score", str(picture), "--json", "--area", "XR_WRIST", "--overlay", str(tmp_path / "out")
    )
    assert done.returncode == 0, done.stderr
    view = json.loads(done.stdout)[0]
    assert 0 <= view["probability"] <= 1
    assert view["area_source"] == "person"
    assert len(list((tmp_path / "out").rglob("*.png"))) == 1
    assert (picture.read_bytes(), rows(home)) == before


@pytest.mark.parametrize("given", ["../XR_HAND", "../../link/../XR_HAND", "."])
def test_score_counts_folder_names_from_where_a_path_starts(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    film(tmp_path / "XR_ELBOW/site/XR_HAND/1.png", 1)
    film(tmp_path / "XR_ELBOW/site/XR_WRIST/XR_HAND.png", 2)
    (tmp_path / "XR_ELBOW/link").symlink_to(tmp_path / "XR_ELBOW/site/XR_WRIST")
    monkeypatch.chdir(tmp_path / "XR_ELBOW/site/XR_WRIST")
    where = replace(home, settings=home.settings | {"MURA_BATCH_OVERLAYS": "no"})
    done = where.command("score", given, "--json")
    assert done.returncode == 0, done.stderr
    assert [view["area"] for view in json.loads(done.stdout)] == ["XR_HAND"]


def test_score_takes_a_safetensors_file_with_its_card(home: Home, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_bytes((BUNDLED / "generalist.safetensors").read_bytes())
    card = replace(bundled_card(Area.XR_HAND), operating_points=(OperatingPoint("balanced", 0.99),))
    file.with_suffix(".json").write_text(card.to_json())
    picture = film(tmp_path / "1.png", 1)
    done = home.command(
        "score", str(picture), "--json", "--area", "XR_HAND", "--weights", str(file)
    )
    assert done.returncode == 0, done.stderr
    view = json.loads(done.stdout)[0]
    assert (view["weights"], view["threshold"]) == (card.sha256, 0.99)


def test_score_can_save(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    folder = tmp_path / "XR_HAND"
    film(folder / "1.png", 1)
    film(folder / "2.png", 2)
    assert home.command("score", str(folder), "--save").returncode == 0
    assert [(row["area"], row["views"]) for row in rows(home)] == [("XR_HAND", 2)]
    before = rows(home)
    for state in ("done", "failed"):  # a daemon scores it where it lies, and leaves it there
        home.command("rerun", "--state", state)
        assert home.command("watch", "--once").returncode == 0
    (row,) = rows(home)
    assert (row["study"], row["logit"]) == (before[0]["study"], before[0]["logit"])
    assert row["area_source"] == before[0]["area_source"]
    assert len(list(folder.iterdir())) == 2
    assert not list((home.path / "quarantine").rglob("*.json"))
    other = home.command("score", str(folder), "--save", "--area", "XR_WRIST")
    assert other.returncode == 4
    assert f"rerun {row['study']}" in other.stderr
    assert rows(home) == [row]


def test_folders_of_one_name_in_two_places_are_two_saved_studies(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", archive="leave")
    film(home.inbox / "XR_HAND/0.png", 0)
    assert home.command("watch", "--once").returncode == 0
    (before,) = rows(home)
    for number in (1, 2):
        film(tmp_path / f"{number}/XR_HAND/a.png", number)
        saved = subprocess.run(
            [str(PROGRAM), "score", "XR_HAND", "--save"],
            cwd=tmp_path / str(number),
            env=home.environment(),
            check=True,
            capture_output=True,
        )
        assert b"done" in saved.stdout
    assert len(rows(home)) == 3
    assert before in rows(home)
    assert not list((home.path / "quarantine").rglob("*.json"))


def test_score_of_a_folder_without_images_says_so(home: Home, tmp_path: Path) -> None:
    empty = home.command("score", str(tmp_path), "--area", "XR_HAND")
    assert empty.returncode == 4
    assert "no image in" in empty.stderr


def test_init_adds_what_is_missing_and_changes_nothing_else(tmp_path: Path) -> None:
    home = Home(tmp_path / "new", {})
    first = home.command("init", "--no-fetch")
    assert first.returncode == 0, first.stderr
    (home.path / "config.toml").write_text("batch = 4\n")
    (home.path / "weights/XR_HAND/active.json").unlink()
    before = (home.path / "weights/XR_WRIST/active.json").read_bytes()
    assert home.command("init", "--no-fetch").returncode == 0
    assert (home.path / "config.toml").read_text() == "batch = 4\n"
    assert (home.path / "weights/XR_WRIST/active.json").read_bytes() == before
    assert WeightsStore(home.path / "weights").active(Area.XR_HAND) is not None
    assert home.command("status").returncode == 0


def test_init_goes_on_with_bundled_weights_where_the_server_is_out_of_reach(
    tmp_path: Path,
) -> None:
    home = Home(tmp_path / "new", {"MURA_BATCH_WEIGHTS_URL": "http://127.0.0.1:9/none"})
    done = home.command("init")
    assert done.returncode == 0, done.stderr
    assert "bundled" in done.stderr
    assert done.stdout.count("bundled, trained") == 7


def test_infer_prints_five_lines_and_nothing_else(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    image = SAMPLES / "elbow_lateral.png"
    done = subprocess.run(
        [PROGRAM.with_name("mura-infer"), "--image", image, "--area", "XR_ELBOW"],
        env=home.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    facts = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert list(facts) == ["area", "image", "ckpt", "prob_fracture", "pred"]
    assert facts["pred"] in {"0 (threshold=0.5)", "1 (threshold=0.5)"}
    assert (float(facts["prob_fracture"]) >= 0.5) == facts["pred"].startswith("1")
    assert NOTICE in done.stderr


def test_infer_falls_back_to_bundled_weights(tmp_path: Path) -> None:
    home = Home(tmp_path / "none", {"MURA_BATCH_WEIGHTS_URL": "http://127.0.0.1:9/none"})
    done = subprocess.run(
        [
            PROGRAM.with_name("mura-infer"),
            "--image",
            SAMPLES / "elbow_lateral.png",
            "--area",
            "XR_ELBOW",
        ],
        env=home.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "bundled" in done.stderr
    assert "generalist.safetensors" in done.stdout


def test_only_one_daemon_works_in_a_home(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    daemon = home.start("watch")
    try:
        while not (home.path / ".daemon.json").exists():
            assert daemon.poll() is None
        done = home.command("watch", "--once")
        assert (done.returncode, "another" in done.stderr) == (4, True)
        told = json.loads(home.command("status", "--json").stdout)
        assert told["daemon"]["pid"] == daemon.pid
    finally:
        daemon.terminate()
        assert daemon.wait(60) == 0


def test_what_was_left_out_and_what_waits_is_told_below_the_table(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    good = film(home.inbox / "hand/1.png", 1)
    (home.inbox / "hand/2.png").write_bytes(good.read_bytes()[:3000])
    film(home.inbox / "unnamed.png", 2)
    log = home.command("watch", "--once")
    assert log.returncode == 3
    assert "code=truncated" in log.stderr
    assert "2.png" not in log.stderr
    table = home.command("query")
    assert "1 of 2" in table.stdout
    assert "--set-area AREA" in table.stderr
    assert home.command("rerun", "--state", "done").returncode == 0
    home.command("watch", "--once")
    first, *_ = home.command("query", "--history", "--area", "xr_hand").stdout.splitlines()
    assert {"revision", "weights", "scored_at"} <= set(first.split())


@pytest.mark.parametrize(
    "wrong",
    [
        ("query", "--min-probability", "nan"),
        ("query", "--limit", "99999999999999999999"),
        ("query", "--since", "0001-01-01T00:00+14:00"),
        ("query", "--area", "knee"),
        ("score", "x.png", "--threshold", "nan"),
    ],
)
def test_values_that_mean_nothing_are_wrong_usage(home: Home, wrong: tuple[str, ...]) -> None:
    refused = home.command(*wrong)
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("inbox", ["missing", "file"])
def test_once_without_an_inbox_is_misconfigured(tmp_path: Path, inbox: str) -> None:
    (tmp_path / "file").touch()
    home = make_home(tmp_path / "home", inbox=str(tmp_path / inbox))
    told = home.command("watch", "--once")
    assert (told.returncode, "set `inbox`" in told.stderr) == (4, True), told.stderr


def test_once_says_what_it_could_not_take(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    film(home.inbox / "hand.png", 1)
    film(home.inbox / "/".join(["d"] * 65) / "elbow.png", 2)
    (home.path / "work").rmdir()
    (home.path / "work").touch()
    told = home.command("watch", "--once")
    assert told.returncode == 3, told.stderr
    assert "1 could not be taken: check the permissions" in told.stderr
    assert "part of the inbox cannot be looked into: check" in told.stderr


@pytest.mark.parametrize("films", [0, 1])
def test_a_device_that_is_not_there_stops_the_daemon_before_it_takes_anything(
    tmp_path: Path, films: int
) -> None:
    home = make_home(tmp_path / "home", device="foo")
    for mark in range(films):
        film(home.inbox / "hand.png", mark)
    told = home.command("watch", "--once")
    assert (told.returncode, "device 'foo'" in told.stderr) == (4, True), told.stderr
    assert len(list(home.inbox.iterdir())) == films
