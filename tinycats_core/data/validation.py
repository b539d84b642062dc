"""Checks of a prepared data set: unusable and small images, copies, classes with too few images."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict

from tinycats_core.config import DataConfig
from tinycats_core.data import sources
from tinycats_core.data.decode import Finding
from tinycats_core.data.formats import NO_PHOTO, REMEDIES
from tinycats_core.data.preparation import FINDINGS
from tinycats_core.data.splits import Split, read_manifest
from tinycats_core.errors import NAMED, DataError, shortened
from tinycats_core.records import Dataset

MAX_IMBALANCE = 10  # largest class over smallest, in training images
LEFT_OUT = {  # the column of the table in which a file is counted, by the kind of its finding
    "duplicate": "copies",
    "conflict": "copies",
    "corrupt": "unreadable",
    "unreadable": "unreadable",
    "too_large": "unreadable",
    "too_small": "too small",
    "unread": "unread format",
}
COLUMNS = tuple(dict.fromkeys(LEFT_OUT.values()))
REPAIR = "Remove or replace them, or set data.corrupt_files to 'skip'."


class ValidationReport(BaseModel):
    """What became of the files: a row for each class, the files in no class, the hidden ones, and the warnings.

    A row holds class, found, used, one count for each of COLUMNS, and train, val and test. `used` and COLUMNS add up to
    `found`, and `found`, `outside` and `hidden` to the files seen.
    """

    model_config = ConfigDict(frozen=True)

    rows: tuple[dict[str, Any], ...]
    outside: int
    hidden: int
    warnings: tuple[str, ...]
    findings: Path | None  # the table of all findings; None if there are none


def validate(dataset: Dataset, data: DataConfig) -> ValidationReport:
    """Check whether a model should be trained on the data set.

    Fails on undecodable images and photos of formats that are not read, images that would be enlarged more than twice, which
    teaches blur, the same picture in two classes, boxes outside of their photos, and a class with no image to train on or to
    test on. Warns of copies, held-out images that are nearly copies of training images, enlarged images, imbalance, files that
    are no photos, photos outside the class folders, photos without a box, and archives that were packed anew.

    With data.corrupt_files=skip, unusable files are only warned of; they are left out in any case. So are those of a source
    whose files are fixed.

    Raises:
        DataError: names the files or classes and what to do, all problems in one line, and the file that lists all of them.
    """
    manifest = read_manifest(dataset)
    found: dict[str, list[Finding]] = defaultdict(list)
    for finding in manifest["findings"]:
        found[finding["kind"]].append(finding)
    rows = _rows(dataset, manifest)
    problems, warnings = _unusable(found, dataset, data.corrupt_files == "skip")
    problems += _thin_classes(rows)
    listed = dataset.path.with_name(FINDINGS) if manifest["findings"] else None
    if problems:
        raise DataError(" ".join([*problems, f"All findings: {listed}"] if listed else problems))
    warnings += [*_usable_but_odd(found, dataset.image_size), *_imbalance(rows)]
    return ValidationReport(
        rows=rows,
        outside=len(found["outside"]),
        hidden=manifest.get("hidden_files", 0),
        warnings=tuple(warnings),
        findings=listed,
    )


def _rows(dataset: Dataset, manifest: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    splits = Counter((row["class"], row["split"]) for row in manifest["images"])
    left_out = Counter((item.get("class"), LEFT_OUT[item["kind"]]) for item in manifest["findings"] if item["kind"] in LEFT_OUT)
    rows: list[dict[str, Any]] = []
    for name in dataset.classes:
        counts = {split: splits[name, split] for split in get_args(Split)}
        reasons = {column: left_out[name, column] for column in COLUMNS}
        used = sum(counts.values())
        rows.append({"class": name, "found": used + sum(reasons.values()), "used": used, **reasons, **counts})
    return tuple(rows)


def _unusable(found: Mapping[str, list[Finding]], dataset: Dataset, skip: bool) -> tuple[list[str], list[str]]:
    """Return the problems and the warnings about files that were left out."""
    source = sources.find(dataset.source)
    problems: list[str] = []
    warnings: list[str] = []

    def tell(findings: Sequence[Finding], noun: str, what: str, excused: bool, remedy: str = REPAIR) -> None:
        if findings:
            subject = f"{_how_many(findings, noun)} {what}"
            line = f"{subject} and left out: {_named(findings)}." if excused else f"{subject}: {_named(findings)}. {remedy}"
            (warnings if excused else problems).append(line)

    excused = [item for item in found["corrupt"] if skip or Path(item["file"]).stem in source.known_odd]
    tell([item for item in found["corrupt"] if item not in excused], "file", "not decodable", False)
    tell(excused, "file", "not decodable", True)
    remedy = "Give yourself the right to read them, mend the links, or set data.corrupt_files to 'skip'."
    tell(found["unreadable"], "file", "not readable", skip, remedy)
    tell(found["too_large"], "image", "over the limit of pixels", skip, "Scale them down, or set data.corrupt_files to 'skip'.")
    small = f"smaller than half of data.image_size {dataset.image_size}"
    remedy = "Lower data.image_size, remove them, or set data.corrupt_files to 'skip'."
    tell(found["too_small"], "image", small, skip or source.fixed, remedy)
    remedy = "Keep each image in the class where it belongs."
    tell(found["conflict"], "file", "the same image as one of another class", source.fixed, remedy)
    remedy = "Correct data.boxes, or set data.corrupt_files to 'skip', which cuts these photos at the centre."
    tell(found["bad_box"], "box", "unusable", skip or source.fixed, remedy)
    _tell_unread(found["unread"], skip or source.fixed, problems, warnings)
    return problems, warnings


def _tell_unread(findings: Sequence[Finding], excused: bool, problems: list[str], warnings: list[str]) -> None:
    """Name the files of formats that are not read by suffix and count: photos with the remedy, and others."""
    photos = [item for item in findings if item["detail"] in REMEDIES]
    others = [item for item in findings if item["detail"] not in REMEDIES]
    if photos:
        kinds = dict.fromkeys(item["detail"] for item in photos)
        remedy = "; ".join(REMEDIES[kind] for kind in kinds)
        line = f"{_how_many(photos, 'file')} of formats that are not read and left out: {_by_suffix(photos)}."
        line += f" {remedy[:1].upper()}{remedy[1:]}{'' if excused else ', or set data.corrupt_files to ' + repr('skip')}."
        (warnings if excused else problems).append(line)
    if others:
        warnings.append(f"{_how_many(others, 'file')} no photo and left out: {_by_suffix(others)}.")


def _by_suffix(findings: Sequence[Finding]) -> str:
    def kind(item: Finding) -> str:
        suffix = PurePath(item["file"]).suffix.lower() or "without suffix"
        return suffix if item["detail"] == NO_PHOTO else f"{suffix} ({item['detail']})"

    counts = Counter(map(kind, findings))
    return shortened([f"{count} {name}" for name, count in counts.most_common()], NAMED)


def _thin_classes(rows: Sequence[dict[str, Any]]) -> list[str]:
    thin = [row for row in rows if not row["train"] or not row["test"]]
    if not thin:
        return []
    names = shortened([_why_thin(row) for row in thin], NAMED)
    return [
        f"too few usable images to train on and to test on in {len(thin)} of {len(rows)} classes ({names}); "
        "at least 1 and 1 are needed. Add images or remove the class."
    ]


def _why_thin(row: Mapping[str, Any]) -> str:
    """Say how many images of a class are for training and for the test, and what became of its other files."""
    lost = [f"{row[column]} {column}" for column in COLUMNS if row[column]]
    of = f" of {row['found']} file{'s' if row['found'] > 1 else ''}: {', '.join(lost)}" if lost else ""
    return f"{row['class']} {row['train']} and {row['test']}{of}"


def _usable_but_odd(found: Mapping[str, list[Finding]], size: int) -> list[str]:
    kinds = {
        "duplicate": ("file", "a copy of another, or the same picture encoded again, and left out"),
        "near_duplicate": (
            "held-out image",
            "nearly the same as a training image (remove one of the two, or the figures look too good)",
        ),
        "small": ("image", f"smaller than data.image_size {size} and enlarged"),
        "outside": ("image", "outside the class folders and left out"),
        "repacked": ("archive or mirror", "not the official one, but has as many photos, and was taken for it"),
        "no_box": ("photo", "without a box and cut at the centre"),
    }
    present = [([item for item in found[kind] if item["detail"] != NO_PHOTO], *words) for kind, words in kinds.items()]
    return [f"{_how_many(findings, noun)} {what}: {_named(findings)}." for findings, noun, what in present if findings]


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
    plural = "boxes" if noun == "box" else f"{noun}s"
    return f"1 {noun} is" if len(findings) == 1 else f"{len(findings)} {plural} are"


def _named(findings: Sequence[Finding]) -> str:
    names = [f"{item['file']} ({item['detail']})" if item["detail"] else item["file"] for item in findings]
    return shortened(names, NAMED)
