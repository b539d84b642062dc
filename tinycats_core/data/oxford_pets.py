"""The source `oxford_pets`, Oxford-IIIT Pet: the official archives, downloaded once, and the photos and lists inside them.

The photos are read straight out of the archive: nothing is extracted, so no member of an archive can write anywhere.
Source: Parkhi, Vedaldi, Zisserman, Jawahar, "Cats and Dogs", CVPR 2012; https://www.robots.ox.ac.uk/~vgg/data/pets/
"""

import hashlib
import io
import os
import shutil
import ssl
import tarfile
import time
import urllib.request
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError

from tinycats_core.config import BREEDS, CLASSES, DataConfig
from tinycats_core.data.decode import Decoded, Photo, Progress
from tinycats_core.data.source import Collected, Source, Splits, collect_photos, hold_out, split_as_given
from tinycats_core.data.splits import Split
from tinycats_core.errors import DataError
from tinycats_core.files import check_writable

OFFICIAL_URL = "https://www.robots.ox.ac.uk/~vgg/data/pets/data"
ARCHIVES = {  # name: md5, the ones that torchvision.datasets.OxfordIIITPet pins
    "images.tar.gz": "5c4f3ee8e5d25df40f4fd59a7f44e54c",
    "annotations.tar.gz": "95a8c909bbe2e81eed6a22bccdf3f68f",
}

# The photos in the official archive that are a PNG or GIF named .jpg, or carry stray bytes (the list of
# tensorflow_datasets). Pillow reads them; where a build of it does not, they are left out with a warning.
KNOWN_ODD = frozenset(
    {"beagle_116", "chihuahua_121", "Abyssinian_5", "Abyssinian_34"}
    | {f"Egyptian_Mau_{number}" for number in (14, 139, 145, 156, 167, 177, 186, 191)}
)
ATTEMPTS = 5  # in a row without a single byte received
FIRST_PAUSE_S = 1.0  # doubled after each failed attempt
TIMEOUT_S = 30


class OxfordPets(Source):
    """The cats of Oxford-IIIT Pet, with its dogs as the class `other`."""

    name = "oxford_pets"
    settings = ("val_fraction",)
    split_rule = "official lists; val by sha256 within each class of trainval"
    fixed = True  # by the checksums of its archives
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
        return {"archives": ARCHIVES, "val_fraction": config.val_fraction}

    def collect(self, config: DataConfig, folder: Path, report: Progress) -> Collected:
        def split(images: Sequence[Decoded]) -> Splits:
            given = split_as_given(images)
            val, train = hold_out(given["train"], config.val_fraction)
            return {"train": train, "val": val, "test": given["test"]}

        archives, downloading = folder / "oxford-iiit-pet", 0.8  # of the whole
        fetch(archives, lambda fraction, text: report(downloading * fraction, text))
        listed = read_lists(archives)
        found = (Photo(name, label, part, partial(io.BytesIO, data)) for name, label, part, data in photos(archives, listed))
        return collect_photos(
            CLASSES,
            found,
            len(listed),
            config.image_size,
            split,
            lambda fraction, text: report(downloading + (1 - downloading) * fraction, text),
        )


def fetch(folder: Path, on_progress: Progress | None = None) -> None:
    """Download the archives that `folder` lacks, from TINYCATS_OXFORD_URL or the official site.

    Raises:
        DataError: an archive cannot be downloaded or is not the official one, or the disk is full.
    """
    check_writable(folder)
    base = os.environ.get("TINYCATS_OXFORD_URL") or OFFICIAL_URL
    report = on_progress or (lambda fraction, text: None)
    for index, (name, md5) in enumerate(ARCHIVES.items()):
        path = folder / name
        if not path.exists():
            done = index / len(ARCHIVES)
            download(f"{base.rstrip('/')}/{name}", path, md5, lambda part, text, done=done: report(done + part / 2, text))
        elif (found := _md5_of(path)) != md5:
            raise DataError(f"{path} has md5 {found}, expected {md5}. Delete it and run again to download it.")


def download(url: str, path: Path, md5: str, on_progress: Progress | None = None) -> None:
    """Download a file to `path` in one step, resuming what a broken attempt left in `path`.part.

    Network errors, 5xx, 408 and 429 are retried with growing pauses; any other answer fails at once.

    Raises:
        DataError: no network, a refusal, a wrong checksum, a full disk. The message says what to do.
    """
    part = path.with_name(path.name + ".part")
    failures = mismatches = 0
    while True:
        offset = part.stat().st_size if part.exists() else 0
        try:
            _transfer(url, part, offset, on_progress)
        except (OSError, HTTPException, ValueError) as error:
            if not (isinstance(error, HTTPError) and error.code == 416):  # 416: the part is already as long as the file
                grown = part.exists() and part.stat().st_size > offset
                failures = 1 if grown else failures + 1
                if not _worth_retrying(error) or failures >= ATTEMPTS:
                    raise DataError(
                        f"cannot download {url}: {_reason(error)}. Check the network and run again (it resumes where "
                        f"it stopped), set TINYCATS_OXFORD_URL to a mirror, or put the file at {path} yourself."
                    ) from None
                time.sleep(FIRST_PAUSE_S * 2 ** (failures - 1))
                continue
        found = _md5_of(part)
        if found == md5:
            part.replace(path)
            return
        part.unlink()
        mismatches += 1
        if not offset or mismatches > 1:  # a resumed part may have begun as another file: one fresh start is due
            raise DataError(
                f"{url} has md5 {found}, expected {md5}: it is not the official archive. "
                f"Check TINYCATS_OXFORD_URL, or put the official file at {path} yourself."
            )


def photos(folder: Path, listed: Mapping[str, tuple[str, Split]]) -> Iterator[tuple[str, str, Split, bytes]]:
    """Yield (file name, class, split, bytes) of each listed photo, in the archive's order.

    Raises:
        DataError: the archive is damaged, or a listed photo is not in it.
    """
    wanted = dict(listed)
    for name, data in _members(folder / "images.tar.gz", {f"images/{stem}.jpg": stem for stem in wanted}):
        yield f"{name}.jpg", *wanted.pop(name), data
    if wanted:
        some = ", ".join(f"{stem}.jpg" for stem in list(wanted)[:5])
        raise DataError(f"{folder / 'images.tar.gz'} lacks {len(wanted)} of the listed photos ({some}). Delete it and run again.")


def read_lists(folder: Path) -> dict[str, tuple[str, Split]]:
    """Return {photo name without suffix: (class, split)} from the official lists.

    Cats have their breed as class, dogs are "other". trainval.txt is "train".

    Raises:
        DataError: the archive is damaged, or a list has another form.
    """
    path = folder / "annotations.tar.gz"
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
        raise DataError(f"{path} has no annotations/trainval.txt and test.txt. Delete it and run again.")
    return listed


def _members(path: Path, wanted: Mapping[str, str]) -> Iterator[tuple[str, bytes]]:
    """Yield (wanted[member name], bytes) of the regular files in a tar archive whose exact name is wanted."""
    left = dict(wanted)
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and member.name in left and (file := archive.extractfile(member)):
                    yield left.pop(member.name), file.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"{path} is not a readable archive ({error}). Delete it and run again.") from None


def _transfer(url: str, part: Path, offset: int, on_progress: Progress | None) -> None:
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        if response.status != 206:
            offset = 0  # the server sends the whole file
        length = response.headers.get("Content-Length")
        total = offset + int(length) if length else 0
        free = shutil.disk_usage(part.parent).free
        if total - offset > free:
            raise _no_room(part, f"{(total - offset) / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free")
        received = offset
        with _opened(part, "ab" if offset else "wb") as file:
            while chunk := response.read(1 << 20):
                try:
                    file.write(chunk)
                    file.flush()
                except OSError as error:
                    raise _no_room(part, error.strerror or str(error)) from None
                received += len(chunk)
                if on_progress and total:
                    name = part.name.removesuffix(".part")
                    on_progress(received / total, f"{name}: {received / 1e6:,.1f} of {total / 1e6:,.1f} MB")
    if received < total:
        raise ConnectionError(f"the connection ended after {received} of {total} bytes")


def _opened(part: Path, mode: str) -> IO[bytes]:
    try:
        return open(part, mode)
    except OSError as error:
        raise _no_room(part, error.strerror or str(error)) from None


def _no_room(part: Path, reason: str) -> DataError:
    return DataError(f"cannot write {part}: {reason}. Free some space or set TINYCATS_HOME to another disk.")


def _worth_retrying(error: Exception) -> bool:
    if isinstance(error, HTTPError):
        return error.code >= 500 or error.code in (408, 429)
    reason = error.reason if isinstance(error, URLError) else error
    return not isinstance(reason, ValueError | ssl.SSLCertVerificationError)  # ValueError: not an address at all


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"the server answers {error.code} {error.reason}"
    return str(error.reason if isinstance(error, URLError) else error) or type(error).__name__


def _md5_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
