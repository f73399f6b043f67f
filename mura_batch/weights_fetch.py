"""Download of the published checkpoints, over connections that fail.

A download goes on where it stopped, also in a later process: the part that is there lies beside
its target as ``.part``, with a record of which version of the file it belongs to. It gets its
final name when it is whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from email.message import Message
from http import HTTPStatus
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO
from urllib import request
from urllib.error import HTTPError

from mura_batch.area import Area
from mura_batch.atomic import sync_folder, write_atomic
from mura_batch.errors import Misconfigured, Transient
from mura_batch.weights import WeightsStore
from mura_batch.weights_card import Card
from mura_batch.weights_import import Facts, import_checkpoint

Progress = Callable[[int, int | None], None]
"""Called with the bytes that are here and those expected, or None where that is not known."""

_CHUNK = 1 << 16
_STEP = 1 << 14  # bytes that count as getting on
_MAX_BYTES = 1 << 30
_PASSING = {
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.TOO_EARLY,
    HTTPStatus.TOO_MANY_REQUESTS,
}  # of the 4xx answers; the others will be the same next time
_NO_SUCH_RANGE = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
_TRAINING_DATA = "MURA v1.1 (Stanford ML Group), studies of this area, labelled normal or abnormal"
_LICENCE = "MIT, as its repository says; MURA itself is licensed for non-commercial research"


@dataclass(frozen=True, slots=True)
class Patience:
    """When to give up.

    Attributes:
        silence: seconds without 16 KiB more, after which a connection is given up, however it
            is silent: name lookup, connecting, headers or content.
        attempts: connections in a row that may bring nothing new.
        deadline: seconds for everything, or None. What is there by then is kept.
    """

    silence: float = 20.0
    attempts: int = 6
    deadline: float | None = None


FIRST_USE = Patience(silence=4.0, attempts=1)
"""For a person who waits: a server out of reach is noticed in four seconds, a download that gets
on is not cut off."""


class _Again(Exception):
    """This connection is of no more use; another one may be."""


def fetch(
    area: Area,
    base_url: str,
    store: WeightsStore,
    *,
    progress: Progress | None = None,
    patience: Patience | None = None,
) -> Card:
    """Download ``<base_url>/<area>_FINAL_best.pt``, convert and store it; return its card.

    It becomes active where the area had no weights, bundled or published ones. What a site has
    imported or trained itself stays active: `models activate` changes that.

    Raises:
        Transient: the server is out of reach or too slow, or another process is fetching the
            same file. What has come is kept for the next call.
        Misconfigured: the URL is wrong or the server has no such file.
        WeightsRefused: what came is not a checkpoint that fits.
    """
    url = f"{base_url.rstrip('/')}/{area}_FINAL_best.pt"
    target = store.directory / "downloads" / f"{area}_FINAL_best.pt"
    facts = Facts(
        area=area,
        origin="published",
        training_data=_TRAINING_DATA,
        licence=_LICENCE,
        source=url,
    )
    with _alone(target):
        download(url, target, progress=progress, patience=patience)
        try:
            card = import_checkpoint(target, facts, store)
        finally:
            target.unlink(missing_ok=True)
    _use_unless_own(card, store)
    return card


def _use_unless_own(card: Card, store: WeightsStore) -> None:
    """Activate ``card`` unless its area runs on weights that the site made or chose itself."""
    active = store.active(card.area)
    if active is None or active.origin in {"bundled", "published"}:
        store.activate(card.area, card.sha256)


def download(
    url: str,
    target: Path,
    *,
    progress: Progress | None = None,
    patience: Patience | None = None,
) -> None:
    """Download ``url`` to ``target``, which appears whole or not at all.

    Raises:
        Transient, Misconfigured: as for :func:`fetch`.
    """
    _check_url(url)
    patience = patience or Patience()
    report = progress or (lambda _done, _total: None)
    part = _Part(target, url)
    end = None if patience.deadline is None else time.monotonic() + patience.deadline
    most, failures = part.size, 0
    while True:
        try:
            _receive(part, report, _Clock(patience.silence, end))
            break
        except _Again as exc:
            got_on = part.size >= most + _STEP
            most = max(most, part.size)
            failures = 0 if got_on else failures + 1
            pause = min(0.5 * 2 ** (failures - 1), 8.0) if failures else 0.0
            late = end is not None and time.monotonic() + pause >= end
            if late or failures >= patience.attempts:
                raise Transient(
                    f"{url}: {exc}; {part.size} bytes are kept, so try again later with"
                    " `mura-batch models fetch`, and it goes on from there"
                ) from exc
            time.sleep(pause)


def _check_url(url: str) -> None:
    if not re.match(r"https?://[^/\s]", url) or re.search(r"[\s\x00-\x1f\x7f]", url):
        raise Misconfigured(f"{url!r} is not an http(s) address: correct weights_url")


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Be the only process that downloads ``target``."""
    with ExitStack() as held:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(target.with_suffix(".lock").open("wb"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise Transient(f"another process is downloading {target.name}: wait for it") from exc
        except OSError as exc:
            raise Transient(f"{target.parent} cannot be written: {exc}") from exc
        yield


@dataclass(frozen=True, slots=True)
class _Version:
    """Which file a part belongs to.

    Attributes:
        validator: a strong ETag or the Last-Modified date (RFC 9110, 13.1.5), or empty.
        total: its bytes, or None.
    """

    url: str
    validator: str
    total: int | None


class _Part:
    """What has come of a download, and of which version of the file."""

    def __init__(self, target: Path, url: str) -> None:
        self.url = url
        self._target = target
        self._file = target.with_suffix(".part")
        self._record = target.with_suffix(".part.json")
        self.version = self._recorded()
        if self.version is None:
            self._file.unlink(missing_ok=True)

    def _recorded(self) -> _Version | None:
        try:
            version = _Version(**json.loads(self._record.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        known = isinstance(version.validator, str) and isinstance(version.total, int)
        return version if known and version.url == self.url and version.validator else None

    @property
    def size(self) -> int:
        """Bytes that have come."""
        try:
            return self._file.stat().st_size
        except FileNotFoundError:
            return 0

    @property
    def whole(self) -> bool:
        """Whether all of it has come."""
        return self.version is not None and self.version.total == self.size

    def request(self) -> request.Request:
        """Return the request for what has not come yet."""
        headers = {"User-Agent": "mura-batch", "Accept-Encoding": "identity"}
        if self.version is not None and self.version.validator and self.size:
            headers |= {"Range": f"bytes={self.size}-", "If-Range": self.version.validator}
        return request.Request(self.url, headers=headers)  # noqa: S310 - http(s), see _check_url

    def continued_by(self, answer: _Answer) -> bool:
        """Whether what the server sends is the rest of this very file."""
        return (
            self.version is not None
            and answer.start == self.size
            and answer.total == self.version.total
            and answer.validator in {"", self.version.validator}
        )

    def begin(self, answer: _Answer) -> None:
        """Start from nothing with the file that the server sends."""
        if (answer.total or 0) > _MAX_BYTES:
            raise Misconfigured(f"{self.url} has {answer.total} bytes: no DenseNet-121")
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_bytes(b"")
        self.version = _Version(self.url, answer.validator, answer.total)
        content = json.dumps(asdict(self.version)).encode()
        write_atomic(self._record, lambda stream: stream.write(content))

    def open(self) -> IO[bytes]:
        """Open the part to append to it."""
        return self._file.open("ab")

    def discard(self) -> None:
        """Forget what has come."""
        self._file.unlink(missing_ok=True)
        self.version = None

    def finish(self) -> None:
        """Give the part its final name, durably."""
        with self._file.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(self._file, self._target)
        self._record.unlink(missing_ok=True)
        sync_folder(self._target.parent)


def _receive(part: _Part, report: Progress, clock: _Clock) -> None:
    """Receive the rest of ``part`` and give it its final name.

    Raises:
        _Again: the connection failed.
        Transient: the part cannot be written.
        Misconfigured: the server will never give this file.
    """
    try:
        if part.whole:
            report(part.size, part.size)  # a process was cut off between the last byte and here
        elif not _over_one_connection(part, report, clock):
            part.discard()  # the file has changed since: from the start, so without a range
            if not _over_one_connection(part, report, clock):
                raise _Again("the server sends a range that nobody asked for")
        part.finish()
    except OSError as exc:  # of the local file: those of the network come as _Again
        raise Transient(f"{part.url} cannot be stored: {exc}") from exc


def _over_one_connection(part: _Part, report: Progress, clock: _Clock) -> bool:
    """Receive until ``part`` is whole; False where the server's answer does not continue it."""
    with closing(_Connection(part.request(), clock)) as server:
        answer = server.answer()
        if answer.status in {HTTPStatus.PARTIAL_CONTENT, _NO_SUCH_RANGE}:
            if not part.continued_by(answer):
                return False
        else:
            part.begin(answer)
        total = part.version.total if part.version else None
        done = part.size
        report(done, total)
        with part.open() as stream:
            while chunk := server.chunk():
                stream.write(chunk)
                done += len(chunk)
                report(done, total)
                if done > (_MAX_BYTES if total is None else total):
                    raise Misconfigured(f"{part.url}: the server sends more than the file")
    if total is not None and done < total:
        raise _Again(f"the connection ended after {done} of {total} bytes")
    return True


class _Clock:
    """Says how long to wait for the next bytes: ``silence``, and not beyond the deadline."""

    def __init__(self, silence: float, end: float | None) -> None:
        self.silence = silence
        self._end = end
        self._since = time.monotonic()
        self._bytes = 0

    def heard(self, size: int) -> None:
        """Count bytes that came."""
        self._bytes += size
        if self._bytes >= _STEP:
            self._since, self._bytes = time.monotonic(), 0

    def left(self) -> float:
        """Return the seconds left; _Again where there are none."""
        now = time.monotonic()
        left = self._since + self.silence - now
        if self._end is not None:
            left = min(left, self._end - now)
        if left <= 0:
            raise _Again("too little came for too long")
        return left


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the headers of an answer say.

    Attributes:
        start: first byte of the range that comes, or None.
        total: bytes of the whole file, or None.
    """

    status: int
    validator: str
    start: int | None
    total: int | None

    @classmethod
    def of(cls, status: int, headers: Message) -> _Answer:
        tag = headers.get("ETag", "")
        validator = headers.get("Last-Modified", "") if tag.startswith("W/") or not tag else tag
        if part := re.match(r"bytes (\d{1,15})-\d+/(\d{1,15})", headers.get("Content-Range", "")):
            return cls(status, validator, int(part[1]), int(part[2]))
        length = re.fullmatch(r"\d{1,15}", headers.get("Content-Length", ""))
        return cls(status, validator, None, int(length[0]) if length else None)


class _Connection:
    """One request, answered in a thread of its own.

    Name lookup, connecting and headers know no common time limit; waiting for a thread does.
    """

    def __init__(self, wanted: request.Request, clock: _Clock) -> None:
        self._clock = clock
        self._url = wanted.full_url
        self._items: queue.Queue[_Answer | bytes | Exception] = queue.Queue(maxsize=8)
        self._closed = threading.Event()
        threading.Thread(target=self._pump, args=(wanted,), daemon=True).start()

    def close(self) -> None:
        """Let the thread end; it does when the network next lets it."""
        self._closed.set()

    def answer(self) -> _Answer:
        """Return the answer's headers; _Again or Misconfigured where there are none."""
        item = self._next()
        if not isinstance(item, _Answer):
            raise _Again("the server sent no headers")
        return item

    def chunk(self) -> bytes:
        """Return bytes of the content, none at its end; _Again where it breaks off."""
        item = self._next()
        if not isinstance(item, bytes):
            raise _Again("the server sent headers twice")
        self._clock.heard(len(item))
        return item

    def _next(self) -> _Answer | bytes:
        try:
            item = self._items.get(timeout=self._clock.left())
        except queue.Empty:
            raise _Again(f"too little came for {self._clock.silence:g} s") from None
        if isinstance(item, HTTPError) and not _may_pass(item.code):
            raise Misconfigured(
                f"{self._url}: the server answers {item.code} {item.reason}: check weights_url"
            ) from item
        if isinstance(item, Exception):
            raise _Again(str(item) or type(item).__name__) from item
        return item

    def _pump(self, wanted: request.Request) -> None:
        with closing(_exchange(wanted, self._clock.silence)) as items:
            for item in items:
                while not self._closed.is_set():
                    with suppress(queue.Full):
                        self._items.put(item, timeout=0.2)
                        break
                else:
                    return


def _may_pass(status: int) -> bool:
    return status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in _PASSING


def _exchange(
    wanted: request.Request, silence: float
) -> Generator[_Answer | bytes | Exception, None, None]:
    """Yield the headers, the content and an empty chunk; or the error that came between."""
    try:
        with _opener().open(wanted, timeout=silence) as response:
            yield _Answer.of(response.status, response.headers)
            while chunk := response.read1(_CHUNK):
                yield chunk
            yield b""
    except HTTPError as exc:
        exc.close()
        yield _Answer.of(exc.code, exc.headers) if exc.code == _NO_SUCH_RANGE else exc
    except (OSError, HTTPException, ValueError) as exc:
        yield exc


class _NoDowngrade(request.HTTPRedirectHandler):
    """Follows redirects, but never from an encrypted address to an open one."""

    def redirect_request(  # noqa: PLR0917 - the signature is urllib's
        self,
        req: request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> request.Request | None:
        if req.type == "https" and not newurl.lower().startswith("https:"):
            raise HTTPError(newurl, code, "redirects to an address without TLS", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> request.OpenerDirector:
    """Return what opens http and https addresses, through the site's proxy, and no others."""
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler(),
        request.UnknownHandler(),
        request.HTTPHandler(),
        request.HTTPSHandler(),
        request.HTTPDefaultErrorHandler(),
        request.HTTPErrorProcessor(),
        _NoDowngrade(),
    ):
        opener.add_handler(handler)
    return opener
