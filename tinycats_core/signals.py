"""Stopping on a signal: asked for at once, done when the work in hand is in order."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_signals() -> Iterator[dict[str, int]]:
    """Turn SIGINT, SIGTERM and SIGHUP into an entry `signal` of what this yields; deliver it again afterwards.

    A SIGHUP that is ignored, as under nohup, stays ignored. Outside the main thread nothing is changed: signals reach
    the main thread only, and who runs it decides what they do.
    """
    stop: dict[str, int] = {}
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]
    try:
        for number in before:
            signal.signal(number, lambda number, frame: stop.setdefault("signal", number))
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if "signal" in stop:
        signal.raise_signal(stop["signal"])
