"""The cache of the stages: a result belongs to the content of a stage's arguments and to the code that made it."""

import ast
import textwrap
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast
from uuid import UUID

from prefect.cache_policies import CachePolicy
from prefect.context import TaskRunContext

from tasks.runs import count, flow_run_id, log
from tinycats_core.config import ComputeConfig, DataConfig, Part, SamplerPart
from tinycats_core.data import preparation, sources
from tinycats_core.errors import TinycatsError
from tinycats_core.files import digest_of, home, read_json, write_json
from tinycats_core.generator.samplers import find_sampler
from tinycats_core.records import OnnxModel, Record, Release, StageCode
from tinycats_core.release import manifest
from tinycats_core.source_code import Entry, code_of, foreign, parse, plain

SHOWN = ("show", "log")  # statements that only tell something are no part of what a stage makes
NOTED = 20  # codes remembered for the same arguments

_used: dict[UUID | None, dict[str, StageCode]] = defaultdict(dict)  # by flow run: the code of each stage
_keeping: set[UUID | None] = set()  # flow runs that use results of other code
_POLICIES: dict[str, "ByContent"] = {}  # of the stages, by name
_UNCACHED: dict[str, tuple[Entry, ...]] = {}  # what the other tasks run
F = TypeVar("F")


@dataclass
class ByContent(CachePolicy):
    """Keys made of the arguments' content and the code; a stored result whose files are gone or changed is forgotten."""

    name: str = ""
    runs: tuple[Entry, ...] = ()
    apart_from: tuple[Entry, ...] = ()
    beside: tuple[str, ...] = ()
    text: str = ""  # of the stage's own function
    notes: dict[UUID, tuple[Path, StageCode]] = field(default_factory=dict)  # by task run

    def __post_init__(self) -> None:
        _POLICIES[self.name] = self

    @cached_property
    def code(self) -> StageCode:
        """The code of the stage as it is now."""
        made = code_of(*self.runs, apart_from=self.apart_from)
        files = {**made.files, f"tasks: {self.name}": _own(self.text)}
        return StageCode(sha256=digest_of(files), core=made.digest, files=files)

    def compute_key(self, task_ctx: TaskRunContext, inputs: dict[str, Any], flow_parameters: dict[str, Any], **kwargs: Any) -> str:
        store, run = task_ctx.result_store, task_ctx.task_run
        arguments = f"{self.name}-{key_of(inputs, length=32)}"
        notes = home("code") / f"{arguments}.json"
        code = self._choose(_noted(notes), arguments, store, run.flow_run_id)
        self.notes[run.id] = notes, code
        _used[run.flow_run_id][self.name] = code
        key = f"{arguments}-{code.sha256[:16]}"
        if store.exists(key):
            try:
                result = store.read(key).result
            except Exception as error:  # of many kinds: a process was killed while it wrote, or writes now
                log().warning("%s: its stored result cannot be read (%s), so it runs again", self.name, type(error).__name__)
                self._forget(key)
                return key
            if self._is_intact(result):
                count("from the cache")
                log().info("%s: from the cache", self.name)
            else:
                log().warning("%s: its files are gone or have changed, so it runs again", self.name)
                self._set_aside(result)
                self._forget(key)
        return key

    def note(self) -> None:
        """Write down the code of a run that begins, so that a later run can say what has changed since."""
        context = TaskRunContext.get()
        if context and context.task_run.id in self.notes:
            path, code = self.notes[context.task_run.id]
            others = [other for other in _noted(path) if other.sha256 != code.sha256]
            write_json(path, [item.model_dump(mode="json", exclude={"kept"}) for item in (*others, code)][-NOTED:])

    def _choose(self, noted: list[StageCode], arguments: str, store: Any, run: UUID | None) -> StageCode:
        """Return the code whose result is used: the present one, or with `keep_results` the last one that has a result."""
        if not noted or store.exists(f"{arguments}-{self.code.sha256[:16]}"):
            return self.code
        done = [code for code in noted if store.exists(f"{arguments}-{code.sha256[:16]}")]
        before = (done or noted)[-1]
        changed = tuple(sorted(self.code.differences(before)))
        if not changed:
            return self.code
        if run in _keeping:
            log().warning("%s: its result is kept although this has changed: %s", self.name, ", ".join(changed))
            return before.model_copy(update={"kept": changed})
        log().info("%s: runs again, because this has changed: %s", self.name, ", ".join(changed))
        return self.code

    def _forget(self, key: str) -> None:
        (home("results") / key).unlink(missing_ok=True)

    def _is_intact(self, result: Any) -> bool:
        if isinstance(result, Release):
            return not manifest.inspect(result.folder)[1]
        if not isinstance(result, Record):
            return True
        return result.is_intact() and all(path.is_file() for path in self._files(result))

    def _set_aside(self, result: Any) -> None:
        """Rename what is left of a result, so that the stage does not take it for finished work.

        Of several files only the damaged ones: the others may belong to other results too, as the snapshots of a training do.
        """
        damaged = [file.path for file in result.files if not file.is_intact()] if len(result.files) > 1 else []
        for path in damaged or self._files(result):
            if not isinstance(result, Release):  # a damaged release is set aside by `bundle.build`
                with suppress(FileNotFoundError):  # gone, or set aside by another process
                    path.replace(path.with_name(f"{path.name}.damaged"))

    def _files(self, result: Record) -> list[Path]:
        paths = [file.path for file in result.files]
        return [*paths, *(paths[0].with_name(name) for name in self.beside)]


def keep_results() -> None:
    """Let the stages of the current flow run use results of other code than the present one."""
    _keeping.add(flow_run_id())


def keeps_results() -> bool:
    """Return whether the current flow run uses results of other code."""
    return flow_run_id() in _keeping


def stage_code(name: str) -> StageCode:
    """Return the code of a stage or a task of the current flow run: the present one if it has not been looked up yet."""
    if name in _UNCACHED:
        made = code_of(*_UNCACHED[name])
        return StageCode(sha256=made.digest, core=made.digest, files=dict(made.files))
    return _used[flow_run_id()].get(name) or _POLICIES[name].code


def used_code(*others: str) -> dict[str, StageCode]:
    """Return the code of each stage that the current flow run has used, and of others that follow."""
    used = _used[flow_run_id()] | {name: stage_code(name) for name in (*others, *_UNCACHED)}
    return dict(sorted(used.items()))


def code_is_unchanged(made_by: Mapping[str, Any]) -> bool:
    """Return whether a release's stages have run the present code, and log what has changed. Without a record they have not."""
    changed = {}
    for name, recorded in made_by.items():
        now = stage_code(name).differences(StageCode(core="", **recorded)) if name in (*_POLICIES, *_UNCACHED) else ["removed"]
        if now:
            changed[name] = now
            log().info("%s has changed since the published release: %s", name, ", ".join(now))
    return bool(made_by) and not changed


def uncached(*runs: Entry) -> Callable[[F], F]:
    """Make known which code a task runs that is in no cache."""

    def decorate(function: F) -> F:
        _UNCACHED[cast(Any, function).__name__] = runs
        return function

    return decorate


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
            return [value.digest(), preparation.fingerprint(value), *_plugin(sources.find(value.source))]
        case SamplerPart():
            return [value.digest(), *_plugin(find_sampler(value.sampler))]
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


def _plugin(value: Any) -> list[str]:
    """Return the code of a source or a sampler that was registered from outside of the project."""
    digest = foreign(value)
    return [digest] if digest else []


def _noted(path: Path) -> list[StageCode]:
    """Return the codes that have run with the same arguments, the last one last."""
    try:
        return [StageCode.model_validate(item) for item in read_json(path)]
    except (TinycatsError, ValueError, TypeError):
        return []  # none yet, or half written by a killed process: there is nothing to compare with


def _own(text: str) -> str:
    """Return a digest of a stage's own function, without what only tells something."""
    [function] = parse(textwrap.dedent(text)).body
    assert isinstance(function, ast.FunctionDef)
    function.body = [statement for statement in function.body if not _only_tells(statement)]
    function.decorator_list = []
    return digest_of(plain(function))


def _only_tells(statement: ast.stmt) -> bool:
    called = next((node for node in ast.walk(statement) if isinstance(node, ast.Call)), None)
    root = called.func if called else None
    while isinstance(root, ast.Attribute | ast.Call):
        root = root.value if isinstance(root, ast.Attribute) else root.func
    return isinstance(statement, ast.Expr) and isinstance(root, ast.Name) and root.id in SHOWN
