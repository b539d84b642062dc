"""`release.json`: what a release folder holds, sealed so that a change of any byte of any file is found."""

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tinycats_core import __version__, source_code
from tinycats_core.config.forms import OTHERS
from tinycats_core.errors import NAMED, RegistryError, TinycatsError, printable
from tinycats_core.files import digest_of, parse_json, sha256_of, write_text
from tinycats_core.records import ParentRelease, Release, StageCode
from tinycats_core.release import contents
from tinycats_core.release.contents import FORMATS, JSON_LIMIT, LARGEST_RELEASE, MOST_FILES

NAME = "release.json"
FORMAT = FORMATS[-1]
SIGNATURE = "model.sig"  # of the OpenSSF's model signing, over all of the release
BESIDES = (SIGNATURE, ".gitattributes", ".git/", ".cache/huggingface/")  # what may lie beside a release
PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "safetensors",
    "torch-fidelity",
    "prefect",
    "modal",
)
LINEAGE = {  # the links, and the file of the release that each stands for; None: a part of the manifest
    "data": "data.json",
    "configuration": contents.SETTINGS,
    "code": None,
    "environment": None,
    "parent": None,
    "weights": "model.safetensors",
    "choice": "sweep.json",
    "samples": "samples/metadata.json",
    "metrics": "metrics.json",
    "denoiser-fp32": "denoiser-fp32.onnx",
    "denoiser-int8": "denoiser-int8.onnx",
    "cats-fp32": "cats-fp32.onnx",
    "cats-int8": "cats-int8.onnx",
    **{f"cats-{name}": f"cats-{name}.onnx" for name in OTHERS},
    "classifier": "classifier.safetensors",
    "classifier-onnx": "classifier.onnx",
    "decision": "decision.json",
}

KINDS = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def seal(
    folder: Path,
    name: str,
    version: str,
    key: str,
    parents: dict[str, Any],
    code: Mapping[str, StageCode] | None = None,
    parent: ParentRelease | None = None,
) -> Path:
    """Write the manifest over every file that is in the folder now, and return its path.

    Args:
        parent: the published release that this one was compared with.
    """
    from tinycats_core.device import versions  # here: it imports PyTorch, and reading a manifest should not wait for that

    files = {file: {"sha256": sha256_of(folder / file), "bytes": (folder / file).stat().st_size} for file in _files(folder)}
    manifest = {
        "format": FORMAT,
        "name": name,
        "version": version,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "key": key,
        "parents": parents,
        "code": _code(code or {}),
        "environment": versions(*PACKAGES) | {"tinycats": __version__},
        "parent": parent and parent.model_dump(mode="json"),
        "files": files,
    }
    return write_sealed(folder, {**manifest, "lineage": lineage(manifest)})


def write_sealed(folder: Path, manifest: Mapping[str, Any]) -> Path:
    """Write a manifest with the digest over itself, and return its path."""
    unsealed = {key: value for key, value in manifest.items() if key != "digest"}
    return write_text(folder / NAME, _text({**unsealed, "digest": digest_of(unsealed)}))


def lineage(manifest: Mapping[str, Any]) -> dict[str, dict[str, str | None]]:
    """Return the digest of each link: what the release comes from and what it consists of, in order."""
    chain: dict[str, dict[str, str | None]] = {}
    for link, file in LINEAGE.items():
        if file is None and manifest[link] is not None:
            chain[link] = {"file": None, "sha256": digest_of(manifest[link])}
        elif file in manifest["files"]:
            chain[link] = {"file": file, "sha256": manifest["files"][file]["sha256"]}
    return chain


def _code(stages: Mapping[str, StageCode]) -> dict[str, Any]:
    """Return the sources that each stage has run, and the commit that was checked out."""
    commit, clean = source_code.commit()
    return {
        "commit": commit,
        "clean": clean,
        "stages": {name: item.model_dump(mode="json", exclude={"core"}) for name, item in sorted(stages.items())},
    }


def verify(path: Path) -> dict[str, Any]:
    """Return the manifest of a release whose every file is there, unchanged, and known to it.

    Args:
        path: the release folder, a link to it such as `latest`, or its release.json.

    Raises:
        RegistryError: names the first files that are missing, changed or unknown.
    """
    manifest, wrong = inspect(path)
    if wrong:
        raise RegistryError(f"{path} is not an intact release: {summary(wrong)}. Restore it, or make it again.")
    return manifest


def summary(wrong: Sequence[str]) -> str:
    """Return the first few problems of a release for a message."""
    return "; ".join(wrong[:NAMED]) + (f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else "")


def inspect(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the manifest of a release and what is wrong with the release, one line for each problem.

    Whoever made the release is not trusted: links, devices and the like are not opened, and no file is read whose size is
    not the recorded one.
    """
    path = Path(path)
    folder = path.parent if path.name == NAME else path
    if not folder.is_dir():
        return {}, [f"{folder} is not a folder" if folder.exists() else f"{folder} does not exist"]
    try:
        manifest, text = _read(folder)
    except FileNotFoundError:
        return {}, [f"{folder} is not a release: it has no {NAME}"]
    except (OSError, ValueError) as error:
        return {}, [f"{NAME} cannot be read ({printable(error)})"]
    if not isinstance(manifest, dict) or manifest.get("format") not in FORMATS:
        later = isinstance(manifest, dict) and re.fullmatch(r"tinycats-release/\d{1,6}", str(manifest.get("format")))
        made = f"has the format {later[0]}, of a later tinycats; this one reads" if later else "is not a manifest of the format"
        return {}, [f"{NAME} {made} {' or '.join(FORMATS)}"]
    unsealed = {key: value for key, value in manifest.items() if key != "digest"}
    # The bytes are compared too: a change of spacing or of a number's spelling is a change.
    if digest_of(unsealed) != manifest.get("digest") or text != _text(manifest).encode():
        return manifest, [f"{NAME} has changed: it does not match the digest that it holds"]
    try:
        contents.check(manifest, NAME, contents.Manifest)
        return manifest, _differences(folder, manifest["files"])
    except (TinycatsError, OSError) as error:
        return {}, [str(error)]


def _read(folder: Path) -> tuple[Any, bytes]:
    """Return the manifest as a JSON value, and its bytes. Raises OSError and ValueError."""
    status = (folder / NAME).lstat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"it is {_kind(status.st_mode)}, not a regular file")
    if status.st_size > JSON_LIMIT:
        raise ValueError(f"it has {status.st_size:,} bytes; {JSON_LIMIT:,} are allowed")
    text = (folder / NAME).read_bytes()
    return parse_json(text), text


def read_release(path: Path) -> Release:
    """Verify a release folder, or a link to it, and return its record, located where it lies. Raises RegistryError."""
    folder = path.resolve()  # a link is followed once
    return as_record(folder, verify(folder))


def as_record(folder: Path, manifest: dict[str, Any]) -> Release:
    """Return the record of a release whose manifest has been verified."""
    file = folder / NAME
    return Release(path=file, sha256=sha256_of(file), name=manifest["name"], version=manifest["version"], location=str(folder))


def _differences(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return in what a folder differs from a manifest. Raises RegistryError if it is too large to be looked at."""
    total = sum(file["bytes"] for file in files.values())
    if total > LARGEST_RELEASE:
        raise RegistryError(f"{NAME} names {total:,} bytes; a release may have {LARGEST_RELEASE:,}")
    found = set(_files(folder)) - {NAME}
    wrong = [f"{printable(file)} is missing" for file in sorted(files.keys() - found)]
    wrong += [f"{printable(file)} is not part of the release" for file in sorted(found - files.keys())]
    return wrong + [line for file in sorted(files.keys() & found) for line in _difference(folder / file, file, files[file])]


def _difference(path: Path, file: str, recorded: Mapping[str, Any]) -> Iterator[str]:
    """Say how a file differs from what is recorded of it. Only a regular file of the recorded size is read."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        yield f"{file} is {_kind(status.st_mode)}, not a regular file"
    elif status.st_size != recorded["bytes"]:
        yield f"{file} has changed: it has {status.st_size:,} bytes, recorded were {recorded['bytes']:,}"
    else:
        try:
            digest = sha256_of(path)
        except OSError as error:
            yield f"{file} cannot be read ({error.strerror})"
            return
        if digest != recorded["sha256"]:
            yield f"{file} has changed: its sha256 is {digest[:12]}…, recorded was {recorded['sha256'][:12]}…"


def _kind(mode: int) -> str:
    return next((name for test, name in KINDS if test(mode)), "something else")


def _files(folder: Path) -> list[str]:
    """Return everything in a folder that is not itself a plain folder, by relative path.

    Raises:
        OSError: a folder cannot be read.
        RegistryError: there are more than MOST_FILES.
    """
    found: list[str] = []
    for place, folders, files in os.walk(folder, onerror=_raise):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]  # noqa: PTH114, PTH118 (many files)
        names = (os.path.relpath(os.path.join(place, name), folder).replace(os.sep, "/") for name in [*files, *links])  # noqa: PTH118
        found += [name for name in names if not name.startswith(BESIDES)]
        if len(found) > MOST_FILES:
            raise RegistryError(f"{folder} holds more than {MOST_FILES:,} files, which no release does")
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=2, allow_nan=False) + "\n"
