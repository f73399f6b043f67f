"""A search for settings: one Optuna study per folder, measured within the training set.

Each trial is a patient-grouped cross-validation of the films outside ``held_out``; what is held
out is never looked at. The folder keeps Optuna's journal and a folder for each trial's settings,
so that a search that was cut off goes on, in the middle of a trial too, and several processes
can work on one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast, get_args

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import MaxTrialsCallback
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from mura_batch.errors import Misconfigured, Transient
from mura_batch.preprocessing import Fit
from training.crossval import score_run
from training.dataset import Dataset
from training.evaluate import check_readable
from training.fit import LossIsNoNumber, divide, fit, study_auc
from training.folds import folded
from training.processes import side_by_side
from training.run_folder import alone_in, compare, data_digest, state_digest, write_json
from training.settings import CELL, FROZEN, FitSettings, Imbalance, settings_of

_NAME = "settings"  # of the one study in a folder's journal
_LARGER = 10 / 7  # of the input size: 320 instead of 224
_LARGE = ("state.pt", "best.pt", "network.pt")  # of a trial, not needed once it has ended
_STARTUP = 5  # trials before the first is pruned
_MOST_OFF = 5  # trials that go off before a search gives up
_OFF = "off"  # attribute of trials whose loss was no number
_SETTINGS = "settings"  # attribute of trials that have drawn all their values
_ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
_KEPT = (*_ENDED, TrialState.WAITING)


@dataclass(frozen=True, slots=True)
class Best:
    """What a search found.

    Attributes:
        study_auc: mean over the folds.
        trials: that were finished or pruned.
    """

    settings: FitSettings
    study_auc: float
    trials: int


def search(
    data: Dataset,
    run: Path,
    base: FitSettings,
    *,
    trials: int,
    folds: int = 3,
    held_out: Collection[str] = (),
    start: Mapping[str, Tensor] | None = None,
    device: str = "cpu",
    jobs: int = 1,
) -> Best:
    """Look for better settings than ``base`` until so many trials have ended; write
    ``run/best.json``.

    Raises:
        Misconfigured: as for :func:`training.fit.fit`, the folder holds another search or is
            damaged, or too many trials went off.
        Transient: no trial has come to an end, or a process was killed.
    """
    run = run.resolve()  # Optuna's lock is a link that holds the path as it was given
    within = _within(data, held_out, folds, base)
    check_readable([film for film in within.films if film.split == "0"], base.preprocessing)
    made_of = {
        "data": data_digest(within.films),
        "base": asdict(base),
        "folds": folds,
        "start": state_digest(start or {}),
    }
    with alone_in(run):
        if not compare(made_of, run / "search.json", tuple(made_of)):
            write_json(made_of, run / "search.json")
        _begin_anew(_study(run, base.seed), base)
        work = _Search(within, run, base, start, device)
        if jobs == 1:
            work.until(trials, base.seed)
        else:
            side_by_side([partial(work.until, trials, base.seed + n) for n in range(jobs)])
    return _best(run, base)


def _within(data: Dataset, held_out: Collection[str], folds: int, base: FitSettings) -> Dataset:
    """Return the films that may be looked at, in folds of patients."""
    data = data.checked().has_splits(held_out)
    kept = replace(data, films=tuple(f for f in data.films if f.split not in held_out))
    within = folded(kept, folds, base.seed)
    for fold in range(folds):
        divide(within.films, [str(fold)], base)
    return within


def _study(run: Path, seed: int) -> optuna.Study:
    """Open the folder's study; what it draws next depends on the seed and its trials so far."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    journal = run / "journal.log"
    try:
        study = optuna.create_study(
            study_name=_NAME,
            storage=JournalStorage(JournalFileBackend(str(journal))),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=_STARTUP),
            direction="maximize",
            load_if_exists=True,
        )
        study.sampler = optuna.samplers.TPESampler(seed=seed + 1000 * len(study.trials))
    except (ValueError, KeyError, UnicodeDecodeError) as exc:
        raise Misconfigured(
            f"{journal} is damaged ({exc}): remove its last line, or name another folder."
        ) from exc
    return study


def _begin_anew(study: optuna.Study, base: FitSettings) -> None:
    """Queue what to begin with: the base, or what was cut off, by a kill or an error."""
    trials = study.trials
    if not trials:
        study.enqueue_trial(_params_of(base))
    done = [_fixed(trial) for trial in trials if trial.state in _KEPT or _OFF in trial.user_attrs]
    for trial in trials:
        if trial.state is TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
        if (params := _fixed(trial)) and params not in done:
            study.enqueue_trial(params)
            done.append(params)


def _fixed(trial: FrozenTrial) -> dict[str, object]:
    """Return a trial's values, queued or drawn; none where it was cut off while drawing them."""
    queued = trial.system_attrs.get("fixed_params")
    if queued is not None:
        return cast("dict[str, object]", queued)
    return trial.params if _SETTINGS in trial.user_attrs else {}


@dataclass(frozen=True, slots=True)
class _Search:
    """What trials need; it goes to other processes as it is."""

    data: Dataset
    run: Path
    base: FitSettings
    start: Mapping[str, Tensor] | None
    device: str

    def until(self, trials: int, seed: int) -> None:
        """Run trials until so many have ended."""
        study = _study(self.run, seed)
        if sum(trial.state in _ENDED for trial in study.trials) < trials:
            enough = MaxTrialsCallback(trials, states=_ENDED)
            study.optimize(self._trial, callbacks=[enough, _too_many_off], catch=(LossIsNoNumber,))

    def _trial(self, trial: optuna.Trial) -> float:
        """Return the mean study AUC of the folds, or prune after one of them."""
        try:
            return self._measured(trial)
        except LossIsNoNumber:
            trial.set_user_attr(_OFF, value=True)
            raise

    def _measured(self, trial: optuna.Trial) -> float:
        settings = _suggested(trial, self.base)
        trial.set_user_attr(_SETTINGS, json.dumps(asdict(settings)))
        own = self.run / "trials" / hashlib.sha256(repr(settings).encode()).hexdigest()[:12]
        folds = sorted({film.split for film in self.data.films})
        found: list[float] = []
        for fold in folds:
            found.append(self._fold(own / fold, fold, settings))
            trial.report(float(np.mean(found)), len(found))
            if trial.should_prune():
                break
        write_json(found, own / "study_auc.json")
        for name in _LARGE:
            for file in own.glob(f"*/{name}"):
                file.unlink()
        if len(found) < len(folds):
            raise optuna.TrialPruned
        return float(np.mean(found))

    def _fold(self, part: Path, fold: str, settings: FitSettings) -> float:
        """Return the study AUC of a fold by a network that never saw its patients."""
        fit(
            self.data,
            part,
            settings,
            held_out=[fold],
            start=self.start,
            device=self.device,
            workers=0,
            cache=self.run / "films",
        )
        films = [film for film in self.data.films if film.split == fold]
        return study_auc(films, [one.logit for one in score_run(part, films, self.device)])


def _too_many_off(study: optuna.Study, _: FrozenTrial) -> None:
    """Give up where training goes off again and again.

    Raises:
        Misconfigured: it does.
    """
    off = sum(_OFF in trial.user_attrs for trial in study.trials)
    if off >= _MOST_OFF:
        raise Misconfigured(
            f"The loss was no number in {off} trials: begin from a smaller rate in another folder."
        )


def _suggested(trial: optuna.Trial, base: FitSettings) -> FitSettings:
    """Return the base with a trial's values for what matters."""
    small = base.preprocessing.size
    size = trial.suggest_categorical("size", (small, round(small * _LARGER / CELL) * CELL))
    spec = replace(
        base.preprocessing,
        size=size,
        fit=cast("Fit", trial.suggest_categorical("fit", get_args(Fit))),
    )
    last = base.stages[-1].size
    frozen = trial.suggest_int("frozen", 0, FROZEN)
    return replace(
        base,
        preprocessing=spec,
        stages=tuple(
            replace(s, size=size, frozen=frozen) if s.size == last else s for s in base.stages
        ),
        head_epochs=trial.suggest_int("head_epochs", 0, 4),
        rate=trial.suggest_float("rate", 1e-5, 3e-3, log=True),
        block_decay=trial.suggest_float("block_decay", 0.4, 1.0),
        weight_decay=trial.suggest_float("weight_decay", 1e-3, 0.3, log=True),
        augmentation=trial.suggest_float("augmentation", 0.0, 1.5),
        imbalance=cast("Imbalance", trial.suggest_categorical("imbalance", get_args(Imbalance))),
    )


def _params_of(base: FitSettings) -> dict[str, object]:
    """Return the base's values for what :func:`_suggested` asks."""
    named = ("head_epochs", "rate", "block_decay", "weight_decay", "augmentation", "imbalance")
    spec, frozen = base.preprocessing, base.stages[-1].frozen
    seen = {"size": spec.size, "fit": spec.fit, "frozen": frozen}
    return {name: getattr(base, name) for name in named} | seen


def _best(run: Path, base: FitSettings) -> Best:
    study = _study(run, base.seed)
    ended = [trial for trial in study.trials if trial.state in _ENDED]
    if not any(trial.state is TrialState.COMPLETE for trial in ended):
        raise Transient(f"{run}: no trial has come to its end: run the same command again.")
    settings = settings_of(json.loads(study.best_trial.user_attrs[_SETTINGS]))
    best = Best(settings, study.best_value, len(ended))
    write_json(asdict(best), run / "best.json")
    return best
