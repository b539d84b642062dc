"""The folder registry: `<folder>/<name>/<version>` holds a release, `<folder>/<name>/latest` names the published one."""

import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from tinycats_core.config import NAME_PATTERN, PublishConfig
from tinycats_core.errors import RegistryError, TinycatsError
from tinycats_core.files import check_writable, make_folder, read_json, write_json
from tinycats_core.records import Release
from tinycats_core.release import history
from tinycats_core.release.history import Entry
from tinycats_core.release.manifest import NAME, SIGNATURE, as_record, inspect, verify
from tinycats_core.release.plan import Change, make_plan

MARKER = "registry.json"
FORMAT = "tinycats-registry/1"
LATEST = "latest"


def open_registry(folder: Path) -> Path:
    """Return the registry's folder, and create it if it is missing or empty.

    Raises:
        RegistryError: it is a file, a folder that holds something else, or it cannot be written to.
    """
    try:
        if not is_registry(folder):
            make_folder(folder)
            write_json(folder / MARKER, {"format": FORMAT})
        return check_writable(folder)
    except RegistryError:
        raise
    except (TinycatsError, OSError) as error:
        raise RegistryError(f"the registry publish.folder={folder} cannot be used: {error}") from error


def find_published(config: PublishConfig) -> Release | None:
    """Return the release that is published in the folder registry, or None.

    Raises:
        RegistryError: the folder is no registry, `latest` leads nowhere, or the release that it names is damaged.
    """
    latest = config.folder / config.name / LATEST
    # The link is read once: another publisher may point it elsewhere in between.
    if not is_registry(config.folder) or (version := _named_by(latest)) is None:
        return None
    advice = _advice(latest)
    folder = latest.with_name(version)
    if not folder.is_dir():
        raise RegistryError(f"{latest} names {version}, which is not there. {advice}.")
    manifest, wrong = inspect(folder)
    if wrong:
        raise RegistryError(f"the published release {folder} is damaged: {'; '.join(wrong)}. {advice}.")
    return as_record(folder, manifest).model_copy(update={"published": True})


def publish_to_folder(release: Release, instead_of: str | None) -> Release:
    """Publish a release of the registry, in one step, and record it in the history. The one before stays where it is.

    Args:
        instead_of: the version that it was compared with; None = nothing was published.

    Raises:
        RegistryError: the release is damaged, another one was published meanwhile, or `latest` cannot be written.
    """
    verify(release.folder)
    latest = release.folder.parent / LATEST
    how, why = history.origin(release.folder)
    with _alone_in(latest.parent):
        before = _named_by(latest)
        require_unchanged(release, before, instead_of)
        _point(latest, history.entry(release.version, how, why, before))
    return release.model_copy(update={"published": True})


def rollback(folder: Path, name: str, version: str, why: str) -> Release:
    """Publish an earlier version again, in one step, and record it in the history. Returns its record.

    Args:
        folder: the registry.
        why: the reason, for the history.

    Raises:
        RegistryError: there is no such registry, name or published version, it is damaged, it is published now, or there is
            no reason.
    """
    why, latest = history.check_why(why), _latest(folder, name)
    with _alone_in(latest.parent):
        before = _named_by(latest)
        release = _published_before(latest, version, before)
        _point(latest, history.entry(version, "rollback", why, before))
    return release.model_copy(update={"published": True})


def read_history(folder: Path, name: str) -> list[Entry]:
    """Return what was published under a name, oldest first; what is older than the history has no date.

    Raises:
        RegistryError: there is no such registry or name, or its history cannot be read.
    """
    latest = _latest(folder, name)
    published = _named_by(latest)
    entries = history.read(latest.parent, published)
    first = entries[0].before if entries else published
    unrecorded = [Entry(at="", version=first, how="release")] if first else []
    if entries and published not in (None, entries[-1].version):
        return [*unrecorded, *entries, Entry(at="", version=published, how="release", before=entries[-1].version)]
    return [*unrecorded, *entries]


def plan_in_folder(release: Release, instead_of: str | None) -> list[Change]:
    """Return what publishing a release of the registry would change below the folder of its name. Changes nothing.

    Raises:
        RegistryError: as `publish_to_folder`.
    """
    files = {f"{release.version}/{file}" for file in release_files(release.folder, verify(release.folder))}
    folder, (how, why) = release.folder.parent, history.origin(release.folder)
    before = _named_by(folder / LATEST)
    require_unchanged(release, before, instead_of)
    there = {file: (folder / file).stat().st_size for file in files}
    new = dict(there)
    if before != release.version:
        entries = [*history.read(folder, before), history.entry(release.version, how, why, before)]
        new |= {LATEST: len(release.version), history.FILE: len(history.text(entries))}
        there |= {file: 0 for file in (LATEST, history.FILE) if (folder / file).is_symlink() or (folder / file).exists()}
    return make_plan(new, there, {LATEST, history.FILE}, files, str(folder))


def release_files(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Return what is published of a verified release: its manifest, the files that it lists and, if there is one, its signature."""
    return [NAME, *manifest["files"], *([SIGNATURE] if (folder / SIGNATURE).is_file() else [])]


def require_unchanged(release: Release, published: str | None, instead_of: str | None) -> None:
    """Raise RegistryError unless what is published is what a release was compared with, or the release itself."""
    if published not in (instead_of, release.version):
        raise RegistryError(
            f"{release.name} {release.version} was compared with {instead_of or 'nothing'}, and meanwhile {published or 'that'} "
            f"was {'published' if published else 'withdrawn'}. Run the same command again: it compares anew."
        )


def _latest(folder: Path, name: str) -> Path:
    """Return the link of a name in a registry. Raises RegistryError if there is no such registry or name."""
    place = folder / name if re.fullmatch(NAME_PATTERN, name) else None
    if not is_registry(folder) or place is None or not place.is_dir():
        raise RegistryError(f"{folder} holds no releases of {name!r}. Give the name of a release there, and --folder.")
    return place / LATEST


def _published_before(latest: Path, version: str, published: str | None) -> Release:
    """Return an intact release that was published before. Raises RegistryError for any other version."""
    folder, name = latest.parent, latest.parent.name
    known = {path.parent.name for path in folder.glob(f"*/{NAME}") if not path.parent.is_symlink()}
    if version not in known:
        raise RegistryError(f"{name} has no version {version!r}; there are: {', '.join(sorted(known)) or 'none'}.")
    if version == published:
        raise RegistryError(f"{name} {version} is the published version already: there is nothing to roll back.")
    manifest, wrong = inspect(folder / version)
    if wrong:
        raise RegistryError(f"{name} {version} is damaged: {'; '.join(wrong)}. Restore it, or give another version.")
    if (manifest["name"], manifest["version"]) != (name, version):
        raise RegistryError(f"{folder / version} holds {manifest['name']} {manifest['version']}. Give another version.")
    entries = history.read(folder, published)
    seen = {*(item.version for item in entries), *(item.before for item in entries)}
    if entries and entries[0].before is None and version not in seen:
        raise RegistryError(f"{name} {version} was never published. Publish it with `tinycats promote {folder / version}`.")
    return as_record(folder / version, manifest)


def _point(latest: Path, change: Entry) -> None:
    """Point `latest` at a version, with an entry in the history. The caller holds the lock."""
    if change.version == change.before:
        return
    temporary = latest.with_name(f".{LATEST}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        # The entry comes first: without the change of `latest` it does not count.
        history.write(latest.parent, [*history.read(latest.parent, change.before), change])
        temporary.symlink_to(change.version)
        temporary.replace(latest)
    except OSError as error:
        raise RegistryError(
            f"{latest} cannot be pointed at {change.version}: {error.strerror}. Remove what is there, "
            "or give a folder that you may write to, and run it again."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _named_by(latest: Path) -> str | None:
    """Return the version that `latest` names, None if there is none. Raises RegistryError for anything but a link."""
    if not (latest.is_symlink() or latest.exists()):
        return None
    version = str(latest.readlink()) if latest.is_symlink() else ""
    if version in ("", ".", "..") or "/" in version:
        raise RegistryError(f"{latest} is not a link to a version beside it. {_advice(latest)}.")
    return version


def _advice(latest: Path) -> str:
    return f"Restore it, or remove {latest}: then the next release is compared with nothing"


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; on a file system without locks, continue without."""
    lock = FileLock(folder / ".lock")
    with suppress(OSError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def is_registry(folder: Path) -> bool:
    """Return whether the folder is a registry; False if it is missing or empty. Raises RegistryError for anything else."""
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise RegistryError(f"publish.folder={folder} is a file. Give a folder.")
    try:
        # Files that another publisher is writing (.*.tmp, .*.probe) do not make an empty folder a foreign one.
        names = {path.name for path in folder.iterdir() if not path.name.endswith((".tmp", ".probe"))}
    except OSError as error:
        raise RegistryError(f"publish.folder={folder} cannot be read: {error.strerror}. Give another folder.") from None
    if MARKER in names and _is_marker(folder / MARKER):
        return True
    if names:
        raise RegistryError(
            f"publish.folder={folder} holds other things ({', '.join(sorted(names)[:3])}) and is not a registry of releases. "
            "Give an empty or a new folder."
        )
    return False


def _is_marker(path: Path) -> bool:
    try:
        marker = read_json(path)
    except TinycatsError:
        return False
    return isinstance(marker, dict) and marker.get("format") == FORMAT
