"""News reach the thread that waits, from signal handlers too."""

from __future__ import annotations

import signal
import threading
import time

from mura_batch.news import News


def test_a_wait_ends_with_what_was_told_before_or_meanwhile() -> None:
    news = News()
    news.tell()
    news.tell()
    news.wait(60)
    teller = threading.Timer(0.1, news.tell)
    teller.start()
    news.wait(60)
    started = time.monotonic()
    news.wait(0.1)
    assert time.monotonic() - started >= 0.1


def test_a_signal_handler_may_tell_what_its_own_thread_is_telling() -> None:
    news = News()
    signals = 0

    def handler(*_: object) -> None:
        nonlocal signals
        signals += 1
        news.tell()

    before = signal.signal(signal.SIGVTALRM, handler)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.0005, 0.0005)
    try:
        while signals < 200:
            news.tell()
            news.wait(0)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    news.tell()
    news.wait(60)
