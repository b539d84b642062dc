"""What a publication changes, file by file."""

from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple

from tinycats_core.errors import NAMED, RegistryError, printable, shortened


class Change(NamedTuple):
    """What happens to one file of a repository."""

    action: Literal["add", "replace", "delete", "keep"]
    file: str
    bytes: int  # of the new file, or of the one that is deleted or kept


def make_plan(
    new: Mapping[str, int], there: Mapping[str, int], ours: Collection[str], same: Collection[str], where: str
) -> list[Change]:
    """Return the changes that turn what is there into a new release, sorted by action and file.

    Args:
        new: the files of the release, and their sizes.
        there: the files that are there, and their sizes.
        ours: those that may be replaced or deleted.
        same: those that are in the release with the same content.

    Raises:
        RegistryError: a file of the release is there and not ours.
    """
    if taken := sorted(new.keys() & there.keys() - {*ours} - {*same}):
        raise RegistryError(
            f"{where} holds files of its owner that the release would overwrite: {shown(taken)}. Rename or remove them there."
        )
    changes = [
        *(Change("add", file, size) for file, size in new.items() if file not in there),
        *(Change("replace", file, size) for file, size in new.items() if file in there and file not in same),
        *(Change("delete", file, size) for file, size in there.items() if file in ours and file not in new),
        *(Change("keep", file, size) for file, size in there.items() if file not in ours or file in same),
    ]
    actions = ("add", "replace", "delete", "keep")
    return sorted(changes, key=lambda change: (actions.index(change.action), change.file))


def shown(files: Sequence[str]) -> str:
    """Return the first few names of files for a message."""
    return shortened([*map(printable, files)], NAMED)


def plan_lines(changes: Sequence[Change]) -> list[str]:
    """Return a plan for people, a line for each file, and a last one with the sums."""
    width = max((len(f"{change.bytes:,}") for change in changes), default=1)
    lines = [f"{change.action:7}  {change.bytes:>{width},}  {printable(change.file)}" for change in changes]
    sent = sum(change.bytes for change in changes if change.action in ("add", "replace"))
    count = {action: sum(change.action == action for change in changes) for action in ("add", "replace", "delete", "keep")}
    return [*lines, f"{', '.join(f'{action} {number}' for action, number in count.items())}; {sent:,} bytes to send"]
