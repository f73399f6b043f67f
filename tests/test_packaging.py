"""What a user installs: the wheel in an environment of its own, away from the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mura_batch.area import Area

REPOSITORY = Path(__file__).parent.parent


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, **options)  # noqa: PLW1510 - the callers look at the code
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", out)
    run(*build, REPOSITORY)
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``mura-batch`` installed from the wheel, over the dependencies of this environment.

    They come in by a path file, after the new environment's own packages. Path files of the
    outer environment are not read, so its editable install of this checkout is not found.
    """
    place = tmp_path_factory.mktemp("installed")
    venv.create(place, with_pip=False, symlinks=True)
    packages = place / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    into = (f"--python={place / 'bin' / 'python'}", "install", "--no-deps", "--no-index", wheel)
    run(*pip, *into)
    outer = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "outer.pth").write_text("\n".join(outer) + "\n", encoding="utf-8")
    return place / "bin" / "mura-batch"


def test_the_wheel_brings_migrations_samples_weights_and_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tracked = [
        *(REPOSITORY / "migrations").rglob("*.py"),
        *(p for p in (REPOSITORY / "mura_batch" / "samples").rglob("*") if p.is_file()),
    ]
    inside = [
        ("" if p.is_relative_to(REPOSITORY / "mura_batch") else "mura_batch/")
        + p.relative_to(REPOSITORY).as_posix()
        for p in tracked
    ]
    cards = [f"mura_batch/bundled/cards/{area}.json" for area in Area]
    assert {*inside, *cards, "mura_batch/bundled/generalist.safetensors"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "deploy/"))]


def test_demo_and_database_work_from_the_installed_wheel(program: Path, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MURA_", "PYTHON"))}
    options = {"cwd": tmp_path, "env": environment | {"HOME": str(tmp_path)}}
    where = "import mura_batch; print(mura_batch.__file__)"
    found = run(program.parent / "python", "-c", where, **options).stdout
    assert Path(found.strip()).is_relative_to(program.parent.parent)
    home = tmp_path / "home"
    home.mkdir()
    run(program, "--home", home, "db", "upgrade", **options)
    assert run(program, "--home", home, "db", "check", **options).stdout.strip() == "ok"
    shown = run(program, "demo", **options)
    assert {area for area in Area if area in shown.stdout} == set(Area)
    assert "not a medical device" in shown.stdout + shown.stderr


def test_locked_requirements_are_hashed_and_name_no_address() -> None:
    for file in sorted((REPOSITORY / "requirements").glob("*.txt")):
        text = file.read_text(encoding="utf-8")
        entries = re.split(r"\n(?=\S)", text.strip())
        assert [
            e for e in entries if not re.match(r"[a-z0-9-]+==\S+.*\\\n +--hash=sha256:", e)
        ] == []
        assert not re.search(
            r"://|^ *(-i|-f|--(extra-)?index-url|--find-links)\b", text, re.MULTILINE
        )


@pytest.mark.parametrize(("file", "extras"), [("run.txt", ()), ("test.txt", ("test",))])
def test_locked_versions_satisfy_what_the_project_asks_for(
    file: str, extras: tuple[str, ...]
) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (REPOSITORY / "requirements" / file).read_text(encoding="utf-8")
    locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", text, re.MULTILINE))
    wanted = list(map(Requirement, project["dependencies"]))
    for extra in extras:
        wanted += map(Requirement, project["optional-dependencies"][extra])
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        if name == canonicalize_name(project["name"]):
            own = [project["optional-dependencies"][extra] for extra in requirement.extras]
            wanted += [Requirement(line) for lines in own for line in lines]
        else:
            assert name in locked, f"{name}: run `make lock`"
            assert requirement.specifier.contains(locked[name]), f"{name}: run `make lock`"


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="no git checkout: nothing tracked")
def test_no_tracked_file_holds_a_home_folder_of_the_machine_it_was_written_on() -> None:
    listed = run("git", "-C", REPOSITORY, "ls-files", "-z", "--cached")
    home = re.compile(rb"(?<![\w.$])/(?:root|home/(?!alice\b)\w+|Users)/")
    tracked = [REPOSITORY / name for name in listed.stdout.split("\0") if name]
    others = [file for file in tracked if file.is_file() and file != Path(__file__)]
    assert len(others) > 10
    assert [file.name for file in others if home.search(file.read_bytes())] == []
