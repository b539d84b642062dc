"""The tiny release, made once: what the flows are tried on is a copy of it, or taken from the cache that it filled."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import TINY
from tinycats_core.records import Release
from tinycats_core.release import inference, manifest


@contextmanager
def quick() -> Iterator[None]:
    """How fast a release draws is measured as it always is, but with as few repeats as are allowed."""
    with pytest.MonkeyPatch.context() as patch:
        few = "inference.MOST, inference.THROUGHPUT_SECONDS = inference.LEAST, 0.0; "
        patch.setattr(inference, "CHILD", inference.CHILD.replace("inference.answer()", f"{few}inference.answer()"))
        for limit in ("SPREAD", "BUSY"):  # however busy the machine is, it is measured once
            patch.setattr(inference, limit, float("inf"))
        yield


@pytest.fixture(autouse=True)
def quick_measurements() -> Iterator[None]:
    with quick():
        yield


@pytest.fixture(scope="session")
def tiny_release(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Release:
    """A published release of the `tiny` configuration, whose stages are all in the cache from then on. Not to be changed."""
    from flows.release_model import release_model

    with quick():
        return release_model(
            "smoke",
            deepcopy(TINY) | {"publish": {"name": "tiny", "page": "none", "folder": str(tmp_path_factory.mktemp("released"))}},
        )


@pytest.fixture
def released(tiny_release: Release, tiny: dict[str, Any]) -> Release:
    """The tiny release, published in the registry that `tiny` names. A test may spoil it."""
    registry = tiny_release.folder.parents[1]
    copy = Path(shutil.copytree(registry, tiny["publish"]["folder"], symlinks=True))
    return manifest.read_release(copy / "tiny" / "latest").model_copy(update={"published": True})
