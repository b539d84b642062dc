"""The meter of a training on Modal: what it has cost, and when the money is spent."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tinycats_core.errors import ComputeError
from tinycats_core.files import read_json, write_json
from tinycats_core.signals import Stop

USED_UP = "budget"  # why a training is asked to stop


@dataclass
class Meter:
    """The seconds and dollars that a run has taken in all its attempts, and a deadline where a budget ends them.

    Args:
        budget: `usd`, None where there is no limit, and `usd_per_second` of this call's GPU, None where no price is known.
    """

    path: Path
    call_id: str
    gpu: str
    budget: dict[str, float | None]
    before: list[float] = field(default_factory=list)  # seconds of each earlier attempt
    usd_before: float | None = 0.0  # of all of them; None where no price of one is known
    since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.path.is_file():
            kept = read_json(self.path)
            self.before, self.usd_before = kept["attempts"], kept.get("usd")

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
        """Keep what was taken so far, and what this call was started with."""
        seconds, usd = self._taken()
        started = {"call_id": self.call_id, "gpu": self.gpu, "max_cost_usd": self.budget["usd"]}
        write_json(self.path, {**started, "attempts": [*self.before, seconds], "usd": usd})

    def explain(self, last_good: str) -> str:
        """Say that the budget is used up, and where the run can go on."""
        return (
            f"${self._taken()[1]:.2f} is spent and compute.max_cost_usd is {self.budget['usd']:g}; give a higher one and run the "
            f"same command to go on from {last_good}"
        )

    def _taken(self) -> tuple[float, float | None]:
        """Return the seconds of this attempt, and the dollars of all."""
        seconds, rate = round(time.monotonic() - self.since, 3), self.budget["usd_per_second"]
        return seconds, None if rate is None or self.usd_before is None else self.usd_before + seconds * rate

    def _seconds_left(self) -> float | None:
        """Return how long the budget lasts, None where there is no limit. Raises ComputeError for one that cannot be kept."""
        limit, rate = self.budget["usd"], self.budget["usd_per_second"]
        if limit is None or rate is None:
            return None
        if self.usd_before is None:
            raise ComputeError(
                f"compute.max_cost_usd is {limit:g} but an earlier attempt was on a GPU of which no price is known; "
                "leave the limit out"
            )
        return (limit - self.usd_before) / rate
