"""Kill what `tinycats up` runs, at random moments of a release, and see whether the next release completes.

python -m benchmarks.operations --kills 30

In turn: the process of a flow run, the worker and the server by SIGKILL, `tinycats up` by Ctrl-C and by SIGKILL. What died with
`tinycats up` is started by the same command again.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import ROOT, TINY, command_line, positive, report

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

KINDS = ("flow", "worker", "server", "up by Ctrl-C", "up")
SMALL: dict[str, dict[str, Any]] = TINY | {"export": {"int8": False, "forms": []}}
WITHIN = 40.0  # seconds of a release in which it is hit: about as long as it takes on two idle cores
BAR = 60.0  # seconds from the start-up, or from the kill where nothing has to be started by hand, to the end of the next run
LONGEST = 600.0  # seconds that anything here may take
EXIT_SECONDS = 30.0  # for the process of a run that has ended to exit


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures. Returns the exit status: 0 where nothing was wedged, lost or left over."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operations", description=__doc__)
    parser.add_argument("--kills", type=positive, default=30, help="how often something is killed (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--quick", action="store_true", help="three kills")
    given = parser.parse_args(arguments)
    kills, rng = 3 if given.quick else given.kills, random.Random(given.seed)
    rows: list[dict[str, Any]] = []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C ends it with the figures so far, in the background too
    with tempfile.TemporaryDirectory(prefix="tinycats-") as scratch:
        site = Site(Path(scratch))
        try:
            site.start()
            for number in range(kills):
                rows.append(one_kill(site, KINDS[number % len(KINDS)], number, rng.uniform(0, WITHIN)))
        except KeyboardInterrupt:
            print(f"interrupted after {len(rows)} kills", file=sys.stderr)
        finally:
            left = site.stop()
    figures = {
        "kills": len(rows),
        "wedged": sum(row["wedged"] for row in rows),
        "late": sum(row["late"] for row in rows),
        "lost": sum(row["lost"] for row in rows),
        "zombies": sum(row["zombies"] for row in rows) + left,
        "seconds_max": max((row["seconds"] for row in rows), default=0.0),
        "rows": rows,
    }
    report("operations", figures, given)
    return 0 if figures["wedged"] == figures["lost"] == figures["zombies"] == 0 else 1


def one_kill(site: "Site", kind: str, number: int, moment: float) -> dict[str, Any]:
    """Kill something so many seconds after a release has begun, and run the same release again.

    Returns how long the next run took, and counts: `lost` results of finished stages that were made again; `wedged` runs (the
    next one did not complete, the killed one has no final state); `late` ones, which took longer than BAR; and `zombies`, the
    processes of runs that have ended.
    """
    from deployments import processes

    with site.client() as client:
        run = site.submit(client, number)
        until(lambda: client.read_flow_run(run.id).state_name != "Scheduled" and run.id in processes.of_runs(site.url))
    time.sleep(moment)
    site.kill(kind, processes.of_runs(site.url).get(run.id))
    before = site.results()
    if kind.startswith("up"):
        site.start()
    started = time.monotonic()
    until(site.answers)
    with site.client() as client:
        again = site.finished(client, site.submit(client, number))
        took = time.monotonic() - started
        until(lambda: is_final(client.read_flow_run(run.id)), fail=False)
        old = client.read_flow_run(run.id)
    after = site.results()
    until(lambda: not processes.of_runs(site.url), fail=False, longest=EXIT_SECONDS)  # they say goodbye to the server
    zombies = [one for one in processes.of_runs(site.url) if one in (run.id, again.id)]
    row = {
        "kind": kind,
        "moment": round(moment, 1),
        "old": old.state_name,
        "next": again.state_name,
        "seconds": round(took, 1),
        "lost": sum(after.get(name) != made for name, made in before.items()),
        "wedged": (again.state_name != "Completed") + (not is_final(old)),
        "late": int(took > BAR),
        "zombies": len(zombies),
    }
    print(row, flush=True)
    return row


class Site:
    """A `tinycats up` with a server, a home and a registry of its own."""

    def __init__(self, folder: Path, settings: Mapping[str, str] | None = None):
        from flows.server import free_port

        self.folder, self.url = folder, f"http://127.0.0.1:{free_port()}/api"
        own = {"PREFECT_HOME": str(folder / "prefect"), "TINYCATS_HOME": str(folder / "home"), "PREFECT_API_URL": self.url}
        self.environment = {"OMP_NUM_THREADS": "1", **os.environ, **own, **(settings or {})}
        self.up: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start `tinycats up`, and wait until it serves."""
        output = self.folder / "up.txt"
        with open(output, "wb") as file:
            command = [sys.executable, "-m", "deployments.serve"]
            self.up = subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=file, stderr=subprocess.STDOUT)
        until(lambda: b"serving. Pages:" in output.read_bytes() or self.up is None or self.up.poll() is not None)
        assert self.up.poll() is None, output.read_text(errors="replace")[-2000:]

    def stop(self) -> int:
        """Stop it by Ctrl-C. Returns how many processes are left over, and kills them."""
        import psutil

        if self.up and self.up.poll() is None:
            self.up.send_signal(signal.SIGINT)
            self.up.wait(LONGEST)
        left = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("PREFECT_API_URL") == self.url:
                    left.append(process)
            except (psutil.Error, OSError):
                continue
        for process in left:
            process.kill()
        return len(left)

    def kill(self, kind: str, flow: Any) -> None:
        """Kill one thing."""
        import psutil

        assert self.up
        if kind == "up by Ctrl-C":
            self.up.send_signal(signal.SIGINT)
            self.up.wait(LONGEST)
        elif kind == "up":
            self.up.kill()
            self.up.wait()
        elif kind == "flow":
            if flow:
                flow.first.kill()  # otherwise the run has ended already
        else:
            children = psutil.Process(self.up.pid).children()
            (chosen,) = [child for child in children if kind in child.cmdline()]
            chosen.kill()

    def answers(self) -> bool:
        """Return whether the server answers."""
        from flows.server import answers

        return answers(self.url)

    @contextmanager
    def client(self) -> "Iterator[SyncPrefectClient]":
        """Yield a client of the server."""
        from prefect.client.orchestration import get_client
        from prefect.settings import PREFECT_API_URL, temporary_settings

        with temporary_settings({PREFECT_API_URL: self.url}), get_client(sync_client=True) as client:
            yield client

    def submit(self, client: "SyncPrefectClient", number: int) -> "FlowRun":
        """Ask for a release that no other number asks for."""
        overrides = {
            **SMALL,
            "train": SMALL["train"] | {"seed": 100 + number},
            "publish": {"name": "small", "page": "none", "folder": str(self.folder / f"releases{number}")},
        }
        deployment = client.read_deployment_by_name("release-model/smoke")
        return client.create_flow_run_from_deployment(deployment.id, parameters={"preset": "smoke", "overrides": overrides})

    def finished(self, client: "SyncPrefectClient", run: "FlowRun") -> "FlowRun":
        """Return a run after it has ended, or as it is when that takes too long."""
        until(lambda: is_final(client.read_flow_run(run.id)), fail=False)
        return client.read_flow_run(run.id)

    def results(self) -> dict[str, int]:
        """Return the results of finished stages, and when each was written."""
        folder = self.folder / "home" / "results"
        return {path.name: path.stat().st_mtime_ns for path in folder.glob("*") if path.is_file()}


def is_final(run: "FlowRun") -> bool:
    """Return whether a run has ended."""
    return run.state is not None and run.state.is_final()


def until(condition: Callable[[], bool], fail: bool = True, longest: float = LONGEST) -> None:
    """Wait until a condition holds, at most `longest` seconds. Raises TimeoutError, unless `fail` is false."""
    deadline = time.monotonic() + longest
    while not condition():
        if time.monotonic() > deadline:
            if fail:
                raise TimeoutError(f"nothing happened within {longest:g} s")
            return
        time.sleep(0.3)


if __name__ == "__main__":
    sys.exit(main())
