"""`make serve`: a Prefect server, a process work pool, every deployment and a worker, until Ctrl-C.

A server or worker that dies is started again. Runs whose process is gone are marked, so that nothing waits for them. Ctrl-C ends
the runs first, each with its checkpoint, then the worker, then the server.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from uuid import UUID

from deployments import processes
from flows.server import answers, check_server
from tinycats_core.errors import TinycatsError, report_error
from tinycats_core.files import FOLDER

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_URL = "http://127.0.0.1:4200/api"
POOL, WORKER = "local", f"tinycats on {socket.gethostname()}"
START_SECONDS = 180
STOP_SECONDS = 90  # for the runs to write their checkpoints, and for each process to end, before they are killed
LOOK_SECONDS = 5  # between two looks at the runs
GRACE_SECONDS = 30  # that a run may lack a process while a worker starts it, or reports its end
MOST_DEATHS, WITHIN_SECONDS = 5, 600
SETTINGS = {  # what a person sets in the environment stays
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "5",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "PREFECT_WORKER_QUERY_SECONDS": "5",
}


def main() -> int:
    """Serve until Ctrl-C or SIGTERM. Returns the exit status."""
    interrupts = Interrupts()
    up = None
    try:
        up = Up(server_url(os.environ.get("PREFECT_API_URL", "")), interrupts)
        up.start()
        return up.watch()
    except KeyboardInterrupt:
        print("\nstopping: running flows write their checkpoints (Ctrl-C again kills them)", flush=True)
        return 0
    except TinycatsError as error:
        return report_error(error)
    finally:
        if up:
            up.stop()


class Interrupts:
    """SIGINT, SIGTERM and SIGHUP: the first one interrupts, the next one hurries what is being ended."""

    def __init__(self) -> None:
        self.count = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # SIGINT too: a shell's background jobs ignore it
            signal.signal(number, self._count)

    @property
    def hurried(self) -> bool:
        """Whether a second one has come."""
        return self.count > 1

    def _count(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count == 1:
            raise KeyboardInterrupt


class Service:
    """A Prefect command in the repository, in a process group of its own."""

    def __init__(self, name: str, arguments: Sequence[str], environment: Mapping[str, str]):
        self.name, self.environment = name, environment
        self.command = [sys.executable, "-m", "prefect", *arguments]
        self.deaths: list[float] = []
        self.process = self._start()

    def has_died(self) -> bool:
        """Return whether it has ended."""
        return self.process.poll() is not None

    def start_again(self) -> None:
        """Start it again after it has died. Raises TinycatsError if it dies again and again."""
        now = time.monotonic()
        self.deaths = [death for death in self.deaths if now - death < WITHIN_SECONDS] + [now]
        why = ended(self.process.returncode)
        if len(self.deaths) > MOST_DEATHS:
            raise TinycatsError(
                f"the {self.name} ended {len(self.deaths)} times in {WITHIN_SECONDS // 60} minutes, now {why}; its output is above."
            )
        print(f"the {self.name} ended {why}; it is started again", flush=True)
        self.kill()
        self.process = self._start()

    def stop(self, interrupts: Interrupts) -> None:
        """Ask it to end, and kill it with all that it started if it does not."""
        if not self.has_died():
            self.send(signal.SIGINT)
            self.send(signal.SIGCONT)  # one that was stopped gets the SIGINT first
            deadline = time.monotonic() + STOP_SECONDS
            while not self.has_died() and time.monotonic() < deadline and not interrupts.hurried:
                time.sleep(0.1)
        self.kill()
        self.process.wait()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """Kill what is left of its process group: the server runs in a child of its command."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.command, cwd=ROOT, env=self.environment, start_new_session=True)


class Up:
    """The server, the worker, and the runs on this machine."""

    def __init__(self, url: str, interrupts: Interrupts):
        self.url, self.interrupts = url, interrupts
        own = {"PREFECT_API_URL": url, processes.UP: processes.mark(), "PYTHONPATH": pythonpath()}
        self.environment = {**SETTINGS, FOLDER: str(ROOT), **os.environ, **own}
        self.server: Service | None = None
        self.worker: Service | None = None
        self.seen: set[UUID] = set()  # runs that had a process here
        self.missed: set[UUID] = set()  # those that had none at the last look
        self.looked = time.monotonic()

    def start(self) -> None:
        """Start whatever does not run yet. Raises TinycatsError."""
        end_leftovers(self.url)
        if answers(self.url):
            check_server(self.url)
            print(f"using the Prefect server at {self.url}", flush=True)
        else:
            self.server = start_server(self.url, self.environment)
        run([sys.executable, "-m", "deployments.deploy"], self.environment)
        with self._client() as client:
            self._settle_all(client)
        self.worker = Service("worker", ["worker", "start", "--pool", POOL, "--name", WORKER], self.environment)
        print(
            f"\nserving. Pages: {self.url.removesuffix('/api')}\nin another shell:\n  export PREFECT_API_URL={self.url}\n"
            "  .venv/bin/prefect deployment run release-model/smoke --watch\nCtrl-C stops everything.",
            flush=True,
        )

    def watch(self) -> int:
        """Start again what dies, and look after the runs. Raises TinycatsError, KeyboardInterrupt."""
        while True:
            if self.server and self.server.has_died():
                self.server.start_again()
                wait_for_server(self.url, self.server)
            if self.worker and self.worker.has_died():
                with self._client() as client:
                    self._settle_all(client)
                self.worker.start_again()
            if time.monotonic() - self.looked > LOOK_SECONDS and answers(self.url):
                with self._client() as client:
                    self._look(client)
                self.looked = time.monotonic()
            time.sleep(0.5)

    def stop(self) -> None:
        """End the runs on this machine, then the worker, then the server."""
        if self.worker:
            self.worker.send(signal.SIGSTOP)  # it begins no run meanwhile; and ended by SIGINT it would kill its runs at once
            left = [process for run in processes.of_runs(self.url).values() for process in run.all]
            processes.end(left, STOP_SECONDS, lambda: self.interrupts.hurried)
            self.worker.stop(self.interrupts)
            if answers(self.url):
                with self._client() as client:
                    self._settle_all(client)
        if self.server:
            self.server.stop(self.interrupts)

    def _settle_all(self, client: "SyncPrefectClient") -> None:
        """Mark every run that has no process, and free the slots that none holds: no worker of this machine runs now."""
        from deployments import settle

        alive, runs = processes.of_runs(self.url), settle.active_runs(client, POOL)
        shared = settle.is_shared(client, POOL, WORKER)
        settle.settle(client, [run for run in runs if run.id not in alive and (run.id in self.seen or not shared)])
        if not shared:
            settle.free_slots(client, POOL)

    def _look(self, client: "SyncPrefectClient") -> None:
        """Mark runs that have lost their process, and cancel those whose worker is gone and cannot."""
        from deployments import settle

        alive, runs = processes.of_runs(self.url), settle.active_runs(client, POOL)
        self.seen |= alive.keys()
        shared = settle.is_shared(client, POOL, WORKER)
        missed = [run for run in runs if run.id not in alive and (run.id in self.seen or not shared)]
        settle.settle(client, [run for run in missed if run.id in self.missed and settle.seconds_in_state(run) > GRACE_SECONDS])
        self.missed = {run.id for run in missed}
        for run in settle.cancelling(runs):
            process = alive.get(run.id)
            if process and self.worker and not process.is_child_of(self.worker.process.pid):
                processes.end(process.all, STOP_SECONDS, lambda: self.interrupts.hurried)
                settle.settle(client, [run])

    @contextmanager
    def _client(self) -> "Iterator[SyncPrefectClient]":
        """Yield a client of the server. What the server does not answer is left for the next look."""
        import httpx
        from prefect.client.orchestration import get_client
        from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

        with temporary_settings({PREFECT_API_URL: self.url, PREFECT_CLIENT_MAX_RETRIES: 0}):
            try:
                with get_client(sync_client=True) as client:
                    yield client
            except (httpx.HTTPError, RuntimeError) as error:
                print(f"the Prefect server does not answer now: {type(error).__name__}", flush=True)


def pythonpath() -> str:
    """Return PYTHONPATH with the repository first: a flow runs the code of the clone that serves it."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def server_url(text: str) -> str:
    """Return the URL of a server as PREFECT_API_URL says it, without a slash at its end; the default one for nothing.

    Raises:
        TinycatsError: it is no URL of a server.
    """
    url = text.strip().rstrip("/") or DEFAULT_URL
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number or too high, a bracket that is not closed
        good = False
    if not good:
        raise TinycatsError(f"PREFECT_API_URL is {text!r}; it must be a URL such as {DEFAULT_URL}. Give one, or unset it.")
    return url


def end_leftovers(url: str) -> None:
    """End the server and the worker that a killed `tinycats up` has left. Raises TinycatsError if one runs here."""
    number, left = processes.of_other_up(url)
    if number:
        raise TinycatsError(
            f"`tinycats up` serves {url} already (process {number}). Stop it with Ctrl-C, or choose another port: "
            f"PREFECT_API_URL={DEFAULT_URL.replace('4200', '4201')} make serve"
        )
    if left:
        print("ending the server and the worker of a `tinycats up` that was killed", flush=True)
        processes.end(left, STOP_SECONDS)


def start_server(url: str, environment: Mapping[str, str]) -> Service:
    """Start a server at the URL and wait until it answers. Raises TinycatsError."""
    where = urlsplit(url)
    host, port = where.hostname or "", where.port or 80
    if host not in ("127.0.0.1", "localhost"):
        raise TinycatsError(f"PREFECT_API_URL is {url}, where no Prefect server answers. Start it there, or unset PREFECT_API_URL.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that has just stopped is no obstacle
        try:
            probe.bind((host, port))
        except OSError as error:
            raise TinycatsError(
                f"port {port} on {host} is taken by something that is no Prefect server ({error.strerror}). Stop it, "
                f"or choose another port: PREFECT_API_URL=http://127.0.0.1:{port + 1}/api make serve"
            ) from None
    print(f"starting a Prefect server at {url}", flush=True)
    server = Service("server", ["server", "start", "--host", host, "--port", str(port)], environment)
    try:
        wait_for_server(url, server)
    except BaseException:
        server.kill()
        raise
    return server


def wait_for_server(url: str, server: Service) -> None:
    """Wait until a server that was started answers. Raises TinycatsError."""
    deadline = time.monotonic() + START_SECONDS
    while not answers(url):
        if server.has_died() or time.monotonic() > deadline:
            raise TinycatsError(f"the Prefect server at {url} did not start within {START_SECONDS} s; its output is above.")
        time.sleep(0.5)


def run(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run a command in the repository, to its end. Raises TinycatsError with what it printed."""
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise TinycatsError(f"{' '.join(command[1:])} failed {ended(done.returncode)}:\n{done.stdout.strip()}")


def ended(status: int) -> str:
    """Return how a process ended, in words."""
    if status >= 0:
        return f"with exit status {status}"
    name = signal.Signals(-status).name
    return f"by {name}" + (" (somebody killed it, or memory ran out)" if name == "SIGKILL" else "")


if __name__ == "__main__":
    sys.exit(main())
