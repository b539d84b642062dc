"""What was published under a name, when and why: the lines of `<registry>/<name>/history.jsonl`."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from tinycats_core.config import Part
from tinycats_core.errors import RegistryError
from tinycats_core.files import write_text
from tinycats_core.release.contents import Verdict
from tinycats_core.release.contents import read as read_content

FILE = "history.jsonl"
LONGEST_WHY = 500

How = Literal["release", "forced", "rollback"]


class Entry(Part):
    """One publication: a version that took the place of the one before."""

    at: str  # UTC, ISO 8601; "" if it is not known
    version: str
    how: How
    why: str | None = None
    before: str | None = None  # the version that was published until then; None = nothing, or not recorded


def check_why(why: str) -> str:
    """Return the reason that a person gives for a rollback or a forced release, on one line.

    Raises:
        RegistryError: it is empty or longer than LONGEST_WHY characters.
    """
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in why).split())
    if not text:
        raise RegistryError(f"the reason is {why!r}. Say why in a few words, such as 'the eyes are gone'.")
    if len(text) > LONGEST_WHY:
        raise RegistryError(f"the reason has {len(text)} characters; at most {LONGEST_WHY} are recorded. Say it in fewer.")
    return text


def entry(version: str, how: How, why: str | None, before: str | None) -> Entry:
    """Return an entry of this moment."""
    return Entry(at=datetime.now(UTC).isoformat(timespec="seconds"), version=version, how=how, why=why, before=before)


def origin(folder: Path) -> tuple[How, str | None]:
    """Return how a release comes to be published, by its decision, and the reason that a person gave for it."""
    verdict = decision(folder)
    return ("forced", verdict.forced) if verdict and verdict.forced else ("release", None)


def decision(folder: Path) -> Verdict | None:
    """Return the gate's decision on a release; None if the release holds none. Raises RegistryError for anything unreadable."""
    return read_content(folder, "decision.json", Verdict) if (folder / "decision.json").exists() else None


def read(folder: Path, published: str | None) -> list[Entry]:
    """Return the publications of a name, oldest first; none for a registry from before there was a history.

    An entry is written before `latest` changes. The last one does not count if the change never came.

    Args:
        folder: `<registry>/<name>`.
        published: the version that `latest` names.

    Raises:
        RegistryError: the file cannot be read, or a line of it is no entry.
    """
    path = folder / FILE
    entries = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise RegistryError(f"{path} cannot be read ({error}). Restore it, or remove it: a new one is started.") from None
    for number, line in enumerate(lines, 1):
        try:
            entries.append(Entry.model_validate_json(line))
        except ValidationError:
            raise RegistryError(
                f"line {number} of {path} is no entry of a history. Restore it, or remove it: a new one is started."
            ) from None
    if entries and published != entries[-1].version and published == entries[-1].before:
        entries.pop()
    return entries


def write(folder: Path, entries: Sequence[Entry]) -> Path:
    """Write the entries in one step. Returns the file."""
    return write_text(folder / FILE, text(entries))


def text(entries: Sequence[Entry]) -> str:
    """Return what the file holds: a JSON object for each entry, on a line of its own."""
    return "".join(json.dumps(line.model_dump()) + "\n" for line in entries)
