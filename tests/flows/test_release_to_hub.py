"""A release to a Hub on the loopback: published in one commit, found again, evaluated from there; outages and refusals."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, Hub, loopback_hub
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL

from flows.nightly_eval import nightly_eval
from flows.release_model import release_model
from tasks.publishing import publish
from tinycats_core.errors import RegistryError
from tinycats_core.files import home

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with loopback_hub(monkeypatch, tmp_path / "huggingface") as hub:
        yield hub


@pytest.fixture
def for_the_hub(tiny: dict[str, Any]) -> dict[str, Any]:
    return {**tiny, "publish": {**tiny["publish"], "to": "hub"}}


def commits(hub: Hub) -> int:
    """Return how many releases the repository has seen; the first commit made the repository."""
    return len(hub.commits.get("someone/tiny", [None])) - 1


def test_a_release_is_published_found_again_and_evaluated_from_there(
    hub: Hub, for_the_hub: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    release = release_model("smoke", for_the_hub)
    assert release.location.startswith(f"{hub.url}/someone/tiny/tree/")
    assert commits(hub) == 1
    again = release_model("smoke", for_the_hub)
    assert (again.version, commits(hub)) == (release.version, 1)
    assert "no stage executed" in capsys.readouterr().out
    assert nightly_eval("hub:someone/tiny").promoted


def test_an_outage_is_waited_for(hub: Hub, for_the_hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "retry_delay_seconds", [0.1])
    hub.failures["/commit/"] = [503]
    release_model("smoke", for_the_hub)
    assert (commits(hub), hub.failures["/commit/"]) == (1, [])


def test_a_refusal_is_not_asked_again(hub: Hub, for_the_hub: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    hub.failures["/commit/"] = [403, 403]
    with caplog.at_level(logging.INFO), pytest.raises(RegistryError, match="HTTP 403"):
        release_model("smoke", for_the_hub)
    assert (commits(hub), hub.failures["/commit/"]) == (0, [403])


def test_a_rejected_token_ends_the_run_before_any_stage(
    hub: Hub, for_the_hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with caplog.at_level(logging.INFO), pytest.raises(RegistryError, match="The token is rejected"):
        release_model("smoke", for_the_hub)
    assert "done in" not in caplog.text
    assert "from the cache" not in caplog.text


def test_a_token_that_the_server_says_again_is_nowhere_afterwards(
    hub: Hub, for_the_hub: dict[str, Any], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("prefect", "prefect.flow_runs", "prefect.task_runs", "huggingface_hub", "httpx", "httpx2", "httpcore", "tinycats"):
        caplog.set_level(logging.DEBUG, logger=name)
    caplog.set_level(logging.DEBUG)
    hub.failures["/commit/"] = [400]  # with the token in its answer
    with pytest.raises(RegistryError, match=r"as the test asked Bearer \*\*\*"):
        release_model("smoke", for_the_hub)
    logging.getLogger("huggingface_hub").debug("a library logs %s", {"Authorization": f"Bearer {TOKEN}"})
    try:
        raise ValueError(f"a library's error {TOKEN}")
    except ValueError:
        logging.getLogger("huggingface_hub").exception("failed")
    release = release_model("smoke", for_the_hub)
    database = Path(str(PREFECT_API_DATABASE_CONNECTION_URL.value()).partition("///")[2])
    output, error = capfd.readouterr()
    held = {"output": output + error + caplog.text}
    for place in (database.parent, home(), release.folder.parents[1]):
        held |= {str(path): path.read_bytes().decode("latin-1") for path in place.rglob("*") if path.is_file()}
    assert "as the test asked Bearer ***" in held[str(database)] + held.get(f"{database}-wal", "")
    assert "a library logs {'Authorization': 'Bearer ***'}" in caplog.text
    assert "a library's error ***" in caplog.text
    assert [place for place, text in held.items() if TOKEN in text] == []
