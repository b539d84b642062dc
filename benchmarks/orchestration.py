"""What Prefect adds to a release: the same stages with a server, and called one after the other without Prefect.

python -m benchmarks.orchestration

Each is a process of its own with an empty cache. Then the release is made again with the server: every stage is in the cache.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, TINY, command_line, report
from tinycats_core.errors import TinycatsError

BOUND_SECONDS, BOUND_SHARE, BOUND_SECOND_RUN = 10.0, 0.05, 5.0
DIRECTLY = """
import json, sys, time
started = time.monotonic()
import prefect, prefect.flow_engine, prefect.task_engine
imported = time.monotonic() - started  # what a program without Prefect would not import
prefect.Task.__call__ = lambda task, *args, **kwargs: task.fn(*args, **kwargs)
from flows.release_model import release_model
release_model.fn("smoke", json.loads(sys.argv[1]))
print(f"prefect was imported in {imported} s")
"""


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures. Returns the exit status: 0 if they are within the bounds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.orchestration", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny release")
    given = parser.parse_args(arguments)
    overrides: dict[str, Any] = TINY if given.quick else {}
    with tempfile.TemporaryDirectory(prefix="tinycats-") as scratch:
        folder = Path(scratch)
        took, output = timed([sys.executable, "-c", DIRECTLY], overrides, folder / "direct")
        direct = took - float(re.findall(r"prefect was imported in (\S+) s", output)[0])
        with_server, second, executed = through_a_server(overrides, folder / "server")
    overhead = with_server - direct
    figures = {
        "overhead_seconds": round(overhead, 1),
        "overhead_share": round(overhead / direct, 3),
        "second_run_seconds": round(second, 1),
        "stages_executed_second_run": executed,
        "direct_seconds": round(direct, 1),
        "with_server_seconds": round(with_server, 1),
        "bound_seconds": round(BOUND_SECONDS + BOUND_SHARE * direct, 1),
    }
    report("orchestration", figures, given)
    good = overhead <= BOUND_SECONDS + BOUND_SHARE * direct and second <= BOUND_SECOND_RUN and executed == 0
    return 0 if good else 1


def through_a_server(overrides: Mapping[str, Any], folder: Path) -> tuple[float, float, int]:
    """Return the seconds of a release with a server, those of the same again, and how many stages that executed."""
    from deployments.serve import start_server
    from flows.server import free_port

    url = f"http://127.0.0.1:{free_port()}/api"
    folder.mkdir()
    own = {"PREFECT_HOME": str(folder / "prefect"), "PREFECT_API_URL": url}
    server = start_server(url, {**os.environ, **own, "PREFECT_SERVER_ANALYTICS_ENABLED": "false"})
    try:
        command = [sys.executable, "-m", "flows.release_model", "--overrides"]
        first, _ = timed(command, overrides, folder, own)
        second, output = timed(command, overrides, folder, own)
    finally:
        server.kill()
    if "nothing to do: no stage executed" in output:
        return first, second, 0
    return first, second, int(re.findall(r"(\d+) stages? executed", output)[0])


def timed(
    command: list[str], overrides: Mapping[str, Any], folder: Path, own: Mapping[str, str] | None = None
) -> tuple[float, str]:
    """Run a release to its end, with a home and a registry below a folder. Returns its seconds and what it printed."""
    settings = {**overrides, "publish": {"name": "measured", "page": "none", "folder": str(folder / "releases")}}
    environment = {**os.environ, "TINYCATS_HOME": str(folder / "home"), **(own or {})}
    started = time.monotonic()
    done = subprocess.run(
        [*command, json.dumps(settings)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    took = time.monotonic() - started
    if done.returncode:
        raise TinycatsError(f"the release failed:\n{done.stdout[-1500:]}")
    return took, done.stdout


if __name__ == "__main__":
    sys.exit(main())
