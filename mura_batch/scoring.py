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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from mura_batch.config import Settings
from mura_batch.errors import Misconfigured, MuraError, Rejected, Transient, WeightsRefused
from mura_batch.network_input import Luminance, Resize, resized
from mura_batch.runtime import words

if TYPE_CHECKING:
    from mura_batch.runtime import Inference, Runtime
    from mura_batch.weights import Card, WeightsStore

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ViewScore:
    """What the network said of one view.

    Attributes:
        logit: raw output; its sigmoid is the probability of the target in this view.
        map: float32 (h, w), signed evidence in logit units (see :mod:`mura_batch.network`).
        runtime: what computed it, such as ``torch f32 cpu``.
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


def warm_scorer(settings: Settings, weights: WeightsStore, *, lasting: bool = True) -> Scorer:
    """Return a scorer that runs stored weights as the settings ask.

    Compiled networks, and which runtime is faster, are found out for a home that is ``lasting``.

    Raises:
        Misconfigured: this machine does not have the device or the runtime.
    """
    _check(settings)

    ranges: dict[str, Mapping[str, float]] = {}  # of each network: the same as long as this runs

    def ready(card: Card) -> Runtime:
        from mura_batch.runtime import load  # noqa: PLC0415 - seconds, only where networks run

        if card.sha256 not in ranges:
            ranges[card.sha256] = _ranges(weights, card)
        runtime = load(
            weights.load(card),
            card.preprocessing,
            runtime=settings.runtime,
            device=settings.device,
            precision=settings.precision,
            ranges=ranges[card.sha256],
            kept=settings.home / "compiled" / card.sha256 if lasting else None,
        )
        log.info("network ready", extra={"weights": card.short, "runtime": words(runtime)})
        if runtime.device.startswith("cuda"):
            from mura_batch.runtime.device_resize import resize_on  # noqa: PLC0415 - torch, seconds

            scorer.resize = resize_on(runtime.device, card.preprocessing.size)
        _settle_garbage()
        return runtime

    scorer = Scorer(
        ready,
        batch=settings.batch,
        batch_seconds=settings.batch_seconds,
        cache_bytes=settings.cache_mb << 20,
    )
    return scorer


def _ranges(weights: WeightsStore, card: Card) -> Mapping[str, float]:
    """Return with what these weights may run in int8; nothing where they may not."""
    try:
        form = weights.int8_form(card)
    except WeightsRefused as exc:
        log.warning("weights run in f32", extra={"weights": card.short, "why": str(exc)})
        return {}
    return form.ranges if form and not form.refusal else {}


def _settle_garbage() -> None:
    """Spare the collector what imports left: it would look through it again and again.

    Measured in the daemon with torch: 5 % of the time of a run.
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


@dataclass(slots=True)
class _Pass:
    """A forward pass that was started.

    Attributes:
        runtime: what computes it, such as ``torch f32 cpu``.
        parts: what it gives, in the order of ``views``.
        scored: how many views have their score.
    """

    card: Card
    runtime: str
    views: list[_Waiting]
    parts: Iterator[Inference] = field(default_factory=lambda: iter(()))
    scored: int = 0


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

    Attributes:
        forward_calls: passes that were started.
        resize: how films are to be made as small as the networks want them, on their device where
            that is quicker; it changes once the first network is ready.
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
        self.resize: Resize = resized
        self._load = load
        self._batch = batch
        self._batch_seconds = batch_seconds
        self._cache_bytes = cache_bytes
        self._warm: OrderedDict[str, Runtime] = OrderedDict()
        self._lanes: dict[str, _Lane] = {}
        self._expected: Card | None = None
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

    def expect(self, card: Card) -> None:
        """Make a network ready before there are views for it.

        Errors are logged, and raised for the first views that need it.
        """
        with self._changed:
            self._expected = card
            self._changed.notify_all()

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
        under_way: deque[_Pass] = deque()
        while True:
            with self._changed:
                while (lane := self._next(under_way)) is None and not under_way:
                    if self._closing and not any(x.waiting for x in self._lanes.values()):
                        return
                    if self._expected:
                        break
                    self._changed.wait(self._until_due())
                expected, self._expected = self._expected, None
                size = min(self._batch, len(lane.waiting)) if lane else 0
                views = [lane.waiting.popleft() for _ in range(size)] if lane else []
            if expected:
                self._made_ready(expected)
            if lane and (started := self._started(lane.card, views)):
                under_way.append(started)
            if under_way and not self._take(under_way[0]):
                under_way.popleft()

    def _next(self, under_way: Sequence[_Pass]) -> _Lane | None:
        """Return the lane that a pass should start for now; a second one only for the same
        network, or two would have more streams than there are processors.
        """
        lane = self._ready()
        if lane and under_way and (len(under_way) > 1 or under_way[0].card != lane.card):
            return None
        return lane

    def _ready(self) -> _Lane | None:
        """Return the lane whose batch should go now: the oldest, a full one ``batch_seconds``
        before its time, so that none waits for good behind one that is always full.
        """
        now = time.monotonic()
        due: list[tuple[float, _Lane]] = []
        for lane in self._lanes.values():
            if not lane.waiting:
                continue
            full = len(lane.waiting) >= self._batch
            late = now - lane.waiting[0].since >= self._batch_seconds
            alone = lane.announced <= 0 and not self._feeding
            if full or late or alone or self._closing:
                head_start = self._batch_seconds if full else 0.0
                due.append((lane.waiting[0].since - head_start, lane))
        return min(due, key=lambda entry: entry[0])[1] if due else None

    def _until_due(self) -> float | None:
        oldest = [lane.waiting[0].since for lane in self._lanes.values() if lane.waiting]
        if not oldest:
            return None
        return max(0.0, min(oldest) + self._batch_seconds - time.monotonic())

    def _started(self, card: Card, views: list[_Waiting]) -> _Pass | None:
        """Start a pass over ``views``; None where it failed and every view knows it."""
        try:
            runtime = self._runtime(card)
        except Exception as exc:  # noqa: BLE001 - runtimes raise of all kinds, and this thread lives
            lost = exc if isinstance(exc, MuraError) else Transient(f"loading the network: {exc}")
            for view in views:
                view.score.set_exception(lost)
            return None
        self.forward_calls += 1
        started = _Pass(card, words(runtime), views)
        try:
            started.parts = runtime.infer(np.stack([view.pixels for view in views]))
        except Exception as exc:  # noqa: BLE001 - a pass may fail in any way: see _split
            error = _bare(exc)
        else:
            return started
        self._split(started, error)
        return None

    def _take(self, under_way: _Pass) -> bool:
        """Wait for the next part of a pass and deliver it; False where that was all."""
        try:
            if (part := next(under_way.parts, None)) is None:
                return False
            for logit, evidence in zip(part.logits, part.maps, strict=True):
                view = under_way.views[under_way.scored]
                under_way.scored += 1
                _deliver(view, float(logit), evidence, under_way.runtime)
        except Exception as exc:  # noqa: BLE001 - what fails late is split like what fails at once
            error = _bare(exc)
        else:
            return True
        self._split(under_way, error)
        return False

    def _split(self, failed: _Pass, error: Exception) -> None:
        """Score what a failed pass left, each half alone, so that one bad view fails alone."""
        left = failed.views[failed.scored :]
        if left and len(failed.views) == 1:
            lost = error if isinstance(error, Transient) else Transient(f"forward pass: {error}")
            left[0].score.set_exception(lost)
            return
        log.warning("forward pass failed, batch is split", extra={"views": len(failed.views)})
        middle = max(1, len(left) // 2)
        for half in (left[:middle], left[middle:]):
            again = self._started(failed.card, half) if half else None
            while again and self._take(again):
                pass

    def _made_ready(self, card: Card) -> None:
        try:
            self._runtime(card)
        except Exception as exc:  # noqa: BLE001 - the views that need it will hear of it
            log.warning("network not ready", extra={"weights": card.short, "why": str(exc)})

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


def _bare(error: Exception) -> Exception:
    """Let go of the frames of a failed pass: they hold its memory, which the next one needs."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _deliver(view: _Waiting, logit: float, evidence: NDArray[np.float32], runtime: str) -> None:
    if math.isfinite(logit):
        view.score.set_result(ViewScore(logit, evidence, runtime))
    else:
        view.score.set_exception(Rejected("not_finite", "the network gave no number"))
