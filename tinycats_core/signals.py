"""Stopping work in order: a request, made by a signal or by whoever holds the `Stop`, and checked between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Stop:
    """A request to stop, handed down from the edge of a program to the work. The first reason stays."""

    def __init__(self) -> None:
        self.reason: str | None = None  # a signal's name, or a word such as "budget"

    @property
    def requested(self) -> bool:
        """Whether the work shall stop."""
        return self.reason is not None

    @property
    def number(self) -> int:
        """The number of the signal that asked, SIGTERM's for any other reason, 0 while nobody has asked."""
        return int(signal.Signals.__members__.get(self.reason, signal.SIGTERM)) if self.reason else 0

    def request(self, reason: str) -> None:
        """Ask to stop. Safe from any thread and from a signal handler."""
        self.reason = self.reason or reason


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Yield a `Stop` that SIGINT, SIGTERM and SIGHUP request, and deliver the signal again when this ends.

    Further signals change nothing until then. A SIGHUP that is ignored, as under nohup, stays ignored. Outside the main
    thread no handler is set: signals reach the main thread only, and its owner decides what they do.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in signal.Signals.__members__]
    before = {number: signal.getsignal(number) for number in numbers}  # Windows has no SIGHUP
    before = {number: old for number, old in before.items() if number.name != "SIGHUP" or old is not signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, lambda number, frame: stop.request(signal.Signals(number).name))
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if stop.reason in signal.Signals.__members__:
            signal.raise_signal(stop.number)
