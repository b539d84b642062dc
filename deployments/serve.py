"""`make serve`: a Prefect server, a process work pool, every deployment and a worker, until Ctrl-C."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from types import FrameType
from urllib.parse import urlsplit

from tinycats_core.errors import TinycatsError, report_error

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_URL = "http://127.0.0.1:4200/api"
POOL = "local"
START_SECONDS = 180
STOP_SECONDS = 15  # for each process to end by itself before it is killed with all that it started


def main() -> int:
    """Serve until Ctrl-C or SIGTERM. Returns the exit status."""
    started: list[subprocess.Popen[bytes]] = []
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell's background jobs start with it ignored
        signal.signal(number, _interrupt)
    try:
        url = server_url(os.environ.get("PREFECT_API_URL", ""))
        environment = {**os.environ, "PREFECT_API_URL": url, "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        if answers(url):
            print(f"using the Prefect server at {url}", flush=True)
        else:
            started.append(start_server(url, environment))
        prefect(["work-pool", "create", POOL, "--type", "process", "--overwrite"], environment)
        prefect(["deploy", "--all"], environment)
        worker = start(["worker", "start", "--pool", POOL, "--name", "tinycats"], environment)
        started.append(worker)
        print(
            f"\nserving. Pages: {url.removesuffix('/api')}\nin another shell:\n  export PREFECT_API_URL={url}\n"
            "  .venv/bin/prefect deployment run release-model/smoke --watch\nCtrl-C stops everything.",
            flush=True,
        )
        return watch(started)
    except KeyboardInterrupt:
        print("\nstopping", flush=True)
        return 0
    except TinycatsError as error:
        return report_error(error)
    finally:
        stop(started)


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


def start_server(url: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
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
    server = start(["server", "start", "--host", host, "--port", str(port)], environment)
    deadline = time.monotonic() + START_SECONDS
    while not answers(url):
        if server.poll() is not None or time.monotonic() > deadline:
            stop([server])
            raise TinycatsError(f"the Prefect server at {url} did not start within {START_SECONDS} s; its output is above.")
        time.sleep(0.5)
    return server


def answers(url: str) -> bool:
    """Return whether a Prefect server answers at the URL."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.read().strip() == b"true"
    except (OSError, HTTPException, ValueError):  # nobody, something that speaks no HTTP, a name that no host can have
        return False


def prefect(arguments: Sequence[str], environment: dict[str, str]) -> None:
    """Run a Prefect command in the repository, to its end. Raises TinycatsError."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise TinycatsError(f"prefect {' '.join(arguments)} failed (exit {done.returncode}):\n{done.stdout.strip()}")


def start(arguments: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a Prefect command in the repository, in a process group of its own."""
    return subprocess.Popen([sys.executable, "-m", "prefect", *arguments], cwd=ROOT, env=environment, start_new_session=True)


def watch(started: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until one of the processes ends by itself. Raises TinycatsError."""
    while True:
        for process in started:
            if process.poll() is not None:
                raise TinycatsError(f"the Prefect process {process.pid} ended with exit {process.returncode}; its output is above.")
        time.sleep(0.5)


def stop(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """Stop the processes, the last one first, so that the worker can say goodbye to its server."""
    for process in reversed(started):
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
