import fcntl
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_photos import bytes_of, picture, save

from tinycats_core.config import BREEDS, CLASSES, MIN_IMAGES, DataConfig
from tinycats_core.data import preparation, splits, toy_drawing, validation
from tinycats_core.data.decode import Decoded
from tinycats_core.data.source import hold_out
from tinycats_core.errors import DataError, TinycatsError
from tinycats_core.records import Dataset

REAL_CATS = Path(__file__).parents[3] / "../shared/data/pets"
SIZE = 16


def make_folder(root: Path, counts: dict[str, int]) -> Path:
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            save(root / name / f"{index}.png", picture(1000 * number + index))
    return root


def row_of(name: str, used: tuple[int, int, int], **left_out: int) -> dict[str, Any]:
    """Return the row that validation reports for a class."""
    columns = dict.fromkeys(validation.COLUMNS, 0) | {name.replace("_", " "): count for name, count in left_out.items()}
    splits = dict(zip(("train", "val", "test"), used, strict=True))
    return {"class": name, "found": sum(used) + sum(columns.values()), "used": sum(used), **columns, **splits}


def config_of(folder: Path, **settings: Any) -> DataConfig:
    return DataConfig(source="folder", folder=folder, image_size=settings.pop("image_size", SIZE), **settings)


def findings(dataset: Dataset, kind: str) -> list[tuple[str, str]]:
    return [(item["file"], item["detail"]) for item in splits.read_manifest(dataset)["findings"] if item["kind"] == kind]


def all_images(dataset: Dataset) -> torch.Tensor:
    return torch.cat([splits.load_split(dataset, split)[0] for split in ("train", "val", "test")])


def count(dataset: Dataset) -> int:
    return dataset.train_count + dataset.val_count + dataset.test_count


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "animals", {"ant": 5, "bee": 6, "cow": 4})


# --- toy cats ---------------------------------------------------------------------------------------------------------


def toy(**settings: Any) -> DataConfig:
    counts = {"toy_train_per_class": 3, "toy_val_per_class": 1, "toy_test_per_class": 2}
    return DataConfig(source="toycats", image_size=SIZE, **{**counts, **settings})


def test_toycats_become_a_data_set(tmp_path: Path):
    dataset = preparation.prepare(toy(), tmp_path)
    images, labels = splits.load_split(dataset, "train")
    assert images.shape == (39, 3, SIZE, SIZE)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == [3] * 13
    assert splits.load_split(dataset, "val")[1].bincount().tolist() == [1] * 13
    assert splits.load_split(dataset, "test")[1].bincount().tolist() == [2] * 13
    assert dataset.classes == CLASSES
    assert (dataset.train_count, dataset.val_count, dataset.test_count) == (39, 13, 26)
    assert (dataset.image_size, dataset.source) == (SIZE, "toycats")
    report = validation.validate(dataset, toy())
    assert report.rows[1] == row_of("Bengal", (3, 1, 2))
    assert report.warnings == ()


def test_toycats_keep_their_labels_and_pixels(tmp_path: Path):
    dataset = preparation.prepare(toy(seed=4), tmp_path)
    images, labels = splits.load_split(dataset, "train")
    drawn, drawn_labels = toy_drawing.generate(3, SIZE, 4)
    expected = {(pixels.tobytes(), int(label)) for pixels, label in zip(drawn, drawn_labels, strict=True)}
    assert {(pixels.numpy().tobytes(), int(label)) for pixels, label in zip(images, labels, strict=True)} == expected


def test_toycats_share_no_image_between_splits_and_seeds(tmp_path: Path):
    seen: set[str] = set()
    for seed in (0, 1):
        rows = splits.read_manifest(preparation.prepare(toy(seed=seed, toy_val_per_class=4), tmp_path))["images"]
        hashes = {row["sha256"] for row in rows}
        assert len(hashes) == 13 * (3 + 4 + 2)
        assert not hashes & seen
        seen |= hashes


# --- the layouts of a folder ------------------------------------------------------------------------------------------


def test_breed_folders_get_the_order_of_the_configuration(tmp_path: Path):
    root = make_folder(tmp_path / "pets", {f"cat/{breed}": 2 for breed in reversed(BREEDS)} | {"other": 3})
    dataset = preparation.prepare(config_of(root), tmp_path / "out")
    assert dataset.classes == CLASSES
    assert [row["class"] for row in validation.validate(dataset, config_of(root)).rows] == list(CLASSES)


def test_unknown_breeds_come_after_the_known_and_other_last(tmp_path: Path):
    root = make_folder(tmp_path / "pets", {"cat/Alley": 2, "cat/Siamese": 2, "cat/Bengal": 2, "other": 2})
    assert preparation.prepare(config_of(root), tmp_path / "out").classes == ("Bengal", "Siamese", "Alley", "other")


def test_one_folder_a_class_is_sorted_by_name(animals: Path, tmp_path: Path):
    dataset = preparation.prepare(config_of(animals), tmp_path / "out")
    assert dataset.classes == ("ant", "bee", "cow")
    assert validation.validate(dataset, config_of(animals)).rows == (
        row_of("ant", (3, 1, 1)),
        row_of("bee", (4, 1, 1)),
        row_of("cow", (2, 1, 1)),
    )


def test_each_image_carries_the_label_of_its_folder(tmp_path: Path):
    colours = {"a": (250, 0, 0), "b": (0, 250, 0), "c": (0, 0, 250)}
    for name, colour in colours.items():
        for index in range(4):
            shade = tuple(max(0, channel - index) for channel in colour)
            save(tmp_path / "in" / name / f"{index}.png", Image.new("RGB", (20, 20), shade))
    dataset = preparation.prepare(config_of(tmp_path / "in"), tmp_path / "out")
    for split in ("train", "val", "test"):
        images, labels = splits.load_split(dataset, split)
        assert torch.equal(images.float().mean((2, 3)).argmax(1), labels)


def test_manifest_rows_follow_the_tensors(animals: Path, tmp_path: Path):
    dataset = preparation.prepare(config_of(animals), tmp_path / "out")
    rows = splits.read_manifest(dataset)["images"]
    for split in ("train", "val", "test"):
        images, labels = splits.load_split(dataset, split)
        members = [row for row in rows if row["split"] == split]
        assert [dataset.classes[label] for label in labels] == [row["class"] for row in members]
        for pixels, row in zip(images, members, strict=True):
            original = Image.open(animals / row["name"]).resize((SIZE, SIZE), box=(4, 0, 36, 32), resample=1)
            assert np.abs(np.asarray(original).transpose(2, 0, 1).astype(int) - pixels.numpy()).max() <= 1


def test_other_files_and_hidden_ones_are_ignored(animals: Path, tmp_path: Path):
    (animals / "README.md").write_text("about")
    (animals / "ant" / "notes.txt").write_text("about")
    (animals / "ant" / ".DS_Store").write_bytes(b"\0")
    (animals / ".git").mkdir()
    save(animals / ".git" / "x.png", picture(7))
    save(animals / "__MACOSX" / "x.png", picture(8))
    dataset = preparation.prepare(config_of(animals), tmp_path / "out")
    manifest = splits.read_manifest(dataset)
    assert manifest["hidden_files"] == 3
    assert [(item["kind"], item["file"]) for item in manifest["findings"]] == [
        ("outside", "README.md"),
        ("unread", "ant/notes.txt"),
    ]
    assert len(manifest["images"]) == 15
    report = validation.validate(dataset, config_of(animals))
    assert report.rows[0] == row_of("ant", (3, 1, 1), unread_format=1)
    assert report.warnings == ("1 file is no photo and left out: 1 .txt.",)


def test_images_are_known_by_content_and_found_at_any_depth(animals: Path, tmp_path: Path):
    (animals / "ant" / "deep").mkdir()
    (animals / "ant" / "deep" / "photo").write_bytes(bytes_of(picture(50), "JPEG"))
    (animals / "ant" / "really.jpg").write_bytes(bytes_of(picture(51), "PNG"))
    dataset = preparation.prepare(config_of(animals), tmp_path / "out")
    assert {"ant/deep/photo", "ant/really.jpg"} <= {row["name"] for row in splits.read_manifest(dataset)["images"]}


def test_images_outside_the_class_folders_are_warned_about(tmp_path: Path):
    root = make_folder(tmp_path / "pets", {"cat/Bengal": 2, "other": 2})
    save(root / "stray.png", picture(90))
    save(root / "cat" / "lost.jpg", picture(91))
    config = config_of(root, layout="breeds")
    report = validation.validate(preparation.prepare(config, tmp_path / "out"), config)
    assert report.warnings == ("2 images are outside the class folders and left out: cat/lost.jpg, stray.png.",)


def test_a_folder_that_cannot_be_used_says_why(tmp_path: Path):
    def message(folder: Path) -> str:
        with pytest.raises(DataError) as error:
            preparation.prepare(config_of(folder), tmp_path / "out")
        assert "\n" not in str(error.value)
        assert str(folder) in str(error.value)
        return str(error.value)

    assert "does not exist" in message(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "is empty; expected photos, one folder" in message(tmp_path / "empty")
    file = save(tmp_path / "file.png", picture(1))
    assert "is a file" in message(file)
    (tmp_path / "hollow" / "ant").mkdir(parents=True)
    assert "(ant) are empty" in message(tmp_path / "hollow")
    assert "and also dog: set data.layout to 'breeds'" in message(make_folder(tmp_path / "mixed", {"cat/Bengal": 2, "dog": 2}))
    assert "a breed named 'other'" in message(make_folder(tmp_path / "twice", {"cat/other": 2, "other": 2}))
    assert "File name too long" in message(tmp_path / ("x" * 300))
    assert not (tmp_path / "out").exists()


# --- the split --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fractions", "counts"),
    [
        ((0.2, 0.1), (1, 0, 1)),
        ((0.99, 0.99), (1, 0, 1)),
        ((0.2, 0.1), (1, 1, 1)),
        ((0.9, 0.5), (1, 0, 2)),
        ((0.3, 0.3), (5, 2, 3)),
        ((0.3, 0.99), (1, 6, 3)),
    ],
)
def test_split_takes_the_rounded_shares_and_leaves_one_to_train_on(
    tmp_path: Path, fractions: tuple[float, float], counts: tuple[int, int, int]
):
    root = make_folder(tmp_path / "in", {"a": sum(counts), "b": 4})
    config = config_of(root, test_fraction=fractions[0], val_fraction=fractions[1])
    row = validation.validate(preparation.prepare(config, tmp_path / "out"), config).rows[0]
    assert (row["train"], row["val"], row["test"]) == counts


@pytest.mark.parametrize(
    ("sizes", "test"),
    [
        ((34,), 16),  # as many as can be judged with, and as many to train on
        ((40, 20), 16),
        ((12, 11, 10, 9), 16),
        ((100,), 20),  # the fifth is enough
        ((32,), 6),  # 16 would leave too few to train on
    ],
)
def test_the_test_split_of_few_images_is_large_enough_to_judge_with(sizes: tuple[int, ...], test: int):
    blank = np.zeros((3, 4, 4), np.uint8)
    names = [(f"{label}", f"{label}/{number}") for label, size in enumerate(sizes) for number in range(size)]
    taken, left = hold_out([Decoded(name, label, None, name, 4, 4, blank) for label, name in names], 0.2, MIN_IMAGES)
    assert test <= len(taken) <= test + len(sizes)
    assert sorted(image.name for image in taken + left) == sorted(name for _, name in names)
    assert {image.label for image in left} == {label for label, _ in names}


def test_an_image_keeps_its_split_as_others_come(tmp_path: Path):
    def splits_by_content() -> dict[str, str]:
        config = config_of(tmp_path / "in", test_fraction=0.25, val_fraction=1 / 3)
        rows = splits.read_manifest(preparation.prepare(config, tmp_path / "out"))["images"]
        return {row["sha256"]: row["split"] for row in rows}

    make_folder(tmp_path / "in", {"a": 20, "b": 4})
    before = splits_by_content()
    save(tmp_path / "in" / "a" / "more.png", picture(5000))
    after = splits_by_content()
    assert sum(before[sha256] != after[sha256] for sha256 in before) <= 2  # those at the two borders


def test_split_and_bytes_depend_on_content_not_on_names_or_times(animals: Path, tmp_path: Path):
    first = preparation.prepare(config_of(animals), tmp_path / "one")
    again = preparation.prepare(config_of(animals), tmp_path / "two")
    assert first.path.read_bytes() == again.path.read_bytes()
    assert first.path.with_name("manifest.json").read_bytes() == again.path.with_name("manifest.json").read_bytes()
    for path in animals.rglob("*.png"):
        path.rename(path.with_name(f"{9 - int(path.stem)}-new.png"))
        os.utime(path.with_name(f"{9 - int(path.stem)}-new.png"), (1, 1))
    renamed = preparation.prepare(config_of(animals), tmp_path / "three")
    assert renamed.sha256 == first.sha256
    assert renamed.content == first.content
    assert preparation.fingerprint(config_of(animals)) != first.path.parent.name


# --- decoding ---------------------------------------------------------------------------------------------------------


def decoded(tmp_path: Path, content: bytes, name: str = "x.png") -> np.ndarray:
    """Return (S, S, 3) of an image that went through prepare."""
    root = make_folder(tmp_path / "in", {"a": 0, "b": 2})
    (root / "a" / name).write_bytes(content)
    dataset = preparation.prepare(config_of(root, image_size=8), tmp_path / "out")
    images, labels = splits.load_split(dataset, "train")
    assert findings(dataset, "corrupt") == []
    return images[labels == 0][0].numpy().transpose(1, 2, 0)


HALVES = Image.fromarray(np.repeat(np.array([[[200, 10, 10]] * 16 + [[10, 10, 200]] * 16], dtype=np.uint8), 32, axis=0))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(bytes_of(Image.new("L", (20, 20), 77), "PNG"), (77, 77, 77), id="grey"),
        pytest.param(bytes_of(Image.new("1", (20, 20), 1), "PNG"), (255, 255, 255), id="bits"),
        pytest.param(bytes_of(Image.fromarray(np.full((20, 20), 0x4D00, np.uint16)), "PNG"), (77, 77, 77), id="16 bit grey"),
        pytest.param(bytes_of(Image.new("RGBA", (20, 20), (0, 100, 200, 0)), "PNG"), (255, 255, 255), id="transparent"),
        pytest.param(bytes_of(Image.new("RGBA", (20, 20), (0, 0, 0, 51)), "PNG"), (204, 204, 204), id="translucent"),
        pytest.param(bytes_of(Image.new("LA", (20, 20), (9, 0)), "PNG"), (255, 255, 255), id="grey with alpha"),
        pytest.param(
            bytes_of(Image.new("RGB", (20, 20), (9, 8, 7)).quantize(), "PNG", transparency=0),
            (255, 255, 255),
            id="transparent palette",
        ),
        pytest.param(bytes_of(Image.new("RGB", (20, 20), (9, 8, 7)).quantize(), "PNG"), (9, 8, 7), id="palette"),
        pytest.param(bytes_of(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "JPEG"), (254, 0, 0), id="cmyk"),
        pytest.param(
            bytes_of(
                Image.new("RGB", (20, 20), (250, 0, 0)),
                "GIF",
                save_all=True,
                append_images=[Image.new("RGB", (20, 20), (0, 0, 250))],
            ),
            (250, 0, 0),
            id="animation",
        ),
    ],
)
def test_every_kind_of_image_becomes_rgb(tmp_path: Path, content: bytes, expected: tuple[int, int, int]):
    pixels = decoded(tmp_path, content, "image-without-suffix")
    assert np.abs(pixels.astype(int) - expected).max() <= 2


@pytest.mark.parametrize(
    ("orientation", "top_left", "bottom_left", "top_right"),
    [(1, "red", "red", "blue"), (3, "blue", "blue", "red"), (6, "red", "blue", "red"), (8, "blue", "red", "blue")],
)
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, top_left: str, bottom_left: str, top_right: str):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decoded(tmp_path, bytes_of(HALVES, "JPEG", exif=exif, quality=95))
    corners = [pixels[1, 1], pixels[-2, 1], pixels[1, -2]]
    assert [("red" if r > b else "blue") for r, _, b in corners] == [top_left, bottom_left, top_right]


def test_wide_images_are_cut_not_squashed(tmp_path: Path):
    wide = Image.new("RGB", (96, 32), (0, 250, 0))
    wide.paste((250, 0, 0), (32, 0, 64, 32))
    pixels = decoded(tmp_path, bytes_of(wide, "PNG"))
    assert (pixels[..., 0] > 200).all()


def test_resizing_is_antialiased(tmp_path: Path):
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    pixels = decoded(tmp_path, bytes_of(Image.fromarray(board), "PNG"))
    assert np.abs(pixels.astype(int) - 127).max() <= 3


def test_large_jpegs_look_the_same_though_decoded_at_a_reduced_scale(tmp_path: Path):
    image = picture(3, 1200, 900)
    quick = decoded(tmp_path / "quick", bytes_of(image, "JPEG", quality=95))
    exact = decoded(tmp_path / "exact", bytes_of(image, "PNG"))
    assert np.abs(quick.astype(int) - exact).mean() < 2


# --- what cannot be used ----------------------------------------------------------------------------------------------


def bomb() -> bytes:
    """A PNG of 60 bytes that claims 20,000 x 20,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


DAMAGED = {
    "truncated.jpg": (bytes_of(picture(1, 200, 160), "JPEG")[:-2000], "truncated"),
    "truncated.jpeg": (bytes_of(picture(1, 2000, 1600), "JPEG")[:-9000], "truncated"),  # decoded at a reduced scale
    "truncated.png": (bytes_of(picture(1, 200, 160), "PNG")[:-2000], "truncated"),
    "truncated.gif": (bytes_of(picture(1, 200, 160), "GIF")[:-2000], "truncated"),
    "truncated.bmp": (bytes_of(picture(1, 200, 160), "BMP")[:-2000], "truncated"),
    "truncated.webp": (bytes_of(picture(1, 200, 160), "WEBP")[:-200], ""),
    "text.jpg": (b"this is a text file", "not an image"),
    "PAGE.JPG": (b"<html>not found</html>", "not an image"),
    "empty.png": (b"", "an empty file"),
    "program.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n", "not an image"),
    "truncated-without-suffix": (bytes_of(picture(1, 200, 160), "JPEG")[:-2000], "truncated"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_a_finding(animals: Path, tmp_path: Path, name: str):
    content, reason = DAMAGED[name]
    (animals / "bee" / name).write_bytes(content)
    dataset = preparation.prepare(config_of(animals), tmp_path / "out")
    [(file, detail)] = findings(dataset, "corrupt")
    assert file == f"bee/{name}"
    assert detail
    assert reason in detail
    assert count(dataset) == 15

    with pytest.raises(DataError) as error:
        validation.validate(dataset, config_of(animals))
    assert str(error.value).startswith(f"1 file is not decodable: bee/{name} (")
    assert "data.corrupt_files to 'skip'" in str(error.value)
    [warning] = validation.validate(dataset, config_of(animals, corrupt_files="skip")).warnings
    assert f"bee/{name}" in warning


def test_a_broken_link_is_a_finding(animals: Path, tmp_path: Path):
    (animals / "bee" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    dataset = preparation.prepare(config_of(animals), tmp_path / "out")
    assert findings(dataset, "unreadable") == [("bee/gone.jpg", "No such file or directory")]


def test_a_pipe_does_not_block(animals: Path, tmp_path: Path):
    os.mkfifo(animals / "bee" / "pipe.jpg")
    assert count(preparation.prepare(config_of(animals), tmp_path / "out")) == 15


def test_many_damaged_files_are_named_up_to_five(animals: Path, tmp_path: Path):
    for index in range(8):
        (animals / "ant" / f"bad{index}.jpg").write_bytes(b"no")
    dataset = preparation.prepare(config_of(animals), tmp_path / "out")
    with pytest.raises(DataError, match=r"8 files are not decodable: .*bad4\.jpg \(not an image\) and 3 more\. Remove"):
        validation.validate(dataset, config_of(animals))


def test_enlarged_images_are_warned_about_and_tiny_ones_left_out(animals: Path, tmp_path: Path):
    save(animals / "ant" / "small.png", picture(70, 15, 30))
    save(animals / "ant" / "half.png", picture(71, 8, 30))
    save(animals / "ant" / "tiny.png", picture(72, 30, 7))
    dataset = preparation.prepare(config_of(animals), tmp_path / "out")
    assert findings(dataset, "small") == [("ant/half.png", "8x30"), ("ant/small.png", "15x30")]
    with pytest.raises(DataError, match=r"1 image is smaller than half of data.image_size 16: ant/tiny.png \(30x7\)"):
        validation.validate(dataset, config_of(animals))
    report = validation.validate(dataset, config_of(animals, corrupt_files="skip"))
    assert [warning.split(":")[0] for warning in report.warnings] == [
        "1 image is smaller than half of data.image_size 16 and left out",
        "2 images are smaller than data.image_size 16 and enlarged",
    ]
    assert sum(report.rows[0][split] for split in ("train", "val", "test")) == 7


def test_exact_copies_are_kept_once(animals: Path, tmp_path: Path):
    before = preparation.prepare(config_of(animals), tmp_path / "out")
    (animals / "ant" / "copy.png").write_bytes((animals / "ant" / "3.png").read_bytes())
    after = preparation.prepare(config_of(animals), tmp_path / "out")
    assert after.sha256 == before.sha256
    assert findings(after, "duplicate") == [("ant/copy.png", "= ant/3.png")]
    [warning] = validation.validate(after, config_of(animals)).warnings
    assert "1 file is a copy of another, or the same picture encoded again, and left out: ant/copy.png (= ant/3.png)" in warning


def test_the_same_image_in_two_classes_fails_and_teaches_neither(animals: Path, tmp_path: Path):
    (animals / "cow" / "ant.png").write_bytes((animals / "ant" / "3.png").read_bytes())
    dataset = preparation.prepare(config_of(animals), tmp_path / "out")
    assert count(dataset) == 14
    for corrupt_files in ("fail", "skip"):
        with pytest.raises(DataError, match=r"ant/3\.png \(= cow/ant\.png\), cow/ant\.png \(= ant/3\.png\)\. Keep each"):
            validation.validate(dataset, config_of(animals, corrupt_files=corrupt_files))


@pytest.mark.parametrize("mirrored", [False, True])
def test_near_copies_across_the_split_are_warned_about(tmp_path: Path, mirrored: bool):
    root = make_folder(tmp_path / "in", {"a": 0, "b": 12})
    source = picture(5, 120, 100)
    save(root / "a" / "original.png", source)
    altered = source.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else source
    save(root / "a" / "altered.jpg", altered.resize((90, 75)), quality=60)
    dataset = preparation.prepare(config_of(root), tmp_path / "out")
    [warning] = validation.validate(dataset, config_of(root)).warnings  # two images: one lies on each side
    assert (
        "1 held-out image is nearly the same as a training image (remove one of the two, or the figures look too good): a/"
        in warning
    )
    assert "altered.jpg" in warning
    assert "original.png" in warning


def test_near_copies_among_the_validation_images_are_warned_about_too(tmp_path: Path):
    root = make_folder(tmp_path / "in", {"a": 0, "b": 12})
    for width in (120, 110, 100):  # three images: one lies in each split
        save(root / "a" / f"{width}.png", picture(5, 120, 100).resize((width, width * 5 // 6)))
    dataset = preparation.prepare(config_of(root), tmp_path / "out")
    [warning] = validation.validate(dataset, config_of(root)).warnings
    assert (
        "2 held-out images are nearly the same as a training image (remove one of the two, or the figures look too good): a/"
        in warning
    )


def test_different_images_are_not_near_copies(tmp_path: Path):
    root = make_folder(tmp_path / "in", {"a": 60, "b": 60})
    assert findings(preparation.prepare(config_of(root), tmp_path / "out"), "near_duplicate") == []


def test_classes_without_enough_images_fail(tmp_path: Path):
    root = make_folder(tmp_path / "in", {"cat/Bengal": 3, "cat/Birman": 0, "cat/Bombay": 1, "other": 4})
    (root / "cat" / "Birman" / "bad.jpg").write_bytes(b"no")
    config = config_of(root, corrupt_files="skip")
    with pytest.raises(DataError) as error:
        validation.validate(preparation.prepare(config, tmp_path / "out"), config)
    assert str(error.value).startswith(
        "too few usable images to train on and to test on in 2 of 4 classes (Birman 0 and 0 of 1 file: 1 unreadable, "
        "Bombay 1 and 0); at least 1 and 1 are needed. Add images or remove the class. All findings: "
    )


def test_a_folder_without_one_usable_image_is_an_error_not_a_crash(tmp_path: Path):
    root = make_folder(tmp_path / "in", {"a": 0, "b": 0})
    (root / "a" / "bad.jpg").write_bytes(b"no")
    dataset = preparation.prepare(config_of(root), tmp_path / "out")
    assert splits.load_split(dataset, "train")[0].shape == (0, 3, SIZE, SIZE)
    with pytest.raises(DataError, match=r"a/bad\.jpg"):
        validation.validate(dataset, config_of(root))


def test_imbalance_is_warned_about(tmp_path: Path):
    root = make_folder(tmp_path / "in", {"many": 30, "few": 2})
    config = config_of(root)
    [warning] = validation.validate(preparation.prepare(config, tmp_path / "out"), config).warnings
    assert "class 'many' has 22 training images, 'few' has 1: 22 times as many" in warning


# --- the prepared files -----------------------------------------------------------------------------------------------


def test_prepare_reuses_what_is_intact(animals: Path, tmp_path: Path):
    steps: list[tuple[float, str]] = []
    first = preparation.prepare(config_of(animals), tmp_path / "out", lambda *step: steps.append(step))
    assert steps[0][0] == 0
    assert steps[-1] == (1.0, "15 images decoded, 0 findings")
    assert [fraction for fraction, _ in steps] == sorted(fraction for fraction, _ in steps)
    inode = first.path.stat().st_ino
    steps.clear()
    again = preparation.prepare(config_of(animals, corrupt_files="skip"), tmp_path / "out", lambda *step: steps.append(step))
    assert again == first
    assert again.path.stat().st_ino == inode
    assert steps == []


@pytest.mark.parametrize("file", ["images.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "remove", "garble"])
def test_prepare_makes_again_what_is_damaged(animals: Path, tmp_path: Path, file: str, damage: str):
    first = preparation.prepare(config_of(animals), tmp_path / "out")
    path = first.path.with_name(file)
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:-10] if damage == "truncate" else b"\xff" + content[1:])
    assert preparation.prepare(config_of(animals), tmp_path / "out") == first
    assert path.read_bytes() == content


def test_fingerprint_changes_with_what_is_read_and_with_nothing_else(animals: Path):
    config = config_of(animals)
    before = preparation.fingerprint(config)
    assert preparation.fingerprint(config_of(animals, corrupt_files="skip", seed=3)) == before
    assert preparation.fingerprint(config_of(animals, image_size=32)) != before
    assert preparation.fingerprint(config_of(animals, test_fraction=0.5)) != before
    assert preparation.fingerprint(config_of(animals, val_fraction=0.5)) != before
    assert preparation.fingerprint(DataConfig(val_fraction=0.5)) != preparation.fingerprint(DataConfig())
    assert preparation.fingerprint(toy(toy_val_per_class=2)) != preparation.fingerprint(toy())
    save(animals / "ant" / "more.png", picture(60))
    added = preparation.fingerprint(config)
    assert added != before
    (animals / "dog").mkdir()
    assert preparation.fingerprint(config) not in (before, added)
    assert preparation.fingerprint(toy()) != preparation.fingerprint(toy(seed=1))
    assert preparation.fingerprint(DataConfig()) == preparation.fingerprint(DataConfig(corrupt_files="skip"))


def test_a_manifest_of_other_images_is_refused(animals: Path, tmp_path: Path):
    dataset = preparation.prepare(config_of(animals), tmp_path / "out")
    manifest = dataset.path.with_name("manifest.json")
    manifest.write_text(manifest.read_text().replace(dataset.sha256, "0" * 64))
    with pytest.raises(DataError, match="does not belong to"):
        validation.validate(dataset, config_of(animals))


def test_an_output_that_cannot_be_written_is_one_clear_error(animals: Path, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TinycatsError, match=r"cannot write to .*file"):
        preparation.prepare(config_of(animals), tmp_path / "file" / "out")


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(animals: Path, tmp_path: Path):
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(DataError) as error:
            preparation.prepare(config_of(animals), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value).startswith(f"cannot write {tmp_path / 'out'}")
    assert "File too large" in str(error.value)
    assert "free some space" in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


KILLED = """
import os, signal, sys
from pathlib import Path
from tinycats_core.config import DataConfig
from tinycats_core.data import preparation

preparation.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # the tensors are written, the manifest is not
preparation.prepare(DataConfig(source="folder", folder=Path(sys.argv[1]), image_size=16), Path(sys.argv[2]))
"""


def test_a_killed_run_leaves_nothing_under_the_final_name(animals: Path, tmp_path: Path):
    command = [sys.executable, "-c", KILLED, str(animals), str(tmp_path / "out")]
    result = subprocess.run(command, cwd=Path(__file__).parents[3], check=False)
    assert result.returncode == -signal.SIGKILL
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert any(name.endswith(".tmp") for name in names)
    assert preparation.fingerprint(config_of(animals))[:12] not in names
    dataset = preparation.prepare(config_of(animals), tmp_path / "out")
    assert validation.validate(dataset, config_of(animals)).warnings == ()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock", dataset.path.parent.name}


def test_a_second_run_waits_for_the_first(animals: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    waiting = threading.Event()
    made = []

    def report(_: float, text: str) -> None:
        if "waiting for another run" in text:
            waiting.set()

    def prepare():
        made.append(preparation.prepare(config_of(animals), out, report))

    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=prepare)
        thread.start()
        assert waiting.wait(20)
        assert made == []
    thread.join(20)
    assert made[0].is_intact()


# --- real cats --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL_CATS.is_dir(), reason="no real cats here")
def test_real_cats(tmp_path: Path):
    config = config_of(REAL_CATS.resolve(), image_size=32)
    dataset = preparation.prepare(config, tmp_path)
    report = validation.validate(dataset, config)
    assert dataset.classes == CLASSES
    assert (dataset.train_count, dataset.val_count, dataset.test_count) == (831 - 82, 82, 208)
    assert report.rows[-1] == row_of("other", (352, 39, 98))
    assert "Abyssinian_122.jpg (like cat/Abyssinian/Abyssinian_172.jpg)" in report.warnings[0]  # the same photo, cleaned
    assert 90 < all_images(dataset).float().mean() < 150
