"""Decoding: from image files of any kind to squares of pixels, with a finding for each file that is left out."""

import errno
import hashlib
import io
import logging
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import PurePath
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError

from tinycats_core.data import crop, formats, pixels
from tinycats_core.data.splits import Split
from tinycats_core.errors import NAMED, DataError, shortened

Progress = Callable[[float, str], None]  # fraction of the whole, current step
Finding = dict[str, str]  # kind, file, class (empty: in none), detail

# Tried on the content. Pillow knows more formats, among them EPS, which runs a program.
PILLOW_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "AVIF")
MAX_PIXELS = 120_000_000  # of a decoded image: 4 bytes each, twice while it is converted
BLOCK_BYTES = 1 << 26  # of Pillow's memory: of smaller blocks, malloc keeps as many for each thread as it ever had
MAX_THREADS = 8
METADATA_BYTES = 1 << 24  # of one text or colour profile in a PNG; larger ones are left out of account
KEPT_CHUNKS = ((b"tRNS", b"iCCP", b"eXIf"), (b"tRNS",))  # of a PNG whose metadata are odd: first these, then fewer


class Photo(NamedTuple):
    name: str
    label: str
    split: Split | None  # the source's own; None if it has none
    open: Callable[[], io.BufferedReader | io.BytesIO]
    boxes: tuple[crop.Box, ...] | None = None  # of the subject, the most important first; None: the central square is wanted


class Decoded(NamedTuple):
    name: str
    label: str
    split: Split | None
    sha256: str  # of the file's bytes
    width: int
    height: int
    pixels: np.ndarray  # uint8 (3, S, S)
    faults: tuple[str, ...] = ()  # of boxes that do not fit the photo and were not used


class Opened(NamedTuple):
    """What was read of a photo's file."""

    width: int
    height: int
    square: Image.Image
    faults: tuple[str, ...]


class LeftOut(Exception):
    """Why a file is left out: the kind of the finding, and its detail."""

    def __init__(self, kind: str, detail: str):
        super().__init__(detail)
        self.kind, self.detail = kind, detail


def make_finding(kind: str, file: str, detail: str = "", label: str = "") -> Finding:
    return {"kind": kind, "file": file, "class": label, "detail": detail}


def decode_all(photos: Iterable[Photo], total: int, size: int, report: Progress) -> tuple[list[Decoded], list[Finding]]:
    """Decode each photo, in parallel. Returns the images in order, and the findings.

    Raises:
        DataError: a file cannot be read, or memory is short. That is no property of the file, so nothing is kept of it: the
            next run reads again.
    """
    images: list[Decoded] = []
    findings: list[Finding] = []
    failed: list[str] = []
    with _pillow_settings(), ThreadPoolExecutor(_threads()) as pool:
        for index, (photo, result) in enumerate(_in_order(pool, photos, size)):
            if index % max(1, total // 100) == 0:
                report(index / total, f"decoding: {index} of {total} files")
            try:
                image = result.result()
            except LeftOut as reason:
                findings.append(make_finding(reason.kind, photo.name, reason.detail, photo.label))
                continue
            except MemoryError:
                raise DataError(f"there is not enough memory to decode {photo.name}. Free some, or scale it down.") from None
            except OSError as error:
                failed.append(f"{photo.name} ({error.strerror})")
                continue
            if (shorter := min(image.width, image.height)) < size:
                kind = "too_small" if shorter * 2 < size else "small"
                findings.append(make_finding(kind, photo.name, f"{image.width}x{image.height}", photo.label))
            if shorter * 2 >= size:
                images.append(image)
                findings += _box_findings(photo, image)
    if failed:
        raise DataError(
            f"{len(failed)} of {total} files could not be read: {shortened(failed, NAMED)}. Check the disk or the network "
            "drive that holds data.folder, and run again: the files are read anew."
        )
    return images, findings


def _box_findings(photo: Photo, image: Decoded) -> Iterator[Finding]:
    if photo.boxes == ():
        yield make_finding("no_box", photo.name, label=photo.label)
    for fault in image.faults:
        yield make_finding("bad_box", photo.name, fault, photo.label)


def _in_order(pool: ThreadPoolExecutor, photos: Iterable[Photo], size: int) -> Iterator[tuple[Photo, Future[Decoded]]]:
    """Yield each photo with its future, in order; only a few are under way, because a photo may hold its whole file."""
    waiting: deque[tuple[Photo, Future[Decoded]]] = deque()
    for photo in photos:
        waiting.append((photo, pool.submit(_decode, photo, size)))
        if len(waiting) >= 4 * _threads():
            yield waiting.popleft()
    yield from waiting


def _threads() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_THREADS)


@contextmanager
def _pillow_settings() -> Iterator[None]:
    """Have Pillow fail on truncated images and read large metadata, without warnings; `_decode` has its own limit of pixels."""
    settings = (
        (ImageFile, "LOAD_TRUNCATED_IMAGES", False),
        (Image, "MAX_IMAGE_PIXELS", None),
        (PngImagePlugin, "MAX_TEXT_CHUNK", METADATA_BYTES),
        (PngImagePlugin, "MAX_TEXT_MEMORY", METADATA_BYTES),
        (logging.getLogger("PIL.TiffImagePlugin"), "disabled", True),  # it says on stderr what becomes a finding
    )
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in settings]
    block_size = Image.core.get_block_size()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            Image.core.set_block_size(BLOCK_BYTES)
            for owner, name, value in settings:
                setattr(owner, name, value)
            yield
        finally:
            Image.core.set_block_size(block_size)
            for owner, name, value in before:
                setattr(owner, name, value)


@cache
def readable_formats() -> tuple[str, ...]:
    """Return Pillow's names of the formats that are read; HEIF is among them if pillow-heif is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return PILLOW_FORMATS
    register_heif_opener(thumbnails=False)  # a thumbnail is another picture
    return (*PILLOW_FORMATS, "HEIF")


_large = threading.Lock()  # large images are decoded one at a time, so that the threads do not multiply their memory


def _decode(photo: Photo, size: int) -> Decoded:
    """Decode one photo. Raises LeftOut, and OSError with an errno if the file cannot be read."""
    try:
        with photo.open() as file:
            head = file.read(formats.HEAD)
            file.seek(0)
            opened = _read_png(photo, file, size) if head.startswith(b"\x89PNG") else _read(photo, head, file, size)
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except (LeftOut, MemoryError):
        raise
    except UnidentifiedImageError:
        raise _unidentified(photo.name, head) from None
    except Exception as error:  # Pillow's readers raise almost anything on damaged bytes
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: a place before the file's start
            raise
        kind = type(error).__name__
        reason = str(error) if isinstance(error, OSError) else f"{kind}: {error}"
        raise LeftOut("corrupt", " ".join(reason.split()) or kind) from None
    array = np.ascontiguousarray(np.asarray(opened.square).transpose(2, 0, 1))
    return Decoded(photo.name, photo.label, photo.split, sha256, opened.width, opened.height, array, opened.faults)


def _read_png(photo: Photo, file: BinaryIO, size: int) -> Opened:
    """Read a PNG, if need be without metadata that Pillow refuses: the photo is good without them."""
    try:
        return _read(photo, b"", file, size)
    except (ValueError, SyntaxError, UnidentifiedImageError, EOFError):
        for kept in KEPT_CHUNKS:
            file.seek(0)
            with suppress(ValueError, SyntaxError, UnidentifiedImageError, EOFError):
                return _read(photo, b"", io.BytesIO(_with_chunks(file.read(), kept)), size)
        raise


def _read(photo: Photo, head: bytes, file: BinaryIO, size: int) -> Opened:
    """Return width and height of an image as it is stored, and the square that is cut out of it."""
    with ExitStack() as held:
        with Image.open(file, formats=readable_formats()) as image:
            width, height = image.size
            if _pixels_to_hold(image, photo.name, head, size) > pixels.LARGE:
                held.enter_context(_large)
            image.load()
            upright = pixels.upright_size(image, width, height)
            usable, faults = crop.sort_out(photo.boxes or (), *upright)
            square = pixels.to_square(image, size, crop.centering(usable, *upright))
        del image  # its pixels, before the next large image is decoded
    return Opened(width, height, square, faults)


def _pixels_to_hold(image: Image.Image, name: str, head: bytes, size: int) -> int:
    """Have a large JPEG decoded at a reduced scale. Return the pixels that decoding holds in memory. Raises LeftOut."""
    if image.format == "TIFF" and formats.is_raw(name, head, dict(getattr(image, "tag_v2", {}))):
        raise LeftOut("unread", formats.RAW)
    width, height = image.size
    if image.format in ("JPEG", "MPO"):
        image.draft(None, (4 * size, 4 * size))  # seven times faster at 12 megapixels
    held = (width, height) if image.info.get("progressive") else image.size  # libjpeg holds a progressive one whole
    count = held[0] * held[1]
    if count > MAX_PIXELS:
        limit = f"the limit is {MAX_PIXELS / 1e6:.0f}"
        raise LeftOut("too_large", f"{width}x{height}: {width * height / 1e6:.0f} million pixels, {limit}")
    return count


def _unidentified(name: str, head: bytes) -> LeftOut:
    """Say what a file is that is no image which can be read."""
    if what := formats.foreign_format(name, head):
        if what == formats.HEIC and "HEIF" in readable_formats():
            return LeftOut("corrupt", "damaged HEIC")
        return LeftOut("unread", what)
    begins_as_image = head.startswith(formats.CERTAIN_MAGIC)
    if PurePath(name).suffix.lower() not in formats.IMAGE_SUFFIXES and not begins_as_image:
        return LeftOut("unread", formats.NO_PHOTO)
    if head.startswith((b"II*\0", b"MM\0*")):
        return LeftOut("corrupt", "a damaged TIFF, or of a kind that is not read")
    if begins_as_image:
        return LeftOut("corrupt", "a damaged image")
    return LeftOut("corrupt", "not an image" if head else "an empty file")


def _with_chunks(content: bytes, kept: Container[bytes]) -> bytes:
    """Return a PNG without its ancillary chunks, but for those that are kept."""
    parts, place = [content[:8]], 8
    while place + 8 <= len(content):
        length, kind = int.from_bytes(content[place : place + 4], "big") + 12, content[place + 4 : place + 8]
        if kind[:1].isupper() or kind in kept:
            parts.append(content[place : place + length])
        place += length
    return b"".join(parts)
