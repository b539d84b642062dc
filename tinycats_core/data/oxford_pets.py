"""The source `oxford_pets`, Oxford-IIIT Pet.

Source: Parkhi, Vedaldi, Zisserman, Jawahar, "Cats and Dogs", CVPR 2012; https://www.robots.ox.ac.uk/~vgg/data/pets/
"""

import io
from collections.abc import Sequence
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any

from tinycats_core.config import CLASSES, DataConfig
from tinycats_core.data.decode import Decoded, Photo, Progress, make_finding
from tinycats_core.data.oxford_archives import ANNOTATIONS, ARCHIVES, fetch, photos, read_boxes, read_lists
from tinycats_core.data.source import Collected, Source, Splits, collect_photos, hold_out, split_as_given
from tinycats_core.data.splits import Split

# The photos in the official archive that are a PNG or GIF named .jpg, or carry stray bytes (the list of
# tensorflow_datasets). Pillow reads them; where a build of it does not, they are left out with a warning.
KNOWN_ODD = frozenset(
    {"beagle_116", "chihuahua_121", "Abyssinian_5", "Abyssinian_34"}
    | {f"Egyptian_Mau_{number}" for number in (14, 139, 145, 156, 167, 177, 186, 191)}
)


class OxfordPets(Source):
    """The cats of Oxford-IIIT Pet, with its dogs as the class `other`."""

    name = "oxford_pets"
    settings = ("crop", "val_fraction")
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
        return {"archives": ARCHIVES, "val_fraction": config.val_fraction, "crop": config.crop}

    def collect(self, config: DataConfig, folder: Path, report: Progress) -> Collected:
        def split(images: Sequence[Decoded]) -> Splits:
            given = split_as_given(images)
            val, train = hold_out(given["train"], config.val_fraction)
            return {"train": train, "val": val, "test": given["test"]}

        def photo(name: str, label: str, part: Split, data: bytes) -> Photo:
            known = None if boxes is None else boxes.get(Path(name).stem, ())
            return Photo(name, label, part, partial(io.BytesIO, data), known)

        home, downloading = folder / "oxford-iiit-pet", 0.8  # of the whole
        archives = fetch(home, lambda fraction, text: report(downloading * fraction, text))
        listed = read_lists(home / ANNOTATIONS)
        boxes, findings = read_boxes(home / ANNOTATIONS, listed) if config.crop == "subject" else (None, [])
        found = collect_photos(
            CLASSES,
            starmap(photo, photos(home, listed)),
            len(listed),
            config.image_size,
            split,
            lambda fraction, text: report(downloading + (1 - downloading) * fraction, text),
        )
        repacked = [make_finding("repacked", archive.name, f"md5 {archive.md5}") for archive in archives if not archive.is_official]
        origin = {archive.name: {"md5": archive.md5, "from": archive.url} for archive in archives}
        return found._replace(findings=[*repacked, *findings, *found.findings], origin=origin)
