import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout

from tinycats_core.config import PublishConfig
from tinycats_core.errors import RegistryError
from tinycats_core.records import Release
from tinycats_core.release import bundle, manifest, registry

ROOT = Path(bundle.__file__).parents[2]


def make_release(folder: Path, version: str) -> Release:
    """A small sealed release; what else it holds makes no difference here."""
    place = registry.open_registry(folder) / "cats" / version
    place.mkdir(parents=True)
    (place / "model.safetensors").write_text(version)
    manifest.seal(place, "cats", version, f"key of {version}", {})
    return manifest.read_release(place)


@pytest.fixture
def config(tmp_path: Path) -> PublishConfig:
    return PublishConfig(name="cats", folder=tmp_path / "releases")


def test_publishing_points_latest_at_the_release_and_keeps_the_one_before(config: PublishConfig):
    assert registry.find_published(config) is None
    first, second = make_release(config.folder, "111"), make_release(config.folder, "222")
    assert registry.find_published(config) is None
    assert registry.publish_to_folder(first, None) == first.model_copy(update={"published": True})
    assert registry.find_published(config) == first.model_copy(update={"published": True})
    registry.publish_to_folder(second, "111")
    found = registry.find_published(config)
    assert found is not None
    assert (found.version, found.published, found.folder) == ("222", True, config.folder / "cats/222")
    assert found.location == str(config.folder / "cats/222")
    manifest.verify(first.folder)
    assert sorted(path.name for path in (config.folder / "cats").glob("[!.]*")) == ["111", "222", "history.jsonl", "latest"]


def test_latest_is_relative_so_that_a_registry_can_be_moved(config: PublishConfig):
    registry.publish_to_folder(make_release(config.folder, "111"), None)
    moved = config.folder.rename(config.folder.with_name("elsewhere"))
    assert (moved / "cats/latest").readlink() == Path("111")
    found = registry.find_published(config.model_copy(update={"folder": moved}))
    assert found is not None
    assert found.folder == moved / "cats/111"


def test_verify_reads_latest(config: PublishConfig):
    release = registry.publish_to_folder(make_release(config.folder, "111"), None)
    assert manifest.verify(config.folder / "cats/latest") == manifest.verify(release.folder) == manifest.verify(release.path)


def test_looking_makes_nothing(config: PublishConfig):
    assert registry.find_published(config) is None
    assert not config.folder.exists()


def test_opening_is_repeatable_and_takes_an_empty_folder(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "new/er"):
        assert registry.open_registry(folder) == registry.open_registry(folder) == folder
        assert [path.name for path in folder.iterdir()] == ["registry.json"]


def test_a_file_is_no_registry(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file/under"):
        with pytest.raises(RegistryError, match=r"publish.folder=.*file"):
            registry.open_registry(folder)
    with pytest.raises(RegistryError, match="is a file. Give a folder"):
        registry.find_published(PublishConfig(folder=tmp_path / "file"))


@pytest.mark.parametrize("marker", [None, "{}", "not JSON", '{"format": "another/1"}'])
def test_a_folder_of_other_things_is_no_registry_and_stays_as_it_is(marker: str | None, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    if marker is not None:
        (tmp_path / "registry.json").write_text(marker)
    before = sorted(tmp_path.iterdir())
    for use in (registry.open_registry, lambda folder: registry.find_published(PublishConfig(folder=folder))):
        with pytest.raises(RegistryError, match=r"thesis.tex\) and is not a registry .*Give an empty or a new folder"):
            use(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_a_place_that_cannot_be_written_is_named():
    with pytest.raises(RegistryError, match=r"publish.folder=/proc/releases cannot be used: cannot write to"):
        registry.open_registry(Path("/proc/releases"))


def test_a_dangling_latest_is_an_error_that_says_what_to_do(config: PublishConfig):
    release = registry.publish_to_folder(make_release(config.folder, "111"), None)
    shutil.rmtree(release.folder)
    with pytest.raises(RegistryError, match=r"latest names 111, which is not there. Restore it, or remove .*latest"):
        registry.find_published(config)


def test_a_latest_that_is_no_link_beside_is_an_error(config: PublishConfig, tmp_path: Path):
    release = make_release(config.folder, "111")
    latest = release.folder.with_name("latest")
    latest.symlink_to(tmp_path)
    with pytest.raises(RegistryError, match="is not a link to a version beside it"):
        registry.find_published(config)
    latest.unlink()
    latest.mkdir()
    with pytest.raises(RegistryError, match="is not a link to a version beside it"):
        registry.find_published(config)
    with pytest.raises(RegistryError, match="is not a link to a version beside it"):
        registry.publish_to_folder(release, None)
    assert sorted(path.name for path in release.folder.parent.glob("[!.]*")) == ["111", "latest"]


def test_a_damaged_release_is_neither_compared_with_nor_published(config: PublishConfig):
    first, second = make_release(config.folder, "111"), make_release(config.folder, "222")
    registry.publish_to_folder(first, None)
    (second.folder / "model.safetensors").write_text("111")
    with pytest.raises(RegistryError, match="model.safetensors has changed"):
        registry.publish_to_folder(second, "111")
    assert (config.folder / "cats/latest").readlink() == Path("111")
    (first.folder / "model.safetensors").unlink()
    with pytest.raises(RegistryError, match=r"published release .*111 is damaged: model.safetensors is missing.*remove .*latest"):
        registry.find_published(config)


def test_a_release_that_was_compared_with_another_is_not_published(config: PublishConfig):
    first, second, third = (make_release(config.folder, version) for version in ("111", "222", "333"))
    with pytest.raises(RegistryError, match="cats 222 was compared with 111, and meanwhile that was withdrawn"):
        registry.publish_to_folder(second, "111")
    registry.publish_to_folder(first, None)
    with pytest.raises(RegistryError, match="cats 222 was compared with nothing, and meanwhile 111 was published. Run the same"):
        registry.publish_to_folder(second, None)
    registry.publish_to_folder(second, "111")
    with pytest.raises(RegistryError, match="cats 333 was compared with 111, and meanwhile 222 was published"):
        registry.publish_to_folder(third, "111")
    assert registry.publish_to_folder(second, "111").published  # a second try, after a first one that nobody heard of
    assert (config.folder / "cats/latest").readlink() == Path("222")


PUBLISHER = """
import sys
from pathlib import Path
from tinycats_core.config import PublishConfig
from tinycats_core.errors import RegistryError
from tinycats_core.release import manifest, registry
folder = registry.open_registry(Path(sys.argv[1]))
for number in range(20):
    place = folder / "cats" / f"{sys.argv[2]}{number}"
    place.mkdir(parents=True)
    (place / "model.safetensors").write_text(place.name)
    manifest.seal(place, "cats", place.name, "key", {})
    while True:
        found = registry.find_published(PublishConfig(name="cats", folder=folder))
        before = found.version if found else None
        try:
            registry.publish_to_folder(manifest.read_release(place), before)
        except RegistryError as error:
            assert "meanwhile" in str(error), error
            continue
        print(before, place.name)
        break
"""


def test_of_two_publishers_each_replaces_what_it_has_seen(config: PublishConfig):
    commands = [[sys.executable, "-c", PUBLISHER, str(config.folder), name] for name in "ab"]
    running: list[Any] = [
        subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for line in commands
    ]
    said = [process.communicate() for process in running]
    assert [(process.returncode, errors) for process, (_, errors) in zip(running, said, strict=True)] == [(0, "")] * 2
    after = dict(line.split() for lines, _ in said for line in lines.splitlines())
    version, seen = "None", []
    while version in after:  # one chain: no release was replaced by two
        version = after[version]
        seen.append(version)
    assert len(seen) == len(set(seen)) == 40
    assert (config.folder / "cats/latest").readlink() == Path(version)
    manifest.verify(config.folder / "cats/latest")
    assert len(list((config.folder / "cats").glob("[!.]*"))) == 42


HOLDER = """
import sys, time
from pathlib import Path
from tinycats_core.release import registry
with registry._alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_publisher_leaves_no_lock(config: PublishConfig):
    release = make_release(config.folder, "111")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(release.folder.parent)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Timeout):
            FileLock(release.folder.parent / ".lock").acquire(timeout=0)
        holder.kill()
    assert registry.publish_to_folder(release, None).published


WHY = "the eyes are gone"


def published_twice(config: PublishConfig) -> tuple[Release, Release]:
    first, second = make_release(config.folder, "111"), make_release(config.folder, "222")
    registry.publish_to_folder(first, None)
    registry.publish_to_folder(second, "111")
    return first, second


def told(config: PublishConfig) -> list[tuple[str, str, str | None, str | None]]:
    return [(entry.version, entry.how, entry.why, entry.before) for entry in registry.read_history(config.folder, "cats")]


def test_a_rollback_publishes_the_old_bytes_again_and_is_recorded(config: PublishConfig):
    first, second = published_twice(config)
    before = manifest.verify(first.folder)
    assert registry.rollback(config.folder, "cats", "111", " the eyes\nare gone ") == first.model_copy(update={"published": True})
    found = registry.find_published(config)
    assert found is not None
    assert (found.version, manifest.verify(found.folder)) == ("111", before)
    manifest.verify(second.folder)
    assert told(config) == [("111", "release", None, None), ("222", "release", None, "111"), ("111", "rollback", WHY, "222")]
    assert all(entry.at.endswith("+00:00") for entry in registry.read_history(config.folder, "cats"))
    registry.publish_to_folder(second, "111")
    assert told(config)[3:] == [("222", "release", None, "111")]


def test_a_rollback_that_cannot_be_is_refused_and_changes_nothing(config: PublishConfig, tmp_path: Path):
    first, _ = published_twice(config)
    make_release(config.folder, "333")
    before = told(config)
    for name, version, why, message in (
        ("cats", "999", WHY, "cats has no version '999'; there are: 111, 222, 333"),
        ("cats", "../111", WHY, "cats has no version '../111'"),
        ("cats", "latest", WHY, "cats has no version 'latest'"),
        ("cats", "222", WHY, "222 is the published version already"),
        ("cats", "333", WHY, "333 was never published. Publish it with `tinycats promote .*333`"),
        ("cats", "111", " \t\n", "Say why in a few words"),
        ("dogs", "111", WHY, "holds no releases of 'dogs'"),
        ("../cats", "111", WHY, "holds no releases of '../cats'"),
    ):
        with pytest.raises(RegistryError, match=message):
            registry.rollback(config.folder, name, version, why)
    (first.folder / "model.safetensors").write_text("rotten")
    with pytest.raises(RegistryError, match="cats 111 is damaged: model.safetensors has changed"):
        registry.rollback(config.folder, "cats", "111", WHY)
    with pytest.raises(RegistryError, match="holds no releases of 'cats'"):
        registry.read_history(tmp_path / "nowhere", "cats")
    assert told(config) == before
    assert (config.folder / "cats/latest").readlink() == Path("222")


def test_a_registry_from_before_there_was_a_history_works(config: PublishConfig):
    published_twice(config)
    history = config.folder / "cats/history.jsonl"
    history.unlink()
    assert told(config) == [("222", "release", None, None)]
    registry.rollback(config.folder, "cats", "111", WHY)
    assert told(config) == [("222", "release", None, None), ("111", "rollback", WHY, "222")]
    (config.folder / "cats/latest").unlink()
    (config.folder / "cats/latest").symlink_to("333")  # by what keeps no record
    assert told(config)[2:] == [("333", "release", None, "111")]


def test_an_entry_whose_change_never_came_does_not_count(config: PublishConfig):
    published_twice(config)
    text = (config.folder / "cats/history.jsonl").read_text()
    registry.rollback(config.folder, "cats", "111", WHY)
    (config.folder / "cats/latest").unlink()
    (config.folder / "cats/latest").symlink_to("222")  # as if killed in between
    assert [entry[0] for entry in told(config)] == ["111", "222"]
    registry.rollback(config.folder, "cats", "111", "another reason")
    assert (config.folder / "cats/history.jsonl").read_text().startswith(text)
    assert told(config)[2:] == [("111", "rollback", "another reason", "222")]


def test_a_history_that_is_none_is_named(config: PublishConfig):
    published_twice(config)
    for text in ("[]\n", '{"version": 3}\n', "\0"):
        (config.folder / "cats/history.jsonl").write_text(text)
        with pytest.raises(RegistryError, match=r"line 1 of .*history.jsonl is no entry of a history. Restore it, or remove it"):
            registry.read_history(config.folder, "cats")


def test_a_plan_says_what_would_change_and_changes_nothing(config: PublishConfig):
    first, second = published_twice(config)
    before = {path: path.read_bytes() for path in (config.folder / "cats").glob("*.jsonl")}
    plan = registry.plan_in_folder(make_release(config.folder, "333"), "222")
    assert [(action, file) for action, file, _ in plan] == [
        ("replace", "history.jsonl"),
        ("replace", "latest"),
        ("keep", "333/model.safetensors"),
        ("keep", "333/release.json"),
    ]
    assert {path: path.read_bytes() for path in (config.folder / "cats").glob("*.jsonl")} == before
    registry.publish_to_folder(manifest.read_release(config.folder / "cats/333"), "222")
    assert dict(item[1:] for item in plan)["history.jsonl"] == (config.folder / "cats/history.jsonl").stat().st_size
    assert {change.action for change in registry.plan_in_folder(second.model_copy(update={"version": "333"}), "333")} == {"keep"}
    with pytest.raises(RegistryError, match="was compared with nothing, and meanwhile 333"):
        registry.plan_in_folder(first, None)
