"""What every flow's command line shares: errors as one line, and exit codes."""

import sys
from collections.abc import Callable

from prefect.exceptions import TerminationSignal

from tinycats_core.errors import TinycatsError


def run(call: Callable[[], object]) -> int:
    """Call a flow. Returns 0, 1 after an error that a person should read, or 128 + the signal that ended it."""
    try:
        call()
    except TinycatsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except TerminationSignal as stopped:
        return 128 + stopped.signal
    return 0
