"""The clock of a budget: it counts the computing time of a release over all its attempts, and keeps what was decided by it."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ValidationError

from tinycats_core.compute.budget import process_start
from tinycats_core.errors import TinycatsError
from tinycats_core.files import read_json, write_json

STARTING = 60.0  # seconds: a process that is older than this has done something else before
EVERY = 5.0  # seconds between two notes: what a `kill -9` loses


class Leg(BaseModel):
    """A part of a training: the step that it ends at, and whether its snapshot is judged, None as long as that is open."""

    stop: int
    judged: bool | None = None


class Ledger(BaseModel):
    """What a budget has been spent on: seconds of all attempts, and the legs of the training."""

    seconds: float = 0.0
    legs: list[Leg] = []
    ended: str | None = None


def command_start(now: float | None = None) -> float:
    """Return when the present command began, in the time of `time.monotonic`: this process, unless that is old."""
    now = time.monotonic() if now is None else now
    began = process_start()
    return began if now - began < STARTING else now


class Clock:
    """Counts from `began`, in the time of `time.monotonic`, on top of earlier attempts. Time in which nothing ran is not counted.

    The ledger lies in one file, so that a command that is run again makes the same decisions without looking at the clock.
    """

    def __init__(self, path: Path, began: float):
        self.path, self.began, self.ledger = path, began, Ledger()
        if path.is_file():
            try:
                self.ledger = Ledger.model_validate(read_json(path))
            except (TinycatsError, ValidationError):
                raise TinycatsError(f"{path} is damaged; delete it, and the same command plans the rest of its budget anew") from None
        self.before = self.ledger.seconds
        self.lock = threading.Lock()

    @property
    def spent(self) -> float:
        """Seconds of all attempts."""
        return self.before + time.monotonic() - self.began

    def write(self) -> None:
        """Keep the ledger."""
        with self.lock:
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
