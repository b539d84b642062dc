"""The errors that a person is meant to read: each names the value, the limit and the next action."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import quote

SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET", "TINYCATS_SIGN_PASSWORD")
SHORTEST_SECRET = 8  # characters: a shorter one would be found in words
TOKEN = re.compile(r"\bhf_(?:oauth_)?[A-Za-z0-9]{20,}|\ba[ks]-[A-Za-z0-9]{20,}|(?<=Bearer )[^\s\"',;)]+")  # of the Hub and of Modal

_secrets: set[str] = set()  # found elsewhere than in the environment


def keep_secret(value: str | None) -> None:
    """Let `masked` take a value out of every text from now on."""
    if value:
        _secrets.add(value)


def masked(text: str) -> str:
    """Return a text with `***` for each token and password: those in the environment, those kept, and all that look like one."""
    known = {value for name in SECRETS if (value := os.environ.get(name))} | _secrets
    for value in sorted(known, key=len, reverse=True):
        if len(value) >= SHORTEST_SECRET:
            text = text.replace(value, "***").replace(quote(value, safe=""), "***")
    return TOKEN.sub("***", text)


def printable(text: object, limit: int = 200) -> str:
    """Return what others chose as it may be printed: on one line, without escape codes, cut after `limit` characters."""
    whole = str(text)
    line = whole[:limit] if whole[:limit].isprintable() else ascii(whole[:limit])[1:-1]
    return line if len(whole) <= limit else f"{line}…"


class TinycatsError(Exception):
    """Base of every error that the project raises on purpose. Shown as one line, without a traceback and without tokens."""

    def __init__(self, *arguments: object):
        super().__init__(*(masked(item) if isinstance(item, str) else item for item in arguments))


class ConfigError(TinycatsError):
    """A configuration value is unknown or impossible."""


class DataError(TinycatsError):
    """The images cannot be used for training as they are."""


class CheckpointError(TinycatsError):
    """A checkpoint or weights file is missing, damaged or of another architecture."""


class TrainingError(TinycatsError):
    """Training cannot continue: the loss is not finite, the device is out of memory, the disk is full."""


class EvaluationError(TinycatsError):
    """A metric cannot be computed, or would mean nothing."""


class ExportError(TinycatsError):
    """The exported network does not compute what the trained one computes."""


class RegistryError(TinycatsError):
    """The registry cannot be read or written, or what stands in it is damaged."""


class ComputeError(TinycatsError):
    """The place that should train is not available: no credentials, no such device, a remote job that failed."""


class ModalUnreachable(ComputeError):
    """Modal does not answer, or not now. What was started there continues; asking again may help."""


class ReleaseRejected(TinycatsError):
    """The candidate is not good enough to be published. Carries the decision record as its `decision`."""

    def __init__(self, message: str, decision: object = None):
        super().__init__(message)
        self.decision = decision


NAMED = 5  # files named in one message


def shortened(names: Sequence[str], limit: int) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def report_error(error: object) -> int:
    """Print an error as one line on stderr. Returns the exit status of a program that failed: 1."""
    print(f"error: {_one_line(error)}", file=sys.stderr)
    return 1


@contextmanager
def exit_on_error() -> Iterator[None]:
    """End the program with one line and the exit status 1 for an error that a person is meant to read."""
    try:
        yield
    except TinycatsError as error:
        raise SystemExit(f"error: {_one_line(error)}") from None


def _one_line(error: object) -> str:
    """Return an error without tokens, line breaks and escape codes."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in " ".join(masked(str(error)).split()))
