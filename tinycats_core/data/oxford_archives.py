"""The official archives of Oxford-IIIT Pet: where they are, and the photos, lists and annotations inside them.

They are read as they are: nothing is extracted, so no member of an archive can write anywhere.
"""

import hashlib
import io
import logging
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from tinycats_core.config import BREEDS
from tinycats_core.data.crop import Box
from tinycats_core.data.decode import MAX_PIXELS, Finding, Progress, make_finding
from tinycats_core.data.download import download
from tinycats_core.data.splits import Split
from tinycats_core.errors import DataError
from tinycats_core.files import check_writable, write_text

ADDRESSES = (
    "https://www.robots.ox.ac.uk/~vgg/data/pets/data",  # torchvision's
    "https://thor.robots.ox.ac.uk/~vgg/data/pets",  # that of tensorflow_datasets
    "https://thor.robots.ox.ac.uk/datasets/pets",  # that of the examples of Keras
)
IMAGES, ANNOTATIONS = "images.tar.gz", "annotations.tar.gz"
ARCHIVES = {  # name: md5, the ones that torchvision.datasets.OxfordIIITPet pins
    ANNOTATIONS: "95a8c909bbe2e81eed6a22bccdf3f68f",  # first: it says which photos the other holds
    IMAGES: "5c4f3ee8e5d25df40f4fd59a7f44e54c",
}
PHOTOS: dict[Split, int] = {"train": 3680, "test": 3669}  # in the official lists
DELETE = " Delete it and run again."
MEMBER_BYTES = 1 << 26  # of one file in an archive
ANIMAL = 1  # in a trimap; 2 is background, 3 the border between them
HEAD_EDGES = ("xmin", "ymin", "xmax", "ymax")
T = TypeVar("T")


class Archive(NamedTuple):
    """An archive on this disk, and where it is from."""

    name: str
    md5: str
    url: str | None  # None: it was put there by hand

    @property
    def is_official(self) -> bool:
        return self.md5 == ARCHIVES[self.name]


def fetch(folder: Path, on_progress: Progress | None = None) -> list[Archive]:
    """Download the archives that `folder` lacks, from TINYCATS_OXFORD_URL or one official address after another.

    An archive with another md5 than the official one was packed anew, or is something else: it is accepted if its lists have
    the official numbers of photos, and if all of these are in it.

    Raises:
        DataError: an archive cannot be downloaded or is something else, or the disk is full.
    """
    check_writable(folder)
    given = os.environ.get("TINYCATS_OXFORD_URL")
    report = on_progress or (lambda fraction, text: None)
    found: list[Archive] = []
    for index, name in enumerate(ARCHIVES):
        path, origin, done = folder / name, folder / f"{name}.origin", index / len(ARCHIVES)
        if path.exists():
            md5 = _check(path, name)
            url = origin.read_text() if origin.exists() else None
        else:
            urls = [f"{address.rstrip('/')}/{name}" for address in ((given,) if given else ADDRESSES)]
            remedy = (
                "Check the network and run again (it resumes where it stopped), set TINYCATS_OXFORD_URL to a mirror, or put the "
                f"file at {path} yourself."
            )
            url = download(
                urls, path, lambda part, name=name: _accept(part, name), remedy,
                lambda part, text, done=done: report(done + part / len(ARCHIVES), text),
            )  # fmt: skip
            write_text(origin, url)
            md5 = _md5_of(path)
        found.append(Archive(name, md5, url))
        logging.getLogger("tinycats").info("%s: md5 %s, from %s", name, md5, url or f"{folder}, not downloaded")
    return found


def _check(path: Path, name: str) -> str:
    """Return the md5 of an archive on the disk, or say that it has to go. Raises DataError."""
    try:
        return _accept(path, name)
    except DataError as error:
        raise DataError(f"{path}: {error}.{DELETE}") from None


def _accept(path: Path, name: str) -> str:
    """Return the md5 of an archive. Raises DataError if it is neither the official one nor holds what that holds."""
    md5 = _md5_of(path)
    if md5 != ARCHIVES[name]:
        try:
            _require_content(path, name)
        except DataError as error:
            reason = str(error).removesuffix(f".{DELETE}")
            raise DataError(f"its md5 is {md5}, not {ARCHIVES[name]}, and it is not that archive packed anew: {reason}") from None
    return md5


def _require_content(path: Path, name: str) -> None:
    if name == ANNOTATIONS:
        counts = Counter(split for _, split in read_lists(path).values())
        if counts != PHOTOS:
            said = " and ".join(f"{counts[split]} of {count} {split}" for split, count in PHOTOS.items())
            raise DataError(f"its lists have {said} photos")
        return
    wanted = {f"images/{stem}.jpg": stem for stem in read_lists(path.with_name(ANNOTATIONS))}
    if missing := {*wanted.values()} - {stem for stem, data in _members(path, wanted) if data}:
        raise DataError(f"it lacks {len(missing)} of the {len(wanted)} listed photos")


def photos(folder: Path, listed: Mapping[str, tuple[str, Split]]) -> Iterator[tuple[str, str, Split, bytes]]:
    """Yield (file name, class, split, bytes) of each listed photo, in the archive's order.

    Raises:
        DataError: the archive is damaged, or a listed photo is not in it.
    """
    wanted = dict(listed)
    for name, data in _members(folder / IMAGES, {f"images/{stem}.jpg": stem for stem in wanted}):
        yield f"{name}.jpg", *wanted.pop(name), data
    if wanted:
        some = ", ".join(f"{stem}.jpg" for stem in list(wanted)[:5])
        raise DataError(f"{folder / 'images.tar.gz'} lacks {len(wanted)} of the listed photos ({some}).{DELETE}")


def read_lists(path: Path) -> dict[str, tuple[str, Split]]:
    """Return {photo name without suffix: (class, split)} from the official lists in the archive of annotations.

    Cats have their breed as class, dogs are "other". trainval.txt is "train".

    Raises:
        DataError: the archive is damaged, or a list has another form.
    """
    lists: dict[str, Split] = {"annotations/trainval.txt": "train", "annotations/test.txt": "test"}
    listed: dict[str, tuple[str, Split]] = {}
    found = dict(_members(path, lists))
    for split in lists.values():
        for line in found.get(split, b"").decode("utf-8", "replace").splitlines():
            fields = line.split()  # name, class 1..37, species (1 cat, 2 dog), breed within the species
            breed = fields[0].rpartition("_")[0] if fields else ""
            if len(fields) != 4 or fields[2] not in ("1", "2") or (fields[2] == "1" and breed not in BREEDS):
                raise DataError(f"{path}: the {split} list has the line {line[:80]!r}; expected: Bengal_12 6 1 2")
            listed[fields[0]] = (breed if fields[2] == "1" else "other", split)
    if not listed:
        raise DataError(f"{path} has no annotations/trainval.txt and test.txt.{DELETE}")
    return listed


def _members(path: Path, wanted: Mapping[str, T]) -> Iterator[tuple[T, bytes]]:
    """Yield (wanted[member name], bytes) of the regular files in a tar archive whose exact name is wanted."""
    left = dict(wanted)
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and member.name in left and (file := archive.extractfile(member)):
                    if member.size > MEMBER_BYTES:
                        raise tarfile.TarError(f"{member.name} has more than {MEMBER_BYTES >> 20} MB")
                    yield left.pop(member.name), file.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not a readable archive ({reason}).{DELETE}") from None


def read_boxes(path: Path, stems: Iterable[str]) -> tuple[dict[str, tuple[Box, ...]], list[Finding]]:
    """Return {photo name without suffix: its boxes}, that of the head if it is annotated, then that of the animal.

    Also returns a finding for each annotation that cannot be read.

    Raises:
        DataError: the archive is damaged.
    """
    wanted = {f"annotations/xmls/{stem}.xml": stem for stem in stems}
    wanted |= {f"annotations/trimaps/{stem}.png": stem for stem in wanted.values()}
    heads: dict[str, Box] = {}
    animals: dict[str, Box] = {}
    findings: list[Finding] = []
    for (member, stem), data in _members(path, {member: (member, stem) for member, stem in wanted.items()}):
        is_head = member.endswith(".xml")
        try:
            (heads if is_head else animals)[stem] = head_box(data, member) if is_head else animal_box(data, member)
        except (ElementTree.ParseError, OSError, ValueError, SyntaxError) as error:
            findings.append(make_finding("bad_box", f"{stem}.jpg", f"{member}: {error}"))
    return {stem: tuple(found[stem] for found in (heads, animals) if stem in found) for stem in {*heads, *animals}}, findings


def head_box(data: bytes, where: str) -> Box:
    """Return the box of an annotation of the head, in PASCAL VOC's XML: its pixels count from 1, and the last one is inside.

    Raises:
        ParseError, ValueError: it has another form.
    """
    root = ElementTree.fromstring(data)
    texts = [root.findtext(f"object/bndbox/{edge}") for edge in HEAD_EDGES]
    size = [root.findtext(f"size/{side}") for side in ("width", "height")]
    if None in (*texts, *size):
        raise ValueError("it has no size or no object/bndbox")
    left, top, right, bottom = (float(text or "") for text in texts)
    width, height = (int(text or "") for text in size)
    if not (left <= right and top <= bottom):
        raise ValueError(f"the box {left:g}, {top:g}, {right:g}, {bottom:g} is empty")
    return Box(left - 1, top - 1, right, bottom, where, (width, height))


def animal_box(data: bytes, where: str) -> Box:
    """Return the box around the animal of a trimap, without the border, of which it is not certain.

    Raises:
        OSError, SyntaxError, ValueError: it is no PNG, is too large, or shows no animal.
    """
    with Image.open(io.BytesIO(data), formats=["PNG"]) as trimap:
        if trimap.width * trimap.height > MAX_PIXELS:
            raise ValueError(f"it has {trimap.width}x{trimap.height} pixels")
        animal = np.asarray(trimap) == ANIMAL
    if animal.ndim != 2 or not animal.any():
        raise ValueError("it shows no animal")
    columns, rows = (np.flatnonzero(animal.any(axis)) for axis in (0, 1))
    left, top, right, bottom = map(float, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    return Box(left, top, right, bottom, where, animal.shape[::-1])


def _md5_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
