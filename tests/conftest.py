"""What every test relies on: a home of its own, no account, and a Prefect server for those that ask for one.

The tests run in several processes, a file in one of them. Those that need a Prefect server run in the same one: they share
the server, and the cache in the home, where the tiny release lies that most of them begin with. They come first, because
together they take longest.
"""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

ACCOUNTS = ("HF_", "HUGGING_FACE_", "MODAL_", "PREFECT_", "TINYCATS_")

KEPT = "TINYCATS_INCEPTION_WEIGHTS"  # a file, for the tests that need the real ones

_scratch = tempfile.TemporaryDirectory(prefix="tinycats-tests-")
for _name in [name for name in os.environ if name.startswith(ACCOUNTS) and name != KEPT]:
    del os.environ[_name]
os.environ |= {
    "TINYCATS_HOME": f"{_scratch.name}/home",
    "HF_HOME": f"{_scratch.name}/huggingface",
    "MODAL_CONFIG_PATH": f"{_scratch.name}/modal.toml",
    "PREFECT_HOME": f"{_scratch.name}/prefect",
    "PREFECT_RESULTS_LOCAL_STORAGE_PATH": f"{_scratch.name}/results",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "DO_NOT_TRACK": "1",
}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # networks this small gain nothing from a second one, which waits by spinning


def needs_server(path: str) -> bool:
    """Return whether a test, by its path or id, belongs to those that share a Prefect server."""
    parts = path.partition("::")[0].split("/")
    return ("flows" in parts and parts[-1] != "test_serve.py") or "tasks" in parts  # `make serve` starts its own


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not needs_server(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return how many processes test: one more than there are cores, for a third of the time a test waits for others."""
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "with a Prefect server" if needs_server(nodeid) else super()._split_scope(nodeid)

    if config.getoption("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False  # the order is that of the collection
    return Scheduling(config, log)


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """A Prefect server with an empty database, which flows and tasks of this process use. Returns its address."""
    from prefect import settings
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.testing.utilities import prefect_test_harness

    # No test asks this server for events or for runs of tasks, whose keeping takes most of its time. That of test_serve.py
    # keeps them.
    unused: dict[Any, Any] = {
        settings.PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED: False,
        settings.PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_ENABLED: False,
        settings.PREFECT_EVENTS_PROACTIVE_GRANULARITY: timedelta(seconds=1),  # how often it looks for heartbeats that are late
    }
    with settings.temporary_settings(unused), prefect_test_harness(server_startup_timeout=120):
        server = SubprocessASGIServer().server_process  # that of the harness
        assert server
        # However this process ends, its end of the pipe closes, and the server ends with it: a worker of pytest-xdist is
        # killed, without a chance to stop what it started, when its controller is interrupted.
        watch = ["sh", "-c", 'trap "" INT; read -r _; kill "$1" 2>/dev/null', "sh", str(server.pid)]
        with subprocess.Popen(watch, stdin=subprocess.PIPE):
            yield str(settings.PREFECT_API_URL.value())


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Any]:
    """Overrides that make a release of the smoke preset a matter of seconds, good enough for the gate, below tmp_path."""
    from benchmarks.common import TINY

    return deepcopy(TINY) | {"publish": {"name": "tiny", "page": "none", "folder": str(tmp_path / "releases")}}
