"""The page of a release as a static Space, on a Hub on the loopback."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub, loopback_hub
from page_parts import small_runtime

from tinycats_core.config import PublishConfig
from tinycats_core.errors import RegistryError
from tinycats_core.records import Release
from tinycats_core.release import page, space

CONFIG = PublishConfig(name="tinycats", to="hub", space=True)
SPACE = "spaces/someone/tinycats"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with loopback_hub(monkeypatch, tmp_path / "hf") as server:
        yield server


@pytest.fixture
def with_page(built: Release, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Release:
    monkeypatch.setenv("TINYCATS_HOME", str(tmp_path / "home"))
    page.write(release, small_runtime(tmp_path, monkeypatch), built.name, built.version)
    return built.model_copy(update={"path": release / "release.json"})


def held(hub: Hub) -> dict[str, bytes]:
    found = dict(hub.files(SPACE) or {})
    found.pop(".gitattributes", None)
    return found


def test_the_space_holds_the_page_and_what_it_draws_with(hub: Hub, with_page: Release):
    assert space.check(CONFIG) == "someone/tinycats"
    address = space.publish(with_page, CONFIG)
    files = held(hub)
    assert address == f"{hub.url}/spaces/someone/tinycats"
    assert hub.created[-1]["sdk"] == "static"
    assert files["cats-int8.onnx"] == (with_page.folder / "cats-int8.onnx").read_bytes()
    assert {"index.html", "page.js", "page.css", "worker.js", "LICENSE", "README.md", "runtime/LICENSE"} <= files.keys()
    assert b'"address": "cats-int8.onnx"' in files["index.html"]
    assert b'href="/someone/tinycats">Model card' in files["index.html"]
    assert b"sdk: static" in files["README.md"]
    assert b"  - someone/tinycats" in files["README.md"]


def test_a_later_page_replaces_the_earlier_one_in_one_commit(hub: Hub, with_page: Release):
    space.publish(with_page, CONFIG)
    files, before = hub.files(SPACE), len(hub.commits[SPACE])
    assert files is not None
    hub.commit(SPACE, files | {"old.onnx": b"of an earlier version"})
    space.publish(with_page.model_copy(update={"version": "ffffffffffff"}), CONFIG)
    assert "old.onnx" not in held(hub)
    assert b"ffffffffffff" in held(hub)["tinycats-page.json"]
    assert len(hub.commits[SPACE]) == before + 2


def test_a_space_that_holds_something_else_stays_as_it_is(hub: Hub, with_page: Release):
    hub.commit(SPACE, {"app.py": b"mine", "README.md": b"mine"})
    for call in (lambda: space.check(CONFIG), lambda: space.publish(with_page, CONFIG)):
        with pytest.raises(RegistryError, match=r"holds files \(app\.py\) and no page of this project"):
            call()
    assert held(hub) == {"app.py": b"mine", "README.md": b"mine"}


def test_a_release_without_a_page_has_no_space(hub: Hub, built: Release):
    with pytest.raises(RegistryError, match=r"has no page with a runtime of its own.*'bundled'"):
        space.publish(built, CONFIG)
    assert SPACE not in hub.commits
