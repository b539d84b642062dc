"""Preparing a source: its images are decoded once into one file of uint8 tensors, and a manifest lists them and the findings."""

import csv
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tinycats_core.config import DataConfig
from tinycats_core.data import sources
from tinycats_core.data.decode import Finding, Progress
from tinycats_core.data.source import Collected, Source
from tinycats_core.errors import DataError, TinycatsError
from tinycats_core.files import atomic_path, check_writable, digest_of, read_json, sha256_of, write_json
from tinycats_core.records import Dataset
from tinycats_core.source_code import code_of

FORMAT = 2  # of manifest.json
IMAGES, FINDINGS, MANIFEST = "images.safetensors", "findings.csv", "manifest.json"


def fingerprint(config: DataConfig) -> str:
    """Return a digest of what `prepare` would read, without reading the images: it changes when they do.

    Raises:
        ConfigError: the source is unknown, or does not go with data.folder.
        DataError: data.folder does not exist, is a file, cannot be read, or its layout does not tell the classes.
    """
    source = sources.find(config.source)
    source.check(config)
    reads = {"code": code_of(_build).digest, "source": config.source, "image_size": config.image_size, **source.fingerprint(config)}
    return digest_of(reads)


def prepare(config: DataConfig, folder: Path, on_progress: Progress | None = None) -> Dataset:
    """Decode the source into <folder>/<fingerprint[:12]>/{images.safetensors, manifest.json}, or reuse what is there.

    Images are turned upright (EXIF), laid over white where transparent, cut to a square (data.crop says which) and resized with
    antialiasing, in sRGB. Unusable files are left out and recorded as findings, which `validate` judges, in the manifest and in
    findings.csv: every file is used, or has a finding, or is counted as hidden. The same input gives the same bytes. Downloads
    for oxford_pets lie in <folder>/oxford-iiit-pet.

    If neither the source nor the folders have a split, the images of each class with the lowest sha256 become `test`
    (data.test_fraction of them) and the next `val` (data.val_fraction of the rest), at least one each; a class of two images
    has none in `val`.

    Raises:
        ConfigError: the source is unknown, or does not go with data.folder.
        DataError: the source cannot be read, or a file of it at the moment, or the result cannot be written.
    """
    digest = fingerprint(config)
    target = folder / digest[:12]
    report = on_progress or (lambda fraction, text: None)
    if found := _reuse(target, digest):
        return found
    check_writable(folder)
    with _alone(folder, report):
        for stale in folder.glob(".*.tmp"):  # of a killed run: every run holds the lock while it writes
            shutil.rmtree(stale)
        return _reuse(target, digest) or _build(config, target, digest, report)


def _build(config: DataConfig, target: Path, digest: str, report: Progress) -> Dataset:
    source = sources.find(config.source)
    found = source.collect(config, target.parent, report)
    report(1.0, f"{sum(map(len, found.splits.values()))} images decoded, {len(found.findings)} findings")
    tensors = _tensors(found, config.image_size)
    manifest = _manifest(found, source, config, digest)
    try:
        with atomic_path(target) as temporary:
            temporary.mkdir()
            save_file(tensors, temporary / IMAGES)
            manifest["sha256"] = sha256_of(temporary / IMAGES)
            if manifest["findings"]:
                _write_findings(temporary / FINDINGS, manifest["findings"])
            write_json(temporary / MANIFEST, manifest)
    except (OSError, SafetensorError) as error:
        size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
        raise DataError(
            f"cannot write {target}: {error}. It needs {size:,.1f} MB; free some space or set TINYCATS_HOME to "
            "a folder on another disk."
        ) from None
    return _record(target, manifest)


def _tensors(found: Collected, size: int) -> dict[str, Tensor]:
    """Return the images, uint8 (N, 3, size, size), and the labels, int64 (N,), of each split."""
    labels = {name: label for label, name in enumerate(found.classes)}
    tensors: dict[str, Tensor] = {}
    for split, members in found.splits.items():
        pixels = np.stack([image.pixels for image in members]) if members else np.zeros((0, 3, size, size), np.uint8)
        tensors[f"{split}_images"] = torch.from_numpy(pixels)
        tensors[f"{split}_labels"] = torch.tensor([labels[image.label] for image in members], dtype=torch.int64)
    return tensors


def _manifest(found: Collected, source: Source, config: DataConfig, digest: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "fingerprint": digest,
        "source": source.name,
        "folder": config.folder and str(config.folder),
        "image_size": config.image_size,
        "crop": config.crop,
        "boxes": config.boxes and str(config.boxes),
        "origin": found.origin,
        "photos_sha256": digest_of({image.name: image.sha256 for members in found.splits.values() for image in members}),
        "split": found.split_rule or source.split_rule,
        "classes": list(found.classes),
        **{f"{split}_count": len(members) for split, members in found.splits.items()},
        "hidden_files": found.hidden,
        "findings": sorted(found.findings, key=lambda finding: (finding["kind"], finding["file"], finding["detail"])),
        "images": [
            {
                "name": image.name,
                "class": image.label,
                "split": split,
                "sha256": image.sha256,
                "width": image.width,
                "height": image.height,
            }
            for split, members in found.splits.items()
            for image in members
        ],
    }


def _write_findings(path: Path, findings: Sequence[Finding]) -> None:
    """Write a row for each finding, for a spreadsheet."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["kind", "file", "class", "detail"])
        writer.writeheader()
        writer.writerows(findings)


def _record(target: Path, manifest: dict[str, Any]) -> Dataset:
    fields = ("sha256", "source", "image_size", "classes", "train_count", "val_count", "test_count")
    return Dataset(path=target / IMAGES, **{field: manifest[field] for field in fields})


def _reuse(target: Path, digest: str) -> Dataset | None:
    """Return the data set in `target` if it is complete and unchanged."""
    try:
        manifest = read_json(target / MANIFEST)
        if manifest["fingerprint"] != digest:
            return None
        dataset = _record(target, manifest)
    except (TinycatsError, OSError, KeyError, TypeError, ValueError):
        return None  # missing or damaged: prepare it again
    return dataset if dataset.is_intact() else None


def find_places(sha256: str, folder: Path) -> dict[str, Path]:
    """Return data.folder and data.boxes from which a data set below `folder` was prepared, as far as they are known and exist."""
    for path in sorted(folder.glob(f"*/{MANIFEST}")):
        with suppress(TinycatsError, OSError, AttributeError):
            manifest = read_json(path)
            places = {name: Path(manifest[name]) for name in ("folder", "boxes") if manifest.get(name)}
            if manifest.get("sha256") == sha256 and places and all(place.exists() for place in places.values()):
                return places
    return {}


@contextmanager
def _alone(folder: Path, report: Progress) -> Iterator[None]:
    """Hold the folder's lock, so that two runs do not download and decode the same images at once."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report(0.0, f"waiting for another run that prepares data in {folder}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
