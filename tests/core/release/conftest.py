"""A release made once for all tests of this folder."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tinycats_core.records import Release, ReleaseParts
from tinycats_core.release import bundle


@pytest.fixture(scope="session")
def built(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Release:
    return bundle.build(tmp_path_factory.mktemp("registry"), ReleaseParts(**parts))


@pytest.fixture
def release(built: Release, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(built.folder, tmp_path / "release"))
