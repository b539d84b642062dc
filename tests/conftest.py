"""What every test relies on: a home of its own, no account, and a Prefect server for those that ask for one."""

import os
import tempfile
from collections.abc import Iterator
from copy import deepcopy
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


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """A Prefect server with an empty database, which flows and tasks of this process use. Returns its address."""
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield str(PREFECT_API_URL.value())


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Any]:
    """Overrides that make a release of the smoke preset a matter of seconds, good enough for the gate, below tmp_path."""
    from benchmarks.common import TINY

    return deepcopy(TINY) | {"publish": {"name": "tiny", "folder": str(tmp_path / "releases")}}
