"""Batches across studies: views wait for company, one warm network per set of weights.

A view is announced before it is decoded and submitted once it is. A batch goes off when it is
full, when its oldest view has waited ``batch_seconds``, or when nothing more is on its way, so
that studies that wait together share forward passes and a lone study does not wait at all.
"""

from __future__ import annotations

import atexit
import gc
import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from mura_batch.config import Settings
from mura_batch.errors import Misconfigured, MuraError, Rejected, Transient
from mura_batch.preprocessing import Luminance

if TYPE_CHECKING:
    from mura_batch.runtime import Runtime
    from mura_batch.weights import Card, WeightsStore

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ViewScore:
    """What the network said of one view.

    Attributes:
        logit: raw output; its sigmoid is the probability of the target in this view.
        map: float32 (h, w), signed evidence in logit units (see :mod:`mura_batch.network`).
        runtime: what computed it, such as ``torch cpu``.
    """

    logit: float
    map: NDArray[np.float32]
    runtime: str

    @property
    def probability(self) -> float:
        """Sigmoid of the logit, 0–1."""
        return sigmoid(self.logit)


def sigmoid(logit: float) -> float:
    """Return 1 / (1 + e^-logit) without overflow."""
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else 1 - 1 / (1 + math.exp(logit))


def warm_scorer(settings: Settings, weights: WeightsStore) -> Scorer:
    """Return a scorer that runs stored weights as the settings ask.

    Raises:
        Misconfigured: this machine does not have the device or the runtime.
    """
    _check(settings)

    def ready(card: Card) -> Runtime:
        from mura_batch.runtime import load  # noqa: PLC0415 - torch only where networks run

        network = weights.load(card)
        spec, device = card.preprocessing, settings.device
        runtime = load(network, spec, runtime=settings.runtime, device=device)
        _settle_garbage()
        return runtime

    return Scorer(
        ready,
        batch=settings.batch,
        batch_seconds=settings.batch_seconds,
        cache_bytes=settings.cache_mb << 20,
    )


def _settle_garbage() -> None:
    """Spare the collector what torch's import left: it would look through it again and again.

    Measured in the daemon: 5 % of the time of a run.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # nanobind's modules count what is left at the end as leaks


def _check(settings: Settings) -> None:
    on_cpu = settings.device in {"auto", "cpu"}
    if settings.runtime == "openvino" and not (on_cpu and find_spec("openvino")):
        raise Misconfigured(
            "the openvino runtime works on the CPU only, where it is installed: set `device` to"
            " auto and pip install 'mura-batch[openvino]', or set `runtime` to auto or torch"
        )
    if not on_cpu:
        from mura_batch.runtime.torch_runtime import find_device  # noqa: PLC0415 - imports torch

        find_device(settings.device)


@dataclass(slots=True)
class _Waiting:
    pixels: Luminance
    since: float
    score: Future[ViewScore]


class _Lane:
    """The views that wait for one network, and how many more were announced."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self.waiting: deque[_Waiting] = deque()
        self.announced = 0


class Scorer:
    """Scores views in batches on a thread of its own; use it as a context manager.

    Args:
        load: makes the network of a card ready to run; called once while it stays warm.
        batch: views in one forward pass at most.
        batch_seconds: longest wait for company.
        cache_bytes: warm networks' memory; the least recently used one goes first.
    """

    def __init__(
        self,
        load: Callable[[Card], Runtime],
        *,
        batch: int = 16,
        batch_seconds: float = 2.0,
        cache_bytes: int = 2 << 30,
    ) -> None:
        self.forward_calls = 0
        self._load = load
        self._batch = batch
        self._batch_seconds = batch_seconds
        self._cache_bytes = cache_bytes
        self._warm: OrderedDict[str, Runtime] = OrderedDict()
        self._lanes: dict[str, _Lane] = {}
        self._feeding = 0
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="scorer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    @contextmanager
    def feeding(self) -> Iterator[None]:
        """While open, more views are on their way: batches wait for them, within the bound."""
        with self._changed:
            self._feeding += 1
        try:
            yield
        finally:
            with self._changed:
                self._feeding -= 1
                self._changed.notify_all()

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Inside :meth:`feeding`: while open, nothing new comes before a batch goes off."""
        with self._changed:
            self._feeding -= 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._feeding += 1

    def announce(self, card: Card) -> None:
        """Say that a view for this card will be submitted, or withdrawn if it can't be read."""
        with self._changed:
            self._lane(card).announced += 1

    def withdraw(self, card: Card) -> None:
        """Take an announcement back."""
        with self._changed:
            self._lane(card).announced -= 1
            self._changed.notify_all()

    def submit(self, card: Card, pixels: Luminance) -> Future[ViewScore]:
        """Hand in an announced view's network input (uint8, size × size) for a score to come.

        The future raises what loading the weights raised, ``Transient`` where memory ran out
        even for one view, or ``Rejected`` where the network gave no finite number.
        """
        view = _Waiting(pixels, time.monotonic(), Future())
        with self._changed:
            lane = self._lane(card)
            lane.announced -= 1
            lane.waiting.append(view)
            self._changed.notify_all()
        return view.score

    def _lane(self, card: Card) -> _Lane:
        return self._lanes.setdefault(card.sha256, _Lane(card))

    def _work(self) -> None:
        while True:
            with self._changed:
                while (lane := self._ready()) is None:
                    if self._closing and not any(x.waiting for x in self._lanes.values()):
                        return
                    self._changed.wait(self._until_due())
                size = min(self._batch, len(lane.waiting))
                views = [lane.waiting.popleft() for _ in range(size)]
            self._score(lane.card, views)

    def _ready(self) -> _Lane | None:
        """Return the lane whose batch should go now: full ones first, then the oldest."""
        now = time.monotonic()
        due: list[tuple[bool, float, _Lane]] = []
        for lane in self._lanes.values():
            if not lane.waiting:
                continue
            full = len(lane.waiting) >= self._batch
            late = now - lane.waiting[0].since >= self._batch_seconds
            alone = lane.announced <= 0 and not self._feeding
            if full or late or alone or self._closing:
                due.append((not full, lane.waiting[0].since, lane))
        return min(due, key=lambda entry: entry[:2])[2] if due else None

    def _until_due(self) -> float | None:
        oldest = [lane.waiting[0].since for lane in self._lanes.values() if lane.waiting]
        if not oldest:
            return None
        return max(0.0, min(oldest) + self._batch_seconds - time.monotonic())

    def _score(self, card: Card, views: list[_Waiting]) -> None:
        try:
            runtime = self._runtime(card)
        except Exception as exc:  # noqa: BLE001 - runtimes raise of all kinds, and this thread lives
            lost = exc if isinstance(exc, MuraError) else Transient(f"loading the network: {exc}")
            for view in views:
                view.score.set_exception(lost)
            return
        self._forward(runtime, views)

    def _forward(self, runtime: Runtime, views: list[_Waiting]) -> None:
        """Score ``views``; where that fails, each half alone, so that one bad view fails alone."""
        self.forward_calls += 1
        name = f"{runtime.name} {runtime.device}"
        scored = 0
        try:
            for part in runtime.infer(np.stack([view.pixels for view in views])):
                for logit, evidence in zip(part.logits, part.maps, strict=True):
                    _deliver(views[scored], float(logit), evidence, name)
                    scored += 1
        except Exception as exc:  # noqa: BLE001 - likewise
            if len(views) == 1:
                error = exc if isinstance(exc, Transient) else Transient(f"forward pass: {exc}")
                views[0].score.set_exception(error)
                return
            log.warning("forward pass failed, batch is split", extra={"views": len(views)})
            middle = max(scored + 1, (scored + len(views)) // 2)
            for half in (views[scored:middle], views[middle:]):
                if half:
                    self._forward(runtime, half)

    def _runtime(self, card: Card) -> Runtime:
        if card.sha256 in self._warm:
            self._warm.move_to_end(card.sha256)
            return self._warm[card.sha256]
        runtime = self._load(card)
        self._warm[card.sha256] = runtime
        while (
            len(self._warm) > 1 and sum(r.nbytes for r in self._warm.values()) > self._cache_bytes
        ):
            gone, _ = self._warm.popitem(last=False)
            log.info("network released", extra={"weights": gone[:12]})
        return runtime


def _deliver(view: _Waiting, logit: float, evidence: NDArray[np.float32], runtime: str) -> None:
    if math.isfinite(logit):
        view.score.set_result(ViewScore(logit, evidence, runtime))
    else:
        view.score.set_exception(Rejected("not_finite", "the network gave no number"))
