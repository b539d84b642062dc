"""What makes a function a stage: a Prefect task whose result is looked up by the content of its arguments."""

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from uuid import UUID

from prefect import Task, get_run_logger
from prefect.cache_policies import CachePolicy
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import MissingContextError

from tinycats_core.config import ComputeConfig, DataConfig, Part
from tinycats_core.data import preparation
from tinycats_core.errors import ModalUnreachable, TinycatsError
from tinycats_core.files import digest_of, home
from tinycats_core.records import FileRecord, OnnxModel, Record, Release
from tinycats_core.release import hub, manifest

P = ParamSpec("P")
R = TypeVar("R")


def may_pass(task: Any, run: Any, state: State[Any]) -> bool:
    """Return whether Prefect should retry a failed task: after an outage, never after a refusal."""
    error = state.data
    return isinstance(error, ModalUnreachable) or (isinstance(error, Exception) and hub.is_transient(error))


NETWORK: dict[str, Any] = {"retries": 3, "retry_delay_seconds": [5, 20, 60], "retry_condition_fn": may_pass}

_tallies: dict[UUID | None, Counter[str]] = defaultdict(Counter)


def stage(version: int, beside: tuple[str, ...] = (), **options: Any) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Make a Prefect task that runs once for each content of its arguments.

    Before it runs, the files of every record among its arguments are verified: what it calls may trust them. The result is
    stored as JSON under `files.home()`. It is used again as long as the files that it names are unchanged, wherever its
    arguments lie; otherwise the stage runs again.

    Args:
        version: part of the key; raise it when the stage's meaning changes.
        beside: names of further files which the stage leaves in the folder of its record.
        options: passed on to `prefect.task`.
    """

    def decorate(function: Callable[P, R]) -> Task[P, R]:
        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            _verify((args, kwargs))
            count("ran")
            started = time.monotonic()
            result = function(*args, **kwargs)
            log().info("%s: done in %.1f s", function.__name__, time.monotonic() - started)
            return result

        return Task(
            fn=run,
            cache_policy=ByContent(version=version, beside=beside),
            persist_result=True,
            result_storage=home("results"),
            result_serializer="json",
            cache_result_in_memory=False,
            **options,
        )

    return decorate


def _verify(arguments: Any) -> None:
    """Verify each file of the records among a stage's arguments, once. Raises TinycatsError."""
    for file in {(file.path, file.sha256): file for file in _files_of(arguments)}.values():
        FileRecord.verify(file)


def _files_of(value: Any) -> Iterator[FileRecord]:
    match value:
        case Record() | Part():
            if isinstance(value, Record):
                yield from value.files
            yield from _files_of([getattr(value, name) for name in type(value).model_fields])
        case dict():
            yield from _files_of(list(value.values()))
        case list() | tuple():
            for item in value:
                yield from _files_of(item)


@dataclass
class ByContent(CachePolicy):
    """Keys made of the arguments' content; a stored result whose files are gone or changed is forgotten."""

    version: int = 1
    beside: tuple[str, ...] = ()

    def compute_key(self, task_ctx: TaskRunContext, inputs: dict[str, Any], flow_parameters: dict[str, Any], **kwargs: Any) -> str:
        name, store = task_ctx.task.name, task_ctx.result_store
        key = f"{name}-{key_of(self.version, inputs, length=32)}"
        if store.exists(key):
            try:
                result = store.read(key).result
            except Exception as error:  # of many kinds: a process was killed while it wrote, or writes now
                log().warning("%s: its stored result cannot be read (%s), so it runs again", name, type(error).__name__)
                self._forget(key)
                return key
            if self._is_intact(result):
                count("from the cache")
                log().info("%s: from the cache", name)
            else:
                log().warning("%s: its files are gone or have changed, so it runs again", name)
                self._set_aside(result)
                self._forget(key)
        return key

    def _forget(self, key: str) -> None:
        (home("results") / key).unlink(missing_ok=True)

    def _is_intact(self, result: Any) -> bool:
        if isinstance(result, Release):
            return not manifest.inspect(result.folder)[1]
        if not isinstance(result, Record):
            return True
        return result.is_intact() and all(path.is_file() for path in self._files(result))

    def _set_aside(self, result: Any) -> None:
        """Rename what is left of a result, so that the stage does not take it for finished work."""
        for path in self._files(result):
            if not isinstance(result, Release):  # a damaged release is set aside by `bundle.build`
                with suppress(FileNotFoundError):  # gone, or set aside by another process
                    path.replace(path.with_name(f"{path.name}.damaged"))

    def _files(self, result: Record) -> list[Path]:
        paths = [file.path for file in result.files]
        return [*paths, *(paths[0].with_name(name) for name in self.beside)]


def key_of(*values: Any, length: int = 12) -> str:
    """Return a short digest of the values' content: what they are, not where they lie nor where they are computed."""
    return digest_of([content_of(value) for value in values])[:length]


def content_of(value: Any) -> Any:
    """Return what a value contributes to a key: a JSON value. Raises TypeError for what has no content of its own."""
    match value:
        case OnnxModel():
            return [value.precision, value.sha256]  # its facts are measurements, which differ from time to time
        case Record():
            return value.content
        case ComputeConfig():
            return None  # does not change what is computed
        case DataConfig():
            return [value.digest(), preparation.fingerprint(value)]
        case Part():
            return {name: content_of(getattr(value, name)) for name in type(value).model_fields}
        case dict():
            return {str(name): content_of(item) for name, item in value.items()}
        case list() | tuple():
            return [content_of(item) for item in value]
        case None | bool() | int() | float() | str():
            return value
        case Path():
            return str(value)
        case _:
            raise TypeError(f"{type(value).__name__} cannot be part of a key: give a record, a configuration part or a number")


def count(what: str) -> None:
    """Count a stage of the current flow run as run, or as taken from the cache."""
    _tallies[_flow_run_id()][what] += 1


def tally() -> str:
    """Say how many stages of the current flow run have run, and how many came from the cache."""
    counted = _tallies[_flow_run_id()]
    ran, cached = counted["ran"], counted["from the cache"]
    if ran == 0:
        return f"nothing to do: no stage executed, {cached} came from the cache"
    return f"{ran} stage{'s' if ran > 1 else ''} executed, {cached} came from the cache"


def log() -> logging.Logger | logging.LoggerAdapter[Any]:
    """Return the run's logger, or an ordinary one if a task is called as a plain function."""
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger("tinycats")


def _flow_run_id() -> UUID | None:
    if context := TaskRunContext.get():
        return context.task_run.flow_run_id
    context = FlowRunContext.get()
    return context.flow_run.id if context and context.flow_run else None


class _Brief(logging.Filter):
    """Show an error that is meant for people once and without its traceback, and no second line for a finished task."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == "prefect.task_runs" and record.msg.startswith("Finished in state"):
            return False  # the stage has said it with its time; a failure is told by its error
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, TinycatsError):
            record.exc_info = record.exc_text = None
            record.msg, record.args = str(error), ()
            return record.name != "prefect.flow_runs"  # its task has said it already, or its final state will
        return True


for _name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_name).addFilter(_Brief())
logging.getLogger("tinycats").setLevel(logging.INFO)  # Prefect gives `extra_loggers` a handler, but no level
