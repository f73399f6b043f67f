"""How many images a second this machine scores: the bare networks, and the whole way of a study.

Everything is measured on the bundled sample studies with the bundled weights. All contenders take
turns within each round, and each reports its median over the rounds, so that a machine that has
other things to do disturbs them alike.
"""

from __future__ import annotations

import io
import logging
import math
import os
import platform
import shutil
import statistics
import struct
import tempfile
import threading
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pydicom
import torch
from numpy.typing import NDArray

from mura_batch import database
from mura_batch.area import Area
from mura_batch.config import Settings
from mura_batch.daemon import Daemon, Summary
from mura_batch.demo import drop_samples
from mura_batch.errors import MuraError
from mura_batch.network import Network, network_with, normalise
from mura_batch.preprocessing import Preprocessing
from mura_batch.radiograph import read_film
from mura_batch.runtime import Inference, Runtime
from mura_batch.runtime.choice import refusal
from mura_batch.runtime.cuda_runtime import CudaRuntime
from mura_batch.runtime.inference import Precision
from mura_batch.runtime.torch_runtime import TorchRuntime, find_device
from mura_batch.tensors import Weights
from mura_batch.weights import WeightsStore, bundled_card, bundled_int8_form, load_bundled

Say = Callable[[str], object]
Name = Literal["torch", "openvino"]

_WEIGHTS_OF = Area.XR_HAND  # the bundled weights are the same for all areas
_PATIENCE = 60.0  # seconds without any step before an end-to-end run is given up
_SCORING_MODE: Final[dict[Name, str]] = {  # how the daemon runs each
    "torch": "channels_last",
    "openvino": "async",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: turns of every way.
        views: that a network scores by itself before each turn.
        films: that go the whole way in each turn, at least.
    """

    rounds: int = 3
    views: int = 48
    films: int = 400


@dataclass(frozen=True, slots=True)
class ModelOnly:
    """The forward passes of one runtime, from uint8 pixels to logits and maps.

    Attributes:
        max_logit_diff, max_map_diff: largest absolute difference from torch f32 eager on the
            CPU, over the sample films, in logit units.
    """

    runtime: Name
    precision: Precision
    mode: str
    device: str
    batch: int
    images_per_s: float
    max_logit_diff: float
    max_map_diff: float


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """The daemon from the first claim to the last file in the archive.

    Attributes:
        start_s: seconds from the daemon's start until it had settled, loaded its network for
            and finished a first handful of studies; not part of ``images_per_s``.
    """

    runtime: Name
    precision: Precision
    overlay: bool
    images: int
    images_per_s: float
    start_s: float


@dataclass(frozen=True, slots=True)
class Report:
    """What ``mura-batch bench`` prints."""

    machine: dict[str, Any]
    model_only: tuple[ModelOnly, ...]
    end_to_end: tuple[EndToEnd, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)

    def to_text(self) -> str:
        """Return the report as lines for a terminal."""
        lines = [f"{name.replace('_', ' ')}: {value}" for name, value in self.machine.items()]
        lines += ["", f"{'forward pass alone':40}images/s   max Δ logit   max Δ map"]
        for m in self.model_only:
            name = f"{m.runtime} {m.precision} {m.mode}, {m.device}, batches of {m.batch}"
            differences = f"{m.max_logit_diff:14.1e}{m.max_map_diff:12.1e}"
            lines.append(f"  {name:38}{m.images_per_s:8.1f}{differences}")
        lines += ["", f"{'end to end':40}images/s   of the pass   images   start-up"]
        for e in self.end_to_end:
            name = str(Way(e.runtime, e.precision, e.overlay))
            facts = f"{self._share(e):14.0%}{e.images:9}{e.start_s:9.1f} s"
            lines.append(f"  {name:38}{e.images_per_s:8.1f}{facts}")
        return "\n".join(lines)

    def _share(self, whole: EndToEnd) -> float:
        """Return what of the bare forward pass's rate the whole way keeps, on the same runtime."""
        own = (whole.runtime, whole.precision, _SCORING_MODE[whole.runtime])
        bare = [m for m in self.model_only if (m.runtime, m.precision, m.mode) == own]
        return whole.images_per_s / bare[-1].images_per_s  # the device that `auto` chooses is last


def measure(say: Say, plan: Plan = Plan()) -> Report:
    """Measure every runtime of this machine; ``say`` is told what goes on, a line at a time."""
    machine = _machine()
    contenders = _contenders(say)
    pixels = _sample_pixels()
    differences = _differences(contenders, pixels)
    batch = Settings(home=Path()).batch
    films = np.resize(pixels, (batch, *pixels.shape[1:]))
    for contender in contenders:
        contender.infer(films)
    ways = [
        Way(*kind, overlay=overlay)
        for kind in dict.fromkeys((c.runtime, c.precision) for c in contenders if c.scoring)
        for overlay in (True, False)
    ]
    bare: dict[int, list[float]] = {n: [] for n in range(len(contenders))}
    whole: dict[Way, list[Passage]] = {way: [] for way in ways}
    with sample_films(plan.films) as folder:
        for turn in range(plan.rounds):
            for way in ways:
                say(f"round {turn + 1} of {plan.rounds}: {way}")
                for n, contender in enumerate(contenders):  # close to what is held against it
                    if (contender.runtime, contender.precision) == (way.runtime, way.precision):
                        bare[n].append(_rate(contender, films, plan.views))
                whole[way].append(run_through(folder, way))
    return Report(
        machine,
        tuple(
            ModelOnly(
                c.runtime, c.precision, c.mode, c.device, batch, _median(bare[n]), *differences[n]
            )
            for n, c in enumerate(contenders)
        ),
        tuple(_end_to_end(way, passages) for way, passages in whole.items()),
    )


def _end_to_end(way: Way, passages: Sequence[Passage]) -> EndToEnd:
    return EndToEnd(
        runtime=way.runtime,
        precision=way.precision,
        overlay=way.overlay,
        images=passages[0].images,
        images_per_s=_median([p.images / p.seconds for p in passages]),
        start_s=_median([p.start_s for p in passages]),
    )


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 2)


def _machine() -> dict[str, Any]:
    """Return what the numbers depend on, how busy the machine was at the start included."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "gpu": gpu,
        "system": platform.platform(),
        "python": platform.python_version(),
        "mura_batch": _version("mura-batch"),
        "torch": _version("torch"),
        "openvino": _version("openvino"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# ---- the bare networks


@dataclass(frozen=True, slots=True)
class _Contender:
    """A way of passing films through the network.

    Attributes:
        scoring: the daemon can be told to run it.
    """

    runtime: Name
    precision: Precision
    mode: str
    device: str
    infer: Callable[[NDArray[np.uint8]], Inference]
    scoring: bool = True


class _Eager:
    """Torch as one writes it first, without ``channels_last``: the others are held against it."""

    def __init__(self, network: Network, spec: Preprocessing, device: str) -> None:
        self._network = network.to(device)
        self._spec = spec
        self._device = device

    def infer(self, pixels: NDArray[np.uint8]) -> Inference:
        """Score luminance (N, S, S)."""
        with torch.inference_mode():
            films = torch.from_numpy(pixels).to(self._device)
            logit, evidence = self._network(normalise(films, self._spec.mean, self._spec.std))
            return Inference(logit.cpu().numpy(), evidence.cpu().numpy())


def _contenders(say: Say) -> list[_Contender]:
    """Return every runtime that works here; torch eager on the CPU is the first."""
    weights, card = load_bundled(_WEIGHTS_OF)
    spec = card.preprocessing
    found = []
    for device in dict.fromkeys(("cpu", find_device("auto"))):
        eager = _Eager(network_with(weights), spec, device)
        found.append(_Contender("torch", "f32", "eager", device, eager.infer, scoring=False))
        mode = _SCORING_MODE["torch"]
        found += [
            _Contender("torch", runtime.precision, mode, device, _whole(runtime))
            for runtime in _on_torch(weights, spec, device)
        ]
    return [*found, *_on_openvino(weights, spec, say)]


def _on_torch(weights: Weights, spec: Preprocessing, device: str) -> list[Runtime]:
    if not device.startswith("cuda"):
        return [TorchRuntime(network_with(weights), spec, device)]
    return [
        CudaRuntime(network_with(weights), spec, device, "f32"),
        CudaRuntime(network_with(weights), spec, device, "fp16"),
    ]


def _on_openvino(weights: Weights, spec: Preprocessing, say: Say) -> Iterator[_Contender]:
    """Yield f32 and int8 where OpenVINO is installed; int8 even where it is refused."""
    try:
        from mura_batch.runtime.compiled import compiled  # noqa: PLC0415 - an extra
    except ImportError:
        say("OpenVINO is not installed: pip install 'mura-batch[openvino]'")
        return
    form, mode = bundled_int8_form(_WEIGHTS_OF), _SCORING_MODE["openvino"]
    exact, quick = compiled(weights, spec), compiled(weights, spec, form.ranges)
    yield _Contender("openvino", "f32", mode, exact.device, _whole(exact))
    if why := form.refusal or refusal(quick, exact, spec):
        say(f"the daemon runs these weights in f32: int8 is refused ({why})")
    yield _Contender(
        "openvino", quick.precision, mode, quick.device, _whole(quick), scoring=not why
    )


def _whole(runtime: Runtime) -> Callable[[NDArray[np.uint8]], Inference]:
    return lambda pixels: Inference.joined(runtime.infer(pixels))


def _sample_pixels() -> NDArray[np.uint8]:
    """Return the sample films as the bundled weights want them, (N, S, S)."""
    spec = bundled_card(_WEIGHTS_OF).preprocessing
    with tempfile.TemporaryDirectory(prefix="mura-batch-bench-") as folder:
        drop_samples(Path(folder))
        return np.stack([read_film(file, 0, spec)[1].pixels for file in _files(Path(folder))])


def _differences(
    contenders: Sequence[_Contender], pixels: NDArray[np.uint8]
) -> list[tuple[float, float]]:
    """Return each contender's largest differences from the first one, in logits and in maps."""
    reference = contenders[0].infer(pixels)
    differences = []
    for contender in contenders:
        own = contender.infer(pixels)
        logits = float(np.abs(own.logits - reference.logits).max())
        maps = float(np.abs(own.maps - reference.maps).max())
        differences.append((float(f"{logits:.3g}"), float(f"{maps:.3g}")))
    return differences


def _rate(contender: _Contender, films: NDArray[np.uint8], views: int) -> float:
    batches = math.ceil(views / len(films))
    start = time.perf_counter()
    for _ in range(batches):
        contender.infer(films)
    return batches * len(films) / (time.perf_counter() - start)


# ---- the whole way


@dataclass(frozen=True, slots=True)
class Passage:
    """One run of the daemon over a folder of studies.

    Attributes:
        seconds: from the first claim to the last study in its place.
        start_s: from the daemon's start to the end of a first handful of studies.
    """

    images: int
    seconds: float
    start_s: float


@dataclass(frozen=True, slots=True)
class Way:
    """How the daemon is told to score."""

    runtime: Name
    precision: Precision
    overlay: bool

    def __str__(self) -> str:
        return f"{self.runtime} {self.precision}, {'' if self.overlay else 'no '}overlays"


def run_through(films: Path, way: Way) -> Passage:
    """Send the studies in ``films`` through a warm daemon in a new home beside that folder.

    The files in ``films`` stay as they are, and the home stays too: some file systems are slower
    for a while where much was removed, which the next turn would pay for.

    Raises:
        MuraError: a study was not scored, or the daemon stopped working.
    """
    home = Path(tempfile.mkdtemp(prefix="home-", dir=films.parent))
    settings = Settings(
        home=home,
        runtime=way.runtime,
        precision="f32" if way.precision == "f32" else "auto",
        overlays=way.overlay,
        settle_seconds=0.5,
    )
    _make_home(settings)
    warm, bulk = settings.inbox_dir / "warm", settings.home / "bulk"
    warm.mkdir()
    drop_samples(warm)
    shutil.copytree(films, bulk, copy_function=os.link)
    daemon = Daemon(settings)
    with _steps() as steps, ThreadPoolExecutor(1, "daemon") as thread:
        started = time.perf_counter()
        running = thread.submit(daemon.run)
        try:
            steps.wait_for(len(_files(warm)), running)
            start_s = time.perf_counter() - started
            steps.forget()
            images = len(_files(bulk))
            bulk.rename(settings.inbox_dir / "bulk")
            steps.wait_for(images, running)
        finally:
            daemon.stop()
        _check(running.result())
    return Passage(images, steps.last - steps.first, start_s)


def _make_home(settings: Settings) -> None:
    for folder in (settings.inbox_dir, settings.overlays_dir):
        folder.mkdir(parents=True)
    database.upgrade(settings.database_url)
    WeightsStore(settings.weights_dir).install_bundled()


def _check(summary: Summary) -> None:
    if summary.needs_attention:
        raise MuraError("bench: sample studies were not scored; see what `mura-batch demo` says")


class _Steps(logging.Handler):
    """Counts the pipeline's steps and times the first and the last of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.last = 0.0
        self._images = 0
        self._counts: Counter[str] = Counter()
        self._changed = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        with self._changed:
            self.last = time.perf_counter()
            self.first = self.first or self.last
            self._counts[record.msg] += 1
            if self._done():
                self._changed.notify_all()

    def forget(self) -> None:
        """Begin anew."""
        with self._changed:
            self._counts.clear()
            self.first = 0.0

    def wait_for(self, images: int, running: Future[Summary]) -> None:
        """Wait until ``images`` views are scored and all their studies are in their place.

        Raises:
            MuraError: nothing has happened for too long, or the daemon ended with one.
        """
        running.add_done_callback(lambda _: self._wake())
        with self._changed:
            self._images = images
            self.last = time.perf_counter()
            while not self._done():
                if running.done():
                    running.result()
                self._changed.wait(_PATIENCE)
                if time.perf_counter() - self.last > _PATIENCE:
                    raise MuraError(
                        f"bench: the pipeline stands still ({dict(self._counts)});"
                        " see what `mura-batch demo` says"
                    )

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _done(self) -> bool:
        taken = self._counts["taken"]
        return self._counts["scored"] >= self._images and self._counts["moved"] >= taken


@contextmanager
def _steps() -> Iterator[_Steps]:
    """Listen to the pipeline's steps, and to them alone."""
    logger = logging.getLogger("mura_batch.steps")
    level, propagate = logger.level, logger.propagate
    handler = _Steps()
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


# ---- films to measure with


@contextmanager
def sample_films(films: int) -> Iterator[Path]:
    """Give a folder in a temporary one that holds the sample studies as often as needed for
    ``films`` images; no two files are the same, no two studies have one UID.
    """
    with tempfile.TemporaryDirectory(prefix="mura-batch-bench-") as scratch:
        folder = Path(scratch) / "films"
        number = 0
        while number == 0 or len(_files(folder)) < films:
            copy = folder / f"copy{number:03}"
            copy.mkdir(parents=True)
            drop_samples(copy)
            for file in _files(copy):
                _set_apart(file, f"bench-{number}")
            number += 1
        yield folder


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


_PNG_HEADER: Final = 33  # bytes of signature and IHDR
_JPEG_START: Final = 2


def _set_apart(file: Path, word: str) -> None:
    """Write a sample file anew with other bytes but the same pixels."""
    content = file.read_bytes()
    file.unlink()
    if content.startswith(b"\x89PNG"):
        text = b"tEXtComment\0" + word.encode()
        chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
        file.write_bytes(content[:_PNG_HEADER] + chunk + content[_PNG_HEADER:])
    elif content.startswith(b"\xff\xd8"):
        comment = b"\xff\xfe" + struct.pack(">H", len(word) + 2) + word.encode()
        file.write_bytes(content[:_JPEG_START] + comment + content[_JPEG_START:])
    else:
        with pydicom.dcmread(io.BytesIO(content)) as film:
            for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
                if keyword in film:
                    apart = uuid.uuid5(uuid.NAMESPACE_OID, f"{film[keyword].value} {word}")
                    setattr(film, keyword, f"2.25.{apart.int}")
            film.file_meta.MediaStorageSOPInstanceUID = film.SOPInstanceUID
            film.save_as(file)
