"""The command line `tinycats`: each command calls a flow or one function of the core, and prints what it returns.

Nothing heavy is imported before a command runs, so that `--help` is quick.
"""

import signal
from collections.abc import Sequence

from flows.cli import build, draw, publish, status  # noqa: F401  each adds its commands to `app`, in the order of `--help`
from flows.cli.common import app
from tinycats_core.errors import TinycatsError, report_error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0; 1 after an error; 2 after wrong arguments; 130 after Ctrl-C."""
    try:
        app(args=arguments, prog_name="tinycats")
    except TinycatsError as error:
        return report_error(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit as ended:  # how typer ends every command
        return int(ended.code or 0)
    return 0
