from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from mura_batch.systemd import ALIVE, READY, STOPPING, ServiceManager


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """A service manager's end: what NOTIFY_SOCKET says, and the bound socket."""
    path = str(tmp_path / "notify") if request.param == "path" else f"@{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(path.replace("@", "\0", 1) if request.param == "abstract" else path)
        bound.settimeout(5)
        yield path, bound


def test_each_message_arrives_whole_as_one_datagram(listener: tuple[str, socket.socket]) -> None:
    address, bound = listener
    manager = ServiceManager.from_environment({"NOTIFY_SOCKET": address})
    assert manager.notify(READY, "STATUS=watching")
    assert manager.notify(ALIVE)
    assert manager.notify(STOPPING)
    received = [bound.recv(4096) for _ in range(3)]
    assert received == [b"READY=1\nSTATUS=watching", b"WATCHDOG=1", b"STOPPING=1"]


def test_a_status_with_undecodable_characters_is_still_sent(
    listener: tuple[str, socket.socket],
) -> None:
    address, bound = listener
    assert ServiceManager(address).notify("STATUS=caf\udce9")
    assert bound.recv(4096) == b"STATUS=caf?"


def test_nobody_listening_is_said_and_harmless(tmp_path: Path) -> None:
    assert not ServiceManager().notify(READY)
    assert not ServiceManager(str(tmp_path / "gone")).notify(READY)
    assert not ServiceManager(f"@{secrets.token_hex(8)}").notify(READY)


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": str(os.getpid())}, 0.5),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "³"}, None),
    ],
)
def test_watchdog_interval_is_read_in_seconds(
    environment: dict[str, str], seconds: float | None
) -> None:
    assert ServiceManager.from_environment(environment).watchdog_seconds == seconds


def test_no_descriptor_is_left_open(listener: tuple[str, socket.socket]) -> None:
    address, bound = listener
    before = sorted(Path("/proc/self/fd").iterdir())
    for _ in range(5):
        ServiceManager(address).notify(ALIVE)
        bound.recv(4096)
    assert sorted(Path("/proc/self/fd").iterdir()) == before
