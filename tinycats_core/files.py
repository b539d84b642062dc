"""Files that are either complete or absent, and their sha256."""

import hashlib
import json
import math
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from tinycats_core.errors import TinycatsError, printable

HomeFolder = Literal[
    "data", "budgets", "classifier", "training", "modal", "evaluations", "samples", "decisions", "export", "downloads", "bases",
    "results", "code", "web",
]  # fmt: skip
HOME: dict[HomeFolder, str] = {  # the map of home()
    "data": "decoded data sets, and downloaded archives",
    "budgets": "what the minutes of a release have been spent on",
    "classifier": "a folder for each trained breed classifier",
    "training": "a folder for each run: checkpoints, weights, log and diary",
    "modal": "the weights that `modal run deployments/modal_app.py::train` downloads",
    "evaluations": "reports, sweeps, and cached features of real images",
    "samples": "sample sets",
    "decisions": "decisions of the gate",
    "export": "ONNX files and their checks",
    "downloads": "releases from the Hub",
    "bases": "weights that trainings start from",
    "results": "Prefect's task results: the cache of the stages",
    "web": "the runtime of the pages that draw in a browser",
    "code": "which code has run for the results of the stages",
}
FOLDER = "TINYCATS_FOLDER"
JSON_BYTES = 64 * 2**20
JSON_DEPTH = 64  # levels
JSON_DIGITS = 20  # of an integer
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


def read_json(path: Path, limit: int = JSON_BYTES) -> Any:
    """Read a JSON file of at most `limit` bytes.

    Raises:
        TinycatsError: the file is missing, is no regular file, is too large, or `parse_json` refuses it.
    """
    path = Path(path)
    try:
        if not path.is_file() and path.exists():
            raise TinycatsError(f"{printable(path)} is not a regular file. Remove it, or restore it from its source.")
        if (size := path.stat().st_size) > limit:
            raise TinycatsError(f"{path} has {size:,} bytes; a JSON file may have {limit:,}. Restore it from its source.")
        return parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise TinycatsError(f"{path} does not exist.") from None
    except OSError as error:
        raise TinycatsError(f"{path} cannot be read: {error.strerror or error}. Restore it from its source.") from None
    except ValueError as error:
        raise TinycatsError(f"{path} is not a JSON file ({error}). Remove it, or restore it from its source.") from None


def parse_json(text: str | bytes) -> Any:
    """Return a JSON value.

    Raises:
        ValueError: it is not JSON, or not what this project writes: NaN or infinity, an integer of more than JSON_DIGITS
            digits, more than JSON_DEPTH levels, half of a surrogate pair.
    """
    try:
        value = json.loads(text, parse_int=_integer, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError(f"it has more than {JSON_DEPTH} levels") from None
    level, depth = [value], 1
    while level := [item for part in level if isinstance(part, dict | list) for item in _items(part)]:
        depth += 1
        if depth > JSON_DEPTH:
            raise ValueError(f"it has more than {JSON_DEPTH} levels")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair, which is no character") from None
    return value


def _items(part: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return part.values() if isinstance(part, dict) else part


def _integer(digits: str) -> int:
    if len(digits) > JSON_DIGITS:
        raise ValueError(f"it holds an integer of {len(digits):,} digits; at most {JSON_DIGITS} are allowed")
    return int(digits)


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"it holds {printable(number, 20)}, which is not a finite number")
    return value


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


def working_folder() -> dict[str, str]:
    """Return the folder that holds `releases/` and `.tinycats/` on this machine, as a pull step of Prefect does.

    Raises:
        TinycatsError: TINYCATS_FOLDER is not set, or there is no such folder.
    """
    folder = os.environ.get(FOLDER, "")
    if not folder or not Path(folder).is_dir():
        found = f"{folder}, which is no folder" if folder else "not set"
        raise TinycatsError(
            f"{FOLDER} is {found} on {socket.gethostname()}; set it to the folder for releases/ and .tinycats/, and start the "
            "worker again"
        )
    return {"directory": folder}


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
    """Bring a file or a folder to the disk; on Windows only a file, because there no folder can be opened."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
