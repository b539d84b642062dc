"""What is shown must be JSON that Prefect's pages can display: no NumPy, no NaN, no picture that is too large."""

import base64
import io
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from tasks import show


def shown(key: str):
    with get_client(sync_client=True) as client:
        return client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))


def test_a_table_holds_plain_numbers_and_empty_places(prefect_server: str) -> None:
    @flow
    def page() -> None:
        frame = pd.DataFrame({"name": ["a", "b"], "value": [np.float32(0.5), np.nan], "count": [np.int64(3), None]})
        show.table("test-table", frame, "A table")

    page()
    (artifact,) = shown("test-table")
    assert json.loads(str(artifact.data)) == [
        {"name": "a", "value": 0.5, "count": 3.0},
        {"name": "b", "value": None, "count": None},
    ]


def test_progress_moves_one_bar_and_never_leaves_its_ends(prefect_server: str) -> None:
    @flow
    def page() -> None:
        move = show.progress("test-progress", "Working")
        for fraction in (-1.0, 0.2, 0.201, 0.4, 2.0):
            move(fraction, f"{fraction}")

    page()
    (artifact,) = shown("test-progress")
    assert (artifact.data, artifact.description) == (100.0, "Working: 2.0")


def test_metrics_stand_side_by_side_and_an_unmeasured_set_is_left_out() -> None:
    frame = show.metrics_frame({"candidate": {"kid": 0.1, "is": None}, "published": None, "floor": {"kid": 0.0, "is": 1.0}})
    assert list(frame.columns) == ["metric", "candidate", "floor"]
    assert frame.set_index("metric").loc["kid"].to_dict() == {"candidate": 0.1, "floor": 0.0}


def test_a_picture_is_made_smaller_until_it_fits() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    uri = show.data_uri(Image.fromarray(noise))
    assert len(uri) <= show.LARGEST_PICTURE
    picture = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/webp;base64,"))))
    assert picture.width / picture.height == pytest.approx(800 / 600, rel=0.02)
    assert picture.width > 200


def test_outside_a_run_nothing_is_shown() -> None:
    show.table("nowhere", pd.DataFrame({"a": [1]}), "No page")
    show.picture("nowhere", Image.new("RGB", (1, 1)), "No page")
    show.progress("nowhere", "No page")(0.5, "half")
