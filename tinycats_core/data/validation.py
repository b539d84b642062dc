"""What would spoil a training: copies, small images, classes with too few of them."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict

from tinycats_core.config import CLASSES, DataConfig
from tinycats_core.data import oxford_pets
from tinycats_core.data.splits import Split, read_manifest
from tinycats_core.errors import NAMED, DataError, shortened
from tinycats_core.records import Dataset

MAX_IMBALANCE = 10  # largest class over smallest, in training images


class ValidationReport(BaseModel):
    """What `validate` found: a row (class, train, val, test) for each class, and what deserves a look but stops nothing."""

    model_config = ConfigDict(frozen=True)

    rows: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...]


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
            f"{how_many(unknown, 'file')} not decodable: {_named(unknown)}. "
            "Remove or replace them, or set data.corrupt_files to 'skip'."
        )
    left_out = known + (unknown if skip else [])
    if left_out:
        notes.append(f"{how_many(left_out, 'file')} not decodable and left out: {_named(left_out)}.")
    if tiny := found.get("too_small"):
        text = f"{how_many(tiny, 'image')} smaller than half of data.image_size {dataset.image_size}"
        if skip or pinned:
            notes.append(f"{text} and left out: {_named(tiny)}.")
        else:
            problems.append(f"{text}: {_named(tiny)}. Lower data.image_size, remove them, or set data.corrupt_files to 'skip'.")
    if conflicts := found.get("conflict"):
        text = f"{how_many(conflicts, 'file')} the same image as one of another class"
        if pinned:
            notes.append(f"{text} and left out: {_named(conflicts)}.")
        else:
            problems.append(f"{text}: {_named(conflicts)}. Keep each image in the class where it belongs.")

    counts = Counter((row["class"], row["split"]) for row in manifest["images"])
    rows = tuple({"class": name, **{split: counts[name, split] for split in get_args(Split)}} for name in dataset.classes)
    if thin := [row for row in rows if not row["train"] or not row["test"]]:
        names = shortened([f"{row['class']} {row['train']} and {row['test']}" for row in thin], NAMED)
        problems.append(
            f"too few usable images to train on and to test on in {len(thin)} of {len(rows)} classes ({names}); "
            "at least 1 and 1 are needed. Add images or remove the class."
        )
    if len(dataset.classes) != num_classes:
        problems.append(
            f"the data has {len(dataset.classes)} classes ({shortened(dataset.classes, len(CLASSES))}) but "
            f"model.num_classes is {num_classes}; set model.num_classes to {len(dataset.classes)}."
        )
    if problems:
        raise DataError(" ".join(problems))

    if copies := found.get("duplicate"):
        notes.append(f"{how_many(copies, 'file')} an exact copy of another and left out: {_named(copies)}.")
    if near := found.get("near_duplicate"):
        notes.append(f"{how_many(near, 'held-out image')} nearly the same as a training image: {_named(near)}.")
    if small := found.get("small"):
        size = dataset.image_size
        notes.append(f"{how_many(small, 'image')} smaller than data.image_size {size} and enlarged: {_named(small)}.")
    if outside := found.get("outside"):
        notes.append(f"{how_many(outside, 'image')} outside the class folders and left out: {_named(outside)}.")
    largest, smallest = max(rows, key=lambda row: row["train"]), min(rows, key=lambda row: row["train"])
    if (ratio := largest["train"] / smallest["train"]) > MAX_IMBALANCE:
        notes.append(
            f"class {largest['class']!r} has {largest['train']} training images, {smallest['class']!r} has "
            f"{smallest['train']}: {ratio:.0f} times as many. Expect less of the rare classes."
        )
    return ValidationReport(rows=rows, warnings=tuple(notes))


def how_many(findings: Sequence[dict[str, str]], noun: str) -> str:
    return f"1 {noun} is" if len(findings) == 1 else f"{len(findings)} {noun}s are"


def _named(findings: Sequence[dict[str, str]]) -> str:
    names = [f"{item['file']} ({item['detail']})" if item["detail"] else item["file"] for item in findings]
    return shortened(names, NAMED)
