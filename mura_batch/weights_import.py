"""Weights from elsewhere: torch files become safetensors with a card.

A torch file is a pickle, and a pickle from elsewhere is a program. So it is opened in a process
of its own, by torch's restricted reader (``weights_only=True``), under limits on memory, file
size and time; only a safetensors file comes back, which is then checked like any other.

Run as a module this is that process: ``python -m mura_batch.weights_import CHECKPOINT OUTPUT``.
"""

from __future__ import annotations

import json
import pickle
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mura_batch.area import Area
from mura_batch.errors import WeightsRefused
from mura_batch.preprocessing import Preprocessing
from mura_batch.weights import WeightsStore, read_card, read_weights, sha256_of
from mura_batch.weights_card import (
    ARCHITECTURE,
    Card,
    OperatingPoint,
    Origin,
    Target,
    preprocessing_of,
)

if TYPE_CHECKING:
    from torch import Tensor

    from mura_batch.tensors import Weights

_MAX_BYTES = 1 << 30  # of a checkpoint; DenseNet-121 with its optimizer's state takes 85 MB
_MAX_HEADER = 100_000_000  # bytes of JSON in front of safetensors, as their library has it
_MAX_MEMORY = 3 << 30  # bytes that the converting process may allocate
_MAX_SECONDS = 120.0
_OUTPUT = "converted.safetensors"
_WRAPPERS = ("model_state", "model_state_dict", "state_dict")
_AREA_NAMES = ("area", "body_part", "part", "study_type")


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a checkpoint does not say of itself and its card has to.

    Attributes:
        threshold: of the raw probability, 0 to 1.
        target: None is what a training run says that it was, else ``abnormal``.
        preprocessing: as in training; None is what a training run says, else that of the published
            models, at the size that the checkpoint names as ``img_size``, if it does.
        source: where it comes from; the file's name where empty.
    """

    area: Area
    target: Target | None = None
    threshold: float = 0.5
    preprocessing: Preprocessing | None = None
    origin: Origin = "imported"
    training_data: str = "not stated"
    licence: str = "not stated"
    source: str = ""
    notes: str = ""


def import_checkpoint(file: Path, facts: Facts, store: WeightsStore) -> Card:
    """Store a torch checkpoint or safetensors file; nothing becomes active. Return its card.

    A torch checkpoint is converted; of the ``network.pt`` of a training run, its ``run.json`` says
    how it sees films and which network it is. Safetensors are stored as they are, with the card
    that :func:`load_checkpoint` finds; it states everything, so ``facts`` may only name the area.

    Raises:
        WeightsRefused: it is no torch file, holds more than tensors and plain values, says that
            it is for another area, its run's description is damaged, or its tensors do not fit the
            network; or safetensors come without a card for this area, or with facts beside it.
    """
    if _is_safetensors(_head(file)):
        if facts != Facts(area=facts.area):
            raise WeightsRefused(
                f"{file} is safetensors, not a torch checkpoint: its card says what it is, so say"
                " no more than the area"
            )
        return store.add(file, _card_of(file, facts.area))
    with tempfile.TemporaryDirectory(prefix="mura-batch-") as folder:
        converted = Path(folder) / _OUTPUT
        return store.add(converted, convert(file, facts, converted))


def load_checkpoint(file: Path, area: Area) -> tuple[Weights, Card]:
    """Return tensors and card of one file, a torch checkpoint or safetensors with a card.

    The card of ``NAME.safetensors`` is ``NAME.json`` or ``card.json`` beside it, or where the
    store and the package keep theirs.

    Raises:
        WeightsRefused: as for :func:`import_checkpoint`.
    """
    if not _is_safetensors(_head(file)):
        with tempfile.TemporaryDirectory(prefix="mura-batch-") as folder:
            converted = Path(folder) / _OUTPUT
            card = convert(file, Facts(area=area), converted)
            return read_weights(converted, card), card
    card = _card_of(file, area)
    return read_weights(file, card), card


def _card_of(file: Path, area: Area) -> Card:
    """Return the card of a safetensors file, from the first place that has one."""
    places = (
        file.with_suffix(".json"),
        file.parent / "card.json",
        file.parent / "cards" / f"{area}.json",
        file.parent.parent / area / f"{file.stem[:12]}.json",
    )
    place = next((place for place in places if place.is_file()), None)
    if place is None:
        raise WeightsRefused(
            f"{file} has no card for {area}: put it beside the file as {places[0]}"
        )
    card = read_card(place)
    if card.area != area:
        raise WeightsRefused(f"{file}: its card {place} is for {card.area}, not for {area}")
    return card


def convert(file: Path, facts: Facts, target: Path) -> Card:
    """Write the torch checkpoint ``file`` as safetensors to ``target``; return its card.

    Whether the tensors fit the network is checked by whoever reads ``target``.

    Raises:
        WeightsRefused: as for :func:`import_checkpoint`, but for tensors that do not fit.
    """
    _plausible(file)
    _same_area(_areas_in(file.name), facts.area, f"the name of {file.name}")
    says = _convert_apart(file, target)
    _same_area(_areas_in(str(says.get("area", ""))), facts.area, file.name)
    run = _run_of(file)
    spec = facts.preprocessing or run.preprocessing
    if spec is None:
        spec = Preprocessing()
        if isinstance(size := says.get("img_size"), int):
            spec = replace(spec, size=size)
    card = Card(
        area=facts.area,
        target=facts.target or run.target,
        sha256=sha256_of(target),
        architecture=run.architecture,
        preprocessing=spec,
        operating_points=(OperatingPoint("balanced", facts.threshold),),
        training_data=run.training_data or facts.training_data,
        licence=facts.licence,
        origin=facts.origin,
        source=facts.source or file.name,
        source_sha256=sha256_of(file),
        notes=facts.notes,
    )
    return Card.from_json(card.to_json())  # refuses a size or threshold out of range


class _Run(NamedTuple):
    """What a training run says of the network that it made."""

    preprocessing: Preprocessing | None = None
    architecture: str = ARCHITECTURE
    target: Target = "abnormal"
    training_data: str = ""


def _run_of(file: Path) -> _Run:
    """Return what ``run.json`` beside ``network.pt`` says (``training.run_folder`` writes it)."""
    place = file.with_name("run.json")
    if file.name != "network.pt" or not place.is_file():
        return _Run()
    try:
        told = json.loads(place.read_text(encoding="utf-8"))
        settings = told["settings"]
        return _Run(
            preprocessing_of(settings["preprocessing"], f"{place}: preprocessing"),
            settings["architecture"],
            told["target"],
            f"{told['films']} films (data {told['data'][:12]})",
        )
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise WeightsRefused(
            f"{place} is damaged: it should say how {file.name} sees films"
        ) from exc


def _head(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(16)
    except OSError as exc:
        raise WeightsRefused(f"{file} cannot be read: {exc}") from exc


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_HEADER


def _plausible(file: Path) -> None:
    """Refuse what is no torch file at first sight: a web page, say."""
    head = _head(file)
    if not head.startswith((b"PK\x03\x04", b"\x80")):
        raise WeightsRefused(f"{file} is not a torch checkpoint: it begins with {head!r}")
    if file.stat().st_size > _MAX_BYTES:
        raise WeightsRefused(f"{file} is larger than {_MAX_BYTES >> 20} MiB: not a DenseNet-121")


def _areas_in(text: str) -> set[str]:
    """Return the areas, known or not, that ``text`` names: ``XR_HAND``, or ``hand`` alone."""
    upper = text.upper().strip()
    alone = {f"XR_{upper}"} & set(Area)
    return alone | set(re.findall(r"(?<![A-Z])XR_[A-Z]+", upper))


def _same_area(named: set[str], area: Area, who: str) -> None:
    if named and area not in named:
        raise WeightsRefused(
            f"{who} says {', '.join(sorted(named))}, not {area}: import it for the area it is for"
        )


def _convert_apart(file: Path, target: Path) -> dict[str, Any]:
    """Convert in another process; return what the checkpoint says of itself."""
    command = [sys.executable, "-m", __name__, str(file.absolute()), str(target.absolute())]
    try:
        done = subprocess.run(  # noqa: S603 - this interpreter, this module, two paths
            command,
            cwd=Path(__file__).parent.parent,  # so that -m finds this very package
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_MAX_SECONDS,
            check=False,
        )
        answer = json.loads(done.stdout) if done.returncode == 0 else {}
    except (subprocess.TimeoutExpired, ValueError):
        answer = {}
    if not isinstance(answer, dict) or not answer:
        raise WeightsRefused(
            f"{file.name} could not be read within {_MAX_MEMORY >> 30} GiB and"
            f" {_MAX_SECONDS:.0f} s: it is damaged, or not what it seems"
        )
    if "refused" in answer:
        raise WeightsRefused(f"{file.name}: {answer['refused']}")
    return answer


# ------------------------------------------------------------- inside the other process


def _main() -> None:
    """Convert ``argv[1]`` to ``argv[2]`` and write one JSON object to standard output."""
    source, target = map(Path, sys.argv[1:3])
    resource.setrlimit(resource.RLIMIT_DATA, (_MAX_MEMORY, _MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MAX_BYTES, _MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        checkpoint = read_restricted(source)
        state = tensors_of(checkpoint)
        from safetensors.torch import save_file  # noqa: PLC0415 - imports torch

        save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, target)
        answer = says_of_itself(checkpoint)
    except WeightsRefused as exc:
        answer = {"refused": str(exc)}
    sys.stdout.write(json.dumps({"converted": True, **answer}))


def read_restricted(file: Path) -> object:
    """Return what torch's restricted reader finds in ``file``: no code of the file runs.

    Besides what torch allows, NumPy scalars are read: metrics are often saved as such.

    Raises:
        WeightsRefused: it holds anything else, or is damaged.
    """
    import torch  # noqa: PLC0415 - listing weights stays quick

    torch.set_num_threads(1)
    try:
        with ExitStack() as allowed:
            allowed.enter_context(torch.serialization.safe_globals(_numpy_scalars()))
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as exc:
        thing = re.search(r"GLOBAL ([\w.]+)", str(exc))
        held = f" ({thing[1][:80]})" if thing else ""
        raise WeightsRefused(
            f"holds more than tensors and plain values{held}: save its state_dict() alone"
        ) from exc
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, MemoryError) as exc:
        raise WeightsRefused("is damaged or cut off: download or copy it again") from exc


def _numpy_scalars() -> list[Any]:
    import numpy as np  # noqa: PLC0415 - only the converting process needs it

    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(code)) for code in ("f8", "f4", "i8", "i4", "?")]
    return [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *kinds]


def tensors_of(checkpoint: object) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint under today's torchvision names.

    Taken are a state dict, or one under ``model_state``, ``model_state_dict`` or ``state_dict``;
    ``module.`` in front of names (DataParallel) goes, and ``norm.1`` of early torchvision becomes
    ``norm1``.

    Raises:
        WeightsRefused: there is no state dict, or two of its names become one.
    """
    import torch  # noqa: PLC0415 - listing weights stays quick

    state = checkpoint
    if isinstance(checkpoint, Mapping):
        state = next((checkpoint[name] for name in _WRAPPERS if name in checkpoint), checkpoint)
    if not isinstance(state, Mapping) or not state:
        raise WeightsRefused(f"holds no state dict, bare or under {' or '.join(_WRAPPERS)}")
    tensors: dict[str, Tensor] = {}
    for given, tensor in state.items():
        if not isinstance(given, str) or not isinstance(tensor, torch.Tensor):
            raise WeightsRefused(f"its state dict holds {str(given)[:80]!r}, which is no tensor")
        name = re.sub(
            r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", given.removeprefix("module.")
        )
        if name in tensors:
            raise WeightsRefused(f"holds {name} twice, under its old and its new name")
        tensors[name] = tensor
    return tensors


def says_of_itself(checkpoint: object) -> dict[str, Any]:
    """Return the ``area`` and ``img_size`` that a checkpoint or its config names, if it does."""
    said: dict[str, Any] = {}
    if isinstance(checkpoint, Mapping):
        for part in (checkpoint, *(v for v in checkpoint.values() if isinstance(v, Mapping))):
            for name in _AREA_NAMES:
                if isinstance(area := part.get(name), str):
                    said.setdefault("area", area[:80])
            if isinstance(size := part.get("img_size"), int):
                said.setdefault("img_size", size)
    return said


if __name__ == "__main__":
    _main()
