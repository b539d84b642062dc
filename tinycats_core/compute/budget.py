"""The budget of a training on Modal, and the meter that says what it has cost."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from tinycats_core.errors import ComputeError
from tinycats_core.files import read_json, write_json
from tinycats_core.signals import Stop

USED_UP = "budget"  # why a training is asked to stop


class Budget(BaseModel):
    """What a training may cost, and what a second of this call costs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    usd: float | None  # None: no limit
    usd_per_second: float | None  # of its container; None: no price is known
    charge: str = ""  # what that price consists of


class Spent(BaseModel):
    """What a run has taken in all its attempts, as `meter.json` holds it, and how the last call was started."""

    model_config = ConfigDict(frozen=True)

    call_id: str = ""
    gpu: str
    max_cost_usd: float | None = None
    attempts: tuple[float, ...]  # seconds of each
    usd: float | None = None  # of all attempts; None: no price of one is known
    charge: str = ""  # what the price of the last attempt consists of; older records do not say


def process_start() -> float:
    """Return when this process began, in the time of `time.monotonic`; now if the system does not say.

    A container is billed from its start, and to import PyTorch takes it seconds.
    """
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        return time.monotonic()
    return time.monotonic() - max(0.0, age)


@dataclass
class Meter:
    """Counts the seconds and dollars of a run over all its attempts, and requests a stop when the budget is used up."""

    path: Path
    call_id: str
    gpu: str
    budget: Budget
    before: tuple[float, ...] = ()  # seconds of each earlier attempt
    usd_before: float | None = 0.0  # of all earlier attempts
    since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.path.is_file():
            spent = Spent.model_validate(read_json(self.path))
            self.before, self.usd_before = spent.attempts, spent.usd

    @contextmanager
    def running(self, stop: Stop) -> Iterator[None]:
        """Meter what this encloses, and request a stop when the budget is used up."""
        left = self._seconds_left()
        self.write()
        timer = threading.Timer(max(0.0, left or 0.0), stop.request, [USED_UP])
        timer.daemon = True
        if left is not None:
            if left <= 0:
                stop.request(USED_UP)
                raise ComputeError("nothing of the budget is left")
            timer.start()
        try:
            yield
        finally:
            timer.cancel()
            self.write()

    def write(self) -> None:
        """Write `meter.json`."""
        seconds, usd = self._taken()
        attempts = (*self.before, seconds)
        spent = Spent(
            call_id=self.call_id,
            gpu=self.gpu,
            max_cost_usd=self.budget.usd,
            attempts=attempts,
            usd=usd,
            charge=self.budget.charge,
        )
        write_json(self.path, spent.model_dump(mode="json"))

    def explain(self, last_good: str) -> str:
        """Return the message that the budget is used up, and from which checkpoint the run can resume."""
        return (
            f"${self._taken()[1]:.2f} is spent and compute.max_cost_usd is {self.budget.usd:g}; give a higher one and run the "
            f"same command to resume from {last_good}"
        )

    def _taken(self) -> tuple[float, float | None]:
        """Return the seconds of this attempt, and the dollars of all."""
        seconds, rate = round(time.monotonic() - self.since, 3), self.budget.usd_per_second
        return seconds, None if rate is None or self.usd_before is None else self.usd_before + seconds * rate

    def _seconds_left(self) -> float | None:
        """Return how long the budget lasts, None without a limit. Raises ComputeError if a limit cannot be kept."""
        limit, rate = self.budget.usd, self.budget.usd_per_second
        if limit is None or rate is None:
            return None
        if self.usd_before is None:
            raise ComputeError(
                f"compute.max_cost_usd is {limit:g} but an earlier attempt was on a GPU without a known price; leave the limit out"
            )
        return (limit - self.usd_before) / rate - (time.monotonic() - self.since)
