"""Files that are either complete or absent, and their sha256."""

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from tinycats_core.errors import TinycatsError

HomeFolder = Literal[
    "data", "classifier", "training", "modal", "evaluations", "samples", "decisions", "export", "downloads", "results", "code"
]
HOME: dict[HomeFolder, str] = {  # the map of home()
    "data": "decoded data sets, and downloaded archives",
    "classifier": "a folder for each trained breed classifier",
    "training": "a folder for each run: checkpoints, weights, log and diary",
    "modal": "the weights that `modal run deployments/modal_app.py::train` downloads",
    "evaluations": "reports, sweeps, and cached features of real images",
    "samples": "sample sets",
    "decisions": "decisions of the gate",
    "export": "ONNX files and their checks",
    "downloads": "releases from the Hub",
    "results": "Prefect's task results: the cache of the stages",
    "code": "which code has run for the results of the stages",
}
_UMASK = os.umask(0o077)  # there is no way to read it but to set it

os.umask(_UMASK)


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """Return the hex sha256 of a JSON value in canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextmanager
def atomic_path(path: Path, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync and rename it to `path`, on failure remove it.

    Works for a file and for a folder. An existing file is replaced in one step; an existing folder is moved aside and
    then removed, because no rename replaces a folder that is not empty. Without `replace` a folder that has come to
    stand there in the meantime stays, and this is an OSError.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        yield temporary
        if temporary.is_dir():
            for file in temporary.rglob("*"):
                if file.is_file():
                    _settle(file)
            if replace and path.exists():
                aside = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.old"
                path.rename(aside)
                temporary.rename(path)
                shutil.rmtree(aside)
            else:
                temporary.rename(path)
        else:
            _settle(temporary)
            temporary.replace(path)
        _fsync(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """Call `write(temporary path)` and move what it wrote to `path` in one step. Returns `path`."""
    with atomic_path(path) as temporary:
        write(temporary)
    return path


def write_together(folder: Path, files: Mapping[str, Callable[[Path], object]]) -> list[Path]:
    """Write files to a folder, which may exist, so that all of them appear there or, if one cannot be written, none.

    Args:
        files: for each name, what writes the file to a path.

    Raises:
        TinycatsError: the folder cannot be written to, or the disk is full.
    """
    make_folder(folder)
    try:
        with tempfile.TemporaryDirectory(prefix=".tinycats-", suffix=".tmp", dir=folder) as temporary:
            for name, write in files.items():
                write(Path(temporary) / name)
            return [(Path(temporary) / name).replace(folder / name) for name in files]
    except OSError as error:
        raise TinycatsError(f"cannot write to {folder}: {error.strerror}. Give another folder, or make room.") from None


def write_text(path: Path, text: str) -> Path:
    """Write text atomically, as UTF-8."""
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> Path:
    """Write a JSON value atomically, indented. NaN and infinity are errors: they are not JSON."""
    return write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        TinycatsError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise TinycatsError(f"{path} does not exist.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TinycatsError(f"{path} is not a JSON file ({error}). Remove it, or restore it from its source.") from None


def make_folder(path: Path) -> Path:
    """Create a folder and its parents.

    Raises:
        TinycatsError: something in the path is a file, or the place cannot be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise TinycatsError(f"cannot write to {path}: {reason}. Give a folder that you may write to.") from None
    return path


def check_writable(path: Path) -> Path:
    """Create the folder if it is missing and prove, by writing a byte, that files can be made in it."""
    make_folder(path)
    probe = path / f".{uuid.uuid4().hex[:8]}.probe"
    try:
        probe.write_bytes(b"1")
        probe.unlink()
    except OSError as error:
        raise TinycatsError(f"cannot write to {path}: {error.strerror}. Give a folder that you may write to.") from None
    return path


def expanded(path: str | Path) -> Path:
    """Return a path in full, with a user's own folder for `~`. Raises ValueError for an unknown user, or a name not in UTF-8."""
    if not str(path).isascii() and str(path).encode("utf-8", "replace").decode() != str(path):
        raise ValueError("its name is not UTF-8, so it cannot be recorded; rename it, or give a link to it under another name")
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError:
        raise ValueError(f"{Path(path).parts[0]} is the folder of a user who is not known here; write the path in full") from None


def home(folder: HomeFolder | None = None) -> Path:
    """Return the folder for everything that is made before a release (TINYCATS_HOME, or .tinycats), or one of HOME in it.

    Raises:
        TinycatsError: it is below the folder of a user who is not known.
    """
    named = os.environ.get("TINYCATS_HOME") or ".tinycats"
    try:
        return expanded(named) / (folder or "")
    except ValueError as error:
        raise TinycatsError(f"TINYCATS_HOME is {named!r}: {error}") from None


def size_of(path: Path) -> tuple[int, int]:
    """Return how many bytes the files below a folder have, and how many files there are; links count as nothing."""
    sizes = []
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):  # it has been removed meanwhile
                if not (file := Path(folder, name)).is_symlink():
                    sizes.append(file.stat().st_size)
    return sum(sizes), len(sizes)


def _settle(path: Path) -> None:
    """Give a file the mode that any new file has (safetensors writes for its owner alone) and bring it to the disk."""
    path.chmod(0o666 & ~_UMASK)
    _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
