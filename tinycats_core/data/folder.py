"""The source `folder`: a person's own photos."""

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tinycats_core.config import MIN_IMAGES, DataConfig
from tinycats_core.data.boxes import read_boxes
from tinycats_core.data.crop import Box
from tinycats_core.data.decode import Decoded, Finding, Photo, Progress, make_finding, readable_formats
from tinycats_core.data.formats import NO_PHOTO
from tinycats_core.data.layout import ListedFile, Listing, is_photo, list_folder
from tinycats_core.data.source import Collected, Source, Splits, collect_photos, hold_out, in_order
from tinycats_core.data.splits import Split


class Folder(Source):
    """The photos below data.folder; `layout` says which folders are classes."""

    name = "folder"
    settings = ("folder", "layout", "crop", "boxes", "test_fraction", "val_fraction")
    split_rule = f"by sha256 within each class; a larger part for the test split if it had fewer than {MIN_IMAGES} images"
    private = True
    licence = "other"
    licence_name = "as-the-photos-allow"
    dataset_id = "imagefolder"
    dataset_name = "Your own photos"
    note = (
        "It was trained on a folder of your own photos. They bring their own licences: whoever shares this model must make "
        "sure that those allow it."
    )

    def fingerprint(self, config: DataConfig) -> dict[str, Any]:
        listing = list_folder(config)
        files = {file.name: [file.label, file.split, *_state(file.path)] for file in listing.files}
        fractions = {"test_fraction": config.test_fraction, "val_fraction": config.val_fraction}
        crop = {"crop": config.crop, "boxes": _boxes(config, listing)}
        return {"formats": readable_formats(), "classes": listing.classes, "files": files, **fractions, **crop}

    def collect(self, config: DataConfig, folder: Path, report: Progress) -> Collected:
        listing = list_folder(config)
        inside = [file for file in listing.files if file.label is not None]
        reasons = {file.name: reason for file in inside if (reason := _unreadable(file.path))}
        readable = [file for file in inside if file.name not in reasons]
        found = collect_photos(
            listing.classes,
            _photos(readable, _boxes(config, listing)),
            len(readable),
            config.image_size,
            lambda images: split_by_folders(images, listing.splits, config),
            report,
        )
        labels = {file.name: file.label or "" for file in inside}
        findings = [make_finding("unreadable", name, reason, labels[name]) for name, reason in reasons.items()]
        return found._replace(
            findings=[*findings, *_outside(listing), *found.findings],
            hidden=listing.hidden,
            split_rule="by the folders" if listing.splits else None,
        )


def split_by_folders(images: Sequence[Decoded], given: set[Split], config: DataConfig) -> Splits:
    """Split images as their folders say; a split that has no folder is taken from the training images by sha256."""
    ordered = in_order(images)
    val, test = ([image for image in ordered if image.split == split] for split in ("val", "test"))
    train = [image for image in ordered if image.split not in ("val", "test")]
    if "test" not in given:
        test, train = hold_out(train, config.test_fraction, MIN_IMAGES)
    if "val" not in given:
        val, train = hold_out(train, config.val_fraction)
    return {"train": train, "val": val, "test": test}


def _boxes(config: DataConfig, listing: Listing) -> dict[str, Box] | None:
    """Return the box of each photo that has one; None if the central squares are wanted. Raises DataError."""
    return read_boxes(config.boxes, [file.name for file in listing.files]) if config.boxes else None


def _photos(files: Sequence[ListedFile], boxes: Mapping[str, Box] | None) -> Iterator[Photo]:
    for file in files:
        assert file.label is not None
        subject = None if boxes is None else (boxes[file.name],) if file.name in boxes else ()
        yield Photo(file.name, file.label, file.split, partial(open, file.path, "rb"), subject)


def _outside(listing: Listing) -> list[Finding]:
    """Return a finding for each file that is in no class folder."""
    outside = [file for file in listing.files if file.label is None]
    return [make_finding("outside", file.name, "" if is_photo(file.path) else NO_PHOTO) for file in outside]


def _state(path: Path) -> list[Any]:
    """Return what tells that a file has changed, or that it can be read now."""
    try:
        state = path.stat()
    except OSError:
        state = path.lstat()  # a broken link
    return [state.st_size, state.st_mtime_ns, _unreadable(path)]


def _unreadable(path: Path) -> str | None:
    """Return why a file cannot be read, None if it can."""
    effective = os.access in os.supports_effective_ids
    if os.access(path, os.R_OK, effective_ids=effective):
        return None
    return os.strerror(errno.EACCES if path.exists() else errno.ENOENT)
