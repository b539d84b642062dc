"""A folder of photos: which classes it holds, and which files."""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from tinycats_core.config import BREEDS, DataConfig
from tinycats_core.data.decode import Photo
from tinycats_core.errors import NAMED, DataError, shortened


def list_folder(config: DataConfig) -> tuple[Path, list[str], list[tuple[str | None, Path]]]:
    """Return data.folder, its classes in order, and (class, file) of each visible file; None: in no class folder."""
    root = config.folder
    assert root is not None  # DataConfig's own check
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


def folder_photos(root: Path, files: Sequence[tuple[str | None, Path]]) -> Iterator[Photo]:
    for label, path in files:
        if label is not None:
            yield Photo(path.relative_to(root).as_posix(), label, None, partial(open, path, "rb"))
