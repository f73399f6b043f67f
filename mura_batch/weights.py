"""Versioned weights: safetensors files, each with a card that says what it is.

A folder of weights looks so, and every file in it is written whole:

    files/<sha256>.safetensors      tensors, shared by all areas that use them
    files/<sha256>.int8.json        how they run in int8, where that was measured here
    XR_WRIST/<sha256[:12]>.json     the card of these tensors for this area
    XR_WRIST/active.json            which card is in use, and which were before it

The digest of weights is the sha256 of their file. It is checked at every load. Nothing here
imports torch, nor NumPy before weights are loaded, so that listing them is quick.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from mura_batch.area import Area
from mura_batch.atomic import write_atomic
from mura_batch.errors import Misconfigured, NoWeights, WeightsRefused
from mura_batch.weights_card import (
    ARCHITECTURE,
    Calibration,
    Card,
    Int8Form,
    Metric,
    OperatingPoint,
    Origin,
    PointName,
    Target,
)

if TYPE_CHECKING:
    from mura_batch.tensors import Weights

__all__ = [
    "ARCHITECTURE",
    "Calibration",
    "Card",
    "Int8Form",
    "Metric",
    "OperatingPoint",
    "Origin",
    "PointName",
    "Target",
    "WeightsStore",
    "bundled_card",
    "load_bundled",
    "read_card",
    "read_weights",
    "sha256_of",
]

BUNDLED = Path(__file__).parent / "bundled"
_BUNDLED_FILE = BUNDLED / "generalist.safetensors"
_BUNDLED_FORM = BUNDLED / "generalist.int8.json"
_DIGEST = re.compile(r"[0-9a-f]{64}")


def sha256_of(file: Path) -> str:
    """Return the sha256 of ``file`` in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


_card = lru_cache(maxsize=64)(Card.from_json)  # the daemon asks for every few studies


def read_card(file: Path) -> Card:
    """Read a card.

    Raises:
        WeightsRefused: it is missing, cannot be read, or is not a card.
    """
    try:
        return _card(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as exc:
        raise WeightsRefused(f"{file}: the card cannot be read: {exc}") from exc
    except WeightsRefused as exc:
        raise WeightsRefused(f"{file}: {exc}") from exc


def read_weights(file: Path, card: Card) -> Weights:
    """Return what a safetensors file holds.

    Raises:
        WeightsRefused: the file is missing, is not the one that ``card`` describes (sha256), or
            its tensors are not those of the network.
    """
    from mura_batch import tensors  # noqa: PLC0415 - listing weights stays quick

    try:
        content = file.read_bytes()
    except OSError as exc:
        raise WeightsRefused(
            f"{card.area} {card.short}: the weights file cannot be read ({exc});"
            f" get it again with `mura-batch models fetch {card.area}` or `models import`"
        ) from exc
    if hashlib.sha256(content).hexdigest() != card.sha256:
        raise WeightsRefused(
            f"{card.area} {card.short}: {file} has changed since its sha256 was recorded;"
            " run `mura-batch models verify`, then fetch or import these weights again,"
            f" or go back with `mura-batch models rollback {card.area}`"
        )
    try:
        return tensors.read(content, card.architecture)
    except WeightsRefused as exc:
        raise WeightsRefused(f"{card.area} {card.short}: {exc}") from exc


def read_int8_form(file: Path, card: Card) -> Int8Form:
    """Read how weights run in int8.

    Raises:
        WeightsRefused: it is missing, cannot be read, or is that of other weights than the card's.
    """
    try:
        form = Int8Form.from_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as exc:
        raise WeightsRefused(f"{file} cannot be read: {exc}") from exc
    except WeightsRefused as exc:
        raise WeightsRefused(f"{file}: {exc}") from exc
    if form.sha256 != card.sha256:
        raise WeightsRefused(f"{file} is the int8 form of {form.sha256[:12]}, not of {card.short}")
    return form


def bundled_int8_form(area: Area) -> Int8Form:
    """Return how the weights that come with the package run in int8.

    Raises:
        WeightsRefused: the installed package is damaged.
    """
    return read_int8_form(_BUNDLED_FORM, bundled_card(area))


def bundled_card(area: Area) -> Card:
    """Return the card of the weights that come with the package.

    Raises:
        WeightsRefused: the installed package is damaged.
    """
    return read_card(BUNDLED / "cards" / f"{area}.json")


def load_bundled(area: Area) -> tuple[Weights, Card]:
    """Return tensors and card of the weights that come with the package; needs no home.

    Raises:
        WeightsRefused: the installed package is damaged.
    """
    card = bundled_card(area)
    return read_weights(_BUNDLED_FILE, card), card


@dataclass(frozen=True, slots=True)
class _Active:
    """What ``active.json`` says.

    Attributes:
        digest: of the weights in use.
        history: those before them, oldest first.
        reasons: by digest, why weights were put in use although they may be worse.
    """

    digest: str
    history: tuple[str, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)


class WeightsStore:
    """The versioned weights of a site, in one folder that several processes may share.

    Reading takes no lock, since every file is written whole; changes take one.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def file(self, card: Card) -> Path:
        """Return where the tensors of ``card`` lie; :meth:`load` checks what is in there."""
        return self.directory / "files" / f"{card.sha256}.safetensors"

    def cards(self, area: Area | None = None) -> list[Card]:
        """Return the cards of ``area``, or of all areas, that can be read and are in their place.

        The others are named by :meth:`verify`.
        """
        found = []
        for each in Area if area is None else (area,):
            for file in self._card_files(each):
                with suppress(WeightsRefused):
                    card = read_card(file)
                    if self._is_at(file, each, card):
                        found.append(card)
        return found

    def active(self, area: Area) -> Card | None:
        """Return the card in use for ``area``, or None where there is none.

        The tensors are not looked at: :meth:`load` does that.

        Raises:
            WeightsRefused: something is in use, but its card cannot be read or is another's.
        """
        state = self._active(area)
        return None if state is None else self._card(area, state.digest)

    def require(self, area: Area) -> Card:
        """Return the card in use for ``area``.

        Raises:
            NoWeights: there is none; the message names the command that fixes it.
            WeightsRefused: as for :meth:`active`.
        """
        card = self.active(area)
        if card is None:
            raise NoWeights(
                f"{area} has no weights: run `mura-batch models fetch {area}` for the published"
                " ones, or `mura-batch init` for the bundled ones"
            )
        return card

    def find(self, area: Area | None, digest_prefix: str) -> Card:
        """Return the card of ``area``, or of any, whose digest begins with ``digest_prefix``.

        Raises:
            Misconfigured: none does, or several do; the message lists the digests there are.
        """
        cards = self.cards(area)
        found = [card for card in cards if card.sha256.startswith(digest_prefix.lower())]
        if digest_prefix and len({card.sha256 for card in found}) == 1:
            return found[0]
        stored = ", ".join(dict.fromkeys(card.short for card in cards)) or "nothing"
        raise Misconfigured(
            f"{area or self.directory}: {'several' if found else 'no'} weights have a digest that"
            f" begins with {digest_prefix[:64]!r}; stored: {stored}"
        )

    def add(self, file: Path, card: Card) -> Card:
        """Store a copy of the safetensors ``file`` with its card; nothing becomes active.

        Adding what is already there repairs a damaged copy and keeps the first card.

        Raises:
            WeightsRefused: the file is not what the card says or does not fit the network, or
                the same tensors are stored with a card that decides differently.
        """
        read_weights(file, card)
        with self._changing():
            return self._add(file, card)

    def activate(self, area: Area, digest_prefix: str, reason: str = "") -> Card:
        """Use the stored weights whose digest begins so from now on; return their card.

        ``reason`` says why, where they may be worse than others; it is kept.

        Raises:
            Misconfigured: as for :meth:`find`.
        """
        with self._changing():
            card = self.find(area, digest_prefix)
            self._activate(card, reason)
            return card

    def reason(self, card: Card) -> str:
        """Return why weights were put in use although they may be worse; empty for most."""
        state = self._active(card.area)
        return "" if state is None else state.reasons.get(card.sha256, "")

    def rollback(self, area: Area) -> Card:
        """Use the weights again that were active before; return their card.

        Raises:
            Misconfigured: none were.
            WeightsRefused: their card cannot be read or is another's.
        """
        with self._changing():
            state = self._active(area)
            if state is None or not state.history:
                raise Misconfigured(f"{area}: no weights were active before: nothing to go back to")
            card = self._card(area, state.history[-1])
            back = replace(state, digest=card.sha256, history=state.history[:-1])
            self._write_active(area, back)
            return card

    def install_bundled(self) -> list[Area]:
        """Give the bundled weights to every area that has none active; return these areas.

        A bundled file that is stored and damaged is written again.

        Raises:
            WeightsRefused: the installed package, or an area's ``active.json``, is damaged.
        """
        with self._changing():
            bundled = {area: bundled_card(area) for area in Area}
            active = {area: self._active(area) for area in Area}
            fresh = [area for area, state in active.items() if state is None]
            used = [
                area
                for area, state in active.items()
                if state is None or state.digest == bundled[area].sha256
            ]
            for area in used:
                self._add(_BUNDLED_FILE, bundled[area])
            for area in fresh:
                self._activate(bundled[area])
            return fresh

    def load(self, card: Card) -> Weights:
        """Return the tensors of ``card``, checked.

        Raises:
            WeightsRefused: the file is missing, changed or does not fit the network.
        """
        return read_weights(self.file(card), card)

    def int8_form(self, card: Card) -> Int8Form | None:
        """Return how these weights run in int8, or None where nobody has measured it.

        Raises:
            WeightsRefused: it cannot be read, or is that of other weights.
        """
        file = self._int8_file(card)
        if file.exists():
            return read_int8_form(file, card)
        own = card.sha256 == bundled_card(card.area).sha256
        return bundled_int8_form(card.area) if own else None

    def add_int8_form(self, form: Int8Form, card: Card) -> None:
        """Keep how these weights run in int8, instead of what was measured before."""
        with self._changing():
            content = form.to_json().encode()
            write_atomic(self._int8_file(card), lambda stream: stream.write(content))

    def _int8_file(self, card: Card) -> Path:
        return self.file(card).with_suffix(".int8.json")

    def verify(self) -> list[str]:
        """Return what is wrong in the folder, a sentence each; an empty list is a clean bill."""
        problems: list[str] = []
        harm: dict[Path, str] = {}
        for area in Area:
            for file in self._card_files(area):
                try:
                    card = read_card(file)
                except WeightsRefused as exc:
                    problems.append(str(exc))
                    continue
                if not self._is_at(file, area, card):
                    problems.append(f"{file}: is the card of {card.area} {card.short}")
                target = self.file(card)
                if target not in harm:
                    harm[target] = _harm(target, card.sha256)
                if harm[target]:
                    problems.append(f"{area} {card.short}: {target} {harm[target]}")
                try:
                    self.int8_form(card)
                except WeightsRefused as exc:
                    problems.append(f"{exc}; delete that file, or run `mura-batch models quantize`")
            problems += self._active_problems(area)
        return list(dict.fromkeys(problems))

    def _active_problems(self, area: Area) -> list[str]:
        try:
            self.active(area)
        except WeightsRefused as exc:
            return [f"{area}: what is active cannot be used: {exc}"]
        return []

    def _card_files(self, area: Area) -> list[Path]:
        files = sorted((self.directory / area).glob("[!.]*.json"))
        return [file for file in files if file.name != "active.json"]

    def _card_file(self, area: Area, digest: str) -> Path:
        return self.directory / area / f"{digest[:12]}.json"

    def _card(self, area: Area, digest: str) -> Card:
        file = self._card_file(area, digest)
        card = read_card(file)
        if card.area != area or card.sha256 != digest:
            raise WeightsRefused(
                f"{file} is the card of {card.area} {card.sha256}, not of {area} {digest}: delete"
                " it and get these weights again with `mura-batch models fetch` or `import`"
            )
        return card

    def _is_at(self, file: Path, area: Area, card: Card) -> bool:
        return card.area == area and file == self._card_file(area, card.sha256)

    def _add(self, file: Path, card: Card) -> Card:
        target = self.file(card)
        if not target.is_file() or sha256_of(target) != card.sha256:
            with file.open("rb") as content:
                write_atomic(target, partial(shutil.copyfileobj, content))
        place = self._card_file(card.area, card.sha256)
        if place.is_file():
            stored = read_card(place)
            if stored.scores_like(card):
                return stored
            raise WeightsRefused(
                f"{card.area} {card.short}: these tensors are stored already, with another"
                " threshold, calibration or preprocessing; results name weights by their digest,"
                " so set `threshold` in config.toml instead of storing them twice, or delete"
                f" {place} first if they never scored anything"
            )
        write_atomic(place, lambda stream: stream.write(card.to_json().encode()))
        return card

    def _activate(self, card: Card, reason: str = "") -> None:
        state = self._active(card.area)
        reasons = {card.sha256: reason} if reason else {}
        if state is None:
            self._write_active(card.area, _Active(card.sha256, reasons=reasons))
        elif state.digest != card.sha256:
            history = (*state.history, state.digest)
            self._write_active(
                card.area, _Active(card.sha256, history, {**state.reasons, **reasons})
            )

    def _active(self, area: Area) -> _Active | None:
        file = self.directory / area / "active.json"
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            digest, history = data["digest"], tuple(data["history"])
            reasons = dict(data.get("reasons", {}))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as exc:
            raise _broken(file) from exc
        if not all(isinstance(d, str) and _DIGEST.fullmatch(d) for d in (digest, *history)):
            raise _broken(file)
        return _Active(digest, history, reasons)

    def _write_active(self, area: Area, state: _Active) -> None:
        content = json.dumps(asdict(state), indent=2) + "\n"
        file = self.directory / area / "active.json"
        write_atomic(file, lambda stream: stream.write(content.encode()))

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock of the folder: one process changes it at a time."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / ".lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _harm(file: Path, digest: str) -> str:
    """Return what is wrong with a file of tensors; empty where it has this digest."""
    try:
        return "" if sha256_of(file) == digest else "is damaged: get it again"
    except FileNotFoundError:
        return "is missing: get it again"
    except OSError as exc:
        return f"cannot be read ({exc.strerror}): correct its rights, or get it again"


def _broken(file: Path) -> WeightsRefused:
    return WeightsRefused(
        f"{file} cannot be read: delete it and run `mura-batch models activate` for that area"
    )
