import json
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, Hub, loopback_hub
from small_releases import CONFIG, REPO, held, make_release, on_disk

from tinycats_core.errors import RegistryError
from tinycats_core.records import ReleaseParts
from tinycats_core.release import bundle, hub, manifest

FINE_GRAINED = {"role": "fineGrained", "fineGrained": {"global": [], "scoped": []}}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with loopback_hub(monkeypatch, tmp_path / "huggingface") as running:
        yield running


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch):
    """The library's own retries wait for seconds."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def test_a_whole_release_goes_up_in_one_commit_and_comes_back_the_same(server: Hub, parts: dict[str, Any], tmp_path: Path):
    built = bundle.build(tmp_path / "registry", ReleaseParts(**parts))
    published = hub.publish_to_hub(built, CONFIG, None)
    (_, _), (commit, _) = server.commits[REPO]  # the creation of the repository, and one commit
    assert published == built.model_copy(update={"published": True, "location": f"{server.url}/{REPO}/tree/{commit}"})
    assert held(server) == on_disk(built.folder)
    found = hub.read_back(published, tmp_path / "back")
    assert on_disk(found.folder) == on_disk(built.folder)
    assert (found.version, found.sha256, found.location) == (built.version, built.sha256, published.location)
    assert found.folder == tmp_path / "back" / commit


def test_the_next_release_replaces_the_files_and_keeps_the_history(server: Hub, tmp_path: Path):
    first = hub.publish_to_hub(make_release(tmp_path, "111", **{"samples/old.png": "old"}), CONFIG, None)
    second = hub.publish_to_hub(make_release(tmp_path, "222"), CONFIG, "111")
    assert held(server) == on_disk(second.folder)
    assert ".gitattributes" in (server.files(REPO) or {})
    assert len(server.commits[REPO]) == 3
    assert hub.read_back(first, tmp_path / "back").version == "111"
    newest = hub.download_release(REPO, tmp_path / "back")
    assert newest is not None
    assert (newest.version, newest.published) == ("222", True)


def test_a_release_that_was_compared_with_another_is_not_published(server: Hub, tmp_path: Path):
    hub.publish_to_hub(make_release(tmp_path, "111"), CONFIG, None)
    second = make_release(tmp_path, "222")
    with pytest.raises(RegistryError, match="222 was compared with nothing, and meanwhile 111 was published") as caught:
        hub.publish_to_hub(second, CONFIG, None)
    assert not hub.is_transient(caught.value)
    assert len(server.commits[REPO]) == 2


def test_publishing_again_makes_no_second_commit(server: Hub, tmp_path: Path):
    release = make_release(tmp_path, "111")
    assert hub.publish_to_hub(release, CONFIG, None) == hub.publish_to_hub(release, CONFIG, None)
    assert len(server.commits[REPO]) == 2


def test_a_commit_is_downloaded_once_and_again_when_damaged(server: Hub, tmp_path: Path):
    hub.publish_to_hub(make_release(tmp_path, "111"), CONFIG, None)
    first = hub.download_release(REPO, tmp_path / "back")
    assert first is not None
    server.requests.clear()
    assert hub.download_release(REPO, tmp_path / "back") == first
    assert not any("/resolve/" in line for line in server.requests)
    (first.folder / "model.safetensors").write_text("damaged")
    assert hub.download_release(REPO, tmp_path / "back") == first
    manifest.verify(first.folder)
    assert [path.name for path in (tmp_path / "back").iterdir()] == [first.folder.name]


def test_nothing_published_is_none(server: Hub, tmp_path: Path):
    assert hub.download_release(REPO, tmp_path) is None
    server.commit(REPO, {"README.md": b"not a release"})
    assert hub.download_release(REPO, tmp_path) is None
    assert list(tmp_path.glob("*")) == []


def test_a_missing_revision_is_an_error(server: Hub, tmp_path: Path):
    hub.publish_to_hub(make_release(tmp_path, "111"), CONFIG, None)
    with pytest.raises(RegistryError, match=r"downloading .* failed: HTTP 404 .*no such repository or revision"):
        hub.download_release(REPO, tmp_path, "f" * 40)


def test_a_release_that_the_hub_holds_damaged_is_refused_and_not_kept(server: Hub, tmp_path: Path):
    published = hub.publish_to_hub(make_release(tmp_path, "111"), CONFIG, None)
    _, files = server.commits[REPO][-1]
    files |= {"model.safetensors": b"other", "extra.txt": b"?"}  # of which the second is its owner's business
    with pytest.raises(RegistryError, match=r"damaged: model.safetensors has changed[^;]*Publish it again"):
        hub.read_back(published, tmp_path / "back")
    assert list((tmp_path / "back").iterdir()) == []


def test_reading_back_finds_another_release(server: Hub, tmp_path: Path):
    published = hub.publish_to_hub(make_release(tmp_path, "111"), CONFIG, None)
    other = make_release(tmp_path, "222").model_copy(update={"location": published.location})
    with pytest.raises(RegistryError, match="does not hold the release 222"):
        hub.read_back(other, tmp_path / "back")


def test_a_damaged_release_is_not_sent(server: Hub, tmp_path: Path):
    release = make_release(tmp_path, "111")
    (release.folder / "model.safetensors").write_text("damaged")
    with pytest.raises(RegistryError, match="model.safetensors has changed"):
        hub.publish_to_hub(release, CONFIG, None)
    assert server.requests == []


def test_the_repository_follows_from_the_account_or_the_configuration(server: Hub):
    assert hub.check_credentials(CONFIG) == REPO
    assert hub.check_credentials(CONFIG.model_copy(update={"repo_id": "cats/tiny"})) == "cats/tiny"
    assert server.commits == {}


def test_no_token(server: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RegistryError, match="no Hugging Face token here. Set HF_TOKEN .*hf auth login.*publish.to to 'folder'"):
        hub.check_credentials(CONFIG)
    assert server.requests == []


def test_a_token_of_the_librarys_own_store_is_used(server: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_TOKEN")
    store = Path(os.environ["HF_HOME"])
    store.mkdir()
    (store / "token").write_text(TOKEN)
    assert hub.check_credentials(CONFIG) == REPO


def test_a_rejected_token_is_named_as_such_and_never_shown(server: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_somebody")
    with pytest.raises(RegistryError, match=r"HTTP 401.*The token is rejected: make a new one") as caught:
        hub.check_credentials(CONFIG)
    chain = [caught.value, caught.value.__cause__]
    assert not any("secret" in str(error) for error in chain)
    assert not hub.is_transient(caught.value)


@pytest.mark.parametrize(
    "token",
    [
        {"role": "read"},
        FINE_GRAINED,
        {"role": "fineGrained", "fineGrained": {"scoped": [{"entity": {"name": "someone"}, "permissions": ["repo.content.read"]}]}},
        {"role": "fineGrained", "fineGrained": {"scoped": [{"entity": {"name": "cats"}, "permissions": ["repo.write"]}]}},
    ],
)
def test_a_token_that_may_not_write_is_refused(server: Hub, token: dict[str, Any]):
    server.account["auth"] = {"accessToken": token}
    with pytest.raises(RegistryError, match=f"no write access to {REPO} .*{token['role']}.*Make one with write access"):
        hub.check_credentials(CONFIG)


@pytest.mark.parametrize("entity", ["someone", REPO])
def test_a_fine_grained_token_with_the_right_is_taken(server: Hub, entity: str):
    scoped = [{"entity": {"name": entity}, "permissions": ["repo.content.read", "repo.write"]}]
    server.account["auth"] = {"accessToken": {"role": "fineGrained", "fineGrained": {"scoped": scoped}}}
    assert hub.check_credentials(CONFIG) == REPO


def test_a_repository_of_somebody_else_is_refused(server: Hub):
    with pytest.raises(RegistryError, match=r"belongs to someone, which cannot write to strangers/… \(allowed: someone, cats\)"):
        hub.check_credentials(CONFIG.model_copy(update={"repo_id": "strangers/tiny"}))
    server.account["orgs"][0]["roleInOrg"] = "read"
    with pytest.raises(RegistryError, match="cannot write to cats/"):
        hub.check_credentials(CONFIG.model_copy(update={"repo_id": "cats/tiny"}))


def test_a_repository_that_refuses_is_a_clear_error_before_anything_is_sent(server: Hub, tmp_path: Path):
    server.commit(REPO, {".gitattributes": b""})
    server.readonly.add(REPO)
    for use in (hub.check_credentials, lambda config: hub.publish_to_hub(make_release(tmp_path, "111"), config, None)):
        with pytest.raises(RegistryError, match="HTTP 403.*The token has no write access there") as caught:
            use(CONFIG)
        assert not hub.is_transient(caught.value)
    assert not any("preupload" in line or "commit" in line for line in server.requests)


def test_no_network_is_named_as_such(server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for use in (lambda: hub.check_credentials(CONFIG), lambda: hub.download_release(REPO, tmp_path)):
        with pytest.raises(RegistryError, match=r"ConnectError.*Check the network to http://127.0.0.1:9") as caught:
            use()
        assert hub.is_transient(caught.value)


def test_offline_mode_is_named_as_such(server: Hub, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RegistryError, match="HF_HUB_OFFLINE is set. Unset it") as caught:
        hub.check_credentials(CONFIG)
    assert not hub.is_transient(caught.value)


def test_an_impossible_name_is_a_clear_error(server: Hub):
    with pytest.raises(RegistryError, match="Set publish.repo_id to 'owner/name'") as caught:
        hub.check_credentials(CONFIG.model_copy(update={"repo_id": "someone/a--b"}))
    assert not hub.is_transient(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("status", "transient"), [(500, True), (503, True), (429, True), (412, True), (400, False), (403, False)])
def test_what_is_worth_another_try(server: Hub, tmp_path: Path, status: int, transient: bool):
    server.failures["/commit/"] = [status]
    release = make_release(tmp_path, "111")
    with pytest.raises(RegistryError, match=f"publishing .* failed: HTTP {status}") as caught:
        hub.publish_to_hub(release, CONFIG, None)
    assert hub.is_transient(caught.value) is transient
    assert "\n" not in str(caught.value)
    assert len(server.commits[REPO]) == 1
    assert len(held(server)) == 0
    assert hub.publish_to_hub(release, CONFIG, None).published  # and the next try takes up where this one was left


def test_a_token_that_the_server_says_again_is_masked(server: Hub, tmp_path: Path):
    server.failures["/commit/"] = [400]
    with pytest.raises(RegistryError, match=r"as the test asked Bearer \*\*\*") as caught:
        hub.publish_to_hub(make_release(tmp_path, "111"), CONFIG, None)
    assert TOKEN not in "".join(traceback.format_exception(caught.value))


def test_a_busy_upload_is_worth_another_try(server: Hub, tmp_path: Path, impatient: None):
    server.failures["/lfs/"] = [503] * 6
    with pytest.raises(RegistryError) as caught:
        hub.publish_to_hub(make_release(tmp_path, "111"), CONFIG, None)
    assert hub.is_transient(caught.value)


def test_other_errors_are_not_worth_another_try():
    for error in (RegistryError("x"), ValueError("x"), FileNotFoundError("x"), KeyError("x")):
        assert not hub.is_transient(error)
    for error in (ConnectionResetError("x"), TimeoutError("x")):
        assert hub.is_transient(error)


def test_a_private_repository_is_asked_for(server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    hub.publish_to_hub(make_release(tmp_path, "111"), CONFIG.model_copy(update={"private": True}), None)
    assert server.created == [{"name": "tinycats-test", "organization": "someone", "visibility": "private"}]
    assert json.dumps(server.created).count("private") == 1
