"""Settings of one site: defaults < ``config.toml`` < environment, read once and frozen."""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import platformdirs

from mura_batch.area import Area, AreaRules
from mura_batch.errors import Misconfigured
from mura_batch.reader import sqlite_url

PREFIX = "MURA_BATCH_"
NOTICE = "research use only, not a medical device"
STATUS_FILE = ".daemon.json"  # in the home: what the daemon last said of itself
PUBLISHED_WEIGHTS = "https://github.com/mariamvol/mura-model-classifier/releases/download/v0.1.0"


def _setting(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that a site can set; the docs below become the commented ``config.toml``."""

    home: Path
    inbox: Path | None = _setting(None, "folder that is watched; home/inbox where it is not set")
    archive: Literal["move", "leave", "delete"] = _setting(
        "move",
        "what becomes of a finished study's files: moved to home/archive, left where they"
        " are (read-only inboxes), or deleted after the result is committed",
    )
    settle_seconds: float = _setting(2.0, "a study is complete when unchanged for this long")
    settle_max_seconds: float = _setting(900.0, "taken as it is when it never stops changing")
    late_hours: float = _setting(24.0, "a folder that comes back this soon adds to its study")
    scan_seconds: float = _setting(1.0, "shortest time between two full scans of the inbox")
    watch: Literal["auto", "events", "polling"] = _setting(
        "auto", "how new files are noticed; polling for network shares"
    )
    ignore: tuple[str, ...] = _setting(
        ("DICOMDIR", "Thumbs.db", "desktop.ini"),
        "file names (globs) that are never taken, besides dotfiles, *.part, *.tmp and *~",
    )
    database: str = _setting("", "SQLAlchemy URL of the results; home/results.db where empty")
    device: str = _setting("auto", "auto, cpu, cuda:N or mps")
    runtime: Literal["auto", "torch", "openvino"] = _setting("auto", "what runs the networks")
    precision: Literal["auto", "f32"] = _setting(
        "auto",
        "auto: int8 on a CPU, for weights whose int8 form was accepted (the rest of them in bf16"
        " where it has that), and float16 on a CUDA device, each where the machine does it right"
        " and faster; or f32 for all",
    )
    gpu_decode: bool = _setting(
        False,
        "decode compressed DICOM on an NVIDIA GPU, where nvImageCodec is installed; lossy films"
        " may differ by a grey level from a CPU's",
    )
    batch: int = _setting(16, "views in one forward pass at most")
    batch_seconds: float = _setting(2.0, "a view waits this long at most for its batch to fill")
    cache_mb: int = _setting(2048, "memory for warm networks; the least used one goes first")
    aggregate: Literal["mean", "max", "noisy_or"] = _setting(
        "mean", "a study's probability from its views' (mean is the published rule)"
    )
    threshold: float | None = _setting(None, "decision threshold; the weights' card where unset")
    operating_point: Literal["balanced", "high_sensitivity", "high_specificity"] = _setting(
        "balanced", "which of the card's thresholds decides"
    )
    overlays: bool = _setting(True, "write a Grad-CAM overlay for every view")
    overlay_scale: Literal["fixed", "image"] = _setting(
        "fixed", "colour scale: the same logit units for all images, or each image's own range"
    )
    attempts: int = _setting(5, "a study that fails for a passing reason is tried this often")
    retry_seconds: float = _setting(30.0, "wait before the first retry; doubles each time")
    weights_url: str = _setting(
        PUBLISHED_WEIGHTS, "where `models fetch` finds XR_AREA_FINAL_best.pt"
    )
    rules: AreaRules = field(default_factory=AreaRules)

    @property
    def inbox_dir(self) -> Path:
        """The watched folder."""
        return self.inbox or self.home / "inbox"

    @property
    def work(self) -> Path:
        """Claimed files that are not finished."""
        return self.home / "work"

    @property
    def archive_dir(self) -> Path:
        """Sources of finished studies."""
        return self.home / "archive"

    @property
    def quarantine(self) -> Path:
        """What can never be scored, each with its ``reason.json``."""
        return self.home / "quarantine"

    @property
    def overlays_dir(self) -> Path:
        """Grad-CAM overlays, named by digests."""
        return self.home / "overlays"

    @property
    def weights_dir(self) -> Path:
        """The versioned weights of each area."""
        return self.home / "weights"

    @property
    def config_file(self) -> Path:
        """The site's own settings."""
        return self.home / "config.toml"

    @property
    def database_url(self) -> str:
        """SQLAlchemy URL of the results."""
        return self.database or sqlite_url(self.home / "results.db")


def default_home() -> Path:
    """Return the platform's data folder for this program."""
    return platformdirs.user_data_path("mura-batch", appauthor=False)


def load(home: Path, environment: Mapping[str, str]) -> Settings:
    """Read ``home/config.toml`` and the ``MURA_BATCH_…`` variables over the defaults.

    Raises:
        Misconfigured: unknown names or wrong values, all of them in one message.
    """
    home = home.expanduser().absolute()
    if not _is_utf8(home):
        raise Misconfigured(f"{os.fsencode(home)!r} is not UTF-8: name another home")
    problems: list[str] = []
    given = _from_file(home / "config.toml", problems)
    fields = {f.name: f for f in dataclasses.fields(Settings) if "doc" in f.metadata}
    hints = get_type_hints(Settings)
    for name in fields:
        if (text := environment.get(PREFIX + name.upper())) is not None:
            given[name] = _FLAGS.get(text.lower(), text) if hints[name] is bool else text
    rules = _rules(given.pop("areas", {}), problems)
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in fields:
            problems.append(f"{name}: no such setting")
            continue
        try:
            values[name] = _typed(value, hints[name])
        except (ValueError, RuntimeError) as exc:  # RuntimeError: no home folder for ~
            problems.append(f"{name}: {exc}")
    problems += [f"{n}: must be above 0" for n in _POSITIVE if n in values and values[n] <= 0]
    problems += [f"{n}: must not be below 0" for n in _FROM_ZERO if values.get(n, 0) < 0]
    numbers = (*_POSITIVE, *_FROM_ZERO)
    problems += [f"{n}: must be at most {_MOST}" for n in numbers if values.get(n, 0) > _MOST]
    if not 0 <= (values.get("threshold") or 0) <= 1:
        problems.append("threshold: must be between 0 and 1")
    settings = Settings(home=home, rules=rules, **values)
    problems += _overlaps(settings)
    if problems:
        raise Misconfigured(
            f"{home / 'config.toml'} or {PREFIX}… variables: " + "; ".join(problems)
        )
    return settings


_POSITIVE = (
    "settle_seconds",
    "settle_max_seconds",
    "scan_seconds",
    "batch",
    "cache_mb",
    "attempts",
    "retry_seconds",
)
_FROM_ZERO = ("late_hours", "batch_seconds")
_MOST = 1_000_000  # what clocks and timers take
_FLAGS = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(
    ("false", "0", "no", "off"), False
)


def commented_toml() -> str:
    """Return a ``config.toml`` with every setting at its default, commented out."""
    lines = [f"# mura-batch: {NOTICE}", "# Remove the # before a setting to change it.", ""]
    for f in dataclasses.fields(Settings):
        if "doc" in f.metadata:
            lines += [f"# {f.metadata['doc']}", f"# {f.name} = {_toml(f.default)}", ""]
    lines += [
        "# [areas]",
        "# shoulder_girdle = false   # clavicle, scapula and AC joint count as XR_SHOULDER",
        '# words = { "Hd li" = "XR_HAND" }   # words or folder names of this site',
        "",
    ]
    return "\n".join(lines)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(f'"{item}"' for item in value) + "]"
    return '""' if value is None else f'"{value}"' if isinstance(value, str) else str(value)


def _from_file(file: Path, problems: list[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as exc:
        problems.append(f"cannot be read: {exc}")
        return {}


def _rules(table: object, problems: list[str]) -> AreaRules:
    if not isinstance(table, dict) or set(table) - {"words", "shoulder_girdle"}:
        problems.append("[areas]: takes words and shoulder_girdle")
        return AreaRules()
    words: dict[str, Area] = {}
    given = table.get("words", {})
    if not isinstance(given, dict):
        problems.append("[areas] words: takes a table of words and areas")
        given = {}
    for word, name in given.items():
        if name in list(Area):
            words[word] = Area(name)
        else:
            problems.append(f"[areas] words: {name!r} is none of {', '.join(Area)}")
    try:
        girdle = _typed(table.get("shoulder_girdle", False), bool)
    except ValueError as exc:
        problems.append(f"[areas] shoulder_girdle: {exc}")
        girdle = False
    return AreaRules(words=words, shoulder_girdle=girdle)


def _overlaps(settings: Settings) -> list[str]:
    """Return why the inbox would take the program's own files for studies, if it would."""
    inbox, home = _real(settings.inbox_dir), _real(settings.home)
    if home.is_relative_to(inbox):
        return [f"inbox: {settings.inbox_dir} holds the home: name a folder of its own"]
    own = (
        *(settings.work, settings.archive_dir, settings.quarantine),
        *(settings.overlays_dir, settings.weights_dir),
    )
    return [
        f"inbox: {settings.inbox_dir} and {place} lie in each other: name a folder of its own"
        for place in own
        if inbox.is_relative_to(_real(place)) or _real(place).is_relative_to(inbox)
    ]


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # unlike Path.resolve, bears links in a circle


def _typed(value: Any, hint: Any) -> Any:
    """Return ``value`` (TOML value or environment text) as ``hint`` asks; ValueError if not."""
    options = [option for option in get_args(hint) if option is not type(None)]
    if get_origin(hint) is Literal:
        if value not in options:
            msg = f"{value!r} is none of {', '.join(options)}"
            raise ValueError(msg)
        return value
    if len(options) == 1 and type(None) in get_args(hint):
        return None if value == "" else _typed(value, options[0])
    if get_origin(hint) is tuple:
        names = value.split(",") if isinstance(value, str) else value
        if not isinstance(names, list):
            raise _not(value, "a list of texts")
        return tuple(_typed(name, str) for name in names)
    if hint is bool:
        if not isinstance(value, bool):
            raise _not(value, "true or false")
        return value
    if hint in {int, float}:
        return _number(value, hint)
    if not isinstance(value, str) or "\0" in value:
        raise _not(value, "a text")
    return Path(value).expanduser().absolute() if hint is Path else value


def _number(value: Any, kind: type[int | float]) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise _not(value, "a number")
    if kind is int and not number.is_integer():
        raise _not(value, "a whole number")
    return kind(number)


def _not(value: object, what: str) -> ValueError:
    return ValueError(f"{value!r} is not {what}")
