"""A search for settings: within the training set, cut off and gone on, side by side."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import optuna
import psutil
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from tiny_atlas import TINY, write_atlas

from mura_batch.errors import Misconfigured, Transient
from training.fit import LossIsNoNumber
from training.folds import folded
from training.run_folder import read_settings
from training.search import search
from training.settings import Stage
from training.sources import read

SMALL = replace(TINY, head_epochs=0, stages=(Stage(64, 1),), patience=None)


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_atlas(tmp_path_factory.mktemp("atlas"))


def trials(run: Path) -> list[optuna.trial.FrozenTrial]:
    storage = JournalStorage(JournalFileBackend(str(run / "journal.log")))
    return optuna.load_study(study_name="settings", storage=storage).trials


def test_the_first_trial_is_the_base_and_what_is_held_out_is_not_looked_at(
    atlas: Path, tmp_path: Path
) -> None:
    data = read(atlas)
    changed = tuple(
        replace(f, path=f.path.with_suffix(".none")) if f.split == "0" else f for f in data.films
    )
    found = search(
        replace(data, films=changed), tmp_path / "run", SMALL, trials=1, folds=2, held_out=["0"]
    )
    assert found.trials == 1
    assert found.settings == SMALL
    assert 0 <= found.study_auc <= 1
    assert read_settings(tmp_path / "run/best.json") == SMALL
    with pytest.raises(Misconfigured, match=r"another run \(data, base differ\)"):
        search(data, tmp_path / "run", replace(SMALL, rate=1.0), trials=1, folds=2)
    with pytest.raises(Misconfigured, match="too few"):
        search(data, tmp_path / "other", SMALL, trials=1, folds=5)


def test_a_search_killed_in_a_trial_goes_on_with_it(atlas: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from test_search import SMALL, read, search\n"
        "if __name__ == '__main__':\n"
        "    search(read(Path(sys.argv[1])), Path(sys.argv[2]), SMALL, trials=2, folds=2,"
        " held_out=['0'], jobs=int(sys.argv[3]))"
    )
    run = tmp_path / "run"
    (tmp_path / "search_it.py").write_text(script)
    here = Path(__file__).parent
    command = [sys.executable, tmp_path / "search_it.py", atlas, run]
    env = {"PYTHONPATH": f"{here}:{here.parent}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, "1"], env=env) as child:
        while child.poll() is None and not list(run.glob("trials/*/0/state.pt")):
            time.sleep(0.01)
        child.kill()
    (cut,) = trials(run)
    assert cut.state is TrialState.RUNNING
    with subprocess.Popen([*command, "2"], env=env) as child:
        while child.poll() is None and not any(
            trial.state is TrialState.RUNNING for trial in trials(run)[1:]
        ):
            time.sleep(0.01)
        workers = psutil.Process(child.pid).children(recursive=True)
        child.kill()
    assert workers
    _, left = psutil.wait_procs(workers, timeout=20)
    assert not left
    subprocess.run([*command, "2"], env=env, check=True)
    first, *others = trials(run)
    assert first.state is TrialState.FAIL
    assert cut.params in [trial.params for trial in others]
    assert sum(t.state in {TrialState.COMPLETE, TrialState.PRUNED} for t in others) >= 2
    assert not list(run.glob("trials/*/*/network.pt"))


def test_trials_cut_off_while_they_drew_values_are_no_settings_to_try(
    atlas: Path, tmp_path: Path
) -> None:
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "journal.log")))
    study = optuna.create_study(study_name="settings", storage=storage, direction="maximize")
    base = {
        "size": SMALL.preprocessing.size,
        "fit": SMALL.preprocessing.fit,
        "frozen": SMALL.stages[-1].frozen,
        "head_epochs": SMALL.head_epochs,
        "rate": SMALL.rate,
        "block_decay": SMALL.block_decay,
        "weight_decay": SMALL.weight_decay,
        "augmentation": SMALL.augmentation,
        "imbalance": SMALL.imbalance,
    }
    study.enqueue_trial(base)
    study.ask().suggest_categorical("size", (64, 96))
    study.ask().suggest_int("frozen", 0, 3)
    search(read(atlas), tmp_path, SMALL, trials=1, folds=2)
    *cut, tried = trials(tmp_path)
    assert [trial.state for trial in cut] == [TrialState.FAIL, TrialState.FAIL]
    assert tried.params == base


def test_what_an_error_cut_off_is_tried_again_and_what_goes_off_is_not(
    atlas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise Transient("the disk is full")

    data = read(atlas)
    with monkeypatch.context() as patch:
        patch.setattr("training.search.fit", fails)
        with pytest.raises(Transient, match="disk"):
            search(data, tmp_path / "run", SMALL, trials=1, folds=2)
    assert search(data, tmp_path / "run", SMALL, trials=1, folds=2).settings == SMALL
    search(data, tmp_path / "run", SMALL, trials=3, folds=2)
    drawn = [str(t.params) for t in trials(tmp_path / "run") if t.state is not TrialState.FAIL]
    assert len(set(drawn)) == len(drawn) == 3

    def goes_off(*_: object, **__: object) -> None:
        raise LossIsNoNumber("nan")

    monkeypatch.setattr("training.search.fit", goes_off)
    with pytest.raises(Misconfigured, match="no number in 5 trials"):
        search(data, tmp_path / "off", SMALL, trials=1, folds=2)
    journal = tmp_path / "run/journal.log"
    journal.write_text(journal.read_text()[:-20])
    with pytest.raises(Misconfigured, match="journal.log is damaged"):
        search(data, tmp_path / "run", SMALL, trials=9, folds=2)


def test_folds_share_no_patient_and_miss_none(atlas: Path) -> None:
    data = read(atlas)
    made = folded(data, 3, seed=1)
    assert {film.path for film in made.films} == {film.path for film in data.films}
    splits: dict[str, set[str]] = {}
    for film in made.films:
        splits.setdefault(film.patient, set()).add(film.split)
    assert all(len(of_patient) == 1 for of_patient in splits.values())
    assert folded(data, 3, seed=1) == made
    for fold in "012":
        assert {film.label for film in made.films if film.split == fold} == {0, 1}
