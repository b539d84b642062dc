"""What the current flow run says of itself: its log, and how many of its stages have run."""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from uuid import UUID

from prefect import get_run_logger
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import MissingContextError

from tinycats_core.errors import TinycatsError, masked

CRASH = "Crash detected! "  # what Prefect says of every signal, Ctrl-C too

_tallies: dict[UUID | None, Counter[str]] = defaultdict(Counter)


def count(what: str) -> None:
    """Count a stage of the current flow run as run, or as taken from the cache."""
    _tallies[flow_run_id()][what] += 1


def tally() -> str:
    """Say how many stages of the current flow run have run, and how many came from the cache."""
    counted = _tallies[flow_run_id()]
    ran, cached = counted["ran"], counted["from the cache"]
    if ran == 0:
        return f"nothing to do: no stage executed, {cached} came from the cache"
    return f"{ran} stage{'s' if ran > 1 else ''} executed, {cached} came from the cache"


def ran_nothing() -> bool:
    """Return whether every stage of the current flow run came from the cache."""
    return not _tallies[flow_run_id()]["ran"]


def log() -> logging.Logger | logging.LoggerAdapter[Any]:
    """Return the run's logger, or an ordinary one if a task is called as a plain function."""
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger("tinycats")


def flow_run_id() -> UUID | None:
    """Return the id of the current flow run; None outside of one."""
    if context := TaskRunContext.get():
        return context.task_run.flow_run_id
    context = FlowRunContext.get()
    return context.flow_run.id if context and context.flow_run else None


class _Brief(logging.Filter):
    """Show an error that is meant for people once and without its traceback, and no second line for a finished task."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == "prefect.task_runs" and record.msg.startswith("Finished in state"):
            return False  # the stage has said it with its time; a failure is told by its error
        if record.msg.startswith(CRASH):
            if record.name == "prefect.task_runs":
                return False  # the flow run tells it
            record.msg = record.msg.removeprefix(CRASH).replace("Execution was aborted", "The run was stopped")
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, TinycatsError):
            record.exc_info = record.exc_text = None
            record.msg, record.args = str(error), ()
            return record.name != "prefect.flow_runs"  # its task has said it already, or its final state will
        return True


def _without_tokens(make: Callable[..., logging.LogRecord]) -> Callable[..., logging.LogRecord]:
    """Return a factory of log records that hold no token, whichever library writes them and wherever they go."""

    def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        with suppress(TypeError, ValueError):  # a format that does not fit its values is reported by its handler
            if (text := record.getMessage()) != (clean := masked(text)):
                record.msg, record.args = clean, ()
        if record.exc_info and record.exc_info[0] is not None:
            text = _formatter.formatException(record.exc_info)
            if text != (clean := masked(text)):
                record.exc_text = clean  # what every formatter uses if it is there
        return record

    return factory


_formatter = logging.Formatter()
logging.setLogRecordFactory(_without_tokens(logging.getLogRecordFactory()))
for _name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_name).addFilter(_Brief())
logging.getLogger("tinycats").setLevel(logging.INFO)  # Prefect gives `extra_loggers` a handler, but no level
