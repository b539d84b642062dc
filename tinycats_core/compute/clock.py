"""The clock of a budget: it decides where a training stops, and counts the computing time of all attempts."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ValidationError

from tinycats_core.compute.budget import process_start
from tinycats_core.compute.plan import Pace, next_stop
from tinycats_core.errors import TinycatsError
from tinycats_core.files import read_json, write_json

STARTING = 60.0  # seconds: a process that is older than this has done something else before
EVERY = 5.0  # seconds between two notes: what a `kill -9` takes from the count


class Ledger(BaseModel):
    """What earlier attempts have taken, in seconds, and the stops that were decided."""

    seconds: float = 0.0
    stops: list[int] = []
    pace: Pace | None = None  # as it was observed last


def command_start() -> float:
    """Return when the present command began, in the time of `time.monotonic`: this process, or now if that is old."""
    now, began = time.monotonic(), process_start()
    return began if now - began < STARTING else now


class Clock:
    """Counts from `began` on top of earlier attempts; time in which nothing ran is not counted.

    The ledger is a file, so that a command that is run again makes the same stops without looking at the clock.

    Args:
        path: of the ledger.
        minutes: the budget.
        began: in the time of `time.monotonic`.

    Raises:
        TinycatsError: the ledger is damaged.
    """

    def __init__(self, path: Path, minutes: float, began: float):
        self.path, self.minutes, self.began, self.ledger = path, minutes, began, Ledger()
        if path.is_file():
            try:
                self.ledger = Ledger.model_validate(read_json(path))
            except (TinycatsError, ValidationError):
                raise TinycatsError(f"{path} is damaged; delete it: the same command then plans the budget anew") from None
        self.before, self.known = self.ledger.seconds, len(self.ledger.stops)

    @property
    def spent(self) -> float:
        """Seconds of all attempts."""
        return self.before + time.monotonic() - self.began

    def expect(self, pace: Pace) -> None:
        """Plan by a pace, unless an earlier attempt has observed one."""
        self.ledger.pace = self.ledger.pace or pace

    def stops(self, most: int, legs: int) -> Iterator[int]:
        """Yield the steps at which a training stops: those of earlier attempts, then new ones until the time is over.

        Each is decided when it is asked for, by what `observe` was told of those before.

        Args:
            most: the last step that is allowed.
            legs: into how many parts the training is divided.
        """
        ledger = self.ledger
        yield from ledger.stops[: self.known]
        while True:
            done, now = (ledger.stops or [0])[-1], ledger.pace
            assert now, "a pace is expected before the first stop"
            left = 60 * self.minutes - self.spent - now.closing
            stop = next_stop(left, done, most, legs - len(ledger.stops), now)
            if stop is None:
                return
            ledger.stops.append(stop)
            self.write()
            yield stop

    def observe(self, stop: int, training: float, judging: float) -> None:
        """Correct the pace by the seconds of a leg. One that an earlier attempt had begun says nothing."""
        stops = self.ledger.stops
        if self.ledger.pace and stop in stops[self.known :]:
            before = ([0, *stops])[stops.index(stop)]
            self.ledger.pace = self.ledger.pace.observed(stop - before, training, judging)

    def write(self) -> None:
        """Keep the ledger."""
        self.ledger.seconds = round(self.spent, 1)
        write_json(self.path, self.ledger.model_dump(mode="json"))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Keep the ledger every few seconds, for as long as this lasts."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(EVERY):
                self.write()

        watcher = threading.Thread(target=watch, name="tinycats-clock", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
            self.write()
