"""The source `folder`: a person's own photos, in one folder a class."""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tinycats_core.config import BREEDS, DataConfig
from tinycats_core.data.decode import IMAGE_SUFFIXES, Decoded, Photo, Progress, make_finding
from tinycats_core.data.source import Collected, Source, Splits, collect_photos, hold_out, in_order
from tinycats_core.errors import NAMED, DataError, shortened


class Folder(Source):
    """The photos below data.folder: cat/<Breed>/* and other/*, or one folder a class."""

    name = "folder"
    settings = ("folder", "test_fraction", "val_fraction")
    split_rule = "by sha256 within each class"
    private = True
    licence = "other"
    licence_name = "as-the-photos-allow"
    dataset_id = "imagefolder"
    dataset_name = "Your own photos"
    note = (
        "It was trained on a folder of your own photos. They bring their own licences: whoever shares this model must make "
        "sure that those allow it."
    )

    def fingerprint(self, config: DataConfig) -> dict[str, Any]:
        root, classes, listed = list_folder(config)
        files: dict[str, list[int]] = {}
        for _, path in listed:
            stat = path.stat() if path.exists() else path.lstat()  # a broken link
            files[path.relative_to(root).as_posix()] = [stat.st_size, stat.st_mtime_ns]
        fractions = {"test_fraction": config.test_fraction, "val_fraction": config.val_fraction}
        return {"classes": classes, "files": files, **fractions}

    def collect(self, config: DataConfig, folder: Path, report: Progress) -> Collected:
        def split(images: Sequence[Decoded]) -> Splits:
            test, rest = hold_out(in_order(images), config.test_fraction)
            val, train = hold_out(rest, config.val_fraction)
            return {"train": train, "val": val, "test": test}

        root, classes, files = list_folder(config)
        found = collect_photos(classes, _photos(root, files), len(files), config.image_size, split, report)
        outside = [path for label, path in files if label is None]
        strays = [path.relative_to(root).as_posix() for path in outside if path.suffix.lower() in IMAGE_SUFFIXES]
        findings = [make_finding("outside", name) for name in strays]
        return found._replace(findings=findings + found.findings, ignored=len(outside) - len(strays) + found.ignored)


def list_folder(config: DataConfig) -> tuple[Path, list[str], list[tuple[str | None, Path]]]:
    """Return data.folder, its classes in order, and (class, file) of each visible file; None: in no class folder."""
    root = config.folder
    assert root is not None  # `Source.check`
    try:
        return root, *_walk(root)
    except OSError as error:
        raise DataError(
            f"cannot read {error.filename}: {error.strerror}. Make data.folder {root} readable, or give another."
        ) from None


def _walk(root: Path) -> tuple[list[str], list[tuple[str | None, Path]]]:
    if not root.exists():
        raise DataError(f"data.folder {root} does not exist. Give the folder that holds the images.")
    if not root.is_dir():
        raise DataError(f"data.folder {root} is a file. Give the folder that holds the images.")
    expected = "cat/<Breed>/* and other/*, or one folder of images for each class"
    top = _visible_folders(root)
    if not any(root.iterdir()):
        raise DataError(f"data.folder {root} is empty; expected {expected}.")
    breeds = _visible_folders(root / "cat") if "cat" in top else []
    if breeds:
        if strangers := sorted({*top} - {"cat", "other"}):
            raise DataError(
                f"data.folder {root} has cat/<Breed> folders and also {shortened(strangers, NAMED)}; expected {expected}."
            )
        if "other" in breeds:
            raise DataError(f"data.folder {root} has a breed named 'other', which is the class of all else. Rename it.")
        order = {name: index for index, name in enumerate(BREEDS)}
        breeds.sort(key=lambda name: (order.get(name, len(order)), name))
        places = {name: root / "cat" / name for name in breeds} | ({"other": root / "other"} if "other" in top else {})
    else:
        places = {name: root / name for name in top}
    if not places:
        raise DataError(f"data.folder {root} has no class folders; expected {expected}.")
    files: list[tuple[str | None, Path]] = [(name, path) for name, place in places.items() for path in _visible_files(place)]
    if not files:
        raise DataError(f"the class folders of data.folder {root} ({shortened(list(places), NAMED)}) are empty. Add images.")
    inside = {path for _, path in files}
    files += [(None, path) for path in _visible_files(root) if path not in inside]
    return list(places), files


def _visible_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _visible_files(folder: Path) -> list[Path]:
    """Return the files (no pipes, no sockets) at any depth whose path below `folder` has no hidden part, sorted."""
    found: list[Path] = []
    for here, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        paths = [Path(here, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if path.is_file() or path.is_symlink()]
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _photos(root: Path, files: Sequence[tuple[str | None, Path]]) -> Iterator[Photo]:
    for label, path in files:
        if label is not None:
            yield Photo(path.relative_to(root).as_posix(), label, None, partial(open, path, "rb"))
