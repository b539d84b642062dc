"""The source `oxford_pets`, Oxford-IIIT Pet.

Source: Parkhi, Vedaldi, Zisserman, Jawahar, "Cats and Dogs", CVPR 2012; https://www.robots.ox.ac.uk/~vgg/data/pets/
"""

import io
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tinycats_core.config import CLASSES, DataConfig
from tinycats_core.data.decode import Decoded, Finding, Photo, Progress, make_finding
from tinycats_core.data.oxford_archives import ANNOTATIONS, ARCHIVES, PHOTOS, fetch, photos, read_boxes, read_lists
from tinycats_core.data.parquet_mirror import fetch_mirror, mirror_photos
from tinycats_core.data.source import Collected, Source, Splits, collect_photos, hold_out, split_as_given

# The photos in the official archive that are a PNG or GIF named .jpg, or carry stray bytes (the list of
# tensorflow_datasets). Pillow reads them; where a build of it does not, they are left out with a warning.
KNOWN_ODD = frozenset(
    {"beagle_116", "chihuahua_121", "Abyssinian_5", "Abyssinian_34"}
    | {f"Egyptian_Mau_{number}" for number in (14, 139, 145, 156, 167, 177, 186, 191)}
)


class OxfordPets(Source):
    """The cats of Oxford-IIIT Pet, with its dogs as the class `other`."""

    name = "oxford_pets"
    settings = ("crop", "mirror", "val_fraction")
    split_rule = "official lists; val by sha256 within each class of trainval"
    fixed = True  # nobody can repair the archives
    known_odd = KNOWN_ODD
    licence = "cc-by-sa-4.0"
    licence_text = (
        "Creative Commons Attribution-ShareAlike 4.0 International: https://creativecommons.org/licenses/by-sa/4.0/legalcode"
    )
    hub_datasets = ("timm/oxford-iiit-pet",)
    dataset_id = "oxford-iiit-pet"
    dataset_name = "Oxford-IIIT Pet"
    note = (
        "It was trained on the cats of the [Oxford-IIIT Pet dataset](https://www.robots.ox.ac.uk/~vgg/data/pets/), with its "
        "dogs as the class `other`. The photos are under CC BY-SA 4.0 and belong to their owners; the weights are given under the "
        "same licence. Please cite: O. M. Parkhi, A. Vedaldi, A. Zisserman, C. V. Jawahar, *Cats and Dogs*, CVPR 2012."
    )

    def fingerprint(self, config: DataConfig) -> dict[str, Any]:
        return {"archives": ARCHIVES, "val_fraction": config.val_fraction, "crop": config.crop, "mirror": config.mirror}

    def collect(self, config: DataConfig, folder: Path, report: Progress) -> Collected:
        downloading = 0.8  # of the whole
        read = _read_archives if config.mirror is None else _read_mirror
        found = read(config, folder, lambda fraction, text: report(downloading * fraction, text))
        collected = collect_photos(
            CLASSES,
            found.photos,
            found.count,
            config.image_size,
            partial(_split, val_fraction=config.val_fraction),
            lambda fraction, text: report(downloading + (1 - downloading) * fraction, text),
        )
        return collected._replace(findings=[*found.findings, *collected.findings], origin=found.origin)


class Found(NamedTuple):
    """The photos of a place, how many they are, what is wrong with it, and what it is."""

    photos: Iterator[Photo]
    count: int
    findings: list[Finding]
    origin: dict[str, dict[str, str | None]]


def _split(images: Sequence[Decoded], val_fraction: float) -> Splits:
    given = split_as_given(images)
    val, train = hold_out(given["train"], val_fraction)
    return {"train": train, "val": val, "test": given["test"]}


def _read_archives(config: DataConfig, folder: Path, report: Progress) -> Found:
    home = folder / "oxford-iiit-pet"
    archives = fetch(home, report)
    listed = read_lists(home / ANNOTATIONS)
    boxes, findings = read_boxes(home / ANNOTATIONS, listed) if config.crop == "subject" else (None, [])
    found = (
        Photo(name, label, split, partial(io.BytesIO, data), None if boxes is None else boxes.get(Path(name).stem, ()))
        for name, label, split, data in photos(home, listed)
    )
    findings += [make_finding("repacked", archive.name, f"md5 {archive.md5}") for archive in archives if not archive.is_official]
    return Found(found, len(listed), findings, {archive.name: {"md5": archive.md5, "from": archive.url} for archive in archives})


def _read_mirror(config: DataConfig, folder: Path, report: Progress) -> Found:
    assert config.mirror is not None
    report(0.0, f"downloading {config.mirror} from the Hub")
    mirror = fetch_mirror(config.mirror, folder / "oxford-iiit-pet" / "hub")
    found = (
        Photo(name, label, split, partial(io.BytesIO, data)) for name, label, split, data in mirror_photos(mirror, config.mirror)
    )
    warning = make_finding("repacked", config.mirror, f"commit {mirror.commit[:12]}")
    return Found(found, sum(PHOTOS.values()), [warning], {config.mirror: {"commit": mirror.commit, "from": "the Hub"}})
