"""Uploads through Xet, the way that users take: they arrive, and its storage may refuse, break, be silent or be away."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub, loopback_hub
from small_releases import CONFIG, REPO, held, make_release, on_disk

from tinycats_core.errors import RegistryError
from tinycats_core.release import hub, hub_access

STEPS = ("xet-write-token", "/v1/xorbs", "/v1/shards")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with loopback_hub(monkeypatch, tmp_path / "huggingface", xet=True) as running:
        yield running


def test_a_release_arrives_through_xet_and_a_second_try_makes_no_second_commit(server: Hub, tmp_path: Path):
    big = "".join(f"{number} cats\n" for number in range(40_000))  # several chunks
    release = make_release(tmp_path, "111", **{"samples/grid.png": big})
    published = hub.publish_to_hub(release, CONFIG, None)
    assert all(any(step in line for line in server.requests) for step in STEPS)
    assert not any("/lfs/" in line for line in server.requests)
    assert held(server) == on_disk(release.folder)
    assert hub.publish_to_hub(release, CONFIG, None) == published
    assert len(server.commits[REPO]) == 2


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("status", "transient"), [(401, False), (403, False), (404, False), (500, True)])
def test_a_storage_that_refuses_is_named_with_its_status(server: Hub, tmp_path: Path, step: str, status: int, transient: bool):
    server.failures[step] = [status] * 20
    with pytest.raises(RegistryError, match=rf"publishing .* failed: HTTP {status} \(.*{step}") as caught:
        hub.publish_to_hub(make_release(tmp_path, "111"), CONFIG, None)
    assert hub.is_transient(caught.value) is transient
    assert "\n" not in str(caught.value)
    asked = 20 - len(server.failures[step])
    assert asked > 1 if transient else asked == 1
    assert held(server) == {}


@pytest.mark.parametrize("step", STEPS)
def test_a_silent_storage_is_given_up_after_the_stated_time(
    server: Hub, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hub_access, "XET_SECONDS", 0.3)
    server.silent.add(step)
    started = time.monotonic()
    with pytest.raises(RegistryError, match=r"has not taken the files within 0 s.*HF_HUB_DISABLE_XET=1") as caught:
        hub.publish_to_hub(make_release(tmp_path, "111"), CONFIG, None)
    assert not hub.is_transient(caught.value)
    assert time.monotonic() - started < 30
    assert held(server) == {}
    server.silent.clear()
    assert hub.publish_to_hub(make_release(tmp_path / "again", "111"), CONFIG, None).published  # in the same process


def test_a_storage_that_is_away_is_a_matter_of_the_network(server: Hub, tmp_path: Path):
    server.storage_url = "http://127.0.0.1:9"
    with pytest.raises(RegistryError, match=r"ConnectionError: .*Check the network") as caught:
        hub.publish_to_hub(make_release(tmp_path, "111"), CONFIG, None)
    assert hub.is_transient(caught.value)
    assert held(server) == {}
