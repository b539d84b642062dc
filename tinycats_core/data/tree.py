"""A folder as it lies on the disk: its visible files at any depth, links followed, and how many files are hidden."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tinycats_core.errors import DataError

# What systems and programs leave beside photos: hidden, like every name that begins with a dot.
SIDE_FOLDERS = {"@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "recycler"}
SIDE_FOLDERS |= {"__macosx", "__pycache__", "lost+found", "system volume information"}
SIDE_FILES = {"thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "zbthumbnail.info"}
MOST_VISITS = 32  # of one folder, through links


@dataclass
class Folder:
    """A folder that is not hidden, with what is in it."""

    path: Path
    files: list[Path] = field(default_factory=list)  # visible, sorted; no pipes and sockets
    folders: dict[str, "Folder"] = field(default_factory=dict)  # visible, sorted by name
    hidden: int = 0  # files here that are hidden or lie in hidden folders

    def walk(self) -> Iterator["Folder"]:
        """Yield this folder and those below it."""
        yield self
        for folder in self.folders.values():
            yield from folder.walk()

    def all_files(self) -> list[Path]:
        """Return the visible files at any depth."""
        return [path for folder in self.walk() for path in folder.files]

    @property
    def filled(self) -> dict[str, "Folder"]:
        """The folders directly below this one that hold a visible file at any depth."""
        return {name: folder for name, folder in self.folders.items() if any(part.files for part in folder.walk())}


def read_tree(root: Path) -> Folder:
    """Read a folder. Links to folders are followed, but not those that lead back to a folder above them.

    Raises:
        OSError: a visible folder cannot be read.
        DataError: links lead to the same folder too many times.
    """
    return _read(root, (), {})


def _read(path: Path, above: tuple[tuple[int, int], ...], visits: dict[tuple[int, int], int]) -> Folder:
    found, identity = Folder(path), _identity(path)
    visits[identity] = visits.get(identity, 0) + 1
    if visits[identity] > MOST_VISITS:
        raise DataError(f"links below data.folder lead to {path.resolve()} more than {MOST_VISITS} times. Remove some of them.")
    for inside in sorted(path.iterdir()):
        if inside.is_dir():
            if _is_side_folder(inside.name):
                found.hidden += _count_files(inside)
            elif _identity(inside) not in (*above, identity):
                found.folders[inside.name] = _read(inside, (*above, identity), visits)
        elif _is_side_file(inside.name):
            found.hidden += 1
        elif inside.is_file() or not inside.exists():  # or a broken link
            found.files.append(inside)
    return found


def _identity(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_dev, state.st_ino


def _is_side_folder(name: str) -> bool:
    return name.startswith(".") or name.lower() in SIDE_FOLDERS


def _is_side_file(name: str) -> bool:
    is_hidden = name.startswith(".") and not name.endswith(".icloud")  # iCloud's placeholder of a photo
    return is_hidden or name.lower() in SIDE_FILES


def _count_files(folder: Path) -> int:
    """Count the files of a hidden folder, so far as it can be read."""
    return 0 if folder.is_symlink() else sum(len(files) for _, _, files in os.walk(folder))
