"""Downloads from a real HTTP server on loopback that misbehaves in every way we could think of."""

from __future__ import annotations

import fcntl
import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from http.client import HTTPMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request

import pytest
import torch
from safetensors.torch import load_file, save_file

from mura_batch.area import Area
from mura_batch.errors import Misconfigured, Transient, WeightsRefused
from mura_batch.network import network_with
from mura_batch.preprocessing import Preprocessing
from mura_batch.weights import BUNDLED, WeightsStore, bundled_card, load_bundled, sha256_of
from mura_batch.weights_fetch import Patience, _NoDowngrade, _use_unless_own, download, fetch

HAND = Area.XR_HAND
CONTENT = b"".join(hashlib.sha256(bytes([n % 256, n // 256])).digest() for n in range(9375))
QUICK = Patience(silence=20, attempts=3)

Behaviour = Callable[["Handler"], None]


class Server(ThreadingHTTPServer):
    """Answers request n with behaviour n, and all further ones with the last."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.tag: str | None = '"one"'
        self.behaviours: list[Behaviour] = [whole]
        self.ranges: list[str | None] = []
        self.stop = threading.Event()

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """An ordinary file server with ranges and ETags, from which the behaviours deviate."""

    server: Server

    def do_GET(self) -> None:
        turn = len(self.server.ranges)
        self.server.ranges.append(self.headers.get("Range"))
        behaviours = self.server.behaviours
        behaviours[min(turn, len(behaviours) - 1)](self)

    def log_message(self, *_: object) -> None:
        pass

    def start(self, *, ranges: bool = True, length: int | None = None) -> bytes:
        """Send the headers of an honest answer and return the content that belongs to it."""
        content, first = self.server.content, 0
        wanted = self.headers.get("Range")
        if ranges and wanted and self.headers.get("If-Range") == self.server.tag:
            first = int(wanted.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if self.server.tag:
            self.send_header("ETag", self.server.tag)
        self.send_header("Content-Length", str(length or len(content) - first))
        self.end_headers()
        return content[first:]


def whole(handler: Handler) -> None:
    handler.wfile.write(handler.start())


def cut(handler: Handler) -> None:
    handler.wfile.write(handler.start()[:100_000])


def whole_without_ranges(handler: Handler) -> None:
    handler.wfile.write(handler.start(ranges=False))


def cut_without_ranges(handler: Handler) -> None:
    handler.wfile.write(handler.start(ranges=False)[:100_000])


def silent(handler: Handler) -> None:
    handler.server.stop.wait(5)


def stalls(handler: Handler) -> None:
    handler.wfile.write(handler.start()[:50_000])
    handler.server.stop.wait(5)


def trickles(handler: Handler) -> None:
    rest = handler.start()
    for byte in rest:
        if handler.server.stop.wait(0.02):
            return
        handler.wfile.write(bytes([byte]))


def status(code: int) -> Behaviour:
    return lambda handler: handler.send_error(code)


def another_part(handler: Handler) -> None:
    """A range that was not asked for, of a file with another length."""
    handler.send_response(206)
    handler.send_header("Content-Range", "bytes 7-16/17")
    handler.send_header("Content-Length", "10")
    handler.end_headers()
    handler.wfile.write(b"0123456789")


def splices(handler: Handler) -> None:
    """Ignores If-Range: sends the rest of the new version."""
    first = int(handler.headers["Range"].removeprefix("bytes=").removesuffix("-"))
    content = handler.server.content
    handler.send_response(206)
    handler.send_header("ETag", str(handler.server.tag))
    handler.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
    handler.send_header("Content-Length", str(len(content) - first))
    handler.end_headers()
    handler.wfile.write(content[first:])


def chunked_and_cut(handler: Handler) -> None:
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"5\r\nhello\r\n")
    handler.close_connection = True


def no_http(handler: Handler) -> None:
    handler.wfile.write(b"220 mail.example ESMTP\r\n")


def redirect(handler: Handler) -> None:
    handler.send_response(302)
    handler.send_header("Location", f"{handler.server.base}/elsewhere")
    handler.end_headers()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.stop.set()
        server.shutdown()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "downloads" / "file.pt"


def names(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir()) if target.parent.is_dir() else []


def test_a_file_comes_whole_with_its_progress(server: Server, target: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    download(server.base, target, progress=lambda *now: seen.append(now), patience=QUICK)
    assert target.read_bytes() == CONTENT
    assert names(target) == ["file.pt"]
    assert seen[0] == (0, len(CONTENT))
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert seen == sorted(seen)


def test_a_cut_download_goes_on_where_it_stopped(server: Server, target: Path) -> None:
    server.behaviours = [cut, cut, whole]
    download(server.base, target, patience=QUICK)
    assert target.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-", "bytes=200000-"]


def test_a_later_call_goes_on_where_the_last_one_gave_up(server: Server, target: Path) -> None:
    server.behaviours = [cut, status(503)]
    with pytest.raises(Transient, match="503.*100000 bytes are kept"):
        download(server.base, target, patience=replace(QUICK, attempts=1))
    assert not target.exists()
    server.behaviours = [whole]
    download(server.base, target, patience=QUICK)
    assert target.read_bytes() == CONTENT
    assert server.ranges[-1] == "bytes=100000-"


@pytest.mark.parametrize("answer", [whole, splices])
def test_a_file_that_changed_meanwhile_is_never_spliced(
    server: Server, target: Path, answer: Behaviour
) -> None:
    server.behaviours = [cut, status(404)]
    with pytest.raises(Misconfigured):
        download(server.base, target, patience=QUICK)
    server.content, server.tag = CONTENT[::-1], '"two"'
    server.behaviours = [whole, whole, answer, whole]
    download(server.base, target, patience=QUICK)
    assert target.read_bytes() == CONTENT[::-1]


def test_a_part_of_another_address_is_not_continued(server: Server, target: Path) -> None:
    server.behaviours = [cut, status(404)]
    with pytest.raises(Misconfigured):
        download(f"{server.base}/a", target, patience=QUICK)
    server.behaviours = [whole]
    download(f"{server.base}/b", target, patience=QUICK)
    assert target.read_bytes() == CONTENT
    assert server.ranges[-1] is None


@pytest.mark.parametrize("tag", [None, 'W/"weak"'])
def test_without_a_way_to_know_the_version_a_download_starts_again(
    server: Server, target: Path, tag: str | None
) -> None:
    server.tag = tag
    server.behaviours = [cut, whole]
    download(server.base, target, patience=QUICK)
    assert target.read_bytes() == CONTENT
    assert server.ranges == [None, None]


def test_a_server_that_ignores_ranges_is_borne(server: Server, target: Path) -> None:
    server.behaviours = [cut, whole_without_ranges]
    download(server.base, target, patience=QUICK)
    assert target.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-"]


def test_a_server_that_never_gets_further_is_given_up(server: Server, target: Path) -> None:
    server.behaviours = [cut_without_ranges]
    with pytest.raises(Transient, match="100000 of 300000 bytes"):
        download(server.base, target, patience=replace(QUICK, attempts=2))
    assert len(server.ranges) == 3
    assert not target.exists()


def test_a_part_that_is_whole_is_not_asked_for_again(server: Server, target: Path) -> None:
    """As a kill between the last byte and the final name leaves it."""
    server.behaviours = [cut, status(404)]
    with pytest.raises(Misconfigured):
        download(server.base, target, patience=QUICK)
    with target.with_suffix(".part").open("ab") as part:
        part.write(CONTENT[100_000:])
    seen: list[tuple[int, int | None]] = []
    download(server.base, target, progress=lambda *now: seen.append(now), patience=QUICK)
    assert target.read_bytes() == CONTENT
    assert names(target) == ["file.pt"]
    assert len(server.ranges) == 2
    assert seen == [(len(CONTENT), len(CONTENT))]


def test_a_part_that_is_too_long_starts_again(server: Server, target: Path) -> None:
    """The server answers 416 to a range that begins behind the end."""
    server.behaviours = [cut, status(404)]
    with pytest.raises(Misconfigured):
        download(server.base, target, patience=QUICK)
    with target.with_suffix(".part").open("ab") as part:
        part.write(bytes(400_000))
    server.behaviours = [whole, whole, status(416), whole]
    download(server.base, target, patience=replace(QUICK, attempts=1))
    assert target.read_bytes() == CONTENT
    assert server.ranges[2:] == ["bytes=500000-", None]


def test_a_damaged_record_starts_again(server: Server, target: Path) -> None:
    target.parent.mkdir()
    for record in ("", "[]", "{}", '{"url": 1, "validator": 2, "total": 3}'):
        target.with_suffix(".part").write_bytes(b"old")
        target.with_suffix(".part.json").write_text(record)
        download(server.base, target, patience=QUICK)
        assert target.read_bytes() == CONTENT
    assert set(server.ranges) == {None}


@pytest.mark.parametrize("behaviour", [silent, stalls, trickles])
def test_silence_is_noticed_however_it_comes(
    server: Server, target: Path, behaviour: Behaviour
) -> None:
    server.behaviours = [behaviour, silent]
    begun = time.monotonic()
    with pytest.raises(Transient, match="bytes are kept"):
        download(server.base, target, patience=Patience(silence=0.3, attempts=1))
    assert time.monotonic() - begun < 3
    assert not target.exists()


def test_a_stalled_download_is_taken_up_again(server: Server, target: Path) -> None:
    server.behaviours = [stalls, whole]
    download(server.base, target, patience=Patience(silence=1, attempts=3))
    assert target.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=50000-"]


def test_the_deadline_ends_everything(server: Server, target: Path) -> None:
    server.behaviours = [silent]
    begun = time.monotonic()
    with pytest.raises(Transient):
        download(server.base, target, patience=Patience(silence=20, attempts=9, deadline=0.4))
    assert time.monotonic() - begun < 3


def test_a_server_that_takes_no_connection_is_out_of_reach(target: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(Transient, match="refused"):
        download(f"http://127.0.0.1:{port}/x", target, patience=replace(QUICK, attempts=2))


@pytest.mark.parametrize("code", [500, 503, 429, 408])
def test_answers_that_may_pass_are_tried_again(server: Server, target: Path, code: int) -> None:
    server.behaviours = [status(code), whole]
    download(server.base, target, patience=replace(QUICK, attempts=2))
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("code", [401, 403, 404, 410, 416])
def test_answers_that_will_not_change_are_not(server: Server, target: Path, code: int) -> None:
    server.behaviours = [status(code)]
    with pytest.raises((Misconfigured, Transient), match=f"{code}|range"):
        download(server.base, target, patience=replace(QUICK, attempts=1))
    assert len(server.ranges) <= 2
    assert not target.exists()


@pytest.mark.parametrize("behaviour", [another_part, chunked_and_cut, no_http])
def test_nonsense_is_no_file(server: Server, target: Path, behaviour: Behaviour) -> None:
    server.behaviours = [behaviour]
    with pytest.raises(Transient):
        download(server.base, target, patience=replace(QUICK, attempts=1))
    assert not target.exists()


def test_a_file_announced_as_enormous_is_not_begun(server: Server, target: Path) -> None:
    server.behaviours = [lambda handler: handler.wfile.write(handler.start(length=1 << 40)[:9])]
    with pytest.raises(Misconfigured, match="1099511627776 bytes"):
        download(server.base, target, patience=QUICK)
    assert names(target) == []


def test_redirects_are_followed_but_not_out_of_tls(server: Server, target: Path) -> None:
    server.behaviours = [redirect, whole]
    download(server.base, target, patience=QUICK)
    assert target.read_bytes() == CONTENT
    secure = Request("https://example.org/a")
    with (
        target.open("rb") as body,
        pytest.raises(HTTPError, match="without TLS") as caught,
        closing(body),
    ):
        _NoDowngrade().redirect_request(
            secure, body, 302, "Found", HTTPMessage(), "http://example.org/b"
        )
    caught.value.close()


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://x/y", "x", "http://", "http:///x", "http://a/b c\r\nX: y"]
)
def test_only_http_addresses_are_opened(target: Path, url: str) -> None:
    with pytest.raises(Misconfigured, match="correct weights_url"):
        download(url, target, patience=QUICK)
    assert names(target) == []


# ---------------------------------------------------------------------------- into the store


@pytest.fixture
def store(tmp_path: Path) -> WeightsStore:
    store = WeightsStore(tmp_path / "weights")
    store.install_bundled()
    return store


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("published") / "file.pt"
    torch.save(
        {"model_state": network_with(load_bundled(HAND)[0]).state_dict(), "img_size": 224}, file
    )
    return file.read_bytes()


def test_fetched_weights_become_those_of_their_area(
    server: Server, store: WeightsStore, checkpoint: bytes
) -> None:
    server.content = checkpoint
    server.behaviours = [lambda handler: handler.wfile.write(handler.start()[:9_000_000]), whole]
    card = fetch(HAND, f"{server.base}/v1/", store, patience=Patience(silence=20))
    assert store.active(HAND) == card
    assert (card.origin, card.target, card.threshold) == ("published", "abnormal", 0.5)
    assert card.preprocessing == Preprocessing()
    assert card.source == f"{server.base}/v1/XR_HAND_FINAL_best.pt"
    assert card.source_sha256 == hashlib.sha256(checkpoint).hexdigest()
    assert store.verify() == []
    store.load(card)
    assert list((store.directory / "downloads").glob("*.p*t*")) == []
    assert store.active(Area.XR_WRIST) == bundled_card(Area.XR_WRIST)
    with store.file(card).open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(WeightsRefused, match="sha256"):
        store.load(card)


def test_fetching_keeps_what_a_site_trained_or_imported_itself(
    store: WeightsStore, tmp_path: Path
) -> None:
    versions = []
    for origin in ("published", "trained", "imported", "published"):
        file = tmp_path / f"{len(versions)}.safetensors"
        state = load_file(BUNDLED / "generalist.safetensors")
        save_file(state, file, metadata={"version": file.stem})
        changed = replace(bundled_card(HAND), sha256=sha256_of(file), origin=origin)
        versions.append(store.add(file, changed))
    first, trained, imported, second = versions
    for active, fetched, expected in (
        (bundled_card(HAND), first, first),
        (first, second, second),
        (trained, second, trained),
        (imported, second, imported),
    ):
        store.activate(HAND, active.sha256)
        _use_unless_own(fetched, store)
        assert store.active(HAND) == expected


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>Sign in</html>", b"", CONTENT])
def test_wrong_bytes_are_refused_and_forgotten(
    server: Server, store: WeightsStore, content: bytes
) -> None:
    server.content = content
    with pytest.raises(WeightsRefused, match="not a torch checkpoint"):
        fetch(HAND, server.base, store, patience=QUICK)
    assert store.active(HAND) == bundled_card(HAND)
    assert [p.suffix for p in (store.directory / "downloads").iterdir()] == [".lock"]


def test_two_fetches_of_one_file_do_not_meet(server: Server, store: WeightsStore) -> None:
    place = store.directory / "downloads" / "XR_HAND_FINAL_best.lock"
    place.parent.mkdir()
    with place.open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Transient, match="another process"):
            fetch(HAND, server.base, store, patience=QUICK)
    assert server.ranges == []


def test_the_bundled_file_is_what_its_cards_say() -> None:
    digest = sha256_of(BUNDLED / "generalist.safetensors")
    assert {bundled_card(area).sha256 for area in Area} == {digest}
