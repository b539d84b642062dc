"""The whole cat: which square is cut out, the boxes that decide it, and what is wrong with them."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from small_photos import bytes_of, picture, save

from tinycats_core.config import DataConfig
from tinycats_core.data import preparation, splits, validation
from tinycats_core.data.crop import Box, centering, kept, square_of
from tinycats_core.data.decode import Photo, decode_all
from tinycats_core.errors import ConfigError, DataError
from tinycats_core.records import Dataset

SIZE = 16
RED = (220, 20, 20)


# --- where the square lies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("boxes", "left"),
    [
        ([], 100),  # of a photo of 400x200: the centre
        ([(120, 0, 280, 200)], 100),  # all in it: it stays there
        ([(0, 10, 50, 60)], 0),
        ([(60, 10, 150, 60)], 60),  # no further from the centre than it has to go
        ([(250, 10, 390, 60)], 190),
        ([(20, 0, 380, 200)], 100),  # longer than the square, which lies within it
        ([(150, 0, 400, 200)], 150),
        ([(10, 0, 60, 50), (0, 0, 400, 200)], 10),  # the head first
        ([(300, 0, 340, 50), (150, 0, 340, 200)], 140),  # and then as much of the animal as that allows
        ([(300, 0, 340, 50), (0, 0, 340, 200)], 140),
    ],
)
def test_the_square_keeps_the_subject_and_moves_no_further_than_that(boxes: list[tuple[int, int, int, int]], left: float):
    found = [Box(*box) for box in boxes]
    assert square_of(found, 400, 200)[:4] == (left, 0, left + 200, 200)
    upended = [Box(box[1], box[0], box[3], box[2]) for box in boxes]
    assert square_of(upended, 200, 400)[:4] == (0, left, 200, left + 200)


def any_box(rng: np.random.Generator, width: int, height: int) -> Box:
    (left, right), (top, bottom) = (np.sort(rng.choice(side + 1, 2, replace=False)) for side in (width, height))
    return Box(left, top, right, bottom)


def test_no_other_place_keeps_more():
    rng = np.random.default_rng(0)
    for _ in range(200):
        width, height = (int(side) for side in rng.integers(20, 60, 2))
        head, animal = (any_box(rng, width, height) for _ in range(2))
        square = square_of([head, animal], width, height)
        side = min(width, height)
        others = [Box(x, y, x + side, y + side) for x in range(width - side + 1) for y in range(height - side + 1)]
        best = max(kept(head, other) for other in others)
        assert kept(head, square) >= best - 1e-9
        among = [kept(animal, other) for other in others if kept(head, other) >= best - 1e-9]
        assert kept(animal, square) >= max(among) - 1e-9


def test_a_square_photo_has_one_square():
    assert centering([Box(0, 0, 10, 10)], 50, 50) == (0.5, 0.5)


# --- pixels -----------------------------------------------------------------------------------------------------------


def with_subject(width: int = 96, height: int = 48, left: int = 72) -> Image.Image:
    image = Image.new("RGB", (width, height), (40, 90, 40))
    image.paste(RED, (left, 12, left + 24, 36))
    return image


def square_in(content: bytes, boxes: tuple[Box, ...] | None, size: int = 16) -> tuple[np.ndarray, list[dict[str, str]]]:
    (image,), findings = decode_all([Photo("x", "a", None, lambda: io.BytesIO(content), boxes)], 1, size, lambda *_: None)
    return image.pixels.transpose(1, 2, 0).astype(int), findings


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_those_of_the_upright_photo(orientation: int):
    turned = {
        1: [], 2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180], 4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE], 6: [Image.Transpose.ROTATE_90], 7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }[orientation]  # fmt: skip
    upright = with_subject()
    stored = upright
    for step in turned:
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found, findings = square_in(bytes_of(stored, "PNG", exif=exif), (Box(72, 12, 96, 36, "row 2", upright.size),))
    expected = np.asarray(ImageOps.fit(upright.crop((48, 0, 96, 48)), (16, 16), Image.Resampling.LANCZOS))
    assert findings == []
    assert np.abs(found - expected).max() <= 1


def test_boxes_hold_for_photos_that_are_decoded_at_a_reduced_scale():
    large = with_subject().resize((1920, 960), Image.Resampling.NEAREST)
    found, _ = square_in(bytes_of(large, "JPEG", quality=95), (Box(1440, 240, 1920, 720),))
    expected = np.asarray(ImageOps.fit(large.crop((960, 0, 1920, 960)), (16, 16), Image.Resampling.LANCZOS))
    assert np.abs(found - expected).max() <= 4


@pytest.mark.parametrize("size", [(96, 48), (49, 48), (48, 49), (48, 48), (333, 250)])
def test_without_need_to_move_the_pixels_are_those_of_the_centre(size: tuple[int, int]):
    content = bytes_of(picture(1, *size), "PNG")
    centre, _ = square_in(content, None)
    around = (Box(size[0] / 2 - 5, size[1] / 2 - 5, size[0] / 2 + 5, size[1] / 2 + 5),)
    assert np.array_equal(square_in(content, around)[0], centre)
    assert np.array_equal(square_in(content, ())[0], centre)
    fitted = ImageOps.fit(picture(1, *size), (16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(fitted), centre)


def test_an_edge_that_was_rounded_is_inside():
    assert square_in(bytes_of(with_subject(), "PNG"), (Box(71.5, 12, 96.6, 36, "row 2"),))[1] == []


# --- a folder with boxes ----------------------------------------------------------------------------------------------


@pytest.fixture
def cats(tmp_path: Path) -> Path:
    """Four photos of each of two classes, the subject at the right of each."""
    for number in range(8):
        image = picture(number, 96, 48)
        image.paste(RED, (72, 12, 96, 36))
        save(tmp_path / "cats" / "ab"[number % 2] / f"{number}.png", image)
    return tmp_path / "cats"


def boxes_of(cats: Path, *rows: str, heading: str = "file,left,top,right,bottom") -> Path:
    path = cats.with_name("boxes.csv")
    path.write_text("\n".join((heading, *rows)) + "\n", encoding="utf-8")
    return path


def all_boxes(cats: Path) -> list[str]:
    return [f"{path.relative_to(cats).as_posix()},72,12,96,36" for path in sorted(cats.rglob("*.png"))]


def config_of(cats: Path, boxes: Path | None, **settings: Any) -> DataConfig:
    crop = "subject" if boxes else "centre"
    return DataConfig(source="folder", folder=cats, boxes=boxes, crop=crop, image_size=SIZE, **settings)


def prepare(cats: Path, boxes: Path | None, **settings: Any) -> Dataset:
    return preparation.prepare(config_of(cats, boxes, **settings), cats.with_name("home"))


def test_the_subjects_of_a_folder_are_kept(cats: Path):
    rows = all_boxes(cats)
    boxes = boxes_of(cats, *rows[:-1], f"./{rows[-1]}")
    dataset = prepare(cats, boxes)
    assert validation.validate(dataset, config_of(cats, boxes)).warnings == ()
    images, _ = splits.load_split(dataset, "train")
    manifest = splits.read_manifest(dataset)
    name = manifest["images"][0]["name"]
    expected = ImageOps.fit(Image.open(cats / name).crop((48, 0, 96, 48)), (SIZE, SIZE), Image.Resampling.LANCZOS)
    assert np.abs(images[0].permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)).max() <= 2
    assert (manifest["crop"], manifest["boxes"]) == ("subject", str(boxes))


def test_another_crop_is_another_data_set_and_other_boxes_are_too(cats: Path):
    boxes = boxes_of(cats, *all_boxes(cats))
    same = prepare(cats, boxes)
    assert prepare(cats, boxes).path == same.path  # found again
    others = [prepare(cats, None)]
    boxes_of(cats, *[row.replace(",72,", ",60,") for row in all_boxes(cats)])
    assert not preparation.fingerprint(config_of(cats, boxes)).startswith(same.path.parent.name)
    others.append(prepare(cats, boxes_of(cats, *[row.replace(",72,12,96,", ",0,12,24,") for row in all_boxes(cats)])))
    assert len({same.sha256, *(other.sha256 for other in others)}) == 3
    assert len({same.content, *(other.content for other in others)}) == 3  # which a measurement's conditions hold
    splits_of = [{row["name"]: row["split"] for row in splits.read_manifest(dataset)["images"]} for dataset in (same, *others)]
    assert splits_of[0] == splits_of[1] == splits_of[2]


def test_photos_without_a_box_are_cut_at_the_centre_with_a_warning(cats: Path):
    boxes = boxes_of(cats, *all_boxes(cats)[2:])
    report = validation.validate(prepare(cats, boxes), config_of(cats, boxes))
    assert report.warnings == ("2 photos are without a box and cut at the centre: a/0.png, a/2.png.",)


@pytest.mark.parametrize(
    ("rows", "heading", "said"),
    [
        (["a/0.png,1,2,3"], "file,left,top,right", r"boxes\.csv has no column bottom; the columns file, left, top,"),
        (["a/0.png;1;2;3;4"], "file;left;top;right;bottom", "has no column file, left, top, right, bottom; .* separated by commas"),
        ([], "", "has no column file, left, top, right, bottom"),
        ([], "file,left,top,right,bottom", r"boxes\.csv has no rows\. Add a row for each photo, or set data\.crop to 'centre'"),
        (["a/0.png,1,2,x,4"], None, r"boxes\.csv: row 2 \(a/0\.png\): right is 'x', not a number\. Correct or delete these rows"),
        (["a/0.png,1,2,nan,4"], None, "right is 'nan', not a number"),
        (["a/0.png,1,2,3"], None, "bottom is 'empty', not a number"),
        (["a/0.png,1,2,inf,4"], None, "right is 'inf', not a number"),
        (["a/9.png,1,2,3,4"], None, r"row 2 \(a/9\.png\): there is no such file in data\.folder"),
        (["../cats/a/0.png,1,2,3,4"], None, r"row 2 \(\.\./cats/a/0\.png\): there is no such file in data\.folder"),
        (["a/0.png,30,2,30,4"], None, "the box is empty: left 30 is not less than right 30"),
        (["a/0.png,1,9,3,4"], None, "the box is empty: top 9 is not less than bottom 4"),
        (["a/0.png,1,2,3,4", "", "a/0.png,1,2,3,4"], None, r"row 4 \(a/0\.png\): it has a box already in row 2"),
        (["a/9.png,1,2,3,4"] * 7, None, r"row 6 \([^)]*\): [^;]* and 2 more\. Correct"),
    ],
)  # fmt: skip
def test_bad_boxes_are_refused_before_anything_is_decoded(cats: Path, rows: list[str], heading: str | None, said: str):
    boxes = boxes_of(cats, *rows, heading="file,left,top,right,bottom" if heading is None else heading)
    with pytest.raises(DataError, match=said) as error:
        preparation.fingerprint(config_of(cats, boxes))
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=said):
        prepare(cats, boxes)


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "No such file or directory"), (b"\xff\xfe\0x", "is not a CSV file in UTF-8"), ("folder", "Is a directory")],
)
def test_a_file_that_is_no_table_of_boxes_is_one_line(cats: Path, content: bytes | str | None, said: str):
    boxes = cats.with_name("boxes.csv")
    if isinstance(content, bytes):
        boxes.write_bytes(content)
    elif content:
        boxes.mkdir()
    with pytest.raises(DataError, match=rf"data\.boxes .*boxes\.csv.*{said}"):
        preparation.fingerprint(config_of(cats, boxes))


def test_a_box_outside_of_its_photo_is_refused_with_row_value_and_remedy(cats: Path):
    boxes = boxes_of(cats, *all_boxes(cats)[:-1], "b/7.png,72,12,200,36")
    dataset = prepare(cats, boxes)
    with pytest.raises(DataError) as error:
        validation.validate(dataset, config_of(cats, boxes))
    assert str(error.value).startswith(
        "1 box is unusable: b/7.png (row 9: 72, 12, 200, 36 is outside of the photo of 96x48). Correct data.boxes, or set "
        "data.corrupt_files to 'skip', which cuts these photos at the centre. All findings: "
    )
    skip = config_of(cats, boxes, corrupt_files="skip")
    (warning,) = validation.validate(prepare(cats, boxes, corrupt_files="skip"), skip).warnings
    assert warning.startswith("1 box is unusable and left out: b/7.png (row 9")
    assert "b/7.png" in dataset.path.with_name("findings.csv").read_text()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"source": "folder", "folder": "x", "crop": "subject"}, "data.boxes is missing: data.crop 'subject' needs a CSV file"),
        ({"source": "folder", "folder": "x", "boxes": "b.csv"}, "data.boxes is given but data.crop is 'centre': set data.crop"),
        ({"source": "oxford_pets", "crop": "subject", "boxes": "b.csv"}, "data.boxes is given but data.source is 'oxford_pets'"),
        ({"source": "oxford_pets", "crop": "subject", "mirror": "a/b"}, "data.crop is 'subject', and data.mirror holds no boxes"),
        ({"source": "folder", "folder": "x", "mirror": "a/b"}, "data.mirror is given but data.source is 'folder'"),
        ({"source": "toycats", "crop": "subject"}, "data.crop is 'subject'; source=toycats only has 'centre'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], said: str):
    with pytest.raises(ConfigError) as error:
        preparation.fingerprint(DataConfig(**settings))
    assert str(error.value).startswith(said)
