"""Which folders are the classes, and which are splits: told from how the folders lie, or by data.layout."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tinycats_core.config import BREEDS, DataConfig
from tinycats_core.data import formats
from tinycats_core.data.splits import Split
from tinycats_core.data.tree import Folder, read_tree
from tinycats_core.errors import NAMED, DataError, shortened

SINGLE = "photos"  # the class of photos that lie straight in data.folder
SPLIT_FOLDERS: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
EXPECTED = "photos, one folder of photos for each class, cat/<Breed>/* and other/*, or train/, val/ and test/ over classes"


class Place(NamedTuple):
    """A folder whose files, at any depth, belong to one class; `split` is None where the folders say nothing of splits."""

    label: str
    split: Split | None
    folder: Folder


class ListedFile(NamedTuple):
    name: str  # below data.folder, `storable`
    label: str | None  # None: in no class
    split: Split | None
    path: Path


class Listing(NamedTuple):
    classes: list[str]  # in the order of their labels
    files: list[ListedFile]
    hidden: int  # files that are hidden, or that systems and programs leave beside photos

    @property
    def splits(self) -> set[Split]:
        """The splits that have a folder of their own."""
        return {file.split for file in self.files if file.split is not None}


def list_folder(config: DataConfig) -> Listing:
    """List the visible files of data.folder with class and split. Raises DataError."""
    root = config.folder
    assert root is not None  # `Source.check`
    shown = storable(str(root))
    try:
        if not root.exists():
            raise DataError(f"data.folder {shown} does not exist. Give the folder that holds the photos.")
        if not root.is_dir():
            raise DataError(f"data.folder {shown} is a file. Give the folder that holds the photos.")
        tree = read_tree(root)
    except OSError as error:
        raise DataError(
            f"cannot read {storable(str(error.filename))}: {error.strerror}. Make data.folder {shown} readable, or give another."
        ) from None
    if not any(folder.files or folder.folders for folder in tree.walk()):
        raise DataError(f"data.folder {shown} is empty; expected {EXPECTED}.")
    if not tree.all_files():
        names = _some(tree.folders)
        raise DataError(f"the class folders of data.folder {shown} ({names}) are empty. Add photos.")
    layout = told_layout(tree) if config.layout == "auto" else config.layout
    inner = _layout_of_training(tree) if layout == "splits" else layout
    places = list(_split_places(tree, inner) if layout == "splits" else _places(tree, inner))
    if not places:
        raise DataError(f"data.folder {shown} has no folders for data.layout '{layout}'; expected {EXPECTED}.")
    return Listing(_in_order({place.label for place in places}, inner), _files(tree, places), _hidden(tree))


def told_layout(tree: Folder) -> str:
    """Return the layout that a folder has by itself. Raises DataError, with the question that decides, if it has none."""
    filled, own = tree.filled, _photos_in(tree)
    inside = sum(len(folder.all_files()) for folder in filled.values())
    if not filled:
        return "single"
    splits = [name for name in filled if name.lower() in SPLIT_FOLDERS]
    if _has_split(filled):
        if len(splits) == len(filled):
            return "splits"
        others = _some([name for name in filled if name not in splits])
        raise _question(tree, f"has {' and '.join(splits)} and also {others}", splits="they are splits", classes="all are classes")
    if own >= inside:
        holds = f"holds {own} photos and the folders {_some(filled)} with {inside} files"
        raise _question(tree, holds, single="all are one class", classes="each folder is a class and the rest is left out")
    if "cat" in filled and (breeds := filled["cat"].filled):
        strangers = sorted(filled.keys() - {"cat", "other"})
        if (of_its_own := _photos_in(filled["cat"])) or strangers:
            also = f"cat/ with {of_its_own} photos" if of_its_own else f"also {_some(strangers)}"
            has = f"has cat/<Breed> folders ({_some(breeds)}) and {also}"
            raise _question(tree, has, breeds="cat/ holds breeds", classes="cat is a class")
        return "breeds"
    (name, only), *more = filled.items()
    if not more and len(only.filled) > 1 and not _photos_in(only):
        holds = f"holds nothing but {storable(name)}/, with the folders {_some(only.filled)} (or give that folder as data.folder)"
        raise _question(tree, holds, classes="it is one class", subfolders="the folders in it are the classes")
    if shared := _shared_names(filled):
        has = f"has folders with the same sub-folders ({_some(shared)} in {_some(filled)})"
        raise _question(tree, has, classes="the outer folders are the classes", subfolders="the sub-folders are")
    return "classes"


def _has_split(filled: dict[str, Folder]) -> bool:
    """Return whether there is a folder of training images, and one of others or of classes."""
    of = [SPLIT_FOLDERS[name.lower()] for name in filled if name.lower() in SPLIT_FOLDERS]
    if "train" not in of:
        return False
    return len(of) > 1 or (len(filled) == 1 and any(folder.filled for folder in filled.values()))


def _some(names: Iterable[str]) -> str:
    return shortened([storable(name) for name in names], NAMED)


def _question(tree: Folder, what: str, **layouts: str) -> DataError:
    answers = " or ".join(f"'{layout}' ({meaning})" for layout, meaning in layouts.items())
    return DataError(f"data.folder {storable(str(tree.path))} {what}: set data.layout to {answers}.")


def _shared_names(filled: dict[str, Folder]) -> list[str]:
    names = [name for folder in filled.values() for name in folder.filled]
    return sorted({name for name in names if names.count(name) > 1})


def _places(tree: Folder, layout: str) -> Iterator[Place]:
    if layout == "single":
        yield Place(SINGLE, None, tree)
    elif layout == "classes":
        for name, folder in tree.folders.items():
            yield Place(storable(name), None, folder)
    elif layout == "subfolders":
        for folder in tree.filled.values():
            yield from _places(folder, "classes")
    elif layout == "breeds":
        for name, folder in tree.folders["cat"].folders.items() if "cat" in tree.folders else ():
            if name == "other" and "other" in tree.folders:
                raise DataError(
                    f"data.folder {storable(str(tree.path))} has a breed named 'other', which is the class of all else. Rename it."
                )
            yield Place(storable(name), None, folder)
        if "other" in tree.folders:
            yield Place("other", None, tree.folders["other"])


def _splits_in(tree: Folder) -> Iterator[tuple[Split, Folder]]:
    for name, folder in tree.filled.items():
        if split := SPLIT_FOLDERS.get(name.lower()):
            yield split, folder


def _layout_of_training(tree: Folder) -> str:
    """Return the layout of the folder of training images, which is that of all splits: if in doubt, each folder is a class."""
    for split, folder in _splits_in(tree):
        if split == "train":
            with suppress(DataError):
                layout = told_layout(folder)
                return "classes" if layout == "splits" else layout
    return "classes"


def _split_places(tree: Folder, layout: str) -> Iterator[Place]:
    for split, folder in _splits_in(tree):
        for place in _places(folder, layout):
            yield place._replace(split=split)


def _in_order(labels: set[str], layout: str) -> list[str]:
    """Sort classes by name; among breeds, those that the presets know come first, in their order, and "other" last."""
    if layout != "breeds":
        return sorted(labels)
    known = {name: index for index, name in enumerate(BREEDS)}
    return sorted(labels, key=lambda name: (name == "other", known.get(name, len(known)), name))


def _files(tree: Folder, places: list[Place]) -> list[ListedFile]:
    files = [
        ListedFile(_name(path, tree), place.label, place.split, path)
        for place in places
        for path in sorted(place.folder.all_files())
    ]
    inside = {file.path for file in files}
    outside = [path for path in sorted(tree.all_files()) if path not in inside]
    return files + [ListedFile(_name(path, tree), None, None, path) for path in outside]


def _name(path: Path, tree: Folder) -> str:
    return storable(path.relative_to(tree.path).as_posix())


def storable(name: str) -> str:
    """Return a file name that can be printed and written as UTF-8 in one line; other characters and bytes as escapes."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _photos_in(folder: Folder) -> int:
    """Count the photos straight in a folder."""
    return sum(is_photo(path) for path in folder.files)


def is_photo(path: Path) -> bool:
    """Return whether a file is a photo by its suffix or its first bytes."""
    if formats.claims_photo(path.name):
        return True
    try:
        with open(path, "rb") as file:
            return formats.looks_like_photo(path.name, file.read(formats.HEAD))
    except OSError:
        return False


def _hidden(tree: Folder) -> int:
    return sum(folder.hidden for folder in tree.walk())
