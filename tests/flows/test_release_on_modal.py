"""A release that trains on Modal: a folder stands for it, the rest is what it always is."""

import logging
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from modal_server import Server, loopback_modal
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from pydantic import SecretStr

from deployments.fake_modal import FakeModal
from flows.release_model import release_model
from tasks.data import prepare_data
from tasks.training import train_classifier
from tinycats_core.compute import remote
from tinycats_core.compute.gpus import usd_per_second
from tinycats_core.config import ComputeConfig
from tinycats_core.errors import ComputeError, TinycatsError
from tinycats_core.files import home, read_json
from tinycats_core.presets import resolve
from tinycats_core.records import Release

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeModal]:
    """A Modal in a folder."""
    monkeypatch.setattr(remote, "ModalClient", partial(FakeModal, tmp_path / "modal"))
    made = FakeModal(tmp_path / "modal")
    yield made
    for call_id in made.calls():
        if made.processes(call_id):
            made.cancel(call_id)


@pytest.fixture
def on_modal(tiny: dict[str, Any]) -> dict[str, Any]:
    return {**tiny, "compute": {"where": "modal", "device": "cpu", "gpu": "T4", "poll_seconds": 0.1}}


def latest(overrides: dict[str, Any]) -> Path:
    return Path(overrides["publish"]["folder"]) / "tiny" / "latest"


@pytest.fixture
def untrained(tiny_release: Release, tmp_path: Path) -> Iterator[None]:
    """A cache from which the trainings of the tiny release are gone, and nothing else. They come back after the test."""
    folders = [home("training"), home("classifier")]
    results = [path for path in home("results").iterdir() if path.name.startswith("train_")]
    for path in (*folders, *results):
        shutil.move(path, tmp_path / path.name)
    yield
    for path in folders:
        shutil.rmtree(path, ignore_errors=True)
    for path in (*folders, *results):
        path.unlink(missing_ok=True)
        shutil.move(tmp_path / path.name, path)


def test_a_whole_release_trains_there_and_says_what_it_cost(
    fake: FakeModal, on_modal: dict[str, Any], untrained: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        release = release_model("smoke", on_modal)
    assert release.published
    assert latest(on_modal).resolve() == release.folder
    # The weights are those of the training here, bit for bit: whatever is made of them comes from the cache.
    ran = {record.getMessage().split(":")[0] for record in caplog.records if record.msg == "%s: done in %.1f s"}
    assert ran == {"train_classifier", "train_generator", "choose_sampling", "build_bundle"}  # it was watched here, not there
    assert (len(fake.calls("train_classifier")), len(fake.calls("train_generator")), len(fake.calls())) == (1, 1, 2)
    cost = read_json(release.folder / "training_cost.json")
    assert (cost["gpu"], cost["price"]["usd_per_hour"], cost["estimate"]["steps"]) == ("T4", 0.5904, 400)
    rate = usd_per_second(ComputeConfig(**on_modal["compute"]))
    assert cost["dollars"] == pytest.approx(cost["billed_seconds"] * rate)
    assert cost["billed_seconds"] > 0
    assert re.search(r"400 of 400 on Modal, \$0\.\d\d so far", caplog.text)
    with get_client(sync_client=True) as client:
        wanted = ArtifactFilter(key=ArtifactFilterKey(any_=["training-progress"]))
        progress = client.read_artifacts(artifact_filter=wanted)
    assert any(re.search(r"images/s  \$0\.\d\d so far", artifact.description or "") for artifact in progress)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [("revision", "0123456789ab", "deployed on Modal is 0123456789ab, .*run `modal deploy"), ("offline", "", "no route")],
)
def test_what_is_wrong_with_modal_is_known_before_any_stage(
    file: str, text: str, message: str, fake: FakeModal, on_modal: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    (fake.root / file).write_text(text)
    with caplog.at_level(logging.INFO), pytest.raises(Exception, match=message):
        release_model("smoke", on_modal)
    assert "done in" not in caplog.text
    assert not latest(on_modal).exists()


def test_a_training_that_costs_too_much_is_not_published(
    fake: FakeModal, on_modal: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A slow training of another test is no measure.
    monkeypatch.setattr("tinycats_core.compute.costs.MEASURED_SECONDS", float("inf"))
    on_modal["train"] |= {"seed": 12, "steps": 100_000, "sample_every": 100_000}
    on_modal["compute"]["max_cost_usd"] = 5 * (usd_per_second(ComputeConfig(**on_modal["compute"])) or 0)
    config = resolve("smoke", on_modal)
    train_classifier(prepare_data(config.data), config.classifier, ComputeConfig())  # found in the cache by the release
    with caplog.at_level(logging.INFO), pytest.raises(ComputeError, match=r"is spent and compute\.max_cost_usd is 0\.00"):
        release_model("smoke", on_modal)
    assert "the training may be stopped before it ends" in caplog.text
    assert len(fake.calls("train_generator")) == 1  # an end that no retry can mend
    assert not latest(on_modal).exists()


def test_an_estimate_above_the_limit_is_refused_before_any_stage(fake: FakeModal, on_modal: dict[str, Any]) -> None:
    on_modal["compute"] |= {"device": "auto", "max_cost_usd": 0.01}
    on_modal["train"] |= {"steps": 10_000_000}
    with pytest.raises(TinycatsError, match=r"compute\.max_cost_usd is 0\.01 but the training will cost \$"):
        release_model("smoke", on_modal)
    assert fake.calls() == []


# ---- credentials


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with loopback_modal(monkeypatch) as running:
        yield running


def test_a_token_may_lie_in_prefects_blocks(server: Server, on_modal: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import grpclib

    for name in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET"):
        monkeypatch.delenv(name)
    with pytest.raises(ComputeError, match="no Modal credentials"):
        release_model("smoke", on_modal)
    for name, value in (("modal-token-id", "ak-block"), ("modal-token-secret", "as-hidden")):
        cast(Any, Secret(value=SecretStr(value))).save(name, overwrite=True)
    server.answers["ClientHello"] = grpclib.Status.UNAUTHENTICATED
    with pytest.raises(ComputeError, match="Modal rejected the token from MODAL_TOKEN_ID and MODAL_TOKEN_SECRET") as caught:
        release_model("smoke", on_modal)
    assert "hidden" not in str(caught.value)
    for name in ("modal-token-id", "modal-token-secret"):
        cast(Any, Secret).delete(name)
