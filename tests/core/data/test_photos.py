"""People's own photos: formats, colours, odd metadata, layouts, links, names, and an account of every file."""

import csv
import errno
import io
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin
from small_photos import bytes_of, picture, save

from benchmarks.folders import account
from tinycats_core.config import DataConfig
from tinycats_core.data import decode, layout, preparation, splits, validation
from tinycats_core.data.copies import find_near_duplicates
from tinycats_core.data.decode import Decoded, Photo, decode_all
from tinycats_core.errors import DataError
from tinycats_core.records import Dataset

SIZE = 16
COLOUR = (200, 60, 40)


def fill(root: Path, *places: str, count: int = 4) -> Path:
    for number, place in enumerate(places):
        for index in range(count):
            save(root / place / f"{index}.png", picture(1000 * number + index))
    return root


def config_of(folder: Path, **settings: Any) -> DataConfig:
    return DataConfig(source="folder", folder=folder, image_size=SIZE, **settings)


def prepare(root: Path, **settings: Any) -> Dataset:
    return preparation.prepare(config_of(root, **settings), root.parent / "home")


def refusal(root: Path, **settings: Any) -> str:
    """Return the message with which a folder is refused."""
    with pytest.raises(DataError) as error:
        validation.validate(prepare(root, **settings), config_of(root, **settings))
    assert "\n" not in str(error.value)
    return str(error.value)


def kinds(dataset: Dataset) -> dict[str, str]:
    return {item["file"]: item["kind"] for item in splits.read_manifest(dataset)["findings"]}


def used(dataset: Dataset) -> dict[str, str]:
    """Return the class of each image that is used, by its file."""
    return {row["name"]: row["class"] for row in splits.read_manifest(dataset)["images"]}


def square_of(content: bytes, name: str = "x.png", size: int = 8) -> np.ndarray:
    """Return the pixels (S, S, 3) of one decoded file."""
    (image,), findings = decode_all([Photo(name, "a", None, lambda: io.BytesIO(content))], 1, size, lambda *_: None)
    assert findings == []
    return image.pixels.transpose(1, 2, 0).astype(int)


def reason_of(content: bytes, name: str) -> tuple[str, str]:
    """Return kind and detail of the finding of one file that cannot be used."""
    images, (finding,) = decode_all([Photo(name, "a", None, lambda: io.BytesIO(content))], 1, 8, lambda *_: None)
    assert images == []
    return finding["kind"], finding["detail"]


# --- formats ----------------------------------------------------------------------------------------------------------


def heic(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, quality=95, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["x.heic", "x.jpg", "x.txt", "x"])
@pytest.mark.parametrize("format", ["HEIC", "AVIF", "PPM", "TIFF", "WEBP"])
def test_photos_of_any_phone_are_read_by_their_content(format: str, name: str):
    image = Image.new("RGB", (40, 32), COLOUR)
    content = heic(image) if format == "HEIC" else bytes_of(image, format)
    assert np.abs(square_of(content, name) - COLOUR).max() <= 4


@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "IMG.HEIC", ("corrupt", "damaged HEIC")),
        (b"\0\0\0\x14ftypqt  " + bytes(99), "IMG.MOV", ("unread", "video")),
        (b"\0\0\0\x14ftypqt  " + bytes(99), "IMG.jpg", ("unread", "video")),
        (b"\0\0\0\x18ftypcrx " + bytes(99), "IMG.jpg", ("unread", "raw photo")),
        (b"FUJIFILMCCD-RAW " + bytes(99), "IMG", ("unread", "raw photo")),
        (b"\xff\x0a" + bytes(99), "IMG.jxl", ("unread", "JPEG XL photo")),
        (b"8BPS" + bytes(99), "edit.psd", ("unread", "Photoshop picture")),
        (b"bplist00" + bytes(99), ".IMG_1.HEIC.icloud", ("unread", "iCloud placeholder")),
        (b"hello", "notes.txt", ("unread", "not a photo")),
        (b"", "empty", ("unread", "not a photo")),
        (b"\xff\xd8\xff\xe0\0\x06JFIF", "IMG_1", ("corrupt", "a damaged image")),
        (b"", "empty.jpg", ("corrupt", "an empty file")),
        (b"II*\0", "cut.tif", ("corrupt", "a damaged TIFF, or of a kind that is not read")),
    ],
)
def test_what_is_not_read_is_named(content: bytes, name: str, expected: tuple[str, str]):
    assert reason_of(content, name) == expected


def test_a_raw_photo_is_not_taken_for_its_thumbnail():
    thumbnail = bytes_of(Image.new("RGB", (160, 120)), "TIFF", tiffinfo={254: 1})
    assert reason_of(thumbnail, "IMG.jpg") == ("unread", "raw photo")
    plain = bytes_of(Image.new("RGB", (160, 120)), "TIFF")
    assert reason_of(plain, "IMG.NEF") == ("unread", "raw photo")


def test_without_pillow_heif_the_message_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = fill(tmp_path / "in", "a", "b")
    (root / "b" / "IMG_1.HEIC").write_bytes(heic(picture(1)))
    with_heif = prepare(root)
    assert used(with_heif)["b/IMG_1.HEIC"] == "b"
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(decode, "readable_formats", decode.readable_formats.__wrapped__)
    monkeypatch.setattr("tinycats_core.data.folder.readable_formats", decode.readable_formats)
    said = (
        "1 file is of formats that are not read and left out: 1 .heic (HEIC photo). Install pillow-heif (pip install pillow-heif)"
    )
    assert said in refusal(root)
    (warning,) = validation.validate(prepare(root, corrupt_files="skip"), config_of(root, corrupt_files="skip")).warnings
    assert warning.startswith(said)


def test_files_of_other_kinds_are_named_by_suffix_and_count(tmp_path: Path):
    root = fill(tmp_path / "in", "a", "b")
    for number in range(3):
        (root / "a" / f"IMG_{number}.MOV").write_bytes(b"\0\0\0\x14ftypqt  ")
    (root / "a" / "list.txt").write_text("hello")
    report = validation.validate(prepare(root), config_of(root))
    assert report.warnings == ("4 files are no photo and left out: 3 .mov (video), 1 .txt.",)
    assert (report.rows[0]["found"], report.rows[0]["used"], report.rows[0]["unread format"]) == (8, 4, 4)
    raw = root / "a" / "IMG.CR2"
    raw.write_bytes(b"II*\0\x10\0\0\0CR\x02\0" + bytes(99))
    assert "1 .cr2 (raw photo). Convert raw photos to JPEG or PNG, or set data.corrupt_files to 'skip'" in refusal(root)


def test_a_large_image_is_said_to_be_large(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 1_000_000)
    content = bytes_of(Image.new("RGB", (2000, 1000)), "PNG")
    assert reason_of(content, "x.png") == ("too_large", "2000x1000: 2 million pixels, the limit is 1")
    assert square_of(bytes_of(Image.new("RGB", (2000, 1000), COLOUR), "JPEG"), size=8).shape == (8, 8, 3)  # decoded at 1/8


def test_large_images_are_averaged_down_first(monkeypatch: pytest.MonkeyPatch):
    image = picture(3).resize((800, 640))
    exact = square_of(bytes_of(image, "PNG"))
    monkeypatch.setattr(decode.pixels, "LARGE", 1000)
    assert np.abs(square_of(bytes_of(image, "PNG")) - exact).mean() < 1


# --- colours and metadata ---------------------------------------------------------------------------------------------


def display_p3() -> bytes:
    """Return a profile of Display P3's colours: its primaries, D50-adapted, and sRGB's curve."""

    def number(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(number, values))

    curve = b"para\0\0\0\0\0\x03\0\0" + b"".join(map(number, (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)))
    text = b"desc\0\0\0\0\0\0\0\x0bDisplay P3\0" + bytes(78 + 8)
    tags = {
        b"desc": text + bytes(-len(text) % 4),
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.51512, 0.2412, -0.00105),
        b"gXYZ": xyz(0.29198, 0.69225, 0.04189),
        b"bXYZ": xyz(0.1571, 0.06657, 0.78407),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    }
    table, body, place = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", place + len(body), len(content))
        body += content
    header = struct.pack(">I4sI4s4s4s", 0, b"lcms", 0x02400000, b"mntr", b"RGB ", b"XYZ ") + bytes(12) + b"acsp"
    header = header.ljust(68, b"\0") + number(0.9642) + number(1.0) + number(0.8249)
    whole = header.ljust(128, b"\0") + table + body
    return struct.pack(">I", len(whole)) + whole[4:]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP", "HEIC"])
def test_colours_of_display_p3_become_those_of_srgb(format: str):
    image, options = Image.new("RGB", (40, 32), (185, 71, 50)), {"icc_profile": display_p3()}
    content = heic(image, **options) if format == "HEIC" else bytes_of(image, format, **options)
    assert np.abs(square_of(content) - COLOUR).max() <= (6 if format == "WEBP" else 2)  # WebP halves the colours


def test_profiles_that_are_srgb_or_do_not_fit_change_nothing():
    image = picture(1)
    plain = square_of(bytes_of(image, "PNG"))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"no profile at all", display_p3()[:200]):
        assert np.array_equal(square_of(bytes_of(image, "PNG", icc_profile=profile)), plain)
    grey = Image.new("LA", (20, 20), (77, 255))
    assert np.abs(square_of(bytes_of(grey, "PNG", icc_profile=display_p3())) - 77).max() <= 1
    cmyk = Image.new("CMYK", (20, 20), (0, 255, 255, 0))
    assert np.abs(square_of(bytes_of(cmyk, "JPEG", icc_profile=display_p3())) - (254, 0, 0)).max() <= 2


RAMP = np.tile(np.linspace(0, 1, 32, dtype=np.float32), (32, 1))


@pytest.mark.parametrize(
    "pixels",
    [
        *(RAMP * top for top in (1, 255, 65535)),
        RAMP * 1.04 - 0.02,  # as resampling leaves it
        *((RAMP * top).astype(np.int32) for top in (255, 4095, 65535, 2.1e9)),
        (RAMP * 65535).astype(np.uint16),
    ],
)
def test_grey_of_any_depth_is_scaled_by_what_it_holds(pixels: np.ndarray):
    found = square_of(bytes_of(Image.fromarray(pixels), "TIFF"))[4, :, 0]
    assert found[0] < 25
    assert found[-1] > 230
    assert (np.diff(found) > 0).all()


@pytest.mark.parametrize("pixels", [RAMP - 0.5, RAMP * 9, RAMP * 1e6, RAMP * np.nan, (RAMP * -9).astype(np.int32)])
def test_grey_of_no_known_range_is_refused_by_its_values(pixels: np.ndarray):
    kind, detail = reason_of(bytes_of(Image.fromarray(pixels), "TIFF"), "x.tif")
    assert kind == "corrupt"
    assert "its values run from" in detail


def odd_exif(orientation: int) -> bytes:
    """Return EXIF with an orientation and a resolution of -1/0, as some cameras write it."""
    entries = struct.pack("<H", 2) + struct.pack("<HHIHH", 0x112, 3, 1, orientation, 0) + struct.pack("<HHII", 0x11A, 10, 1, 38)
    return b"Exif\0\0II*\0\x08\0\0\0" + entries + bytes(4) + struct.pack("<ii", -1, 0)


def test_odd_metadata_do_not_spoil_a_good_photo():
    halves = Image.fromarray(np.repeat(np.array([[[200, 10, 10]] * 16 + [[10, 10, 200]] * 16], dtype=np.uint8), 32, axis=0))
    turned = square_of(bytes_of(halves, "JPEG", exif=odd_exif(6), quality=95))
    assert turned[1, 4, 0] > 150 > turned[-2, 4, 0]  # red above blue: turned by its tag
    plain = square_of(bytes_of(halves, "PNG"))
    for size in (1_500_000, 40_000_000):
        text = PngImagePlugin.PngInfo()
        text.add_text("parameters", "x" * size, zip=True)
        assert np.array_equal(square_of(bytes_of(halves, "PNG", pnginfo=text)), plain)
    assert np.array_equal(square_of(bytes_of(halves, "PNG", icc_profile=b"\0" * 20_000_000)), plain)
    wrong_sum = bytearray(bytes_of(halves, "PNG", dpi=(72, 72)))
    wrong_sum[wrong_sum.find(b"pHYs") + 5] ^= 1
    assert np.array_equal(square_of(bytes(wrong_sum)), plain)


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_photos_straight_in_the_folder_are_one_class(tmp_path: Path):
    root = fill(tmp_path / "in", ".", "@eaDir", ".hidden", count=6)
    dataset = prepare(root)
    assert dataset.classes == ("photos",)
    assert len(used(dataset)) == 6
    assert splits.read_manifest(dataset)["hidden_files"] == 12


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "valid"), ("train", "Test")])
def test_folders_of_splits_are_splits(tmp_path: Path, names: tuple[str, ...]):
    root = fill(tmp_path / "in", *(f"{name}/{cat}" for name in names for cat in ("luna", "milo")), count=5)
    dataset = prepare(root)
    assert dataset.classes == ("luna", "milo")
    for row in splits.read_manifest(dataset)["images"]:
        top = row["name"].split("/")[0]
        if layout.SPLIT_FOLDERS[top.lower()] != "train":
            assert row["split"] == layout.SPLIT_FOLDERS[top.lower()]
    assert min(dataset.train_count, dataset.val_count, dataset.test_count) >= 2
    assert splits.read_manifest(dataset)["split"] == "by the folders"


def test_splits_over_photos_and_over_breeds(tmp_path: Path):
    assert prepare(fill(tmp_path / "one" / "in", "train", "val")).classes == ("photos",)
    root = fill(tmp_path / "two" / "in", *(f"{split}/{place}" for split in ("train", "test") for place in ("cat/Bengal", "other")))
    assert prepare(root).classes == ("Bengal", "other")
    assert prepare(fill(tmp_path / "three" / "in", "train")).classes == ("train",)
    assert prepare(fill(tmp_path / "four" / "in", "train/a", "train/b")).classes == ("a", "b")


@pytest.mark.parametrize(
    ("places", "said", "answers"),
    [
        (("2023/a", "2023/b", "2024/a"), "the same sub-folders (a in 2023, 2024)", {"classes": 2, "subfolders": 2}),
        (("cat", "cat/holiday", "dog"), "cat/<Breed> folders (holiday) and cat/ with 4 photos", {"breeds": 1, "classes": 2}),
        (("cat/Bengal", "dog"), "cat/<Breed> folders (Bengal) and also dog", {"breeds": 1, "classes": 2}),
        (("train/a", "val/a", "more"), "has train and val and also more", {"splits": 1, "classes": 3}),
        (("cats/Bengal", "cats/Birman"), "nothing but cats/, with the folders Bengal, Birman", {"classes": 1, "subfolders": 2}),
        ((".", "holiday"), "holds 4 photos and the folders holiday with 4 files", {"single": 1, "classes": 1}),
    ],
)
def test_what_is_ambiguous_is_asked_in_one_line(tmp_path: Path, places: tuple[str, ...], said: str, answers: dict[str, int]):
    root = fill(tmp_path / "in", *places)
    question = refusal(root)
    assert said in question
    for setting, classes in answers.items():
        assert f"'{setting}' (" in question
        assert len(prepare(root, layout=setting).classes) == classes


def test_a_layout_that_the_folder_does_not_have_is_refused(tmp_path: Path):
    assert "has no folders for data.layout 'splits'" in refusal(fill(tmp_path / "in", "a", "b"), layout="splits")


def test_linked_folders_are_followed_and_loops_are_not(tmp_path: Path):
    root, more = fill(tmp_path / "in", "a", "b"), fill(tmp_path / "more", "x")
    for index in range(4):
        save(more / "x" / f"{index}.png", picture(9000 + index))
    (root / "a" / "more").symlink_to(more / "x")
    (root / "a" / "loop").symlink_to(root)
    (root / "b" / "self").symlink_to(root / "b" / "self")
    dataset = prepare(root)
    assert {name for name in used(dataset) if "/more/" in name} == {f"a/more/{index}.png" for index in range(4)}
    assert len(used(dataset)) == 12
    assert kinds(dataset) == {"b/self": "unreadable"}
    for outer in range(8):  # more ways through the links than anybody has photos
        (root / f"c{outer}").mkdir()
        for inner in range(8):
            (root / f"c{outer}" / f"to{inner}").symlink_to(root / f"c{inner}")
    save(root / "c0" / "x.png", picture(1))
    assert "more than 32 times" in refusal(root)


# --- findings ---------------------------------------------------------------------------------------------------------


def test_all_findings_lie_in_a_table_that_the_message_names(tmp_path: Path):
    root = fill(tmp_path / "in", "a", "b")
    for number in range(30):
        (root / "a" / f"bad{number:02}.jpg").write_bytes(b"x")
    message = refusal(root)
    assert message.startswith("30 files are not decodable: a/bad00.jpg (not an image), ")
    path = Path(message.rpartition("All findings: ")[2])
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30
    assert rows[29] == {"kind": "corrupt", "file": "a/bad29.jpg", "class": "a", "detail": "not an image"}


def test_a_thin_class_says_what_became_of_its_files(tmp_path: Path):
    root = fill(tmp_path / "in", "a", "b", count=6)
    for index in range(1, 6):
        shutil.copy(root / "b" / "0.png", root / "b" / f"{index}.png")
    assert "in 1 of 2 classes (b 1 and 0 of 6 files: 5 copies)" in refusal(root)


def test_the_same_picture_encoded_again_is_one_picture(tmp_path: Path):
    root = fill(tmp_path / "in", "a", "b")
    Image.open(root / "a" / "0.png").save(root / "a" / "again.bmp")
    Image.open(root / "a" / "1.png").save(root / "a" / "smaller.png", compress_level=9, pnginfo=PngImagePlugin.PngInfo())
    dataset = prepare(root)
    assert sorted(kinds(dataset).values()) == ["duplicate", "duplicate"]
    assert len(used(dataset)) == 8
    Image.open(root / "a" / "2.png").save(root / "b" / "other.tif")
    assert "a/2.png (= b/other.tif), b/other.tif (= a/2.png)" in refusal(root)


@pytest.fixture
def somebody_else() -> Iterator[Callable[[], None]]:
    """Return a function after which the process has no rights of its own over files, as root has."""
    own = os.geteuid()
    yield lambda: os.seteuid(65534) if own == 0 else None
    os.seteuid(own)


def test_a_permission_that_is_mended_is_seen_by_the_next_run(somebody_else: Callable[[], None]):
    with tempfile.TemporaryDirectory() as scratch:
        root = fill(Path(scratch) / "in", "a", "b")
        (Path(scratch) / "home").mkdir(mode=0o777)
        for path in (Path(scratch), Path(scratch) / "home"):
            path.chmod(0o777)
        (root / "a" / "1.png").chmod(0)
        own = os.geteuid()
        somebody_else()
        assert "1 file is not readable: a/1.png (Permission denied)" in refusal(root)
        os.seteuid(own)
        (root / "a" / "1.png").chmod(0o644)
        somebody_else()
        assert len(used(prepare(root))) == 8
        os.seteuid(own)


def test_a_disk_that_fails_is_no_finding_about_a_photo():
    def fail() -> io.BytesIO:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    photos = [Photo("a/1.png", "a", None, fail), Photo("a/2.png", "a", None, lambda: io.BytesIO(bytes_of(picture(1), "PNG")))]
    with pytest.raises(DataError, match=r"1 of 2 files could not be read: a/1\.png \(Input/output error\).*read anew"):
        decode_all(photos, 2, 8, lambda *_: None)


def test_the_near_copies_of_a_still_camera_are_found_without_comparing_all_pairs(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    scene = np.kron(rng.integers(0, 256, (3, 8, 8)), np.ones((4, 4)))
    frames = [
        Decoded(
            str(number), "a", None, str(number), 32, 32, (scene + rng.integers(-3, 4, scene.shape)).clip(0, 255).astype(np.uint8)
        )
        for number in range(300)
    ]
    compared: list[int] = []
    closest = find_near_duplicates.__globals__["_closest"]

    def counted(thumb: torch.Tensor, thumbs: torch.Tensor, columns: torch.Tensor) -> Any:
        compared.append(len(columns))
        return closest(thumb, thumbs, columns)

    monkeypatch.setitem(find_near_duplicates.__globals__, "_closest", counted)
    assert len(find_near_duplicates(frames[100:], frames[:100])) == 100
    assert sum(compared) <= 100 * 2 * 8


# --- names and random folders -----------------------------------------------------------------------------------------


def test_names_of_any_kind_are_printable_and_kept_apart(tmp_path: Path):
    names = ["caf\udce9", "猫", "a\nb", "$^$", "Luna", "luna", "x" * 200]
    root = fill(tmp_path / "in", *names, count=3)
    shutil.copy(root / "luna" / "0.png", root / "luna" / "caf\udce9.png")
    dataset = prepare(root)
    assert set(dataset.classes) == {"caf\\xe9", "猫", "a\\nb", "$^$", "Luna", "luna", "x" * 200}
    assert kinds(dataset)["luna/caf\\xe9.png"] == "duplicate"
    assert validation.validate(dataset, config_of(root)).findings == dataset.path.with_name("findings.csv")
    assert Dataset.model_validate_json(dataset.model_dump_json()) == dataset


@pytest.mark.parametrize("seed", range(25))
def test_every_file_of_a_random_folder_is_accounted_for(seed: int, tmp_path: Path):
    found = account(seed, tmp_path)
    assert found["tracebacks"] == found["unaccounted"] == 0, found
