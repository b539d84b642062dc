"""What every flow's command line shares: settings from a shell, errors as one line, and exit codes."""

import argparse
import errno
import logging
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from prefect.settings import PREFECT_API_URL

from flows.server import check_server, give_temporary_server_a_port
from tinycats_core.errors import TinycatsError, report_error
from tinycats_core.presets import PRESETS, parse_overrides, resolve


def add_settings(parser: argparse.ArgumentParser, example: str, preset: bool = True) -> None:
    """Add the options that say which configuration is meant."""
    if preset:
        parser.add_argument("--preset", default="smoke", help=f"one of: {', '.join(PRESETS)} (default: %(default)s)")
    parser.add_argument("--overrides", default="{}", metavar="JSON", help=f"such as '{example}' (default: %(default)s)")


def settings(given: argparse.Namespace) -> dict[str, Any]:
    """Return preset and overrides as a flow takes them, after resolving them once: no server is started for a typo."""
    overrides = parse_overrides(given.overrides)
    resolve(given.preset, overrides)
    return {"preset": given.preset, "overrides": overrides}


def run(call: Callable[[], object]) -> int:
    """Call a flow. Returns 0, 1 after an error that a person should read, or 130 after Ctrl-C; SIGTERM exits with 143."""
    # Prefect hands the signal on to the handler from before the flow; Python's own would leave Prefect's server running.
    signal.signal(signal.SIGTERM, _exit)
    for handler in logging.getLogger("prefect").handlers:  # what the core says, on the same console
        logging.getLogger("tinycats").addHandler(handler)
    try:
        if url := PREFECT_API_URL.value():
            check_server(str(url))
        else:
            give_temporary_server_a_port()
        call()
    except TinycatsError as error:
        return report_error(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        return report_error(f"{error.strerror}: {error.filename}. Make room and run the same command: what is finished stays.")
    except RuntimeError as error:
        if not str(error).startswith("Failed to reach API"):
            raise
        url = PREFECT_API_URL.value()
        return report_error(
            f"no Prefect server answers at PREFECT_API_URL={url}. Start one with `make serve`, or unset PREFECT_API_URL."
        )
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; the same command resumes", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
