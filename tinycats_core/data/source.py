"""What a source of images is: it lists, reads and splits them, and holds the words about them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, get_args

from tinycats_core.config import DataConfig
from tinycats_core.data.copies import drop_copies, find_near_duplicates
from tinycats_core.data.decode import Decoded, Finding, Photo, Progress, decode_all
from tinycats_core.data.splits import Split
from tinycats_core.errors import ConfigError

Splits = dict[Split, list[Decoded]]

MIT = """MIT License

Copyright (c) 2026 The tinycats authors

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""


class Collected(NamedTuple):
    """The images of a source at one size, and what was found wrong with its files."""

    classes: Sequence[str]  # in the order of their labels
    splits: Splits
    findings: list[Finding]
    hidden: int = 0  # files that are hidden, or that systems and programs leave beside images
    split_rule: str | None = None  # in words, if it is not the source's
    origin: dict[str, dict[str, str | None]] | None = None  # of downloaded files: what they are, and where they are from


class Source(ABC):
    """A source of labelled images. To add one: derive a class and pass an instance to `sources.register`."""

    name: str  # the value of data.source
    settings: tuple[str, ...]  # the fields of DataConfig that it reads, besides source and image_size
    split_rule: str  # in words, for the manifest
    fixed = False  # nobody can repair its files: small images and contradictory labels are left out with a warning
    known_odd: frozenset[str] = frozenset()  # names without suffix of files that may be undecodable, with a warning
    private = False  # its images are shown in no release

    licence: str  # of the weights, as the Hub spells it
    licence_name: str | None = None  # if `licence` is "other"
    licence_text: str | None = None  # for a release's LICENSE; None: `note` says what there is to say
    hub_datasets: tuple[str, ...] = ()  # the same images on the Hub
    dataset_id: str
    dataset_name: str
    note: str  # the model card's paragraph on the training data
    limits: tuple[str, ...] = ()  # further limits of a model trained on it, for the card

    @abstractmethod
    def fingerprint(self, config: DataConfig) -> dict[str, Any]:
        """Return what identifies the images without reading them, as a JSON value. Raises DataError."""

    @abstractmethod
    def collect(self, config: DataConfig, folder: Path, report: Progress) -> Collected:
        """Read and split the images. Downloads go below `folder`. Raises DataError."""

    def check(self, config: DataConfig) -> None:
        """Raise ConfigError if data.folder or data.boxes is missing, or given to a source that reads none, or cannot crop."""
        if "folder" in self.settings and config.folder is None:
            raise ConfigError(f"data.folder is missing: source={self.name} needs the folder that holds the images")
        if "folder" not in self.settings and config.folder is not None:
            raise ConfigError(f"data.folder is given but data.source is {self.name!r}: set data.source to 'folder'")
        if config.crop != "centre" and "crop" not in self.settings:
            raise ConfigError(f"data.crop is {config.crop!r}; source={self.name} only has 'centre'")
        if config.mirror is not None and "mirror" not in self.settings:
            raise ConfigError(f"data.mirror is given but data.source is {self.name!r}: set data.source to 'oxford_pets'")
        if config.mirror is not None and config.crop != "centre":
            raise ConfigError(f"data.crop is {config.crop!r}, and data.mirror holds no boxes: set data.crop to 'centre'")
        if config.boxes is not None and "boxes" not in self.settings:
            raise ConfigError(f"data.boxes is given but data.source is {self.name!r}: set data.source to 'folder'")
        if config.boxes is not None and config.crop != "subject":
            raise ConfigError(f"data.boxes is given but data.crop is {config.crop!r}: set data.crop to 'subject'")
        if config.boxes is None and config.crop == "subject" and "boxes" in self.settings:
            raise ConfigError("data.boxes is missing: data.crop 'subject' needs a CSV file with a box for each photo")


def collect_photos(
    classes: Sequence[str],
    photos: Iterable[Photo],
    total: int,
    size: int,
    split: Callable[[Sequence[Decoded]], Splits],
    report: Progress,
) -> Collected:
    """Decode photos, drop copies, split the rest, and look for near copies across the splits."""
    decoded, findings = decode_all(photos, total, size, report)
    images, repeated = drop_copies(decoded)
    splits = split(images)
    near = find_near_duplicates(splits["train"], splits["val"] + splits["test"])
    return Collected(classes, splits, findings + repeated + near)


def in_order(images: Iterable[Decoded]) -> list[Decoded]:
    """Sort images by class and sha256: file names have no influence."""
    return sorted(images, key=lambda image: (image.label, image.sha256))


def split_as_given(images: Iterable[Decoded]) -> Splits:
    """Split images as the source itself does, each split in order."""
    ordered = in_order(images)
    return {split: [image for image in ordered if image.split == split] for split in get_args(Split)}


def hold_out(ordered: Sequence[Decoded], fraction: float, at_least: int = 0) -> tuple[list[Decoded], list[Decoded]]:
    """Take the first images of each class, at least one of two and never all. Return them and the rest.

    The fraction is raised as long as fewer than `at_least` are taken, if there are twice as many images and a few more.
    """
    classes = [list(members) for _, members in groupby(ordered, key=lambda image: image.label)]

    def take(fraction: float) -> list[int]:
        return [min(max(1, round(fraction * len(members))), len(members) - 1) for members in classes]

    enough = sum(map(len, classes)) > 2 * at_least
    while enough and sum(take(fraction)) < at_least and fraction < 0.5:
        fraction += 0.01
    taken: list[Decoded] = []
    left: list[Decoded] = []
    for members, count in zip(classes, take(fraction), strict=True):
        taken += members[:count]
        left += members[count:]
    return taken, left
