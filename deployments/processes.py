"""The processes of flow runs on this machine: found by their environment, ended with their checkpoints, never left over."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from uuid import UUID

import psutil

RUN, SERVER, UP = "PREFECT__FLOW_RUN_ID", "PREFECT_API_URL", "TINYCATS_UP"
POLL_SECONDS = 0.2


class FlowProcess(NamedTuple):
    """The first process of a flow run; `others` are those that it started."""

    run: UUID
    first: psutil.Process
    others: tuple[psutil.Process, ...]

    @property
    def all(self) -> tuple[psutil.Process, ...]:
        """Every process of the run."""
        return self.first, *self.others

    def is_child_of(self, number: int) -> bool:
        """Return whether a process started the run, which then watches it."""
        return _parent(self.first) == number


def of_runs(url: str) -> dict[UUID, FlowProcess]:
    """Return the processes of the flow runs that a server's workers have started on this machine, by run."""
    found: dict[UUID, list[psutil.Process]] = {}
    for process, environment in _environments():
        if environment.get(SERVER, "").rstrip("/") == url and (run := environment.get(RUN)):
            found.setdefault(UUID(run), []).append(process)
    return {run: _ordered(run, processes) for run, processes in found.items()}


def mark() -> str:
    """Return the value of TINYCATS_UP by which the servers and workers of this process are known."""
    return f"{os.getpid()} {psutil.Process().create_time()}"


def of_other_up(url: str) -> tuple[int | None, list[psutil.Process]]:
    """Return the process id of another `tinycats up` for this URL, None if there is none, and what an ended one left over."""
    left = []
    for process, environment in _environments():
        if environment.get(SERVER, "").rstrip("/") != url or RUN in environment or UP not in environment:
            continue
        number, _, created = environment[UP].partition(" ")
        if environment[UP] == mark():
            continue
        if _is(int(number), float(created)):
            return int(number), []
        left.append(process)
    return None, left


def end(processes: Sequence[psutil.Process], patience: float, hurried: Callable[[], bool] = lambda: False) -> bool:
    """Send SIGTERM to processes, wait until they have ended, and kill what has not. Returns whether nothing was killed.

    Args:
        patience: seconds until they are killed.
        hurried: asked while waiting; true kills them at once.
    """
    for process in processes:
        send(process, signal.SIGTERM)
    deadline = time.monotonic() + patience
    while left := [process for process in processes if alive(process)]:
        if hurried() or time.monotonic() > deadline:
            for process in left:
                send(process, signal.SIGKILL)
            psutil.wait_procs(left, timeout=5)
            return False
        time.sleep(POLL_SECONDS)
    return True


def send(process: psutil.Process, number: signal.Signals) -> None:
    """Send a signal to a process, which may have ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def alive(process: psutil.Process) -> bool:
    """Return whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _ordered(run: UUID, processes: Sequence[psutil.Process]) -> FlowProcess:
    numbers = {process.pid for process in processes}
    first = min(processes, key=lambda process: (_parent(process) in numbers, process.pid))
    return FlowProcess(run, first, tuple(process for process in processes if process != first))


def _parent(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.NoSuchProcess:
        return None


def _is(number: int, created: float) -> bool:
    try:
        return abs(psutil.Process(number).create_time() - created) < 1
    except psutil.NoSuchProcess:
        return False


def _environments() -> Iterator[tuple[psutil.Process, dict[str, str]]]:
    """Yield each process of this user that runs, with its environment."""
    for process in psutil.process_iter():
        try:
            if alive(process):
                yield process, process.environ()
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):  # ended meanwhile, or of another user
            continue
