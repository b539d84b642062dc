"""What makes a function a stage: a Prefect task whose result is looked up by the content of its arguments and its code."""

import inspect
import time
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from prefect import Task
from prefect.client.schemas.objects import State

from tasks.cache import ByContent
from tasks.runs import count, log
from tinycats_core import source_code
from tinycats_core.config import Part
from tinycats_core.errors import ModalUnreachable
from tinycats_core.files import home
from tinycats_core.records import FileRecord, Record
from tinycats_core.release import hub
from tinycats_core.source_code import Entry

P = ParamSpec("P")
R = TypeVar("R")


def may_pass(task: Any, run: Any, state: State[Any]) -> bool:
    """Return whether Prefect should retry a failed task: after an outage, never after a refusal."""
    error = state.data
    return isinstance(error, ModalUnreachable) or (isinstance(error, Exception) and hub.is_transient(error))


NETWORK: dict[str, Any] = {"retries": 3, "retry_delay_seconds": [5, 20, 60], "retry_condition_fn": may_pass}


def stage(
    *runs: Entry, apart_from: tuple[Entry, ...] = (), beside: tuple[str, ...] = (), **options: Any
) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Make a Prefect task that runs once for each content of its arguments and of its code.

    Before it runs, the files of every record among its arguments are verified: what it calls may trust them. The result is
    stored as JSON under `files.home()`. It is used again as long as the files that it names are unchanged, wherever its
    arguments lie; otherwise the stage runs again.

    Args:
        runs: the functions of the core that make its result. They, what they call and the stage's own body are its code.
        apart_from: functions that these call and that change nothing of the result.
        beside: names of further files which the stage leaves in the folder of its record.
        options: passed on to `prefect.task`.
    """

    def decorate(function: Callable[P, R]) -> Task[P, R]:
        policy = ByContent(
            name=function.__name__, runs=runs, apart_from=apart_from, beside=beside, text=inspect.getsource(function)
        )

        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            _verify((args, kwargs))
            policy.note()
            count("ran")
            started = time.monotonic()
            result = function(*args, **kwargs)
            log().info("%s: done in %.1f s", function.__name__, time.monotonic() - started)
            if edited := set(source_code.edited()) & policy.code.files.keys():
                log().warning("%s ran the code of before the edit of %s", function.__name__, ", ".join(sorted(edited)))
            return result

        return Task(
            fn=run,
            cache_policy=policy,
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
