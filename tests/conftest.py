"""What every test relies on: a home of its own, no account, and a Prefect server for those that ask for one."""

import os
import tempfile
from collections.abc import Iterator
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
    return {
        "data": {"image_size": 16, "toy_train_per_class": 16, "toy_val_per_class": 4, "toy_test_per_class": 8},
        "model": {"image_size": 16, "patch_size": 4, "width": 64, "depth": 2, "heads": 2},
        "train": {
            "steps": 400,
            "batch_size": 32,
            "warmup_steps": 10,
            "lr": 4e-3,
            "ema_decays": [0.98, 0.9],
            "checkpoint_every": 200,
            "sample_every": 400,
            "log_every": 50,
        },
        "classifier": {"epochs": 3, "batch_size": 32},
        "sample": {"guidance": [1.0, 1.5], "sweep_images": 52},
        "evaluate": {"samples": 104, "kid_subsets": 10},
        "publish": {"name": "tiny", "folder": str(tmp_path / "releases")},
    }
