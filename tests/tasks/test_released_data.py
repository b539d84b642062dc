"""The data of a finished release: its folder is found again or asked for, and compared with what the release was made from."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.data import compare_data, locate_data
from tasks.preflight import check_judgeable
from tinycats_core.config import ReleaseConfig
from tinycats_core.data import preparation
from tinycats_core.errors import ConfigError, DataError, EvaluationError
from tinycats_core.files import home, write_json
from tinycats_core.presets import resolve
from tinycats_core.records import Dataset, Release
from tinycats_core.release import manifest, shipped


def fill(root: Path, *classes: str) -> Path:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(4):
            coarse = np.random.default_rng(100 * number + index).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((32, 32)).save(root / name / f"{index}.png")
    return root


def prepared(root: Path) -> Dataset:
    return preparation.prepare(resolve("photos", {"data": {"folder": str(root)}}).data, home("data"))


@pytest.fixture
def cats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TINYCATS_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return fill(tmp_path / "photos" / "cats", "luna", "milo")


@pytest.fixture
def release(cats: Path, tmp_path: Path) -> Release:
    """A release as far as its data go: the facts that it holds about them."""
    dataset, folder = prepared(cats), tmp_path / "release"
    config = resolve("photos", {"data": {"folder": "cats"}}).model_dump(mode="json")
    write_json(folder / "config.json", config | {"data": config["data"] | {"folder": "cats"}})  # as in earlier releases
    write_json(folder / "data.json", dataset.model_dump(mode="json", exclude={"path"}))
    manifest.seal(folder, "cats", "1", "key", {"dataset": {"sha256": dataset.sha256, "content": dataset.content}})
    return manifest.read_release(folder)


def config_of(release: Release, folder: Path | str = "cats") -> ReleaseConfig:
    return resolve("photos", {"data": {"folder": str(folder)}})


def test_the_folder_of_a_release_is_found_where_its_photos_were_prepared(release: Release, cats: Path) -> None:
    assert locate_data(release, config_of(release)).data.folder == cats
    given = config_of(release, cats.parent)
    assert locate_data(release, given) is given
    smoke = resolve("smoke")
    assert locate_data(release, smoke) is smoke


def test_a_folder_that_is_not_found_is_asked_for_by_the_name_of_the_setting(release: Release, cats: Path, tmp_path: Path) -> None:
    cats.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"data\.folder is needed: the photos of cats 1 lay in a folder named 'cats'"):
        locate_data(release, config_of(release))
    shutil.copytree(tmp_path / "moved", tmp_path / "cats")  # below the present folder
    assert locate_data(release, config_of(release)).data.folder == tmp_path / "cats"


def test_the_boxes_of_a_release_are_found_with_its_photos(cats: Path, tmp_path: Path) -> None:
    boxes, folder = tmp_path / "notes" / "boxes.csv", tmp_path / "release"
    boxes.parent.mkdir()
    boxes.write_text("file,left,top,right,bottom\nluna/0.png,0,0,9,9\n")
    data = {"crop": "subject", "image_size": 32}
    dataset = preparation.prepare(
        resolve("photos", {"data": {**data, "folder": str(cats), "boxes": str(boxes)}}).data, home("data")
    )
    config = resolve("photos", {"data": {**data, "folder": "cats", "boxes": "boxes.csv"}})
    kept = config.model_dump(mode="json")
    kept["data"] |= {"folder": "cats", "boxes": "boxes.csv"}
    write_json(folder / "config.json", kept)
    manifest.seal(folder, "cats", "1", "key", {"dataset": {"sha256": dataset.sha256, "content": dataset.content}})
    found = locate_data(manifest.read_release(folder), config).data
    assert (found.folder, found.boxes) == (cats, boxes)
    boxes.unlink()
    with pytest.raises(ConfigError, match=r"data\.(folder|boxes) is needed: the \w+ of cats 1 lay in a \w+ named"):
        locate_data(manifest.read_release(folder), config)


def test_changed_images_are_said_and_renamed_classes_are_told_as_that(
    release: Release, cats: Path, caplog: pytest.LogCaptureFixture
) -> None:
    same = prepared(cats)
    assert compare_data(release, same) == shipped.require_same_data(release, same) == same
    assert caplog.text == ""
    (cats / "milo" / "0.png").unlink()
    changed = prepared(cats)
    with caplog.at_level(logging.WARNING):
        assert compare_data(release, changed) == changed
    assert "the images have changed since cats 1 was made" in caplog.text
    with pytest.raises(EvaluationError, match="the images have changed"):
        shipped.require_same_data(release, changed)
    (cats / "milo").rename(cats / "oscar")
    renamed = prepared(cats)
    for check in (compare_data, shipped.require_same_data):
        with pytest.raises(EvaluationError, match="class 'milo' is named 'oscar' now"):
            check(release, renamed)
    fill(cats, "zoe")
    with pytest.raises(EvaluationError, match="missing now: milo; new: oscar, zoe"):
        compare_data(release, prepared(cats))


def test_one_class_is_refused_before_training_if_a_classifier_should_judge(cats: Path) -> None:
    dataset = prepared(cats / "luna")
    assert dataset.classes == ("photos",)
    for judge in ({"extractor": "breed"}, {"min_breed_accuracy": 0.5}):
        with pytest.raises(DataError, match=r"the data has one class \(photos\).*Set evaluate\.extractor to 'inception'"):
            check_judgeable(dataset, resolve("photos", {"evaluate": judge}))
