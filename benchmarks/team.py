"""Fifty evaluations at once on a Prefect server with PostgreSQL, whose server is killed while they run.

python -m benchmarks.team --runs 50

The database is one of Debian's packages (apt-get install postgresql), with a folder, a port and no password of its own.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import command_line, positive, report
from benchmarks.operations import Site, is_final, until
from tinycats_core.errors import TinycatsError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

PROGRAMS = "/usr/lib/postgresql"
LONGEST = 1800.0  # seconds for all runs


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures. Returns the exit status: 0 if no run failed and the schedules are on."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.team", description=__doc__)
    parser.add_argument("--runs", type=positive, default=50, help="evaluations at once (default: 50)")
    parser.add_argument("--quick", action="store_true", help="four evaluations")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="tinycats-") as scratch, database() as url:
        site = Site(Path(scratch), {"PREFECT_SERVER_DATABASE_CONNECTION_URL": url})
        try:
            site.start()
            with site.client() as client:
                figures = evaluate_at_once(site, client, 4 if given.quick else given.runs)
        finally:
            left = site.stop()
    report("team", figures | {"zombies": left}, given)
    return 0 if figures["errors"] == left == 0 and figures["schedules_on"] else 1


def evaluate_at_once(site: Site, client: "SyncPrefectClient", count: int) -> dict[str, Any]:
    """Make a release, submit `count` evaluations of it at once, and kill the server when a third of them are done."""
    released = site.finished(client, site.submit(client, 0))
    if released.state_name != "Completed":
        raise TinycatsError(f"the release that is to be evaluated is {released.state_name}")
    started = time.monotonic()
    runs = submit(site, client, count)
    until(lambda: sum(map(is_final, states(client, runs))) >= count // 3, longest=LONGEST)
    site.kill("server", None)
    killed = time.monotonic()
    until(site.answers)
    away = time.monotonic() - killed
    until(lambda: all(map(is_final, states(client, runs))), fail=False, longest=LONGEST)
    ended = states(client, runs)
    return {
        "runs": count,
        "errors": sum(run.state_name != "Completed" for run in ended),
        "seconds": round(time.monotonic() - started, 1),
        "runs_at_once": client.read_work_pool("local").concurrency_limit,
        "server_kills": 1,
        "seconds_without_server": round(away, 1),
        "schedules_on": schedules_are_on(client),
        "states": sorted({str(run.state_name) for run in ended}),
    }


def submit(site: Site, client: "SyncPrefectClient", count: int) -> list["FlowRun"]:
    """Submit evaluations of the release, each with a seed of its own, so that none finds its figures in the cache."""
    deployment = client.read_deployment_by_name("evaluate-model/published").id
    release = str(site.folder / "releases0" / "small" / "latest")
    return [
        client.create_flow_run_from_deployment(
            deployment, parameters={"release": release, "overrides": {"evaluate": {"seed": number}}}
        )
        for number in range(count)
    ]


def states(client: "SyncPrefectClient", runs: list["FlowRun"]) -> list["FlowRun"]:
    """Return runs as the server has them now."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    return client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id for run in runs])))


def schedules_are_on(client: "SyncPrefectClient") -> bool:
    """Return whether the nightly schedule is active, and the server has runs for it in the time to come."""
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterId,
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateName,
    )

    nightly = client.read_deployment_by_name("nightly-eval/nightly")
    to_come = client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[nightly.id])),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(name=FlowRunFilterStateName(any_=["Scheduled"]))),
    )
    return bool(to_come) and all(schedule.active for schedule in nightly.schedules)


@contextmanager
def database() -> Iterator[str]:
    """Yield the URL of an empty PostgreSQL database on this machine, as Prefect takes it. Raises TinycatsError."""
    from flows.server import free_port

    found = sorted(Path(PROGRAMS).glob("*/bin/initdb"))
    if not found:
        raise TinycatsError(f"no PostgreSQL in {PROGRAMS}; install it: apt-get install postgresql")
    programs, port = found[-1].parent, free_port()
    as_owner = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []  # it does not run as root
    with tempfile.TemporaryDirectory(prefix="tinycats-postgres-") as folder:
        if as_owner:
            shutil.chown(folder, "postgres")
        run([*as_owner, f"{programs}/initdb", "-D", f"{folder}/data", "-U", "prefect", "--auth=trust"], folder)
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
        control = [*as_owner, f"{programs}/pg_ctl", "-D", f"{folder}/data", "-w"]
        run([*control, "-o", options, "-l", f"{folder}/log", "start"], folder)
        try:
            run([*as_owner, f"{programs}/createdb", "-h", folder, "-p", str(port), "-U", "prefect", "prefect"], folder)
            yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/prefect"
        finally:
            run([*control, "-m", "fast", "stop"], folder)


def run(command: list[str], folder: str) -> None:
    """Run a command of PostgreSQL to its end. Raises TinycatsError."""
    with open(Path(folder) / "commands", "a+") as output:  # a pipe would stay open as long as the database runs
        done = subprocess.run(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        output.seek(0)
        if done.returncode:
            raise TinycatsError(f"{' '.join(command)} failed: {output.read()[-500:].strip()}")


if __name__ == "__main__":
    sys.exit(main())
