"""Checks of a prepared data set: undecodable and small images, copies, classes with too few images."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict

from tinycats_core.config import DataConfig
from tinycats_core.data import sources
from tinycats_core.data.splits import Split, read_manifest
from tinycats_core.errors import NAMED, DataError, shortened
from tinycats_core.records import Dataset

Finding = dict[str, str]  # kind, file, detail
MAX_IMBALANCE = 10  # largest class over smallest, in training images
CLASSES_NAMED = 13  # in a message


class ValidationReport(BaseModel):
    """A row of counts (class, train, val, test) for each class, and the warnings."""

    model_config = ConfigDict(frozen=True)

    rows: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...]


def validate(dataset: Dataset, data: DataConfig, num_classes: int) -> ValidationReport:
    """Check whether a model of `num_classes` classes should be trained on the data set.

    Fails on undecodable images, images that would be enlarged more than twice, which teaches blur, the same image in two
    classes, a class with no image to train on or to test on, and another number of classes. Warns of exact copies, held-out
    images that are nearly copies of training images, enlarged images, imbalance, and images outside the class folders.

    With data.corrupt_files=skip, undecodable and small images are only warned of; they are left out in any case. So are all
    unusable images of a source whose files are fixed.

    Raises:
        DataError: names the files or classes and what to do, all problems in one line.
    """
    manifest = read_manifest(dataset)
    found: dict[str, list[Finding]] = defaultdict(list)
    for finding in manifest["findings"]:
        found[finding["kind"]].append(finding)
    counts = Counter((row["class"], row["split"]) for row in manifest["images"])
    rows = tuple({"class": name, **{split: counts[name, split] for split in get_args(Split)}} for name in dataset.classes)
    problems, warnings = _unusable(found, dataset, data.corrupt_files == "skip")
    problems += _class_problems(rows, num_classes)
    if problems:
        raise DataError(" ".join(problems))
    return ValidationReport(rows=rows, warnings=(*warnings, *_usable_but_odd(found, dataset.image_size), *_imbalance(rows)))


def _unusable(found: Mapping[str, list[Finding]], dataset: Dataset, skip: bool) -> tuple[list[str], list[str]]:
    """Return the problems and the warnings about files that were left out."""
    source = sources.find(dataset.source)
    problems: list[str] = []
    warnings: list[str] = []

    def tell(findings: list[Finding], noun: str, what: str, excused: bool, remedy: str = "") -> None:
        if findings:
            subject = f"{_how_many(findings, noun)} {what}"
            line = f"{subject} and left out: {_named(findings)}." if excused else f"{subject}: {_named(findings)}. {remedy}"
            (warnings if excused else problems).append(line)

    excused = [item for item in found["corrupt"] if skip or Path(item["file"]).stem in source.known_odd]
    others = [item for item in found["corrupt"] if item not in excused]
    tell(others, "file", "not decodable", False, "Remove or replace them, or set data.corrupt_files to 'skip'.")
    tell(excused, "file", "not decodable", True)
    tell(
        found["too_small"],
        "image",
        f"smaller than half of data.image_size {dataset.image_size}",
        skip or source.fixed,
        "Lower data.image_size, remove them, or set data.corrupt_files to 'skip'.",
    )
    remedy = "Keep each image in the class where it belongs."
    tell(found["conflict"], "file", "the same image as one of another class", source.fixed, remedy)
    return problems, warnings


def _class_problems(rows: Sequence[dict[str, Any]], num_classes: int) -> list[str]:
    problems: list[str] = []
    if thin := [row for row in rows if not row["train"] or not row["test"]]:
        names = shortened([f"{row['class']} {row['train']} and {row['test']}" for row in thin], NAMED)
        problems.append(
            f"too few usable images to train on and to test on in {len(thin)} of {len(rows)} classes ({names}); "
            "at least 1 and 1 are needed. Add images or remove the class."
        )
    if len(rows) != num_classes:
        names = shortened([row["class"] for row in rows], CLASSES_NAMED)
        problems.append(
            f"the data has {len(rows)} classes ({names}) but "
            f"model.num_classes is {num_classes}; set model.num_classes to {len(rows)}."
        )
    return problems


def _usable_but_odd(found: Mapping[str, list[Finding]], size: int) -> list[str]:
    kinds = {
        "duplicate": ("file", "an exact copy of another and left out"),
        "near_duplicate": ("held-out image", "nearly the same as a training image"),
        "small": ("image", f"smaller than data.image_size {size} and enlarged"),
        "outside": ("image", "outside the class folders and left out"),
    }
    present = [(found[kind], *words) for kind, words in kinds.items() if found[kind]]
    return [f"{_how_many(findings, noun)} {what}: {_named(findings)}." for findings, noun, what in present]


def _imbalance(rows: Sequence[dict[str, Any]]) -> list[str]:
    largest, smallest = max(rows, key=lambda row: row["train"]), min(rows, key=lambda row: row["train"])
    ratio = largest["train"] / smallest["train"]
    if ratio <= MAX_IMBALANCE:
        return []
    return [
        f"class {largest['class']!r} has {largest['train']} training images, {smallest['class']!r} has "
        f"{smallest['train']}: {ratio:.0f} times as many. Expect less of the rare classes."
    ]


def _how_many(findings: Sequence[Finding], noun: str) -> str:
    return f"1 {noun} is" if len(findings) == 1 else f"{len(findings)} {noun}s are"


def _named(findings: Sequence[Finding]) -> str:
    names = [f"{item['file']} ({item['detail']})" if item["detail"] else item["file"] for item in findings]
    return shortened(names, NAMED)
