"""The errors that a person is meant to read: each names the value, the limit and the next action."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class TinycatsError(Exception):
    """Base of every error that the project raises on purpose. Shown as one line, without a traceback."""


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
    print(f"error: {error}", file=sys.stderr)
    return 1


@contextmanager
def exit_on_error() -> Iterator[None]:
    """End the program with one line and the exit status 1 for an error that a person is meant to read."""
    try:
        yield
    except TinycatsError as error:
        raise SystemExit(f"error: {error}") from None
