"""What belongs to the owner of a repository on the Hub stays; versions have tags, a history, and can be published again."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub, loopback_hub
from small_releases import CONFIG, REPO, held, make_release, on_disk

from flows import cli
from tinycats_core.errors import RegistryError
from tinycats_core.records import Release
from tinycats_core.release import hub, manifest
from tinycats_core.release.plan import plan_lines

MINE = {"notes.md": b"mine", "samples/favourite.png": b"mine too"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with loopback_hub(monkeypatch, tmp_path / "huggingface") as running:
        yield running


@pytest.fixture
def first(server: Hub, tmp_path: Path) -> Release:
    """A published release in a repository to which its owner has added files."""
    release = hub.publish_to_hub(make_release(tmp_path, "111", **{"samples/old.png": "old"}), CONFIG, None)
    server.commit(REPO, {**(server.files(REPO) or {}), **MINE}, "my own files")
    return release


def test_what_the_owner_added_stays_and_does_no_harm(server: Hub, first: Release, tmp_path: Path):
    second = hub.publish_to_hub(make_release(tmp_path, "222"), CONFIG, "111")
    assert held(server) == {**on_disk(second.folder), **MINE}
    found = hub.download_release(REPO, tmp_path / "back")
    assert found is not None
    assert on_disk(found.folder) == on_disk(second.folder)
    (found.folder / "notes.md").write_text("in a release folder it counts as damage")
    with pytest.raises(RegistryError, match=r"notes.md is not part of the release"):
        manifest.verify(found.folder)


def test_a_signature_goes_with_its_release(server: Hub, tmp_path: Path):
    first, second = make_release(tmp_path, "111"), make_release(tmp_path, "222")
    (first.folder / "model.sig").write_text("signed")
    published = hub.publish_to_hub(first, CONFIG, None)
    assert held(server)["model.sig"] == b"signed"
    assert on_disk(hub.read_back(published, tmp_path / "back").folder) == on_disk(first.folder)
    hub.publish_to_hub(second, CONFIG, "111")
    assert held(server) == on_disk(second.folder)


def test_a_file_of_the_owner_is_not_overwritten(server: Hub, first: Release, tmp_path: Path):
    release, before = make_release(tmp_path, "222", **{"notes.md": "ours"}), held(server)
    for use in (hub.publish_to_hub, hub.plan_on_hub):
        with pytest.raises(RegistryError, match=rf"{REPO} holds files of its owner .* overwrite: notes.md. Rename or remove"):
            use(release, CONFIG, "111")
    assert held(server) == before


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"thesis.tex": b"years", "a.bin": b"", "b": b"", "c\x1b\n": b""},
            r"holds files \(a.bin, b, c\\x1b\\n, thesis.tex\) and no release",
        ),
        ({"README.md": b"---\nlicense: mit\n---\n# My own model"}, r"holds files \(README.md\) and no release"),
        ({"release.json": b'{"version": "of another program"}'}, "holds a release.json that is not of this project"),
        ({"release.json": b"not JSON", "README.md": b""}, "holds a release.json that is not of this project"),
    ],
)
def test_a_repository_of_other_things_is_refused_and_stays(server: Hub, tmp_path: Path, files: dict[str, bytes], message: str):
    server.commit(REPO, {".gitattributes": b"", **files})
    release = make_release(tmp_path, "111")
    for use in (hub.publish_to_hub, hub.plan_on_hub):
        with pytest.raises(RegistryError, match=message) as caught:
            use(release, CONFIG, None)
        assert not hub.is_transient(caught.value)
    assert len(server.commits[REPO]) == 1


@pytest.mark.parametrize("card", [None, b"", b"---\nlicense: mit\n---\n"])
def test_a_repository_with_what_the_hub_itself_writes_is_used(server: Hub, tmp_path: Path, card: bytes | None):
    server.commit(REPO, {".gitattributes": b"", **({} if card is None else {"README.md": card})})
    release = hub.publish_to_hub(make_release(tmp_path, "111"), CONFIG, None)
    assert held(server) == on_disk(release.folder)


def test_each_version_has_a_tag_also_after_an_interruption(server: Hub, first: Release, tmp_path: Path):
    server.failures["/tag/"] = [503]
    second = make_release(tmp_path, "222")
    with pytest.raises(RegistryError, match="tagging .* with 222 failed: HTTP 503") as caught:
        hub.publish_to_hub(second, CONFIG, "111")
    assert hub.is_transient(caught.value)
    assert server.tags[REPO].keys() == {"111"}
    found = hub.find_published(CONFIG, tmp_path / "back")  # what the next run begins with
    assert found is not None
    assert found.version == "222"
    assert server.tags[REPO] == {"111": server.commits[REPO][1][0], "222": server.commits[REPO][-1][0]}
    tagged = hub.download_release(REPO, tmp_path / "back", "111")
    assert tagged is not None
    assert tagged.version == "111"


def test_a_plan_says_what_would_change_and_changes_nothing(server: Hub, first: Release, tmp_path: Path):
    before, commits = held(server), len(server.commits[REPO])
    plan = hub.plan_on_hub(make_release(tmp_path, "222", new="."), CONFIG, "111")
    assert [change[:2] for change in plan] == [
        ("add", "new"),
        ("replace", "model.safetensors"),
        ("replace", "release.json"),
        ("delete", "samples/old.png"),
        ("keep", ".gitattributes"),
        ("keep", "README.md"),
        ("keep", "notes.md"),
        ("keep", "samples/favourite.png"),
    ]
    assert {file: size for _, file, size in plan}["model.safetensors"] == len("weights 222")
    *lines, last = plan_lines(plan)
    assert "delete 3 samples/old.png" in [" ".join(line.split()) for line in lines]
    assert last.startswith("add 1, replace 2, delete 1, keep 4; ")
    assert (held(server), len(server.commits[REPO])) == (before, commits)
    plan = hub.plan_on_hub(make_release(tmp_path / "x", "1"), CONFIG.model_copy(update={"repo_id": "someone/new"}), None)
    assert {change.action for change in plan} == {"add"}
    assert "someone/new" not in server.commits
    with pytest.raises(RegistryError, match="was compared with nothing, and meanwhile 111 was published"):
        hub.plan_on_hub(make_release(tmp_path, "333"), CONFIG, None)


def test_a_rollback_restores_every_byte_in_one_commit_and_is_recorded(server: Hub, first: Release, tmp_path: Path):
    forced = {"decision.json": '{"promoted": false, "terms": [], "baseline": "111", "forced": "they wait"}'}
    hub.publish_to_hub(make_release(tmp_path, "222", **forced), CONFIG, "111")
    commits = len(server.commits[REPO])
    back = hub.rollback(REPO, CONFIG.name, "111", " the eyes\nare gone ", tmp_path / "back")
    assert (back.version, back.published, back.location.rsplit("/", 1)[1]) == ("111", True, server.commits[REPO][-1][0])
    assert held(server) == {**on_disk(first.folder), **MINE}
    assert len(server.commits[REPO]) == commits + 1
    found = hub.find_published(CONFIG, tmp_path / "back")
    assert found is not None
    assert found.version == "111"
    entries = hub.read_history(REPO, CONFIG.name)
    assert [(entry.version, entry.how, entry.why, entry.before) for entry in entries] == [
        ("111", "release", None, None),
        ("222", "forced", "they wait", "111"),
        ("111", "rollback", "the eyes are gone", "222"),
    ]


def test_a_version_without_a_tag_is_found_by_its_commit(server: Hub, first: Release, tmp_path: Path):
    hub.publish_to_hub(make_release(tmp_path, "222"), CONFIG, "111")
    server.tags.clear()
    assert hub.rollback(REPO, CONFIG.name, "111", "why", tmp_path / "back").version == "111"


def test_the_commands_take_a_repository(
    server: Hub, first: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("TINYCATS_HOME", str(tmp_path / "home"))
    second = make_release(tmp_path, "222", **{"decision.json": '{"promoted": true, "terms": [], "baseline": "111"}'})
    on_hub = ["--hub", REPO]
    assert cli.main(["promote", str(second.folder), *on_hub, "--dry-run"]) == 0
    assert "keep" in capsys.readouterr().out
    assert cli.main(["promote", str(second.folder), *on_hub]) == 0
    assert cli.main(["rollback", CONFIG.name, "--to", "111", "--why", "it was better", *on_hub]) == 0
    assert f"tinycats-test 111 is published: {server.url}/{REPO}/tree/" in capsys.readouterr().out
    assert cli.main(["history", CONFIG.name, *on_hub]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[1:] == ["rollback", "111", "222", "it", "was", "better"]


def test_a_rollback_that_cannot_be_is_refused(server: Hub, first: Release, tmp_path: Path):
    hub.publish_to_hub(make_release(tmp_path, "222"), CONFIG, "111")
    before = len(server.commits[REPO])
    for version, why, message in (
        ("333", "why", r"has no version '333' of tinycats-test; there are: 111, 222"),
        ("222", "why", "222 is the published version already"),
        ("111", " \n ", "Say why in a few words"),
        ("111", "y" * 501, "has 501 characters; at most 500"),
    ):
        with pytest.raises(RegistryError, match=message):
            hub.rollback(REPO, CONFIG.name, version, why, tmp_path / "back")
    with pytest.raises(RegistryError, match="holds no release another 111"):
        hub.rollback(REPO, "another", "111", "why", tmp_path / "back")
    _, files = server.commits[REPO][1]
    files["model.safetensors"] = b"rotten"
    with pytest.raises(RegistryError, match="damaged: model.safetensors has changed"):
        hub.rollback(REPO, CONFIG.name, "111", "why", tmp_path / "elsewhere")
    assert len(server.commits[REPO]) == before
