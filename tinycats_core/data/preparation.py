"""Three sources of labelled images behind one interface: drawn toy cats, a folder of images, Oxford-IIIT Pet.

`prepare` decodes a source once into one file of uint8 tensors and a manifest that names every image and every finding;
`validate` reads the manifest and says whether a model should be trained on it; `load_split` hands out the tensors.
"""

import fcntl
import hashlib
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tinycats_core.config import CLASSES, DataConfig
from tinycats_core.data import oxford_pets, toycats
from tinycats_core.data.copies import drop_copies, find_near_duplicates, split_images
from tinycats_core.data.decode import IMAGE_SUFFIXES, Decoded, Photo, Progress, decode_all, make_finding
from tinycats_core.data.folder import folder_photos, list_folder
from tinycats_core.data.splits import Split
from tinycats_core.errors import DataError, TinycatsError
from tinycats_core.files import atomic_path, check_writable, digest_of, read_json, sha256_of, write_json
from tinycats_core.records import Dataset

FORMAT = 2  # bumped when what prepare makes of the same input changes
SPLITS = {
    "toycats": "three seeds",
    "folder": "by sha256 within each class",
    "oxford_pets": "official lists; val by sha256 within each class of trainval",
}


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
        root, classes, listed = list_folder(config)
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


def _toy_images(config: DataConfig, report: Progress) -> Iterator[Decoded]:
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
            yield Decoded(name, CLASSES[label], split, sha256, config.image_size, config.image_size, pixels)


def _oxford_photos(folder: Path) -> Iterator[Photo]:
    for name, label, split, data in oxford_pets.photos(folder):
        yield Photo(name, label, "train" if split == "train" else "test", partial(io.BytesIO, data))


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
            root, classes, files = list_folder(config)
            photos, total = folder_photos(root, files), len(files)
            for path in (path for label, path in files if label is None):
                if path.suffix.lower() in IMAGE_SUFFIXES:
                    findings.append(make_finding("outside", path.relative_to(root).as_posix()))
                else:
                    ignored += 1
        images, unused, skipped = decode_all(
            photos, total, config.image_size, lambda fraction, text: report(decoding + (1 - decoding) * fraction, text)
        )
        images, repeated = drop_copies(images)
        findings += unused + repeated
        ignored += skipped
    report(1.0, f"{len(images)} images decoded, {len(findings)} findings")

    splits = split_images(images, config)
    if config.source != "toycats":
        findings += find_near_duplicates(splits["train"], splits["val"] + splits["test"])
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
