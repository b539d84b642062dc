"""`release.json`: what a release folder holds, sealed so that a change of any byte of any file is found."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tinycats_core import source_code
from tinycats_core.errors import RegistryError
from tinycats_core.files import digest_of, sha256_of, write_text
from tinycats_core.records import Release, StageCode

NAME = "release.json"
FORMAT = "tinycats-release/1"
SIGNATURE = "model.sig"  # of the OpenSSF's model signing, over all of the release
BESIDES = (SIGNATURE, ".gitattributes", ".git/", ".cache/huggingface/")  # what may lie beside a release
FIELDS = {"format", "name", "version", "created_at", "key", "parents", "files", "digest"}
LATER_FIELDS = {"code"}  # which releases of before do not have


def seal(
    folder: Path, name: str, version: str, key: str, parents: dict[str, Any], code: Mapping[str, StageCode] | None = None
) -> Path:
    """Write the manifest over every file that is in the folder now, and return its path."""
    files = {file: {"sha256": sha256_of(folder / file), "bytes": (folder / file).stat().st_size} for file in _files(folder)}
    manifest = {
        "format": FORMAT,
        "name": name,
        "version": version,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "key": key,
        "parents": parents,
        "code": _code(code or {}),
        "files": files,
    }
    return write_text(folder / NAME, _text({**manifest, "digest": digest_of(manifest)}))


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
        RegistryError: names each file that is missing, changed or unknown.
    """
    manifest, wrong = inspect(path)
    if wrong:
        raise RegistryError(f"{path} is not an intact release: {'; '.join(wrong)}. Restore it, or make it again.")
    return manifest


def inspect(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the manifest of a release and what is wrong with the release, one line for each problem."""
    path = Path(path)
    folder = path.parent if path.name == NAME else path
    if not folder.is_dir():
        return {}, [f"{folder} is not a folder" if folder.exists() else f"{folder} does not exist"]
    try:
        text = (folder / NAME).read_bytes()
        manifest = json.loads(text)
    except FileNotFoundError:
        return {}, [f"{folder} is not a release: it has no {NAME}"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        return {}, [f"{NAME} cannot be read ({error})"]
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return {}, [f"{NAME} is not a manifest of the format {FORMAT}"]
    unsealed = {key: value for key, value in manifest.items() if key != "digest"}
    # The bytes are compared too: a change of spacing or of a number's spelling is a change.
    if (
        not FIELDS <= manifest.keys() <= FIELDS | LATER_FIELDS
        or digest_of(unsealed) != manifest["digest"]
        or text != _text(manifest).encode()
    ):
        return manifest, [f"{NAME} has changed: it does not match the digest that it holds"]
    return manifest, _differences(folder, manifest["files"])


def read_release(path: Path) -> Release:
    """Verify a release folder, or a link to it, and return its record, located where it lies. Raises RegistryError."""
    folder = path.resolve()  # a link is followed once
    return as_record(folder, verify(folder))


def as_record(folder: Path, manifest: dict[str, Any]) -> Release:
    """Return the record of a release whose manifest has been verified."""
    file = folder / NAME
    return Release(path=file, sha256=sha256_of(file), name=manifest["name"], version=manifest["version"], location=str(folder))


def _differences(folder: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    found = set(_files(folder)) - {NAME}
    wrong = [f"{file} is missing" for file in sorted(files.keys() - found)]
    wrong += [f"{file} is not part of the release" for file in sorted(found - files.keys())]
    for file in sorted(files.keys() & found):
        try:
            digest = sha256_of(folder / file)
        except OSError as error:
            wrong.append(f"{file} cannot be read ({error.strerror})")
            continue
        if digest != files[file]["sha256"]:
            wrong.append(f"{file} has changed: its sha256 is {digest[:12]}…, recorded was {files[file]['sha256'][:12]}…")
    return wrong


def _files(folder: Path) -> list[str]:
    """Return everything in a folder that is not itself a plain folder, by relative path."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    names = (path.relative_to(folder).as_posix() for path in found)
    return sorted(name for name in names if not name.startswith(BESIDES))


def _text(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=2, allow_nan=False) + "\n"
