"""Three sources of labelled images behind one interface: drawn toy cats, a folder of images, Oxford-IIIT Pet.

`prepare` decodes a source once into one file of uint8 tensors and a manifest that names every image and every finding;
`validate` reads the manifest and says whether a model should be trained on it; `load_split` hands out the tensors.
"""

import fcntl
import hashlib
import io
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tinycats_core import oxford_pets, toycats
from tinycats_core.config import BREEDS, CLASSES, DataConfig
from tinycats_core.errors import DataError, TinycatsError
from tinycats_core.files import atomic_path, check_writable, digest_of, read_json, sha256_of, write_json
from tinycats_core.records import Dataset

Progress = Callable[[float, str], None]  # fraction of the whole, what is being done
Split = Literal["train", "val", "test"]

FORMAT = 2  # bumped when what prepare makes of the same input changes
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
# What is tried on content. Pillow knows more formats, among them EPS, which runs a program.
PILLOW_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP")
MAX_IMBALANCE = 10  # largest class over smallest, in training images
NEAR_BITS = 8  # of 64 in the difference hash
NEAR_LEVELS = 8.0  # mean absolute difference of 16x16 thumbnails, of 255
SPLITS = {
    "toycats": "three seeds",
    "folder": "by sha256 within each class",
    "oxford_pets": "official lists; val by sha256 within each class of trainval",
}
NAMED = 5  # files named in one message


class ValidationReport(BaseModel):
    """What `validate` found: a row (class, train, val, test) for each class, and what deserves a look but stops nothing."""

    model_config = ConfigDict(frozen=True)

    rows: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...]


class _Photo(NamedTuple):
    name: str
    label: str
    split: Split | None  # the source's own; None: by sha256
    open: Callable[[], io.BufferedReader | io.BytesIO]


class _Decoded(NamedTuple):
    name: str
    label: str
    split: Split | None
    sha256: str  # of the file's bytes
    width: int
    height: int
    pixels: np.ndarray  # uint8 (3, S, S)


def fingerprint(config: DataConfig) -> str:
    """Return a digest of what `prepare` would read, without reading the images: it changes when they do.

    Raises:
        DataError: data.folder is missing, is a file, cannot be read, or has no class folders with files.
    """
    reads: dict[str, Any] = {"format": FORMAT, "source": config.source, "image_size": config.image_size}
    if config.source == "toycats":
        counts = [config.toy_train_per_class, config.toy_val_per_class, config.toy_test_per_class]
        reads |= {"version": toycats.VERSION, "counts": counts, "seed": config.seed}
    elif config.source == "oxford_pets":
        reads |= {"archives": oxford_pets.ARCHIVES, "val_fraction": config.val_fraction}
    else:
        root, classes, listed = _listing(config)
        files: dict[str, list[int]] = {}
        for _, path in listed:
            stat = path.stat() if path.exists() else path.lstat()  # a broken link
            files[path.relative_to(root).as_posix()] = [stat.st_size, stat.st_mtime_ns]
        fractions = {"test_fraction": config.test_fraction, "val_fraction": config.val_fraction}
        reads |= {"classes": classes, "files": files, **fractions}
    return digest_of(reads)


def prepare(config: DataConfig, folder: Path, on_progress: Progress | None = None) -> Dataset:
    """Decode the source into <folder>/<fingerprint[:12]>/{images.safetensors, manifest.json}, or reuse what is there.

    Images are turned upright (EXIF), laid over white where transparent, cut to the central square and resized with
    antialiasing. Files that cannot be used are left out and recorded as findings; `validate` judges them. The same
    input gives the same bytes. Downloads for oxford_pets lie in <folder>/oxford-iiit-pet.

    Of each class the images with the lowest sha256 become `test` (data.test_fraction of them, unless the source names its
    own) and the next `val` (data.val_fraction of the rest), at least one each; a class of two images has none in `val`.

    Raises:
        DataError: the source cannot be read or the result cannot be written.
    """
    digest = fingerprint(config)
    target = folder / digest[:12]
    report = on_progress or (lambda fraction, text: None)
    if found := _reuse(target, digest):
        return found
    check_writable(folder)
    with _alone(folder, report):
        for stale in folder.glob(".*.tmp"):  # of a run that was killed: every run holds the lock while it writes
            shutil.rmtree(stale)
        return _reuse(target, digest) or _build(config, target, digest, report)


def validate(dataset: Dataset, data: DataConfig, num_classes: int) -> ValidationReport:
    """Say whether a model of `num_classes` classes should be trained on the data set.

    Fails on: images that cannot be decoded or would be enlarged more than twice, which teaches blur (both only warned
    about with data.corrupt_files=skip; they are left out in any case), the same image in two classes, a class that has
    no image to train on or none to test on, another number of classes. Warns on: exact copies, held-out images that are
    nearly copies of training images, enlarged images, imbalance, images outside the class folders.

    The archive of oxford_pets is fixed by its checksum and nobody can repair it: its known odd files, small images
    and contradictory labels are left out with a warning whatever data.corrupt_files says.

    Raises:
        DataError: names the files or classes and what to do, everything that is wrong in one line.
    """
    manifest = read_manifest(dataset)
    found: dict[str, list[dict[str, str]]] = {}
    for finding in manifest["findings"]:
        found.setdefault(finding["kind"], []).append(finding)
    pinned = dataset.source == "oxford_pets"
    skip = data.corrupt_files == "skip"
    problems: list[str] = []
    notes: list[str] = []

    corrupt = found.get("corrupt", [])
    known = [item for item in corrupt if pinned and Path(item["file"]).stem in oxford_pets.KNOWN_ODD]
    unknown = [item for item in corrupt if item not in known]
    if unknown and not skip:
        problems.append(
            f"{_count(unknown, 'file')} not decodable: {_named(unknown)}. "
            "Remove or replace them, or set data.corrupt_files to 'skip'."
        )
    left_out = known + (unknown if skip else [])
    if left_out:
        notes.append(f"{_count(left_out, 'file')} not decodable and left out: {_named(left_out)}.")
    if tiny := found.get("too_small"):
        text = f"{_count(tiny, 'image')} smaller than half of data.image_size {dataset.image_size}"
        if skip or pinned:
            notes.append(f"{text} and left out: {_named(tiny)}.")
        else:
            problems.append(f"{text}: {_named(tiny)}. Lower data.image_size, remove them, or set data.corrupt_files to 'skip'.")
    if conflicts := found.get("conflict"):
        text = f"{_count(conflicts, 'file')} the same image as one of another class"
        if pinned:
            notes.append(f"{text} and left out: {_named(conflicts)}.")
        else:
            problems.append(f"{text}: {_named(conflicts)}. Keep each image in the class where it belongs.")

    counts = Counter((row["class"], row["split"]) for row in manifest["images"])
    rows = tuple({"class": name, **{split: counts[name, split] for split in get_args(Split)}} for name in dataset.classes)
    if thin := [row for row in rows if not row["train"] or not row["test"]]:
        names = _shortened([f"{row['class']} {row['train']} and {row['test']}" for row in thin], NAMED)
        problems.append(
            f"too few usable images to train on and to test on in {len(thin)} of {len(rows)} classes ({names}); "
            "at least 1 and 1 are needed. Add images or remove the class."
        )
    if len(dataset.classes) != num_classes:
        problems.append(
            f"the data has {len(dataset.classes)} classes ({_shortened(dataset.classes, len(CLASSES))}) but "
            f"model.num_classes is {num_classes}; set model.num_classes to {len(dataset.classes)}."
        )
    if problems:
        raise DataError(" ".join(problems))

    if copies := found.get("duplicate"):
        notes.append(f"{_count(copies, 'file')} an exact copy of another and left out: {_named(copies)}.")
    if near := found.get("near_duplicate"):
        notes.append(f"{_count(near, 'held-out image')} nearly the same as a training image: {_named(near)}.")
    if small := found.get("small"):
        size = dataset.image_size
        notes.append(f"{_count(small, 'image')} smaller than data.image_size {size} and enlarged: {_named(small)}.")
    if outside := found.get("outside"):
        notes.append(f"{_count(outside, 'image')} outside the class folders and left out: {_named(outside)}.")
    largest, smallest = max(rows, key=lambda row: row["train"]), min(rows, key=lambda row: row["train"])
    if (ratio := largest["train"] / smallest["train"]) > MAX_IMBALANCE:
        notes.append(
            f"class {largest['class']!r} has {largest['train']} training images, {smallest['class']!r} has "
            f"{smallest['train']}: {ratio:.0f} times as many. Expect less of the rare classes."
        )
    return ValidationReport(rows=rows, warnings=tuple(notes))


def load_split(dataset: Dataset, split: Split) -> tuple[Tensor, Tensor]:
    """Return images uint8 (N, 3, S, S) and labels int64 (N,) of one split. Raises TinycatsError for a changed file."""
    dataset.verify()
    with safe_open(dataset.path, framework="pt") as file:
        return file.get_tensor(f"{split}_images"), file.get_tensor(f"{split}_labels")


def read_manifest(dataset: Dataset) -> dict[str, Any]:
    """Return the manifest beside the data set: source, classes, counts, findings, a row for each image.

    Raises:
        TinycatsError: the tensors or the manifest are missing or damaged, or do not belong together.
    """
    dataset.verify()
    path = dataset.path.with_name("manifest.json")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("sha256") != dataset.sha256:
        raise DataError(f"{path} does not belong to {dataset.path}. Delete {path.parent} and prepare the data again.")
    return manifest


# --- the sources ------------------------------------------------------------------------------------------------------


def _toy_images(config: DataConfig, report: Progress) -> Iterator[_Decoded]:
    # Three seeds: the held-out images must not be a continuation of the training images of any other data.seed. NumPy
    # cuts a seed into words of 32 bits: with 2**32 the second word, 1, would be taken for the class, and images recur.
    plan: list[tuple[Split, int, int]] = [
        ("train", config.toy_train_per_class, config.seed),
        ("val", config.toy_val_per_class, config.seed + 2**48),
        ("test", config.toy_test_per_class, config.seed + 2**31),
    ]
    for step, (split, per_class, seed) in enumerate(plan):
        if per_class == 0:
            continue
        report(step / len(plan), f"drawing the toy cats of the {split} split")
        images, labels = toycats.generate(per_class, config.image_size, seed)
        for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            sha256 = hashlib.sha256(pixels.tobytes()).hexdigest()
            name = f"{split}/{CLASSES[label]}/{index:05}"
            yield _Decoded(name, CLASSES[label], split, sha256, config.image_size, config.image_size, pixels)


def _listing(config: DataConfig) -> tuple[Path, list[str], list[tuple[str | None, Path]]]:
    """Return data.folder, its classes in order, and (class, file) of each visible file; None: in no class folder."""
    root = config.folder
    assert root is not None  # DataConfig's own check
    try:
        return root, *_walk(root)
    except OSError as error:
        raise DataError(
            f"cannot read {error.filename}: {error.strerror}. Make data.folder {root} readable, or give another."
        ) from None


def _walk(root: Path) -> tuple[list[str], list[tuple[str | None, Path]]]:
    if not root.exists():
        raise DataError(f"data.folder {root} does not exist. Give the folder that holds the images.")
    if not root.is_dir():
        raise DataError(f"data.folder {root} is a file. Give the folder that holds the images.")
    expected = "cat/<Breed>/* and other/*, or one folder of images for each class"
    top = _visible_folders(root)
    if not any(root.iterdir()):
        raise DataError(f"data.folder {root} is empty; expected {expected}.")
    breeds = _visible_folders(root / "cat") if "cat" in top else []
    if breeds:
        if strangers := sorted({*top} - {"cat", "other"}):
            raise DataError(
                f"data.folder {root} has cat/<Breed> folders and also {_shortened(strangers, NAMED)}; expected {expected}."
            )
        if "other" in breeds:
            raise DataError(f"data.folder {root} has a breed named 'other', which is the class of all else. Rename it.")
        order = {name: index for index, name in enumerate(BREEDS)}
        breeds.sort(key=lambda name: (order.get(name, len(order)), name))
        places = {name: root / "cat" / name for name in breeds} | ({"other": root / "other"} if "other" in top else {})
    else:
        places = {name: root / name for name in top}
    if not places:
        raise DataError(f"data.folder {root} has no class folders; expected {expected}.")
    files: list[tuple[str | None, Path]] = [(name, path) for name, place in places.items() for path in _visible_files(place)]
    if not files:
        raise DataError(f"the class folders of data.folder {root} ({_shortened(list(places), NAMED)}) are empty. Add images.")
    inside = {path for _, path in files}
    files += [(None, path) for path in _visible_files(root) if path not in inside]
    return list(places), files


def _visible_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _visible_files(folder: Path) -> list[Path]:
    """Return the files (no pipes, no sockets) at any depth whose path below `folder` has no hidden part, sorted."""
    found: list[Path] = []
    for here, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        paths = [Path(here, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if path.is_file() or path.is_symlink()]
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _folder_photos(root: Path, files: Sequence[tuple[str | None, Path]]) -> Iterator[_Photo]:
    for label, path in files:
        if label is not None:
            yield _Photo(path.relative_to(root).as_posix(), label, None, partial(open, path, "rb"))


def _oxford_photos(folder: Path) -> Iterator[_Photo]:
    for name, label, split, data in oxford_pets.photos(folder):
        yield _Photo(name, label, "train" if split == "train" else "test", partial(io.BytesIO, data))


# --- decoding ---------------------------------------------------------------------------------------------------------


def _build(config: DataConfig, target: Path, digest: str, report: Progress) -> Dataset:
    findings: list[dict[str, str]] = []
    ignored = 0
    decoding = 0.0
    classes: list[str] = list(CLASSES)
    if config.source == "toycats":
        images = list(_toy_images(config, report))
    else:
        if config.source == "oxford_pets":
            archives = target.parent / "oxford-iiit-pet"
            oxford_pets.fetch(archives, lambda fraction, text: report(0.8 * fraction, text))
            decoding = 0.8  # of the whole, when decoding begins
            photos, total = _oxford_photos(archives), len(oxford_pets.read_lists(archives))
        else:
            root, classes, files = _listing(config)
            photos, total = _folder_photos(root, files), len(files)
            for path in (path for label, path in files if label is None):
                if path.suffix.lower() in IMAGE_SUFFIXES:
                    findings.append(_finding("outside", path.relative_to(root).as_posix()))
                else:
                    ignored += 1
        images, unused, skipped = _decode_all(
            photos, total, config.image_size, lambda fraction, text: report(decoding + (1 - decoding) * fraction, text)
        )
        images, repeated = _unrepeated(images)
        findings += unused + repeated
        ignored += skipped
    report(1.0, f"{len(images)} images decoded, {len(findings)} findings")

    splits = _split(images, config)
    if config.source != "toycats":
        findings += _near_duplicates(splits["train"], splits["val"] + splits["test"])
    tensors: dict[str, Tensor] = {}
    for split, members in splits.items():
        shape = (len(members), 3, config.image_size, config.image_size)
        pixels = np.stack([image.pixels for image in members]) if members else np.zeros(shape, np.uint8)
        tensors[f"{split}_images"] = torch.from_numpy(pixels)
        tensors[f"{split}_labels"] = torch.tensor([classes.index(image.label) for image in members], dtype=torch.int64)
    manifest = {
        "format": FORMAT,
        "fingerprint": digest,
        "source": config.source,
        "image_size": config.image_size,
        "split": SPLITS[config.source],
        "classes": classes,
        **{f"{split}_count": len(members) for split, members in splits.items()},
        "ignored_files": ignored,
        "findings": sorted(findings, key=lambda finding: (finding["kind"], finding["file"], finding["detail"])),
        "images": [
            {
                "name": image.name,
                "class": image.label,
                "split": split,
                "sha256": image.sha256,
                "width": image.width,
                "height": image.height,
            }
            for split, members in splits.items()
            for image in members
        ],
    }
    try:
        with atomic_path(target) as temporary:
            temporary.mkdir()
            save_file(tensors, temporary / "images.safetensors")
            write_json(temporary / "manifest.json", manifest | {"sha256": sha256_of(temporary / "images.safetensors")})
    except (OSError, SafetensorError) as error:
        size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
        raise DataError(
            f"cannot write {target}: {error}. It needs {size:,.1f} MB; free some space or set TINYCATS_HOME to "
            "a folder on another disk."
        ) from None
    dataset = _reuse(target, digest)
    if dataset is None:
        raise DataError(f"{target} reads back other than it was written. Check the disk and run again.")
    return dataset


def _decode_all(
    photos: Iterable[_Photo], total: int, size: int, report: Progress
) -> tuple[list[_Decoded], list[dict[str, str]], int]:
    """Decode each photo. Returns the images, the findings, and how many files claim in no way to be an image.

    In one thread: on two cores a second one saved a fifth of 1 s per 1,000 photos.
    """
    images: list[_Decoded] = []
    findings: list[dict[str, str]] = []
    ignored = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on odd metadata, and on 90 to 179 million pixels; more is Pillow's error
        truncated, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            for index, photo in enumerate(photos):
                if index % max(1, total // 100) == 0:
                    report(index / total, f"decoding: {index} of {total} files")
                try:
                    with photo.open() as file:
                        image = _decode(photo, file, size)
                except UnidentifiedImageError:
                    if photo.name.lower().endswith(IMAGE_SUFFIXES):
                        findings.append(_finding("corrupt", photo.name, "not an image"))
                    else:
                        ignored += 1
                    continue
                except MemoryError:
                    raise
                except Exception as error:  # Pillow's readers raise almost anything on damaged bytes
                    kind = type(error).__name__
                    reason = str(error.strerror or error) if isinstance(error, OSError) else f"{kind}: {error}"
                    findings.append(_finding("corrupt", photo.name, " ".join(reason.split()) or kind))
                    continue
                shorter = min(image.width, image.height)
                if shorter < size:
                    sides = f"{image.width}x{image.height}"
                    findings.append(_finding("too_small" if shorter * 2 < size else "small", photo.name, sides))
                if shorter * 2 >= size:
                    images.append(image)
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = truncated
    return images, findings, ignored


def _decode(photo: _Photo, file: io.BufferedReader | io.BytesIO, size: int) -> _Decoded:
    with Image.open(file, formats=PILLOW_FORMATS) as image:
        width, height = image.size
        image.draft(None, (4 * size, 4 * size))  # large JPEGs: decode at a reduced scale, seven times faster at 12 MP
        upright = ImageOps.exif_transpose(image)
        square = ImageOps.fit(_as_rgb(upright), (size, size), Image.Resampling.LANCZOS)
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    pixels = np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))
    return _Decoded(photo.name, photo.label, photo.split, sha256, width, height, pixels)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# --- copies and the split ---------------------------------------------------------------------------------------------


def _unrepeated(images: Sequence[_Decoded]) -> tuple[list[_Decoded], list[dict[str, str]]]:
    """Keep one of each set of byte-identical images (a test image first), and none where the classes differ."""
    kept: list[_Decoded] = []
    findings: list[dict[str, str]] = []
    groups: dict[str, list[_Decoded]] = {}
    for image in sorted(images, key=lambda image: (image.split == "train", image.name)):
        groups.setdefault(image.sha256, []).append(image)
    for first, *copies in groups.values():
        if any(copy.label != first.label for copy in copies):
            findings += [_finding("conflict", copy.name, f"= {first.name}") for copy in copies]
            findings.append(_finding("conflict", first.name, f"= {copies[0].name}"))
        else:
            kept.append(first)
            findings += [_finding("duplicate", copy.name, f"= {first.name}") for copy in copies]
    return kept, findings


def _split(images: Sequence[_Decoded], config: DataConfig) -> dict[Split, list[_Decoded]]:
    """Split by the source's own rule, or within each class by sha256. Ordered by class and sha256, not by file name."""
    ordered = sorted(images, key=lambda image: (image.label, image.sha256))
    train, val, test = ([image for image in ordered if image.split == split] for split in get_args(Split))
    if config.source == "folder":
        test, train = _divide(ordered, config.test_fraction)
    if config.source != "toycats":
        val, train = _divide(train, config.val_fraction)
    return {"train": train, "val": val, "test": test}


def _divide(ordered: Sequence[_Decoded], fraction: float) -> tuple[list[_Decoded], list[_Decoded]]:
    """Take the first images of each class, at least one of two and never all, and return them and the rest."""
    taken: list[_Decoded] = []
    left: list[_Decoded] = []
    for _, members in groupby(ordered, key=lambda image: image.label):
        of_class = list(members)
        count = min(max(1, round(fraction * len(of_class))), len(of_class) - 1)
        taken += of_class[:count]
        left += of_class[count:]
    return taken, left


def _near_duplicates(train: Sequence[_Decoded], test: Sequence[_Decoded]) -> list[dict[str, str]]:
    """Find held-out images of which a training image, as it is or mirrored, is nearly a copy."""
    if not train or not test:
        return []
    train_hashes, train_thumbs = _signatures(train)
    test_hashes, test_thumbs = _signatures(test)
    mirror_hashes, mirror_thumbs = _signatures(test, mirrored=True)
    nearest: dict[int, tuple[float, int]] = {}
    for hashes, thumbs in ((test_hashes, test_thumbs), (mirror_hashes, mirror_thumbs)):
        for start in range(0, len(test), 512):
            bits = (64 - hashes[start : start + 512] @ train_hashes.T) / 2
            for row, column in (bits <= NEAR_BITS).nonzero().tolist():
                distance = float((thumbs[start + row] - train_thumbs[column]).abs().mean())
                if distance <= NEAR_LEVELS:
                    found = nearest.get(start + row, (distance, column))
                    nearest[start + row] = min(found, (distance, column))
    return [
        _finding("near_duplicate", test[row].name, f"like {train[column].name}") for row, (_, column) in sorted(nearest.items())
    ]


def _signatures(images: Sequence[_Decoded], mirrored: bool = False) -> tuple[Tensor, Tensor]:
    """Return 64-bit difference hashes as -1/1 (N, 64) and thumbnails (N, 3, 16, 16), float32."""
    hashes: list[Tensor] = []
    thumbs: list[Tensor] = []
    for start in range(0, len(images), 256):
        batch = torch.from_numpy(np.stack([image.pixels for image in images[start : start + 256]])).float()
        batch = batch.flip(3) if mirrored else batch
        grey = F.adaptive_avg_pool2d(batch.mean(1, keepdim=True), (8, 9))
        hashes.append(((grey[..., 1:] > grey[..., :-1]).float() * 2 - 1).flatten(1))
        thumbs.append(F.adaptive_avg_pool2d(batch, (16, 16)))
    return torch.cat(hashes), torch.cat(thumbs)


# --- small things -----------------------------------------------------------------------------------------------------


def _reuse(target: Path, digest: str) -> Dataset | None:
    """Return the data set in `target` if it is complete and unchanged."""
    try:
        manifest = read_json(target / "manifest.json")
        if manifest["fingerprint"] != digest:
            return None
        fields = ("sha256", "source", "image_size", "classes", "train_count", "val_count", "test_count")
        dataset = Dataset(path=target / "images.safetensors", **{field: manifest[field] for field in fields})
    except (TinycatsError, OSError, KeyError, TypeError, ValueError):
        return None  # missing or damaged: it is made again
    return dataset if dataset.is_intact() else None


@contextmanager
def _alone(folder: Path, report: Progress) -> Iterator[None]:
    """Hold the folder's lock, so that two runs do not download and decode the same thing side by side."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(0.0, f"waiting for another run that prepares data in {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _finding(kind: str, file: str, detail: str = "") -> dict[str, str]:
    return {"kind": kind, "file": file, "detail": detail}


def _count(findings: Sequence[dict[str, str]], noun: str) -> str:
    return f"1 {noun} is" if len(findings) == 1 else f"{len(findings)} {noun}s are"


def _named(findings: Sequence[dict[str, str]]) -> str:
    names = [f"{item['file']} ({item['detail']})" if item["detail"] else item["file"] for item in findings]
    return _shortened(names, NAMED)


def _shortened(names: Sequence[str], limit: int) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
