"""Measure how much of the head and of the animal stays in the square that is cut out, by data.crop.

    python -m benchmarks.crops [--photos 20000]
    python -m benchmarks.crops --oxford FOLDER

With --oxford, the boxes are the official annotations in FOLDER/annotations.tar.gz: boxes of heads, and trimaps for the animals.
Without, they are drawn: photos of common shapes, a head of a third to three quarters of the shorter side, which lies anywhere
across a photo and mostly above the middle of it, and an animal that stretches from the head to where the photo has room. How
far heads lie from the middle, and how long the animals are, is set so that the central square does to them what it does to the
official ones: it loses more than a tenth of the head in 24 % of the photos, and more than a tenth of the animal in 41 %. Such a
head always fits into the square, so that `subject` keeps all of them; of official ones that is not known before they are read.

A head or animal is kept if at least 0.9 of the area of its box lies in the square. `centre` and `subject` are the settings of
data.crop; `animal_alone` is `subject` for photos whose head is not annotated, as in the official test split.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import command_line, positive, report
from tinycats_core.data.crop import Box, kept, square_of
from tinycats_core.errors import DataError

WAYS = {"centre": (), "subject": ("head", "animal"), "animal_alone": ("animal",)}  # which boxes decide the square
ENOUGH = 0.9  # of the area
GOAL = 0.95  # of the heads
SHAPES = (((500, 375), 0.45), ((375, 500), 0.22), ((500, 333), 0.16), ((333, 500), 0.07), ((500, 450), 0.06), ((400, 400), 0.04))
HEAD = (0.33, 0.75)  # its height, of the shorter side
SPREAD = 0.3  # standard deviation of its place across the photo
LONGER = (0.0, 1.2)  # how much longer than the head the animal is across the photo, in heads
BELOW = (0.1, 0.9)  # and down


class Annotated(NamedTuple):
    """The annotations of a photo."""

    width: int
    height: int
    head: Box | None
    animal: Box | None


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures. Returns the exit status: 0 if `subject` keeps 95 % of the heads."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crops", description=__doc__)
    parser.add_argument("--photos", type=positive, default=20_000, help="how many photos to draw (default: 20000)")
    parser.add_argument("--oxford", type=Path, metavar="FOLDER", help="the folder that holds annotations.tar.gz")
    parser.add_argument("--quick", action="store_true", help="1000 drawn photos")
    given = parser.parse_args(arguments)
    if given.oxford:
        photos = read_oxford(given.oxford)
    else:
        rng = np.random.default_rng(0)
        photos = [draw(rng) for _ in range(1_000 if given.quick else given.photos)]
    figures = measure(photos)
    report("crops-oxford" if given.oxford else "crops", figures, given)
    return 0 if figures["head_kept_subject"] >= GOAL else 1


def measure(photos: Sequence[Annotated]) -> dict[str, Any]:
    """Return the shares of heads and animals that are kept."""
    heads = [photo for photo in photos if photo.head]
    animals = [photo for photo in photos if photo.animal]
    both = [photo for photo in heads if photo.animal]
    if not both:
        raise DataError(f"none of {len(photos)} photos has a head and an animal that are annotated. Give the official archive.")
    return {
        "photos": len(photos),
        "heads": len(heads),
        "animals": len(animals),
        **{f"head_kept_{way}": share(both if way == "animal_alone" else heads, "head", used) for way, used in WAYS.items()},
        **{f"animal_kept_{way}": share(animals, "animal", used) for way, used in WAYS.items()},
        "animal_in_square": round(sum(bool(_longest(photo) <= min(photo[:2])) for photo in animals) / len(animals), 3),
    }


def share(photos: Sequence[Annotated], part: str, used: Sequence[str]) -> float:
    """Return in which share of the photos a part is kept, if the boxes named in `used` decide the square."""
    count = 0
    for photo in photos:
        boxes = [box for name in used if (box := getattr(photo, name))]
        count += bool(kept(getattr(photo, part), square_of(boxes, photo.width, photo.height)) >= ENOUGH)
    return round(float(count) / len(photos), 3)


def _longest(photo: Annotated) -> float:
    box = photo.animal
    assert box
    return max(box.right - box.left, box.bottom - box.top)


def draw(rng: np.random.Generator) -> Annotated:
    """Draw the annotations of one photo."""
    shapes, shares = zip(*SHAPES, strict=True)
    width, height = shapes[rng.choice(len(shapes), p=shares)]
    tall = rng.uniform(*HEAD) * min(width, height)
    wide = min(tall * rng.uniform(0.8, 1.25), width)
    across, down = np.clip(rng.normal((0.5, 0.3), (SPREAD, 0.2)), 0, 1)
    left, top = (width - wide) * across, (height - tall) * down
    head = Box(left, top, left + wide, top + tall)
    longer, below, above = wide * rng.uniform(*LONGER), tall * rng.uniform(*BELOW), tall * rng.uniform(0, 0.1)
    animal = Box(
        max(0, left - across * longer),
        max(0, top - above),
        min(width, head.right + (1 - across) * longer),
        min(height, head.bottom + below),
    )
    return Annotated(width, height, head, animal)


def read_oxford(folder: Path) -> list[Annotated]:
    """Return the official annotations. Raises DataError if they cannot be read."""
    from tinycats_core.data import oxford_archives

    path = folder / oxford_archives.ANNOTATIONS
    boxes, unreadable = oxford_archives.read_boxes(path, oxford_archives.read_lists(path))
    print(f"{len(boxes)} annotated photos, {len(unreadable)} annotations that cannot be read")
    photos: list[Annotated] = []
    for known in boxes.values():
        named = {"head" if box.where.endswith(".xml") else "animal": box for box in known}
        (width, height), *others = {box.drawn_on for box in known if box.drawn_on}
        if not others:  # the sizes agree
            photos.append(Annotated(width, height, named.get("head"), named.get("animal")))
    return photos


if __name__ == "__main__":
    sys.exit(main())
